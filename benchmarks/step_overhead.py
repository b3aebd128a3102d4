"""What ADMM adds to a training step, and what its state weighs, on SmolLM2-135M.

Forward, backward and the optimizer's step are timed alone and with ADMM around the same optimizer, in turn, in one
process: fp32 weights with torch's fused Adam, and what the ELSA-L recipes have, bf16 weights with ``adam8bit_sr``. The
projection runs every ``interval`` steps; its cost is spread over them. What ADMM takes does not depend on the tokens of
a step, so the ratio does. Medians, in seconds.
"""

import argparse
import functools
import statistics
from typing import get_args

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.assets import model_directory
from benchmarks.magnitude import pruned_linears
from benchmarks.measuring import publish, timed
from elsa_modifier.admm import ADMMOptimizer, MaskStructure, PenaltySchedule, PrunedWeight
from elsa_modifier.admm.penalty import PenaltyForm
from elsa_modifier.admm.storage import StateDtype
from elsa_modifier.training.base_optimizer import OptimizerName, build_base_optimizer
from elsa_modifier.training.model_state import embed_in_fp32
from elsa_modifier.training.objective import next_token_loss

INTERVAL = 32
# Tokens in each of four sequences.
LENGTHS = (256, 1024)
Variant = tuple[PenaltyForm, bool, StateDtype]
DEFAULT: Variant = ("decoupled", False, "fp32")
FORMATS: list[Variant] = [DEFAULT, *(("decoupled", True, dtype) for dtype in get_args(StateDtype))]
FORMS: list[Variant] = [("coupled", True, "fp32")]
CONFIGURATIONS: list[tuple[str, torch.dtype, OptimizerName, list[Variant]]] = [
    ("fp32 weights, torch's fused Adam", torch.float32, "adam", FORMATS + FORMS),
    ("bf16 weights, adam8bit_sr (ELSA-L)", torch.bfloat16, "adam8bit_sr", FORMATS),
]


def measure(
    title: str, dtype: torch.dtype, optimizer_name: OptimizerName, variants: list[Variant], repeats: int
) -> list[str]:
    """A section of the page: one configuration, with several forms of penalty and formats of state."""
    model = AutoModelForCausalLM.from_pretrained(model_directory(), dtype=dtype)
    embed_in_fp32(model)
    parameters = [m.weight for m in pruned_linears(model) if isinstance(m.weight, nn.Parameter)]
    weights = [PrunedWeight("", p, p.numel() // 5, MaskStructure()) for p in parameters]
    pruned = sum(w.weight.numel() for w in weights)
    plain, base = (
        build_base_optimizer(optimizer_name, list(model.parameters()), lr=1e-6, betas=(0.9, 0.999)) for _ in range(2)
    )

    def forward_backward(length: int) -> None:
        rows = torch.randint(0, model.config.vocab_size, (4, length))
        with torch.autocast("cpu", torch.bfloat16):
            loss = next_token_loss(model, {"input_ids": rows, "labels": rows})
        model.zero_grad()
        loss.backward()

    forward_backward(LENGTHS[0])
    plain.step()
    base.step()
    passes = [
        statistics.median(timed(functools.partial(forward_backward, length)) for _ in range(repeats))
        for length in LENGTHS
    ]
    lines = [
        "",
        f"## {title}",
        "",
        "Forward and backward in bf16 autocast take "
        + " and ".join(f"{seconds:.2f} s (4 x {length})" for seconds, length in zip(passes, LENGTHS, strict=True))
        + ".",
        "",
        "| form | dual | state | optimizer, s | + proximal step, s | update, s | "
        + " | ".join(f"ratio, 4 x {length}" for length in LENGTHS)
        + " | bytes a weight |",
        "|---" * (7 + len(LENGTHS)) + "|",
    ]
    for form, dual, state_dtype in variants:
        optimizer = ADMMOptimizer(
            base,
            weights,
            penalty=PenaltySchedule(1e-3, "constant", 1),
            form=form,
            dual=dual,
            interval=10**9,
            freeze_step=10**9,
            state_dtype=state_dtype,
        )
        optimizer.step()  # the update after the first step
        alone, step, update = [], [], []
        for _ in range(repeats):
            alone.append(timed(plain.step))
            step.append(timed(optimizer.step))
            update.append(timed(optimizer.project))
        a, s, u = map(statistics.median, (alone, step, update))
        cells = [
            form,
            "yes" if dual else "no",
            state_dtype,
            f"{a:.3f}",
            f"{s - a:.3f}",
            f"{u:.2f}",
        ]
        cells += [f"{(seconds + s + u / INTERVAL) / (seconds + a):.3f}" for seconds in passes]
        lines.append("| " + " | ".join([*cells, f"{optimizer.state_nbytes / pruned:.3f}"]) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    lines = [
        "# Overhead of a step",
        "",
        f"SmolLM2-135M, its linear layers pruned, {torch.get_num_threads()} threads, medians of {arguments.repeats}. "
        "The ratio is (forward, backward, optimizer, ADMM) / (forward, backward, optimizer) for four sequences of 256 "
        f"or 1,024 tokens, at interval {INTERVAL}.",
        "",
        "`python -m benchmarks.step_overhead` prints and writes this.",
    ]
    for configuration in CONFIGURATIONS:
        lines += measure(*configuration, repeats=arguments.repeats)
    publish("step_overhead", lines)


if __name__ == "__main__":
    main()
