"""What ``elsa eval`` does, for the command line to call."""

import gc
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loguru import logger
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from elsa_modifier.evaluating.endpoint import Endpoint
from elsa_modifier.evaluating.models import base_of, is_output, load_model
from elsa_modifier.evaluating.record import Agreement, Evaluation, Perplexity, TaskResult
from elsa_modifier.evaluating.scoring import Scores, score
from elsa_modifier.evaluating.tasks import (
    TaskSettings,
    check_tasks,
    lm_eval_version,
    measure_tasks,
    on_server,
    on_transformers,
)
from elsa_modifier.evaluating.texts import PUBLISHED, WINDOW, EvaluationText, read_evaluation_texts
from elsa_sparse.compression_rule import kernels

__all__ = ["Settings", "evaluate", "evaluate_model"]


@dataclass(frozen=True)
class Settings:
    """What is measured, and how.

    :param data: texts of perplexity, see :func:`~elsa_modifier.evaluating.texts.read_evaluation_texts`; none measures
        no perplexity
    :param window: tokens of a window; at most the model's positions
    :param windows: of a text, at most; None for what is published, or all
    :param tasks: of lm-eval, if any
    :param dense: the model that the first one is compared with; None is what the model names as its base, if it can be
        loaded
    :param compare_with_dense: whether to, at all
    :param compressed: keep sparse weights compressed in memory
    :param endpoint: address of a running server that computes instead
    :param dtype: see :data:`~elsa_modifier.evaluating.models.DTYPES`
    :param device: see :func:`~elsa_modifier.evaluating.models.load_model`
    :param batch_size: questions of a task at a time
    """

    data: tuple[str, ...] = tuple(PUBLISHED)
    window: int = WINDOW
    windows: int | None = None
    tasks: TaskSettings | None = None
    dense: str | None = None
    compare_with_dense: bool = True
    compressed: bool = False
    endpoint: str | None = None
    dtype: str = "auto"
    device: str | None = None
    batch_size: int = 8


def evaluate(model: str, settings: Settings) -> Evaluation:
    """Judge a model.

    :param model: directory, dense or sparse, or a name on the hub
    :raises ValueError: if something cannot be read or does not go together; the message says what to do
    :raises ImportError: if a package is missing that was asked for
    """
    _check(settings)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if settings.endpoint is not None:
        return _on_server(model, tokenizer, settings)
    window = _usable_window(model, settings.window)
    texts = read_evaluation_texts(settings.data, tokenizer, window=window, most=settings.windows)
    name, dense = _dense(model, settings) if texts else (None, None)
    loaded = load_model(model, dtype=settings.dtype, compressed=settings.compressed, device=settings.device)
    if dense is not None and dense.device != loaded.device:
        dense = dense.to(loaded.device)
    evaluation = evaluate_model(
        loaded, tokenizer, texts, dense=dense, tasks=settings.tasks, batch_size=settings.batch_size
    )
    engine = "transformers, compressed" if settings.compressed else "transformers"
    del loaded, dense
    gc.collect()
    return replace(evaluation, model=model, dense=name, engine=engine)


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[EvaluationText],
    *,
    dense: PreTrainedModel | None = None,
    tasks: TaskSettings | None = None,
    batch_size: int = 8,
) -> Evaluation:
    """Judge a model that is loaded; its ``model`` is the name that it was loaded by.

    :param dense: on the same device
    :param batch_size: questions of a task at a time
    :raises ValueError: as :func:`evaluate`
    """
    scores = [(text, score(model, text.windows, dense=dense, title=text.name)) for text in texts]
    results: tuple[TaskResult, ...] = ()
    if tasks is not None:
        results = measure_tasks(on_transformers(model, tokenizer, batch_size=batch_size), tasks)
    return Evaluation(
        model=model.config.name_or_path,
        dense=None if dense is None else dense.config.name_or_path,
        dtype=str(model.dtype).removeprefix("torch."),
        perplexity=tuple(_perplexity(text, found) for text, found in scores),
        agreement=tuple(
            Agreement(text=text.name, top1=found.top1, kl=found.kl)
            for text, found in scores
            if found.top1 is not None and found.kl is not None
        ),
        tasks=results,
        made=_made(tasks),
    )


def _check(settings: Settings) -> None:
    """Refuse what does not go together, before anything is loaded."""
    if not settings.data and settings.tasks is None:
        raise ValueError("there is nothing to measure: leave out --no-perplexity, or name --tasks")
    if settings.endpoint is not None and settings.compressed:
        raise ValueError(
            "compressed is set with an endpoint, where the server decides how weights are held; leave one out"
        )
    if settings.endpoint is not None and settings.dense is not None:
        raise ValueError(
            "dense is set with an endpoint, which does not give the whole vocabulary's probabilities; leave one out"
        )
    if settings.compressed:
        kernels()
    if settings.tasks is not None:
        check_tasks(settings.tasks)


def _usable_window(model: str, window: int) -> int:
    config = AutoConfig.from_pretrained(model).get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or window
    if window > limit:
        logger.warning(f"{model} takes {limit:,} tokens: windows are as long, not {window:,} as published.")
    return min(window, limit)


def _dense(model: str, settings: Settings) -> tuple[str | None, PreTrainedModel | None]:
    """The model to compare with, loaded, and its name."""
    if not settings.compare_with_dense:
        return None, None
    name = settings.dense or (base_of(Path(model)) if is_output(Path(model)) else None)
    if name is None:
        return None, None
    try:
        return name, load_model(name, dtype=settings.dtype, device="cpu" if settings.compressed else settings.device)
    except ValueError as error:
        if settings.dense is not None:
            raise
        logger.warning(f"{model} names its base, with which it is not compared: {error}")
        return None, None


def _on_server(model: str, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Evaluation:
    assert settings.endpoint is not None
    endpoint = Endpoint(settings.endpoint)
    texts = read_evaluation_texts(settings.data, tokenizer, window=settings.window, most=settings.windows)
    results: tuple[TaskResult, ...] = ()
    scores = [(text, endpoint.score(text.windows, title=text.name)) for text in texts]
    if settings.tasks is not None:
        served = on_server(
            endpoint.address, endpoint.model, model, length=endpoint.length, batch_size=settings.batch_size
        )
        results = measure_tasks(served, settings.tasks)
    return Evaluation(
        model=model,
        engine=endpoint.address,
        perplexity=tuple(_perplexity(text, found) for text, found in scores),
        tasks=results,
        made=_made(settings.tasks),
    )


def _perplexity(text: EvaluationText, found: Scores) -> Perplexity:
    return Perplexity(
        text=text.name,
        tokens=found.tokens,
        window=text.windows.shape[1],
        value=found.perplexity,
        dense=found.dense_perplexity,
    )


def _made(tasks: TaskSettings | None) -> dict[str, str | None]:
    from elsa_modifier import __version__

    return {
        "elsa_modifier": __version__,
        "transformers": importlib.metadata.version("transformers"),
        "lm_eval": None if tasks is None else lm_eval_version(),
    }
