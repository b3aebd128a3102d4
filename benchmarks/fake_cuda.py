"""CUDA without a GPU: tensors that have a device and no values, and kernels that are written and not run.

torch's fake tensors need a guard that switches devices, which a build for CPUs lacks: one that does nothing is compiled
by the C++ compiler. Inductor asks a device for its properties before it writes kernels for it: it is told those of an
H100.
"""

import contextlib
import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _triton

from elsa_modifier.admm import bitmask

__all__ = ["Kernels", "can_fake_cuda", "fake_cuda", "written_kernels"]

_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
extern "C" void install() {
  static c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
  c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)].store(&guard);
}
"""
_H100 = types.SimpleNamespace(
    name="NVIDIA H100",
    multi_processor_count=132,
    major=9,
    minor=0,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 * 10**9,
)


def can_fake_cuda() -> bool:
    """Whether there is what it takes: a torch with CUDA, or a C++ compiler."""
    return torch.backends.cuda.is_built() or _compiler() is not None


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Within the context ``device="cuda"`` makes tensors without values; whatever needs a value raises."""
    _install_guard()
    _forget_tables()
    try:
        with FakeTensorMode() as mode:
            yield mode
    finally:
        _forget_tables()


def _forget_tables() -> None:
    # Those with values are of no use among tensors without, nor the other way round.
    bitmask._selection_table.cache_clear()
    bitmask._bit_table.cache_clear()


class Kernels(NamedTuple):
    """What inductor makes of an update.

    :param code: in Python and Triton
    :param launches: names of the kernels, in order
    :param nbytes: that they read and write, each of what they are given once
    """

    code: str
    launches: list[str]
    nbytes: int


def written_kernels(update: Callable[..., Any], arguments: tuple[Any, ...], mode: FakeTensorMode) -> Kernels:
    """The kernels that inductor makes of an update, for an H100.

    :param arguments: fake tensors, in any nesting
    """
    from torch._inductor.compile_fx import _recursive_post_grad_passes
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._pytree import tree_flatten, tree_unflatten

    flat, form = tree_flatten(arguments)
    tensors = [leaf for leaf in flat if isinstance(leaf, torch.Tensor)]

    def of_tensors(*given: torch.Tensor) -> Any:
        fresh = iter(given)
        leaves = [next(fresh) if isinstance(leaf, torch.Tensor) else leaf for leaf in flat]
        return update(*tree_unflatten(leaves, form))

    with _an_h100():
        functional = torch.func.functionalize(of_tensors, remove="mutations_and_views")
        graph = make_fx(functional, decomposition_table=select_decomp_table(), tracing_mode="real")(*tensors)
        with V.set_fake_mode(mode):
            _recursive_post_grad_passes(graph, is_inference=True)
        lowering = GraphLowering(graph, example_inputs=tensors, is_inference=True)
        with V.set_graph_handler(lowering), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
            lowering.run(*tensors)
            code, _ = lowering.codegen()
            nbytes, _, _ = lowering.count_bytes()
    text = str(code.value if hasattr(code, "value") else code)
    launches = re.findall(r"^ +(?:\w+ = )?(triton_\w+\.run|extern_kernels\.\w+|torch\.ops\.[\w.]+)\(", text, re.M)
    return Kernels(text, launches, int(nbytes))


@contextlib.contextmanager
def _an_h100() -> Iterator[None]:
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from triton.backends.compiler import GPUTarget

    driver = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0, get_active_torch_device=None
    )
    triton.runtime.driver.set_active(driver)
    with contextlib.ExitStack() as stack:
        for owner, name, value in [
            (CudaInterface, "get_device_properties", staticmethod(lambda device=None: _H100)),
            (CudaInterface, "get_compute_capability", staticmethod(lambda device=None: 90)),
            (CudaInterface, "current_device", staticmethod(lambda: 0)),
            (CudaInterface, "is_available", staticmethod(lambda: True)),
            (CudaInterface.Worker, "get_device_properties", staticmethod(lambda device=None: _H100)),
            (torch.cuda, "get_device_properties", lambda device=None: _H100),
            (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
            (torch.cuda, "current_device", lambda: 0),
        ]:
            stack.enter_context(mock.patch.object(owner, name, value))
        # What was found out before is remembered.
        _triton.has_triton.cache_clear()
        stack.callback(_triton.has_triton.cache_clear)
        yield


@functools.cache
def _install_guard() -> None:
    if torch.backends.cuda.is_built():
        torch._C._ensureCUDADeviceGuardSet()
        return
    compiler, root = _compiler(), Path(torch.__file__).parent
    if compiler is None:
        raise RuntimeError("this torch was built without CUDA, and there is no C++ compiler to make up for it")
    with tempfile.TemporaryDirectory() as directory:
        source, library = Path(directory) / "guard.cpp", Path(directory) / "guard.so"
        source.write_text(_GUARD)
        options = ["-O0", "-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10"]
        subprocess.run([compiler, str(source), *options, "-o", str(library)], check=True)
        ctypes.CDLL(str(library)).install()


def _compiler() -> str | None:
    return shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
