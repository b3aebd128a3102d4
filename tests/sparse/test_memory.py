"""What reading a tensor takes, in a process of its own: the promise of docs/sparse_checkpoints.md, and no more."""

import json
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from elsa_sparse import coded
from elsa_sparse.checkpoint import CONFIG_FILE, CONFIG_KEY
from elsa_sparse.coded import CodedLayout
from elsa_sparse.entry import TensorEntry, digest
from elsa_sparse.writing import save_sparse

MB = 10**6
# Chunks, and what the allocator keeps.
OVERHEAD = 48 * MB
# Prints the bytes by which reading raises the process's peak, and the error, if any.
SCRIPT = """
import sys, torch
from elsa_sparse import SparseCheckpointError, open_checkpoint
from elsa_sparse.entry import decode, encode
from tests.fuzzing import peak_memory
for encoding in ("coded", "bitmask"):
    decode(*encode("warm", torch.eye(100), encoding))
before = peak_memory(reset=True)
try:
    with open_checkpoint(sys.argv[1]) as checkpoint:
        checkpoint.read("w")
    error = "read"
except SparseCheckpointError as refused:
    error = str(refused)
print(peak_memory() - before)
print(error)
"""


def _growth(directory):
    command = [sys.executable, "-c", SCRIPT, str(directory)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    growth, error = run.stdout.splitlines()
    return int(growth), error


def _packed(tensor, encoding, directory):
    (directory / "dense").mkdir()
    save_file({"w": tensor}, directory / "dense" / "model.safetensors", metadata={"format": "pt"})
    (directory / "dense" / CONFIG_FILE).write_text("{}")
    written = save_sparse(directory / "dense", directory / "sparse", encoding=encoding, progress=False)
    entry = json.loads((directory / "sparse" / CONFIG_FILE).read_text())[CONFIG_KEY]["tensors"]["w"]
    return written, entry


@pytest.mark.parametrize(
    "name,encoding,multiple",
    [
        ("bf16", "coded", 2),
        ("int8", "coded", 2),
        ("nibbles", "coded", 4),
        ("bf16", "bitmask", 2),
        ("int8", "bitmask", 2),
    ],
)
def test_reading_takes_a_multiple_of_the_tensor(name, encoding, multiple, tmp_path, monkeypatch):
    if name == "nibbles":
        # The writer takes them where they are smallest; a reader has to take them anywhere.
        monkeypatch.setattr("elsa_sparse.entry.encode_coded", lambda tensor: coded._encode(tensor, 4, 0))
    generator = torch.Generator().manual_seed(0)
    size = 32 * MB
    raw = torch.randint(1, 16, (size,), dtype=torch.uint8, generator=generator)
    raw[torch.rand(size, generator=generator) < 0.3] = 0
    tensor = {
        "bf16": lambda: raw.view(torch.int16).mul_(257).view(torch.bfloat16),
        "int8": lambda: raw.view(torch.int8),
        "nibbles": lambda: (raw | raw.flip(0) << 4).view(torch.int32),
    }[name]().view(1000, -1)
    written, entry = _packed(tensor, encoding, tmp_path)
    assert entry["encoding"] == encoding and (name != "nibbles" or entry["symbol_bits"] == 4)
    growth, said = _growth(tmp_path / "sparse")
    assert said == "read"
    print(f"{name} {encoding}: {(growth - written.stored_bytes) / size:.2f} times the tensor beside its parts")
    assert size <= growth <= written.stored_bytes + multiple * size + OVERHEAD


def test_3_mb_that_claim_more_than_their_tensor(tmp_path):
    """Eight planes that inflate to 750 MB each, of a tensor that small parts may be."""
    symbols = 90_000_000
    claimed = 700_000_000
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    zeros = bytes(10 * MB)
    bomb = b"".join(coder.compress(zeros) for _ in range(claimed // len(zeros))) + coder.flush()
    names = ("gaps", *(f"plane{i}" for i in range(8)))
    parts = {name: torch.frombuffer(bytearray(bomb), dtype=torch.uint8) for name in names}
    layout = CodedLayout(symbol_bits=64, fill=0, kept=claimed, gap_bytes=claimed, deflated=names)
    entry = TensorEntry(name="w", encoding="coded", dtype="int64", shape=(symbols,), sparsity=0.0, layout=layout)
    stored = sum(part.numel() for part in parts.values())
    assert 3 * MB < stored < 7 * MB
    _packed(torch.eye(100), "coded", tmp_path)
    sparse = tmp_path / "sparse"
    config = json.loads((sparse / CONFIG_FILE).read_text())
    entry = replace(entry, sha256=digest(entry, parts))
    template = config[CONFIG_KEY]["tensors"]["w"]
    fields = {key: template[key] for key in template.keys() - entry.to_json().keys()}
    config[CONFIG_KEY]["tensors"]["w"] = entry.to_json() | fields
    (sparse / CONFIG_FILE).write_text(json.dumps(config))
    (shard,) = sparse.glob("*.safetensors")
    save_file({f"w.{name}": part for name, part in parts.items()}, shard, {"format": "pt"})
    growth, said = _growth(sparse)
    assert "kept is 700,000,000" in said
    assert growth < OVERHEAD
