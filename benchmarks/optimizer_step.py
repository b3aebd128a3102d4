"""A step of each base optimizer on one 1536 x 576 weight: compiled by torchao, or not. Writes
``docs/results/optimizer_step.md``. Each in a process of its own, with an empty cache of compiled code.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import torch

from benchmarks.measuring import publish
from elsa_modifier.training import base_optimizer
from elsa_modifier.training.base_optimizer import LOW_BIT_OPTIMIZERS, build_base_optimizer

ROWS, COLUMNS, STEPS = 1536, 576, 9


def _measure(name: str, compiled: bool, dtype: torch.dtype) -> str:
    """Seconds of the first step, and nanoseconds an entry of a later one."""
    if compiled:
        base_optimizer._uncompiled = lambda base: base
    else:
        shutil.which = lambda *_, **__: None
    weight = torch.nn.Parameter(torch.randn(ROWS, COLUMNS).to(dtype))
    weight.grad = torch.randn_like(weight)
    optimizer = build_base_optimizer(name, [weight], lr=1e-4, betas=(0.9, 0.999))  # type: ignore[arg-type]
    seconds = []
    for _ in range(1 + STEPS):
        started = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    return f"{seconds[0]:.1f} | {statistics.median(seconds[1:]) / weight.numel() * 1e9:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=3, help="optimizer, compiled or not, dtype: measure it in this process")
    arguments = parser.parse_args()
    if arguments.one:
        name, compiled, dtype = arguments.one
        print(_measure(name, compiled == "compiled", getattr(torch, dtype)))
        return
    lines = [
        "# A step of the base optimizer",
        "",
        f"`python -m benchmarks.optimizer_step`: {ROWS} x {COLUMNS} weights, on a CPU.",
        "",
        "| optimizer | weights | step | first step, s | later steps, ns an entry |",
        "|---|---|---|---|---|",
    ]
    variants = [("adam", "eager", "float32")]
    variants += [
        (name, how, dtype)
        for name in LOW_BIT_OPTIMIZERS
        for dtype in ("float32", "bfloat16")
        for how in ("eager", "compiled")
        if how == "eager" or name != "adam8bit_sr"
    ]
    for name, how, dtype in variants:
        with tempfile.TemporaryDirectory() as cache:
            output = subprocess.run(
                [sys.executable, "-m", "benchmarks.optimizer_step", "--one", name, how, dtype],
                check=True,
                capture_output=True,
                text=True,
                env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
            ).stdout
        lines.append(f"| {name} | {dtype} | {how} | {output.splitlines()[-1]} |")
        print(lines[-1], flush=True)
    publish("optimizer_step", lines)


if __name__ == "__main__":
    main()
