"""Models whose sparse weights stay compressed in memory, against the same models dense."""

import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from elsa_modifier import ElsaSparseConfig
from elsa_sparse import SparseCheckpointError, SparseLinear, load_sparse, save_sparse
from elsa_sparse.checkpoint import CONFIG_FILE, CONFIG_KEY
from elsa_sparse.compression_rule import packed_size
from elsa_sparse.opening import is_sparse
from elsa_sparse.sparse_experts import PackedExperts
from tests.conftest import CONFIGS

pytest.importorskip("elsa_kernels")

IDS = torch.arange(24).view(2, 12)


def compressed_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def assert_same_weights(compressed, dense):
    """Every value of it, and no parameter or buffer of one that the other lacks."""
    found = {}
    for name, tensor in compressed.state_dict().items():
        layer = compressed.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, PackedExperts):
            found[name.rpartition(".")[0]] = layer.unpack()
            continue
        is_packed = isinstance(layer, SparseLinear) and name.endswith(".packed")
        found[name.removesuffix("packed") + "weight" if is_packed else name] = layer.unpack() if is_packed else tensor
    expected = dense.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].to(tensor.dtype), tensor), name


def assert_same_logits(compressed, dense, ids=IDS):
    """Up to the order of sums in bf16, in fp32 nearly equal."""
    with torch.no_grad():
        ours, theirs = (copy.deepcopy(model).to(torch.float32)(ids).logits for model in (compressed, dense))
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture(name, pruned, sparse):
    dense = AutoModelForCausalLM.from_pretrained(pruned(name))
    model = load_sparse(sparse(name), compressed=True)
    assert type(model) is type(dense) and model.dtype == torch.bfloat16
    assert_same_weights(model, dense)
    assert_same_logits(model, dense)
    linears = {path for path, module in dense.named_modules() if type(module) is nn.Linear}
    tied = {key.removesuffix(".weight") for key in dense.all_tied_weights_keys}
    # Routers of mixtures are 4 x 32: their header alone is no smaller.
    small = {path for path in linears if dense.get_submodule(path).weight.numel() < 256}
    assert compressed_layers(model).keys() == linears - tied - small
    experts = {path for path, parameter in dense.named_parameters() if parameter.dim() == 3}
    assert {path for path, module in model.named_modules() if isinstance(module, PackedExperts)} == experts
    assert (name in ("mixtral", "qwen3-moe")) == bool(experts)
    assert model.get_memory_footprint() < dense.get_memory_footprint()


@pytest.mark.parametrize("given", ["sparse", "dense"])
def test_from_pretrained_takes_it_as_a_quantization(given, pruned, sparse):
    """Of a dense checkpoint that somebody pruned, too."""
    directory = sparse() if given == "sparse" else pruned()
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=ElsaSparseConfig(), output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert len(compressed_layers(model)) == 15
    assert_same_weights(model, AutoModelForCausalLM.from_pretrained(pruned()))
    assert model.config.quantization_config.quant_method == "elsa_sparse" and model.is_quantized


@pytest.mark.parametrize("sequences", [1, 3])
def test_generation(sequences, pruned, sparse):
    dense = AutoModelForCausalLM.from_pretrained(pruned(), dtype=torch.float32)
    model = load_sparse(sparse(), compressed=True, dtype=torch.float32)
    ids = torch.arange(2, 2 + 5 * sequences).view(sequences, 5)
    texts = [one.generate(ids, max_new_tokens=12, do_sample=False, min_new_tokens=12) for one in (model, dense)]
    assert torch.equal(*texts)
    beams = [one.generate(ids, max_new_tokens=6, num_beams=2, do_sample=False) for one in (model, dense)]
    assert torch.equal(*beams)


def test_calls_outside_no_grad_need_no_gradients(sparse):
    model = load_sparse(sparse("llama-biased"), compressed=True)
    logits = model(IDS).logits
    assert not logits.requires_grad
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_what_is_not_sparse_enough_stays_dense(pruned, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(pruned())
    half, full = (model.get_submodule(f"model.layers.{i}.mlp.down_proj") for i in (0, 1))
    with torch.no_grad():
        for layer, sparsity in ((half, 0.3), (full, 0.0)):
            layer.weight.copy_(torch.rand(layer.weight.shape) + 1)
            layer.weight.view(-1)[: int(sparsity * layer.weight.numel())] = 0
    save_sparse(model, tmp_path / "out", progress=False)
    names = compressed_layers(load_sparse(tmp_path / "out", compressed=True)).keys()
    assert len(names) == 13 and not {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"} & names
    config = ElsaSparseConfig(min_sparsity=0.25, modules_to_not_convert=["q_proj", "layers.0.self_attn.k_proj"])
    names = compressed_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=config)).keys()
    rows, columns = half.weight.shape
    pays = packed_size(rows, columns, int(half.weight.count_nonzero()), torch.bfloat16, min_sparsity=0.25)
    assert ("model.layers.0.mlp.down_proj" in names) == (pays is not None)
    assert not any(name.endswith("q_proj") for name in names)
    assert "model.layers.0.self_attn.k_proj" not in names and "model.layers.1.self_attn.k_proj" in names


def test_a_tied_head_stays_dense_however_sparse(pruned, tmp_path):
    """Also where the checkpoint has the head beside the embedding."""
    shutil.copytree(pruned("llama-tied"), tmp_path / "both")
    tensors = load_file(tmp_path / "both" / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, ::2] = 0
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "both" / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "both", quantization_config=ElsaSparseConfig())
    assert model.lm_head.weight is model.model.embed_tokens.weight and len(compressed_layers(model)) == 14
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-biased", "opt", "mixtral"])
def test_it_is_saved_sparse_and_loads_either_way(name, pruned, sparse, tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(pruned(name))
    model = load_sparse(sparse(name), compressed=True)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")  # in place of the first
    config = json.loads((tmp_path / "again" / CONFIG_FILE).read_text())
    assert is_sparse(config) and "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert config["architectures"] == [type(dense).__name__]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert_same_weights(again, dense)
    assert not compressed_layers(again) and again.generation_config.to_dict() == dense.generation_config.to_dict()
    assert_same_weights(load_sparse(tmp_path / "again", compressed=True), dense)
    first = json.loads((tmp_path / "sparse" / CONFIG_FILE).read_text())
    assert first[CONFIG_KEY]["tensors"].keys() == config[CONFIG_KEY]["tensors"].keys()
    assert model.config.quantization_config.quant_method == "elsa_sparse"
    save_sparse(model, tmp_path / "packed", encoding="bitmask", progress=False)
    assert_same_weights(load_sparse(tmp_path / "packed"), dense)


def test_saving_refuses_what_it_does_not_do(sparse, tmp_path):
    model = load_sparse(sparse(), compressed=True)
    with pytest.raises(ValueError, match="takes no push_to_hub, variant: save it to a directory"):
        model.save_pretrained(tmp_path / "again", push_to_hub=True, variant="fp16")
    model.save_pretrained(tmp_path / "again", is_main_process=False, push_to_hub=False, variant=None)
    assert not (tmp_path / "again").exists()
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError):
        model.save_pretrained(tmp_path / "dense")


def test_in_another_dtype(pruned, sparse):
    """Kept values stay as stored; all else is converted, as is what comes out."""
    model = load_sparse(sparse("llama-biased"), compressed=True, dtype=torch.float32)
    assert model.dtype == torch.float32 and {layer.values for layer in compressed_layers(model).values()} == {"bf16"}
    dense = AutoModelForCausalLM.from_pretrained(pruned("llama-biased"), dtype=torch.float32)
    assert_same_logits(model, dense)
    half = load_sparse(sparse("llama-biased", overwrite=True), compressed=True)
    assert half(IDS).logits.dtype == torch.bfloat16
    half.to(torch.float32)
    assert half(IDS).logits.dtype == torch.float32 and half.dtype == torch.float32
    assert_same_weights(half, dense)


def test_state_dicts_and_copies(pruned, sparse):
    dense = AutoModelForCausalLM.from_pretrained(pruned("llama-biased"))
    model = load_sparse(sparse("llama-biased"), compressed=True)
    copied = copy.deepcopy(model)
    layer = "model.layers.0.mlp.down_proj"
    changed = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    changed[f"{layer}.weight"][:, 0] = 1
    model.load_state_dict(changed)
    assert_same_weights(model, _changed(dense, changed))
    assert_same_weights(copied, dense)
    copied.load_state_dict(model.state_dict())
    assert_same_weights(copied, _changed(dense, changed))


def _changed(model, state):
    model = copy.deepcopy(model)
    model.load_state_dict(state)
    return model


def test_dequantize(pruned, sparse, tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(pruned("llama-biased"))
    model = load_sparse(sparse("llama-biased"), compressed=True)
    model.dequantize()
    assert not compressed_layers(model) and not hasattr(model.config, "quantization_config")
    assert_same_weights(model, dense)
    model.save_pretrained(tmp_path / "dense")
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), dense)


@pytest.mark.parametrize("values,largest", [("int8", 127), ("int4", 7)])
def test_kept_values_rounded_to_integers(values, largest, sparse):
    config = ElsaSparseConfig(values=values)
    model = AutoModelForCausalLM.from_pretrained(sparse(), quantization_config=config)
    exact = load_sparse(sparse(overwrite=True), compressed=True)
    assert model.get_memory_footprint() < exact.get_memory_footprint()
    for name, layer in compressed_layers(model).items():
        expected = exact.get_submodule(name).unpack(torch.float32)
        error = (layer.unpack() - expected).abs().max() / expected.abs().max()
        assert layer.values == values and 0 < error < 0.51 / largest


def test_a_whole_model_compiles_to_one_graph(sparse):
    model = load_sparse(sparse(), compressed=True)
    compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(IDS), model(IDS, use_cache=False).logits)


def test_arguments_that_contradict_each_other(sparse):
    directory = sparse()
    for fields, said in (
        ({"int8_head": True}, "int8_head is set without compressed"),
        ({"compressed": True, "quantization_config": ElsaSparseConfig()}, "give all settings in the latter"),
        ({"compressed": True, "device_map": {"": "mps"}}, "device_map names mps"),
        ({"compressed": True, "device_map": {"": "cpu", "lm_head": 0}}, "device_map names a CPU and a GPU"),
    ):
        with pytest.raises(ValueError, match=said):
            load_sparse(directory, **fields)
    model = load_sparse(directory, compressed=True, device_map="auto")
    assert model.device.type == "cpu" and compressed_layers(model)


@pytest.mark.parametrize(
    "fields,said",
    [
        ({"min_sparsity": 1.5}, "min_sparsity is 1.5; allowed is 0 to 1"),
        ({"values": "bf16"}, "values is 'bf16'; allowed are int8, int4"),
        ({"group_size": 64}, "group_size is 64 with values None"),
        ({"values": "int8", "group_size": 0}, "group_size is 0"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
    ],
)
def test_settings_that_cannot_be(fields, said):
    with pytest.raises(ValueError, match=said):
        ElsaSparseConfig(**fields)
    config = ElsaSparseConfig(min_sparsity=0.5, values="int4")
    assert ElsaSparseConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_damage_is_an_error(sparse):
    directory = sparse()
    [file] = directory.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-100] ^= 4
    file.write_bytes(data)
    with pytest.raises(SparseCheckpointError, match="checksum does not match"):
        load_sparse(directory, compressed=True)


def test_the_configuration_alone_is_enough(sparse):
    """Without elsa_modifier: a program that only infers has no llm-compressor."""
    script = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "from elsa_sparse import ElsaSparseConfig, SparseLinear\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(sparse())!r}, quantization_config=ElsaSparseConfig())\n"
        "print(sum(isinstance(m, SparseLinear) for m in model.modules()), 'llmcompressor' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout == "15 False\n", run.stderr


def test_without_the_kernels_it_says_what_to_install(sparse):
    """And everything else works."""
    script = (
        "import sys; sys.modules['elsa_kernels'] = None\n"
        "from elsa_sparse import load_sparse\n"
        f"load_sparse({str(sparse())!r})\n"
        "print('dense')\n"
        f"load_sparse({str(sparse(overwrite=True))!r}, compressed=True)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout == "dense\n" and run.returncode == 1, run.stderr
    assert run.stderr.splitlines()[-1].startswith("ImportError: compressed weights need the package elsa-kernels")
