import json
import os
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from elsa_sparse import SparseCheckpointError, open_checkpoint, save_sparse, unpack
from elsa_sparse.checkpoint import CONFIG_FILE, CONFIG_KEY, INDEX_FILE
from elsa_sparse.opening import is_sparse
from elsa_sparse.writing import _parse_size
from tests.fuzzing import limits
from tests.sparse.strategies import same_bits

OLD_FORMAT = Path(__file__).parent / "data" / "compressed_tensors_0_14"
VERSION_1 = Path(__file__).parent / "data" / "sparse_version_1"


def tensors_of(directory):
    if is_sparse(json.loads((directory / CONFIG_FILE).read_text())):
        with open_checkpoint(directory) as checkpoint:
            return dict(checkpoint)
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def assert_same_tensors(one, other):
    one, other = tensors_of(one), tensors_of(other)
    assert one.keys() == other.keys()
    assert all(same_bits(one[name], other[name]) for name in one)


@pytest.mark.parametrize("encoding", ["coded", "bitmask"])
@pytest.mark.parametrize("size", ["2GB", "5KB"])
def test_packed_and_unpacked_is_bit_equal(encoding, size, pruned, tmp_path):
    save_sparse(pruned(), tmp_path / "sparse", encoding=encoding, max_shard_size=size, progress=False)
    unpack(tmp_path / "sparse", tmp_path / "dense", max_shard_size=size, progress=False)
    assert_same_tensors(pruned(), tmp_path / "sparse")
    assert_same_tensors(pruned(), tmp_path / "dense")
    shards = list((tmp_path / "sparse").glob("*.safetensors"))
    assert (len(shards) > 1) == (size == "5KB")
    if size == "5KB":
        largest = max(t.numel() * t.element_size() for t in tensors_of(pruned()).values())
        headers = 4096
        assert max(shard.stat().st_size for shard in shards) <= max(5000, largest) + headers
    assert (tmp_path / "dense" / "model.safetensors.index.json").exists() == (size == "5KB")
    assert json.loads((tmp_path / "dense" / CONFIG_FILE).read_text()) == json.loads(
        (pruned() / CONFIG_FILE).read_text()
    )


def test_version_1_is_read_packed_and_unpacked(tmp_path):
    """Made with the version of this package that wrote it (data/make_sparse_version_1.py)."""
    with open_checkpoint(VERSION_1) as checkpoint:
        assert len(checkpoint.entries) == 12
        checkpoint.verify()
        assert 0.7 < float((checkpoint.read("model.layers.0.mlp.down_proj.weight") == 0).float().mean()) < 0.9
    save_sparse(VERSION_1, tmp_path / "new", bit_equal=True, progress=False)
    unpack(VERSION_1, tmp_path / "dense", progress=False)
    assert_same_tensors(VERSION_1, tmp_path / "new")
    assert_same_tensors(VERSION_1, tmp_path / "dense")
    assert json.loads((tmp_path / "new" / CONFIG_FILE).read_text())[CONFIG_KEY]["version"] == 2
    assert not (tmp_path / "new" / INDEX_FILE).exists()


def test_what_is_written_is_a_function_of_what_is_packed(pruned, tmp_path):
    """Names included: nothing in them is random, and no two checkpoints have a shard's name in common."""
    for out, source in {"one": pruned(), "two": pruned(), "other": pruned("llama-tied")}.items():
        save_sparse(source, tmp_path / out, max_shard_size="5KB", progress=False)
    one, two, other = (
        {path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in ("one", "two", "other")
    )
    assert one == two
    assert not {name for name in one.keys() & other.keys() if name.endswith(".safetensors")}


def test_sparse_checkpoints_are_packed_anew(sparse, pruned, tmp_path):
    """From one encoding to another."""
    save_sparse(sparse(encoding="bitmask"), tmp_path / "coded", progress=False)
    assert_same_tensors(pruned(), tmp_path / "coded")
    with open_checkpoint(tmp_path / "coded") as checkpoint:
        assert {entry.encoding for entry in checkpoint.entries.values()} == {"coded", "dense"}


def test_what_compressed_tensors_wrote(tmp_path):
    """Made with compressed-tensors 0.14 (data/make_compressed_tensors_0_14.py); read, packed, unpacked."""
    with open_checkpoint(OLD_FORMAT) as checkpoint:
        entry = checkpoint.entries["model.layers.0.mlp.down_proj.weight"]
        assert (entry.encoding, entry.shape, entry.dtype) == ("bitmask", (24, 44), "bfloat16")
        assert 0.7 < entry.sparsity < 0.9
        assert float((checkpoint.read(entry.name) == 0).float().mean()) == pytest.approx(entry.sparsity)
        assert len(checkpoint.entries) == 12
    save_sparse(OLD_FORMAT, tmp_path / "new", progress=False)
    unpack(OLD_FORMAT, tmp_path / "dense", progress=False)
    assert_same_tensors(OLD_FORMAT, tmp_path / "new")
    assert_same_tensors(OLD_FORMAT, tmp_path / "dense")
    for directory in ("new", "dense"):
        assert "quantization_config" not in json.loads((tmp_path / directory / CONFIG_FILE).read_text())


def test_damaged_files_of_compressed_tensors_are_refused(tmp_path):
    shutil.copytree(OLD_FORMAT, tmp_path / "old")
    parts = load_file(OLD_FORMAT / "model.safetensors")
    prefix = "model.layers.0.mlp.up_proj"
    for part, change in {
        "bitmask": lambda t: t ^ 1,
        "row_offsets": lambda t: t + 1,
        "compressed": lambda t: t[1:].clone(),
        "shape": lambda t: t + 1,
    }.items():
        changed = parts | {f"{prefix}.{part}": change(parts[f"{prefix}.{part}"])}
        save_file(changed, tmp_path / "old" / "model.safetensors")
        with (
            pytest.raises(SparseCheckpointError, match=rf"model.safetensors: tensor {prefix}.weight: "),
            open_checkpoint(tmp_path / "old") as checkpoint,
        ):
            checkpoint.verify()
    del parts[f"{prefix}.shape"]
    save_file(parts, tmp_path / "old" / "model.safetensors")
    with pytest.raises(SparseCheckpointError, match=rf"tensor {prefix}.weight: {prefix}.shape is missing"):
        open_checkpoint(tmp_path / "old")


def test_companions_travel_and_a_card_is_written_once(pruned, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(pruned(), source)
    for name in ("recipe.yaml", "elsa_history.json", "modeling_custom.py"):
        (source / name).write_text(name)
    (source / "original").mkdir()
    (source / "original" / "weights.pth").write_text("")
    (source / "original" / "params.json").write_text("{}")
    save_sparse(source, tmp_path / "one", progress=False)
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert {
        "recipe.yaml",
        "elsa_history.json",
        "modeling_custom.py",
        "tokenizer.json",
        "generation_config.json",
    } <= names
    assert [path.name for path in (tmp_path / "one" / "original").iterdir()] == ["params.json"]
    card = (tmp_path / "one" / "README.md").read_text()
    assert "15 matrices" in card.replace("\n", " ") and "zeros on average" in card
    (source / "README.md").write_text("# Mine")
    save_sparse(source, tmp_path / "two", progress=False)
    assert (tmp_path / "two" / "README.md").read_text() == "# Mine"


def test_companions_that_are_no_files_are_left_out(pruned, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(pruned(), source)
    (source / "more").mkdir()
    os.mkfifo(source / "more" / "pipe.json")
    (source / "zeros.txt").symlink_to("/dev/zero")
    (source / "more" / "again").symlink_to(source)
    (source / "notes.txt").symlink_to(source / CONFIG_FILE)
    with pytest.warns(UserWarning, match="is not copied: it is neither a file nor a directory") as warned:
        save_sparse(source, source / "more" / "out", progress=False)
    assert len(warned) == 2
    out = source / "more" / "out"
    assert not (out / "zeros.txt").exists() and not (out / "more").exists()
    assert (out / "notes.txt").is_file() and not (out / "notes.txt").is_symlink()


@pytest.mark.parametrize("pattern", ["config.json", "sparse-model-*.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_files_that_are_none_are_not_waited_for(kind, pattern, sparse):
    directory = sparse()
    (name,) = (file.name for file in directory.glob(pattern))
    (directory / name).unlink()
    if kind == "pipe":
        os.mkfifo(directory / name)
    else:
        (directory / name).symlink_to("/dev/zero")
    with limits(), pytest.raises(SparseCheckpointError, match=rf"{name}: is a {kind}; only regular files are read"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    "text,message",
    [
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ('{"a": NaN}', "NaN is not a number of JSON"),
        ('{"a": 1e999}', "is too large"),
        ('{"a": ' + "9" * 5000 + "}", "is too large"),
        ('{"a": ' + "[" * 101 + "]" * 101 + "}", "it nests too deep"),
        ("[" * 10**6, "it nests too deep"),
        ("\udcff", "can't decode byte 0xff"),
        ("7", "is not a JSON object"),
    ],
)
def test_json_that_says_more_than_one_thing(text, message, tmp_path):
    (tmp_path / CONFIG_FILE).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(SparseCheckpointError, match=rf"config.json: .*{message}"):
        open_checkpoint(tmp_path)


def test_json_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("elsa_sparse.files.MAX_JSON_BYTES", 100)
    (tmp_path / CONFIG_FILE).write_text('{"a": "' + "x" * 200 + '"}')
    with pytest.raises(SparseCheckpointError, match="is larger than 100 bytes"):
        open_checkpoint(tmp_path)


def test_bad_input_is_refused_before_anything_is_written(pruned, tmp_path):
    for options, message in [
        ({"encoding": "zip"}, "encoding is 'zip'; allowed are 'coded' and 'bitmask'"),
        ({"max_shard_size": "two"}, "max_shard_size is 'two'; allowed are bytes"),
        ({"max_shard_size": 0}, "max_shard_size is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            save_sparse(pruned(), tmp_path / "out", progress=False, **options)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SparseCheckpointError, match=r"config\.json: there is no such file"):
        save_sparse(tmp_path / "empty", tmp_path / "out", progress=False)
    shutil.copy(pruned() / CONFIG_FILE, tmp_path / "empty" / CONFIG_FILE)
    with pytest.raises(SparseCheckpointError, match=r"has neither model\.safetensors nor"):
        save_sparse(tmp_path / "empty", tmp_path / "out", progress=False)
    with pytest.raises(SparseCheckpointError, match="this is not a sparse checkpoint"):
        unpack(pruned(), tmp_path / "out", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def test_sizes():
    for size in ("1e400GB", "-1", "9" * 400, "9" * 25 + "GB", "nan", "inf", "", "0.1"):
        with pytest.raises(ValueError, match="allowed are bytes"):
            _parse_size(size)
    assert [_parse_size(size) for size in (7, "7", "1.5 GB", "2gib", "10KB")] == [7, 7, 1_500_000_000, 2**31, 10_000]


def test_a_head_that_belies_tied_embeddings_keeps_its_name(pruned, tmp_path, edit_config):
    shutil.copytree(pruned(), tmp_path / "source")
    for tied, encoding in [(True, "dense"), (False, "coded")]:
        edit_config(tmp_path / "source", lambda config, tied=tied: config.update(tie_word_embeddings=tied))
        save_sparse(tmp_path / "source", tmp_path / "out", overwrite=True, progress=False)
        with open_checkpoint(tmp_path / "out") as checkpoint:
            assert checkpoint.entries["lm_head.weight"].encoding == encoding


def test_names_that_would_collide(pruned, tmp_path):
    shutil.copytree(pruned(), tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight.plane0"] = torch.ones(3)
    save_file(tensors, file)
    with pytest.raises(SparseCheckpointError, match="under the same name"):
        save_sparse(tmp_path / "source", tmp_path / "out", progress=False)


@pytest.mark.parametrize("encoding", ["coded", "bitmask"])
def test_reading_ignores_the_default_device(encoding, sparse, pruned):
    """Servers read weights in a context that makes new tensors elsewhere."""
    directory = sparse(encoding=encoding)
    with torch.device("meta"), open_checkpoint(directory) as checkpoint:
        tensors = dict(checkpoint)
    assert all(same_bits(tensors[name], tensor) for name, tensor in tensors_of(pruned()).items())


def test_table_of_config(sparse):
    directory = sparse()
    config = json.loads((directory / CONFIG_FILE).read_text())
    entry = config[CONFIG_KEY]["tensors"]["model.layers.0.mlp.down_proj.weight"]
    assert config[CONFIG_KEY]["version"] == 2
    assert config[CONFIG_KEY]["files"].keys() == {path.name for path in directory.iterdir()} - {CONFIG_FILE}
    assert (
        config[CONFIG_KEY]["files"]["tokenizer.json"] == sha256((directory / "tokenizer.json").read_bytes()).hexdigest()
    )
    assert entry["dtype"] == "bfloat16" and 0.7 < entry["sparsity"] < 0.9 and len(entry["sha256"]) == 64


@pytest.mark.parametrize("name", ["elsa_eval.json", "elsa_bench.json"])
def test_what_was_found_about_a_checkpoint_stays_with_it(name, pruned, tmp_path):
    source, target = tmp_path / "source", tmp_path / "out"
    shutil.copytree(pruned(), source)
    (source / name).write_text("of the source")
    save_sparse(source, target)
    assert not (target / name).exists()
    (target / name).write_text("of the target")
    save_sparse(source, target, overwrite=True)
    assert not (target / name).exists() and (source / name).read_text() == "of the source"
