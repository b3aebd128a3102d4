"""What this package touches inside llm-compressor's GPTQ, all in this file.

* ``llmcompressor.modifiers.gptq.base.quantize_weight``: the function that GPTQModifier calls on a batch of weights is
  replaced by one of the same signature.
* ``llmcompressor.modifiers.gptq.helpers.column_scale_window``: scales and zero points of every entry of a weight.
* ``llmcompressor.modifiers.gptq.base`` normalizes Hessians to sums of ``2 x x^T`` over a number of samples.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from llmcompressor.modifiers.gptq import base, helpers
from torch import Tensor

from elsa_modifier.quantization.grid import Grid

__all__ = ["TESTED_VERSION", "QuantizeWeight", "check_internals", "entry_grid", "quantizing_weights_with"]

TESTED_VERSION = "0.14"

QuantizeWeight = Callable[..., tuple[Tensor, Tensor, Tensor]]

_PARAMETERS = {
    "quantize_weight": [
        *("weights", "hessians", "scale", "zero_point", "global_scale", "quant_args", "blocksize", "percdamp"),
    ],
    "column_scale_window": [
        *("scale", "zero_point", "global_scale", "g_idx", "quant_args", "num_rows", "i1", "i2"),
    ],
}


def check_internals() -> None:
    """Compare llm-compressor's GPTQ with what this file was written for.

    :raises RuntimeError: if a function has moved or takes other parameters
    """
    functions = {"quantize_weight": (base, _original), "column_scale_window": (helpers, helpers.column_scale_window)}
    for name, (module, function) in functions.items():
        parameters = list(inspect.signature(function).parameters)
        if not hasattr(module, name) or parameters != _PARAMETERS[name]:
            raise RuntimeError(
                f"llm-compressor {version('llmcompressor')} changed {module.__name__}.{name}: it takes {parameters}, "
                f"not {_PARAMETERS[name]} as in {TESTED_VERSION}. Use llmcompressor>={TESTED_VERSION},<0.15, or put "
                "quantization that knows no masks (QuantizationModifier) after pruning"
            )


_original: QuantizeWeight = base.quantize_weight


@contextmanager
def quantizing_weights_with(make: Callable[[QuantizeWeight], QuantizeWeight]) -> Iterator[None]:
    """Have GPTQModifier quantize with ``make(its own function)`` for the length of a block.

    :raises RuntimeError: see :func:`check_internals`
    """
    check_internals()
    before = base.quantize_weight
    base.quantize_weight = make(_original)
    try:
        yield
    finally:
        base.quantize_weight = before


def entry_grid(
    args: QuantizationArgs, scale: Tensor, zero_point: Tensor, global_scale: Tensor | None, shape: tuple[int, int]
) -> Grid:
    """The grid of a weight of ``shape``, from the scale, zero point and global scale that its observer gives it."""
    rows, columns = shape
    width = {
        QuantizationStrategy.GROUP: args.group_size,
        QuantizationStrategy.TENSOR_GROUP: args.group_size,
        QuantizationStrategy.BLOCK: args.block_structure[1] if args.block_structure else None,
    }.get(args.strategy)
    groups = None if width is None else torch.arange(columns, device=scale.device, dtype=torch.int) // width
    scales, zero_points = helpers.column_scale_window(
        scale.unsqueeze(0),
        zero_point.unsqueeze(0),
        None if global_scale is None else global_scale.unsqueeze(0),
        groups,
        args,
        num_rows=rows,
        i1=0,
        i2=columns,
    )
    scales = scales[0].expand(rows, columns)
    zero_points = None if zero_points is None else zero_points[0].expand(rows, columns)
    return Grid.of(args, scales, zero_points)
