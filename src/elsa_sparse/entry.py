"""One tensor of a sparse checkpoint: what ``config.json`` says of it, how it becomes parts, and how it is rebuilt."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from elsa_sparse.bitmask import PARTS, decode_bitmask, encode_bitmask
from elsa_sparse.coded import CodedLayout, decode_coded, encode_coded
from elsa_sparse.errors import SparseCheckpointError
from elsa_sparse.symbols import DTYPES, count_negative_zeros, count_symbols, raw_bytes, with_positive_zeros

__all__ = ["ENCODINGS", "Encoding", "TensorEntry", "check_sizes", "decode", "encode", "sparsity_of"]

Encoding = Literal["dense", "bitmask", "coded"]
ENCODINGS: tuple[Encoding, ...] = ("dense", "bitmask", "coded")

# A tensor may be this many times the size of its parts. Coded tensors that would be more (nearly all zero) are stored
# as bitmasks, which have a limit of their own, so that a small file cannot ask for a large allocation.
MAX_EXPANSION = 256
MAX_BITMASK_EXPANSION = 64
# What another entry in config.json and more parts in a file's header cost, in bytes, about.
_OVERHEAD = 512


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """What the table in ``config.json`` says of a tensor.

    :param name: the parameter's name
    :param encoding: ``dense``, ``bitmask`` or ``coded``
    :param dtype: key of :data:`~elsa_sparse.symbols.DTYPES`
    :param shape: of the dense tensor
    :param sparsity: fraction of zeros of either sign; for packed integers, of their most common value
    :param sha256: of the stored parts and of this entry, see :func:`digest`; None in checkpoints of compressed-tensors
    :param layout: of a coded tensor, else None
    :param prefix: what the parts' names begin with, if not ``name``: compressed-tensors left out ``.weight``
    """

    name: str
    encoding: Encoding
    dtype: str
    shape: tuple[int, ...]
    sparsity: float
    sha256: str | None = None
    layout: CodedLayout | None = None
    prefix: str | None = None

    @property
    def parts(self) -> dict[str, str]:
        """Names in the safetensors file by part: ``compressed``, ``plane0``, ...; ``dense`` for the tensor itself."""
        if self.encoding == "dense":
            return {"dense": self.name}
        suffixes = PARTS if self.layout is None else tuple(self.layout.streams)
        return {suffix: f"{self.prefix or self.name}.{suffix}" for suffix in suffixes}

    @property
    def dense_bytes(self) -> int:
        """Size of the dense tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def to_json(self) -> dict[str, Any]:
        """The entry in the table, without its key, the name."""
        data: dict[str, Any] = {
            "encoding": self.encoding,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "sparsity": self.sparsity,
        }
        if self.layout is not None:
            data |= asdict(self.layout) | {"deflated": list(self.layout.deflated)}
        return data | {"sha256": self.sha256}

    @classmethod
    def from_json(cls, name: str, data: Any) -> "TensorEntry":
        """Inverse of :meth:`to_json`.

        :raises SparseCheckpointError: if a field is missing, unknown, or not what it may be
        """
        if not isinstance(data, dict):
            raise SparseCheckpointError("its entry is not an object", tensor=name)
        read = _FieldReader(name, data)
        encoding = read("encoding", lambda v: isinstance(v, str) and v in ENCODINGS, "one of " + ", ".join(ENCODINGS))
        dtype = read("dtype", lambda v: isinstance(v, str) and v in DTYPES, "one of " + ", ".join(DTYPES))
        shape = read(
            "shape", lambda v: isinstance(v, list) and len(v) <= 16 and all(map(_is_count, v)), "a list of dimensions"
        )
        if math.prod(max(1, count) for count in shape) * DTYPES[dtype].itemsize >= 2**63:
            raise SparseCheckpointError(f"shape is {shape}; no tensor is that large", tensor=name)
        sparsity = read("sparsity", lambda v: type(v) in (int, float) and 0 <= v <= 1, "a number from 0 to 1")
        sha256 = read("sha256", _is_digest, "64 hexadecimal digits")
        layout = None
        if encoding == "coded":
            width = 8 * DTYPES[dtype].itemsize
            bits = read(
                "symbol_bits",
                lambda v: type(v) is int and v in (4, 8, 16, 32, 64) and v <= width,
                f"4, 8, 16, 32 or 64, at most {width}",
            )
            layout = CodedLayout(
                symbol_bits=bits,
                fill=read("fill", lambda v: _is_count(v) and v < 2**bits, f"0 to {2**bits - 1}"),
                kept=read("kept", _is_count, "a count"),
                gap_bytes=read("gap_bytes", lambda v: v is None or _is_count(v), "a count or null"),
                deflated=tuple(read("deflated", _is_list_of_names, "a list of streams, none of them twice")),
            )
            if not set(layout.deflated) <= set(layout.streams):
                raise SparseCheckpointError(
                    f"deflated is {list(layout.deflated)}, streams are {[*layout.streams]}", tensor=name
                )
        if read.unknown:
            raise SparseCheckpointError(
                f"its entry has unknown fields: {', '.join(map(str, read.unknown))}", tensor=name
            )
        return cls(
            name=name,
            encoding=encoding,
            dtype=dtype,
            shape=tuple(shape),
            sparsity=sparsity,
            sha256=sha256,
            layout=layout,
        )


class _FieldReader:
    """Takes fields out of an entry, each of which must be there and allowed."""

    def __init__(self, name: str, data: dict[str, Any]) -> None:
        self._name, self._data, self._read = name, data, set[str]()

    def __call__(self, field: str, is_allowed: Callable[[Any], bool], allowed: str) -> Any:
        self._read.add(field)
        value = self._data.get(field)
        if field not in self._data or not is_allowed(value):
            found = f"is {value!r:.80}" if field in self._data else "is missing"
            raise SparseCheckpointError(f"{field} {found}; allowed is {allowed}", tensor=self._name)
        return value

    @property
    def unknown(self) -> list[str]:
        return [field for field in self._data if field not in self._read]


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value) and len(set(value)) == len(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def digest(entry: TensorEntry, parts: Mapping[str, Tensor]) -> str:
    """SHA-256 of an entry (but for the digest itself), its name, and its stored parts with their dtypes and shapes."""
    stated = entry.to_json()
    del stated["sha256"]
    state = hashlib.sha256(json.dumps([entry.name, stated], sort_keys=True).encode())
    for part in sorted(parts):
        tensor = parts[part]
        state.update(json.dumps([part, str(tensor.dtype), list(tensor.shape)]).encode())
        state.update(raw_bytes(tensor).numpy().data)
    return state.hexdigest()


def sparsity_of(tensor: Tensor, layout: CodedLayout | None = None) -> float:
    """Fraction of zeros of either sign, to 6 digits; for packed integers, of the layout's fill.

    :param layout: of a coded tensor; an element is a symbol, and the fill zero, without one
    """
    bits, fill = (layout.symbol_bits, layout.fill) if layout is not None else (8 * tensor.element_size(), 0)
    count = count_symbols(tensor, bits, fill)
    if fill == 0 and bits == 8 * tensor.element_size():
        count += count_negative_zeros(tensor)
    return _fraction(count, tensor, bits)


def _fraction(count: int, tensor: Tensor, bits: int) -> float:
    symbols = tensor.numel() * tensor.element_size() * 8 // bits
    # Rounded, so that every digit in config.json matters.
    return round(count / symbols, 6) if symbols else 0.0


def _is_sparsity_of(stated: float, tensor: Tensor, layout: CodedLayout | None) -> bool:
    if stated == sparsity_of(tensor, layout):
        return True
    # Zeros with a sign once counted as values.
    bits, fill = (layout.symbol_bits, layout.fill) if layout is not None else (8 * tensor.element_size(), 0)
    return stated == _fraction(count_symbols(tensor, bits, fill), tensor, bits)


def encode(
    name: str, tensor: Tensor, encoding: Encoding, *, bit_equal: bool = False
) -> tuple[TensorEntry, dict[str, Tensor]]:
    """A tensor's entry and parts, in the encoding asked for, or dense where that would not be smaller.

    A weight pruned by a product with its mask is -0.0 where it was negative. Unless ``bit_equal`` is set, an encoded
    tensor has 0.0 there, which is the same value; one that is stored dense is left as it is. Every encoded tensor is
    rebuilt and compared, bit by bit, before it is returned.

    :param name: the parameter's name
    :param tensor: on the CPU, of a dtype in :data:`~elsa_sparse.symbols.DTYPES`
    :param bit_equal: keep the sign of zeros, each as a value
    :raises SparseCheckpointError: if the dtype is not one of them
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise SparseCheckpointError(f"dtype {dtype} cannot be stored; allowed are {', '.join(DTYPES)}", tensor=name)
    tensor = tensor.detach().contiguous()
    layout, parts = None, {"dense": tensor}
    size = tensor.numel() * tensor.element_size()
    if encoding != "dense" and tensor.dim() > 0 and size > _OVERHEAD:
        packed = tensor if bit_equal else with_positive_zeros(tensor)
        encoded: dict[str, Tensor]
        if encoding == "coded":
            layout, encoded = encode_coded(packed)
            if size > MAX_EXPANSION * _stored_bytes(encoded):
                layout, encoded = None, encode_bitmask(packed)
        else:
            encoded = encode_bitmask(packed)
        if _stored_bytes(encoded) + _OVERHEAD < size:
            parts, tensor = encoded, packed
        else:
            layout = None
    is_dense = "dense" in parts
    entry = TensorEntry(
        name=name,
        encoding="dense" if is_dense else "bitmask" if layout is None else "coded",
        dtype=dtype,
        shape=tuple(tensor.shape),
        sparsity=sparsity_of(tensor, layout),
        layout=layout,
    )
    entry = replace(entry, sha256=digest(entry, parts))
    if not is_dense and not _same_bits(decode(entry, parts), tensor):
        raise SparseCheckpointError("the encoded tensor does not decode to itself; please report this", tensor=name)
    return entry, parts


def check_sizes(entry: TensorEntry, stored: int) -> None:
    """Compare what an entry says of its sizes with each other and with what is stored, before anything is allocated.

    :param stored: bytes of all its parts together
    :raises SparseCheckpointError: if they contradict each other, or ask for more than so many bytes may
    """
    dense, layout = entry.dense_bytes, entry.layout
    if entry.encoding == "dense":
        if stored != dense:
            raise SparseCheckpointError(
                f"{entry.dtype} {entry.shape} has {dense:,} bytes, the file has {stored:,}", tensor=entry.name
            )
        return
    allowed = MAX_BITMASK_EXPANSION if layout is None else MAX_EXPANSION
    if dense > allowed * stored:
        raise SparseCheckpointError(
            f"{stored:,} bytes claim to hold a tensor of {dense:,}; allowed is {allowed} times", tensor=entry.name
        )
    if layout is not None:
        symbols = dense * 8 // layout.symbol_bits
        most_gaps = layout.kept + symbols // 255
        if layout.kept > symbols or not layout.kept <= (layout.gap_bytes or layout.kept) <= most_gaps:
            raise SparseCheckpointError(
                f"kept is {layout.kept:,} and gap_bytes {layout.gap_bytes}; allowed, for {symbols:,} symbols, are at "
                f"most that many, and {layout.kept:,} to {most_gaps:,}",
                tensor=entry.name,
            )


def decode(entry: TensorEntry, parts: Mapping[str, Tensor]) -> Tensor:
    """The dense tensor of an entry, verified.

    :param parts: exactly those that the entry names
    :raises SparseCheckpointError: if anything about it is inconsistent
    """
    try:
        return _decode(entry, parts)
    except SparseCheckpointError as error:
        raise SparseCheckpointError(str(error), tensor=entry.name) from error
    except (ValueError, TypeError, RuntimeError, OverflowError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        raise SparseCheckpointError(f"cannot be rebuilt: {reason}", tensor=entry.name) from error


def _decode(entry: TensorEntry, parts: Mapping[str, Tensor]) -> Tensor:
    if entry.sha256 is not None and digest(entry, parts) != entry.sha256:
        raise SparseCheckpointError("checksum does not match: the file, or its entry in config.json, has been altered")
    check_sizes(entry, _stored_bytes(parts))
    if entry.encoding == "dense":
        tensor = parts["dense"]
    elif entry.layout is None:
        tensor = decode_bitmask(dict(parts))
    else:
        tensor = decode_coded(entry.layout, dict(parts), DTYPES[entry.dtype], entry.shape)
    if tuple(tensor.shape) != entry.shape or tensor.dtype != DTYPES[entry.dtype]:
        raise SparseCheckpointError(
            f"the file has {tensor.dtype} {tuple(tensor.shape)}, config.json says {entry.dtype} {entry.shape}"
        )
    if entry.sha256 is not None and not _is_sparsity_of(entry.sparsity, tensor, entry.layout):
        raise SparseCheckpointError(f"config.json says sparsity {entry.sparsity}, the file has another")
    return tensor


def _stored_bytes(parts: Mapping[str, Tensor]) -> int:
    return sum(part.numel() * part.element_size() for part in parts.values())


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(raw_bytes(one), raw_bytes(other))
