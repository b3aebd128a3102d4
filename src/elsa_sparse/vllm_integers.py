"""Pruned weights that were quantized to 4 or 8 bits (W4A16, W8A16), kept compressed with the integers as they are.

For checkpoints that llm-compressor wrote as compressed-tensors "pack-quantized" and that were stored sparse after that.
vLLM's own method for them is asked which layers have integers, and computes with those that do not get smaller.
"""

import math
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn

from elsa_sparse.quantized import unpack_int32
from elsa_sparse.vllm_internals import (
    ALREADY_PROCESSED,
    KERNEL_OF_4_BITS,
    ChannelQuantScaleParameter,
    CompressedTensorsConfig,
    CompressedTensorsLinearMethod,
    CompressedTensorsWNA16,
    GroupQuantScaleParameter,
    LinearBase,
    LinearMethodBase,
    PackedvLLMParameter,
    UnquantizedLinearMethod,
    initialize_online_processing,
    register_weight_loader_v2_supported_method,
    set_weight_attrs,
)
from elsa_sparse.vllm_method import SparseLinearMethod
from elsa_sparse.vllm_packing import Savings, keep_packed, pack_integers

__all__ = ["SparseCompressedTensorsConfig", "SparseIntegersMethod"]


class SparseCompressedTensorsConfig(CompressedTensorsConfig):
    """vLLM's configuration of compressed-tensors, but for linear layers that are compressed."""

    savings: Savings
    values: str | None

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        method = super().get_quant_method(layer, prefix)
        if not isinstance(layer, LinearBase):
            return method
        if type(method) is UnquantizedLinearMethod:
            return SparseLinearMethod(self.savings, self.values)
        if type(method) is CompressedTensorsLinearMethod and _is_symmetric_integers(layer.scheme):
            return SparseIntegersMethod(layer.scheme, self.savings)
        return method


def _is_symmetric_integers(scheme: Any) -> bool:
    return type(scheme) is CompressedTensorsWNA16 and scheme.symmetric and scheme.num_bits in (4, 8)


@register_weight_loader_v2_supported_method
class SparseIntegersMethod(LinearMethodBase):
    """One layer's integers and scales, compressed when they have been loaded if that pays.

    :param scheme: vLLM's, which computes with the layer otherwise
    :param savings: where the layer is counted
    """

    uses_meta_device = True

    def __init__(self, scheme: Any, savings: Savings) -> None:
        self._scheme = scheme
        self._savings = savings
        self._bits: Literal[4, 8] = scheme.num_bits
        self._rows: int | None = None
        self._columns = 0
        self._arguments: dict[str, Any] = {}

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        loader = extra_weight_attrs["weight_loader"]
        # What vLLM's scheme takes, should the layer be handed back to it.
        self._arguments = {
            "input_size_per_partition": input_size_per_partition,
            "output_partition_sizes": output_partition_sizes,
            "input_size": input_size,
            "output_size": output_size,
            "params_dtype": params_dtype,
            "weight_loader": loader,
        }
        rows, columns, group_size = sum(output_partition_sizes), input_size_per_partition, self._scheme.group_size
        if group_size > 0 and columns % group_size:
            raise ValueError(
                f"{self._scheme.layer_name}: its {columns} columns of a rank are no multiple of the group size "
                f"{group_size}; use fewer tensor-parallel ranks"
            )
        self._columns = columns
        with torch.device("meta"):
            weight = PackedvLLMParameter(
                data=torch.empty(rows, math.ceil(columns * self._bits / 32), dtype=torch.int32),
                input_dim=1,
                output_dim=0,
                packed_dim=1,
                packed_factor=Fraction(32, self._bits),
                weight_loader=loader,
            )
            if group_size > 0:
                scales = GroupQuantScaleParameter(
                    data=torch.empty(rows, columns // group_size, dtype=params_dtype),
                    input_dim=1,
                    output_dim=0,
                    weight_loader=loader,
                )
            else:
                scales = ChannelQuantScaleParameter(
                    data=torch.empty(rows, 1, dtype=params_dtype), output_dim=0, weight_loader=loader
                )
        layer.register_parameter("weight_packed", weight)
        layer.register_parameter("weight_scale", scales)
        # A fused layer gets one shape for each of its parts, the last one after all else: it must not count, or the
        # layer would be complete too early, and it must have somewhere to go when the layer is.
        shape = nn.Parameter(torch.empty(0, dtype=torch.int64), requires_grad=False)
        set_weight_attrs(shape, {"weight_loader": _ignore})
        layer.register_parameter("weight_shape", shape)
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        if getattr(layer, ALREADY_PROCESSED, False):
            return
        setattr(layer, ALREADY_PROCESSED, True)
        stored, scales = layer.weight_packed.data, layer.weight_scale.data
        before = sum(t.numel() * t.element_size() for t in (stored, scales))
        integers = unpack_int32(stored, self._bits, self._columns)
        packed = pack_integers(integers, scales, bits=self._bits, always=False)
        if packed is None and not self._hand_back(layer):
            packed = pack_integers(integers, scales, bits=self._bits, always=True)
        self._savings.add(before, packed)
        if packed is not None:
            self._rows = stored.shape[0]
            keep_packed(layer, packed, "weight_packed", "weight_scale")

    def _hand_back(self, layer: Any) -> bool:
        """Give the layer to vLLM's scheme; False if that computes with no such integers on this machine."""
        # The scheme chooses the kernel whether or not it is there.
        if not hasattr(torch.ops._C, KERNEL_OF_4_BITS):
            return False
        loaded = {name: getattr(layer, name) for name in ("weight_packed", "weight_scale")}
        try:
            self._scheme.create_weights(layer=layer, **self._arguments)
        except ValueError:
            return False
        for name, parameter in loaded.items():
            getattr(layer, name).data.copy_(parameter.data)
        self._scheme.process_weights_after_loading(layer)
        return True

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor
        if self._rows is None:
            y = self._scheme.apply_weights(layer, x, bias)
            return y
        y = torch.ops.elsa_kernels.linear(x, layer.weight_packed, self._rows)
        return y if bias is None else y + bias


def _ignore(param: Tensor, loaded_weight: Tensor, *shard: Any) -> None:
    """A weight loader for what is known already."""
