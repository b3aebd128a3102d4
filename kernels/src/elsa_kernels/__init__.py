"""Sparse weights that stay compressed in memory, times dense activations. Depends on torch alone."""

from elsa_kernels.conversion import has_kernels, to_device
from elsa_kernels.gpu_layout import takes_gpu_layout
from elsa_kernels.library import backend
from elsa_kernels.operators import linear
from elsa_kernels.packing import pack, pack_integers, packed_nbytes
from elsa_kernels.reading import PackedInfo, check, describe, unpack, unpack_integers

__all__ = [
    "PackedInfo",
    "backend",
    "check",
    "describe",
    "has_kernels",
    "linear",
    "pack",
    "pack_integers",
    "packed_nbytes",
    "takes_gpu_layout",
    "to_device",
    "unpack",
    "unpack_integers",
]
