"""vLLM serves sparse checkpoints: a model loader that rebuilds dense weights while it streams the shards.

Every rank of a tensor-parallel server reads and rebuilds whole tensors, and vLLM's own weight loaders cut out their
part, as they do for a dense checkpoint. Weights are dense in memory: what is saved is disk and download.
"""

import dataclasses
import logging
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from elsa_sparse.checkpoint import CONFIG_FILE, CONFIG_KEY, SparseCheckpoint
from elsa_sparse.errors import SparseCheckpointError

__all__ = ["LOAD_FORMAT", "SparseModelLoader", "register"]

LOAD_FORMAT = "elsa-sparse"


class SparseModelLoader(DefaultModelLoader):
    """vLLM's default loader, but for sparse checkpoints, which it recognises by their ``config.json``.

    :param load_config: with load format ``elsa-sparse`` the checkpoint has to be sparse; with ``auto`` it may be
    """

    def __init__(self, load_config: LoadConfig) -> None:
        self._only_sparse = load_config.load_format == LOAD_FORMAT
        if self._only_sparse:
            load_config = dataclasses.replace(load_config, load_format="auto")
        super().__init__(load_config)

    def _get_weights_iterator(self, source: Any) -> Generator[tuple[str, Tensor], None, None]:
        model = source.model_or_path
        folder = Path(source.subfolder or "")
        config = get_hf_file_to_dict(str(folder / CONFIG_FILE), model, source.revision) or {}
        if CONFIG_KEY in config:
            return self._rebuilt(source, config)
        if self._only_sparse:
            raise SparseCheckpointError(
                f"is not a sparse checkpoint: its {CONFIG_FILE} has no {CONFIG_KEY!r}; leave --load-format out",
                file=model,
            )
        weights: Generator[tuple[str, Tensor], None, None] = super()._get_weights_iterator(source)
        return weights

    def _rebuilt(self, source: Any, config: dict[str, Any]) -> Generator[tuple[str, Tensor], None, None]:
        everything = dataclasses.replace(source, allow_patterns_overrides=["*.json", "*.safetensors"])
        directory, *_ = self._prepare_weights(
            everything.model_or_path,
            everything.subfolder,
            everything.revision,
            everything.fall_back_to_pt,
            everything.allow_patterns_overrides,
        )
        with SparseCheckpoint.open(directory, config) as checkpoint:
            tensors = tqdm(
                checkpoint,
                total=len(checkpoint.entries),
                desc="Rebuilding sparse tensors",
                unit="tensor",
                disable=not self.load_config.use_tqdm_on_load,
            )
            for name, tensor in tensors:
                yield source.prefix + name, tensor


def register() -> None:
    """Entry point of ``vllm.general_plugins``, called in every process of a server."""
    register_model_loader(LOAD_FORMAT)(SparseModelLoader)
    # It does what vLLM's own loader does with every other checkpoint, so vLLM's warning that it takes its place is not
    # for the user to act on.
    with _without_warnings("vllm.model_executor.model_loader"):
        register_model_loader("auto")(SparseModelLoader)


@contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
