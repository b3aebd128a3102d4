"""A sum over the rows of a tensor, such as tokens, whose graph never holds more than a chunk of them.

Autograd would keep what each row's term needs until the backward pass: for a loss over a vocabulary, several tensors of
its size for each token. Here the gradients are found chunk by chunk on the way forward and the graph of a chunk is
dropped, so nothing is computed twice, as it would be under checkpointing. What stays until the backward pass is the
gradient of the rows and those of the parameters, in fp32 until they are whole: added up in bf16, each chunk would be
rounded.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["sum_in_chunks"]


def sum_in_chunks(loss_of: Callable[..., Tensor], rows: Tensor, *aligned: Tensor, size: int) -> Tensor:
    """``loss_of(rows, *aligned)``, which must be a sum over rows: zero-dimensional fp32.

    Gradients reach ``rows`` and every parameter that ``loss_of`` uses; second derivatives do not exist.

    :param loss_of: function of some of the rows, and of the same rows of each of ``aligned``, to a sum over them
    :param rows: (rows, width), at least one
    :param aligned: tensors with as many rows, as targets or a teacher's hidden states; they get no gradient
    :param size: rows of a chunk
    """
    if not torch.is_grad_enabled():
        parts = zip(*(tensor.split(size) for tensor in (rows, *aligned)), strict=True)
        return torch.stack([loss_of(*part).float() for part in parts]).sum()
    parameters = _leaves(loss_of(*(tensor[:1].detach() for tensor in (rows, *aligned))))
    total: Tensor = _ChunkedSum.apply(loss_of, size, aligned, rows, *parameters)  # type: ignore[no-untyped-call]
    return total


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        loss_of: Callable[..., Tensor],
        size: int,
        aligned: tuple[Tensor, ...],
        rows: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        total = torch.zeros((), device=rows.device)
        of_rows = torch.empty_like(rows)
        of_parameters = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        parts = zip(*(tensor.split(size) for tensor in (of_rows, rows, *aligned)), strict=True)
        for of_part, part, *others in parts:
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                loss = loss_of(part, *others)
            of_part_found, *found = torch.autograd.grad(loss, (part, *parameters))
            of_part.copy_(of_part_found)
            for gradient, more in zip(of_parameters, found, strict=True):
                gradient.add_(more)
            total += loss.detach()
        ctx.gradients = [of_rows, *of_parameters]
        ctx.dtypes = [tensor.dtype for tensor in (rows, *parameters)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        # Taken out and scaled in place: a head's gradient is too large for a copy.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("sum_in_chunks has been differentiated before; its gradients are no longer held")
        return None, None, None, *(gradients.pop(0).mul_(scale).to(dtype) for dtype in ctx.dtypes)


def _leaves(loss: Tensor) -> list[Tensor]:
    """The tensors that gradients of ``loss`` end in."""
    found: dict[int, Tensor] = {}
    seen = set()
    nodes = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        nodes += [following for following, _ in node.next_functions]
    return list(found.values())
