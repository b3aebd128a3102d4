"""What ``elsa sweep`` does, for the command line to call."""

import gc
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llmcompressor.core import reset_session
from loguru import logger
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from elsa_modifier.evaluating.command import evaluate_model
from elsa_modifier.evaluating.models import load_model
from elsa_modifier.evaluating.record import EVALUATION_FILE, Evaluation
from elsa_modifier.evaluating.tasks import TaskSettings, check_tasks
from elsa_modifier.evaluating.texts import WINDOW, EvaluationText, read_evaluation_texts
from elsa_modifier.planning.settings import modifier_of_recipe
from elsa_modifier.pruning.command import run as prune
from elsa_modifier.pruning.command import training_texts
from elsa_modifier.resuming.directory import complete_checkpoints
from elsa_modifier.resuming.fingerprint import recipe_fingerprint
from elsa_modifier.saving import HISTORY_FILE
from elsa_modifier.sweeping.checking import check_sparsities
from elsa_modifier.sweeping.figure import can_draw, draw, page
from elsa_modifier.sweeping.record import Point, Sweep
from elsa_modifier.training.digest import sha256_of

__all__ = ["SweepSettings", "sweep"]


@dataclass(frozen=True)
class SweepSettings:
    """How a sweep is made.

    :param evaluate: texts, see :func:`~elsa_modifier.evaluating.texts.read_evaluation_texts`; none is what is held out
        of the training text
    :param windows: of each of them, at most
    :param tasks: of lm-eval, if any
    :param dtype: that models are judged in, see :data:`~elsa_modifier.evaluating.models.DTYPES`
    :param checkpoint_minutes: between training checkpoints, where the recipe does not say
    :param keep_checkpoints: of runs that are finished; otherwise they are deleted
    :param batch_size: questions of a task at a time
    """

    evaluate: tuple[str, ...] = ()
    windows: int | None = None
    tasks: TaskSettings | None = None
    dtype: str = "auto"
    checkpoint_minutes: float = 10.0
    keep_checkpoints: bool = False
    batch_size: int = 8


def sweep(model: str, sparsities: Sequence[float], recipe: str, data: str, out: Path, settings: SweepSettings) -> Sweep:
    """Prune a model at one sparsity after another, judge what comes of it, and draw. Points that are there stay.

    :param model: directory, or a name on the hub
    :param sparsities: fractions
    :param recipe: a file, or the name of a recipe that comes with the package; its sparsity is replaced
    :param data: see :func:`~elsa_modifier.texts.documents.documents`
    :param out: directory of all of it; ``sparsity-50`` and so on are the models
    :raises ValueError: before the first run, if one of them could not be made
    """
    check_sparsities(model, recipe, sparsities)
    if settings.tasks is not None:
        check_tasks(settings.tasks)
    if not can_draw():
        logger.warning("matplotlib is not installed, so nothing will be drawn: `pip install 'elsa-modifier[plot]'`")
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = training_texts(model, recipe, data)
    fields = recipe_fingerprint(modifier_of_recipe(recipe).model_dump())
    found = _begin(model, {"recipe": fields | {"sparsity": "each"}, "data": sha256_of(texts.windows)}, out)
    judge = _Judge(model, tokenizer, _texts_to_judge_on(model, tokenizer, texts.held_out, data, settings), settings)
    if found.dense is None or not judge.is_of(found.dense):
        found = replace(found, dense=judge.of_dense())
    points = {point.sparsity: point for point in found.points}
    for sparsity in sparsities:
        directory = out / f"sparsity-{100 * sparsity:g}"
        if not _is_pruned(directory, sparsity):
            judge.release()
            logger.info(f"Pruning to {100 * sparsity:g}%, in {directory}.")
            # Modifiers of the run before this one would still be there.
            reset_session()
            prune(model, recipe, data, directory, sparsity=sparsity, checkpoint_minutes=settings.checkpoint_minutes)
        if not settings.keep_checkpoints:
            for checkpoint in complete_checkpoints(directory.with_name(f"{directory.name}-training")):
                shutil.rmtree(checkpoint, ignore_errors=True)
        points[sparsity] = Point(sparsity=sparsity, directory=directory.name, evaluation=judge.of(directory))
        found = replace(found, points=tuple(points[s] for s in sorted(points)))
        found.write(out)
        if can_draw():
            draw(found, out)
        page(found, out)
    return found


def _begin(model: str, settings: dict[str, object], out: Path) -> Sweep:
    """The sweep that is there, if it is of the same; or a new one.

    :raises ValueError: if it is of something else
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        there = Sweep.read(out)
    except FileNotFoundError:
        there = Sweep(model=model, settings=settings)
        there.write(out)
        return there
    if different := there.differences(model, settings):
        raise ValueError(
            f"out: {out} holds another sweep ({'; '.join(different)}); name another --out, or move it away"
        )
    return there


def _texts_to_judge_on(
    model: str, tokenizer: PreTrainedTokenizerBase, held_out: Tensor | None, data: str, settings: SweepSettings
) -> list[EvaluationText]:
    if settings.evaluate:
        limit = getattr(AutoConfig.from_pretrained(model).get_text_config(), "max_position_embeddings", None)
        window = min(WINDOW, limit or WINDOW)
        return read_evaluation_texts(settings.evaluate, tokenizer, window=window, most=settings.windows)
    if held_out is None:
        raise ValueError(f"data: {data} is too little to hold some out to judge on; pass more, or --evaluate texts.txt")
    windows = held_out if settings.windows is None else held_out[: settings.windows]
    return [EvaluationText(f"{Path(data).name}, held out", windows.long())]


def _is_pruned(directory: Path, sparsity: float) -> bool:
    """Whether a run has come to its end there: its history, which is written after the weights, has all steps."""
    try:
        history = json.loads((directory / HISTORY_FILE).read_text(encoding="utf-8"))
        modifier = history["modifier"]
        return bool(modifier["sparsity"] == sparsity and len(history["steps"]) == modifier["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


class _Judge:
    """Judges models on the same texts and tasks, beside the dense one, which stays in memory until it is released."""

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[EvaluationText],
        settings: SweepSettings,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._texts = texts
        self._settings = settings
        self._dense: PreTrainedModel | None = None

    def of_dense(self) -> Evaluation:
        """Of the dense model itself."""
        return self._evaluate(self._loaded_dense(), None)

    def of(self, directory: Path) -> Evaluation:
        """Of a pruned model: what lies beside it if that is of the same texts and tasks, else what is found now."""
        try:
            there = Evaluation.read(directory / EVALUATION_FILE)
            if self.is_of(there):
                return there
        except (OSError, ValueError):
            pass
        pruned = load_model(str(directory), dtype=self._settings.dtype)
        evaluation = replace(self._evaluate(pruned, self._loaded_dense()), model=str(directory), dense=self._model)
        evaluation.write(directory)
        return evaluation

    def is_of(self, evaluation: Evaluation) -> bool:
        """Whether it is of these texts and tasks, in this dtype."""
        if self._settings.dtype not in ("auto", evaluation.dtype):
            return False
        have = [(found.text, found.window, found.tokens) for found in evaluation.perplexity]
        want = [(t.name, t.windows.shape[1], t.windows.shape[0] * (t.windows.shape[1] - 1)) for t in self._texts]
        tasks = self._settings.tasks
        limits = {(result.task, result.limit) for result in evaluation.tasks}
        return have == want and (tasks is None or all((name, tasks.limit) in limits for name in tasks.expanded))

    def release(self) -> None:
        """Free the dense model's memory, until it is needed again."""
        self._dense = None
        gc.collect()

    def _loaded_dense(self) -> PreTrainedModel:
        if self._dense is None:
            self._dense = load_model(self._model, dtype=self._settings.dtype)
        return self._dense

    def _evaluate(self, model: PreTrainedModel, dense: PreTrainedModel | None) -> Evaluation:
        settings = self._settings
        return evaluate_model(
            model, self._tokenizer, self._texts, dense=dense, tasks=settings.tasks, batch_size=settings.batch_size
        )
