"""vLLM's quantization method ``elsa-sparse``: linear layers whose pruned weights stay compressed in memory.

Each layer is compressed when its last weight has been loaded, so that dense weights exist one layer at a time. Fused
layers (q, k and v; gate and up) are one weight by then, and with tensor parallelism a rank compresses its part.
Embeddings and heads, tied or not, are left to vLLM. A layer is packed for the device that it was loaded to.

A step reads nothing back from a GPU and launches kernels whose sizes the host knows, so that CUDA graphs can hold it:
the first call of each size, which compiles, is the one that vLLM makes before it captures a graph.
"""

from typing import Any

import torch
from torch import Tensor, nn

from elsa_sparse import vllm_compressed
from elsa_sparse.sparse_linear import pack_weight
from elsa_sparse.vllm_internals import (
    ALREADY_PROCESSED,
    LinearBase,
    LinearMethodBase,
    ModelWeightParameter,
    QuantizationConfig,
    UnquantizedLinearMethod,
    initialize_online_processing,
    register_quantization_config,
    register_weight_loader_v2_supported_method,
    set_weight_attrs,
)
from elsa_sparse.vllm_packing import Savings, keep_packed, kernels_problem

__all__ = ["METHOD", "SparseConfig", "SparseLinearMethod", "register"]

METHOD = "elsa-sparse"


class SparseConfig(QuantizationConfig):
    """Compresses every linear layer that is sparse enough. The loader of sparse checkpoints makes one, or takes the one
    that vLLM made because ``--quantization elsa-sparse`` asked for it.

    :raises RuntimeError: if there are no kernels to compute with
    """

    savings: Savings | None = None
    """Where layers are counted; set by the loader."""
    values: str | None = None
    """What kept weights are rounded to; likewise."""

    def __init__(self) -> None:
        super().__init__()
        if problem := kernels_problem(gpu=vllm_compressed.serves_on_gpu()):
            raise RuntimeError(f"--quantization {METHOD}: {problem}")

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SparseConfig":
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        if self.savings is None:
            raise RuntimeError(
                f"--quantization {METHOD}: the model is no sparse checkpoint, or is to be served dense; leave it out, "
                "or write a sparse checkpoint with `elsa pack`"
            )
        return SparseLinearMethod(self.savings, self.values) if isinstance(layer, LinearBase) else None


@register_weight_loader_v2_supported_method
class SparseLinearMethod(LinearMethodBase):
    """One layer's weight, dense until it has been loaded, and after that compressed if that pays.

    :param savings: where the layer is counted
    :param values: ``"int8"`` or ``"int4"`` rounds kept weights; None keeps them as they are
    """

    uses_meta_device = True

    def __init__(self, savings: Savings, values: str | None) -> None:
        self._savings = savings
        self._values = values
        self._dense = UnquantizedLinearMethod()
        self._rows: int | None = None

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
        weight = ModelWeightParameter(
            data=torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype, device="meta"),
            input_dim=1,
            output_dim=0,
            weight_loader=extra_weight_attrs.pop("weight_loader"),
        )
        layer.register_parameter("weight", weight)
        set_weight_attrs(weight, extra_weight_attrs)
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        if getattr(layer, ALREADY_PROCESSED, False):
            return
        setattr(layer, ALREADY_PROCESSED, True)
        weight = layer.weight.data
        # Whoever sets that attribute reads the weight itself.
        is_read = getattr(layer, "_cpu_skip_gemm_dispatch", False)
        packed = None if is_read else pack_weight(weight, values=self._values)
        self._savings.add(weight.numel() * weight.element_size(), packed)
        if packed is None:
            self._dense.process_weights_after_loading(layer)
        else:
            self._rows = weight.shape[0]
            keep_packed(layer, packed, "weight")

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self._rows is None:
            dense: Tensor = self._dense.apply(layer, x, bias)
            return dense
        y: Tensor = torch.ops.elsa_kernels.linear(x, layer.weight_packed, self._rows)
        return y if bias is None else y + bias


def register() -> None:
    """Make the method known to vLLM by its name."""
    register_quantization_config(METHOD)(SparseConfig)
