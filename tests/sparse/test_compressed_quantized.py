"""Pruned and quantized checkpoints whose integers stay compressed in memory."""

import json
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM

from elsa_modifier import ElsaSparseConfig
from elsa_sparse import SparseLinear, load_sparse, open_checkpoint, save_sparse
from elsa_sparse.checkpoint import CONFIG_FILE
from elsa_sparse.entry import TensorEntry, encode
from elsa_sparse.inspecting import inspect, memory_bytes, summarize
from elsa_sparse.quantized import IntegerWeight, bits_of, unpack_int32
from tests.pretended_gpu import cpu_as_gpu
from tests.sparse.test_compressed_models import IDS, compressed_layers

elsa_kernels = pytest.importorskip("elsa_kernels")

_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
_W4 = _WEIGHTS | {"num_bits": 4, "strategy": "group", "group_size": 16}
_ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


@pytest.fixture
def quantized(pruned, tmp_path):
    """Function to a sparse checkpoint of a pruned model that was rounded to the nearest integers."""

    def make(weights, name="llama", **group):
        modifier = QuantizationModifier(
            config_groups={"group_0": {"targets": ["Linear"], "weights": weights} | group}, ignore=["lm_head"]
        )
        source = pruned(name, hidden_size=64, intermediate_size=256)
        oneshot(model=str(source), recipe=[modifier], output_dir=str(tmp_path / "quantized"))
        save_sparse(tmp_path / "quantized", tmp_path / "sparse", progress=False, overwrite=True)
        return tmp_path / "sparse"

    return make


def test_the_integers_go_to_a_gpu(quantized):
    directory = quantized(_W4)
    expected = compressed_layers(load_sparse(directory, compressed=True))
    with cpu_as_gpu():
        found = compressed_layers(load_sparse(directory, compressed=True))
    assert found.keys() == expected.keys()
    for path, layer in found.items():
        assert elsa_kernels.describe(layer.packed).layout == "gaps" and layer.quantized == expected[path].quantized
        assert torch.equal(layer.weight, expected[path].weight)
    weight = IntegerWeight(integers=torch.ones(2, 4, dtype=torch.int8), scales=torch.ones(2, 1), bits=4)
    moved = weight.to(device="meta", dtype=torch.bfloat16)
    assert moved.integers.is_meta and moved.scales.is_meta
    assert (moved.integers.dtype, moved.scales.dtype, moved.bits) == (torch.int8, torch.float32, 4)


@pytest.mark.parametrize("weights,name", [(_WEIGHTS, "llama"), (_W4, "llama"), (_W4, "llama-biased")])
def test_the_integers_are_the_checkpoint_s(weights, name, quantized):
    directory = quantized(weights, name)
    model = load_sparse(directory, compressed=True)
    layers = compressed_layers(model)
    assert len(layers) == 15
    with open_checkpoint(directory) as checkpoint:
        for path, layer in layers.items():
            if path == "lm_head":
                assert layer.values == "bf16" and not layer.quantized
                continue
            info = elsa_kernels.describe(layer.packed)
            scales = checkpoint.read(f"{path}.weight_scale").float()
            shape = torch.Size(checkpoint.read(f"{path}.weight_shape").tolist())
            integers = unpack_from_int32(checkpoint.read(f"{path}.weight_packed"), weights["num_bits"], shape)
            expected = integers * scales.repeat_interleave(shape[1] // scales.shape[1], 1)
            assert info.values == f"int{weights['num_bits']}" and layer.quantized
            assert info.kept == int(integers.count_nonzero()) and torch.equal(layer.unpack(), expected)
    assert model.get_memory_footprint() < load_sparse(directory).get_memory_footprint()
    stated = summarize("total", inspect(directory, progress=False)).memory_bytes
    # Sizes are estimates where values are int4; and the model has buffers that are not saved.
    assert stated == pytest.approx(model.get_memory_footprint(), rel=0.1)
    assert "config_groups" not in model.config.quantization_config.to_dict()


@pytest.mark.parametrize("weights", [_WEIGHTS, _W4])
def test_logits_are_those_of_the_dense_quantized_model(weights, quantized):
    directory = quantized(weights)
    dense = load_sparse(directory, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=ElsaSparseConfig(), dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, dense(IDS).logits, rtol=1e-3, atol=1e-4)
    tokens = [one.generate(IDS[:, :4], max_new_tokens=6, do_sample=False) for one in (model, dense)]
    assert torch.equal(*tokens)


def test_layers_that_may_not_be_compressed_are_dense(quantized):
    config = ElsaSparseConfig(modules_to_not_convert=["down_proj"])
    model = AutoModelForCausalLM.from_pretrained(quantized(_W4), quantization_config=config)
    assert not any(name.endswith("down_proj") for name in compressed_layers(model))
    layer = model.model.layers[0].mlp.down_proj
    exact = load_sparse(model.name_or_path, compressed=True).model.layers[0].mlp.down_proj.unpack()
    assert layer.weight.dtype == torch.bfloat16 and torch.equal(layer.weight, exact.bfloat16())


def test_it_is_not_saved_but_made_dense(quantized, tmp_path):
    model = load_sparse(quantized(_W4), compressed=True)
    with pytest.raises(ValueError, match="the integers of a quantized checkpoint, which are only read"):
        model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()
    expected = {name: layer.unpack().bfloat16() for name, layer in compressed_layers(model).items()}
    model.dequantize()
    model.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    for name, weight in expected.items():
        assert torch.equal(again.get_submodule(name).weight, weight)


def test_other_quantizations_are_refused(quantized, edit_config):
    directory = quantized(_WEIGHTS, input_activations=_ACTIVATIONS)
    with pytest.raises(ValueError, match="quantization_config has the format 'int-quantized'; compressed takes"):
        load_sparse(directory, compressed=True)
    directory = quantized(_WEIGHTS | {"symmetric": False})
    with pytest.raises(ValueError, match="has layers with a weight_zero_point"):
        load_sparse(directory, compressed=True)
    directory = quantized(_WEIGHTS)
    for field, value, said in (
        ("quant_method", "gptq", "the quant_method 'gptq'"),
        ("kv_cache_scheme", {"num_bits": 8}, "has a kv_cache_scheme"),
        ("config_groups", {"g": {"input_activations": _ACTIVATIONS}}, "quantizes activations"),
    ):
        before = json.loads((directory / CONFIG_FILE).read_text())
        edit_config(directory, lambda config, f=field, v=value: config["quantization_config"].update({f: v}))
        with pytest.raises(ValueError, match=said):
            load_sparse(directory, compressed=True)
        (directory / CONFIG_FILE).write_text(json.dumps(before))


@pytest.mark.parametrize("bits", [4, 8])
def test_memory_is_estimated_from_symbols_of_several_integers(bits):
    rows, columns = 256, 512
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(1, 8, (rows, columns), generator=generator, dtype=torch.int8)
    integers[torch.rand(rows, columns, generator=generator) < 0.8] = 0
    stored, _ = encode("a.weight_packed", pack_to_int32(integers, bits), "coded")
    assert stored.layout.symbol_bits == 8
    scales = TensorEntry(name="a.weight_scale", encoding="dense", dtype="bfloat16", shape=(rows, 4), sparsity=0.0)
    others = {stored.name: stored, scales.name: scales}
    packed = elsa_kernels.pack_integers(integers, torch.ones(rows, 4, dtype=torch.bfloat16), bits=bits)
    assert memory_bytes(stored, bits=bits, scales=others) == pytest.approx(packed.numel(), rel=0.05)
    assert memory_bytes(scales, bits=bits, scales=others) == 0 and memory_bytes(scales) == scales.dense_bytes
    for entry, known in ((stored, {}), (replace(stored, encoding="bitmask"), others)):
        assert memory_bytes(entry, bits=bits, scales=known) is None
    assert memory_bytes(stored, scales=others) is None
    whole = replace(stored, encoding="dense", layout=None)
    assert memory_bytes(whole, bits=bits, scales=others) >= rows * columns * bits // 8


def test_bits_of_a_configuration():
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"a": {"weights": _W4}},
    }
    assert bits_of(config) == 4 and bits_of(None) is None and bits_of({"quant_method": "gptq"}) is None
    assert bits_of(config | {"config_groups": {"a": {"weights": _W4}, "b": {"weights": _WEIGHTS}}}) is None
    assert bits_of(config | {"config_groups": {"a": {"weights": None}}}) is None
    assert bits_of(config | {"config_groups": [1]}) is None
    assert bits_of(config | {"config_groups": {"a": {"weights": {"num_bits": [4]}}}}) is None


@pytest.mark.parametrize("bits", [4, 8])
def test_unpacking_is_compressed_tensors_(bits):
    stored = torch.randint(-(2**31), 2**31 - 1, (5, 6), generator=torch.Generator().manual_seed(0)).int()
    columns = 6 * 32 // bits - 3
    expected = unpack_from_int32(stored, bits, torch.Size((5, columns)))
    assert torch.equal(unpack_int32(stored, bits, columns), expected)


def test_a_last_group_that_is_shorter():
    integers = torch.arange(-6, 6, dtype=torch.int8).view(2, 6)
    weight = IntegerWeight(integers=integers, scales=torch.tensor([[1.0, 10.0], [100.0, 1000.0]]), bits=8)
    expected = torch.tensor([[-6, -5, -4, -30, -20, -10], [0, 100, 200, 3000, 4000, 5000]])
    assert torch.equal(weight.dense(torch.float32), expected.float())
    assert weight.pack(torch.float32) is None  # its header is larger
    assert isinstance(SparseLinear(elsa_kernels.pack_integers(integers, weight.scales, bits=8)), SparseLinear)
