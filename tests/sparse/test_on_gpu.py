"""Compressed layers that are moved to a GPU or loaded there: what they hold. The CPU is taken for the GPU.

``test_on_gpu_products.py`` has what they compute.
"""

import copy
import io

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from elsa_modifier import ElsaSparseConfig
from elsa_sparse import SparseLinear, load_sparse
from elsa_sparse.sparse_experts import PackedExperts, pack_experts
from elsa_sparse.sparse_linear import pack_weight, target_device
from tests.pretended_gpu import cpu_as_gpu
from tests.sparse.test_compressed_models import assert_same_weights
from tests.sparse.test_sparse_linear import COLUMNS, ROWS, layer, sparse_weight

elsa_kernels = pytest.importorskip("elsa_kernels")


def layouts(module):
    """Of all packed weights: "gaps" is that of GPUs."""
    holders = [part for part in module.modules() if isinstance(part, SparseLinear | PackedExperts)]
    found = {elsa_kernels.describe(packed).layout == "gaps" for part in holders for packed in part.buffers()}
    assert holders
    return {"gpu" if gaps else "cpu" for gaps in found}


def moved(module):
    with cpu_as_gpu():
        return module.to("cpu")


@pytest.mark.parametrize("values", [None, "int8", "int4"])
def test_a_layer_goes_there_and_back(values):
    ours = SparseLinear(pack_weight(sparse_weight(torch.bfloat16, rows=64, columns=96), values=values))
    before, weight, kept = ours.packed.clone(), ours.weight, ours.values
    assert moved(ours) is ours and layouts(ours) == {"gpu"}
    assert torch.equal(ours.weight, weight) and ours.values == ("bf16" if values is None else "int8")
    assert f"values={ours.values}, sparsity=0." in repr(ours)
    ours.to("cpu")
    assert layouts(ours) == {"cpu"} and torch.equal(ours.weight, weight) and ours.values == kept
    if values is None:
        assert torch.equal(ours.packed, before)


def test_a_dtype_moves_nothing():
    ours = moved(layer(torch.bfloat16))
    packed = ours.packed
    with cpu_as_gpu():
        assert ours.to(torch.float32).bias.dtype == torch.float32 and ours.packed is packed
    assert ours.to("meta").packed.is_meta


def test_fp32_has_no_kernel_there():
    ours = layer()
    before = ours.packed
    with pytest.raises(NotImplementedError, match=r"fp32 weights cannot be moved to cpu.*dtype=torch\.bfloat16"):
        moved(ours)
    assert ours.packed is before
    with cpu_as_gpu():
        assert pack_weight(sparse_weight()) is None and pack_experts(sparse_weight()[None]) is None
        assert pack_weight(sparse_weight(), values="int8") is not None


def test_what_does_not_pay_stays_dense_there():
    with cpu_as_gpu():
        assert pack_weight(sparse_weight(torch.bfloat16, 0.35)) is None
        # A bit for a column and 16 for a value would be smaller; gaps are not.
        assert pack_weight(sparse_weight(torch.bfloat16, 0.1), min_sparsity=0) is None
        assert pack_weight(torch.zeros(2, 2).half()) is None
        assert pack_weight(sparse_weight(torch.bfloat16, 0.45, rows=64, columns=256)) is not None


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_are_taken_from_either(assign):
    here, there = layer(torch.bfloat16, seed=0), moved(layer(torch.bfloat16, seed=1))
    stream = io.BytesIO()
    torch.save(there.state_dict(), stream)
    stream.seek(0)
    ours = layer(torch.bfloat16, seed=2)
    ours.load_state_dict(torch.load(stream), assign=assign)
    assert layouts(ours) == {"cpu"} and torch.equal(ours.weight, there.weight)
    with cpu_as_gpu():
        there.load_state_dict(here.state_dict(), assign=assign)
    assert layouts(there) == {"gpu"} and torch.equal(there.weight, here.weight)
    dense = {"weight": sparse_weight(torch.bfloat16, seed=5), "bias": torch.ones(ROWS)}
    with cpu_as_gpu():
        there.load_state_dict(dense, assign=assign)
    assert layouts(there) == {"gpu"} and torch.equal(there.weight, dense["weight"])


def test_where_a_loaded_weight_goes():
    here, elsewhere = torch.empty(1), torch.empty(1, device="meta")
    assert target_device(here, elsewhere, {}) == torch.device("cpu")
    assert target_device(here, elsewhere, {"assign_to_params_buffers": True}) == torch.device("meta")
    assert target_device(elsewhere, here, {}) == torch.device("cpu")


def test_a_damaged_weight_of_a_gpu_is_not_loaded():
    ours = layer(torch.bfloat16)
    cut = moved(layer(torch.bfloat16)).packed[:-16].clone()
    with pytest.raises(RuntimeError, match="packed cannot be loaded: packed is corrupt"):
        ours.load_state_dict({"packed": cut, "bias": torch.ones(ROWS)})
    assert layouts(ours) == {"cpu"}


def test_experts_go_there_and_back():
    weight = torch.stack([sparse_weight(torch.bfloat16, seed=seed) for seed in range(3)])
    ours, there = PackedExperts(pack_experts(weight)), moved(PackedExperts(pack_experts(weight)))
    assert layouts(there) == {"gpu"} and torch.equal(there.unpack(), weight)
    state = there.state_dict()
    ours.load_state_dict(state)
    assert layouts(ours) == {"cpu"} and torch.equal(ours.unpack(), weight)
    assert layouts(there.to("cpu")) == {"cpu"} and torch.equal(there.unpack(), weight)
    with cpu_as_gpu():
        assert torch.equal(PackedExperts(pack_experts(weight)).get_buffer("1"), state["1"])


@pytest.mark.parametrize("name", ["llama-biased", "mixtral"])
@pytest.mark.parametrize("loaded_there", [False, True])
def test_a_model_is_saved_from_there(name, loaded_there, pruned, sparse, tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(pruned(name))
    if loaded_there:
        with cpu_as_gpu():
            model = load_sparse(sparse(name), compressed=True)
    else:
        model = moved(load_sparse(sparse(name), compressed=True))
    assert layouts(model) == {"gpu"} == layouts(copy.deepcopy(model))
    assert_same_weights(model, dense)
    with cpu_as_gpu():
        model.save_pretrained(tmp_path / "again")
        again = load_sparse(tmp_path / "again")
    for key, weight in dense.state_dict().items():
        assert torch.equal(again.state_dict()[key], weight), key
    with cpu_as_gpu():
        plain = model.dequantize()
    assert not any(isinstance(part, SparseLinear | PackedExperts) for part in plain.modules())
    assert torch.equal(plain.lm_head.weight, dense.lm_head.weight)


def test_a_model_comes_back(sparse, pruned):
    model = moved(load_sparse(sparse(), compressed=True)).to("cpu")
    assert layouts(model) == {"cpu"}
    assert_same_weights(model, AutoModelForCausalLM.from_pretrained(pruned()))


def test_which_device_maps_are_taken():
    from elsa_sparse.transformers_quantizer import ElsaSparseQuantizer

    quantizer = ElsaSparseQuantizer(ElsaSparseConfig())
    for places in ([torch.device("cuda:0")], ["cuda:0", 1], [0], ["cpu"], ["cpu", torch.device("cpu")]):
        quantizer.validate_environment(device_map=dict(enumerate(places)))
    for places, said in (
        (["cpu", 0], "names a CPU and a GPU"),
        (["cuda", "disk"], "names disk"),
        (["mps"], "names mps"),
        ([torch.device("xpu:1")], "names xpu:1"),
    ):
        with pytest.raises(ValueError, match=said):
            quantizer.validate_environment(device_map=dict(enumerate(places)))
    assert quantizer.update_device_map({"": 0}) == {"": 0} and quantizer.update_device_map("auto") == {"": "cpu"}


def test_no_memory_is_reserved_for_dense_weights(load):
    """transformers asks before it reads; what it is told of embeddings is their size."""
    from elsa_sparse.transformers_quantizer import ElsaSparseQuantizer

    model, quantizer = load(), ElsaSparseQuantizer(ElsaSparseConfig())
    sizes = {name: quantizer.param_element_size(model, name, parameter) for name, parameter in model.named_parameters()}
    assert {name.rpartition(".")[0] for name, size in sizes.items() if size == 0} == {
        path for path, part in model.named_modules() if type(part) is nn.Linear
    }
    assert {*sizes.values()} == {0, 4}


def test_shape_and_device_on_fake_cuda_tensors():
    """What compilers ask; the bias is added there, too."""
    ours = layer(torch.bfloat16)
    with torch._subclasses.fake_tensor.FakeTensorMode():
        ours.packed = torch.empty(ours.packed.numel(), dtype=torch.uint8, device="cuda")
        ours.bias = nn.Parameter(torch.empty(ROWS, device="cuda"), requires_grad=False)
        y = ours(torch.empty(2, 3, COLUMNS, device="cuda", dtype=torch.bfloat16))
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, ROWS), torch.bfloat16, "cuda")
