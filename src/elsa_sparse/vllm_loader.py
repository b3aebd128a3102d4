"""vLLM serves sparse checkpoints: a model loader that rebuilds dense tensors while it streams the shards.

Every rank of a tensor-parallel server reads and rebuilds whole tensors, and vLLM's own weight loaders cut out their
part, as they do for a dense checkpoint. Where :mod:`elsa_sparse.vllm_compressed` says that it can be done, linear
layers are compressed again as soon as they are complete, and stay so; elsewhere what is saved is disk and download.
"""

import dataclasses
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm
from vllm.config.load import LoadConfig
from vllm.logger import init_logger
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from elsa_sparse.checkpoint import CONFIG_FILE, CONFIG_KEY, SparseCheckpoint
from elsa_sparse.compression_rule import INTEGERS
from elsa_sparse.errors import SparseCheckpointError
from elsa_sparse.vllm_compressed import ON_GPU, dense_reason, version_problem, with_compression
from elsa_sparse.vllm_packing import Savings

__all__ = ["LOAD_FORMAT", "SWITCH", "SparseModelLoader", "register"]

LOAD_FORMAT = "elsa-sparse"
SWITCH = "compressed"
"""Key of ``--model-loader-extra-config``: false keeps weights dense in memory, a name of integers rounds them,
``gpu`` has them compressed on a GPU, too."""

# Only vLLM's own loggers are set up to print.
logger = init_logger("vllm.elsa_sparse")


class SparseModelLoader(DefaultModelLoader):
    """vLLM's default loader, but for sparse checkpoints, which it recognises by their ``config.json``.

    :param load_config: with load format ``elsa-sparse`` the checkpoint has to be sparse; with ``auto`` it may be
    :raises ValueError: if the switch in its extra configuration is none of what it may be
    """

    def __init__(self, load_config: LoadConfig) -> None:
        self._only_sparse = load_config.load_format == LOAD_FORMAT
        extra = load_config.model_loader_extra_config
        self._compressed = extra.get(SWITCH, True) if isinstance(extra, dict) else True
        if not isinstance(self._compressed, bool) and self._compressed not in (*INTEGERS, ON_GPU):
            raise ValueError(
                f"--model-loader-extra-config: {SWITCH} is {self._compressed!r}; allowed are true (pruned weights stay "
                f"compressed in memory on a CPU), {ON_GPU!r} (on a GPU, too), false (dense), and "
                f"{' or '.join(map(repr, INTEGERS))} (compressed on a CPU, and what is kept is rounded)"
            )
        self._savings: Savings | None = None
        changed: dict[str, Any] = {}
        if self._only_sparse:
            changed["load_format"] = "auto"
        if isinstance(extra, dict) and SWITCH in extra:
            changed["model_loader_extra_config"] = {key: value for key, value in extra.items() if key != SWITCH}
        super().__init__(dataclasses.replace(load_config, **changed) if changed else load_config)

    def create_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        config = _config_file(model_config.model, model_config.revision)
        if CONFIG_KEY in config and self._compressed:
            if reason := dense_reason(vllm_config, self._compressed):
                level, text = reason
                logger.log(level, "Serving the sparse checkpoint %s dense: %s", model_config.model, text)
            else:
                values = self._compressed if self._compressed in INTEGERS else None
                if changed := with_compression(vllm_config, config[CONFIG_KEY], values):
                    vllm_config, self._savings = changed
        model: nn.Module = super().create_model(vllm_config, model_config, prefix)
        return model

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        model: nn.Module = super().load_model(vllm_config, model_config, prefix)
        if self._savings is not None:
            logger.info("%s", self._savings)
        return model

    def _get_weights_iterator(self, source: Any) -> Generator[tuple[str, Tensor], None, None]:
        model = source.model_or_path
        config = _config_file(model, source.revision, source.subfolder)
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


def _config_file(model: str, revision: str | None, subfolder: str | None = None) -> dict[str, Any]:
    return get_hf_file_to_dict(str(Path(subfolder or "") / CONFIG_FILE), model, revision) or {}


def register() -> None:
    """Entry point of ``vllm.general_plugins``, called in every process of a server."""
    if version_problem() is None:
        from elsa_sparse import vllm_method

        vllm_method.register()
    register_model_loader(LOAD_FORMAT)(SparseModelLoader)
    # It does what vLLM's own loader does with every other checkpoint, so vLLM's warning that it takes its place is not
    # for the user to act on.
    with _without_warnings("vllm.model_executor.model_loader"):
        register_model_loader("auto")(SparseModelLoader)


@contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    quiet = getLogger(name)
    level = quiet.level
    quiet.setLevel(ERROR)
    try:
        yield
    finally:
        quiet.setLevel(level)
