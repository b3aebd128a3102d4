"""Pruned weights that were quantized to 4 or 8 bits: their integers and scales, kept as they are.

compressed-tensors stores a layer as ``weight_packed`` (int32, several integers each), ``weight_scale`` and
``weight_shape``. Read here, these three are one weight, which is packed for inference without being made dense.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elsa_sparse.checkpoint import SparseCheckpoint
from elsa_sparse.compression_rule import kernels
from elsa_sparse.errors import SparseCheckpointError

__all__ = ["EXPERT", "IntegerWeight", "LazyIntegers", "bits_of", "integer_weights", "unpack_int32"]

EXPERT = re.compile(r"\.experts\.\d+\.")
"""In the names of weights that transformers puts together: the experts of a layer are one parameter."""

_PARTS = ("weight_packed", "weight_scale", "weight_shape")


@dataclass(frozen=True, kw_only=True)
class IntegerWeight:
    """A quantized weight in memory, between reading and packing.

    :param integers: (rows, columns) int8
    :param scales: (rows, groups), floating point
    :param bits: 4 or 8
    """

    integers: Tensor
    scales: Tensor
    bits: int

    def to(self, *, device: Any = None, dtype: Any = None) -> "IntegerWeight":
        """What transformers does to all it reads; integers move, and stay what they are."""
        integers, scales = (part.to(device=device) for part in (self.integers, self.scales))
        return IntegerWeight(integers=integers, scales=scales, bits=self.bits)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """(rows, columns) of a dtype, multiplied in fp32."""
        columns, groups = self.integers.shape[1], self.scales.shape[1]
        scales = self.scales.float().repeat_interleave(-(-columns // groups), 1)[:, :columns]
        return (self.integers * scales).to(dtype)

    def pack(self, dtype: torch.dtype) -> Tensor | None:
        """As ``elsa_kernels`` packs it, or None if a dense weight of this dtype would be no larger.

        However few of them are zero: the dense weight is several times as large as the integers.
        """
        packed: Tensor = kernels().pack_integers(self.integers, self.scales, bits=self.bits)
        return packed if packed.numel() < self.integers.numel() * dtype.itemsize else None


class LazyIntegers:
    """A quantized weight that is read when it is indexed, as safetensors' slices are."""

    def __init__(self, checkpoint: SparseCheckpoint, prefix: str, dtype: torch.dtype | None) -> None:
        """:param dtype: of the dense weight that is wanted instead, if it is"""
        self._checkpoint, self._prefix, self._dtype = checkpoint, prefix, dtype
        self._rows, self._columns = checkpoint.read(f"{prefix}.weight_shape").tolist()
        words = checkpoint.entries[f"{prefix}.weight_packed"].shape[1]
        possible = [bits for bits in (4, 8) if words == -(-self._columns * bits // 32)]
        if not possible:
            raise SparseCheckpointError(
                f"{words} words a row hold no {self._columns} integers of 4 or 8 bits, which are all that stays "
                "compressed; load it without compressed",
                tensor=f"{prefix}.weight_packed",
            )
        self._bits = possible[0]

    def get_shape(self) -> list[int]:
        return [self._rows, self._columns]

    def get_dtype(self) -> str:
        return "BF16"

    def __getitem__(self, index: Any) -> IntegerWeight | Tensor:
        stored, scales = (self._checkpoint.read(f"{self._prefix}.{part}") for part in _PARTS[:2])
        weight = IntegerWeight(integers=unpack_int32(stored, self._bits, self._columns), scales=scales, bits=self._bits)
        return weight if self._dtype is None else weight.dense(self._dtype)[index]


def integer_weights(
    checkpoint: SparseCheckpoint, quantization: Mapping[str, Any], tensors: Mapping[str, Any]
) -> dict[str, Any]:
    """What there is to load of a quantized checkpoint: a ``weight`` for three tensors each, and all others.

    :param quantization: ``quantization_config`` of the checkpoint's ``config.json``
    :param tensors: of the checkpoint, by name
    :raises ValueError: if it is quantized in another way than to symmetric integers of weights alone
    """
    problem = _problem(quantization, tensors)
    if problem:
        raise ValueError(
            f"quantization_config {problem}; compressed takes weights of 4 or 8 bits, symmetric and pack-quantized "
            "(W4A16, W8A16), or none that are quantized: load the model without compressed"
        )
    prefixes = [name.removesuffix(f".{_PARTS[0]}") for name in tensors if name.endswith(f".{_PARTS[0]}")]
    taken = {f"{prefix}.{part}" for prefix in prefixes for part in _PARTS}
    found: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if name not in taken}
    for prefix in prefixes:
        name = f"{prefix}.weight"
        dense = torch.bfloat16 if EXPERT.search(name) else None
        found[name] = LazyIntegers(checkpoint, prefix, dense)
    return found


def bits_of(quantization: Any) -> int | None:
    """4 or 8 if those are the bits of all quantized weights of a checkpoint that may stay compressed, else None.

    :param quantization: ``quantization_config`` of its ``config.json``, if there is one
    """
    if not isinstance(quantization, dict) or _problem(quantization, {}):
        return None
    groups = quantization.get("config_groups")
    weights = [group.get("weights") for group in groups.values()] if isinstance(groups, dict) else []
    found = [stated.get("num_bits") if isinstance(stated, dict) else None for stated in weights]
    return next((bits for bits in (4, 8) if found and all(stated == bits for stated in found)), None)


def _problem(quantization: Mapping[str, Any], tensors: Mapping[str, Any]) -> str | None:
    method, layout = quantization.get("quant_method"), quantization.get("format")
    if method != "compressed-tensors":
        return f"has the quant_method {method!r:.80}"
    if layout != "pack-quantized":
        return f"has the format {layout!r:.80}"
    for field in ("kv_cache_scheme", "transform_config"):
        if quantization.get(field):
            return f"has a {field}"
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        if not isinstance(group, dict) or group.get("input_activations") or group.get("output_activations"):
            return "quantizes activations"
    for suffix in ("weight_zero_point", "weight_g_idx"):
        if any(name.endswith(f".{suffix}") for name in tensors):
            return f"has layers with a {suffix}"
    return None


def unpack_int32(stored: Tensor, bits: int, columns: int) -> Tensor:
    """Signed integers out of int32, as compressed-tensors packs them: lowest bits first, with half the range added.

    :param stored: (rows, words) int32
    :param bits: 4 or 8
    :param columns: of the result, at most words * 32 / bits
    :return: (rows, columns) int8
    """
    unsigned = stored.contiguous().view(torch.uint8)
    if bits == 4:
        unsigned = torch.stack((unsigned & 15, unsigned >> 4), -1).flatten(-2)
    return (unsigned[:, :columns].to(torch.int16) - (1 << bits - 1)).to(torch.int8)
