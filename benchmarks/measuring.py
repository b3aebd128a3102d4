"""What the benchmarks share: one way to prune and measure, one file a benchmark that results are appended to."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from llmcompressor import oneshot
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.magnitude import linear_sparsity, prune_by_magnitude_
from benchmarks.models import SMOLLM2, BenchmarkModel
from elsa_modifier.evaluation import perplexity

__all__ = [
    "BUDGET",
    "LENGTH",
    "MALLOC",
    "ROOT",
    "Results",
    "append_row",
    "measure",
    "publish",
    "read_rows",
    "resident",
    "timed",
]

ROOT = Path(__file__).resolve().parent.parent
# SmolLM2's, which is all that most benchmarks look at.
LENGTH = SMOLLM2.sequence_length
BUDGET = SMOLLM2.budget
# Environment of a process whose resident memory is to follow its tensors: glibc returns them to the kernel at once,
# also where what is around says otherwise, as is good for speed.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_MAX_": "1000000"}


class Results:
    """Rows of a benchmark, kept in ``benchmarks/results/<name>.jsonl``; the last row of a label and sparsity counts."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.held_out = SMOLLM2.held_out()

    def measure(self, label: str, sparsity: float, modifier: Any = None) -> None:
        """Prune SmolLM2 with a modifier, by magnitude without one, or not at all at sparsity 0; append perplexities."""
        self.record(label, sparsity, measure(SMOLLM2, self.held_out, modifier, magnitude={"sparsity": sparsity}))

    def record(self, label: str, sparsity: float, values: dict[str, Any]) -> None:
        """Append a row that was measured otherwise."""
        append_row(self.name, {"label": label, "sparsity": sparsity} | values)

    def latest(self) -> dict[tuple[str, float], dict[str, Any]]:
        """The last row of each label and sparsity."""
        return {(row["label"], row["sparsity"]): row for row in read_rows(self.name)}


def measure(
    on: BenchmarkModel,
    held_out: dict[str, Tensor],
    modifier: Any,
    *,
    magnitude: dict[str, Any],
    seed: int = 0,
) -> dict[str, Any]:
    """Prune a model, by magnitude without a modifier: minutes, fraction of zeros, perplexity of each text.

    :param held_out: (sequences, length) token ids, by title
    :param modifier: one, or several in order
    :param magnitude: what ``prune_by_magnitude_`` takes if there is no modifier
    """
    torch.manual_seed(seed)
    started = time.perf_counter()
    model = _prune(on, modifier, magnitude)
    minutes = (time.perf_counter() - started) / 60
    row = {"minutes": round(minutes, 2), "zeros": linear_sparsity(model)}
    return row | {title: round(perplexity(model, ids), 2) for title, ids in held_out.items()}


def append_row(name: str, row: dict[str, Any]) -> None:
    """Append a row to ``benchmarks/results/<name>.jsonl`` and print it."""
    print(row, flush=True)
    file = _rows_file(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as opened:
        opened.write(json.dumps(row) + "\n")


def read_rows(name: str) -> list[dict[str, Any]]:
    """All rows of a benchmark, in the order in which they were measured; none if there is no file."""
    file = _rows_file(name)
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def resident(field: str) -> int:
    """Bytes of this process's memory: what it holds now (``VmRSS``), or has held at most (``VmHWM``)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(field)))


def timed(work: Callable[[], object]) -> float:
    """Seconds that a piece of work takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def publish(name: str, lines: list[str]) -> None:
    """Write a Markdown page to ``docs/results/<name>.md`` and print it."""
    page = ROOT / "docs" / "results" / f"{name}.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(lines) + "\n")
    print(page.read_text())


def _rows_file(name: str) -> Path:
    return ROOT / "benchmarks" / "results" / f"{name}.jsonl"


def _prune(on: BenchmarkModel, modifier: Any, magnitude: dict[str, Any]) -> PreTrainedModel:
    if modifier is None:
        model = AutoModelForCausalLM.from_pretrained(on.directory())
        prune_by_magnitude_(model, **magnitude)
        return model
    texts = on.training_texts()
    recipe = modifier if isinstance(modifier, list) else [modifier]
    # What trains packs documents itself; the layer-wise methods get the same, full windows.
    pack = any(m.requires_calibration_data for m in recipe) and "text" in texts.column_names
    return oneshot(
        model=str(on.directory()),
        dataset=texts,
        recipe=recipe,
        num_calibration_samples=on.calibration_samples,
        **({"max_seq_length": on.sequence_length, "concatenate_data": True} if pack else {}),
    )
