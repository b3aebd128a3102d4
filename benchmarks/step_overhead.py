"""What ADMM adds to a training step, and what its state weighs, on SmolLM2-135M.

Forward, backward and a fused Adam step are timed with and without the ADMM part around the same Adam, in turn, in one
process. The projection runs every ``interval`` steps; its cost is spread over them. What ADMM takes
does not depend on the tokens of a step, so the ratio does. Medians, in seconds.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import get_args

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.assets import model_directory
from benchmarks.magnitude import pruned_linears
from benchmarks.measuring import publish
from elsa_modifier.admm import ADMMOptimizer, MaskStructure, PenaltySchedule, PrunedWeight
from elsa_modifier.admm.penalty import PenaltyForm
from elsa_modifier.admm.storage import StateDtype
from elsa_modifier.training.objective import next_token_loss

INTERVAL = 32
# Tokens in each of four sequences, and what they are computed in.
BATCHES = ((256, "bf16 autocast", torch.bfloat16), (1024, "bf16 autocast", torch.bfloat16), (256, "fp32", None))


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_directory(), dtype=torch.float32)
    parameters = [m.weight for m in pruned_linears(model) if isinstance(m.weight, nn.Parameter)]
    weights = [PrunedWeight("", p, p.numel() // 5, MaskStructure()) for p in parameters]
    pruned = sum(w.weight.numel() for w in weights)
    base = torch.optim.Adam(model.parameters(), lr=1e-6, fused=True)

    def forward_backward(length: int, precision: torch.dtype | None) -> None:
        rows = torch.randint(0, model.config.vocab_size, (4, length))
        with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
            loss = next_token_loss(model, {"input_ids": rows, "labels": rows})
        model.zero_grad()
        loss.backward()

    forward_backward(256, torch.bfloat16)
    base.step()
    plain = {}
    for length, name, precision in BATCHES:
        run = functools.partial(forward_backward, length, precision)
        plain[f"4 x {length}, {name}"] = statistics.median(_timed(run) for _ in range(arguments.repeats))
    lines = [
        "# Overhead of a step",
        "",
        f"SmolLM2-135M, {pruned:,} pruned weights, two CPU cores, medians of {arguments.repeats}. "
        + "Forward and backward take "
        + ", ".join(f"{seconds:.2f} s ({name})" for name, seconds in plain.items())
        + f". The ratio is (forward, backward, Adam, ADMM) / (forward, backward, Adam) at interval {INTERVAL}.",
        "",
        "`python -m benchmarks.step_overhead` prints and writes this.",
        "",
        "| form | support | state | Adam, s | + proximal step, s | update, s | "
        + " | ".join(f"ratio, {name}" for name in plain)
        + " | bytes a weight |",
        "|---" * (7 + len(plain)) + "|",
    ]
    forms: tuple[PenaltyForm, ...] = ("decoupled", "coupled")
    variants: list[tuple[PenaltyForm, bool, StateDtype]] = [(f, free, "fp32") for f in forms for free in (True, False)]
    variants += [("decoupled", True, dtype) for dtype in get_args(StateDtype) if dtype != "fp32"]
    for form, free, dtype in variants:
        optimizer = ADMMOptimizer(
            base,
            weights,
            penalty=PenaltySchedule(1e-3, "constant", 1),
            form=form,
            free_support=free,
            interval=10**9,
            freeze_step=10**9,
            state_dtype=dtype,
        )
        optimizer.step()  # the update after the first step
        adam, step, update = [], [], []
        for _ in range(arguments.repeats):
            adam.append(_timed(base.step))
            step.append(_timed(optimizer.step))
            update.append(_timed(optimizer.project))
        a, s, u = map(statistics.median, (adam, step, update))
        ratios = [(seconds + s + u / INTERVAL) / (seconds + a) for seconds in plain.values()]
        cells = [form, "free" if free else "held", dtype, f"{a:.3f}", f"{s - a:.3f}", f"{u:.2f}"]
        cells += [f"{ratio:.3f}" for ratio in ratios] + [f"{optimizer.state_nbytes / pruned:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    publish("step_overhead", lines)


if __name__ == "__main__":
    main()
