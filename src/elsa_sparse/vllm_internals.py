"""Everything that compressed serving touches inside vLLM beyond the interfaces that it documents for plugins.

===============================================  ======================================================================
what                                             for what
===============================================  ======================================================================
``BaseModelLoader.create_model``                 a model gets its quantization config when the loader creates it, and
                                                 not from ``config.json``: one there that speaks of sparsity alone makes
                                                 vLLM and transformers fail
``VllmConfig.quant_config``                      is replaced in a copy, after vLLM chose it
``VllmConfig.additional_config``                 is part of the key of compiled graphs, in which sizes of packed weights
                                                 are constants
``initialize_online_processing``                 calls ``process_weights_after_loading`` when a layer's last weight has
                                                 come, so that dense weights exist one layer at a time
``ALREADY_PROCESSED``                            attribute of layers for which that has happened
``_cpu_skip_gemm_dispatch``                      attribute of layers whose ``weight`` others read: they stay dense
``UnquantizedLinearMethod``                      what computes with a layer that stays dense
``CompressedTensorsConfig``, ``...LinearMethod``,  integers that a quantizer packed: which layers have them, the
``...WNA16``, the classes of parameters          parameters that they are loaded into, what computes with them otherwise
``torch.ops._C.cpu_gemm_wna16``                  computes with 4 bits; builds for AVX2 are without
===============================================  ======================================================================

Imported only where :func:`version_problem` finds nothing.
"""

from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsWNA16
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PackedvLLMParameter,
)
from vllm.model_executor.utils import set_weight_attrs

__all__ = [
    "ALREADY_PROCESSED",
    "KERNEL_OF_4_BITS",
    "ChannelQuantScaleParameter",
    "CompressedTensorsConfig",
    "CompressedTensorsLinearMethod",
    "CompressedTensorsWNA16",
    "GroupQuantScaleParameter",
    "LinearBase",
    "LinearMethodBase",
    "ModelWeightParameter",
    "PackedvLLMParameter",
    "QuantizationConfig",
    "UnquantizedLinearMethod",
    "initialize_online_processing",
    "register_quantization_config",
    "register_weight_loader_v2_supported_method",
    "set_weight_attrs",
]

ALREADY_PROCESSED = "_already_called_process_weights_after_loading"
KERNEL_OF_4_BITS = "cpu_gemm_wna16"
