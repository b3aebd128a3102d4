"""Weights for the tests of the kernels, and what their products may be off."""

import elsa_kernels
import pytest
import torch
from elsa_kernels.layout import Layout
from torch import Tensor

from tests.reference.sparse_product import product, tolerance

# Rows that fill no slice of 16, columns that fill no window of 64, pair or tile, single ones, and plain ones.
SHAPES = [(1, 1), (3, 5), (17, 63), (16, 64), (40, 65), (33, 130), (64, 256)]
VALUES = ["bf16", "fp16", "fp32", "int8", "int4"]
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def sparse_weight(rows: int, columns: int, density: float, *, uneven: bool = False, seed: int = 0) -> Tensor:
    """(rows, columns) fp32, normal with sd 0.02 and 0.01 away from zero where it is not zero.

    :param uneven: rows differ in density by up to a factor of 30
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    weight = weight + 0.01 * weight.sign()
    limits = torch.full((rows, 1), density)
    if uneven:
        limits = limits * 2 ** (5 * torch.rand(rows, 1, generator=generator) - 3)
    return torch.where(torch.rand(rows, columns, generator=generator) < limits, weight, 0.0)


def pack(weight: Tensor, layout: Layout | None = None, **arguments) -> Tensor:
    """Packed in a layout; skips the test where the layout cannot be packed here."""
    from elsa_kernels.packing import pack as pack_any

    if layout not in (None, Layout.CSR) and elsa_kernels.backend() == "torch":
        pytest.skip("only the compiled library packs this layout")
    return pack_any(weight, layout=layout, **arguments)


def assert_product(x: Tensor, packed: Tensor, weight_rounding: float | None = None) -> None:
    """The operation against the fp64 twin.

    :param weight_rounding: relative; None allows what the package documents: integers times their scales may be rounded
        to bf16 where x is bf16
    """
    weight = elsa_kernels.unpack(packed)
    if weight_rounding is None:
        integers = elsa_kernels.describe(packed).group_size > 0
        weight_rounding = 2**-8 if integers and x.dtype == torch.bfloat16 else 0.0
    found = torch.ops.elsa_kernels.linear(x, packed, weight.shape[0])
    assert found.dtype == x.dtype and found.shape == (*x.shape[:-1], weight.shape[0])
    expected, magnitude = product(x.reshape(-1, x.shape[-1]), weight)
    error = (found.reshape(expected.shape).double() - expected).abs()
    allowed = tolerance(expected, magnitude, x.dtype, weight_rounding)
    worst = int((error - allowed).argmax())
    where = divmod(worst, expected.shape[1])
    message = f"{int((error > allowed).sum())} wrong, (token, row) {where}: {found.reshape(expected.shape)[where]}"
    assert bool((error <= allowed).all()), f"{message} is not {expected[where]}"
