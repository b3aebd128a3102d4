"""The coded layout: gaps between kept entries and byte planes of their values, each Huffman coded where that pays.

A tensor is a row of symbols (an element each; for int32 that packs smaller integers, those). All symbols but the most
common one, the *fill* (zero, but for packed integers with an offset), are kept. Two things describe them:

* **gaps**: for each kept symbol one byte, the number of fills before it; 255 stands for 255 fills and no kept symbol.
  In a mask without structure gaps are geometrically distributed, and Huffman's code for those is near their entropy at
  every sparsity. The bits of the mask, eight to a byte, would waste more the sparser it is: no byte takes less than a
  bit.
* **planes**: byte ``i`` of every kept symbol. Floats are first rotated left by one bit, which makes the highest plane
  the exponent alone (compressible: most weights share a few) and puts the sign beside the mantissa (not compressible).

Deflate without matches (``Z_HUFFMAN_ONLY``) is the coder: it adapts every 32 Ki symbols, is in Python's standard
library, and on these streams is smaller than zstd at any level (``benchmarks.checkpoint_size``).
"""

import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elsa_sparse.errors import SparseCheckpointError
from elsa_sparse.symbols import Symbols, from_symbols, symbol_dtype, to_symbols

__all__ = ["CodedLayout", "decode_coded", "encode_coded"]

Bytes = NDArray[np.uint8]

_ESCAPE = 255
# Symbols (coding) or gaps (decoding) handled at once: bounds the memory of 8-byte positions, and fits the cache.
_CHUNK = 1 << 20
# Bytes of a deflate stream given to the decoder at once.
_SLICE = 1 << 16
# Fewer fills than this and a gap for each other symbol costs more than the fills do.
_WORTH_A_MASK = 0.05
# Bits of entropy a byte above which coding gains less than it costs in time.
_INCOMPRESSIBLE = 7.9


@dataclass(frozen=True, kw_only=True)
class CodedLayout:
    """What it takes to read the streams of a coded tensor.

    :param symbol_bits: 4, 8, 16, 32 or 64
    :param fill: the symbol that is not stored
    :param kept: number of symbols that are
    :param gap_bytes: length of ``gaps`` when decoded; None if there is none, every symbol being kept
    :param deflated: names of the streams that are Huffman coded, in order
    """

    symbol_bits: int
    fill: int
    kept: int
    gap_bytes: int | None
    deflated: tuple[str, ...]

    @property
    def streams(self) -> dict[str, int]:
        """Decoded length in bytes of every stream, by name."""
        gaps = {} if self.gap_bytes is None else {"gaps": self.gap_bytes}
        return gaps | {f"plane{i}": self.kept for i in range(max(1, self.symbol_bits // 8))}


def _rotates(dtype: torch.dtype, bits: int) -> bool:
    return dtype.is_floating_point and bits >= 16


def _rotated_left(symbols: Symbols, bits: int) -> Symbols:
    rotated = np.empty_like(symbols)
    for start in range(0, symbols.size, _CHUNK):
        chunk = symbols[start : start + _CHUNK]
        rotated[start : start + _CHUNK] = (chunk << 1) | (chunk >> (bits - 1))
    return rotated


def _rotate_right_(symbols: Symbols, bits: int) -> None:
    for start in range(0, symbols.size, _CHUNK):
        chunk = symbols[start : start + _CHUNK]
        chunk[:] = (chunk >> 1) | (chunk << (bits - 1))


def _gaps_and_kept(symbols: Symbols, fill: int) -> tuple[Bytes, Symbols]:
    gaps, kept = [], []
    fills = 0  # since the last kept symbol
    for start in range(0, symbols.size, _CHUNK):
        chunk = symbols[start : start + _CHUNK]
        positions = np.flatnonzero(chunk != fill)
        kept.append(chunk[positions])
        if positions.size == 0:
            fills += chunk.size
            continue
        distances = np.diff(positions, prepend=-1) - 1
        distances[0] += fills
        fills = chunk.size - 1 - int(positions[-1])
        escapes = distances // _ESCAPE
        if escapes.any():
            coded = np.full(distances.size + int(escapes.sum()), _ESCAPE, np.uint8)
            coded[np.cumsum(escapes + 1) - 1] = distances % _ESCAPE
        else:
            coded = distances.astype(np.uint8)
        gaps.append(coded)
    return np.concatenate([*gaps, np.empty(0, np.uint8)]), np.concatenate([*kept, symbols[:0]])


def _planes(symbols: Symbols) -> list[Bytes]:
    by_byte = symbols.view(np.uint8).reshape(symbols.size, symbols.itemsize)
    return [np.ascontiguousarray(by_byte[:, i]) for i in range(symbols.itemsize)]


def _byte_counts(stream: Bytes) -> NDArray[np.int64]:
    # In chunks, because bincount makes 8-byte integers of them.
    chunks = (stream[start : start + _CHUNK] for start in range(0, stream.size, _CHUNK))
    return sum((np.bincount(chunk, minlength=256) for chunk in chunks), np.zeros(256, np.int64))


def _deflate(stream: Bytes) -> bytes | None:
    """The stream, Huffman coded, or None if that does not make it smaller."""
    counts = _byte_counts(stream)
    frequencies = counts[counts > 0] / max(1, stream.size)
    if float(-(frequencies * np.log2(frequencies)).sum()) > _INCOMPRESSIBLE:
        return None
    coder = zlib.compressobj(zlib.Z_BEST_COMPRESSION, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    coded = coder.compress(stream.data) + coder.flush()
    return coded if len(coded) < stream.size else None


def _encode(tensor: Tensor, bits: int, fill: int | None) -> tuple[CodedLayout, dict[str, Tensor]]:
    symbols = to_symbols(tensor, bits)
    if fill is None:
        fill = int(_byte_counts(symbols).argmax())
    streams: dict[str, Bytes] = {}
    if np.count_nonzero(symbols == fill) >= _WORTH_A_MASK * symbols.size:
        streams["gaps"], kept = _gaps_and_kept(symbols, fill)
    else:
        kept = symbols
    if _rotates(tensor.dtype, bits):
        kept = _rotated_left(kept, bits)
    streams |= {f"plane{i}": plane for i, plane in enumerate(_planes(kept))}
    count, gap_bytes = int(kept.size), streams["gaps"].size if "gaps" in streams else None
    del kept
    deflated = []
    parts = {}
    for name in list(streams):
        stream = streams.pop(name)
        coded = _deflate(stream)
        if coded is not None:
            deflated.append(name)
        # A copy: bytes are read-only, which torch warns about.
        parts[name] = torch.from_numpy(stream if coded is None else np.frombuffer(coded, np.uint8).copy())
    layout = CodedLayout(symbol_bits=bits, fill=fill, kept=count, gap_bytes=gap_bytes, deflated=tuple(deflated))
    return layout, parts


def encode_coded(tensor: Tensor) -> tuple[CodedLayout, dict[str, Tensor]]:
    """The streams of a tensor, uint8 each, by name.

    int32 is what packed integers come in, so it is also tried as bytes and nibbles, and the smallest taken.

    :param tensor: any shape, any dtype of :data:`~elsa_sparse.symbols.DTYPES`, on the CPU
    """
    width = 8 * tensor.element_size()
    attempts = [_encode(tensor, width, 0)]
    if tensor.dtype == torch.int32 and tensor.numel() > 0:
        attempts += [_encode(tensor, bits, None) for bits in (4, 8)]
    return min(attempts, key=lambda attempt: sum(part.numel() for part in attempt[1].values()))


def _inflated(stream: memoryview, length: int, name: str) -> Iterator[Bytes]:
    """The bytes of a deflate stream, in pieces; never more than ``length`` and one."""
    coder = zlib.decompressobj(-zlib.MAX_WBITS)
    left = length
    # What a call leaves over of its input is copied, so each gets little. The last ones ask for what is still inside.
    for start in [*range(0, len(stream), _SLICE), len(stream)]:
        given: memoryview | bytes = stream[start : start + _SLICE]
        while not coder.eof:
            try:
                # One byte more than allowed tells a stream that is too long from one that ends in time.
                piece = coder.decompress(given, min(_CHUNK, left + 1))
            except zlib.error as error:
                raise SparseCheckpointError(f"{name} is not a deflate stream: {error}") from error
            left -= len(piece)
            if left < 0:
                raise SparseCheckpointError(f"{name} does not decode to the {length:,} bytes it should, but more")
            if piece:
                yield np.frombuffer(piece, np.uint8)
            given = coder.unconsumed_tail
            if not given and not piece:
                break
        if coder.eof and (coder.unused_data or start + _SLICE < len(stream)):
            raise SparseCheckpointError(f"{name} does not decode to the {length:,} bytes it should: it goes on after")
    if left or not coder.eof:
        raise SparseCheckpointError(
            f"{name} does not decode to the {length:,} bytes it should, but to {length - left:,}"
        )


def _positions(gaps: Iterable[Bytes], kept: int, size: int) -> Iterator[NDArray[np.int64]]:
    """Positions of the kept symbols, chunk by chunk."""
    found, last = 0, -1
    for chunk in gaps:
        ends_in_symbol = chunk != _ESCAPE
        steps = chunk.astype(np.int64)
        steps += ends_in_symbol
        positions = np.cumsum(steps, out=steps)
        positions += last
        last = int(positions[-1])
        if not ends_in_symbol.all():
            positions = positions[ends_in_symbol]
        found += positions.size
        if found > kept or last >= size:
            raise SparseCheckpointError(f"gaps lead beyond the {size:,} symbols of the tensor, {kept:,} of them kept")
        yield positions
    if found != kept:
        raise SparseCheckpointError(f"gaps hold {found:,} positions, not {kept:,}")


def _read_stream(layout: CodedLayout, parts: dict[str, Tensor], name: str, length: int) -> Iterator[Bytes]:
    """A stream's bytes, in pieces of at most ``_CHUNK``."""
    part = parts[name]
    if part.dtype != torch.uint8 or part.dim() != 1:
        raise SparseCheckpointError(f"{name} is {part.dtype} {tuple(part.shape)}, not bytes")
    if name in layout.deflated:
        return _inflated(part.numpy().data, length, name)
    if part.numel() != length:
        raise SparseCheckpointError(f"{name} has {part.numel():,} bytes, not {length:,}")
    stream: Bytes = part.numpy()
    return (stream[start : start + _CHUNK] for start in range(0, length, _CHUNK))


def decode_coded(layout: CodedLayout, parts: dict[str, Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The dense tensor. Allocates twice its size, or four times where symbols have 4 bits, and some chunks.

    Sizes in the layout have to be checked against the shape, and that against the parts' size, before.

    :raises SparseCheckpointError: if the streams contradict the layout or each other
    """
    bits = layout.symbol_bits
    size = math.prod(shape) * dtype.itemsize * 8 // bits
    by_byte = np.empty((layout.kept, max(1, bits // 8)), np.uint8)
    streams = layout.streams
    gap_bytes = streams.pop("gaps", None)
    for i, (name, length) in enumerate(streams.items()):
        read = 0
        for piece in _read_stream(layout, parts, name, length):
            by_byte[read : read + piece.size, i] = piece
            read += piece.size
    if bits == 4 and layout.kept and int(by_byte.max()) > 15:
        raise SparseCheckpointError("plane0 holds symbols of more than 4 bits")
    kept: Symbols = by_byte.reshape(-1).view(symbol_dtype(bits))
    if _rotates(dtype, bits):
        _rotate_right_(kept, bits)
    if gap_bytes is None:
        if layout.kept != size:
            raise SparseCheckpointError(f"{layout.kept:,} symbols are stored of {size:,}, and no gaps")
        return from_symbols(kept, bits, dtype, shape)

    symbols = np.full(size, layout.fill, symbol_dtype(bits)) if layout.fill else np.zeros(size, symbol_dtype(bits))
    read = 0
    for positions in _positions(_read_stream(layout, parts, "gaps", gap_bytes), layout.kept, size):
        symbols[positions] = kept[read : read + positions.size]
        read += positions.size
    del by_byte, kept
    return from_symbols(symbols, bits, dtype, shape)
