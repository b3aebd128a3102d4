"""The head in 8-bit integers, and the embedding that is tied to it."""

import copy
import re

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from elsa_modifier import ElsaSparseConfig
from elsa_sparse import SparseLinear, load_sparse, save_sparse
from elsa_sparse.int8_head import Int8Embedding, Int8Head, hold_head_in_int8, round_rows
from tests.sparse.test_compressed_models import assert_same_weights

pytest.importorskip("elsa_kernels")

IDS = torch.arange(24).view(2, 12)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def weight(dtype, rows=1100, columns=64):
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    made[7] = 0
    return made


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_rounded_to_the_nearest_of_255_values(dtype):
    dense = weight(dtype)
    integers, scales = round_rows(dense)
    assert (integers.dtype, scales.dtype) == (torch.int8, dtype) and integers.shape == dense.shape
    assert int(integers.min()) >= -127
    error = (integers.double() * scales.double()[:, None] - dense.double()).abs().amax(1)
    # A scale that was rounded down leaves the largest value that much further off.
    assert bool((error <= scales.double() * (0.5 + 127 * torch.finfo(dtype).eps / 2)).all())
    assert not bool(integers[7].any()) and float(scales[7]) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 2, 64), (5, 7, 64), (0, 64)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_head_is_a_linear_layer_of_the_rounded_weight(dtype, shape, bias):
    integers, scales = round_rows(weight(dtype))
    head = Int8Head(integers, scales, torch.arange(1100).to(dtype) if bias else None)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = x.double() @ (integers.double() * scales.double()[:, None]).T + (head.bias.double() if bias else 0)
    y = head(x)
    assert y.dtype == dtype and y.shape == (*shape[:-1], 1100)
    assert torch.allclose(y.double(), expected, rtol=3 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps + 1e-4)
    assert (head.in_features, head.out_features) == (64, 1100)


def test_the_embedding_looks_up_the_rounded_weight():
    integers, scales = round_rows(weight(torch.bfloat16))
    embedding = Int8Embedding(integers, scales)
    assert torch.equal(embedding(IDS), nn.functional.embedding(IDS, embedding.weight))
    assert embedding(IDS).dtype == torch.bfloat16 and "1100, 64, int8" in repr(embedding)


def test_the_head_compiles_to_one_graph():
    head = Int8Head(*round_rows(weight(torch.bfloat16)))
    for rows in (1, 20):
        x = torch.randn(rows, 64).bfloat16()
        assert torch.equal(torch.compile(head, fullgraph=True, backend="aot_eager")(x), head(x))


def _int8(sparse, name="llama-tied"):
    return load_sparse(sparse(name, overwrite=True), compressed=True, int8_head=True)


def test_a_tied_head_is_one_tensor_with_the_embedding(sparse):
    model, exact = _int8(sparse), load_sparse(sparse("llama-tied", overwrite=True), compressed=True)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, Int8Embedding) and isinstance(head, Int8Head)
    assert embedding.integers.data_ptr() == head.integers.data_ptr()
    assert model.get_memory_footprint() < exact.get_memory_footprint()
    copied = copy.deepcopy(model)
    assert copied.get_input_embeddings().integers is copied.get_output_embeddings().integers
    assert copied.get_input_embeddings().integers.data_ptr() != embedding.integers.data_ptr()
    with torch.no_grad():
        ours, theirs = model(IDS).logits.float(), exact(IDS).logits.float()
        assert torch.equal(copied(IDS).logits.float(), ours)
    assert 0 < (ours - theirs).abs().max() < 0.05 * theirs.abs().max()
    assert model.generate(IDS[:, :4], max_new_tokens=5, do_sample=False).shape[1] > 4


def test_an_untied_head_leaves_the_embedding(pruned, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(pruned())
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    save_sparse(model, tmp_path / "out", progress=False)
    ours = load_sparse(tmp_path / "out", compressed=True, int8_head=True)
    assert isinstance(ours.lm_head, Int8Head) and type(ours.model.embed_tokens) is nn.Embedding
    assert ours.all_tied_weights_keys == {}


def test_a_compressed_head_stays_compressed(sparse):
    model = _int8(sparse, "llama")
    assert isinstance(model.lm_head, SparseLinear) and type(model.model.embed_tokens) is nn.Embedding


@pytest.mark.parametrize("load", [load_sparse, lambda path: load_sparse(path, compressed=True)])
def test_it_is_saved_with_the_values_it_has(load, sparse, tmp_path):
    model = _int8(sparse)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    rounded = model.get_input_embeddings().weight
    assert torch.equal(again.get_input_embeddings().weight, rounded) and rounded.dtype == torch.bfloat16
    assert again.lm_head.weight is again.model.embed_tokens.weight
    dense = copy.deepcopy(model)
    dense.dequantize()
    assert dense.lm_head.weight is dense.model.embed_tokens.weight and torch.equal(dense.lm_head.weight, rounded)
    dense.tie_weights()
    dense.save_pretrained(tmp_path / "dense")
    assert_same_weights(again, AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))


def test_state_dicts(sparse, pruned):
    model = _int8(sparse)
    state = model.state_dict()
    assert {name for name in state if "lm_head" in name} == {"lm_head.integers", "lm_head.scales"}
    other = copy.deepcopy(model)
    other.load_state_dict(AutoModelForCausalLM.from_pretrained(pruned("llama-tied")).state_dict())
    assert torch.equal(other.lm_head.integers, model.lm_head.integers)
    other.lm_head.integers.zero_()
    other.load_state_dict(state)
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)


def test_in_another_dtype(sparse):
    model = _int8(sparse).to(torch.float32)
    assert model(IDS).logits.dtype == torch.float32 and model.get_input_embeddings()(IDS).dtype == torch.float32


def test_heads_that_do_more_are_refused(pruned):
    class Scaled(nn.Embedding):
        pass

    model = AutoModelForCausalLM.from_pretrained(pruned("llama-tied"))
    embedding = Scaled(96, 32, _weight=model.lm_head.weight)
    embedding.weight = model.lm_head.weight
    model.set_input_embeddings(embedding)
    with pytest.raises(ValueError, match="the head is tied to Scaled"):
        hold_head_in_int8(model)
    model.set_output_embeddings(nn.Sequential())
    with pytest.raises(ValueError, match=re.escape("the model's head is Sequential; it has to be a torch.nn.Linear")):
        hold_head_in_int8(model)


def test_it_is_a_setting_of_the_quantization(sparse):
    model = AutoModelForCausalLM.from_pretrained(
        sparse("llama-tied"), quantization_config=ElsaSparseConfig(int8_head=True)
    )
    assert isinstance(model.lm_head, Int8Head)
