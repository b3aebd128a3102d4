"""A run made of a recipe's fields: batches, optimizer, learning rate, objective, checkpoints; and its masks.

Which fields there are, and what is allowed, is in :mod:`elsa_modifier.modifier`; the steps are in
:mod:`elsa_modifier.training.loop`.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from llmcompressor.utils.dev import get_main_device
from loguru import logger
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, get_scheduler

from elsa_modifier.admm.constraint import PrunedWeight, SparsitySchedule
from elsa_modifier.admm.optimizer import ADMMOptimizer
from elsa_modifier.admm.penalty import PenaltySchedule
from elsa_modifier.admm.placement import is_fused
from elsa_modifier.admm.projection import parse_mask_structure
from elsa_modifier.resuming.checkpoints import Run
from elsa_modifier.resuming.fingerprint import model_fingerprint, recipe_fingerprint
from elsa_modifier.resuming.session import Checkpointing
from elsa_modifier.targets import Target
from elsa_modifier.training.base_optimizer import build_base_optimizer
from elsa_modifier.training.causality import refuse_without_causal_loss
from elsa_modifier.training.data import ResumableSource, batches_from_calibration
from elsa_modifier.training.learning_rate import default_learning_rate
from elsa_modifier.training.loop import StepRecord, StepWatcher, train
from elsa_modifier.training.model_state import WEIGHT_DTYPES
from elsa_modifier.training.parallel import Alone, forked_generators
from elsa_modifier.training.precision import precision_on
from elsa_modifier.training.ranks import Ranks
from elsa_modifier.training.spreading import spread
from elsa_modifier.unreached import warn_of_unreached

if TYPE_CHECKING:
    from elsa_modifier.modifier import ELSAModifier

__all__ = ["Masks", "build_optimizer", "run_recipe", "usable_sequence_length"]

_SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class Masks:
    """What a run has chosen.

    :param kept: by a pruned module's name the mask of its weight, as packed bits on the CPU, and the weight's shape
    :param unreached: names of the targets that had no gradient and were left as they were
    """

    kept: dict[str, tuple[Tensor, torch.Size]]
    unreached: list[str]


def run_recipe(
    recipe: "ELSAModifier",
    model: PreTrainedModel,
    loader: Any,
    ranks: Ranks | None,
    *,
    frozen: AbstractSet[str],
    checkpointing: Checkpointing | None,
    history: list[StepRecord],
) -> Masks:
    """Train as the recipe says, and leave the pruned weights in the model.

    :param recipe: its fields
    :param loader: llm-compressor's DataLoader, or the user's own
    :param ranks: None for one process
    :param frozen: names of parameters that are not trained
    :param checkpointing: what the recipe says about training checkpoints
    :param history: a record of each step is appended to it
    :raises TrainingDiverged: at the first loss that is not finite
    """
    device = get_main_device() if ranks is None else ranks.device
    precision = precision_on(device, recipe.precision, weights=WEIGHT_DTYPES[recipe.weight_dtype])
    if precision != recipe.precision:
        logger.info(f"precision is 'auto': computing in {precision} on this {device.type.upper()}.")
    if recipe.offload_state and not is_fused(device):
        logger.info("offload_state is true, and changes nothing: weights are in main memory as it is.")
    if ranks is None and is_fused(device) and (visible := torch.accelerator.device_count()) > 1:
        logger.info(f"{visible} devices are visible, and {device} is used. torchrun starts a process for each.")
    batches = batches_from_calibration(
        loader,
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        accumulation=recipe.gradient_accumulation_steps,
        length=usable_sequence_length(recipe.sequence_length, model),
        separator=_first_token(model.config.get_text_config().eos_token_id),
        seed=recipe.seed,
    )
    with (
        forked_generators(device),
        spread(
            model,
            device,
            ranks,
            parallel=recipe.parallel,
            seed=recipe.seed,
            autocast=precision == "bf16",
            dtype=WEIGHT_DTYPES[recipe.weight_dtype],
            activation_checkpointing=recipe.activation_checkpointing,
            frozen=frozen,
        ) as run,
    ):
        model = run.model
        refuse_without_causal_loss(model, autocast=precision == "bf16")
        torch.manual_seed(recipe.seed)
        run.begin()
        targets = recipe._find_targets(model)
        optimizer = build_optimizer(recipe, run, targets)
        scheduler = get_scheduler(
            _SCHEDULERS[recipe.lr_schedule],
            optimizer.base,
            num_warmup_steps=recipe.warmup_steps,
            num_training_steps=recipe.steps,
        )
        # A teacher is the model as it is now, before the weights of a training checkpoint come.
        objective = run.objective(recipe.objective.of(model, run.teacher, sparsity=_sparsity(targets)))
        with _watching(recipe, checkpointing, run, optimizer, scheduler, batches, history) as watcher:
            train(
                model,
                optimizer,
                scheduler,
                run.batches(batches),
                objective=objective,
                steps=recipe.steps,
                max_grad_norm=recipe.max_grad_norm,
                precision=precision,
                device=device,
                history=history,
                gradient_release=recipe.gradient_release,
                parallel=run,
                watcher=watcher,
            )
        warn_of_unreached(optimizer.unreached, targets=len(targets), pruned=recipe.prune_unreached)
        masks = Masks({}, [] if recipe.prune_unreached else optimizer.unreached)
        for target, pair in zip(targets, optimizer.states, strict=True):
            if target.name in masks.unreached:
                continue
            masks.kept[target.name] = (run.whole_bits(pair, target.weight).cpu(), target.weight.shape)
            # Training leaves -0.0 in places; a pruned weight is +0.0.
            run.local(target.weight).data.masked_fill_(~pair.mask, 0.0)
    return masks


def build_optimizer(recipe: "ELSAModifier", run: Alone, targets: list[Target]) -> ADMMOptimizer:
    """The optimizer of a recipe for what this process holds of the model.

    :param run: begun
    :param targets: of its model
    """
    structure = parse_mask_structure(recipe.mask_structure)
    weights = [PrunedWeight(t.name, run.local(t.weight), t.keep, structure, entries=t.weight.numel()) for t in targets]
    base = build_base_optimizer(
        recipe.optimizer,
        run.parameters,
        lr=recipe.lr or _default_learning_rate(recipe.steps, run.model, targets),
        betas=(recipe.betas[0], recipe.betas[1]),
        seed=recipe.seed,
        places=run.places(),
    )
    freeze_step = round(recipe.finalize_at * recipe.steps)
    return ADMMOptimizer(
        base,
        weights,
        penalty=PenaltySchedule(recipe.penalty.value, recipe.penalty.schedule, freeze_step),
        form=recipe.penalty.form,
        dual=recipe.penalty.dual,
        interval=recipe.interval or min(32, max(1, freeze_step // 25)),
        projection=recipe.projection,
        sparsity_schedule=SparsitySchedule(
            recipe.sparsity_schedule.name, round(recipe.sparsity_schedule.end * recipe.steps)
        ),
        budget=budget.among(targets) if (budget := recipe._budget()) else None,
        freeze_step=freeze_step,
        state_dtype=recipe.state_dtype,
        prune_unreached=recipe.prune_unreached,
        offload=recipe.offload_state and is_fused(weights[0].weight.device),
        shards=run.shards,
    )


def usable_sequence_length(asked: int, model: PreTrainedModel) -> int:
    """Tokens in a sequence: as many as asked for, and no more than the model has positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or asked
    if asked > limit:
        logger.info(f"sequence_length {asked} is more than the model's positions; using {limit}.")
    return min(asked, limit)


def _watching(
    recipe: "ELSAModifier",
    checkpointing: Checkpointing | None,
    run: Alone,
    optimizer: ADMMOptimizer,
    scheduler: LambdaLR,
    batches: ResumableSource,
    history: list[StepRecord],
) -> AbstractContextManager[StepWatcher | None]:
    """What makes training checkpoints within the context, if the recipe asks for some; goes on from one first."""
    if checkpointing is None or not checkpointing.in_use:
        return nullcontext()
    fields = recipe_fingerprint(recipe.model_dump())
    model = run.model
    identity = {"model": model_fingerprint(model), "recipe": fields, "data": batches.fingerprint()}
    under_way = Run(model, optimizer, scheduler, batches, history, identity, recipe.steps, local=run.local)
    return checkpointing.watching(under_way, fields)


def _sparsity(targets: Sequence[Target]) -> float:
    """Fraction of zeros that is asked for, over all targets."""
    return 1 - sum(t.keep for t in targets) / sum(t.weight.numel() for t in targets)


def _default_learning_rate(steps: int, model: PreTrainedModel, targets: Sequence[Target]) -> float:
    width = getattr(model.config.get_text_config(), "hidden_size", None) or targets[0].weight.shape[1]
    sparsity = _sparsity(targets)
    rate = default_learning_rate(steps=steps, width=width, sparsity=sparsity)
    logger.info(f"lr is not set: using {rate:.2g}, for {steps} steps at width {width} and {sparsity:.0%} sparsity.")
    return rate


def _first_token(token: int | list[int] | None) -> int | None:
    return token[0] if isinstance(token, list) else token
