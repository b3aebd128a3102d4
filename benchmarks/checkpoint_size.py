"""Size and speed of sparse checkpoints beside gzip and zstd, on SmolLM2-135M pruned by ELSA to 50, 70, 90 and 95%.

Everything runs in one process and one thread, one method after the other on the same files. Writes
``docs/results/checkpoint_size.md``. The first run prunes the models, which takes a quarter of an hour.
"""

import argparse
import gzip
import json
import math
import re
import shutil
import tempfile
import threading
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import zstandard
from safetensors.torch import load_file, save_file

from benchmarks.measuring import publish, timed
from benchmarks.pruned import pruned_directory
from elsa_sparse import open_checkpoint, save_sparse
from elsa_sparse.coded import encode_coded
from elsa_sparse.entry import Encoding

SPARSITIES = (0.5, 0.7, 0.9, 0.95)


def _linears(source: Path, target: Path) -> Path:
    """A checkpoint of a model's Linears alone."""
    target.mkdir()
    tensors = {name: t for name, t in load_file(source / "model.safetensors").items() if "_proj." in name}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source / "config.json", target)
    return target


def _stored(directory: Path) -> int:
    """Bytes of shards, and of the table in config.json."""
    files = [*directory.glob("*.safetensors"), directory / "config.json"]
    return sum(file.stat().st_size for file in files)


def _sparse(source: Path, out: Path, encoding: Encoding) -> tuple[int, float, float]:
    """Bytes, seconds to write (each tensor checked), seconds to read (each tensor verified)."""
    write = timed(lambda: save_sparse(source, out, encoding=encoding, progress=False))

    def read() -> None:
        with open_checkpoint(out) as checkpoint:
            checkpoint.verify()

    return _stored(out), write, timed(read)


def _general(
    source: Path, out: Path, compress: Callable[[bytes], bytes], decompress: Callable[[bytes], bytes]
) -> tuple[int, float, float]:
    """The same of a compressor of files."""
    file = source / "model.safetensors"
    write = timed(lambda: out.write_bytes(compress(file.read_bytes())))
    read = timed(lambda: decompress(out.read_bytes()))
    return out.stat().st_size, write, read


def _sizes(sparsity: float, root: Path) -> tuple[list[str], list[str]]:
    """Rows of the table of sizes and of the table of speeds."""
    source = _linears(pruned_directory(sparsity), root / f"dense{sparsity}")
    dense = (source / "model.safetensors").stat().st_size
    zstd = zstandard.ZstdCompressor(level=19)
    results = {
        "bitmask": _sparse(source, root / f"bitmask{sparsity}", "bitmask"),
        "coded": _sparse(source, root / f"coded{sparsity}", "coded"),
        "gzip": _general(source, root / "gz", lambda data: gzip.compress(data, 6), gzip.decompress),
        "zstd": _general(source, root / "zst", zstd.compress, zstandard.ZstdDecompressor().decompress),
    }
    print(sparsity, results, flush=True)
    cells = [f"{size / 1e6:.1f} ({dense / size:.2f}x)" for size, _, _ in results.values()]
    speeds = [f"{dense / write / 1e6:,.0f} / {dense / read / 1e6:,.0f}" for _, write, read in results.values()]
    head = f"| {sparsity:.0%} "
    return [f"{head}| {dense / 1e6:.1f} | " + " | ".join(cells) + " |"], [f"{head}| " + " | ".join(speeds) + " |"]


def _entropy(stream: np.ndarray) -> float:
    frequencies = np.bincount(stream, minlength=256) / max(1, stream.size)
    frequencies = frequencies[frequencies > 0]
    return float(-(frequencies * np.log2(frequencies)).sum()) * stream.size / 8


def _deflate_size(strategy: int, stream: np.ndarray) -> float:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
    return len(coder.compress(stream.tobytes()) + coder.flush())


def _zstd_size(compressor: zstandard.ZstdCompressor, stream: np.ndarray) -> float:
    return len(compressor.compress(stream.tobytes()))


def _coders(sparsity: float) -> list[str]:
    """Bits a weight that each coder needs for each stream: what the choice of coder rests on."""
    deflate = {"Huffman only": zlib.Z_HUFFMAN_ONLY, "with matches (-9)": zlib.Z_DEFAULT_STRATEGY}
    coders: dict[str, Callable[[np.ndarray], float]] = {"order-0 entropy": _entropy}
    for title, strategy in deflate.items():
        coders[f"deflate, {title}"] = partial(_deflate_size, strategy)
    for level in (1, 3, 19):
        compressor = zstandard.ZstdCompressor(level=level)
        coders[f"zstd -{level}"] = partial(_zstd_size, compressor)
    totals: dict[str, dict[str, float]] = {}
    weights = 0
    for name, tensor in load_file(pruned_directory(sparsity) / "model.safetensors").items():
        if "_proj." not in name:
            continue
        weights += tensor.numel()
        layout, parts = encode_coded(tensor)
        streams = {"mask bits, 8 a byte": np.packbits((tensor != 0).numpy(), axis=1, bitorder="little").reshape(-1)}
        for title, part in {"gaps": "gaps", "exponents": "plane1", "signs and mantissas": "plane0"}.items():
            stored = parts[part].numpy()
            raw = zlib.decompress(stored.tobytes(), -15) if part in layout.deflated else stored.tobytes()
            streams[title] = np.frombuffer(raw, np.uint8)
        for title, stream in streams.items():
            for coder, size in coders.items():
                row = totals.setdefault(title, {})
                row[coder] = row.get(coder, 0.0) + min(
                    size(stream), stream.size if "entropy" not in coder else math.inf
                )
    lines = ["| stream | " + " | ".join(coders) + " |", "|---" * (len(coders) + 1) + "|"]
    for title, row in totals.items():
        lines.append(f"| {title} | " + " | ".join(f"{8 * size / weights:.3f}" for size in row.values()) + " |")
    return lines


def _resident() -> float:
    """Megabytes of memory that is this process's own, not a mapped file's."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) / 1000 if found else math.nan


def _peak_memory(source: Path, out: Path) -> float:
    """Megabytes that packing needs at its highest, beyond what was there before."""
    before, peak, done = _resident(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        save_sparse(source, out, max_shard_size="20MB", overwrite=True, progress=False)
    finally:
        done.set()
        watcher.join()
    return peak - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=float, nargs="+", default=SPARSITIES)
    sparsities = parser.parse_args().sparsity
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        whole = pruned_directory(0.9)
        memory = _peak_memory(whole, root / "whole")
        sizes: list[str] = []
        speeds: list[str] = []
        for sparsity in sparsities:
            size, speed = _sizes(sparsity, root)
            sizes += size
            speeds += speed
        tensors = load_file(whole / "model.safetensors")
        largest = max(t.numel() * t.element_size() for t in tensors.values()) / 1e6
        dense, stored = (whole / "model.safetensors").stat().st_size, _stored(root / "whole")
        entries = json.loads((root / "whole" / "config.json").read_text())["elsa_sparse"]["tensors"]
    publish(
        "checkpoint_size",
        [
            "# Size and speed of sparse checkpoints",
            "",
            "`python -m benchmarks.checkpoint_size`: SmolLM2-135M pruned by ELSA; one process, one thread, one run.",
            "",
            "Megabytes of its 210 Linears (times smaller than dense bf16). Ours count shards and `config.json`;",
            "`gzip -6` and `zstd -19` are of the dense safetensors file.",
            "",
            "| sparsity | dense bf16 | bitmask | coded | gzip -6 | zstd -19 |",
            "|---|---|---|---|---|---|",
            *sizes,
            "",
            "Dense megabytes written / read a second. Ours include rebuilding every tensor to compare it when writing,",
            "and its SHA-256 when reading.",
            "",
            "| sparsity | bitmask | coded | gzip -6 | zstd -19 |",
            "|---|---|---|---|---|",
            *speeds,
            "",
            f"The whole model at 90%, {len(entries)} tensors, embeddings included: {dense / 1e6:.1f} MB dense,",
            f"{stored / 1e6:.1f} MB coded ({dense / stored:.2f}x). Packing it in shards of 20 MB took at most",
            f"{memory:.0f} MB of memory, {memory / largest:.1f} times its largest tensor ({largest:.1f} MB).",
            "",
            "## Why deflate without matches",
            "",
            "Bits a weight at 90%, by stream and coder (where coding makes a stream larger, it is stored as it is):",
            "",
            *_coders(0.9),
        ],
    )


if __name__ == "__main__":
    main()
