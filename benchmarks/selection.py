"""Time of selecting the k largest scores against two plain reads of the tensor, and against partitions and sorts.

Every method returns the mask of the kept entries. The methods take turns, and the best of several rounds counts: what
else runs on a machine only ever adds time.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.measuring import ROOT, publish
from elsa_modifier.admm.selection import largest_mask

FRACTION = 0.2
OURS, READS = "selection", "two reads"


def _two_reads(scores: Tensor, keep: int) -> None:
    scores.sum()
    scores.sum()


def _partition(scores: Tensor, keep: int) -> Tensor:
    rank = scores.numel() - keep
    return scores >= float(np.partition(scores.numpy(), rank)[rank])


def _kthvalue(scores: Tensor, keep: int) -> Tensor:
    return scores >= scores.kthvalue(scores.numel() - keep + 1).values


def _topk(scores: Tensor, keep: int) -> Tensor:
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[scores.topk(keep, sorted=False).indices] = True
    return mask


METHODS: dict[str, Callable[[Tensor, int], object]] = {
    READS: _two_reads,
    OURS: largest_mask,
    "numpy.partition": _partition,
    "torch.kthvalue": _kthvalue,
    "torch.topk": _topk,
}


def measure(count: int, rounds: int) -> dict[str, float]:
    """Seconds of each method on ``count`` scores."""
    scores = torch.randn(count, generator=torch.Generator().manual_seed(0)).abs_()
    keep = round(FRACTION * count)
    best = dict.fromkeys(METHODS, float("inf"))
    for _ in range(rounds):
        for name, method in METHODS.items():
            started = time.perf_counter()
            method(scores, keep)
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def _page(seconds: dict[int, dict[str, float]], rounds: int) -> list[str]:
    return [
        "# Selecting the largest scores",
        "",
        f"The mask of the largest {FRACTION:.0%} of n fp32 scores (absolute values of a normal distribution), in "
        f"milliseconds: best of {rounds}, {torch.get_num_threads()} threads. The ratio is that of the selection to two "
        "sums over the same tensor. Only the selection breaks ties exactly and refuses what is not finite.",
        "",
        "`python -m benchmarks.selection` prints and writes this.",
        "",
        "![time against the number of scores](selection.svg)",
        "",
        "| n | " + " | ".join(METHODS) + " | ratio |",
        "|---" * (len(METHODS) + 2) + "|",
        *(
            f"| {count:,} | "
            + " | ".join(f"{1000 * row[name]:.1f}" for name in METHODS)
            + f" | {row[OURS] / row[READS]:.1f} |"
            for count, row in seconds.items()
        ),
    ]


def _draw(seconds: dict[int, dict[str, float]]) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name in METHODS:
        axes.loglog(list(seconds), [1000 * row[name] for row in seconds.values()], marker="o", label=name)
    axes.set(xlabel="scores", ylabel="time, ms")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(ROOT / "docs" / "results" / "selection.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000_000, 4_500_000, 45_000_000, 100_000_000])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    seconds = {count: measure(count, arguments.rounds) for count in arguments.sizes}
    publish("selection", _page(seconds, arguments.rounds))
    _draw(seconds)


if __name__ == "__main__":
    main()
