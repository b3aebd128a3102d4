"""Rules that MaskedGPTQModifier's is compared with: functions of llm-compressor's ``quantize_weight`` to their own.

``re-masked``    stock GPTQ, and pruned weights that came back set to zero again
``multiplied``   the rule of llm-compressor up to 0.12: what an error adds to other weights is multiplied by the mask
"""

from typing import Any

import torch
from torch import Tensor

from elsa_modifier.quantization.llmcompressor_gptq import QuantizeWeight, entry_grid
from elsa_modifier.quantization.masked_gptq import damped

_BLOCK = 128


def re_masked(original: QuantizeWeight) -> QuantizeWeight:
    def quantize_weight(weights: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        mask = weights != 0
        quantized, losses, fell_back = original(weights, *args, **kwargs)
        return quantized * mask, losses, fell_back

    return quantize_weight


def multiplied(original: QuantizeWeight) -> QuantizeWeight:
    """One weight at a time, column after column, with the factor of the whole Hessian."""

    def quantize_weight(
        weights: Tensor,
        hessians: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        global_scale: Tensor | None,
        quant_args: Any,
        blocksize: int = _BLOCK,
        percdamp: float = 0.01,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight, hessian = weights[0].float(), damped(hessians[0], percdamp)
        rows, columns = weight.shape
        order = hessian.diagonal().argsort(descending=True)
        grid = entry_grid(quant_args, scale[0], zero_point[0], None, (rows, columns))[:, order].transposed()
        hessian = hessian[order][:, order]
        factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
        # Transposed, so that a column is contiguous.
        remaining = weight[:, order].T.contiguous()
        kept, result = (remaining != 0).float(), torch.zeros_like(remaining)
        errors = torch.zeros_like(remaining)
        for start in range(0, columns, blocksize):
            end = min(start + blocksize, columns)
            for j in range(start, end):
                result[j] = grid[j].round(remaining[j]) * kept[j]
                errors[j] = (remaining[j] - result[j]) / factor[j, j]
                remaining[j:end] -= factor[j, j:end, None] * errors[j] * kept[j:end]
            remaining[end:] -= (factor[start:end, end:].T @ errors[start:end]) * kept[end:]
        quantized = result[order.argsort()].T.unsqueeze(0).to(weights.dtype)
        return quantized, torch.zeros(1), torch.zeros(1, dtype=torch.bool)

    return quantize_weight
