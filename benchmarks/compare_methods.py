"""Perplexity of ELSA against the other ways to reach a sparsity, on one model, the same text, side by side in one run.

Every method goes through ``oneshot`` and gets windows of the same documents, by default 65,536 tokens: 64 steps of
2 x 512 for the methods that train, 128 samples of 512 for those that calibrate. Magnitude + finetuning has ELSA's
learning rate and schedule, the published form its published ones.
Results are appended to a JSON-lines file as they come; the table is made from that file.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.assets import evaluation_sequences, model_directory, training_texts
from benchmarks.magnitude import linear_sparsity, prune_by_magnitude_
from elsa_modifier import ELSAModifier
from elsa_modifier.evaluation import perplexity

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "compare_methods.jsonl"
TABLE = ROOT / "docs" / "results" / "compare_methods.md"
LENGTH = 512
CALIBRATION_SAMPLES = 128


def _published(sparsity: float) -> dict[str, Any]:
    """Learning rate and penalty of the paper's OPT-125M, the published model of this size."""
    path = ROOT / "recipes" / "paper" / "opt-125m" / f"elsa_{round(sparsity * 100)}.yaml"
    fields: dict[str, Any] = yaml.safe_load(path.read_text())["prune_stage"]["prune_modifiers"]["ELSAModifier"]
    return fields


def _methods(sparsity: float, steps: int) -> dict[str, Callable[[], Any]]:
    budget = {"steps": steps, "batch_size": 2, "sequence_length": LENGTH}
    linears: dict[str, Any] = {"targets": ["Linear"], "ignore": ["lm_head"]}
    return {
        "magnitude": lambda: None,
        "Wanda": lambda: WandaPruningModifier(sparsity=sparsity, mask_structure="0:0", **linears),
        "SparseGPT": lambda: SparseGPTModifier(sparsity=sparsity, mask_structure="0:0", **linears),
        "magnitude + finetuning": lambda: ELSAModifier(sparsity=sparsity, finalize=0.0, **budget),
        "ELSA as published": lambda: ELSAModifier(**(_published(sparsity) | budget)),
        "ELSA": lambda: ELSAModifier(sparsity=sparsity, **budget),
    }


def _prune(name: str, modifier: Any, sparsity: float) -> PreTrainedModel:
    if name == "magnitude":
        model = AutoModelForCausalLM.from_pretrained(model_directory())
        prune_by_magnitude_(model, sparsity)
        return model
    # ELSA packs documents itself; the layer-wise methods get the same, full windows.
    packing = {} if isinstance(modifier, ELSAModifier) else {"max_seq_length": LENGTH, "concatenate_data": True}
    return oneshot(
        model=str(model_directory()),
        dataset=training_texts(),
        recipe=[modifier],
        num_calibration_samples=CALIBRATION_SAMPLES,
        **packing,
    )


def _record(**values: Any) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(values) + "\n")


def write_table() -> None:
    """Render the last result of each method and sparsity as a Markdown table."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    latest = {(r["method"], r["sparsity"]): r for r in rows}
    sparsities = sorted({r["sparsity"] for r in rows if r["sparsity"]})
    methods = list(dict.fromkeys(["dense", *_methods(0.5, 1)]))
    lines = [
        "# Methods compared",
        "",
        f"SmolLM2-135M-Instruct, perplexity on held-out C4 / Wikipedia text at sequence {LENGTH}. Methods that train: "
        f"{max(r['steps'] for r in rows)} steps of {2 * LENGTH:,} tokens. Wanda and SparseGPT: {CALIBRATION_SAMPLES} "
        f"samples of {LENGTH} tokens. In brackets, minutes on two CPU cores.",
        "",
        "`python -m benchmarks.compare_methods` (or `make benchmarks`) prints and writes this.",
        "",
        "| method | " + " | ".join(f"{s:.0%}" for s in sparsities) + " |",
        "|---" * (len(sparsities) + 1) + "|",
    ]
    for method in methods:
        cells = []
        for sparsity in sparsities:
            row = latest.get((method, 0.0 if method == "dense" else sparsity))
            cells.append(f"{row['C4']:,.1f} / {row['Wikipedia']:,.1f} ({row['minutes']:.0f})" if row else "")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text("\n".join(lines) + "\n")
    print(TABLE.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9])
    parser.add_argument("--steps", type=int, default=64, help="optimizer steps of the methods that train")
    parser.add_argument("--methods", nargs="+", default=None, help="only these")
    parser.add_argument("--table", action="store_true", help="only write the table from earlier results")
    arguments = parser.parse_args()
    if not arguments.table:
        held_out = evaluation_sequences(AutoTokenizer.from_pretrained(model_directory()), length=LENGTH)

        def measure(method: str, sparsity: float, model: PreTrainedModel, minutes: float) -> None:
            values = {title: perplexity(model, ids) for title, ids in held_out.items()}
            # The zeros counted, not asked for.
            counted = linear_sparsity(model)
            print(f"{method} at {sparsity:.0%}: {values}, {counted:.4%} zeros, {minutes:.1f} minutes", flush=True)
            _record(method=method, sparsity=sparsity, steps=arguments.steps, minutes=minutes, zeros=counted, **values)

        measure("dense", 0.0, AutoModelForCausalLM.from_pretrained(model_directory()), 0.0)
        for sparsity in arguments.sparsities:
            for name, build in _methods(sparsity, arguments.steps).items():
                if arguments.methods is None or name in arguments.methods:
                    torch.manual_seed(0)
                    started = time.perf_counter()
                    model = _prune(name, build(), sparsity)
                    measure(name, sparsity, model, (time.perf_counter() - started) / 60)
    write_table()


if __name__ == "__main__":
    main()
