"""What ``elsa prune`` does, for the command line to call."""

import resource
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from compressed_tensors.offload import remove_dispatch
from datasets import disable_progress_bars as disable_datasets_bars
from llmcompressor import oneshot
from llmcompressor.utils.dev import get_main_device
from loguru import logger
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from elsa_modifier.evaluation import perplexity
from elsa_modifier.fields import CheckpointEvery
from elsa_modifier.modifier import ELSAModifier
from elsa_modifier.pruning.recipes import modifiers_of
from elsa_modifier.pruning.summary import Summary
from elsa_modifier.resuming.directory import complete_checkpoints
from elsa_modifier.resuming.session import Checkpointing
from elsa_modifier.saving import HISTORY_FILE
from elsa_modifier.texts.windows import Texts, read_texts
from elsa_modifier.tracking import METRICS_FILE
from elsa_modifier.training.loading import load_for_ranks
from elsa_modifier.training.loop import TrainingDiverged
from elsa_modifier.training.ranks import RankFailed, is_first_process, launched_ranks

__all__ = ["Summary", "run", "training_texts"]


def run(
    model: str,
    recipe: str | Path,
    data: str,
    out: Path,
    *,
    sparsity: float | None = None,
    resume: str | None = None,
    checkpoint_minutes: float = 10.0,
    track: Sequence[str] = (),
) -> Summary | None:
    """Prune a model, save it, and say what it has come to, which is also written beside it.

    Started as several processes by a launcher, all train, and the first one reads the model, measures, saves and has
    the summary; the others have None.

    :param model: directory, or a name on the hub
    :param recipe: a file, or the name of a recipe that comes with the package
    :param data: see :func:`~elsa_modifier.texts.documents.documents`
    :param out: directory of the pruned model
    :param sparsity: instead of the recipe's
    :param resume: None is what the recipe says
    :param checkpoint_minutes: between training checkpoints, where the recipe does not say; 0 makes none
    :param track: trackers beside those of the recipe
    :raises ValueError: if the run cannot work, a loss is not finite, or another process failed; the message says what
        to do
    """
    began = time.perf_counter()
    first, processes = is_first_process(), launched_ranks()
    if not first:
        _be_quiet()
    modifiers = modifiers_of(recipe, sparsity=sparsity)
    pruners = [modifier for modifier in modifiers if isinstance(modifier, ELSAModifier)]
    for modifier in pruners:
        if modifier.checkpoint_every is None and checkpoint_minutes > 0:
            modifier.checkpoint_every = CheckpointEvery(minutes=checkpoint_minutes)
        if resume is not None:
            modifier.resume = resume
        modifier.track = list(dict.fromkeys([*modifier.track, *track]))
    tokenizer = AutoTokenizer.from_pretrained(model)
    if not first:
        # It would write over what the first one does.
        tokenizer.save_pretrained = lambda *_, **__: ()
    dense = _load(model, sharded=processes > 1 and pruners[0].parallel == "fsdp")
    length, tokens = _length_and_tokens(pruners, dense.config)
    texts = read_texts(data, tokenizer, length=length, tokens=tokens)
    before = _measured(dense, texts.held_out, "Perplexity before") if first else None
    try:
        pruned = oneshot(
            model=dense,
            tokenizer=tokenizer,
            dataset=texts.training,
            recipe=modifiers,
            output_dir=str(out),
            # All are used whatever it says, and it would warn if there were fewer.
            num_calibration_samples=len(texts.training),
        )
    except (TrainingDiverged, RankFailed) as error:
        raise ValueError(str(error)) from error
    if not first:
        return None
    last = pruners[-1]
    masks = last.masks.values()
    checkpointing = last._checkpointing
    directory = checkpointing.directory if isinstance(checkpointing, Checkpointing) else None
    summary = Summary(
        sparsity=1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks),
        perplexity_before=before,
        perplexity_after=_measured(pruned, texts.held_out, "Perplexity after"),
        held_out_tokens=0 if texts.held_out is None else texts.held_out.numel(),
        training_tokens=length * len(texts.training),
        epochs=tokens / (length * len(texts.training)),
        seconds=time.perf_counter() - began,
        training_seconds=sum(modifier.history[-1].seconds for modifier in pruners),
        steps=sum(len(modifier.history) for modifier in pruners),
        tokens=sum(record.tokens for modifier in pruners for record in modifier.history),
        processes=processes,
        memory=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        device_memory=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        model=str(out),
        history=str(out / HISTORY_FILE),
        checkpoints=str(directory) if directory and last.checkpoint_every else None,
        metrics=str(directory / METRICS_FILE) if directory else None,
        base=model,
        data=data,
        recipe=str(recipe),
        base_on_hub=not Path(model).exists(),
        data_on_hub=not Path(data).exists(),
        checkpoint_bytes=_size(complete_checkpoints(directory)) if directory else 0,
    )
    summary.write(out)
    return summary


def _size(directories: Sequence[Path]) -> int:
    return sum(file.stat().st_size for directory in directories for file in directory.iterdir())


def _load(model: str, *, sharded: bool) -> PreTrainedModel:
    """The model; with a part on each process, in the first alone."""
    load = load_for_ranks if sharded else AutoModelForCausalLM.from_pretrained
    loaded: PreTrainedModel = load(model, dtype="auto")
    return loaded


def _be_quiet() -> None:
    """The first process speaks for all."""
    disable_datasets_bars()
    transformers_logging.disable_progress_bar()
    logger.disable("llmcompressor")
    logger.disable("elsa_modifier")


def training_texts(model: str, recipe: str | Path, data: str) -> Texts:
    """The texts that :func:`run` would train on, and hold out.

    :raises ValueError: as :func:`run`
    """
    pruners = [modifier for modifier in modifiers_of(recipe) if isinstance(modifier, ELSAModifier)]
    length, tokens = _length_and_tokens(pruners, AutoConfig.from_pretrained(model))
    return read_texts(data, AutoTokenizer.from_pretrained(model), length=length, tokens=tokens)


def _length_and_tokens(pruners: Sequence[ELSAModifier], config: PretrainedConfig) -> tuple[int, int]:
    """Tokens of a sequence, and of all that the run goes over."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = min(pruners[0].sequence_length, limit or pruners[0].sequence_length)
    return length, length * sum(m.steps * m.batch_size * m.gradient_accumulation_steps for m in pruners)


def _measured(model: PreTrainedModel, held_out: Tensor | None, title: str) -> float | None:
    """Perplexity on the accelerator, if there is one."""
    if held_out is None:
        return None
    remove_dispatch(model)
    place, device = next(model.parameters()).device, get_main_device()
    model.to(device)
    try:
        return perplexity(model, held_out, precision="fp32" if device.type == "cpu" else "auto", title=title)
    finally:
        model.to(place)
