import json
import shutil
import subprocess
import sys
import traceback

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import elsa_modifier
from elsa_modifier import ELSAModifier, load_sparse, save_sparse
from elsa_sparse import SparseCheckpointError, open_checkpoint
from elsa_sparse.checkpoint import CONFIG_FILE, CONFIG_KEY
from elsa_sparse.opening import HINT
from elsa_sparse.writing import unpack
from tests.conftest import CONFIGS
from tests.sparse.strategies import same_bits
from tests.sparse.test_writing import OLD_FORMAT


def assert_same_model(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    assert all(same_bits(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", CONFIGS)
def test_both_ways_to_load_are_bit_equal_to_dense(name, pruned, sparse):
    dense, directory = AutoModelForCausalLM.from_pretrained(pruned(name)), sparse(name)
    for loaded in (load_sparse(directory), AutoModelForCausalLM.from_pretrained(directory)):
        assert_same_model(loaded, dense)
        assert type(loaded) is type(dense)
        assert loaded.config.to_dict() == dense.config.to_dict() | {"_name_or_path": str(directory)}
        assert loaded.generation_config.to_dict() == dense.generation_config.to_dict()
        assert loaded.name_or_path == str(directory)


def test_a_model_is_saved_as_its_directory_is(pruned, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(pruned("mixtral"))
    save_sparse(model, tmp_path / "out", progress=False)
    assert_same_model(load_sparse(tmp_path / "out"), model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert not (tmp_path / "out" / "dense").exists()


def test_a_loaded_model_saves_dense(sparse, pruned, tmp_path):
    load_sparse(sparse()).save_pretrained(tmp_path / "again")
    assert CONFIG_KEY not in json.loads((tmp_path / "again" / CONFIG_FILE).read_text())
    assert_same_model(
        LlamaForCausalLM.from_pretrained(tmp_path / "again"), AutoModelForCausalLM.from_pretrained(pruned())
    )


def test_arguments_of_from_pretrained(sparse):
    directory = sparse()
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, output_attentions=True)
    assert model.dtype == torch.float32 and model.config.output_attentions
    model = LlamaForCausalLM.from_pretrained(directory, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    model, info = LlamaForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    model = LlamaForCausalLM.from_pretrained(directory, device_map="cpu")
    assert model.device.type == "cpu"
    shutil.copytree(directory, directory.parent / "repository" / "part")
    model = LlamaForCausalLM.from_pretrained(directory.parent / "repository", subfolder="part")
    assert model.config.hidden_size == 32


def test_from_a_hub_s_cache(sparse, pruned, tmp_path):
    """A repository that has been downloaded: its files lie in the cache as links."""
    repository, revision = tmp_path / "cache" / "models--team--sparse", "0" * 40
    shutil.copytree(sparse(max_shard_size="5KB"), repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    model = AutoModelForCausalLM.from_pretrained(
        "team/sparse", cache_dir=tmp_path / "cache", local_files_only=True, revision="main"
    )
    assert_same_model(model, AutoModelForCausalLM.from_pretrained(pruned()))
    assert model.name_or_path == "team/sparse"


def test_what_compressed_tensors_wrote_loads():
    for model in (load_sparse(OLD_FORMAT), AutoModelForCausalLM.from_pretrained(OLD_FORMAT)):
        with open_checkpoint(OLD_FORMAT) as checkpoint:
            assert all(same_bits(model.state_dict()[name], tensor) for name, tensor in checkpoint)
        assert not hasattr(model.config, "quantization_config")


def test_damage_is_an_error_not_a_random_model(sparse):
    directory = sparse()
    [file] = directory.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-100] ^= 4
    file.write_bytes(data)
    with pytest.raises(Exception) as raised:
        AutoModelForCausalLM.from_pretrained(directory)
    # transformers reads in threads: one of them may be busy when the file is closed, which is an error of its own.
    assert "checksum does not match" in "".join(traceback.format_exception(raised.value))
    with pytest.raises(SparseCheckpointError, match="load it with from_pretrained"):
        load_sparse(_dense_copy(directory))


def _dense_copy(directory):
    dense = directory.parent / "dense"
    dense.mkdir()
    (dense / CONFIG_FILE).write_text('{"model_type": "llama"}')
    return dense


def test_transformers_alone_refuses(sparse):
    """Without this package the directory is no model, rather than one with random weights, and says what is missing."""
    script = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(sparse())!r})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 1 and "Install elsa-modifier and `import elsa_modifier` before" in run.stderr


def test_the_hint_for_transformers_alone_is_not_of_the_model(sparse, tmp_path):
    directory = sparse()
    (key,) = HINT
    assert key in json.loads((directory / CONFIG_FILE).read_text())
    unpack(directory, tmp_path / "dense", progress=False)
    assert key not in json.loads((tmp_path / "dense" / CONFIG_FILE).read_text())
    model = AutoModelForCausalLM.from_pretrained(directory, config=AutoConfig.from_pretrained(directory))
    assert not hasattr(model.config, key)
    model.save_pretrained(tmp_path / "saved")
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), model)


def test_the_format_needs_nothing_that_prunes():
    """What a vLLM server imports of this package."""
    script = (
        "import sys, elsa_sparse, elsa_sparse.opening, elsa_sparse.inspecting; "
        "print([m for m in ('llmcompressor', 'elsa_modifier', 'transformers', 'compressed_tensors', 'accelerate', "
        "'datasets', 'pydantic') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


_FIELDS = {"sparsity": 0.8, "steps": 4, "batch_size": 2, "sequence_length": 16}


@pytest.mark.parametrize("encoding", ["coded", "bitmask"])
def test_oneshot_writes_a_sparse_checkpoint(encoding, checkpoint, tokenizer, texts, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    fields = "".join(f"      {key}: {value}\n" for key, value in (_FIELDS | {"checkpoint": encoding}).items())
    recipe.write_text(f"prune_stage:\n  prune_modifiers:\n    ELSAModifier:\n{fields}")
    out = tmp_path / "out"
    for _ in range(2):  # the second replaces the first
        model = oneshot(
            model=str(checkpoint("llama", torch.bfloat16)), dataset=texts, recipe=str(recipe), output_dir=str(out)
        )
    names = {path.name for path in out.iterdir()}
    assert {"recipe.yaml", "elsa_history.json", "tokenizer.json", "README.md"} <= names
    assert len([name for name in names if name.startswith("sparse-model-")]) == 1
    assert "model.safetensors" not in names and "dense" not in names
    assert f"checkpoint: {encoding}" in (out / "recipe.yaml").read_text()
    assert_same_model(load_sparse(out), model)
    assert AutoTokenizer.from_pretrained(out)("w1 w2").input_ids == tokenizer("w1 w2").input_ids
    with open_checkpoint(out) as opened:
        assert {entry.encoding for entry in opened.entries.values()} == {encoding, "dense"}


def test_pushing_the_dense_model_is_refused(load, tmp_path):
    from elsa_modifier.saving import extend_save_pretrained

    model = load()
    extend_save_pretrained(model, history="{}", checkpoint="coded", experts={})
    with pytest.raises(ValueError, match="push_to_hub would upload the dense model"):
        model.save_pretrained(tmp_path / "out", push_to_hub=True)


@pytest.mark.parametrize("scheme", ["W4A16", "W8A16", "W8A8", "FP8_DYNAMIC"])
def test_quantized_checkpoints(scheme, pruned, texts, tmp_path):
    """What quantization leaves is packed losslessly, and loads as the dense quantized checkpoint does."""
    group = {"targets": ["Linear"], **_SCHEMES[scheme]}
    quantize = QuantizationModifier(config_groups={"group_0": group}, ignore=["lm_head"])
    oneshot(
        model=str(pruned("llama", hidden_size=64, intermediate_size=256)),
        dataset=texts,
        recipe=[ELSAModifier(**_FIELDS), quantize],
        output_dir=str(tmp_path / "quantized"),
    )
    save_sparse(tmp_path / "quantized", tmp_path / "sparse", progress=False)
    ids = torch.arange(24).view(2, 12)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    model = elsa_modifier.load_sparse(tmp_path / "sparse")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, dense(ids).logits)
    config = json.loads((tmp_path / "sparse" / CONFIG_FILE).read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    with open_checkpoint(tmp_path / "sparse") as opened:
        down = next(
            entry for name, entry in opened.entries.items() if "down_proj.weight" in name and len(entry.shape) == 2
        )
        assert down.dtype == _STORED[scheme]
        assert down.encoding == "coded" and down.sparsity > 0.6


_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
_FP8 = _INT8 | {"type": "float"}
_SCHEMES = {
    "W4A16": {"weights": _INT8 | {"num_bits": 4, "strategy": "group", "group_size": 16}},
    "W8A16": {"weights": _INT8},
    "W8A8": {"weights": _INT8, "input_activations": _INT8 | {"strategy": "token", "dynamic": True}},
    "FP8_DYNAMIC": {"weights": _FP8, "input_activations": _FP8 | {"strategy": "token", "dynamic": True}},
}
_STORED = {"W4A16": "int32", "W8A16": "int32", "W8A8": "int8", "FP8_DYNAMIC": "float8_e4m3fn"}
