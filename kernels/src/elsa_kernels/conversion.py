"""A packed weight on another device: in the layout that kernels there take, with every value as it is."""

import torch
from torch import Tensor

from elsa_kernels.gpu_layout import GPU_DEVICES, is_for_gpu, takes_gpu_layout
from elsa_kernels.packing import INTEGER_RANGES, pack, pack_integers
from elsa_kernels.reading import describe, unpack, unpack_integers

__all__ = ["has_kernels", "to_device"]


def has_kernels(device: torch.device) -> bool:
    """Whether something multiplies with packed weights on such a device."""
    return device.type == "cpu" or device.type in GPU_DEVICES


def to_device(packed: Tensor, device: torch.device) -> Tensor:
    """A packed weight moved to a device, and packed anew if kernels there take another layout than its own.

    Values are equal after it, integers and scales too. Back on a CPU they are in the fewest bits that hold them.

    :param packed: of either layout, wherever it lies
    :param device: a CPU or a GPU
    :raises TypeError: if values are fp32 and the device is a GPU
    :raises ValueError: if packed is corrupt
    """
    for_gpu = takes_gpu_layout(device)
    if is_for_gpu(packed) == for_gpu:
        return packed.to(device)
    info = describe(packed)
    if not info.group_size:
        return pack(unpack(packed).to(device))
    integers, scales = (part.to(device) for part in unpack_integers(packed))
    # The layout of GPUs does not say how many bits there were.
    low, high = INTEGER_RANGES[4]
    few = not for_gpu and int(integers.min()) >= low and int(integers.max()) <= high
    return pack_integers(integers, _in_fewest_bits(scales), bits=4 if few else 8, group_size=info.group_size)


def _in_fewest_bits(scales: Tensor) -> Tensor:
    for dtype in (torch.float16, torch.bfloat16):
        narrow = scales.to(dtype)
        if torch.equal(narrow.float(), scales.float()):
            return narrow
    return scales
