"""The header of a safetensors file, read before the file is: what the library accepts and this package does not.

The library checks that parts fill the file without gaps or overlaps and that shapes agree with sizes. It takes the last
of two parts of one name, which another reader may take for the first.
"""

import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch

from elsa_sparse.errors import SparseCheckpointError
from elsa_sparse.files import open_regular, parse_json
from elsa_sparse.symbols import SAFETENSORS_DTYPES

__all__ = ["PartHeader", "read_header"]

# What the library reads at most.
_MAX_HEADER_BYTES = 10**8


class PartHeader(NamedTuple):
    """A part's dtype and shape."""

    dtype: torch.dtype
    shape: torch.Size

    @property
    def bytes(self) -> int:
        """Size of the part."""
        return self.shape.numel() * self.dtype.itemsize


def read_header(file: Path) -> dict[str, PartHeader]:
    """What a regular file's header says of its parts, by name.

    :raises SparseCheckpointError: if it is not one, names a part twice, or has a dtype that torch has not
    """
    with open_regular(file) as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        rest = stream.seek(0, 2) - 8
        if not 0 < length <= min(rest, _MAX_HEADER_BYTES):
            raise SparseCheckpointError(
                f"is truncated or not a safetensors file: its header would have {length:,} of {rest:,} bytes", file=file
            )
        stream.seek(8)
        header = parse_json(stream.read(length), file)
    header.pop("__metadata__", None)
    return {name: _part(name, data, file) for name, data in header.items()}


def _part(name: str, data: Any, file: Path) -> PartHeader:
    if not isinstance(data, dict) or data.keys() != {"dtype", "shape", "data_offsets"}:
        raise SparseCheckpointError("its header has to hold dtype, shape and data_offsets", file=file, tensor=name)
    dtype, shape, offsets = data["dtype"], data["shape"], data["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SAFETENSORS_DTYPES:
        allowed = ", ".join(SAFETENSORS_DTYPES)
        raise SparseCheckpointError(f"is {dtype!r:.80}; allowed are {allowed}", file=file, tensor=name)
    for field, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or not all(type(v) is int and 0 <= v < 2**63 for v in value):
            raise SparseCheckpointError(f"{field} is {value!r:.80}, not a list of counts", file=file, tensor=name)
    return PartHeader(SAFETENSORS_DTYPES[dtype], torch.Size(shape))
