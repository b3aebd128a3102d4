"""The training run: loss, gradients, clipping, the ADMM step, a progress bar and a history."""

import math
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from elsa_modifier.admm.optimizer import ADMMOptimizer
from elsa_modifier.training.data import BatchSource
from elsa_modifier.training.objective import count_targets, next_token_loss

__all__ = ["Precision", "StepRecord", "TrainingDiverged", "train"]

Precision = Literal["bf16", "fp32"]


class TrainingDiverged(RuntimeError):
    """The loss or the gradient norm is no longer finite."""


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step of the history.

    :param step: from 1
    :param loss: mean next-token cross-entropy before the step, nats
    :param learning_rate: of the base optimizer in this step
    :param penalty: ``lam`` or ``rho`` in this step; 0 once the mask is fixed
    :param grad_norm: global norm of the loss gradient before clipping
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


def train(
    model: nn.Module,
    optimizer: ADMMOptimizer,
    scheduler: LRScheduler,
    batches: BatchSource,
    *,
    steps: int,
    max_grad_norm: float | None,
    precision: Precision,
    accelerator: Accelerator,
    history: list[StepRecord],
) -> None:
    """Run ``steps`` optimizer steps and append a record of each to ``history``.

    :param model: in training mode, on the accelerator's device, fp32 parameters
    :param max_grad_norm: clip the global gradient norm to this; None does not clip
    :param precision: ``bf16`` runs forward and backward under autocast
    :raises TrainingDiverged: at the first loss or gradient norm that is not finite, before it touches a weight
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    started = time.perf_counter()
    shown_residual = ""
    seen = 0
    with tqdm(total=steps, desc="ELSA", unit="step", dynamic_ncols=True) as bar:
        for step in range(steps):
            loss, tokens = _accumulate_gradients(model, batches.micro_batches(step), precision, accelerator)
            norm = nn.utils.get_total_norm(_gradients(parameters))
            mean_loss, grad_norm = torch.stack([loss, norm]).tolist()
            if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
                raise TrainingDiverged(
                    f"step {step + 1}: loss {mean_loss}, gradient norm {grad_norm}. Lower lr (now "
                    f"{scheduler.get_last_lr()[0]:g}), add warmup_steps, or set precision to 'fp32'; "
                    "no weight was changed in this step"
                )
            if max_grad_norm is not None and grad_norm > max_grad_norm:
                nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
            learning_rate = float(scheduler.get_last_lr()[0])
            penalty = 0.0 if optimizer.frozen else optimizer.penalty(step)
            projections = optimizer.projection_count
            optimizer.step()
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


def _accumulate_gradients(
    model: nn.Module, micro_batches: list[dict[str, Tensor]], precision: Precision, accelerator: Accelerator
) -> tuple[Tensor, int]:
    """Forward and backward of one optimizer step: its mean loss per predicted token, and how many those are."""
    device = accelerator.device
    tokens = sum(count_targets(batch["labels"]) for batch in micro_batches)
    if tokens == 0:
        raise ValueError("a batch has no token to predict: every label is masked out")
    total = torch.zeros((), device=device)
    for batch in micro_batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            # Over the tokens of the whole step, so that accumulation does not change the result.
            loss = next_token_loss(model, {key: value.to(device) for key, value in batch.items()}) / tokens
        accelerator.backward(loss)
        total += loss.detach()
    return total, tokens


def _gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]
