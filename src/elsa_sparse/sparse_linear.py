"""A linear layer whose weight stays compressed in memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from elsa_sparse.compression_rule import DEFAULT_MIN_SPARSITY, FLOATS, kernels, packed_size

__all__ = ["SparseLinear", "kept_dtype", "moved_weights", "pack_weight", "target_device"]


class SparseLinear(nn.Module):
    """``torch.nn.Linear`` for inference, with its weight in one compressed buffer.

    On a CPU and on a GPU the buffer has the layout that kernels there take; moving the layer packs it anew, with equal
    values.

    The state dict has ``packed``, and ``bias`` if there is one. Loading one takes ``packed`` of any length that is a
    packed weight of the same shape, of either layout, and a dense ``weight``, which is packed. ``to(dtype)`` converts
    the bias; the weight keeps its values, and products are in the dtype of the input.

    :param packed: what ``elsa_kernels.pack`` returned, 1-D uint8
    :param bias: (rows,), floating point, or None
    :param quantized: whether its integers are those of a quantized checkpoint
    :raises ImportError: if ``elsa_kernels`` is not installed
    :raises ValueError: if ``packed`` is no packed weight
    """

    packed: Tensor

    def __init__(self, packed: Tensor, bias: Tensor | None = None, *, quantized: bool = False) -> None:
        super().__init__()
        self.quantized = quantized
        info = kernels().describe(packed)
        self.out_features: int = info.rows
        self.in_features: int = info.columns
        self.values: str = info.values
        self.register_buffer("packed", packed)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias``.

        :param x: (..., columns), bf16, fp16 or fp32
        :return: (..., rows), of the dtype of ``x``
        :raises RuntimeError: if a gradient of ``x`` is wanted
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "a SparseLinear has no gradients: it is for inference; call the model under torch.no_grad(), or load "
                "it without compressed to train it"
            )
        y: Tensor = torch.ops.elsa_kernels.linear(x, self.packed, self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def unpack(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, (rows, columns), newly made.

        :param dtype: None for that of the kept values; fp32 for integers
        """
        weight: Tensor = kernels().unpack(self.packed, dtype)
        return weight

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew by every access: for looking at it. Changing it changes nothing."""
        return self.unpack()

    def extra_repr(self) -> str:
        info = kernels().describe(self.packed)
        sparsity = 1 - info.kept / (info.rows * info.columns)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"values={self.values}, sparsity={sparsity:.3f}, nbytes={info.nbytes}"
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}packed"
        try:
            if key not in state_dict and f"{prefix}weight" in state_dict:
                state_dict[key] = kernels().pack(state_dict.pop(f"{prefix}weight").detach())
            if key in state_dict:
                kernels().check(state_dict[key])
                device = target_device(self.packed, state_dict[key], local_metadata)
                state_dict[key] = kernels().to_device(state_dict[key], device)
                info = kernels().describe(state_dict[key])
                shape = (info.rows, info.columns)
                if shape != (self.out_features, self.in_features):
                    raise ValueError(f"it is {shape}, this layer's is {(self.out_features, self.in_features)}")
                self.packed = torch.empty_like(state_dict[key])
                self.values = info.values
        except (ValueError, TypeError) as error:
            error_msgs.append(f"{key} cannot be loaded: {error}")
            state_dict[key] = self.packed
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseLinear":
        [packed] = moved_weights([self.packed], fn, "SparseLinear")
        if packed is not self.packed:
            self.packed, self.values = packed, kernels().describe(packed).values
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def moved_weights(packed: list[Tensor], fn: Callable[[Tensor], Tensor], name: str) -> list[Tensor]:
    """Packed weights where :meth:`torch.nn.Module.to` will take them, in the layout that kernels there take.

    :param packed: all of a module's, on one device
    :param fn: what is applied to every tensor of the module
    :param name: of the module's class, for the message
    :raises NotImplementedError: if it moves them to where there are no kernels for them
    """
    device = fn(packed[0].new_empty(0)).device
    if packed[0].is_meta or device.type == "meta":
        return packed
    if not kernels().has_kernels(device):
        raise NotImplementedError(
            f"a {name} cannot be moved to {device}: there are kernels for CPUs and for CUDA and ROCm; load the model "
            "without compressed"
        )
    try:
        return [kernels().to_device(weight, device) for weight in packed]
    except TypeError as error:
        raise NotImplementedError(
            f"a {name} of fp32 weights cannot be moved to {device}, where there are kernels for bf16, fp16 and "
            "integers; load the model with dtype=torch.bfloat16, or without compressed"
        ) from error


def target_device(current: Tensor, loaded: Tensor, metadata: dict[str, Any]) -> torch.device:
    """Where a buffer is to be after ``load_state_dict``: where it is, or with ``assign`` where what is loaded is.

    :param metadata: the ``local_metadata`` that ``torch.nn.Module`` passes on
    """
    return loaded.device if current.is_meta or metadata.get("assign_to_params_buffers") else current.device


def pack_weight(
    weight: Tensor,
    *,
    values: str | None = None,
    group_size: int | None = None,
    min_sparsity: float = DEFAULT_MIN_SPARSITY,
) -> Tensor | None:
    """A weight as ``elsa_kernels`` packs it for the device it is on, if that pays.

    On a CPU :func:`~elsa_sparse.compression_rule.packed_size` says so. On a GPU the size follows from where the zeros
    are: the weight is packed, and stays dense if that is no smaller. So does one of fp32, unless it is rounded.

    :param weight: (rows, columns)
    :param values: ``"int8"`` or ``"int4"`` rounds kept weights to integers with a scale a group; None keeps them equal
    :param group_size: columns that share a scale, of integers; None for what ``elsa_kernels.pack`` takes by itself
    :return: 1-D uint8, or None if the weight should stay dense
    """
    dtype = kept_dtype(weight, values)
    if dtype is None:
        return None
    rows, columns = weight.shape
    kept = int(torch.count_nonzero(weight))
    packed: Tensor
    if kernels().takes_gpu_layout(weight.device):
        if kept > (1 - min_sparsity) * weight.numel():
            return None
        packed = kernels().pack(weight.to(dtype), values=values, group_size=group_size)
        return packed if packed.numel() < weight.numel() * dtype.itemsize else None
    size = packed_size(rows, columns, kept, dtype, values=values, group_size=group_size, min_sparsity=min_sparsity)
    if size is None:
        return None
    packed = kernels().pack(weight.to(dtype), values=values, group_size=group_size)
    return packed


def kept_dtype(weight: Tensor, values: str | None) -> torch.dtype | None:
    """The dtype to keep a weight's values in where it is, or None if there is none for it.

    A bf16 checkpoint that is read as fp32 is kept in bf16, which holds all of it. What needs fp32 is kept on a CPU.

    :param values: what they are rounded to; None keeps them equal
    """
    if weight.dtype == torch.float32 and torch.equal(weight.bfloat16().float(), weight):
        return torch.bfloat16
    if values is None and weight.dtype == torch.float32 and kernels().takes_gpu_layout(weight.device):
        return None
    return weight.dtype if weight.dtype in FLOATS else None
