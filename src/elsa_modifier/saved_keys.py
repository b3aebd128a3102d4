"""Whether a model that is written is the model that is read: its keys against what its own class looks for.

The class's ``from_pretrained`` says so itself, on tensors that have shapes and no data.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from compressed_tensors.offload.cache import OffloadCache
from compressed_tensors.utils import patch_attr
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import get_linearized_moes
from loguru import logger
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, conversion_mapping
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

from elsa_modifier.fused_experts import FusedLayout, fuse, is_quantized, layout_of

__all__ = ["check_saved_keys", "experts_to_fuse"]

_NAMED = 4


def experts_to_fuse(model: PreTrainedModel) -> dict[str, FusedLayout]:
    """Which experts, by module name, must be put together for the model's class to find them, and how.

    None if the class finds what ``save_pretrained`` writes as it is.

    :raises ValueError: if the class would not find everything, or something else, whatever is done
    """
    state = _without_data(model)
    lost, loaded = _read_back(type(model), model.config, revert_weight_conversion(model, state))
    if not lost:
        return {}
    layouts: dict[str, FusedLayout] = {}
    made: dict[tuple[type, torch.Size], FusedLayout] = {}
    reason = ""
    for name, experts in get_linearized_moes(model):
        fused = loaded.get_submodule(name)
        if isinstance(fused, LinearExperts2D):
            continue
        shape = torch.Size(p.numel() for p in fused.parameters())
        try:
            if (kind := (type(fused), shape)) not in made:
                made[kind] = layout_of(experts, fused)
            layouts[name] = made[kind]
        except ValueError as error:
            reason = f"; its experts cannot be put together: {error}"
            break
        fuse(state, f"{name}.", layouts[name])
    if not reason:
        lost, _ = _read_back(type(model), model.config, revert_weight_conversion(model, state))
        if not lost:
            return layouts
    raise ValueError(
        f"{type(model).__name__} would not read back what is saved of it: {lost}{reason}. That would be another model "
        "than the one trained, so it is not pruned"
    )


def check_saved_keys(model: PreTrainedModel, directory: Path) -> None:
    """Compare what ``save_pretrained`` wrote with what the model's class looks for.

    Keys of a quantized model that transformers does not find are only warned of: inference engines read experts one by
    one, and transformers does not.

    :raises RuntimeError: if the class would not find everything, or something else
    """
    config = type(model.config).from_pretrained(directory)
    lost, _ = _read_back(type(model), config, _saved_tensors(directory))
    if not lost:
        return
    message = f"{type(model).__name__}.from_pretrained would not read back what is saved in {directory}: {lost}"
    if not is_quantized(model):
        raise RuntimeError(f"{message}. Do not use these files; the model in memory is right")
    logger.warning(f"{message}. Inference engines that read quantized experts one by one may still do")


def _without_data(model: PreTrainedModel) -> dict[str, Tensor]:
    with OffloadCache.disable_onloading():
        return {key: torch.empty_like(value, device="meta") for key, value in model.state_dict().items()}


def _saved_tensors(directory: Path) -> dict[str, Tensor]:
    # from_pretrained prefers the single file too.
    single = directory / "model.safetensors"
    tensors = {}
    for file in [single] if single.exists() else sorted(directory.glob("model-*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                tensors[key] = torch.empty_like(opened.get_tensor(key), device="meta")
    return tensors


def _read_back(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, state: Mapping[str, Tensor]
) -> tuple[str, PreTrainedModel]:
    """What ``from_pretrained`` in a new process would not find, in words, and the model without data that it makes."""
    loaded, info = _load(model_class, config, state)
    if any(info.values()):
        # Loading linear experts, llm-compressor replaces the conversions of this process.
        with patch_attr(conversion_mapping, "_checkpoint_conversion_mapping_cache", None):
            other, other_info = _load(model_class, config, state)
        if not any(other_info.values()):
            return "", other
    words = []
    for kind, said in (
        ("missing_keys", "it looks for"),
        ("unexpected_keys", "it does not know"),
        ("mismatched_keys", "of another shape"),
    ):
        keys = sorted(key if isinstance(key, str) else key[0] for key in info[kind])
        if keys:
            more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
            words.append(f"{said} {', '.join(keys[:_NAMED])}{more}")
    words += map(str, info["error_msgs"])
    return "; ".join(words), loaded


def _load(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, state: Mapping[str, Tensor]
) -> tuple[PreTrainedModel, dict[str, list[str]]]:
    with _quiet():
        loaded, info = model_class.from_pretrained(
            None,
            config=copy.deepcopy(config),
            state_dict=dict(state),
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    return loaded, info


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing is being loaded that a user would want to read about."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
