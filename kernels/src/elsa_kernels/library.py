"""The compiled library, if there is one: found, loaded and called through its plain C interface."""

import ctypes
import functools
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["ENVIRONMENT_VARIABLE", "Compiled", "backend", "compiled"]

# "torch", "portable", "avx2", "avx512" or "amx": the best instruction set that may be used.
ENVIRONMENT_VARIABLE = "ELSA_KERNELS_ISA"
LEVELS = ("portable", "avx2", "avx512", "avx512+amx")
ALLOWED = {"torch": -1, "portable": 0, "avx2": 1, "avx512": 2, "amx": 3, "avx512+amx": 3}
TYPE_CODES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


def backend() -> str:
    """What computes on this machine: "avx512+amx", "avx512", "avx2", "portable", or "torch" without the library."""
    library = compiled()
    return "torch" if library is None else library.level


@functools.cache
def compiled() -> "Compiled | None":
    """The library, None if it was not built or may not be used; says once what is missed.

    :raises ValueError: if the environment variable names no instruction set
    """
    allowed = os.environ.get(ENVIRONMENT_VARIABLE, "amx")
    if allowed not in ALLOWED:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} is {allowed!r}; it must be one of {', '.join(ALLOWED)}")
    if allowed == "torch":
        return None
    built = Path(__file__).parent / "libelsa_kernels.so"
    try:
        return Compiled(ctypes.CDLL(str(built)), ALLOWED[allowed])
    except OSError as error:
        reason = "it was installed without a C++ compiler" if not built.exists() else str(error)
        message = f"elsa_kernels computes through torch, which saves no time and needs more memory: {reason}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
        return None


class Compiled:
    """The functions of the library, with tensors for pointers. Tensors must be contiguous and on the CPU."""

    def __init__(self, library: ctypes.CDLL, level: int) -> None:
        pointer, integer, code, text = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_char_p
        signatures = {
            "set_level": (code, [code]),
            "use_openmp": (None, [pointer, pointer]),
            "check": (text, [pointer, integer]),
            "linear": (text, [pointer, integer, pointer, code, integer, integer, integer, pointer]),
            "unpack": (text, [pointer, integer, pointer, code]),
            "pack_count": (text, [pointer, integer, integer, integer, integer, integer, pointer, pointer]),
            "pack_store": (text, [pointer, pointer, pointer, pointer, integer]),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(library, f"elsa_{name}")
            function.restype, function.argtypes = result, arguments
        self._library = library
        self.linear = library.elsa_linear
        """Called with addresses, since it is called often: None, b"dense", or what is wrong."""
        self.level: str = LEVELS[library.elsa_set_level(level)]
        library.elsa_use_openmp(*_openmp())

    def check(self, packed: Tensor) -> None:
        """:raises ValueError: if packed is corrupt"""
        raise_if_wrong(self._library.elsa_check(packed.data_ptr(), packed.numel()))

    def unpack(self, packed: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """The dense weight of a packed tensor that was checked."""
        dense = torch.empty(rows, columns, dtype=dtype)
        arguments = packed.data_ptr(), packed.numel(), dense.data_ptr(), TYPE_CODES[dtype]
        raise_if_wrong(self._library.elsa_unpack(*arguments))
        return dense

    def pack_count(self, stored: Tensor, values: int, layout: int, group_size: int, order: Tensor) -> Tensor:
        """Steps, kept weights and bytes of values, (slices, 3) int64."""
        counts = torch.zeros(order.numel() // 16, 3, dtype=torch.int64)
        sizes = (values, *stored.shape, layout, group_size)
        raise_if_wrong(self._library.elsa_pack_count(stored.data_ptr(), *sizes, order.data_ptr(), counts.data_ptr()))
        return counts

    def pack_store(self, stored: Tensor, order: Tensor, counts: Tensor, packed: Tensor) -> None:
        """Fill the parts of a packed tensor; counts of the slices before each."""
        addresses = stored.data_ptr(), order.data_ptr(), counts.contiguous().data_ptr(), packed.data_ptr()
        raise_if_wrong(self._library.elsa_pack_store(*addresses, packed.numel()))


def raise_if_wrong(problem: bytes | None) -> None:
    """:raises ValueError: with what the library found wrong, if anything"""
    if problem is not None:
        raise ValueError(f"packed is corrupt or not of this shape: {problem.decode()}; pack the weight again")


def _openmp() -> tuple[int | None, int | None]:
    """Addresses of what the threads are started with, from the runtime that torch has loaded; None without one."""
    for path in [None, *_loaded("libgomp")]:
        try:
            runtime = ctypes.CDLL(path)
            functions = runtime.GOMP_parallel, runtime.omp_get_max_threads
        except (OSError, AttributeError):
            continue
        parallel, max_threads = (ctypes.cast(function, ctypes.c_void_p).value for function in functions)
        return parallel, max_threads
    return None, None


def _loaded(name: str) -> list[str]:
    """Paths of the shared libraries of this name in the process; none where the system does not tell."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    return sorted({line.split(maxsplit=5)[5] for line in lines if name in line and line.count("/")})
