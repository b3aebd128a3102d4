"""Bytes of what a run holds all the time, from the shapes of the weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from elsa_modifier.admm.placement import is_fused
from elsa_modifier.admm.storage import BLOCK, StoredPair, chunks
from elsa_modifier.planning.settings import RunSettings
from elsa_modifier.training.model_state import trained_dtype
from elsa_modifier.training.stochastic_adam import moment_block

__all__ = ["MemoryPlan", "ModelShape", "held_bytes", "offloaded_bytes", "projection_temporaries"]

# Bytes an entry and entries an fp32 scale of moments in few bits; of ours, at most: moment_block says how many.
# torchao leaves small and odd tensors as they are.
_MOMENT_FORMATS = {"adam8bit_sr": (1.0, BLOCK), "adam8bit": (1.0, 256), "adam4bit": (0.5, 128), "adamfp8": (1.0, 256)}
_SMALLEST_QUANTIZED = 4096


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model, in entries.

    :param parameters: the shape of every parameter; tied ones once
    :param pruned: of every pruned weight
    :param largest_layer: of the largest decoder layer, all its parameters together
    :param outside_layers: of all parameters in no decoder layer, together
    """

    parameters: tuple[tuple[int, ...], ...]
    pruned: tuple[int, ...]
    largest_layer: int
    outside_layers: int

    @property
    def total(self) -> int:
        """Entries of all parameters."""
        return sum(map(math.prod, self.parameters))


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes at the fullest moment of a run, on each GPU.

    :param weights: the master copy that the optimizer updates
    :param gradients: of all weights, or of the largest one if they are released one by one
    :param optimizer: the base optimizer's moments; if they are offloaded, room for those of two weights
    :param teacher: the dense copy that the objective compares with
    :param admm_state: the ADMM pair, the mask's bits and, on a CPU, scratch buffers
    :param activations: what forward, backward or a projection holds beyond all of these
    :param gathered: whole layers of a sharded model, as several GPUs put them together to compute
    """

    weights: int
    gradients: int
    optimizer: int
    teacher: int
    admm_state: int
    activations: int
    gathered: int

    @property
    def total(self) -> int:
        """All lines together."""
        return sum(getattr(self, line.name) for line in fields(self))


def held_bytes(shape: ModelShape, settings: RunSettings, device: torch.device) -> MemoryPlan:
    """What a run holds from step to step, on one device of this kind; no activations."""
    itemsize = settings.weights.itemsize
    alive = max(map(math.prod, shape.parameters)) if settings.gradient_release else shape.total
    bits = sum(-(-count // 8) for count in shape.pruned)
    if settings.offload_state:
        moments, pairs = _moved_at_once(shape, settings), 0
    else:
        moments = _moment_bytes(shape.parameters, settings.optimizer, itemsize)
        pairs = _pair_bytes(shape.pruned, settings)
    return MemoryPlan(
        weights=shape.total * itemsize,
        gradients=alive * itemsize,
        optimizer=moments,
        teacher=_teacher_bytes(shape.parameters) if settings.objective.has_teacher else 0,
        admm_state=bits + pairs + _scratch_bytes(max(shape.pruned), device),
        activations=0,
        gathered=0,
    )


def offloaded_bytes(shape: ModelShape, settings: RunSettings) -> int:
    """Bytes of main memory that hold moments and ADMM pairs in place of the device; 0 if it holds them itself."""
    if not settings.offload_state:
        return 0
    moments = _moment_bytes(shape.parameters, settings.optimizer, settings.weights.itemsize)
    return moments + _pair_bytes(shape.pruned, settings)


def projection_temporaries(shape: ModelShape, settings: RunSettings) -> int:
    """Bytes that a projection of the largest pruned weight allocates: fp32 tensors of its size.

    The scores and ``|v|`` are alive together, and so is the second moment where it is held in fewer bits.
    """
    return 4 * (2 + (settings.optimizer in _MOMENT_FORMATS)) * max(shape.pruned)


def _moment_bytes(parameters: Sequence[tuple[int, ...]], optimizer: str, itemsize: int) -> int:
    counts = [math.prod(shape) for shape in parameters]
    if optimizer not in _MOMENT_FORMATS:
        return 2 * 4 * sum(counts)
    entry, block = _MOMENT_FORMATS[optimizer]
    if optimizer == "adam8bit_sr":
        scales = sum(-(-count // moment_block(shape)) for count, shape in zip(counts, parameters, strict=True))
        return 2 * (sum(counts) + 4 * scales)
    return sum(
        round(2 * (entry * count + 4 * (count // block)))
        if count >= _SMALLEST_QUANTIZED and count % block == 0
        else 2 * itemsize * count
        for count in counts
    )


def _moved_at_once(shape: ModelShape, settings: RunSettings) -> int:
    """Of :class:`~elsa_modifier.admm.offloading.MovedState`: twice what belongs to the parameter that has most."""
    # Pruned weights are told by their sizes.
    pruned = {count: _pair_bytes((count,), settings) for count in set(shape.pruned)}
    of_each = [
        _moment_bytes([one], settings.optimizer, settings.weights.itemsize) + pruned.get(math.prod(one), 0)
        for one in shape.parameters
    ]
    return 2 * max(of_each)


def _pair_bytes(pruned: tuple[int, ...], settings: RunSettings) -> int:
    """The pairs (z, u), with their scales."""
    if not settings.has_pair:
        return 0
    coupled = settings.form == "coupled"
    nowhere = torch.device("meta")
    return sum(StoredPair(count, settings.state_dtype, nowhere, both_kinds=coupled).nbytes for count in pruned)


def _teacher_bytes(parameters: Sequence[tuple[int, ...]]) -> int:
    """Of :func:`~elsa_modifier.training.distillation.copy_as_teacher`, on a device that multiplies bf16."""
    shapes = [torch.empty(shape, device="meta") for shape in parameters]
    return sum(tensor.numel() * trained_dtype(tensor, torch.bfloat16).itemsize for tensor in shapes)


def _scratch_bytes(largest: int, device: torch.device) -> int:
    """:class:`~elsa_modifier.admm.storage.Scratch`: one buffer of the largest weight's size, three of a chunk's.

    Compiled updates need none.
    """
    if is_fused(device):
        return 0
    chunk = max(end - start for start, end in chunks(largest, device))
    return 4 * (largest + 3 * (-(-chunk // BLOCK) * BLOCK))
