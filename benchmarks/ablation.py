"""ELSA with one field changed at a time, on one model at one sparsity, with the tokens of ``compare_methods``."""

import argparse
from typing import Any

from benchmarks.measuring import append_row, measure, publish, read_rows
from benchmarks.models import MODELS, BenchmarkModel
from elsa_modifier import ELSAModifier
from elsa_modifier.training.learning_rate import default_learning_rate

VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no teacher": {"objective": "next_token"},
    "teacher alone": {"objective": {"weight": 1.0}},
    "a fifth next token": {"objective": {"weight": 0.8}},
    "half next token": {"objective": {"weight": 0.5}},
    "half next token, and hidden states": {"objective": {"name": "distill_hidden", "weight": 0.5}},
    "teacher alone, and hidden states": {"objective": {"name": "distill_hidden", "weight": 1.0}},
    "and hidden states": {"objective": "distill_hidden"},
    "reconstruction": {"objective": "reconstruction"},
    "temperature 2": {"objective": {"temperature": 2.0}},
    "no ramp": {"sparsity_schedule": "constant"},
    "no ramp, the pull rising by a cosine": {"sparsity_schedule": "constant", "penalty": {"schedule": "cosine"}},
    "no ramp, pull rising, dual, no teacher": {
        "sparsity_schedule": "constant",
        "penalty": {"schedule": "cosine", "dual": True},
        "objective": "next_token",
    },
    "linear ramp": {"sparsity_schedule": "linear"},
    "ramp to 0.4, mask fixed at 0.6": {"sparsity_schedule": {"end": 0.4}, "finalize": 0.6},
    "mask fixed at the end": {"finalize": 1.0},
    "dual": {"penalty": {"dual": True}},
    "rho 1": {"penalty": {"value": 1.0}},
    "rho 0.1": {"penalty": {"value": 0.1}},
    "rho 0.03": {"penalty": {"value": 0.03}},
    "magnitude projection": {"projection": "magnitude"},
    "no shared budget": {"shared_budget": False},
    "no ramp, pull rising, dual, no teacher, no shared budget": {
        "sparsity_schedule": "constant",
        "penalty": {"schedule": "cosine", "dual": True},
        "objective": "next_token",
        "shared_budget": False,
    },
    "interval 32": {"interval": 32},
    "interval 1": {"interval": 1},
    "second decay rate 0.99": {"betas": [0.9, 0.99]},
    "second decay rate 0.95": {"betas": [0.9, 0.95]},
}
HALF_BATCH = "half the batch, twice the steps"
FACTORS = {"lr / 4": 0.25, "lr / 2": 0.5, "lr x 2": 2.0, "lr x 4": 4.0}
LABELS = [*VARIANTS, HALF_BATCH, *FACTORS]


def _fields(name: str, model: BenchmarkModel, sparsity: float, steps: int) -> dict[str, Any]:
    fields = {"sparsity": sparsity} | model.budget | {"steps": steps} | VARIANTS.get(name, {})
    if name == HALF_BATCH:
        fields |= {"steps": 2 * steps, "batch_size": model.batch_size // 2}
    if name in FACTORS:
        fields["lr"] = FACTORS[name] * default_learning_rate(steps=steps, width=model.width, sparsity=sparsity)
    return fields


def write_page() -> None:
    """A table for each model, sparsity and length of the run, from the last row of each variant and seed."""
    rows = {tuple(row[key] for key in ("model", "sparsity", "steps", "label", "seed")): row for row in read_rows(NAME)}
    lines = [
        "# One field at a time",
        "",
        "Perplexity on held-out text, on each of the seeds. Models, texts and tokens are those of "
        "[compare_methods.md](compare_methods.md). Most rows of stories260K are older than the present default of the "
        "learning rate, and had 0.88 times as much in 300 steps, 0.66 times in 1,200.",
        "",
        "`python -m benchmarks.ablation --model M --sparsity S [--steps N] [--variants ...] [--seeds ...]` prints and "
        "writes this.",
    ]
    for model, sparsity, steps in sorted({key[:3] for key in rows}):
        titles = list(MODELS[model].held_out())
        lines += ["", f"## {MODELS[model].title}, {sparsity:.0%}, {steps:,} steps", ""]
        lines += ["| | " + " | ".join(titles) + " |", "|---" * (1 + len(titles)) + "|"]
        for label in LABELS:
            found = [row for key, row in sorted(rows.items(), key=str) if key[:4] == (model, sparsity, steps, label)]
            if found:
                cells = [" / ".join(f"{row[title]:,.2f}" for row in found) for title in titles]
                lines.append(f"| {label} | " + " | ".join(cells) + " |")
    publish(NAME, lines)


NAME = "ablation"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(MODELS), default="smollm2")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--steps", type=int, help="instead of the model's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", choices=LABELS, default=LABELS)
    arguments = parser.parse_args()
    model = MODELS[arguments.model]
    steps = arguments.steps or model.steps
    held_out = model.held_out()
    for name in arguments.variants:
        for seed in arguments.seeds:
            modifier = ELSAModifier(**_fields(name, model, arguments.sparsity, steps), seed=seed)
            row = {"model": model.name, "sparsity": arguments.sparsity, "steps": steps, "label": name, "seed": seed}
            append_row(NAME, row | measure(model, held_out, modifier, magnitude={}, seed=seed))
            write_page()


if __name__ == "__main__":
    main()
