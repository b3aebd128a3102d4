"""Experts as the model's class holds them: llm-compressor makes one Linear of each, and not every class finds those.

How entries of the class's tensors went into Linears is read off llm-compressor's own way in: rows and columns are
numbered and sent through it. So nothing here knows an architecture.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from torch import Tensor, nn

__all__ = ["FusedLayout", "fuse", "fusing_experts", "is_quantized", "layout_of"]

# Numbers of tensors lie above those of rows and columns.
_STRIDE = 1 << 24
_FLAGS = ("is_concatenated", "is_transposed", "has_bias", "has_gate")


@dataclass(frozen=True)
class _Piece:
    """Where one parameter of every expert, transposed or not, lies in a fused tensor's part for that expert."""

    parameter: str
    fused: str
    where: tuple[slice, ...]
    transposed: bool


@dataclass(frozen=True)
class FusedLayout:
    """How the parameters of linear experts make up the class's tensors, which have these shapes, experts first."""

    shapes: Mapping[str, torch.Size]
    pieces: tuple[_Piece, ...]


def layout_of(experts: LinearExperts2D, fused: nn.Module) -> FusedLayout:
    """The layout of linear experts in the module that their model's class has in their place.

    :param fused: may be without data; its own parameters, experts first
    :raises ValueError: if the entries of one do not correspond to those of the other, in even steps
    """
    shapes = {name: p.shape for name, p in fused.named_parameters()}
    expert = experts[0]
    numbers = [_numbered(experts, expert, shapes, axis) for axis in (0, 1)]
    pieces = []
    for parameter, rows in numbers[0].items():
        columns = numbers[1][parameter]
        tensor = int(rows.flatten()[0]) // _STRIDE
        if not 0 <= tensor < len(shapes) or not bool((rows // _STRIDE == tensor).all()):
            raise ValueError(f"{parameter} of an expert is no part of {', '.join(shapes)}")
        pieces.append(_piece(parameter, list(shapes)[tensor], rows % _STRIDE, columns % _STRIDE))
    for name, shape in shapes.items():
        covered = torch.zeros(shape[1:], dtype=torch.bool)
        for piece in pieces:
            if piece.fused == name:
                covered[piece.where] = True
        size = sum(numbers[0][piece.parameter].numel() for piece in pieces if piece.fused == name)
        if size != covered.numel() or not bool(covered.all()):
            raise ValueError(f"the experts' parameters are not exactly the entries of {name}")
    return FusedLayout(shapes, tuple(pieces))


def fuse(state: dict[str, Tensor], prefix: str, layout: FusedLayout) -> None:
    """In a state dict put the tensors of linear experts, whose names begin with ``prefix``, together, in place."""
    for name, shape in layout.shapes.items():
        pieces = [piece for piece in layout.pieces if piece.fused == name]
        fused = state[f"{prefix}0.{pieces[0].parameter}"].new_empty(shape)
        for piece in pieces:
            for index in range(shape[0]):
                part = state.pop(f"{prefix}{index}.{piece.parameter}")
                fused[index][piece.where].copy_(part.T if piece.transposed else part)
        state[prefix + name] = fused


@contextmanager
def fusing_experts(model: nn.Module, layouts: Mapping[str, FusedLayout]) -> Iterator[None]:
    """Within the context ``state_dict`` gives these experts put together, but for quantized ones.

    Those stay as they are: inference engines expect each expert's integers and scales by themselves.
    """
    with ExitStack() as hooks:
        for name, layout in layouts.items():
            module = model.get_submodule(name)
            if not is_quantized(module):
                hooks.callback(module.register_state_dict_post_hook(_hook(layout)).remove)
        yield


def is_quantized(module: nn.Module) -> bool:
    """Whether a module, or one inside it, is quantized or about to be."""
    return any(getattr(m, "quantization_scheme", None) is not None for m in module.modules())


def _hook(layout: FusedLayout) -> Any:
    def hook(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        fuse(state, prefix, layout)

    return hook


@torch.no_grad()
def _numbered(experts: LinearExperts2D, expert: Any, shapes: Mapping[str, torch.Size], axis: int) -> dict[str, Tensor]:
    """Where each entry of an expert's parameters comes from: the tensor, and the place along one of its axes."""
    source = SimpleNamespace(**{flag: getattr(type(experts), flag) for flag in _FLAGS})
    for tensor, (name, shape) in enumerate(shapes.items()):
        numbers = torch.full(shape[1:], tensor * _STRIDE, dtype=torch.int32)
        if axis < numbers.ndim:
            along = torch.arange(shape[1 + axis], dtype=torch.int32)
            numbers += along.view([-1 if a == axis else 1 for a in range(numbers.ndim)])
        setattr(source, name, numbers[None])
    target = SimpleNamespace(intermediate_size=getattr(expert, "intermediate_size", None))
    found = {}
    for name, parameter in expert.named_parameters():
        module, _, attribute = name.rpartition(".")
        if not hasattr(target, module):
            setattr(target, module, SimpleNamespace(weight=None, bias=None))
        found[name] = torch.full(parameter.shape, -1, dtype=torch.int32)
        setattr(getattr(target, module), attribute, found[name])
    type(expert).copy_from_experts_module(target, source, 0)
    return found


def _piece(parameter: str, fused: str, rows: Tensor, columns: Tensor) -> _Piece:
    if rows.ndim == 1:
        return _Piece(parameter, fused, (_even_steps(parameter, rows),), False)
    for transposed, (r, c) in enumerate(((rows, columns), (rows.T, columns.T))):
        if bool((r == r[:, :1]).all()) and bool((c == c[:1]).all()):
            where = _even_steps(parameter, r[:, 0]), _even_steps(parameter, c[0])
            return _Piece(parameter, fused, where, bool(transposed))
    raise ValueError(f"{parameter} of an expert is no block of {fused}")


def _even_steps(parameter: str, numbers: Tensor) -> slice:
    first, last = int(numbers[0]), int(numbers[-1])
    step = int(numbers[1]) - first if len(numbers) > 1 else 1
    if step < 1 or not torch.equal(numbers, torch.arange(first, last + 1, step, dtype=numbers.dtype)):
        raise ValueError(f"{parameter} of an expert does not lie in even steps")
    return slice(first, last + 1, step)
