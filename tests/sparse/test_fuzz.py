"""Checkpoints that are hostile in their structure: whatever they hold is read, or refused with a line.

``ELSA_FUZZ_CASES=10000 python -m pytest tests/sparse/test_fuzz.py tests/planning/test_fuzz.py -s`` is a run by hand; it
prints what became of the cases.
"""

import json
import shutil
import struct
import tempfile
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save_file
from typer.testing import CliRunner

from elsa_cli.main import app
from elsa_sparse import SparseCheckpointError, open_checkpoint, save_sparse
from elsa_sparse.checkpoint import CONFIG_FILE, CONFIG_KEY
from elsa_sparse.entry import TensorEntry, digest
from tests.fuzzing import CASES, KINDS, ODD_NAMES, as_bytes, become, cases, limits, mutated
from tests.sparse.test_writing import OLD_FORMAT, VERSION_1

OUTCOMES = Counter()


@pytest.fixture(scope="module", autouse=True)
def outcomes():
    yield
    if CASES:
        print("\n" + "\n".join(f"{count:6} {outcome}" for outcome, count in OUTCOMES.most_common()))


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """Small checkpoints of each kind, by file: a JSON document, or a shard's header and body."""
    directory = tmp_path_factory.mktemp("templates")
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(40, 60, generator=generator) < 0.2
    tensors = {
        "model.layers.0.a.weight": (torch.randn(40, 60, generator=generator) * mask).to(torch.bfloat16),
        "model.layers.0.b.weight": torch.where(mask, torch.randint(0, 2**31, mask.shape, generator=generator), 0).int(),
        "model.layers.10.c.weight": torch.full((40, 60), -0x77777778, dtype=torch.int32),
        "model.norm.weight": torch.ones(40),
    }
    tensors["model.layers.10.c.weight"][:5] = 0x12345678
    dense = directory / "dense"
    dense.mkdir()
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    (dense / CONFIG_FILE).write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}))
    for encoding in ("coded", "bitmask"):
        save_sparse(dense, directory / encoding, encoding=encoding, progress=False)
    shutil.copytree(OLD_FORMAT, directory / "old")
    shutil.copytree(VERSION_1, directory / "version_1")
    return Templates(
        (made.name, {file.name: _parsed(file) for file in sorted(made.iterdir())}) for made in directory.iterdir()
    )


def _parsed(file):
    data = file.read_bytes()
    if file.suffix == ".json":
        return json.loads(data)
    if file.suffix != ".safetensors":
        return data
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _written(content):
    if isinstance(content, tuple):
        header = as_bytes(content[0])
        return struct.pack("<Q", len(header)) + header + content[1]
    return content if isinstance(content, bytes) else as_bytes(content)


def _bomb(size):
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    return coder.compress(bytes(size)) + coder.flush()


BOMB_BYTES = 300_000_000
BOMB = _bomb(BOMB_BYTES)


@st.composite
def _mutation(draw, files):
    """One file changed in its structure or its bytes."""
    name = draw(st.sampled_from(sorted(name for name in files if name.endswith(("json", "safetensors")))))
    content = files[name]
    if not isinstance(content, tuple):
        return name, draw(mutated(content))
    header, body = content
    action = draw(st.sampled_from(["header", "header", "flip", "cut", "bomb", "grow"]))
    if action == "header" or not body:
        return name, (draw(mutated(header)), body)
    place = draw(st.integers(0, len(body) - 1))
    if action == "flip":
        return name, (header, body[:place] + bytes([body[place] ^ (1 << draw(st.integers(0, 7)))]) + body[place + 1 :])
    if action == "cut":
        return name, (header, body[:place])
    if action == "grow":
        return name, (header, body + bytes(place))
    try:
        return name, _with_bomb(header, body, draw(st.sampled_from(sorted(header))))
    except (KeyError, TypeError, ValueError, AttributeError):  # of a header that is hostile already
        return name, content


def _with_bomb(header, body, part):
    """A stream that inflates to as much as it can in place of a part, and a header that knows."""
    header = json.loads(json.dumps(header))
    start, end = header[part]["data_offsets"]
    longer = len(BOMB) - (end - start)
    for other, entry in header.items():
        if other != "__metadata__" and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [offset + longer for offset in entry["data_offsets"]]
    header[part] = {"dtype": "U8", "shape": [len(BOMB)], "data_offsets": [start, start + len(BOMB)]}
    return header, body[:start] + BOMB + body[end:]


def _with_claim(files, name):
    """A small tensor whose table says that its streams inflate to far more, which they do."""
    config = json.loads(json.dumps(files[CONFIG_FILE]))
    entry = config[CONFIG_KEY]["tensors"][name]
    (shard,) = (file for file in files if file.endswith(".safetensors"))
    streams = _entry(name, entry).layout.streams
    for part in streams:
        files = files | {shard: _with_bomb(*files[shard], f"{name}.{part}")}
    entry |= {"kept": BOMB_BYTES, "gap_bytes": BOMB_BYTES, "deflated": list(streams)}
    return _signed(files | {CONFIG_FILE: config})


def _entry(name, data):
    """A tensor's entry, of either version of the table."""
    return TensorEntry.from_json(name, {key: value for key, value in data.items() if key != "shard"})


def _signed(files):
    """Checksums made to agree with whatever is there, so that what is checked after them is reached."""
    try:
        config = json.loads(_written(files[CONFIG_FILE]))
        parts = {}
        for name, content in files.items():
            if name.endswith(".safetensors"):
                parts |= load(_written(content))
        for name, data in config[CONFIG_KEY]["tensors"].items():
            entry = _entry(name, data)
            stored = {part: parts[where] for part, where in entry.parts.items()}
            sparsity = data["sparsity"]
            data["sha256"] = digest(replace(entry, sparsity=sparsity), stored)
    except Exception:  # too broken to be signed
        return files
    return files | {CONFIG_FILE: config}


OPERATIONS = [
    ["open"],
    ["inspect"],
    ["inspect", "--verify", "--tensors"],
    ["inspect", "--json"],
    ["pack"],
    ["pack", "--encoding", "bitmask", "--bit-equal"],
    ["unpack"],
]
SIZES = ["1e400GB", "-1GB", "0", "nan", "9" * 400, "9" * 400 + "GB", "1.5.5MB", "٣GB", "1KB", "300", "[/red]", "\ud800"]


class Templates(dict):
    """Files by name of a template; too much to be printed."""

    def _repr_pretty_(self, printer, cycle):
        printer.text("templates")


@dataclass(repr=False)
class Case:
    """A checkpoint, what other kinds of files are put into it, and what is done with it."""

    template: dict
    files: dict
    kinds: dict
    arguments: list
    out: str

    def __repr__(self):
        changes = [self._change(name) for name in self.files if self.files[name] is not self.template[name]]
        return f"{self.arguments} {self.kinds} {self.out!r} {changes}"

    def _repr_pretty_(self, printer, cycle):
        printer.text(repr(self))

    def _change(self, name):
        before, after = _written(self.template[name]), _written(self.files[name])
        same = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), 0)
        return name, before[max(0, same - 60) : same + 20], after[same : same + 40]


@st.composite
def _case(draw, templates):
    template = files = templates[draw(st.sampled_from(sorted(templates)))]
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        name, content = draw(_mutation(files))
        files = files | {name: content}
        if not isinstance(content, (dict, tuple)) or (isinstance(content, tuple) and not isinstance(content[0], dict)):
            break
    files = _signed(files) if draw(st.booleans()) else files
    if template is templates["coded"] and not draw(st.integers(0, 19)):
        files = _with_claim(template, draw(st.sampled_from(["model.layers.0.a.weight", "model.layers.10.c.weight"])))
    kinds = {}
    if not draw(st.integers(0, 3)):
        kind = draw(st.sampled_from(sorted(KINDS)))
        kinds[draw(st.sampled_from([*sorted(files), "tokenizer.json", "original/merges.txt", "recipe.yaml"]))] = kind
    arguments = list(draw(st.sampled_from(OPERATIONS)))
    out = draw(st.sampled_from(["out", "out", "in/out", "[red]x[/blue]", "\udcff\x1b[31m"]))
    if arguments[0] in ("pack", "unpack") and not draw(st.integers(0, 4)):
        arguments += ["--max-shard-size", draw(st.sampled_from(SIZES))]
    return Case(template, files, kinds, arguments, out)


def _outcome(arguments, directory, out):
    """What became of it: read, or refused in words. Anything else is a failure."""
    if arguments == ["open"]:
        try:
            with open_checkpoint(directory) as checkpoint:
                checkpoint.verify()
        except SparseCheckpointError as error:
            assert str(error).isprintable() and len(str(error)) < 6000, error
            return "refused"
        return "read"
    command, *options = arguments
    target = [out] if command != "inspect" else []
    result = CliRunner().invoke(app, [command, str(directory), *target, *options], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.stdout.replace("\n", "").isprintable()
    if result.exit_code == 1:
        # Bars and warnings come before.
        line = result.stderr.replace("\r", "\n").rstrip("\n").split("\n")[-1]
        assert line.startswith("error: ") and line.isprintable(), result.stderr
    assert result.exit_code in (0, 1, 2)
    return "read" if result.exit_code == 0 else "refused"


@pytest.mark.filterwarnings("ignore:.*is not copied")
@cases(0.97)
@given(data=st.data())
def test_hostile_checkpoints(templates, data):
    case = data.draw(_case(templates))
    files, kinds, arguments, out = case.files, case.kinds, case.arguments, case.out
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place, "in")
        directory.mkdir()
        for name, content in files.items():
            (directory / name).write_bytes(_written(content))
        for name, kind in kinds.items():
            (directory / name).parent.mkdir(exist_ok=True)
            become(directory / name, kind)
        Path(place, out).parent.mkdir(exist_ok=True)
        before = {path: path.lstat().st_mtime_ns for path in Path(place).rglob("*")}
        with limits():
            outcome = _outcome(arguments, directory, str(Path(place, out)))
        OUTCOMES[f"{arguments[0]}: {outcome}"] += 1
        made = {path.relative_to(place).parts for path in Path(place).rglob("*")}
        written = {parts for parts in made if Path(place, *parts) not in before}
        inside = tuple(Path(out).parts)
        assert all(parts[: len(inside)] == inside[: len(parts)] for parts in written), written
        assert outcome == "read" or not written, written
        assert all(
            path.lstat().st_mtime_ns == at
            for path, at in before.items()
            if path not in (directory, Path(place, out).parent)
        )


def test_odd_names_are_printed_as_text(tmp_path):
    """In tables, errors and cards; rich's markup and control characters of terminals are escaped."""
    names = [name for name in ODD_NAMES if name and "\ud800" not in name]
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "model.safetensors")
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"architectures": ["[/red]\x1b[31m# x"]}))
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path), "--tensors"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert "[/red]x" in shown.stdout and r"a\nb\x1b[31m" in shown.stdout and r"\u202e" in shown.stdout
    assert "\x1b" not in shown.stdout and "\0" not in shown.stdout
    save_sparse(tmp_path, tmp_path / "out", progress=False)
    assert "\nA model, 0 matrices" in (tmp_path / "out" / "README.md").read_text()
