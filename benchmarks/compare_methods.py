"""Perplexity of ELSA against the other ways to reach a sparsity, on one model, the same text, side by side in one run.

Every method goes through ``oneshot`` and gets 65,536 tokens of the same documents: 64 steps of 2 x 512 for the methods
that train, 128 samples of 512 for those that calibrate. Magnitude + finetuning and gradual pruning have ELSA's learning
rate and schedule, the published form its published ones.
"""

import argparse
from collections.abc import Callable
from typing import Any

import yaml
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

from benchmarks.baselines.gradual import GradualPruningModifier
from benchmarks.measuring import BUDGET, CALIBRATION_SAMPLES, LENGTH, ROOT, Results, publish
from elsa_modifier import ELSAModifier
from elsa_modifier.training.learning_rate import default_learning_rate

WIDTH = 576  # of SmolLM2-135M


def _published(sparsity: float) -> dict[str, Any]:
    """All that the recipe of the paper's OPT-125M says, the published model of this size. One GPU: lam as printed."""
    path = ROOT / "recipes" / "paper" / "opt-125m" / f"elsa_{round(sparsity * 100)}.yaml"
    fields: dict[str, Any] = yaml.safe_load(path.read_text())["prune_stage"]["prune_modifiers"]["ELSAModifier"]
    return fields


def _gradual(sparsity: float, *, fisher: bool) -> GradualPruningModifier:
    lr = default_learning_rate(steps=BUDGET["steps"], width=WIDTH, sparsity=sparsity)
    return GradualPruningModifier(sparsity=sparsity, fisher=fisher, lr=lr, **BUDGET)


def _methods(sparsity: float) -> dict[str, Callable[[], Any]]:
    layer_wise: dict[str, Any] = {"targets": ["Linear"], "ignore": ["lm_head"], "mask_structure": "0:0"}
    return {
        "magnitude": lambda: None,
        "magnitude + finetuning": lambda: ELSAModifier(sparsity=sparsity, finalize=0.0, **BUDGET),
        "gradual magnitude": lambda: _gradual(sparsity, fisher=False),
        "gradual Fisher": lambda: _gradual(sparsity, fisher=True),
        "ELSA": lambda: ELSAModifier(sparsity=sparsity, **BUDGET),
        "Wanda": lambda: WandaPruningModifier(sparsity=sparsity, **layer_wise),
        "SparseGPT": lambda: SparseGPTModifier(sparsity=sparsity, **layer_wise),
        "ELSA as published": lambda: ELSAModifier(**(_published(sparsity) | BUDGET)),
    }


def write_table(results: Results) -> None:
    """Render the last row of each method and sparsity as a Markdown table."""
    latest = results.latest()
    sparsities = sorted({sparsity for _, sparsity in latest} - {0.0})
    dense = latest["dense", 0.0]
    lines = [
        "# Methods compared",
        "",
        f"SmolLM2-135M-Instruct, perplexity on held-out C4 / Wikipedia text in sequences of {LENGTH}; dense "
        f"{dense['C4']:.1f} / {dense['Wikipedia']:.1f}. Every method sees {CALIBRATION_SAMPLES * LENGTH:,} tokens of "
        f"the same documents: {BUDGET['steps']} steps of {BUDGET['batch_size']} x {LENGTH}, or {CALIBRATION_SAMPLES} "
        f"calibration samples of {LENGTH}. In brackets, minutes on two CPU cores.",
        "",
        "`python -m benchmarks.compare_methods` (or `make benchmarks`) prints and writes this.",
        "",
        "| method | " + " | ".join(f"{s:.0%}" for s in sparsities) + " |",
        "|---" * (len(sparsities) + 1) + "|",
    ]
    for method in _methods(0.5):
        rows = [latest.get((method, sparsity)) for sparsity in sparsities]
        cells = [f"{r['C4']:,.1f} / {r['Wikipedia']:,.1f} ({r['minutes']:.1f})" if r else "" for r in rows]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    publish("compare_methods", lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9])
    parser.add_argument("--methods", nargs="+", choices=list(_methods(0.5)), default=list(_methods(0.5)))
    arguments = parser.parse_args()
    results = Results("compare_methods")
    results.measure("dense", 0.0)
    for sparsity in arguments.sparsities:
        for name in arguments.methods:
            results.measure(name, sparsity, _methods(sparsity)[name]())
            write_table(results)


if __name__ == "__main__":
    main()
