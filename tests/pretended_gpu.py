"""A GPU for tests where there is none: the CPU is taken for one."""

import contextlib
import warnings
from collections.abc import Iterator
from unittest import mock

import torch
from elsa_kernels import gpu_layout
from elsa_kernels.gpu_linear import gpu_linear

__all__ = ["cpu_as_gpu", "gpu_products"]


@contextlib.contextmanager
def cpu_as_gpu() -> Iterator[None]:
    """Weights on the CPU are packed as on a GPU."""
    with mock.patch.object(gpu_layout, "GPU_DEVICES", frozenset({"cpu"})):
        yield


@contextlib.contextmanager
def gpu_products() -> Iterator[mock.Mock]:
    """They are multiplied with so, too, by what counts its calls. Needs ``TRITON_INTERPRET=1`` from the start."""
    product = mock.Mock(side_effect=gpu_linear)
    library = torch.library.Library("elsa_kernels", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl("linear", lambda x, packed, rows: product(x, packed, rows), "CPU", allow_override=True)
    try:
        with cpu_as_gpu():
            yield product
    finally:
        library._destroy()
