import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from elsa_sparse import SparseCheckpointError, open_checkpoint, save_sparse, unpack
from elsa_sparse.checkpoint import CONFIG_FILE, CONFIG_KEY, INDEX_FILE
from elsa_sparse.writing import _parse_size
from tests.fuzzing import limits
from tests.sparse.strategies import same_bits

OLD_FORMAT = Path(__file__).parent / "data" / "compressed_tensors_0_14"


def tensors_of(directory):
    if (directory / INDEX_FILE).exists() or directory == OLD_FORMAT:
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
    assert len(warned) == 3
    out = source / "more" / "out"
    assert not (out / "zeros.txt").exists() and list((out / "more").iterdir()) == []
    assert (out / "notes.txt").is_file() and not (out / "notes.txt").is_symlink()


@pytest.mark.parametrize("name", ["config.json", "sparse-model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_files_that_are_none_are_not_waited_for(kind, name, sparse):
    directory = sparse()
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


def test_existing_directories(sparse, pruned, tmp_path):
    out = sparse()
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        save_sparse(pruned(), out, progress=False)
    (out / "notes.txt").write_text("mine")
    (out / "runs").mkdir()
    (out / "model.safetensors").write_text("an older dense model")
    save_sparse(pruned("llama-tied"), out, max_shard_size="5KB", overwrite=True, progress=False)
    assert_same_tensors(pruned("llama-tied"), out)
    assert (out / "notes.txt").read_text() == "mine" and (out / "runs").is_dir()
    assert not (out / "model.safetensors").exists() and not (out / "sparse-model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sparse"]

    (tmp_path / "empty").mkdir()
    save_sparse(pruned(), tmp_path / "empty", progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        save_sparse(pruned(), tmp_path / "file", progress=False)


def test_in_place(pruned, tmp_path):
    """A directory may be packed over itself."""
    shutil.copytree(pruned(), tmp_path / "model")
    save_sparse(tmp_path / "model", tmp_path / "model", overwrite=True, progress=False)
    assert_same_tensors(pruned(), tmp_path / "model")
    assert not (tmp_path / "model" / "model.safetensors").exists()


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


def test_a_full_disk_harms_nothing(sparse, pruned, tmp_path):
    """Writing fails half-way (a limit on file sizes stands in for a full disk): the older checkpoint is what it was."""
    out = sparse()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    other = pruned("llama-tied")
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            save_sparse(other, out, overwrite=True, progress=False)
        except OSError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["sparse"]


def test_two_at_once(pruned, tmp_path):
    """The second of two processes that write one directory is refused."""
    from elsa_sparse.atomic import replaced_directory

    with replaced_directory(tmp_path / "out", overwrite=False), pytest.raises(FileExistsError, match="another process"):
        save_sparse(pruned(), tmp_path / "out", progress=False)
    assert (tmp_path / "out").is_dir()


def test_killed_saves():
    """kill -9 at 20 random moments."""
    script = Path(__file__).parent / "kill_saves.py"
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    summary = json.loads(run.stdout.splitlines()[-1])
    assert summary["saves"] == 20 and summary["bad"] == []
    # Enough of them must have hit a save that was under way for the test to mean anything.
    assert summary["killed"] >= 10


@pytest.mark.parametrize("encoding", ["coded", "bitmask"])
def test_reading_ignores_the_default_device(encoding, sparse, pruned):
    """Servers read weights in a context that makes new tensors elsewhere."""
    directory = sparse(encoding=encoding)
    with torch.device("meta"), open_checkpoint(directory) as checkpoint:
        tensors = dict(checkpoint)
    assert all(same_bits(tensors[name], tensor) for name, tensor in tensors_of(pruned()).items())


def test_table_of_config(sparse):
    config = json.loads((sparse() / CONFIG_FILE).read_text())
    entry = config[CONFIG_KEY]["tensors"]["model.layers.0.mlp.down_proj.weight"]
    assert config[CONFIG_KEY]["version"] == 1
    assert entry["dtype"] == "bfloat16" and 0.7 < entry["sparsity"] < 0.9 and len(entry["sha256"]) == 64
