"""Damaged checkpoints: every one is refused with an error that names a file."""

import json
import random
import re
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from elsa_sparse import SparseCheckpoint, SparseCheckpointError, open_checkpoint
from elsa_sparse.checkpoint import CONFIG_FILE, CONFIG_KEY, INDEX_FILE
from elsa_sparse.entry import TensorEntry, digest
from elsa_sparse.writing import save_sparse
from tests.sparse.test_writing import VERSION_1

KINDS = ("flip", "flip-header", "flip-table", "truncate", "swap", "lie", "consistent-lie")
FILES = 500


@pytest.fixture(scope="module")
def intact(tmp_path_factory, pruned):
    """Checkpoints of several shards, one an encoding."""
    directory = tmp_path_factory.mktemp("intact")
    for encoding in ("coded", "bitmask"):
        save_sparse(
            pruned("llama", intermediate_size=64, hidden_size=64),
            directory / encoding,
            encoding=encoding,
            max_shard_size="8KB",
            progress=False,
        )
        assert len(list((directory / encoding).glob("*.safetensors"))) > 3
    return directory


def _flip(file, generator, start=0, end=None):
    data = bytearray(file.read_bytes())
    place = generator.randrange(start, len(data) if end is None else end)
    data[place] ^= 1 << generator.randrange(8)
    file.write_bytes(data)
    return f"a bit of byte {place} of {file.name}"


def _pick_shard(directory, generator):
    return generator.choice(sorted(directory.glob("*.safetensors")))


def _entry(name, table):
    return TensorEntry.from_json(name, {field: value for field, value in table[name].items() if field != "shard"})


def _swap_tensors(directory, generator):
    """Two tensors of one kind, such as two layers' q_proj, change places."""
    config = json.loads((directory / CONFIG_FILE).read_text())
    table = config[CONFIG_KEY]["tensors"]
    pairs = [
        (a, b)
        for a, b in combinations(sorted(table), 2)
        if table[a]["shape"] == table[b]["shape"] and table[a]["encoding"] == table[b]["encoding"] != "dense"
    ]
    a, b = generator.choice(pairs)
    shards = {file: load_file(file) for file in directory.glob("*.safetensors")}
    for part in _entry(a, table).parts:
        here = next(parts for parts in shards.values() if f"{a}.{part}" in parts)
        there = next(parts for parts in shards.values() if f"{b}.{part}" in parts)
        here[f"{a}.{part}"], there[f"{b}.{part}"] = there[f"{b}.{part}"], here[f"{a}.{part}"]
    for file, parts in shards.items():
        save_file(parts, file, metadata={"format": "pt"})
    return f"{a} and {b} swapped"


def _lie(directory, generator, edit_config):
    """The table says something else of a tensor."""
    told = []

    def change(config):
        name, entry = generator.choice(sorted(config[CONFIG_KEY]["tensors"].items()))
        field = generator.choice([field for field in entry if field != "sha256"])
        value = entry[field]
        if field == "shape":
            new = [*value[:-1], value[-1] + generator.choice([-1, 1, 8, 2**40])]
        elif field == "deflated":
            new = value[1:] if value else ["plane0"]
        elif field == "dtype":
            new = generator.choice([d for d in ("float16", "bfloat16", "int16", "float32", "int8", "x") if d != value])
        elif field == "encoding":
            new = generator.choice([e for e in ("dense", "bitmask", "coded", "zip") if e != value])
        elif field == "gap_bytes" and generator.random() < 0.3:
            new = None if value is not None else 5
        elif field == "sparsity":
            new = round((value + 0.1) % 1, 6)
        else:
            new = (value or 0) + generator.choice([-1, 1, 7, 2**40])
        entry[field] = new
        told.append(f"{name}: {field} {value} -> {new}")

    edit_config(directory, change)
    return told[0]


def _consistent_lie(directory, generator, edit_config):
    """The table says something else, and its checksums agree with that: what is left is the structure."""
    told = []

    def change(config):
        table = config[CONFIG_KEY]["tensors"]
        name = generator.choice([name for name in sorted(table) if table[name]["encoding"] != "dense"])
        entry = _entry(name, table)
        shape = (*entry.shape[:-1], entry.shape[-1] + generator.choice([-1, 1, 2**40]))
        lies = [replace(entry, shape=shape), replace(entry, sparsity=round((entry.sparsity + 0.1) % 1, 6))]
        if entry.layout is not None:
            kept = entry.layout.kept + generator.choice([-1, 1, 2**40])
            lies.append(replace(entry, layout=replace(entry.layout, kept=kept)))
            if entry.layout.gap_bytes is not None:
                gaps = entry.layout.gap_bytes + generator.choice([-1, 1, 2**40])
                lies.append(replace(entry, layout=replace(entry.layout, gap_bytes=gaps)))
        lie = generator.choice(lies)
        parts = {}
        for file in directory.glob("*.safetensors"):
            parts |= load_file(file)
        lie = replace(lie, sha256=digest(lie, {part: parts[stored] for part, stored in lie.parts.items()}))
        table[name] = {"shard": table[name]["shard"]} | lie.to_json()
        told.append(f"{name}: {lie}")

    edit_config(directory, change)
    return told[0]


def _damage(kind, directory, generator, edit_config):
    if kind == "flip":
        return _flip(_pick_shard(directory, generator), generator)
    if kind == "flip-header":
        file = _pick_shard(directory, generator)
        return _flip(file, generator, end=8 + int.from_bytes(file.read_bytes()[:8], "little"))
    if kind == "flip-table":
        text = (directory / CONFIG_FILE).read_text()
        table = re.search(rf'"{CONFIG_KEY}": \{{.*^  \}}', text, re.DOTALL | re.MULTILINE)
        return _flip(directory / CONFIG_FILE, generator, *table.span())
    if kind == "truncate":
        file = generator.choice([*sorted(directory.glob("*.safetensors")), directory / CONFIG_FILE])
        data = file.read_bytes()
        # config.json ends in "}\n", of which the last character says nothing.
        length = generator.randrange(len(data) - 1)
        file.write_bytes(data[:length])
        return f"{file.name} cut to {length} of {len(data)} bytes"
    if kind == "swap":
        if generator.random() < 0.5:
            return _swap_tensors(directory, generator)
        one, other = generator.sample(sorted(directory.glob("*.safetensors")), 2)
        data = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(data)
        return f"{one.name} and {other.name} swapped"
    if kind == "lie":
        return _lie(directory, generator, edit_config)
    return _consistent_lie(directory, generator, edit_config)


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_refused(kind, intact, tmp_path, edit_config):
    """With as many damaged checkpoints of each kind as make 500 in all."""
    generator = random.Random(kind)
    accepted = []
    count = FILES // len(KINDS) + (KINDS.index(kind) < FILES % len(KINDS))
    for i in range(count):
        directory = tmp_path / str(i)
        shutil.copytree(intact / ("coded" if i % 2 else "bitmask"), directory)
        what = _damage(kind, directory, generator, edit_config)
        try:
            with open_checkpoint(directory) as checkpoint:
                checkpoint.verify()
            accepted.append(what)
        except SparseCheckpointError as error:
            assert str(error).startswith(f"{directory}/"), (what, error)
        shutil.rmtree(directory)
    assert not accepted, f"{len(accepted)} of {count}: {accepted[:5]}"


def test_intact_is_accepted(intact):
    for encoding in ("coded", "bitmask"):
        with open_checkpoint(intact / encoding) as checkpoint:
            checkpoint.verify()


def test_errors_name_file_and_tensor(sparse):
    directory = sparse()
    [file] = directory.glob("*.safetensors")
    parts = load_file(file)
    name = "model.layers.0.mlp.down_proj.weight"
    parts[f"{name}.plane0"][0] ^= 1
    save_file(parts, file, metadata={"format": "pt"})
    with open_checkpoint(directory) as checkpoint, pytest.raises(SparseCheckpointError) as error:
        checkpoint.verify()
    assert str(
        error.value
    ) == f"{file}: tensor {name}: checksum does not match: the file, or its entry in config.json, " + (
        "has been altered"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[CONFIG_KEY].update(version=3), "version is 3; this version of elsa-modifier reads 1 and 2"),
        (lambda c: c[CONFIG_KEY].update(version=True), "version is True"),
        (lambda c: c.update({CONFIG_KEY: 3}), "version is None"),
        (lambda c: c[CONFIG_KEY].update(extra=1), "and nothing else"),
        (lambda c: c.pop(CONFIG_KEY), "this is not a sparse checkpoint"),
        (lambda c: c[CONFIG_KEY]["tensors"].popitem(), "belongs to no tensor"),
        (lambda c: c[CONFIG_KEY]["tensors"].update(x=1), "tensor x: its entry is not an object"),
        (lambda c: c[CONFIG_KEY]["tensors"].update(x={}), "tensor x: shard is None; allowed is 1 to 1"),
        (lambda c: c[CONFIG_KEY]["tensors"].update(x={"shard": 2}), "tensor x: shard is 2; allowed is 1 to 1"),
        (lambda c: c[CONFIG_KEY]["tensors"].update(x={"shard": 1}), "tensor x: encoding is missing; allowed is one of"),
        (lambda c: c[CONFIG_KEY].update(files=3), "files is not a mapping of names in the directory to SHA-256"),
        (lambda c: c[CONFIG_KEY]["files"].update({"../notes": "0" * 64}), "files is not a mapping of names in the dir"),
        (lambda c: c[CONFIG_KEY]["files"].update({"config.json": "0" * 64}), "files is not a mapping of names in the"),
        (lambda c: c[CONFIG_KEY]["files"].update(notes="0" * 64), "the shards' names do not agree with it"),
        (lambda c: c[CONFIG_KEY]["files"].update({"README.md": "0" * 64}), "the shards' names do not agree with it"),
    ],
)
def test_tables_that_are_not_of_this_version(change, message, sparse, edit_config):
    directory = sparse()
    edit_config(directory, change)
    with pytest.raises(SparseCheckpointError, match=message):
        SparseCheckpoint.open(directory)


def test_a_tensor_in_another_shard_than_its_entry_says_is_refused(sparse, edit_config):
    directory = sparse(max_shard_size="5KB")
    edit_config(directory, lambda c: c[CONFIG_KEY]["tensors"]["model.norm.weight"].update(shard=1))
    with pytest.raises(
        SparseCheckpointError, match=r"config\.json: says that \S+-00001-of-\S+ holds model\.norm\.weight"
    ):
        SparseCheckpoint.open(directory)


@pytest.fixture
def version_1(tmp_path):
    return Path(shutil.copytree(VERSION_1, tmp_path / "version_1"))


def test_damage_to_an_index_of_version_1_is_refused(version_1, tmp_path):
    generator = random.Random(0)
    original = (version_1 / INDEX_FILE).read_bytes()
    for _ in range(60):
        (version_1 / INDEX_FILE).write_bytes(original)
        what = _flip(version_1 / INDEX_FILE, generator, end=len(original) - 1)
        with pytest.raises(SparseCheckpointError) as error:
            SparseCheckpoint.open(version_1)
        assert str(error.value).startswith(f"{version_1}/"), what
    (version_1 / INDEX_FILE).unlink()
    with pytest.raises(SparseCheckpointError, match=r"sparse-model\.safetensors\.index\.json: there is no such file"):
        SparseCheckpoint.open(version_1)


def test_paths_out_of_the_directory_are_refused(version_1):
    outside = version_1.parent / "outside.safetensors"
    (version_1 / "sparse-model-00001-of-00002.safetensors").rename(outside)
    index = json.loads((version_1 / INDEX_FILE).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../outside.safetensors")
    (version_1 / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(SparseCheckpointError, match="no such file in the checkpoint"):
        SparseCheckpoint.open(version_1)


def test_unfinished_directory(tmp_path):
    with pytest.raises(
        SparseCheckpointError, match=r"config.json: there is no such file: the checkpoint is not complete"
    ):
        open_checkpoint(tmp_path)
