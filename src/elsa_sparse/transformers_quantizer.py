"""Weights that are compressed while transformers loads them: a quantizer in its registry.

transformers reads one tensor after the other when something has to be made of it. Here a linear layer whose weight is
sparse enough becomes a :class:`~elsa_sparse.sparse_linear.SparseLinear` at that moment, so that there is one dense
weight at a time. Any checkpoint will do, sparse or dense; what is not sparse stays as it is.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from elsa_sparse.compressed_saving import teach_save_pretrained
from elsa_sparse.compression_rule import DEFAULT_MIN_SPARSITY, INTEGERS, kernels
from elsa_sparse.int8_head import hold_head_dense, hold_head_in_int8
from elsa_sparse.quantized import IntegerWeight
from elsa_sparse.sparse_experts import PackedExperts, holds_experts, pack_experts
from elsa_sparse.sparse_linear import SparseLinear, pack_weight
from elsa_sparse.transformers_loading import teach_from_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["QUANT_METHOD", "ElsaSparseConfig", "ElsaSparseQuantizer"]

QUANT_METHOD = "elsa_sparse"


@register_quantization_config(QUANT_METHOD)
class ElsaSparseConfig(QuantizationConfigMixin):
    """``quantization_config`` of ``from_pretrained``: sparse weights stay compressed in memory.

    :param min_sparsity: zeros below which a weight stays dense, 0 to 1
    :param int8_head: hold the output head in 8-bit integers with a scale a row, and an embedding that is tied to it:
        half the memory, and the one setting here, with ``values``, that changes results
    :param values: ``"int8"`` or ``"int4"`` rounds kept weights to integers; None keeps them equal
    :param group_size: columns that share a scale, of ``values``; None for a row in int8 and 128 in int4
    :param modules_to_not_convert: names of modules that stay dense, or ends of such names
    :raises ValueError: if a field is not what it may be
    """

    def __init__(
        self,
        *,
        min_sparsity: float = DEFAULT_MIN_SPARSITY,
        int8_head: bool = False,
        values: str | None = None,
        group_size: int | None = None,
        modules_to_not_convert: list[str] | None = None,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        if not 0 <= min_sparsity <= 1:
            raise ValueError(f"min_sparsity is {min_sparsity!r}; allowed is 0 to 1")
        if values is not None and values not in INTEGERS:
            raise ValueError(f"values is {values!r}; allowed are {', '.join(INTEGERS)}, and None for as they are")
        if group_size is not None and (values is None or group_size < 1):
            raise ValueError(f"group_size is {group_size!r} with values {values!r}; it is a count, of int8 or int4")
        if quant_method != QUANT_METHOD:
            raise ValueError(f"quant_method is {quant_method!r}; allowed is {QUANT_METHOD!r}")
        self.quant_method = quant_method
        self.min_sparsity = min_sparsity
        self.int8_head = int8_head
        self.values = values
        self.group_size = group_size
        self.modules_to_not_convert = modules_to_not_convert


@register_quantizer(QUANT_METHOD)
class ElsaSparseQuantizer(HfQuantizer):
    """What ``from_pretrained`` asks when it is given an :class:`ElsaSparseConfig`."""

    quantization_config: ElsaSparseConfig

    def __init__(self, quantization_config: ElsaSparseConfig, **kwargs: Any) -> None:
        # Nothing on disk is of this method, which therefore works on any checkpoint.
        super().__init__(quantization_config, **(kwargs | {"pre_quantized": False}))

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what could not work before anything is read.

        :raises ImportError: if ``elsa_kernels`` is not installed
        :raises ValueError: if the model would be where there are no kernels, or where they differ
        """
        kernels()
        for place in device_map.values() if isinstance(device_map, dict) else ():
            if place == "disk" or not kernels().has_kernels(_device(place)):
                raise ValueError(
                    f"device_map names {place}; compressed weights are for CPUs, and for GPUs of CUDA and ROCm: name "
                    "one of them, or leave out the quantization_config"
                )
        # What waits on the CPU for its turn on a GPU is moved by code that knows of one layout.
        if isinstance(device_map, dict) and len({_device(place).type for place in device_map.values()}) > 1:
            raise ValueError(
                "device_map names a CPU and a GPU; compressed weights stay on one kind of device: name one of them, or "
                "leave out the quantization_config"
            )

    def update_device_map(self, device_map: Any) -> Any:
        """``"auto"`` is the CPU, too: the kernels for GPUs have not been run on one, so one has to be named."""
        return {"": "cpu"} if isinstance(device_map, str) else device_map

    def param_element_size(self, model: "PreTrainedModel", param_name: str, param: Tensor) -> float:
        """Nothing for what may be compressed: transformers reserves as much of a GPU before it reads anything."""
        return 0 if self.may_compress(model, param_name) else param.element_size()

    def param_needs_quantization(self, model: "PreTrainedModel", param_name: str, **kwargs: Any) -> bool:
        """Every parameter is looked at when it has been read."""
        return True

    def may_compress(self, model: "PreTrainedModel", param_name: str) -> bool:
        """Whether a parameter is a weight that may be compressed; whether it is, its zeros decide."""
        path, _, name = param_name.rpartition(".")
        module = model.get_submodule(path)
        # Not a subclass of Linear, whose forward may do more.
        if not (name == "weight" and type(module) is nn.Linear) and not holds_experts(module, name):
            return False
        if param_name in model.all_tied_weights_keys or param_name in model.all_tied_weights_keys.values():
            return False
        stays = [*(self.quantization_config.modules_to_not_convert or []), *(model._keep_in_fp32_modules or [])]
        return not any(f".{path}".endswith(f".{end}") for end in stays)

    def get_quantize_ops(self) -> ConversionOps:
        return _Compress(self)

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> "PreTrainedModel":
        if self.quantization_config.int8_head:
            hold_head_in_int8(model)
        if any(isinstance(module, PackedExperts) for module in model.modules()):
            # The others take all experts' weights as one tensor.
            model.set_experts_implementation("eager")
        # So that a model that is called outside of torch.no_grad asks no SparseLinear for gradients.
        model.requires_grad_(False)
        return model

    def _dequantize(self, model: "PreTrainedModel", dtype: torch.dtype | None = None) -> "PreTrainedModel":
        for path, module in [*model.named_modules()]:
            if isinstance(module, SparseLinear):
                _replace(model, path, _dense_linear(module, dtype))
            elif isinstance(module, PackedExperts):
                _replace(model, path, nn.Parameter(module.unpack(dtype)))
        hold_head_dense(model, dtype)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


class _Compress(ConversionOps):
    """Takes weights as they are read and puts layers in place of layers."""

    def __init__(self, quantizer: ElsaSparseQuantizer) -> None:
        self._quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        model: Any = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """What is left to be put in place, by name."""
        left = {}
        for name, read in input_dict.items():
            weight = read[0] if isinstance(read, list) else read
            quantized = isinstance(weight, IntegerWeight)
            packed = self._pack(weight, model.dtype) if self._quantizer.may_compress(model, name) else None
            if packed is None:
                left[name] = weight.dense(model.dtype) if quantized else weight
                continue
            layer: nn.Module
            if isinstance(packed, list):
                path, layer = name, PackedExperts(packed)
            else:
                path = name.rpartition(".")[0]
                layer = _sparse_linear(model.get_submodule(path), packed, quantized)
            # transformers initializes what has not got this mark.
            layer._is_hf_initialized = True  # type: ignore[assignment]
            _replace(model, path, layer)
            if missing_keys is not None:
                missing_keys.discard(name)
        return left

    def _pack(self, weight: Tensor | IntegerWeight, dtype: torch.dtype) -> Tensor | list[Tensor] | None:
        if isinstance(weight, IntegerWeight):
            return weight.pack(dtype)
        config = self._quantizer.quantization_config
        pack: Any = pack_weight if weight.dim() == 2 else pack_experts
        packed: Tensor | list[Tensor] | None = pack(
            weight, values=config.values, group_size=config.group_size, min_sparsity=config.min_sparsity
        )
        return packed


def _device(place: Any) -> torch.device:
    """What a device map names; a number is a GPU."""
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


def _replace(model: nn.Module, path: str, new: nn.Module | nn.Parameter) -> None:
    parent, _, name = path.rpartition(".")
    module = model.get_submodule(parent)
    if isinstance(new, nn.Module) == (name in module._parameters):
        delattr(module, name)
    setattr(module, name, new)


def _sparse_linear(linear: nn.Linear, packed: Tensor, quantized: bool) -> SparseLinear:
    layer = SparseLinear(packed, linear.bias, quantized=quantized)
    if layer.bias is not None and hasattr(linear.bias, "_is_hf_initialized"):
        layer.bias._is_hf_initialized = True  # type: ignore[attr-defined]
    return layer


def _dense_linear(layer: SparseLinear, dtype: torch.dtype | None) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    linear.weight = nn.Parameter(layer.unpack(dtype))
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().to(dtype))
    return linear


# Whoever has the configuration can give it, to from_pretrained of a sparse directory among others.
teach_from_pretrained()
teach_save_pretrained()
