"""The training run: loss, gradients, clipping, the ADMM step, a progress bar and a history."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from loguru import logger
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm
from transformers import PreTrainedModel

from elsa_modifier.admm.optimizer import ADMMOptimizer
from elsa_modifier.admm.placement import is_fused
from elsa_modifier.training.data import IGNORED_LABEL, BatchSource
from elsa_modifier.training.gradient_release import releasing_gradients
from elsa_modifier.training.late import LateReads, to_device
from elsa_modifier.training.objective import PREDICTED, Objective, count_targets, next_token_loss
from elsa_modifier.training.parallel import Alone
from elsa_modifier.training.precision import Precision

__all__ = ["StepRecord", "StepWatcher", "TrainingDiverged", "TrainingStopped", "train"]


_NOTHING_LEFT = (
    "Nothing has been saved, and there is no continuing: the run has to start again from its beginning. Set "
    "checkpoint_every to have something to go on from next time."
)


class TrainingDiverged(RuntimeError):
    """The loss or the gradient norm is no longer finite."""


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step of the history.

    :param step: from 1
    :param loss: the objective before the step, the mean over predicted tokens, nats
    :param learning_rate: of the base optimizer in this step
    :param penalty: ``lam`` or ``rho`` in this step; 0 once the mask is fixed
    :param grad_norm: global norm of the loss gradient before clipping; once the mask is fixed, of what it keeps
    :param tokens: predicted tokens in this step
    :param seconds: since the run began
    :param sparsity: fraction of zeros that the pruned weights are held to: 0 until the mask is fixed
    :param residual: ``||x - z|| / ||x||`` just before the z-update, in steps that make one
    :param mask_entered: weights that entered the mask in this step's z-update
    """

    step: int
    loss: float
    learning_rate: float
    penalty: float
    grad_norm: float
    tokens: int
    seconds: float
    sparsity: float
    residual: float | None = None
    mask_entered: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The record without the fields that this step has no value for."""
        return {key: value for key, value in asdict(self).items() if value is not None}


class TrainingStopped(KeyboardInterrupt):
    """Someone asked for the end between two steps, and was told what is left behind."""


class StepWatcher(Protocol):
    """What looks on, and keeps what a stopped run can go on from."""

    def log(self, record: StepRecord) -> None:
        """Called with the record of each step, in order, some steps later where weights are on an accelerator."""

    def after_step(self, step: int, catch_up: Callable[[], None]) -> None:
        """Called after each step, from 1, before the next.

        :param catch_up: to be called before the history is read, or weights are saved: completes it, and raises
            :class:`TrainingDiverged` if a loss was not finite
        """

    def left_behind(self) -> str:
        """What there is to go on from once training has failed, as a sentence."""


def train(
    model: PreTrainedModel,
    optimizer: ADMMOptimizer,
    scheduler: LRScheduler,
    batches: BatchSource,
    *,
    objective: Objective = next_token_loss,
    steps: int,
    max_grad_norm: float | None,
    precision: Precision,
    device: torch.device,
    history: list[StepRecord],
    gradient_release: bool = False,
    parallel: Alone | None = None,
    watcher: StepWatcher | None = None,
) -> None:
    """Run the optimizer steps that it has not taken yet, up to ``steps``, and append a record of each to ``history``.

    On an accelerator the host does not wait for a step: losses and norms are read two steps later. A step whose loss or
    norm is not finite changes nothing there, so that what is refused later has not spread.

    :param model: in training mode, on ``device``, fp32 parameters
    :param objective: what is minimized
    :param max_grad_norm: clip the global gradient norm to this; None does not clip
    :param precision: ``bf16`` runs forward and backward under autocast
    :param gradient_release: see :mod:`elsa_modifier.training.gradient_release`; needs ``max_grad_norm`` None and a
        single micro-batch
    :param parallel: how the run is spread over ranks; None is one process. ``batches`` are the global ones
    :param watcher: is told of every step
    :raises TrainingDiverged: at the first loss or gradient norm that is not finite, before it touches a weight; with
        gradient release a norm is known only afterwards
    """
    parallel = parallel or Alone(model)
    parameters = parallel.parameters
    # A run that is resumed has taken steps before.
    first = optimizer.step_count
    started = time.perf_counter() - (history[-1].seconds if first else 0.0)
    seen = sum(record.tokens for record in history) if first else 0
    releasing = releasing_gradients(optimizer, parallel) if gradient_release else nullcontext()
    show = parallel.is_first
    reads = LateReads(device)
    # Otherwise a step waits until it is known whether it may be taken.
    skips = reads.is_late and optimizer.can_skip
    with (
        _telling_where_it_stopped(optimizer, steps, watcher),
        tqdm(initial=first, total=steps, desc="ELSA", unit="step", dynamic_ncols=True, disable=not show) as bar,
        releasing as release,
    ):
        for step in range(first, steps):
            learning_rate = float(scheduler.get_last_lr()[0])
            penalty = 0.0 if optimizer.frozen else optimizer.penalty(step)
            projections = optimizer.projection_count
            micro_batches = batches.micro_batches(step)
            tokens = _count_tokens(micro_batches)
            if release is None:
                part = parallel.part_of(micro_batches)
                loss = _accumulate_gradients(model, objective, part, tokens, precision, device)
                loss = parallel.collect_gradients(loss)
                for parameter in parameters:
                    optimizer.mask_gradient_(parameter)
                norm = parallel.total_norm()
                ok = torch.isfinite(loss) & torch.isfinite(norm) if skips else None
                if not skips:
                    _, grad_norm = _finite(step, learning_rate, *_read(loss, norm))
                if max_grad_norm is not None and (skips or grad_norm > max_grad_norm):
                    nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
                with parallel.drawing(step):
                    optimizer.step(ok)
            else:
                (batch,) = parallel.part_of(micro_batches)
                own_loss = _loss(model, objective, batch, tokens, precision, device)
                loss = parallel.sum_of_parts(own_loss.detach())
                _finite(step, learning_rate, *_read(loss, torch.zeros_like(loss)))
                own_loss.backward()
                norm = release.finish()
                _finite(step, learning_rate, *_read(loss, norm), "weights have been changed in this step")
            scheduler.step()
            optimizer.zero_grad()
            seen += tokens
            seconds = round(time.perf_counter() - started, 3)
            numbers = [loss, norm]
            if optimizer.projection_count > projections:
                numbers += [optimizer.last_residual, optimizer.last_entered]
            known: dict[str, Any] = {
                "step": step + 1,
                "learning_rate": learning_rate,
                "penalty": penalty,
                "tokens": tokens,
                "seconds": seconds,
                "sparsity": optimizer.sparsity if optimizer.frozen else 0.0,
            }

            def tell(found: list[float], known: dict[str, Any] = known, seen: int = seen) -> None:
                mean_loss, grad_norm, *of_projection = found
                _finite(known["step"] - 1, known["learning_rate"], mean_loss, grad_norm)
                residual, entered = (of_projection[0], int(of_projection[1])) if of_projection else (None, None)
                record = StepRecord(
                    loss=mean_loss, grad_norm=grad_norm, residual=residual, mask_entered=entered, **known
                )
                history.append(record)
                show_step(bar, record, seen)
                if watcher is not None:
                    watcher.log(record)

            reads.read(torch.stack([number.double() for number in numbers]), tell)
            if watcher is not None:
                watcher.after_step(step + 1, reads.finish)
        reads.finish()


def show_step(bar: tqdm, record: StepRecord, seen: int) -> None:
    """Have a progress bar show a step."""
    if record.residual is not None:
        bar.residual = f" residual {record.residual:.3f}"
    bar.set_postfix_str(
        f"loss {record.loss:.3f}{getattr(bar, 'residual', '')} penalty {record.penalty:.2g} "
        f"sparsity {record.sparsity:.3f} {seen / max(record.seconds, 1e-3):,.0f} tok/s"
    )
    bar.update()


@contextmanager
def _telling_where_it_stopped(optimizer: ADMMOptimizer, steps: int, watcher: StepWatcher | None) -> Iterator[None]:
    try:
        yield
    except TrainingDiverged as error:
        if watcher is not None:
            raise TrainingDiverged(f"{error}. {watcher.left_behind()}") from error
        raise
    except TrainingStopped:
        raise
    except KeyboardInterrupt:
        done = optimizer.step_count
        weights = "pruned, and trained in part" if optimizer.frozen else "trained in part, and not pruned"
        logger.error(
            f"Interrupted in step {min(done + 1, steps)} of {steps}, after {done} whole ones. The weights in memory "
            f"are {weights}; some may have taken a step more than others. "
            + (watcher.left_behind() if watcher is not None else _NOTHING_LEFT)
        )
        raise


def _count_tokens(micro_batches: list[dict[str, Tensor]]) -> int:
    tokens = sum(count_targets(batch["labels"]) for batch in micro_batches)
    if tokens == 0:
        raise ValueError("a batch has no token to predict: every label is masked out")
    return tokens


def _loss(
    model: PreTrainedModel,
    objective: Objective,
    batch: dict[str, Tensor],
    tokens: int,
    precision: Precision,
    device: torch.device,
) -> Tensor:
    """Over the tokens of the whole step, so that accumulation does not change the result."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        return objective(model, _on_device(batch, device)) / tokens


def _on_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """With the positions of predicted tokens, if some are not: an accelerator would have the host wait for them."""
    if is_fused(device):
        predicted = batch["labels"][:, 1:].flatten() != IGNORED_LABEL
        if 0 < int(predicted.sum()) < len(predicted):
            batch = batch | {PREDICTED: predicted.nonzero()[:, 0]}
    return {key: to_device(value, device) for key, value in batch.items()}


def _accumulate_gradients(
    model: PreTrainedModel,
    objective: Objective,
    micro_batches: list[dict[str, Tensor]],
    tokens: int,
    precision: Precision,
    device: torch.device,
) -> Tensor:
    """Forward and backward of one optimizer step: its mean loss per predicted token."""
    total = torch.zeros((), device=device)
    for batch in micro_batches:
        loss = _loss(model, objective, batch, tokens, precision, device)
        loss.backward()
        total += loss.detach()
    return total


def _read(loss: Tensor, norm: Tensor) -> tuple[float, float]:
    mean_loss, grad_norm = torch.stack([loss, norm.float()]).tolist()
    return mean_loss, grad_norm


def _finite(
    step: int,
    learning_rate: float,
    mean_loss: float,
    grad_norm: float,
    consequence: str = "no weight was changed in this step",
) -> tuple[float, float]:
    if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
        raise TrainingDiverged(
            f"step {step + 1}: loss {mean_loss}, gradient norm {grad_norm}. Lower lr (now {learning_rate:g}), add "
            f"warmup_steps, or set precision to 'fp32'; {consequence}"
        )
    return mean_loss, grad_norm
