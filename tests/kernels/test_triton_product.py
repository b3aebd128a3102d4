"""The Triton kernels under Triton's interpreter, against the fp64 twin; ``test_triton.py`` has them run."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start; test_triton.py runs this file so", allow_module_level=True)

import torch
from elsa_kernels import gpu_linear as module
from elsa_kernels.gpu_layout import pack_for_gpu, pack_integers_for_gpu, unpack_gpu
from elsa_kernels.gpu_linear import FEW_TOKENS, gpu_dense, gpu_linear

from tests.kernels.weights import SHAPES, sparse_weight
from tests.reference.sparse_product import product, tolerance

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
VALUES = ["bf16", "fp16", "int8", "int8 in groups"]


def packed_weight(rows, columns, density, values, uneven=True):
    weight = sparse_weight(rows, columns, density, uneven=uneven)
    if values == "bf16":
        return pack_for_gpu(weight.bfloat16())
    if values == "fp16":
        return pack_for_gpu(weight.half())
    integers = (weight * 2000).round().clamp(-128, 127).to(torch.int8)
    groups = columns // 16 if values == "int8 in groups" and columns % 16 == 0 else 1
    return pack_integers_for_gpu(integers, 0.01 + torch.rand(rows, groups))


def assert_product(x, packed, rows):
    found = gpu_linear(x, packed, rows)
    assert found.dtype == x.dtype and found.shape == (*x.shape[:-1], rows) and found.is_contiguous()
    weight = unpack_gpu(packed)
    expected, magnitude = product(x.reshape(-1, x.shape[-1]), weight)
    error = (found.reshape(-1, rows).double() - expected).abs()
    assert bool((error <= tolerance(expected, magnitude, x.dtype)).all()), float(error.max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("values", VALUES)
def test_product_agrees_with_twin(values, shape):
    packed = packed_weight(*shape, 0.3, values)
    for tokens in (1, 5):
        assert_product(torch.randn(tokens, shape[1]), packed, shape[0])


@pytest.mark.parametrize("tokens", range(1, FEW_TOKENS + 1))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_tokens(dtype, tokens):
    assert_product(torch.randn(tokens, 80).to(dtype), packed_weight(7, 80, 0.3, "bf16"), 7)


@pytest.mark.parametrize("density", [0.0, 0.005, 0.05, 1.0])
@pytest.mark.parametrize("values", VALUES)
def test_rows_of_several_turns_and_of_none(values, density):
    """1200 columns: up to ten turns of 64 pairs, gaps beyond the largest, and rows of very different length."""
    packed = packed_weight(10, 1200, density, values)
    for tokens in (1, 3):
        assert_product(torch.randn(tokens, 1200), packed, 10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", VALUES)
def test_dense_weight_is_exact(values, dtype):
    packed = packed_weight(33, 128, 0.3, values)
    # The interpreter cuts digits off where a GPU rounds to bf16.
    cut_off = dtype == torch.bfloat16 and values != "bf16"
    found, expected = gpu_dense(packed, 33, 128, dtype), unpack_gpu(packed).to(dtype)
    torch.testing.assert_close(found, expected, rtol=2**-7 if cut_off else 0, atol=0)


def test_many_tokens_take_the_dense_weight(monkeypatch):
    packed, calls = packed_weight(20, 96, 0.3, "bf16"), []
    monkeypatch.setattr(module, "gpu_dense", lambda *arguments: calls.append(arguments) or gpu_dense(*arguments))
    assert_product(torch.randn(FEW_TOKENS, 96), packed, 20)
    assert not calls
    assert_product(torch.randn(FEW_TOKENS + 1, 96), packed, 20)
    assert len(calls) == 1


def test_leading_dimensions_and_strides():
    packed = packed_weight(20, 96, 0.3, "bf16")
    x = torch.randn(2, 96, 3)
    assert_product(x.transpose(1, 2), packed, 20)
    assert_product(x[0, :, 0], packed, 20)
    assert_product(torch.randn(2, 20, 96), packed, 20)
    assert gpu_linear(torch.randn(0, 96), packed, 20).shape == (0, 20)


@pytest.mark.parametrize("tokens", [1, 3, FEW_TOKENS + 1])
def test_another_packed_weight_gives_nan_and_reads_nothing(tokens):
    """Of fewer or more rows, of other columns, of CPUs, and of nothing."""
    packed = packed_weight(20, 96, 0.5, "bf16")
    of_cpu = packed.clone()
    of_cpu[:8] = torch.tensor(list(b"ELSASPW1"))
    for x, wrong, rows in (
        (torch.ones(tokens, 96), packed, 19),
        (torch.ones(tokens, 96), packed, 21),
        (torch.ones(tokens, 95), packed, 20),
        (torch.ones(tokens, 96), of_cpu, 20),
        (torch.ones(tokens, 96), torch.zeros_like(packed), 20),
    ):
        assert bool(gpu_linear(x, wrong, rows).isnan().all())


def test_columns_past_the_last_are_not_read():
    """Of a corrupt weight, whose gaps nobody checks: the one kept is moved from the last column to the next."""
    weight = torch.zeros(1, 90).half()
    weight[0, 89] = 2.0
    packed = pack_for_gpu(weight)
    # Row starts are 8 bytes, rounded up to 16; the sixth slot is the high half of the third byte of gaps.
    assert packed[82] == 15 + 16 * 9
    packed[82] = 15 + 16 * 10
    x = torch.full((1, 100), float("nan"))
    x[0, :90] = 1.0
    assert gpu_linear(x[:, :90], packed, 1).item() == 0
    assert not gpu_dense(packed, 1, 90, torch.half).any()


def test_infinite_activation_of_a_pruned_column_is_not_read():
    weight = torch.zeros(1, 100).half()
    weight[0, 99] = 2.0
    x = torch.full((1, 100), float("inf"))
    x[0, 99] = 3.0
    for tokens in (1, 2):
        assert gpu_linear(x.expand(tokens, 100), pack_for_gpu(weight), 1).tolist() == [[6.0]] * tokens
