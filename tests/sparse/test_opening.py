"""Which directories are sparse checkpoints, what is left of their configurations, and who can load what is unpacked."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from elsa_sparse import transformers_loading
from elsa_sparse.bitmask import encode_bitmask
from elsa_sparse.checkpoint import CONFIG_FILE, CONFIG_KEY
from elsa_sparse.errors import SparseCheckpointError
from elsa_sparse.opening import dense_config, is_sparse, open_checkpoint
from elsa_sparse.transformers_loading import load_sparse, teach_from_pretrained
from elsa_sparse.writing import save_sparse, unpack
from tests.cli.test_commands import run
from tests.sparse.test_writing import OLD_FORMAT

SPARSITY = {"format": "sparse-bitmask", "targets": []}
GROUPS = {"group_0": {"targets": ["Linear"]}}


@pytest.mark.parametrize(
    ("config", "sparse", "dense"),
    [
        ({"a": 1}, False, {"a": 1}),
        ({"a": 1, CONFIG_KEY: {}}, True, {"a": 1}),
        ({"a": 1, "quantization_config": {"sparsity_config": SPARSITY}}, True, {"a": 1}),
        ({"a": 1, "compression_config": {"sparsity_config": SPARSITY, "quant_method": "x"}}, True, {"a": 1}),
        (
            {"quantization_config": {"sparsity_config": SPARSITY, "config_groups": GROUPS}},
            True,
            {"quantization_config": {"config_groups": GROUPS}},
        ),
        ({"quantization_config": {"config_groups": GROUPS}}, False, None),
        ({"quantization_config": {"sparsity_config": {"format": "dense"}}}, False, None),
        ({"quantization_config": {"sparsity_config": "sparse-bitmask"}}, False, None),
        ({"quantization_config": None, "compression_config": []}, False, None),
    ],
    ids=str,
)
def test_configurations(config, sparse, dense):
    before = json.dumps(config)
    assert is_sparse(config) is sparse
    assert dense_config(config) == (config if dense is None else dense)
    assert json.dumps(config) == before


def _old_directory(directory, files):
    directory.mkdir()
    (directory / CONFIG_FILE).write_text(json.dumps({"quantization_config": {"sparsity_config": SPARSITY}}))
    for name, tensors in files.items():
        save_file(tensors, directory / name)
    if len(files) > 1:
        weight_map = {part: name for name, tensors in files.items() for part in tensors}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


@pytest.mark.parametrize("prefix", ["layer.weight", "layer"])
def test_the_old_format_in_shards(prefix, tmp_path):
    """Names with and without .weight; parts of one tensor in two files."""
    weight = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, -1.0]], dtype=torch.float16)
    parts = {f"{prefix}.{part}": tensor for part, tensor in encode_bitmask(weight).items()}
    shape = {f"{prefix}.shape": parts.pop(f"{prefix}.shape")}
    bias = torch.tensor([0.0, 3.0, 4.0, 5.0])
    directory = _old_directory(
        tmp_path / "old", {"a.safetensors": parts, "b.safetensors": shape | {"layer.bias": bias}}
    )
    with open_checkpoint(directory) as checkpoint:
        entries = checkpoint.entries
        assert entries.keys() == {"layer.weight", "layer.bias"}
        assert torch.equal(checkpoint.read("layer.weight"), weight) and torch.equal(checkpoint.read("layer.bias"), bias)
    found = entries["layer.weight"]
    assert (found.encoding, found.dtype, found.shape) == ("bitmask", "float16", (2, 3))
    assert found.sparsity == pytest.approx(4 / 6)
    found = entries["layer.bias"]
    assert (found.encoding, found.dtype, found.shape, found.sparsity) == ("dense", "float32", (4,), 0.25)


@pytest.mark.parametrize("part", ["compressed", "row_offsets", "shape"])
def test_the_old_format_names_the_part_that_is_missing(part, tmp_path):
    parts = {f"layer.{name}": tensor for name, tensor in encode_bitmask(torch.eye(3)).items()}
    del parts[f"layer.{part}"]
    directory = _old_directory(tmp_path / "old", {"model.safetensors": parts})
    with pytest.raises(SparseCheckpointError, match=f"model.safetensors: tensor layer.weight: layer.{part} is missing"):
        open_checkpoint(directory)


@pytest.mark.parametrize("dimensions", [16, 17])
def test_the_old_format_has_up_to_16_dimensions(dimensions, tmp_path):
    parts = {f"layer.{name}": tensor for name, tensor in encode_bitmask(torch.ones([1] * dimensions)).items()}
    directory = _old_directory(tmp_path / "old", {"model.safetensors": parts})
    if dimensions == 16:
        with open_checkpoint(directory) as checkpoint:
            assert checkpoint.read("layer.weight").shape == torch.Size([1] * 16)
    else:
        with pytest.raises(SparseCheckpointError, match=r"layer.shape is not a list of 1 to 16 dimensions"):
            open_checkpoint(directory)


@pytest.mark.parametrize("size", ["2GB", "5KB"])
def test_transformers_loads_what_is_unpacked(size, sparse, pruned, tmp_path):
    unpack(sparse(), tmp_path / "dense", max_shard_size=size, progress=False)
    model, info = LlamaForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = load_file(pruned() / "model.safetensors")
    state = model.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], t) for name, t in expected.items())
    index = tmp_path / "dense" / "model.safetensors.index.json"
    if size == "5KB":
        stated = json.loads(index.read_text())
        assert stated["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
        assert stated["weight_map"].keys() == expected.keys()


def test_from_pretrained_is_taught_once():
    teach_from_pretrained()
    first = LlamaForCausalLM.from_pretrained.__func__
    teach_from_pretrained()
    assert LlamaForCausalLM.from_pretrained.__func__ is first and first.__name__ == "from_pretrained"


def test_configurations_given_to_from_pretrained(sparse):
    directory = sparse()
    config = LlamaConfig.from_pretrained(directory)
    config.rope_theta_of_mine = 7
    before = config.to_dict()
    model = AutoModelForCausalLM.from_pretrained(directory, config=config)
    assert model.config.rope_theta_of_mine == 7 and config.to_dict() == before
    assert not hasattr(model.config, CONFIG_KEY)
    other = directory.parent / "other"
    other.mkdir()
    config.output_attentions = True
    config.save_pretrained(other)
    assert LlamaForCausalLM.from_pretrained(directory, config=str(other)).config.output_attentions


def test_generation_settings_are_the_checkpoint_s_unless_others_are_given(sparse):
    directory = sparse()
    file = directory / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_new_tokens": 7}))
    model = load_sparse(directory)
    assert model.generation_config.max_new_tokens == 7
    mine = type(model.generation_config)(max_new_tokens=9)
    assert load_sparse(directory, generation_config=mine).generation_config.max_new_tokens == 9
    file.unlink()
    assert load_sparse(directory).generation_config.max_new_tokens != 7


def test_what_is_not_sparse_is_left_to_transformers(pruned, sparse, tmp_path, load):
    with pytest.raises(SparseCheckpointError, match=r"is not a sparse checkpoint; load it with from_pretrained"):
        load_sparse(pruned())
    state = load().state_dict()
    config = load().config
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state)
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])
    # transformers has its own words for a state_dict beside a directory.
    with pytest.raises(ValueError, match="state_dict"):
        LlamaForCausalLM.from_pretrained(sparse(), config=config, state_dict=state)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError):
        LlamaForCausalLM.from_pretrained(tmp_path / "empty")


def test_an_unknown_architecture_is_an_auto_model(sparse, edit_config):
    directory = sparse()
    edit_config(directory, lambda config: config.update(architectures=["MyOwnForCausalLM"]))
    assert isinstance(load_sparse(directory), LlamaForCausalLM)
    edit_config(directory, lambda config: config.pop("architectures"))
    assert isinstance(load_sparse(directory), LlamaForCausalLM)


def test_lazy_tensors_say_what_safetensors_slices_say(sparse):
    with open_checkpoint(sparse()) as checkpoint:
        for name in checkpoint.entries:
            lazy = transformers_loading._LazyTensor(checkpoint, name)
            tensor = checkpoint.read(name)
            assert (lazy.get_shape(), lazy.get_dtype()) == (list(tensor.shape), "BF16")
            assert torch.equal(lazy[...], tensor) and torch.equal(lazy[:1], tensor[:1])


def test_the_old_format_with_a_quantization_of_its_own(tmp_path):
    """What the configuration says of quantization stays; what it says of sparsity goes."""
    shutil.copytree(OLD_FORMAT, tmp_path / "old")
    file = tmp_path / "old" / CONFIG_FILE
    config = json.loads(file.read_text())
    assert is_sparse(config) and not is_sparse(dense_config(config))
    assert dense_config(config) == {k: v for k, v in config.items() if k != "quantization_config"}


def test_what_travels_with_a_checkpoint(pruned, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(pruned(), source)
    for name in (".hidden", "notes.txt", "pytorch_model.bin"):
        (source / name).write_text(name)
    (source / ".cache").mkdir()
    save_sparse(source, tmp_path / "sparse", progress=False)
    unpack(tmp_path / "sparse", tmp_path / "dense", progress=False)
    for directory in (tmp_path / "sparse", tmp_path / "dense"):
        names = {path.name for path in directory.iterdir()}
        assert {"notes.txt", "config.json", "tokenizer.json"} <= names
        assert not {".hidden", ".cache", "pytorch_model.bin"} & names
        assert (directory / "notes.txt").read_text() == "notes.txt"
    assert not (tmp_path / "sparse" / "model.safetensors").exists()
    assert not (tmp_path / "dense" / "sparse-model.safetensors").exists()


def test_no_progress_is_shown_unless_asked_for(load, sparse, tmp_path, capfd):
    model, directory = load(), sparse()
    capfd.readouterr()
    for progress in (False, True):
        for name, act in {
            "pack": lambda out, p: save_sparse(directory, out, encoding="bitmask", progress=p),
            "model": lambda out, p: save_sparse(model, out, progress=p),
            "unpack": lambda out, p: unpack(directory, out, progress=p),
        }.items():
            act(tmp_path / f"{name}{progress}", progress)
            shown = capfd.readouterr().err
            assert ("tensor" in shown) is progress, name


def test_a_part_of_a_hub_s_repository(sparse, pruned, tmp_path):
    cache, commit = tmp_path / "cache", "0" * 40
    repository = cache / "models--someone--pruned"
    shutil.copytree(sparse(), repository / "snapshots" / commit / "part")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    model = LlamaForCausalLM.from_pretrained("someone/pruned", cache_dir=cache, local_files_only=True, subfolder="part")
    expected = load_file(pruned() / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_a_shard_is_filled_to_its_last_byte(sparse, pruned, tmp_path):
    total = sum(tensor.nbytes for tensor in load_file(pruned() / "model.safetensors").values())
    for size, shards in ((total, 1), (total - 1, 2)):
        unpack(sparse() if size == total else tmp_path / "sparse", tmp_path / f"{size}", max_shard_size=size)
        assert len(list((tmp_path / f"{size}").glob("*.safetensors"))) == shards


def test_what_exists_is_replaced_only_when_told(sparse, load, tmp_path):
    directory, model = sparse(), load()
    out = tmp_path / "model"
    save_sparse(model, out, progress=False)
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        save_sparse(model, out, progress=False)
    save_sparse(model, out, overwrite=True, progress=False)
    unpack(directory, out, overwrite=True, progress=False)
    assert "exists and is not empty" in run("unpack", directory, out, code=1).stderr
    assert "was not written by elsa-modifier" in run("unpack", directory, out, "--overwrite", code=1).stderr
    assert "coded, dense" in run("inspect", directory).stdout
