"""The product against its fp64 twin: formats, dtypes, shapes, numbers of tokens."""

import elsa_kernels
import pytest
import torch

from tests.kernels.weights import SHAPES, sparse_weight
from tests.reference.sparse_product import product, tolerance

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def assert_product(x, packed, weight_rounding=0.0):
    weight = elsa_kernels.unpack(packed)
    found = torch.ops.elsa_kernels.linear(x, packed, weight.shape[0])
    assert found.dtype == x.dtype and found.shape == (*x.shape[:-1], weight.shape[0])
    flat = found.reshape(-1, weight.shape[0]).double()
    expected, magnitude = product(x.reshape(-1, x.shape[-1]), weight)
    error = (flat - expected).abs()
    assert bool((error <= tolerance(expected, magnitude, x.dtype, weight_rounding)).all()), float(error.max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("values", ["bf16", "fp16", "fp32", "int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_product_agrees_with_twin(dtype, values, shape):
    packed = elsa_kernels.pack(sparse_weight(*shape, 0.3), values=values)
    for tokens in (1, 5):
        assert_product(torch.randn(tokens, shape[1]).to(dtype), packed)


def test_leading_dimensions_and_strides():
    packed = elsa_kernels.pack(sparse_weight(20, 96, 0.3))
    x = torch.randn(2, 96, 3)
    assert_product(x.transpose(1, 2), packed)
    assert_product(x[0, :, 0], packed)
    assert torch.ops.elsa_kernels.linear(torch.randn(0, 96), packed, 20).shape == (0, 20)


def test_wrong_arguments_are_refused():
    packed = elsa_kernels.pack(sparse_weight(20, 96, 0.3))
    linear = torch.ops.elsa_kernels.linear
    with pytest.raises(ValueError, match="20 x 96"):
        linear(torch.randn(2, 95), packed, 20)
    with pytest.raises(ValueError, match="20 x 96"):
        linear(torch.randn(2, 96), packed, 21)
    with pytest.raises(ValueError, match="x is"):
        linear(torch.randn(2, 96).double(), packed, 20)
    with pytest.raises(ValueError, match="cut off|bytes"):
        linear(torch.randn(2, 96), packed[:-1], 20)
    with pytest.raises(ValueError, match="ELSASPW1"):
        linear(torch.randn(2, 96), torch.zeros(1000, dtype=torch.uint8), 20)


def test_operation_passes_torchs_checks():
    packed = elsa_kernels.pack(sparse_weight(20, 96, 0.3))
    for dtype in DTYPES:
        torch.library.opcheck(torch.ops.elsa_kernels.linear, (torch.randn(2, 3, 96).to(dtype), packed, 20))
