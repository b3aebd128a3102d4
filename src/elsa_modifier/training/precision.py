"""What a run computes in: bf16 where the processor multiplies it, fp32 where bf16 would only be slower."""

from typing import Literal

import torch

__all__ = ["Precision", "PrecisionField", "multiplies_bf16", "precision_on", "teacher_dtype"]

Precision = Literal["bf16", "fp32"]
PrecisionField = Literal["auto", "bf16", "fp32"]


def multiplies_bf16(device: torch.device) -> bool:
    """Whether matrices in bf16 are multiplied as fast as those in fp32.

    A CPU without AVX-512 goes through a loop that takes some twenty times as long; a GPU before compute capability
    8.0 emulates.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return True


def precision_on(device: torch.device, field: PrecisionField, *, weights: torch.dtype = torch.float32) -> Precision:
    """What a recipe's ``precision`` means on a device; a model in bf16 computes in bf16 anywhere."""
    if field != "auto":
        return field
    return "bf16" if weights == torch.bfloat16 or multiplies_bf16(device) else "fp32"


def teacher_dtype(device: torch.device) -> torch.dtype:
    """What a teacher's matrices are held in: bf16, half the memory, where it costs no time."""
    return torch.bfloat16 if multiplies_bf16(device) else torch.float32
