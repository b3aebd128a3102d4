"""Quantizing one pruned row: GPTQ with an explicit inverse at every step, and coordinate descent that counts costs."""

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


def coordinate_descent_row(weight, quantized, hessian, kept, quantize):
    """One pass over the columns. ``quantize`` of (value, column)."""
    quantized = quantized.clone()

    def cost(candidate):
        return float((weight - candidate) @ hessian @ (weight - candidate))

    for column in kept:
        error = weight - quantized
        target = float(quantized[column] + (hessian @ error)[column] / hessian[column, column])
        candidate = quantized.clone()
        candidate[column] = quantize(target, column)
        if cost(candidate) < cost(quantized):
            quantized = candidate
    return quantized
