"""Linear layers that a server keeps compressed: what has to be installed, integers as they are, what it saves."""

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from elsa_sparse.compression_rule import DEFAULT_MIN_SPARSITY, kernels

__all__ = ["Savings", "keep_packed", "kernels_identity", "kernels_problem", "pack_integers"]


@dataclass
class Savings:
    """What became of the linear layers of a model, or of this rank's part of them."""

    layers: int = 0
    compressed: int = 0
    before: int = 0
    """Bytes of all weights as they came: dense, or integers packed without leaving out zeros."""
    after: int = 0
    """Bytes of all weights in memory."""

    def add(self, before: int, packed: Tensor | None) -> None:
        """Count a layer, which is compressed if there is a packed weight."""
        self.layers += 1
        self.compressed += packed is not None
        self.before += before
        self.after += before if packed is None else packed.numel()

    def __str__(self) -> str:
        ratio = self.before / max(1, self.after)
        return (
            f"{self.compressed} of {self.layers} linear layers compressed in memory, "
            f"{self.before / 1e6:,.1f} MB -> {self.after / 1e6:,.1f} MB ({ratio:.1f}x smaller)"
        )


def kernels_problem(*, gpu: bool) -> str | None:
    """Why nothing can be computed with compressed weights here, and what to do; None if it can.

    :param gpu: whether a GPU is to compute
    """
    if importlib.util.find_spec("elsa_kernels") is None:
        return "elsa-kernels is not installed: pip install --no-deps elsa-kernels"
    if gpu:
        # It comes with torch's builds for GPUs. There is nothing to compile beforehand.
        return None if importlib.util.find_spec("triton") else "triton is not installed: pip install triton"
    if kernels().backend() == "torch":
        return (
            "elsa-kernels has no compiled library here, and would be slower than dense weights: install it again where "
            "there is a C++ compiler, pip install --no-deps --force-reinstall elsa-kernels"
        )
    return None


def kernels_identity(*, gpu: bool) -> str:
    """What a packed weight's size depends on beside the weight."""
    backend = "gpu" if gpu else kernels().backend()
    return f"{importlib.metadata.version('elsa-kernels')} {backend} {DEFAULT_MIN_SPARSITY}"


def pack_integers(integers: Tensor, scales: Tensor, *, bits: Literal[4, 8], always: bool) -> Tensor | None:
    """A quantized weight compressed, or None if it stays as it is: not sparse enough, or not smaller.

    :param integers: (rows, columns) int8
    :param scales: (rows, groups)
    :param bits: of the integers as they came
    :param always: compress whatever the sparsity is, for want of anything else that computes with them
    """
    rows, columns = integers.shape
    kept = int(integers.count_nonzero())
    group_size = columns // scales.shape[1]
    before = integers.numel() * bits // 8 + scales.numel() * scales.element_size()
    after = kernels().packed_nbytes(rows, columns, kept, f"int{bits}", group_size)
    if not always and (kept > (1 - DEFAULT_MIN_SPARSITY) * integers.numel() or after >= before):
        return None
    packed: Tensor = kernels().pack_integers(integers, scales, bits=bits, group_size=group_size)
    return packed


def keep_packed(layer: nn.Module, packed: Tensor, *names: str) -> None:
    """Put a packed weight in the place of a layer's parameters of these names, as ``weight_packed``."""
    for name in names:
        delattr(layer, name)
    layer.register_parameter("weight_packed", nn.Parameter(packed, requires_grad=False))
