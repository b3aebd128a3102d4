"""Pruned weights are zero at the end, whatever modifiers came after the pruning."""

from collections.abc import Mapping

import torch
from compressed_tensors.offload import get_execution_device, update_offload_parameter
from torch import Tensor, nn

from elsa_modifier.admm.bitmask import unpack_bits

__all__ = ["put_zeros_back"]


def put_zeros_back(model: nn.Module, masks: Mapping[str, tuple[Tensor, torch.Size]]) -> tuple[int, int]:
    """Zero what is outside of masks again, and count.

    :param masks: kept entries by module name: packed by :func:`~elsa_modifier.admm.bitmask.pack_bits`, and the
        weight's shape
    :returns: how many entries are outside, and how many of those were not zero
    :raises RuntimeError: if one cannot be set to zero
    """
    modules = dict(model.named_modules())
    pruned = lost = 0
    for name, (bits, shape) in masks.items():
        module = modules[name]
        outside = ~unpack_bits(bits.to(get_execution_device(module)), shape)
        weight = module.weight.detach()
        returned = int((weight[outside] != 0).sum())
        pruned += int(outside.sum())
        lost += returned
        if returned:
            update_offload_parameter(module, "weight", weight.masked_fill(outside, 0.0))
            still = int((module.weight.detach()[outside] != 0).sum())
            if still:
                raise RuntimeError(f"{still} pruned weights of {name} are not zero and cannot be set to zero")
    return pruned, lost
