"""The output head in 8-bit integers, and the embedding with it where the two are tied.

A pruned model's head is dense: of a small model it is most of what is left, and most of what a step reads. The weight
is (vocabulary, hidden) int8, with one scale a row, the largest magnitude in the row over 127.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from elsa_sparse.sparse_linear import SparseLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Int8Embedding", "Int8Head", "hold_head_dense", "hold_head_in_int8", "round_rows"]

# Rows of x up to which torch's product with int8 is the fastest; beyond, blocks of the weight are converted.
_FEW = 8
# Rows of the weight in a block, which stays in cache.
_BLOCK = 512


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight in integers.

    :param weight: (rows, columns), floating point
    :return: (rows, columns) int8, and (rows,) scales of the weight's dtype
    """
    # To the dtype before integers are chosen, so that they make up for the scale's rounding.
    scales = (weight.abs().amax(1).float() / 127).to(weight.dtype)
    scales = torch.where(scales > 0, scales, 1)
    integers = torch.empty_like(weight, dtype=torch.int8)
    for rows, divisor, rounded in zip(weight.split(_BLOCK), scales.split(_BLOCK), integers.split(_BLOCK), strict=True):
        rounded.copy_((rows.float() / divisor[:, None].float()).round_().clamp_(-127, 127))
    return integers, scales


class _Int8Rows(nn.Module):
    """What head and embedding share: (rows, columns) int8, and (rows,) scales, whose dtype is that of the results."""

    integers: Tensor
    scales: Tensor

    def __init__(self, integers: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("integers", integers)
        self.register_buffer("scales", scales)

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew by every access: for looking at it. Changing it changes nothing."""
        return self.integers * self.scales[:, None]

    def extra_repr(self) -> str:
        rows, columns = self.integers.shape
        return f"{rows}, {columns}, int8"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        dense = state_dict.pop(f"{prefix}weight", None)
        if dense is not None:
            names = (f"{prefix}integers", f"{prefix}scales")
            state_dict.update(zip(names, round_rows(dense.detach().cpu()), strict=True))
        super()._load_from_state_dict(state_dict, prefix, *args)


class Int8Embedding(_Int8Rows):
    """``torch.nn.Embedding`` for inference, with rows of 8-bit integers."""

    def forward(self, ids: Tensor) -> Tensor:
        """(...) indices to (..., columns) of the dtype of the scales."""
        return self.integers[ids] * self.scales[ids][..., None]


class Int8Head(_Int8Rows):
    """``torch.nn.Linear`` for inference, with a weight of 8-bit integers.

    :param bias: (rows,), floating point, or None
    """

    def __init__(self, integers: Tensor, scales: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(integers, scales)
        self.out_features, self.in_features = integers.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., columns) to (..., rows), of the dtype of ``x``."""
        scales, flat = self.scales.to(x.dtype), x.reshape(-1, x.shape[-1])
        if x.is_cpu and x.dtype == torch.bfloat16 and flat.shape[0] <= _FEW:
            y = torch._weight_int8pack_mm(flat, self.integers, scales)
        else:
            blocks = [nn.functional.linear(flat, block.to(x.dtype)) for block in self.integers.split(_BLOCK)]
            y = torch.cat(blocks, -1) * scales
        y = y if self.bias is None else y + self.bias.to(x.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])


def hold_head_in_int8(model: "PreTrainedModel") -> None:
    """Put 8-bit integers in place of a model's dense head, and of its embedding if that is the same tensor.

    A head that is compressed already stays as it is.

    :raises ValueError: if there is no head, or head or embedding do more than torch's own classes
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, SparseLinear):
        return
    if type(head) is not nn.Linear:
        raise ValueError(f"int8_head: the model's head is {_kind(head)}; it has to be a torch.nn.Linear")
    tied = head.weight is embedding.weight
    if tied and (type(embedding) is not nn.Embedding or embedding.max_norm is not None):
        raise ValueError(f"int8_head: the head is tied to {_kind(embedding)}; it has to be a torch.nn.Embedding")
    integers, scales = round_rows(head.weight.detach())
    if tied:
        model.set_input_embeddings(Int8Embedding(integers, scales))
        # They are one tensor by now, and no parameter that could be tied again.
        of_head = {name for name, module in model.named_modules() if module is head}
        ties = model.all_tied_weights_keys
        model.all_tied_weights_keys = {
            target: source
            for target, source in ties.items()
            if not {target.rpartition(".")[0], source.rpartition(".")[0]} & of_head
        }
    model.set_output_embeddings(Int8Head(integers, scales, head.bias))


def hold_head_dense(model: "PreTrainedModel", dtype: torch.dtype | None) -> None:
    """The inverse of :func:`hold_head_in_int8`, but for what rounding took.

    :param dtype: of the dense weights; None for that of the scales
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, Int8Head):
        return
    weight = nn.Parameter(head.weight.to(dtype))
    rows, columns = weight.shape
    with torch.device("meta"):
        linear = nn.Linear(columns, rows, bias=head.bias is not None)
    linear.weight = weight
    if head.bias is not None:
        linear.bias = nn.Parameter(head.bias.detach().to(dtype))
    model.set_output_embeddings(linear)
    if isinstance(embedding, Int8Embedding):
        model.set_input_embeddings(nn.Embedding(rows, columns, _weight=weight))
        model.get_input_embeddings().weight = weight
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _kind(module: object) -> str:
    return "missing" if module is None else type(module).__name__
