"""What a checkpoint holds: sparsity and bytes of every tensor, layer, and in all. Dense checkpoints are counted too.

Bytes on disk, dense, and in memory of a model whose sparse weights stay compressed: by arithmetic, nothing is packed.
"""

import math
import re
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from elsa_sparse.checkpoint import CONFIG_FILE, Shards, read_json
from elsa_sparse.compression_rule import kernels, packed_size
from elsa_sparse.entry import TensorEntry, sparsity_of
from elsa_sparse.opening import is_sparse, open_checkpoint
from elsa_sparse.quantized import bits_of
from elsa_sparse.symbols import DTYPES
from elsa_sparse.writing import dense_files

__all__ = ["Row", "by_layer", "inspect", "memory_bytes", "summarize"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A tensor, or several.

    :param sparsity: fraction of zeros, of either sign, among the entries of its matrices; 0 without one
    :param weights: entries of its matrices: tensors of two and more dimensions
    :param encodings: how the tensors are stored
    :param memory_bytes: that they take with ``load_sparse(..., compressed=True)`` on this machine; None where that
        is not known: elsa-kernels is not installed, or a weight is quantized in another way
        than W4A16 or W8A16
    """

    name: str
    encodings: tuple[str, ...]
    weights: int
    sparsity: float
    dense_bytes: int
    stored_bytes: int
    memory_bytes: int | None

    @property
    def ratio(self) -> float | None:
        """Dense bytes for each that is stored; None if none is."""
        return self.dense_bytes / self.stored_bytes if self.stored_bytes else None


def inspect(directory: Path, *, verify: bool = False, progress: bool = True) -> list[Row]:
    """One row a tensor, in the order of the files. A sparse checkpoint's weights are read only to be verified.

    :raises SparseCheckpointError: if the directory is not a checkpoint, or not what it should be
    """
    config = read_json(directory / CONFIG_FILE)
    tied, bits = bool(config.get("tie_word_embeddings", False)), bits_of(config.get("quantization_config"))
    if is_sparse(config):
        with open_checkpoint(directory) as checkpoint:
            if verify:
                for _ in tqdm(checkpoint, total=len(checkpoint.entries), desc="verify", disable=not progress):
                    pass
            entries = checkpoint.entries
            return [
                _row(entry, checkpoint.stored_bytes(name), memory_bytes(entry, tied=tied, bits=bits, scales=entries))
                for name, entry in entries.items()
            ]
    rows = []
    with closing(Shards(directory, dense_files(directory))) as shards:
        for name in tqdm(shards.file_of, desc="read", unit="tensor", disable=not progress):
            tensor = shards.read(name)
            entry = TensorEntry(
                name=name,
                encoding="dense",
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                sparsity=sparsity_of(tensor),
            )
            rows.append(_row(entry, entry.dense_bytes, memory_bytes(entry, tied=tied)))
    return rows


def memory_bytes(
    entry: TensorEntry, *, tied: bool = False, bits: int | None = None, scales: Mapping[str, TensorEntry] | None = None
) -> int | None:
    """Bytes that a tensor takes in memory, compressed if it would be; None if that is not known.

    Which tensors are weights of linear layers is told by their names and shapes. The scales of a quantized weight are
    counted with it.

    :param tied: whether the model's head is its embedding
    :param bits: of quantized weights, see :func:`~elsa_sparse.quantized.bits_of`
    :param scales: entries of the checkpoint, by name, among them those of quantized weights' scales
    """
    scales = scales or {}
    prefix, _, kind = entry.name.rpartition(".")
    is_matrix = len(entry.shape) == 2
    try:
        if is_matrix and kind == "weight_packed":
            return _integers_bytes(entry, bits, scales.get(f"{prefix}.weight_scale"))
        if kind in ("weight_scale", "weight_shape") and f"{prefix}.weight_packed" in scales:
            return 0
        if not is_matrix or kind != "weight" or (tied and prefix.endswith("lm_head")):
            return entry.dense_bytes
        rows, columns = entry.shape
        kept = round((1 - entry.sparsity) * rows * columns)
        return packed_size(rows, columns, kept, DTYPES[entry.dtype]) or entry.dense_bytes
    except ImportError:
        return None


def _integers_bytes(entry: TensorEntry, bits: int | None, scales: TensorEntry | None) -> int | None:
    """Of integers that lie in int32, several in each."""
    if bits is None or entry.encoding == "bitmask" or scales is None or len(scales.shape) != 2:
        return None
    rows, words = entry.shape
    columns, groups = words * 32 // bits, scales.shape[1]
    if not rows or not 0 < groups <= columns:
        return None
    # A symbol may be several integers, which are all zero where it is the fill: as often as if they were independent.
    zeros = 0.0 if entry.layout is None else entry.sparsity ** (bits / entry.layout.symbol_bits)
    kept = round((1 - zeros) * rows * columns)
    packed: int = kernels().packed_nbytes(rows, columns, kept, f"int{bits}", -(-columns // groups))
    return packed


def _row(entry: TensorEntry, stored_bytes: int, in_memory: int | None) -> Row:
    is_matrix = len(entry.shape) > 1
    return Row(
        name=entry.name,
        encodings=(entry.encoding,),
        weights=math.prod(entry.shape) if is_matrix else 0,
        sparsity=entry.sparsity if is_matrix else 0.0,
        dense_bytes=entry.dense_bytes,
        stored_bytes=stored_bytes,
        memory_bytes=in_memory,
    )


def summarize(name: str, rows: Iterable[Row]) -> Row:
    """Several rows as one."""
    rows = list(rows)
    weights = sum(row.weights for row in rows)
    in_memory = [row.memory_bytes for row in rows if row.memory_bytes is not None]
    return Row(
        name=name,
        encodings=tuple(sorted({encoding for row in rows for encoding in row.encodings})),
        weights=weights,
        sparsity=sum(row.sparsity * row.weights for row in rows) / max(1, weights),
        dense_bytes=sum(row.dense_bytes for row in rows),
        stored_bytes=sum(row.stored_bytes for row in rows),
        memory_bytes=sum(in_memory) if len(in_memory) == len(rows) else None,
    )


def by_layer(rows: Iterable[Row]) -> list[Row]:
    """One row a layer: tensors whose names agree up to their first number, or up to their last dot without one."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        match = re.match(r".*?\.\d+(?=\.)", row.name)
        groups.setdefault(match[0] if match else row.name.rpartition(".")[0] or row.name, []).append(row)
    return [summarize(name, groups[name]) for name in sorted(groups, key=_natural_order)]


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Numbers by their size: every second piece is one, however many digits it has."""
    pieces = re.split(r"(\d+)", name, flags=re.ASCII)
    return [(len(piece.lstrip("0")) if i % 2 else 0, piece) for i, piece in enumerate(pieces)]
