"""Loading a model once for several ranks: the first reads it, the others hold its shape.

``oneshot`` given a path loads the whole model in every process before any modifier is asked. Given a model that was
loaded here, only one process of the run has its values in main memory.
"""

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from elsa_modifier.training.ranks import is_first_process

__all__ = ["is_placeholder", "load_for_ranks"]


def load_for_ranks(path: str | os.PathLike[str], **options: Any) -> PreTrainedModel:
    """``AutoModelForCausalLM.from_pretrained`` in the first process; elsewhere a model whose parameters hold nothing.

    For ``oneshot(model=load_for_ranks(path), ...)`` with ``parallel: fsdp``. On the other ranks the model stays empty:
    the trained one is the first rank's.

    :param options: for ``from_pretrained``
    """
    if is_first_process():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, **options)
        return model
    known = {key: options[key] for key in ("trust_remote_code", "revision", "cache_dir") if key in options}
    config = AutoConfig.from_pretrained(path, **known)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=options.get("trust_remote_code", False))
    model.config._name_or_path = str(path)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            # One number, seen as a whole matrix: unlike a tensor without data it is in main memory, as llm-compressor's
            # offloading asks for.
            value = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(module, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype))
    model.tie_weights()
    return model


def is_placeholder(parameter: Tensor) -> bool:
    """Whether a parameter holds no values, but one number for all of them."""
    return parameter.numel() > 1 and not any(parameter.stride())
