"""The experts of a mixture, whose weights stay compressed in memory.

transformers holds a layer's experts in two parameters of three dimensions, and its eager code multiplies with one
matrix of them at a time: ``torch.nn.functional.linear(x, experts.gate_up_proj[i])``. What takes such a parameter's
place here gives out matrices that do this compressed, so that routing, gates and biases stay the model's own code.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from elsa_sparse.compression_rule import DEFAULT_MIN_SPARSITY, kernels
from elsa_sparse.sparse_linear import kept_dtype, moved_weights, target_device

__all__ = ["PackedExperts", "holds_experts", "pack_experts"]


class PackedExperts(nn.Module):
    """A parameter of (experts, rows, columns), compressed for inference, a buffer an expert.

    Moved to a GPU or back they are packed anew, as a :class:`~elsa_sparse.sparse_linear.SparseLinear` is.

    :param packed: what ``elsa_kernels.pack`` returned for each expert, 1-D uint8
    :raises ValueError: if one of them is no packed weight
    """

    def __init__(self, packed: list[Tensor]) -> None:
        super().__init__()
        info = kernels().describe(packed[0])
        self.shape = torch.Size((len(packed), info.rows, info.columns))
        self.values: str = info.values
        for i, matrix in enumerate(packed):
            self.register_buffer(str(i), matrix)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> "_PackedMatrix":
        """One expert's matrix, for ``torch.nn.functional.linear`` and nothing else."""
        return _PackedMatrix(self.get_buffer(str(int(index))), self.shape[1])

    def unpack(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense parameter, newly made.

        :param dtype: None for that of the kept values; fp32 for integers
        """
        return torch.stack([kernels().unpack(packed, dtype) for packed in self.buffers()])

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, values={self.values}, nbytes={sum(packed.numel() for packed in self.buffers())}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedExperts":
        packed = moved_weights([*self.buffers()], fn, "PackedExperts")
        if packed[0] is not self.get_buffer("0"):
            self.values = kernels().describe(packed[0]).values
            for i, matrix in enumerate(packed):
                setattr(self, str(i), matrix)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        error_msgs: list[str] = args[-1]
        for i, packed in enumerate([*self.buffers()]):
            key = f"{prefix}{i}"
            if key not in state_dict:
                continue
            try:
                kernels().check(state_dict[key])
                info = kernels().describe(state_dict[key])
                if (info.rows, info.columns) != tuple(self.shape[1:]):
                    raise ValueError(f"it is {(info.rows, info.columns)}, this expert's is {tuple(self.shape[1:])}")
                device = target_device(packed, state_dict[key], local_metadata)
                state_dict[key] = kernels().to_device(state_dict[key], device)
                setattr(self, str(i), torch.empty_like(state_dict[key]))
            except (ValueError, TypeError) as error:
                error_msgs.append(f"{key} cannot be loaded: {error}")
                state_dict[key] = packed
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class _PackedMatrix:
    """What ``torch.nn.functional.linear`` takes for a weight."""

    def __init__(self, packed: Tensor, rows: int) -> None:
        self._packed, self._rows = packed, rows

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.linear:
            raise NotImplementedError(
                f"{getattr(func, '__name__', func)} is not defined for compressed experts, torch.nn.functional.linear "
                "is; name the module in modules_to_not_convert, and it stays dense"
            )
        return _linear(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: _PackedMatrix, bias: Tensor | None = None) -> Tensor:
    y: Tensor = torch.ops.elsa_kernels.linear(input, weight._packed, weight._rows)
    return y if bias is None else y + bias


def holds_experts(module: nn.Module, name: str) -> bool:
    """Whether a module's parameter is one of experts, and the model's eager code takes them as described above.

    transformers marks such modules when it prepares them for other implementations.
    """
    parameter = module._parameters.get(name)
    return parameter is not None and parameter.dim() == 3 and getattr(module, "is_transposed", None) is False


def pack_experts(
    weight: Tensor,
    *,
    values: str | None = None,
    group_size: int | None = None,
    min_sparsity: float = DEFAULT_MIN_SPARSITY,
) -> list[Tensor] | None:
    """Experts as ``elsa_kernels`` packs them, if that pays for all of them together.

    :param weight: (experts, rows, columns)
    :return: 1-D uint8 of each, or None if they should stay dense. Other arguments are those of
        :func:`~elsa_sparse.sparse_linear.pack_weight`
    """
    dtype = kept_dtype(weight, values)
    if dtype is None or not weight.numel() or int(weight.count_nonzero()) > (1 - min_sparsity) * weight.numel():
        return None
    packed = [kernels().pack(matrix.to(dtype), values=values, group_size=group_size) for matrix in weight]
    return packed if sum(matrix.numel() for matrix in packed) < weight.numel() * dtype.itemsize else None
