"""What ``save_pretrained`` does beyond transformers and llm-compressor: history, sparse format, and no lost training.

The directory is tried before the first step. If saving fails all the same, the weights are put somewhere else.
"""

import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from llmcompressor.entrypoints.oneshot import Oneshot
from llmcompressor.transformers.utils import RECIPE_FILE_NAME
from loguru import logger
from safetensors.torch import save_model
from transformers import PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from elsa_modifier.fused_experts import FusedLayout, fusing_experts
from elsa_modifier.pruning.summary import SUMMARY_FILE
from elsa_modifier.saved_keys import check_saved_keys
from elsa_modifier.training.ranks import by_itself
from elsa_sparse.atomic import check_target
from elsa_sparse.entry import Encoding
from elsa_sparse.sources import forget_findings
from elsa_sparse.writing import DEFAULT_SHARD_SIZE, save_through

__all__ = ["HISTORY_FILE", "check_output_directory", "extend_save_pretrained", "output_directory"]

HISTORY_FILE = "elsa_history.json"


def check_output_directory(model: PreTrainedModel, checkpoint: Encoding, others: Sequence[object]) -> None:
    """Try whether what ``oneshot`` was told to save to can be written to. Nothing is left there.

    Without an ``output_dir`` there is nothing to try: where ``save_pretrained`` will be told to save is not known.

    :param others: modifiers beside this one; if there are any, they may make the checkpoint smaller
    :raises OSError: if it cannot be, or has too little space; FileExistsError if files in it are in the way
    """
    directory = output_directory()
    if directory is None:
        return
    advice = "free it, or give oneshot another output_dir"
    try:
        if checkpoint != "dense":
            names = (HISTORY_FILE, RECIPE_FILE_NAME, GENERATION_CONFIG_NAME)
            check_target(directory, overwrite=True, names=names)
        elif directory.exists() and not directory.is_dir():
            raise FileExistsError(f"{directory} is a file; name a directory")
        existing = next(place for place in (directory, *directory.parents) if os.path.lexists(place))
        with tempfile.TemporaryDirectory(prefix=".elsa-probe-", dir=existing) as probe:
            (Path(probe) / "file").write_bytes(bytes(4096))
    except FileExistsError as error:
        raise FileExistsError(f"output_dir: {error}") from error
    except OSError as error:
        raise OSError(
            error.errno, f"output_dir cannot be written to ({error.strerror}); {advice}", str(directory)
        ) from (error)
    # Before the weights of four bytes each are packed to four bits, if that may happen.
    needed = sum(p.numel() * p.element_size() for p in model.parameters()) // (8 if others else 1)
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"output_dir {directory} has {free / 1e6:,.1f} MB free, and the model takes at least {needed / 1e6:,.1f}; "
            f"{advice}"
        )


def output_directory() -> Path | None:
    """Where the ``Oneshot`` that called this will save, if it will.

    The session knows nothing of it; but modifiers are initialized by a method of the object that does, so it is among
    the callers.
    """
    frame = inspect.currentframe()
    while frame is not None:
        runner = frame.f_locals.get("self")
        if isinstance(runner, Oneshot):
            if runner.output_dir is None:
                return None
            return Path(os.path.realpath(runner.output_dir), runner.recipe_args.stage or "")
        frame = frame.f_back
    return None


def extend_save_pretrained(
    model: PreTrainedModel,
    *,
    history: str,
    checkpoint: Encoding,
    experts: Mapping[str, FusedLayout],
    first: bool = True,
) -> None:
    """Have a model's ``save_pretrained`` also write the history, and pack the result unless it stays dense.

    If it fails, it writes the dense model to the working directory or to the one for temporary files, and raises an
    OSError that says where. If the model's class would not find what has been written, a dense model stays, and a
    RuntimeError says so; it is not packed, but put elsewhere as any that cannot be saved.

    :param history: content of ``elsa_history.json``
    :param checkpoint: ``dense``, ``coded`` or ``bitmask``
    :param experts: those to put together; see :func:`~elsa_modifier.saved_keys.experts_to_fuse`
    :param first: whether this process is the one of its run that saves; in the others ``save_pretrained`` does nothing,
        and waits for nobody
    """
    if not first:
        model.save_pretrained = lambda *args, **kwargs: None
        return
    inner = model.save_pretrained

    @wraps(inner)
    def save_pretrained(save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        def save_dense(directory: Path) -> None:
            with fusing_experts(model, experts), by_itself():
                inner(str(directory), *args, **kwargs)
            partial = directory / f".{HISTORY_FILE}.partial"
            partial.write_text(history)
            partial.replace(directory / HISTORY_FILE)

        def save_readable(directory: Path) -> None:
            save_dense(directory)
            check_saved_keys(model, directory)

        if checkpoint != "dense" and kwargs.get("push_to_hub"):
            raise ValueError("push_to_hub would upload the dense model; save it, then upload the directory")
        try:
            if checkpoint == "dense":
                save_dense(Path(save_directory))
            else:
                save_through(
                    save_readable,
                    Path(save_directory),
                    encoding=checkpoint,
                    max_shard_size=kwargs.get("max_shard_size", DEFAULT_SHARD_SIZE),
                    overwrite=True,
                )
        except Exception as error:
            kwargs.pop("push_to_hub", None)
            rescued = _rescue(model, save_dense)
            raise OSError(f"the model could not be saved to {save_directory}: {error}. {rescued}") from error
        # Of another run that saved here; `elsa prune` writes that of this one.
        (Path(save_directory) / SUMMARY_FILE).unlink(missing_ok=True)
        if checkpoint == "dense":
            forget_findings(Path(save_directory))
            check_saved_keys(model, Path(save_directory))

    model.save_pretrained = save_pretrained


def _rescue(model: PreTrainedModel, save_dense: Callable[[Path], None]) -> str:
    """Put a model wherever there is room for it, and say where that is."""
    ways: list[Callable[[Path], None]] = [save_dense, lambda directory: _save_weights(model, directory)]
    for save in ways:
        for place in dict.fromkeys((os.getcwd(), tempfile.gettempdir())):
            try:
                directory = Path(tempfile.mkdtemp(prefix="elsa-rescued-", dir=place))
            except OSError as error:
                logger.warning(f"ELSA: nothing can be saved in {place}: {error}")
                continue
            try:
                save(directory)
            except Exception as error:
                logger.warning(f"ELSA: the model cannot be saved in {place}: {error}")
                shutil.rmtree(directory, ignore_errors=True)
            else:
                return f"It was saved, dense, in {directory}"
    return "It could not be saved anywhere else either; free some space and call save_pretrained again"


def _save_weights(model: PreTrainedModel, directory: Path) -> None:
    """Without llm-compressor, should its saving have been what failed."""
    save_model(model, str(directory / "model.safetensors"), metadata={"format": "pt"})
    model.config.save_pretrained(directory)
