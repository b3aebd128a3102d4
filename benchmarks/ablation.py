"""ELSA with one field changed at a time, at one sparsity, with the tokens of ``compare_methods``."""

import argparse
from typing import Any

from benchmarks.measuring import BUDGET, LENGTH, Results, publish
from elsa_modifier import ELSAModifier

VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "rho 1": {"penalty": {"value": 1.0}},
    "rho 0.1": {"penalty": {"value": 0.1}},
    "rho 0.03": {"penalty": {"value": 0.03}},
    "held support": {"penalty": {"free_support": False}},
    "coupled, free support, lam 1": {"penalty": {"form": "coupled", "value": 1.0}},
    "coupled, free support, lam 0.1": {"penalty": {"form": "coupled", "value": 0.1}},
    "coupled, free support, lam 0.01": {"penalty": {"form": "coupled", "value": 0.01}},
    "coupled, free support, lam 0.1, magnitude projection": {
        "penalty": {"form": "coupled", "value": 0.1},
        "projection": "magnitude",
    },
    "coupled, held support, lam 0.1": {"penalty": {"form": "coupled", "value": 0.1, "free_support": False}},
    "magnitude projection": {"projection": "magnitude"},
    "interval 32": {"interval": 32},
    "finalize 0.6": {"finalize": 0.6},
    "finalize 1.0": {"finalize": 1.0},
    "lr 2e-4": {"lr": 2e-4},
    "lr 5e-4": {"lr": 5e-4},
    "lr 2e-3": {"lr": 2e-3},
}


def write_table(results: Results) -> None:
    """Render the rows as a Markdown table, one a sparsity."""
    latest = results.latest()
    lines = [
        "# One field at a time",
        "",
        f"SmolLM2-135M-Instruct, {BUDGET['steps']} steps of {BUDGET['batch_size']} x {LENGTH} tokens; perplexity on "
        "held-out C4 / Wikipedia text. Defaults: decoupled, free support, rho 0.3, Fisher projection, finalize 0.8.",
        "",
        "`python -m benchmarks.ablation --sparsity S [--variants ...]` prints and writes this.",
    ]
    for sparsity in sorted({s for _, s in latest}):
        lines += ["", f"| {sparsity:.0%} | C4 | Wikipedia | minutes |", "|---|---|---|---|"]
        for name in VARIANTS:
            if row := latest.get((name, sparsity)):
                lines.append(f"| {name} | {row['C4']:,.1f} | {row['Wikipedia']:,.1f} | {row['minutes']:.1f} |")
    publish("ablation", lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    arguments = parser.parse_args()
    results = Results("ablation")
    for name in arguments.variants:
        fields = {"sparsity": arguments.sparsity} | BUDGET | VARIANTS[name]
        results.measure(name, arguments.sparsity, ELSAModifier(**fields))
        write_table(results)


if __name__ == "__main__":
    main()
