"""Sparse checkpoints as transformers models: ``load_sparse``, and ``from_pretrained`` once it is taught."""

import copy
import os
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from elsa_sparse.checkpoint import CONFIG_FILE, SparseCheckpoint, read_json
from elsa_sparse.errors import SparseCheckpointError
from elsa_sparse.opening import architecture_of, dense_config, is_sparse, open_checkpoint
from elsa_sparse.quantized import integer_weights
from elsa_sparse.symbols import DTYPES, SAFETENSORS_DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["load_sparse", "teach_from_pretrained"]

_SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
# What from_pretrained takes that also says where files come from.
_DOWNLOAD_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
# The quant_method of transformers_quantizer, which imports transformers.
_COMPRESSED = "elsa_sparse"
# Fields of a configuration that from_pretrained has other uses for.
_NOT_OF_THE_CONFIG = ("dtype", "torch_dtype", "quantization_config")


def load_sparse(
    directory: str | Path, *, compressed: bool = False, int8_head: bool = False, **kwargs: Any
) -> "PreTrainedModel":
    """The transformers model of a sparse checkpoint, equal in every value to what was packed.

    :param compressed: keep sparse weights compressed in memory, for inference; short for a
        ``quantization_config`` of :class:`~elsa_sparse.transformers_quantizer.ElsaSparseConfig`, which has more choices
    :param int8_head: with ``compressed``, hold the output head in 8-bit integers, and an embedding that is tied to it:
        smaller, faster for a few sequences at a time, and no longer equal
    :param kwargs: of ``from_pretrained``, such as ``dtype`` and ``device_map``
    :raises SparseCheckpointError: if the directory is not a sparse checkpoint, or not what it should be
    :raises ImportError: if ``compressed`` is set and elsa-kernels is not installed
    :raises ValueError: if arguments contradict each other
    """
    import transformers

    config = read_json(Path(directory) / CONFIG_FILE)
    if not is_sparse(config):
        raise SparseCheckpointError("is not a sparse checkpoint; load it with from_pretrained", file=directory)
    teach_from_pretrained()
    if compressed:
        from elsa_sparse.transformers_quantizer import ElsaSparseConfig

        if kwargs.get("quantization_config") is not None:
            raise ValueError("compressed is set, and quantization_config too; give all settings in the latter")
        kwargs["quantization_config"] = ElsaSparseConfig(int8_head=int8_head)
    elif int8_head:
        raise ValueError("int8_head is set without compressed; set both")
    model_class: Any = getattr(transformers, architecture_of(config) or "", None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        # Models whose code comes with the checkpoint are not in transformers.
        model_class = transformers.AutoModelForCausalLM
    model: PreTrainedModel = model_class.from_pretrained(directory, **kwargs)
    return model


def teach_from_pretrained() -> None:
    """Have every transformers model's ``from_pretrained`` take sparse checkpoints, local or from a hub. Idempotent."""
    from transformers import PreTrainedModel

    original = PreTrainedModel.from_pretrained.__func__
    if getattr(original, "reads_sparse_checkpoints", False):
        return

    @wraps(original)
    def from_pretrained(
        cls: Any, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        name = pretrained_model_name_or_path
        directory = _sparse_directory(name, kwargs)
        if directory is None:
            return original(cls, name, *args, config=config, **kwargs)
        with open_checkpoint(directory) as checkpoint:
            return _from_checkpoint(cls, original, checkpoint, directory, name, args, config, kwargs)

    from_pretrained.reads_sparse_checkpoints = True  # type: ignore[attr-defined]
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[arg-type]


def _sparse_directory(name: Any, kwargs: dict[str, Any]) -> Path | None:
    """Where a model's files are, downloaded if need be, if it is sparse."""
    if name is None or kwargs.get("gguf_file") or kwargs.get("state_dict") is not None:
        return None
    local = Path(name) / (kwargs.get("subfolder") or "")
    if os.path.isdir(name):
        try:
            return local if is_sparse(read_json(local / CONFIG_FILE)) else None
        except SparseCheckpointError:
            return None  # transformers has its own words for a missing or broken config.json
    from transformers.utils import cached_file

    where = {key: kwargs[key] for key in _DOWNLOAD_ARGUMENTS if kwargs.get(key) is not None}
    found = cached_file(str(name), CONFIG_FILE, _raise_exceptions_for_missing_entries=False, **where)
    if found is None or not is_sparse(read_json(Path(found))):
        return None
    from huggingface_hub import snapshot_download

    subfolder = where.pop("subfolder", "")
    snapshot = snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors"], **where)
    return Path(snapshot, subfolder)


def _from_checkpoint(
    cls: Any,
    original: Any,
    checkpoint: SparseCheckpoint,
    directory: Path,
    name: Any,
    args: tuple[Any, ...],
    config: Any,
    kwargs: dict[str, Any],
) -> Any:
    from transformers import AutoConfig, GenerationConfig, PretrainedConfig

    if isinstance(config, PretrainedConfig):
        config = copy.deepcopy(config)
    else:
        config = (cls.config_class or AutoConfig).from_pretrained(config or directory)
        changes = [key for key in config.to_dict() if key in kwargs and key not in _NOT_OF_THE_CONFIG]
        for key in changes:
            setattr(config, key, kwargs.pop(key))
    # What is loaded is dense, and would be saved so.
    stated = dense_config(checkpoint.config)
    for key in checkpoint.config.keys() - stated.keys():
        if hasattr(config, key):
            delattr(config, key)
    tensors: dict[str, Any] = {tensor: _LazyTensor(checkpoint, tensor) for tensor in checkpoint.entries}
    if "quantization_config" in stated:
        if getattr(kwargs.get("quantization_config"), "quant_method", None) == _COMPRESSED:
            tensors = integer_weights(checkpoint, stated["quantization_config"], tensors)
            if hasattr(config, "quantization_config"):
                del config.quantization_config
        else:
            config.quantization_config = stated["quantization_config"]
    if kwargs.get("generation_config") is None and (directory / "generation_config.json").exists():
        kwargs["generation_config"] = GenerationConfig.from_pretrained(directory)
    kwargs = {key: value for key, value in kwargs.items() if key not in _DOWNLOAD_ARGUMENTS}
    loaded = original(cls, None, *args, config=config, state_dict=tensors, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info=True
    model.name_or_path = model.config.name_or_path = str(name)
    return loaded


class _LazyTensor:
    """A tensor that is read when it is indexed, as safetensors' slices are, which is what transformers expects."""

    def __init__(self, checkpoint: SparseCheckpoint, name: str) -> None:
        self._checkpoint, self._name = checkpoint, name

    def get_shape(self) -> list[int]:
        return list(self._checkpoint.entries[self._name].shape)

    def get_dtype(self) -> str:
        return _SAFETENSORS_NAMES[DTYPES[self._checkpoint.entries[self._name].dtype]]

    def __getitem__(self, index: Any) -> Tensor:
        return self._checkpoint.read(self._name)[index]
