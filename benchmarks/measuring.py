"""What the benchmarks share: one way to prune and measure, one file a benchmark that results are appended to."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.assets import evaluation_sequences, model_directory, training_texts
from benchmarks.baselines.gradual import GradualPruningModifier
from benchmarks.magnitude import linear_sparsity, prune_by_magnitude_
from elsa_modifier import ELSAModifier
from elsa_modifier.evaluation import perplexity

__all__ = ["BUDGET", "CALIBRATION_SAMPLES", "LENGTH", "ROOT", "Results", "publish", "resident"]

ROOT = Path(__file__).resolve().parent.parent
LENGTH = 512
# The same 65,536 tokens for methods that train and for those that calibrate.
CALIBRATION_SAMPLES = 128
BUDGET: dict[str, Any] = {"steps": 64, "batch_size": 2, "sequence_length": LENGTH}


class Results:
    """Rows of a benchmark, kept in ``benchmarks/results/<name>.jsonl``; the last row of a label and sparsity counts."""

    def __init__(self, name: str) -> None:
        self._file = ROOT / "benchmarks" / "results" / f"{name}.jsonl"
        self.held_out = evaluation_sequences(AutoTokenizer.from_pretrained(model_directory()), length=LENGTH)

    def measure(self, label: str, sparsity: float, modifier: Any = None) -> None:
        """Prune SmolLM2 with a modifier, by magnitude without one, or not at all at sparsity 0; append perplexities."""
        torch.manual_seed(0)
        started = time.perf_counter()
        model = _prune(modifier, sparsity)
        minutes = (time.perf_counter() - started) / 60
        row = {"label": label, "sparsity": sparsity, "minutes": round(minutes, 2), "zeros": linear_sparsity(model)}
        row |= {title: round(perplexity(model, ids), 2) for title, ids in self.held_out.items()}
        self._append(row)

    def record(self, label: str, sparsity: float, values: dict[str, Any]) -> None:
        """Append a row that was measured otherwise."""
        self._append({"label": label, "sparsity": sparsity} | values)

    def _append(self, row: dict[str, Any]) -> None:
        print(row, flush=True)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def latest(self) -> dict[tuple[str, float], dict[str, Any]]:
        """The last row of each label and sparsity."""
        rows = [json.loads(line) for line in self._file.read_text().splitlines()]
        return {(row["label"], row["sparsity"]): row for row in rows}


def resident(field: str) -> int:
    """Bytes of this process's memory: what it holds now (``VmRSS``), or has held at most (``VmHWM``)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(field)))


def publish(name: str, lines: list[str]) -> None:
    """Write a Markdown page to ``docs/results/<name>.md`` and print it."""
    page = ROOT / "docs" / "results" / f"{name}.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(lines) + "\n")
    print(page.read_text())


def _prune(modifier: Any, sparsity: float) -> PreTrainedModel:
    if modifier is None:
        model = AutoModelForCausalLM.from_pretrained(model_directory())
        if sparsity > 0:
            prune_by_magnitude_(model, sparsity)
        return model
    # What trains packs documents itself; the layer-wise methods get the same, full windows.
    packing = (
        {}
        if isinstance(modifier, (ELSAModifier, GradualPruningModifier))
        else {"max_seq_length": LENGTH, "concatenate_data": True}
    )
    return oneshot(
        model=str(model_directory()),
        dataset=training_texts(),
        recipe=[modifier],
        num_calibration_samples=CALIBRATION_SAMPLES,
        **packing,
    )
