"""Mixtures whose experts stay compressed in memory."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from elsa_modifier import ElsaSparseConfig
from elsa_sparse import load_sparse
from elsa_sparse.inspecting import inspect, summarize
from elsa_sparse.sparse_experts import PackedExperts, holds_experts, pack_experts
from tests.conftest import CONFIGS
from tests.sparse.test_compressed_models import IDS, assert_same_logits, assert_same_weights

elsa_kernels = pytest.importorskip("elsa_kernels")

MIXTURES = ["mixtral", "qwen3-moe"]


def weights(sparsity=0.8, experts=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(experts, 24, 64, generator=generator)
    return made.masked_fill_(torch.rand(made.shape, generator=generator) < sparsity, 0).to(dtype)


@pytest.mark.parametrize("bias", [False, True])
def test_a_matrix_of_it_is_that_of_the_parameter(bias):
    dense = weights()
    packed = PackedExperts(pack_experts(dense))
    x, added = torch.randn(5, 64), torch.arange(24.0) if bias else None
    for index in (0, torch.tensor(2)):
        y = nn.functional.linear(x, packed[index], added)
        assert torch.allclose(y, nn.functional.linear(x, dense[index], added), atol=1e-4)
    assert torch.equal(packed.unpack(), dense) and packed.shape == dense.shape and len(packed) == 3
    assert "(3, 24, 64), values=fp32, nbytes=" in repr(packed)


def test_other_operations_say_what_to_do():
    packed = PackedExperts(pack_experts(weights()))
    for operation in (torch.matmul, torch.mm):
        with pytest.raises(NotImplementedError, match=r"is not defined for compressed experts.*modules_to_not"):
            operation(torch.randn(5, 64), packed[0])


def test_what_does_not_pay_stays_dense():
    assert pack_experts(weights(0.3)) is None and pack_experts(weights(0.8), min_sparsity=0.9) is None
    assert pack_experts(weights().double()) is None and pack_experts(torch.zeros(2, 0, 4)) is None
    assert pack_experts(torch.zeros(2, 2, 2)) is None  # its header is larger
    kept_in_bf16 = pack_experts(weights(dtype=torch.bfloat16).float())
    assert {elsa_kernels.describe(matrix).values for matrix in kept_in_bf16} == {"bf16"}


def test_which_parameters_are_taken():
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["mixtral"]))
    experts = model.model.layers[0].mlp.experts
    assert holds_experts(experts, "gate_up_proj") and holds_experts(experts, "down_proj")
    assert not holds_experts(experts, "bias") and not holds_experts(model.lm_head, "weight")
    experts.is_transposed = True
    assert not holds_experts(experts, "gate_up_proj")


@pytest.mark.parametrize("name", MIXTURES)
def test_generation_copies_and_state_dicts(name, pruned, sparse):
    dense = AutoModelForCausalLM.from_pretrained(pruned(name), dtype=torch.float32)
    model = load_sparse(sparse(name), compressed=True, dtype=torch.float32, experts_implementation="grouped_mm")
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(*(one.generate(IDS[:, :5], **options) for one in (model, dense)))
    copied = copy.deepcopy(model)
    state = model.state_dict()
    layer = copied.model.layers[0].mlp.experts.down_proj
    layer.register_buffer("1", layer.get_buffer("0").clone())
    copied.load_state_dict(state)
    assert_same_weights(copied, dense)
    assert_same_logits(copied, dense)
    broken = {
        key: tensor[:-64] if key.endswith("0.mlp.experts.down_proj.1") else tensor for key, tensor in state.items()
    }
    with pytest.raises(RuntimeError, match=r"down_proj\.1 cannot be loaded"):
        copied.load_state_dict(broken)
    assert_same_weights(copied, dense)


@pytest.mark.parametrize("name", MIXTURES)
def test_dense_again_and_settings(name, pruned, sparse, tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(pruned(name))
    model = load_sparse(sparse(name), compressed=True)
    model.dequantize()
    assert_same_weights(model, dense)
    model.save_pretrained(tmp_path / "dense")
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), dense)
    config = ElsaSparseConfig(modules_to_not_convert=["mlp.experts"])
    partly = AutoModelForCausalLM.from_pretrained(sparse(name, overwrite=True), quantization_config=config)
    assert not any(isinstance(module, PackedExperts) for module in partly.modules())
    config = ElsaSparseConfig(values="int8")
    rounded = AutoModelForCausalLM.from_pretrained(sparse(name, overwrite=True), quantization_config=config)
    assert rounded.model.layers[0].mlp.experts.down_proj.values == "int8"
    assert rounded(IDS).logits.isfinite().all()


def test_inspect_counts_experts(pruned, sparse):
    model = load_sparse(sparse("mixtral"), compressed=True)
    stated = summarize("total", inspect(pruned("mixtral"), progress=False)).memory_bytes
    assert stated == pytest.approx(model.get_memory_footprint(), rel=0.1)
    assert isinstance(model.model.layers[1].mlp.experts.gate_up_proj, PackedExperts)
