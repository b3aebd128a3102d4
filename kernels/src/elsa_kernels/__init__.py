"""Sparse weights that stay compressed in memory, times dense activations. Depends on torch alone."""

from elsa_kernels.library import backend
from elsa_kernels.operators import linear
from elsa_kernels.packing import pack, pack_integers, packed_nbytes
from elsa_kernels.reading import PackedInfo, check, describe, unpack

__all__ = [
    "PackedInfo",
    "backend",
    "check",
    "describe",
    "linear",
    "pack",
    "pack_integers",
    "packed_nbytes",
    "unpack",
]
