"""Compressed layers compute with the GPU's kernels, under Triton's interpreter; ``test_triton.py`` has them run."""

import os

import elsa_kernels
import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start; test_triton.py runs this file so", allow_module_level=True)

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from elsa_sparse import SparseLinear, load_sparse
from elsa_sparse.sparse_linear import pack_weight
from tests.pretended_gpu import gpu_products
from tests.sparse.test_compressed_models import IDS, assert_same_logits, compressed_layers
from tests.sparse.test_sparse_linear import COLUMNS, DTYPES, ROWS, layer, sparse_weight


@pytest.mark.parametrize("values", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(COLUMNS,), (1, COLUMNS), (2, 3, COLUMNS), (0, COLUMNS), (17, COLUMNS)])
def test_it_is_the_dense_layer(shape, dtype, values):
    ours = SparseLinear(pack_weight(sparse_weight(torch.float16), values=values), torch.arange(ROWS).to(dtype))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = nn.functional.linear(x.double(), ours.weight.double(), ours.bias.double())
    with gpu_products() as product:
        y = ours.to("cpu")(x)
        product.assert_called_once_with(x, ours.packed, ROWS)
    assert y.dtype == dtype and y.shape == (*shape[:-1], ROWS)
    # With more than 16 tokens weights are rounded to x's dtype, where the interpreter cuts digits off.
    assert torch.allclose(y.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=0.1 if len(x) > 16 else 0.02)


def test_moved_back_it_is_the_cpu_s():
    ours, x = layer(torch.bfloat16), torch.randn(3, COLUMNS)
    expected = ours(x)
    with gpu_products() as product:
        there = ours.to("cpu")(x)
    assert torch.allclose(there, expected, atol=1e-4)
    without_library = elsa_kernels.backend() == "torch"
    problem = "packed does not start with" if without_library else "packed is corrupt or not of this shape"
    with pytest.raises(ValueError, match=problem):
        ours(x)
    assert torch.equal(ours.to("cpu")(x), expected) and product.call_count == 1


@pytest.mark.parametrize("name,loaded_there", [("llama-biased", False), ("llama-biased", True), ("mixtral", False)])
def test_a_model(name, loaded_there, pruned, sparse):
    dense = AutoModelForCausalLM.from_pretrained(pruned(name))
    model = None if loaded_there else load_sparse(sparse(name), compressed=True)
    with gpu_products() as product:
        model = load_sparse(sparse(name), compressed=True) if model is None else model.to("cpu")
        assert_same_logits(model, dense, IDS[:1, :2])
        # Experts are called beside the layers.
        assert product.call_count >= len(compressed_layers(model)) + (name == "mixtral") >= 10


def test_int8_head(sparse):
    model = load_sparse(sparse("llama-tied"), compressed=True, int8_head=True).to(torch.float32)
    with torch.no_grad():
        expected = model(IDS[:, :3]).logits
        with gpu_products():
            found = model.to("cpu")(IDS[:, :3]).logits
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_it_compiles_to_one_graph(bias):
    ours = layer(torch.bfloat16, bias)
    with gpu_products() as product, torch.no_grad():
        ours.to("cpu")
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
        for tokens in (1, 5, 17):
            x = torch.randn(tokens, COLUMNS).bfloat16()
            assert torch.equal(compiled(x), ours(x))
    assert product.call_count == 6


@pytest.mark.parametrize("tokens", [3, 17])
def test_the_operation_is_what_torch_expects(tokens):
    with gpu_products():
        packed = layer(torch.bfloat16).to("cpu").packed
        x = torch.randn(tokens, COLUMNS)
        torch.library.opcheck(torch.ops.elsa_kernels.linear.default, (x, packed, ROWS))
