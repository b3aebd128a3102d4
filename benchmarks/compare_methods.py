"""Perplexity of ELSA against the other ways to reach a sparsity: several models, the same text for every method.

Each measurement is a row of benchmarks/results/compare_methods.jsonl, and one that is there is not made again. Methods
that train with a learning rate of their own are run with three, each twice the last, and the best counts; ELSA has its
defaults. With several seeds the learning rate is chosen with the first. ``--steps`` makes every run, and with it the
text, longer.
"""

import argparse
import dataclasses
import math
from typing import Any

from benchmarks.comparison_page import write_page
from benchmarks.measuring import append_row, measure, read_rows
from benchmarks.methods import METHODS, Method, Setting
from benchmarks.models import MODELS, BenchmarkModel

NAME = "compare_methods"


class Comparison:
    """The rows of one model, measured where they are missing.

    :param again: measure also what is there
    """

    def __init__(self, model: BenchmarkModel, *, again: bool = False) -> None:
        self.model = model
        self.held_out = model.held_out()
        self._done = {} if again else {_key(row): row for row in read_rows(NAME)}

    def dense(self) -> None:
        """Measure the model as it is."""
        self._row("dense", Setting(self.model, 0.0), METHODS["magnitude"])

    def run(self, name: str, sparsity: float | str, *, lrs: list[float] | None, seeds: list[int]) -> None:
        """Measure a method: with every learning rate and the first seed, then with the best and the other seeds."""
        method = METHODS[name]
        setting = Setting(self.model, sparsity)
        if not method.fits(setting) or (setting.structure != "unstructured" and not method.structured):
            return
        tried: list[float] | list[None] = (lrs or setting.learning_rates) if method.tuned else [None]
        first, *others = seeds
        rows = [self._row(name, Setting(self.model, sparsity, lr, first), method) for lr in tried]
        best = min(rows, key=self._badness)["lr"]
        for seed in others if method.seeded else []:
            self._row(name, Setting(self.model, sparsity, best, seed), method)

    def _badness(self, row: dict[str, Any]) -> float:
        return sum(math.log(row[title]) for title in self.held_out)

    def _row(self, name: str, setting: Setting, method: Method) -> dict[str, Any]:
        seed = setting.seed if method.seeded else 0
        what: dict[str, Any] = {"model": self.model.name, "method": name, "sparsity": setting.sparsity}
        what |= {"lr": setting.lr, "seed": seed, "steps": self.model.steps}
        if _key(what) not in self._done:
            pattern = {"sparsity": setting.fraction, "mask_structure": setting.structure}
            modifier = method.make(setting)
            row = what | measure(self.model, self.held_out, modifier, magnitude=pattern, seed=setting.seed)
            append_row(NAME, row)
            write_page(read_rows(NAME))
            self._done[_key(what)] = row
        return self._done[_key(what)]


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    steps = row.get("steps", MODELS[row["model"]].steps)
    return *(row[column] for column in ("model", "method", "sparsity", "lr", "seed")), steps


def _sparsity(text: str) -> float | str:
    return text if ":" in text else float(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["smollm2", "gemma3"])
    parser.add_argument(
        "--sparsities", type=_sparsity, nargs="+", default=[0.5, 0.7, 0.8, 0.9, "2:4"], help="fractions, or N:M"
    )
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--steps", type=int, nargs="+", help="lengths of the runs, instead of the model's own")
    parser.add_argument("--lrs", type=float, nargs="+", help="instead of the three that are tried")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--again", action="store_true", help="measure also what is measured already")
    parser.add_argument("--page", action="store_true", help="measure nothing, only write the page")
    arguments = parser.parse_args()
    for name in [] if arguments.page else arguments.models:
        for steps in arguments.steps or [MODELS[name].steps]:
            comparison = Comparison(dataclasses.replace(MODELS[name], steps=steps), again=arguments.again)
            comparison.dense()
            for sparsity in arguments.sparsities:
                for method in arguments.methods:
                    comparison.run(method, sparsity, lrs=arguments.lrs, seeds=arguments.seeds)
    write_page(read_rows(NAME))


if __name__ == "__main__":
    main()
