"""Learning rate x penalty, five of each over a factor of 16, for ELSA as published, as it was, and as it is.

The centre of a grid is what its form says: the published recipe's penalty and the default learning rate, or the
defaults. Each measurement is a row of benchmarks/results/sensitivity.jsonl, and one that is there is not made again.
"""

import argparse
from typing import Any

from benchmarks.ablation import VARIANTS
from benchmarks.measuring import append_row, measure, publish, read_rows
from benchmarks.methods import METHODS, Setting
from benchmarks.models import MODELS, BenchmarkModel
from elsa_modifier import ELSAModifier
from elsa_modifier.training.learning_rate import default_learning_rate

NAME = "sensitivity"
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
FORMS = ("as published", "as it was", "as it is")
_AS_IT_WAS = "no ramp, pull rising, dual, no teacher, no shared budget"


def _modifier(form: str, model: BenchmarkModel, sparsity: float, lr_factor: float, penalty_factor: float) -> Any:
    rate = default_learning_rate(steps=model.steps, width=model.width, sparsity=sparsity)
    if form == "as published":
        made = METHODS["ELSA as published"].make(Setting(model, sparsity))
        made.lr = rate * lr_factor
        made.penalty = made.penalty.model_copy(update={"value": made.penalty.value * penalty_factor})
        return made
    fields = VARIANTS[_AS_IT_WAS] if form == "as it was" else {}
    penalty = fields.get("penalty", {}) | {"value": 0.3 * penalty_factor}
    # A pull by more than all of a weight is one by all of it.
    penalty["value"] = min(1.0, penalty["value"])
    return ELSAModifier(**{"sparsity": sparsity, "lr": rate * lr_factor} | model.budget | fields | {"penalty": penalty})


def write_page() -> None:
    """A grid for each model, sparsity and form: perplexity over the lowest in the grid."""
    rows = {tuple(row[k] for k in ("model", "sparsity", "form", "lr", "penalty")): row for row in read_rows(NAME)}
    lines = [
        "# Learning rate and penalty",
        "",
        "Perplexity on held-out text. Down: the learning rate, times the default one. Across: the penalty, times the "
        "form's own (a pull is at most 1). *As published* is the paper's recipe for OPT-125M with the default learning "
        "rate at the centre; *as it was* has no ramp, a pull that rises by a cosine, a dual, no teacher and no shared "
        "budget; *as it is* is the default.",
        "",
        "`python -m benchmarks.sensitivity [--model M] [--sparsity S]` prints and writes this.",
    ]
    for model, sparsity, form in sorted({key[:3] for key in rows}, key=lambda key: (key[:2], FORMS.index(key[2]))):
        title = next(iter(MODELS[model].held_out()))
        here = {key[3:]: row[title] for key, row in rows.items() if key[:3] == (model, sparsity, form)}
        lines += ["", f"## {MODELS[model].title}, {sparsity:.0%}, {form}", ""]
        lines += ["| | " + " | ".join(f"penalty x {p:g}" for p in FACTORS) + " |", "|---" * (len(FACTORS) + 1) + "|"]
        for lr in FACTORS:
            cells = [f"{here[lr, p]:,.4g}" if (lr, p) in here else "" for p in FACTORS]
            lines.append(f"| lr x {lr:g} | " + " | ".join(cells) + " |")
        near = [here[lr, p] for lr in (0.5, 1.0, 2.0) for p in (0.5, 1.0, 2.0) if (lr, p) in here]
        if len(near) == 9:
            worst = max(near) / here[1.0, 1.0]
            lines += ["", f"Within a factor of 2 of the centre, either way: at most {worst:.3f} x the centre's; the "]
            lines[-1] += f"lowest of the grid is {min(here.values()) / here[1.0, 1.0]:.3f} x."
    publish(NAME, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(MODELS), default="stories260k")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    arguments = parser.parse_args()
    model = MODELS[arguments.model]
    held_out = model.held_out()
    for form in arguments.forms:
        # From the centre outwards, so that a run that is cut short has what matters most.
        cells = [(lr, penalty) for lr in FACTORS for penalty in FACTORS]
        for lr, penalty in sorted(cells, key=lambda c: max(c[0], 1 / c[0]) + max(c[1], 1 / c[1])):
            what = {"model": model.name, "sparsity": arguments.sparsity, "form": form, "lr": lr, "penalty": penalty}
            if any(what.items() <= row.items() for row in read_rows(NAME)):
                continue
            modifier = _modifier(form, model, arguments.sparsity, lr, penalty)
            append_row(NAME, what | measure(model, held_out, modifier, magnitude={}))
            write_page()


if __name__ == "__main__":
    main()
