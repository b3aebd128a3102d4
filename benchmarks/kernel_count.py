"""Kernels, bytes and host reads a weight of a step and of a projection on a GPU, counted without one.

A step and a projection run on tensors that have a device and no values. What they do is counted: the updates that are
compiled as the kernels that inductor writes for an H100, everything else as it is dispatched to torch, an operation a
kernel. Nothing is timed.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benchmarks.fake_cuda import fake_cuda, written_kernels
from benchmarks.measuring import append_row, publish, read_rows
from elsa_modifier.admm import (
    ADMMOptimizer,
    MaskStructure,
    PenaltySchedule,
    PrunedWeight,
    SharedBudget,
    placement,
    thresholds,
)
from elsa_modifier.admm.penalty import PenaltyForm
from elsa_modifier.admm.storage import StateDtype
from elsa_modifier.training.base_optimizer import OptimizerName, build_base_optimizer

__all__ = ["CASES", "Case", "Counting", "counted"]

_WIDTH = 4096
# What only makes a tensor, or another view of one.
_NO_KERNEL = ("empty", "detach", "lift", "new_empty")


class Case(NamedTuple):
    """What is counted.

    :param title: in the table
    """

    title: str
    dtype: torch.dtype
    optimizer: OptimizerName
    form: PenaltyForm = "decoupled"
    dual: bool = False
    state: StateDtype = "fp32"
    structure: MaskStructure = MaskStructure()


CASES = [
    Case("fp32, adam", torch.float32, "adam"),
    Case("fp32, adam, 2:4", torch.float32, "adam", structure=MaskStructure(2, 4)),
    Case("fp32, adam, coupled", torch.float32, "adam", "coupled", True),
    Case("ELSA-L (bf16, adam8bit_sr)", torch.bfloat16, "adam8bit_sr"),
    Case("ELSA-L, dual in int8", torch.bfloat16, "adam8bit_sr", dual=True, state="int8"),
]


class Counting(TorchDispatchMode):
    """Counts what is dispatched on an accelerator's tensors: kernels, bytes, and reads by the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels = self.nbytes = self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_iter((args, kwargs or {})) if isinstance(t, Tensor)]
        name = func._schema.name.split("::")[1]
        # Of tensors without values they raise.
        asks = name in ("_local_scalar_dense", "nonzero", "equal") and any(t.device.type != "cpu" for t in given)
        self.reads += asks
        found = func(*args, **(kwargs or {}))
        made = [t for t in tree_iter(found) if isinstance(t, Tensor)]
        if func.namespace == "prim" or not any(t.device.type != "cpu" for t in [*given, *made]):
            return found
        is_copy = any(t.device.type != "cpu" for t in given) and any(t.device.type == "cpu" for t in made)
        self.reads += is_copy
        if asks or is_copy:
            return found
        is_view = not func._schema.is_mutable and any(r.alias_info is not None for r in func._schema.returns)
        if not is_view and not name.startswith(_NO_KERNEL):
            self.kernels += 1
            self.nbytes += sum(t.nbytes for t in {id(t): t for t in [*given, *made] if t.device.type != "cpu"}.values())
            if func._schema.is_mutable and not name.startswith(("copy", "fill", "zero")):
                self.nbytes += sum(t.nbytes for t in made if any(t is g for g in given))
        return found


@contextmanager
def counted(mode: FakeTensorMode) -> Iterator[Counting]:
    """Within the context kernels and reads are counted; updates that would be compiled as what they would become."""
    counting = Counting()

    def fused(update: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **static: Any) -> Any:
            with torch.utils._python_dispatch._disable_current_modes(), mode, torch.no_grad():
                made = _made_of(update, arguments, static, mode)
                found = update(*arguments, **static)
            counting.kernels += len(made.launches)
            counting.nbytes += made.nbytes
            return found

        return run

    def read(tensors: Any) -> list[list[float]]:
        # What is kept and how many there are; no faults.
        counting.reads += 1
        return [[1.0] * len(tensor) if i < 2 else [0.0] * len(tensor) for i, tensor in enumerate(tensors)]

    with (
        mock.patch.object(placement, "_fused", fused),
        mock.patch.object(thresholds, "read", read),
        mock.patch.object(thresholds, "_refuse", lambda *arguments: None),
        counting,
    ):
        yield counting


_kernels: dict[Any, Any] = {}


def _made_of(update: Callable[..., Any], arguments: Any, static: Any, mode: FakeTensorMode) -> Any:
    kinds = [(t.shape, t.dtype) if isinstance(t, FakeTensor) else t for t in tree_iter(arguments)]
    key = (update.__name__, str(kinds), str(static))
    if key not in _kernels:
        _kernels[key] = written_kernels(functools.partial(update, **static), arguments, mode)
    return _kernels[key]


def count(case: Case) -> list[dict[str, Any]]:
    """Rows of one case: the base optimizer's step with ADMM's part, and a projection, each of one weight."""
    rows = []
    with fake_cuda() as mode:
        weight = nn.Parameter(torch.empty(_WIDTH, _WIDTH, dtype=case.dtype, device="cuda"))
        base = build_base_optimizer(case.optimizer, [weight], lr=1e-3, betas=(0.9, 0.999), seed=0)
        keep = weight.numel() // (5 if case.structure.is_unstructured else 2)
        with counted(mode):
            optimizer = ADMMOptimizer(
                base,
                [PrunedWeight("weight", weight, keep, case.structure)],
                penalty=PenaltySchedule(0.3, "constant", 1),
                form=case.form,
                dual=case.dual,
                interval=10**9,
                freeze_step=10**9,
                state_dtype=case.state,
                budget=SharedBudget(0.0, 0.99) if case.structure.is_unstructured else None,
            )
            optimizer._reached.add(id(weight))
            weight.grad = torch.empty_like(weight)
            optimizer.step()
        for what, work in (("step", optimizer.step), ("projection", optimizer.project)):
            weight.grad = torch.empty_like(weight)
            with counted(mode) as found:
                work()
            nbytes = round(found.nbytes / weight.numel(), 1)
            counts = {"kernels": found.kernels, "bytes": nbytes, "reads": found.reads}
            rows.append({"case": case.title, "of": what} | counts)
    return rows


def _page(rows: list[dict[str, Any]]) -> list[str]:
    last = {(row["case"], row["of"]): row for row in rows}
    lines = [
        "# Kernels of a step",
        "",
        f"One weight of {_WIDTH} x {_WIDTH}: the base optimizer's step with ADMM's part, and a projection. Kernels,",
        "bytes that they read and write for each entry, and how often the host waits for a value. **Counted, not",
        "run: no GPU was there.** Compiled updates are counted as the kernels that inductor writes for an H100, all",
        "else by dispatch, an operation a kernel.",
        "What a projection does once for all weights, choosing digits from counts, is among its kernels here: most of",
        "them, with few bytes.",
        "",
        "`python -m benchmarks.kernel_count` prints and writes this.",
        "",
        "| | | kernels | bytes a weight | reads by the host |",
        "|---|---|---|---|---|",
    ]
    for case in CASES:
        for of in ("step", "projection"):
            cells = [str(last[case.title, of][key]) for key in ("kernels", "bytes", "reads")]
            lines.append("| " + " | ".join([case.title, of, *cells]) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    for case in CASES:
        for row in count(case):
            append_row("kernel_count", row)
    publish("kernel_count", _page(read_rows("kernel_count")))


if __name__ == "__main__":
    main()
