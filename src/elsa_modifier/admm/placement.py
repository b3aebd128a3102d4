"""Where an update runs: eager and in chunks in main memory, compiled and in one piece on an accelerator.

An update is written once, as a function of tensors. On a CPU the chunks of a weight stay in its caches, and compiling
would take seconds for each shape. On an accelerator every operation would be a kernel, and read and write memory anew;
``torch.compile`` makes one kernel, or a few, of a whole update.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

__all__ = ["compiled", "is_fused", "read"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_EAGER = {"cpu"}
# Shapes of one model's weights times the formats of one run.
_MOST_SHAPES = 256


def is_fused(device: torch.device) -> bool:
    """Whether updates on this device are compiled."""
    return device.type not in _EAGER


def compiled(update: Callable[_P, _R]) -> Callable[_P, _R]:
    """The same function, compiled for every shape where its first tensor is on an accelerator.

    Floats among the positional arguments may change from call to call; keyword arguments are compiled in.
    """

    @functools.wraps(update)
    def run(*arguments: _P.args, **static: _P.kwargs) -> _R:
        first = arguments[0]
        assert isinstance(first, Tensor)
        if not is_fused(first.device):
            return update(*arguments, **static)
        # A number that is no tensor would be compiled in, and every new one be compiled for.
        changing = tree_map_only(float, _scalar, arguments)
        fused: _R = _fused(update)(*changing, **static)
        return fused

    return run


def read(tensors: Sequence[Tensor]) -> list[list[Any]]:
    """Wait for these one-dimensional tensors of one device, and bring them into main memory by one copy.

    Whatever else asks a tensor of an accelerator for its value makes the host wait once more.

    :param tensors: of whole numbers below 2^53, or floats
    """
    together = torch.cat([tensor.double() for tensor in tensors]).cpu()
    return [part.tolist() for part in together.split([len(tensor) for tensor in tensors])]


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


@functools.cache
def _fused(update: Callable[..., Any]) -> Callable[..., Any]:
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _MOST_SHAPES)
    return torch.compile(update, fullgraph=True, dynamic=False)
