"""Loading what is to be judged, and finding out what it was made from."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import metadata_load
from llmcompressor.utils.dev import get_main_device
from loguru import logger
from transformers import AutoModelForCausalLM, PreTrainedModel

from elsa_modifier.pruning.summary import Summary
from elsa_modifier.saving import HISTORY_FILE
from elsa_modifier.training.precision import multiplies_bf16
from elsa_sparse.checkpoint import CONFIG_FILE, read_json
from elsa_sparse.errors import printable
from elsa_sparse.opening import is_sparse
from elsa_sparse.transformers_loading import teach_from_pretrained

__all__ = ["DTYPES", "base_of", "is_output", "load_model"]

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CARD = "README.md"


def load_model(
    name: str, *, dtype: str = "auto", compressed: bool = False, device: str | None = None
) -> PreTrainedModel:
    """A model that computes as its checkpoint says, in evaluation mode.

    :param name: directory, dense or sparse, or a name on the hub
    :param dtype: one of :data:`DTYPES`; ``auto`` is the checkpoint's, but for bf16 on a device that does not multiply
        it: there it is fp32, or a text would take twenty times as long
    :param compressed: keep sparse weights compressed in memory, on the CPU
    :param device: None is the accelerator, or the CPU if there is none; ``auto`` spreads the model over all there are
    :raises ValueError: if it cannot be loaded
    :raises ImportError: if ``compressed`` is set and elsa-kernels is not installed
    """
    teach_from_pretrained()
    settings: dict[str, Any] = {"dtype": DTYPES[dtype]}
    if compressed:
        from elsa_sparse.transformers_quantizer import ElsaSparseConfig

        settings["quantization_config"] = ElsaSparseConfig()
        device = "cpu"
    elif device == "auto":
        settings["device_map"] = "auto"
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, **settings)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # in any class, from whatever code the model has
        reason = printable(f"{type(error).__name__}: {error}", 400)
        raise ValueError(f"{printable(name, 200)} cannot be loaded: {reason}") from error
    model.requires_grad_(False).eval()
    # Accelerate has placed one that is spread, and compressed weights stay where they are.
    if device == "auto" or compressed:
        return model
    model = model.to(device or get_main_device())
    if dtype == "auto" and model.dtype == torch.bfloat16 and not multiplies_bf16(model.device):
        logger.info(
            f"{printable(name, 200)} is in bf16, which this {model.device.type.upper()} does not multiply: in fp32."
        )
        model = model.float()
    return model


def is_output(directory: Path) -> bool:
    """Whether a directory was written by this package: a run's history lies in it, or it is a sparse checkpoint."""
    if (directory / HISTORY_FILE).is_file():
        return True
    return (directory / CONFIG_FILE).is_file() and is_sparse(read_json(directory / CONFIG_FILE))


def base_of(directory: Path) -> str | None:
    """What a model was made from: what its run was given, or ``base_model`` of its card, or what its history names."""
    with suppress(OSError, ValueError):
        summary = Summary.read(directory)
        if summary is not None and summary.base:
            return summary.base
    try:
        stated = (metadata_load(directory / _CARD) or {}).get("base_model")
    except (OSError, ValueError, yaml.YAMLError):
        stated = None
    if isinstance(stated, list):
        stated = stated[0] if len(stated) == 1 else None
    if not isinstance(stated, str):
        try:
            stated = json.loads((directory / HISTORY_FILE).read_text(encoding="utf-8")).get("model")
        except (OSError, ValueError, AttributeError):
            stated = None
    return stated if isinstance(stated, str) and stated else None
