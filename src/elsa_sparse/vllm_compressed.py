"""Whether a vLLM server keeps a sparse checkpoint compressed in memory, and how a model is made to."""

import copy
import hashlib
import json
import logging
from typing import Any

import vllm
from vllm.platforms import current_platform

from elsa_sparse.vllm_packing import Savings, kernels_identity, kernels_problem

__all__ = ["ON_GPU", "VERSIONS", "dense_reason", "serves_on_gpu", "version_problem", "with_compression"]

VERSIONS = "0.32."
"""Releases of vLLM that :mod:`elsa_sparse.vllm_internals` has been tried with begin with this."""


ON_GPU = "gpu"
"""Value of the loader's switch with which weights stay compressed on a GPU, too, whose kernels have not run on one."""


def serves_on_gpu() -> bool:
    """Whether tensors of this server are on GPUs that the kernels are for, NVIDIA's or AMD's."""
    on_gpu: bool = current_platform.is_cuda_alike()
    return on_gpu


def version_problem() -> str | None:
    """Why this vLLM serves sparse checkpoints dense only; None if it need not."""
    if not vllm.__version__.startswith(VERSIONS):
        return f"this is vLLM {vllm.__version__}; compressed serving has been tried with {VERSIONS}x"
    try:
        import elsa_sparse.vllm_internals  # noqa: F401
    except ImportError as error:
        return f"this vLLM {vllm.__version__} is built otherwise than compressed serving expects: {error}"
    return None


def dense_reason(vllm_config: Any, compressed: bool | str) -> tuple[int, str] | None:
    """Why a sparse checkpoint is served dense, with the level to log it at; None if it is to stay compressed.

    :param compressed: the loader's switch
    """
    if problem := version_problem():
        return logging.WARNING, problem
    gpu = serves_on_gpu()
    if not gpu and not current_platform.is_cpu():
        return logging.INFO, "weights stay compressed in memory on CPUs, and on GPUs of CUDA and ROCm"
    if gpu and compressed != ON_GPU:
        return logging.INFO, (
            "on a GPU weights stay compressed in memory only with --model-loader-extra-config "
            f'\'{{"compressed": "{ON_GPU}"}}\': its kernels have not been run on one yet'
        )
    if problem := kernels_problem(gpu=gpu):
        return logging.WARNING, problem
    if not isinstance(vllm_config.additional_config, dict):
        return logging.WARNING, "additional_config is not a dictionary"
    return None


def with_compression(vllm_config: Any, table: Any, values: str | None) -> tuple[Any, Savings] | None:
    """A copy of vLLM's configuration with which a model's linear layers come out compressed, and what they will save.

    None if the layers are quantized in a way that leaves nothing to compress, which on a GPU is any: vLLM computes with
    integers there.

    :param table: what ``config.json`` says of the sparse checkpoint, which stands for all its weights
    :param values: ``"int8"`` or ``"int4"`` rounds kept weights that are not integers; None keeps them as they are
    """
    from elsa_sparse.vllm_integers import SparseCompressedTensorsConfig
    from elsa_sparse.vllm_internals import CompressedTensorsConfig
    from elsa_sparse.vllm_method import SparseConfig

    quant_config = vllm_config.quant_config
    if quant_config is None:
        quant_config = SparseConfig()
    elif type(quant_config) is CompressedTensorsConfig and not serves_on_gpu():
        quant_config = copy.copy(quant_config)
        quant_config.__class__ = SparseCompressedTensorsConfig
    elif not isinstance(quant_config, SparseConfig):
        return None
    savings = quant_config.savings = Savings()
    quant_config.values = values
    config = copy.copy(vllm_config)
    config.quant_config = quant_config
    identity = json.dumps([table, values, kernels_identity(gpu=serves_on_gpu())], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()
    config.additional_config = vllm_config.additional_config | {"elsa_sparse": digest}
    return config, savings
