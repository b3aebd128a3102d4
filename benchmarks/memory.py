"""Bytes a pruned weight: weights, gradients, moments and ADMM state, held and at the process's peak. Writes
``docs/results/memory.md``.

Each layout trains 24 weights of 2048 x 2048 for three steps, with a projection after each, in a process of its own.
"Held" adds up the tensors after a step; "peak" is what the process's resident memory rose by at most, buffers and
temporaries included, with an allocator that gives freed tensors back at once (MALLOC_MMAP_THRESHOLD_). Gradients are
random: memory does not depend on them.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measuring import publish, resident
from elsa_modifier.admm import ADMMOptimizer, MaskStructure, PenaltySchedule, PrunedWeight, sparse_mask
from elsa_modifier.admm.storage import StateDtype
from elsa_modifier.training.base_optimizer import OptimizerName, build_base_optimizer

COUNT, SIZE, STEPS, LAM = 24, 2048, 3, 1e-3
KEEP = SIZE * SIZE // 10


@dataclass(frozen=True)
class Layout:
    """What is held in which format. ``state`` None: ``z`` and ``u`` as two tensors, of ``split`` and ``dual``."""

    title: str
    weights: torch.dtype
    optimizer: OptimizerName
    state: StateDtype | None
    split: torch.dtype = torch.float32
    dual: torch.dtype = torch.float32
    has_dual: bool = True
    release: bool = False


_FP32, _BF16 = torch.float32, torch.bfloat16
LAYOUTS = {
    "authors": Layout("two tensors, fp32 (the authors' layout)", _FP32, "adam", None),
    "published-l": Layout("two tensors, u bf16, z fp8 (ELSA-L)", _BF16, "adamfp8", None, torch.float8_e4m3fn, _BF16),
    "default": Layout("a bit", _FP32, "adam", "fp32", has_dual=False),
    "l-default": Layout("a bit", _BF16, "adam8bit_sr", "fp32", has_dual=False),
    "l-default-release": Layout(
        "a bit, gradients released", _BF16, "adam8bit_sr", "fp32", has_dual=False, release=True
    ),
    "fp32": Layout("one tensor and a bit, fp32", _FP32, "adam", "fp32"),
    **{f"l-{name}": Layout(f"one tensor and a bit, {name}", _BF16, "adam8bit_sr", name) for name in ("bf16", "int8")},
    "l-e4m3": Layout("one tensor and a bit, float8_e4m3fn", _BF16, "adam8bit_sr", "float8_e4m3fn"),
    "l-e5m2": Layout("one tensor and a bit, float8_e5m2", _BF16, "adam8bit_sr", "float8_e5m2"),
    "l-release": Layout("the same in int8, gradients released", _BF16, "adam8bit_sr", "int8", release=True),
}


class _TwoTensors:
    """ADMM with z and u in tensors of their own, each step in fp32 for one weight at a time."""

    def __init__(self, base: torch.optim.Optimizer, weights: list[nn.Parameter], layout: Layout) -> None:
        self._base, self._weights = base, weights
        self._z = [(w.detach() * sparse_mask(w.detach().float().abs(), KEEP)).to(layout.split) for w in weights]
        self._u = [torch.zeros_like(w, dtype=layout.dual) for w in weights]

    @property
    def state_nbytes(self) -> int:
        return sum(t.nbytes for t in (*self._z, *self._u))

    @torch.no_grad()
    def step(self) -> None:
        for w, z, u in zip(self._weights, self._z, self._u, strict=True):
            assert w.grad is not None
            w.grad.add_((w - z.float() + u.float()).mul_(LAM))
        self._base.step()
        for w, z, u in zip(self._weights, self._z, self._u, strict=True):
            v = w + u.float()
            fisher = self._base.state[w]["exp_avg_sq"]
            fisher = fisher.dequantize() if hasattr(fisher, "codes") else fisher
            split = v * sparse_mask(fisher.sqrt().mul_(v.abs()), KEEP)
            z.copy_(split)
            u.copy_(v.sub_(split))


def _train(layout: Layout) -> dict[str, float]:
    torch.manual_seed(0)
    if layout.optimizer == "adamfp8":
        for module in ("torchao.optim", "torch._dynamo.utils"):
            importlib.import_module(module)  # or their code would be counted
    before = resident("VmRSS")
    weights = [nn.Parameter(torch.randn(SIZE, SIZE).to(layout.weights)) for _ in range(COUNT)]
    base = build_base_optimizer(layout.optimizer, weights, lr=1e-4, betas=(0.9, 0.999))
    optimizer: ADMMOptimizer | _TwoTensors
    if layout.state is None:
        optimizer = _TwoTensors(base, weights, layout)
    else:
        pruned = [PrunedWeight("", w, KEEP, MaskStructure()) for w in weights]
        penalty = PenaltySchedule(LAM, "constant", 1)
        optimizer = ADMMOptimizer(
            base, pruned, penalty=penalty, dual=layout.has_dual, interval=1, freeze_step=10**9, state_dtype=layout.state
        )
    for _ in range(STEPS):
        if layout.release:
            assert isinstance(optimizer, ADMMOptimizer)
            for w in weights:
                w.grad = torch.randn_like(w)
                optimizer.step_parameter(w)
                w.grad = None
            optimizer.end_step()
        else:
            for w in weights:
                if w.grad is None:
                    w.grad = torch.empty_like(w)
                w.grad.normal_()
            optimizer.step()
    entries = sum(w.numel() for w in weights)
    held = {
        "weights": sum(w.nbytes for w in weights),
        "gradients": sum(w.grad.nbytes for w in weights if w.grad is not None),
        "moments": sum(_nbytes(moments[key]) for moments in base.state.values() for key in ("exp_avg", "exp_avg_sq")),
        "state": optimizer.state_nbytes,
    }
    held["all"] = sum(held.values())
    held["peak"] = resident("VmHWM") - before
    return {key: value / entries for key, value in held.items()}


def _nbytes(moment: Any) -> int:
    parts: list[Tensor] = [moment.codes, moment.scale] if hasattr(moment, "codes") else [moment]
    return sum(part.nbytes for part in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layout", choices=LAYOUTS, help="measure one, in this process, and print it as JSON")
    arguments = parser.parse_args()
    if arguments.layout:
        print(json.dumps(_train(LAYOUTS[arguments.layout])))
        return
    lines = [
        "# Bytes a pruned weight",
        "",
        f"`python -m benchmarks.memory`: {COUNT} weights of {SIZE} x {SIZE} on a CPU; the script says what is counted.",
        "",
        "| ADMM state | weights | optimizer | weights | gradients | moments | state | all held | peak |",
        "|---" * 9 + "|",
    ]
    for name, layout in LAYOUTS.items():
        command = [sys.executable, "-m", "benchmarks.memory", "--layout", name]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_MMAP_MAX_": "1000000"}
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        found = json.loads(output.splitlines()[-1])
        cells = [layout.title, str(layout.weights).removeprefix("torch."), layout.optimizer]
        cells += [f"{found[key]:.2f}" for key in ("weights", "gradients", "moments")]
        cells += [f"{found['state']:.3f}", f"{found['all']:.2f}", f"{found['peak']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    publish("memory", lines)


if __name__ == "__main__":
    main()
