"""GPTQ of one pruned row, column by column, with an explicit inverse at every step."""

import torch


def masked_gptq_row(weight, hessian, kept, quantize, order):
    """``weight`` (columns,), float64; ``kept`` and ``order`` lists of columns; ``quantize`` of (value, column)."""
    weight, result = weight.clone(), torch.zeros_like(weight)
    remaining = [column for column in order if column in kept]
    while remaining:
        inverse = torch.linalg.inv(hessian[remaining][:, remaining])
        column = remaining[0]
        result[column] = quantize(float(weight[column]), column)
        error = (weight[column] - result[column]) / inverse[0, 0]
        for i, other in enumerate(remaining):
            weight[other] -= error * inverse[0, i]
        remaining = remaining[1:]
    return result
