"""The training run: loss, gradients, clipping, the ADMM step, a progress bar and a history."""

import math
import time
from collections.abc import Iterator
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
from elsa_modifier.training.data import BatchSource
from elsa_modifier.training.gradient_release import releasing_gradients
from elsa_modifier.training.objective import Objective, count_targets, next_token_loss
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

    def after_step(self, record: StepRecord) -> None:
        """Called after each step, before the next."""

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
    shown_residual = ""
    releasing = releasing_gradients(optimizer, parallel) if gradient_release else nullcontext()
    show = parallel.is_first
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
                mean_loss, grad_norm = _finite(step, learning_rate, loss, norm)
                if max_grad_norm is not None and grad_norm > max_grad_norm:
                    nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
                with parallel.drawing(step):
                    optimizer.step()
            else:
                (batch,) = parallel.part_of(micro_batches)
                own_loss = _loss(model, objective, batch, tokens, precision, device)
                loss = parallel.sum_of_parts(own_loss.detach())
                _finite(step, learning_rate, loss, torch.zeros_like(loss))
                own_loss.backward()
                mean_loss, grad_norm = _finite(
                    step, learning_rate, loss, release.finish(), "weights have been changed in this step"
                )
            scheduler.step()
            optimizer.zero_grad()
            seen += tokens
            projected = optimizer.projection_count > projections
            residual = float(optimizer.last_residual) if projected else None
            if residual is not None:
                shown_residual = f" residual {residual:.3f}"
            seconds = time.perf_counter() - started
            record = StepRecord(
                step=step + 1,
                loss=mean_loss,
                learning_rate=learning_rate,
                penalty=penalty,
                grad_norm=grad_norm,
                tokens=tokens,
                seconds=round(seconds, 3),
                sparsity=optimizer.sparsity if optimizer.frozen else 0.0,
                residual=residual,
                mask_entered=int(optimizer.last_entered) if projected else None,
            )
            history.append(record)
            bar.set_postfix_str(
                f"loss {mean_loss:.3f}{shown_residual} penalty {penalty:.2g} "
                f"sparsity {record.sparsity:.3f} {seen / seconds:,.0f} tok/s"
            )
            bar.update()
            if watcher is not None:
                watcher.after_step(record)


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
        return objective(model, {key: value.to(device) for key, value in batch.items()}) / tokens


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


def _finite(
    step: int,
    learning_rate: float,
    loss: Tensor,
    norm: Tensor,
    consequence: str = "no weight was changed in this step",
) -> tuple[float, float]:
    mean_loss, grad_norm = torch.stack([loss, norm.float()]).tolist()
    if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
        raise TrainingDiverged(
            f"step {step + 1}: loss {mean_loss}, gradient norm {grad_norm}. Lower lr (now {learning_rate:g}), add "
            f"warmup_steps, or set precision to 'fp32'; {consequence}"
        )
    return mean_loss, grad_norm
