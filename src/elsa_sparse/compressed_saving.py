"""``save_pretrained`` of a model with compressed weights: a sparse checkpoint.

It loads again with equal values, compressed or dense, as its reader chooses; nothing in it says how it was held in
memory. :func:`~elsa_sparse.writing.save_sparse` of such a model goes this way too.
"""

import copy
import json
from collections.abc import Iterator
from functools import wraps
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor, nn

from elsa_sparse.compression_rule import INTEGERS
from elsa_sparse.int8_head import Int8Embedding, Int8Head
from elsa_sparse.sparse_experts import PackedExperts
from elsa_sparse.sparse_linear import SparseLinear
from elsa_sparse.writing import DEFAULT_SHARD_SIZE, save_through

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["is_compressed", "teach_save_pretrained"]

_COMPRESSED = (SparseLinear, PackedExperts, Int8Embedding, Int8Head)
# Dense tensors that are in memory at once, in bytes, before a file of them is written.
_PENDING = 1 << 28


def is_compressed(model: nn.Module) -> bool:
    """Whether a model has layers whose weights are compressed in memory."""
    return any(isinstance(module, _COMPRESSED) for module in model.modules())


def teach_save_pretrained() -> None:
    """Have every transformers model's ``save_pretrained`` write compressed weights. Idempotent."""
    from transformers import PreTrainedModel

    original = PreTrainedModel.save_pretrained
    if getattr(original, "writes_compressed_weights", False):
        return

    @wraps(original)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_compressed(self):
            return original(self, save_directory, *args, **kwargs)
        return _save(self, Path(save_directory), *args, **kwargs)

    save_pretrained.writes_compressed_weights = True  # type: ignore[attr-defined]
    PreTrainedModel.save_pretrained = save_pretrained


def _save(
    model: "PreTrainedModel",
    directory: Path,
    is_main_process: bool = True,
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    **others: Any,
) -> None:
    """Write a sparse checkpoint, in place of one that is there.

    :raises ValueError: if an argument of ``save_pretrained`` is set that has no meaning here, or the model's weights
        are those of a quantized checkpoint
    """
    if any(isinstance(module, SparseLinear) and module.quantized for module in model.modules()):
        raise ValueError(
            "this model has the integers of a quantized checkpoint, which are only read: copy the directory that it "
            "was loaded from, or load it without compressed"
        )
    unknown = [name for name, value in others.items() if value not in (None, False)]
    if unknown:
        raise ValueError(
            f"save_pretrained of a model with compressed weights takes no {', '.join(unknown)}: save it to a directory "
            "and go on from there, or load the model without compressed"
        )
    if is_main_process:
        save_through(
            lambda scratch: _write_dense(model, scratch),
            directory,
            max_shard_size=max_shard_size,
            overwrite=True,
            progress=False,
        )


def _write_dense(model: "PreTrainedModel", directory: Path) -> None:
    """A plain checkpoint, as transformers would write it if the model's weights were dense."""
    config = copy.deepcopy(model.config)
    for field in ("quantization_config", "_is_quantized"):
        if hasattr(config, field):
            delattr(config, field)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    if model.is_remote_code():
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(model, directory, config=config)
    config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
    weight_map: dict[str, str] = {}
    pending: dict[str, Tensor] = {}
    for group in chain(_groups(model), [{}]):
        pending |= {name: tensor.contiguous() for name, tensor in group.items()}
        if pending and (not group or sum(tensor.nbytes for tensor in pending.values()) >= _PENDING):
            file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
            save_file(pending, directory / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(pending, file)
            pending = {}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _groups(model: "PreTrainedModel") -> Iterator[dict[str, Tensor]]:
    """Dense tensors under the names of the checkpoint that the model came from."""
    from transformers.core_model_loading import WeightConverter, revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    layers = {path: module for path, module in model.named_modules() if isinstance(module, _COMPRESSED)}
    buffers = {f"{path}.{name}" for path, module in layers.items() for name, _ in module.named_buffers()}
    dense = {name: tensor for name, tensor in model.state_dict().items() if name not in buffers}
    dense = {name: dense[name] for name in dense if name not in (model._keys_to_ignore_on_save or ())}
    dense = remove_tied_weights_from_state_dict(dense, model)
    if any(isinstance(module, Int8Embedding) for module in layers.values()):  # it is the head's weight, too
        layers = {path: module for path, module in layers.items() if not isinstance(module, Int8Head)}
    if any(isinstance(conversion, WeightConverter) for conversion in model._weight_conversions):
        # A tensor of the checkpoint may be made of several here.
        everything = dict(_dense_weight(path, module, model) for path, module in layers.items())
        yield revert_weight_conversion(model, dense | everything)
        return
    yield revert_weight_conversion(model, dense)
    for path, module in layers.items():
        yield revert_weight_conversion(model, dict([_dense_weight(path, module, model)]))


def _dense_weight(path: str, module: nn.Module, model: "PreTrainedModel") -> tuple[str, Tensor]:
    """A parameter of the dense model, with its name."""
    if isinstance(module, (SparseLinear, PackedExperts)):
        weight = module.unpack(model.dtype if module.values in INTEGERS else None)
        # A module in place of a parameter has that one's name.
        return (path if isinstance(module, PackedExperts) else f"{path}.weight"), weight
    weight = module.weight  # type: ignore[assignment]
    return f"{path}.weight", weight
