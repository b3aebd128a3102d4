"""ELSAModifier: recipe fields, their validation, the lifecycle. The method is in ``admm``, the run in ``training``."""

import json
from typing import Any, Literal

import torch
from llmcompressor.core import Event, State, active_session
from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import AliasChoices, ConfigDict, Field, PrivateAttr, field_validator, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from elsa_modifier.admm.bitmask import unpack_bits
from elsa_modifier.admm.fisher import Projection
from elsa_modifier.admm.projection import parse_mask_structure
from elsa_modifier.admm.storage import StateDtype
from elsa_modifier.composition import check_recipe, check_unquantized, following, keep_in_recipe_file, trains
from elsa_modifier.deprecation import with_current_names
from elsa_modifier.fields import (
    CHANGED_FIELDS,
    Budget,
    CheckpointEvery,
    Penalty,
    Tightening,
    TrainingObjective,
)
from elsa_modifier.fused_experts import FusedLayout
from elsa_modifier.preflight import (
    check_values,
    frozen_parameters,
    refuse_launchers,
    refuse_on_ranks,
    refuse_unmatched,
)
from elsa_modifier.quantization.modifier import keep_zeros, release
from elsa_modifier.resuming.session import Checkpointing, checkpointing_of
from elsa_modifier.saved_keys import experts_to_fuse
from elsa_modifier.saving import check_output_directory, extend_save_pretrained, output_directory
from elsa_modifier.targets import Target, find_targets
from elsa_modifier.training.base_optimizer import (
    LOW_BIT_OPTIMIZERS,
    OFFLOADED_OPTIMIZERS,
    OptimizerName,
    check_optimizer,
)
from elsa_modifier.training.causality import refuse_encoder_decoder
from elsa_modifier.training.loop import StepRecord
from elsa_modifier.training.parallel import ParallelName
from elsa_modifier.training.precision import PrecisionField
from elsa_modifier.training.ranks import is_first_process, launched_ranks, ranks_of_this_run
from elsa_modifier.training.run import run_recipe
from elsa_modifier.zeros import put_zeros_back
from elsa_sparse.entry import Encoding

__all__ = ["ELSAModifier"]


class ELSAModifier(Modifier):
    """
    Prune a causal language model to extreme sparsity by ADMM on its next-token loss (ELSA, arXiv 2510.01650).

    Solves ``min f(x)`` subject to ``x`` sparse over the whole model: training with a penalty that pulls the weights
    towards a sparse copy of themselves, whose support is chosen anew from time to time, and that is at last fixed.
    Embeddings, norms and ``lm_head`` are trained along, unless ``requires_grad`` is False, and stay dense.

    Sample yaml:

    ```yaml
    prune_stage:
      prune_modifiers:
        ELSAModifier:
          sparsity: 0.9
    ```

    Lifecycle:

    - on_initialize
        - find the weights to prune; refuse what cannot work before anything is changed
    - on_calibration_start
        - train: loss, clipping, optimizer, proximal step, z- and u-updates; then with the mask fixed
    - on_finalize
        - put every zero back that a later modifier lost, and count
        - have ``save_pretrained`` write the history (``elsa_history.json``) beside the model

    :param sparsity: fraction of zeros in every target, 0 <= sparsity < 1; or a mapping of name patterns (``re:`` as in
        ``targets``) to such fractions, of which the first that matches decides. Not needed for an ``N:M`` structure
    :param mask_structure: ``unstructured``, or ``N:M``: N zeros in every M weights along the input dimension
    :param shared_budget: see :class:`~elsa_modifier.fields.Budget`; None shares where nothing says what each target
        has (one ``sparsity`` for all, unstructured). False makes every target as sparse as ``sparsity`` says
    :param targets: modules to prune: names, classes, or ``re:`` patterns
    :param ignore: modules of those that stay dense
    :param prune_unreached: prune targets that have no gradient in the whole run too (a vision tower, an expert without
        a token), by magnitude. Otherwise they stay as they were, and a warning names them
    :param steps: optimizer steps
    :param batch_size: sequences in a forward pass; a DataLoader of your own brings its own
    :param gradient_accumulation_steps: forward passes in an optimizer step
    :param sequence_length: tokens in a sequence; at most what the model's positions allow
    :param objective: see :class:`~elsa_modifier.fields.TrainingObjective`; its name will do
    :param lr: peak learning rate; None chooses one from the steps, the model's width and the sparsity
    :param lr_schedule: ``linear`` or ``cosine`` to 0, or ``constant``, after the warm-up
    :param warmup_steps: optimizer steps over which the learning rate rises from 0
    :param betas: Adam's two decay rates
    :param max_grad_norm: clip the global norm of the loss gradient to this; None does not clip
    :param optimizer: ``adam`` or ``adamw`` (which decays weights by torch's default of 0.01); ``adam8bit_sr``, with
        moments in 8 bits, stochastically rounded; or torchao's in few bits: ``adam8bit``, ``adam4bit``, ``adamfp8``
    :param sparsity_schedule: see :class:`~elsa_modifier.fields.Tightening`; its name will do
    :param interval: optimizer steps between z- and u-updates; None is the published 32, and fewer in a run too short
        for 25 updates
    :param penalty: see :class:`~elsa_modifier.fields.Penalty`
    :param projection: ``fisher`` keeps the weights with the largest ``F x^2``, ``magnitude`` with the largest ``|x|``
    :param finalize: fraction of the steps after which the mask is fixed; the rest trains the kept weights alone. Also
        accepted, and written to recipe.yaml, as ``finalize_at``, since a modifier's ``finalize`` is a method
    :param seed: of the order of the data and of dropout
    :param precision: of the forward and backward pass: ``bf16`` (autocast), ``fp32``, or ``auto``: bf16 where the
        processor multiplies it
    :param weight_dtype: what weights and gradients are held in: ``fp32``, or ``bf16`` with stochastic rounding (norms
        and biases stay fp32), which needs an ``optimizer`` with moments in few bits
    :param state_dtype: what ``z`` and ``u`` are stored in, where they have to be (a dual, or the coupled form):
        ``fp32``, ``bf16``, ``float8_e4m3fn``, ``float8_e5m2`` or ``int8``
    :param gradient_release: step inside the backward pass, so that gradients are never all alive; needs
        ``max_grad_norm: null`` and no gradient accumulation
    :param offload_state: keep Adam's moments and ``z`` and ``u`` in main memory, and bring them to the GPU weight by
        weight; with torch's Adam or ``adam8bit_sr``, in one process
    :param activation_checkpointing: keep the inputs of each layer alone, and run it again in the backward pass
    :param parallel: what several processes, started by torchrun, do: with ``fsdp`` each holds a part of every matrix,
        of its gradient and of all states (FSDP2); with ``ddp`` each holds all. ``batch_size`` counts over all of them
    :param checkpoint: how ``output_dir`` and ``save_pretrained`` write the model: ``dense``, as ever, or in the sparse
        format of :mod:`elsa_sparse`, ``coded`` (smallest) or ``bitmask``. The fields below are of something else, what
        a run that was stopped goes on from (docs/resuming.md)
    :param checkpoint_every: how often a training checkpoint is made, ``{steps: 100}`` or ``{minutes: 10}``, and with it
        whether at all
    :param checkpoint_dir: where; None is beside ``output_dir``, with ``-training`` at the end of its name
    :param checkpoint_keep: how many stay, the last ones
    :param resume: ``auto`` goes on from the last training checkpoint in ``checkpoint_dir`` if there is one, ``never``
        from none, and a path from that one
    :param track: trackers of accelerate that are told of every step: ``tensorboard``, ``wandb``, ``trackio`` and others
    """

    model_config = ConfigDict(extra="forbid")

    sparsity: float | dict[str, float] | None = None
    mask_structure: str = "unstructured"
    shared_budget: Budget | Literal[False] | None = None
    targets: list[str] = Field(default_factory=lambda: ["Linear"])
    ignore: list[str] = Field(default_factory=lambda: ["lm_head"])
    prune_unreached: bool = False
    steps: int = Field(4096, ge=1)
    batch_size: int = Field(8, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    sequence_length: int = Field(2048, ge=2)
    objective: TrainingObjective = Field(default_factory=TrainingObjective)
    lr: float | None = Field(None, gt=0, allow_inf_nan=False)
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = Field(0, ge=0)
    betas: list[float] = Field(default_factory=lambda: [0.9, 0.999], min_length=2, max_length=2)
    max_grad_norm: float | None = Field(1.0, gt=0, allow_inf_nan=False)
    optimizer: OptimizerName = "adam"
    sparsity_schedule: Tightening = Field(default_factory=Tightening)
    interval: int | None = Field(None, ge=1)
    penalty: Penalty = Field(default_factory=Penalty)
    projection: Projection = "fisher"
    finalize_at: float = Field(0.8, ge=0, le=1, validation_alias=AliasChoices("finalize", "finalize_at"))
    seed: int = Field(0, ge=0)
    precision: PrecisionField = "auto"
    weight_dtype: Literal["fp32", "bf16"] = "fp32"
    state_dtype: StateDtype = "fp32"
    gradient_release: bool = False
    offload_state: bool = False
    activation_checkpointing: bool = False
    parallel: ParallelName = "fsdp"
    checkpoint: Encoding = "dense"
    checkpoint_every: CheckpointEvery | None = None
    checkpoint_dir: str | None = None
    checkpoint_keep: int = Field(2, ge=1)
    resume: str = Field("auto", min_length=1)
    track: list[str] = Field(default_factory=list)

    _history: list[StepRecord] = PrivateAttr(default_factory=list)
    _masks: dict[str, tuple[Tensor, torch.Size]] = PrivateAttr(default_factory=dict)
    _unreached: list[str] = PrivateAttr(default_factory=list)
    _experts: dict[str, FusedLayout] = PrivateAttr(default_factory=dict)
    _frozen: frozenset[str] = PrivateAttr(default_factory=frozenset)
    _later: list[Modifier] = PrivateAttr(default_factory=list)
    _checkpointing: Checkpointing | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _has_current_names(cls, values: Any) -> Any:
        return with_current_names(values, CHANGED_FIELDS)

    @field_validator("targets", "ignore", "track", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("betas")
    @classmethod
    def _are_decay_rates(cls, value: list[float]) -> list[float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"betas is {value}; allowed are two numbers from 0 up to, not including, 1")
        return value

    @model_validator(mode="after")
    def _is_consistent(self) -> "ELSAModifier":
        structure = parse_mask_structure(self.mask_structure)
        fractions = self.sparsity if isinstance(self.sparsity, dict) else {"": self.sparsity}
        for pattern, fraction in fractions.items():
            where = f"sparsity[{pattern!r}]" if pattern else "sparsity"
            if fraction is not None and not 0 <= fraction < 1:
                raise ValueError(f"{where} is {fraction}; allowed is 0 up to, not including, 1: the fraction of zeros")
        if structure.is_unstructured and not self.sparsity and self.sparsity != 0.0:
            raise ValueError(
                "sparsity is not set; give the fraction of zeros, for example 0.9, or an N:M mask_structure"
            )
        if not structure.is_unstructured and self.sparsity is not None and self.sparsity != structure.sparsity:
            raise ValueError(
                f"sparsity is {self.sparsity}, but mask_structure {structure} always has {structure.sparsity}; leave "
                "sparsity out"
            )
        if not structure.is_unstructured and self.shared_budget:
            raise ValueError(
                f"shared_budget is set, but mask_structure {structure} decides how many zeros each weight has; leave "
                "one of the two out"
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; allowed is less than steps, {self.steps}")
        return self

    @model_validator(mode="after")
    def _fits_in_memory_as_asked(self) -> "ELSAModifier":
        if self.weight_dtype == "bf16" and self.optimizer not in LOW_BIT_OPTIMIZERS:
            raise ValueError(
                f"weight_dtype is 'bf16' and optimizer {self.optimizer!r}, which would lose small updates to rounding; "
                f"use one that rounds stochastically: {', '.join(LOW_BIT_OPTIMIZERS)}"
            )
        if self.weight_dtype == "bf16" and self.precision == "fp32":
            raise ValueError("weight_dtype is 'bf16' and precision 'fp32'; a bf16 model computes in bf16")
        if self.gradient_release and self.max_grad_norm is not None:
            raise ValueError(
                "gradient_release steps before all gradients are known, so their global norm cannot be clipped: set "
                "max_grad_norm to null, or gradient_release to false"
            )
        if self.gradient_release and self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"gradient_release steps in every backward pass, so gradient_accumulation_steps must be 1, not "
                f"{self.gradient_accumulation_steps}; activation_checkpointing makes room for a larger batch_size"
            )
        if self.offload_state and self.optimizer not in OFFLOADED_OPTIMIZERS:
            raise ValueError(
                f"offload_state is true and optimizer {self.optimizer!r}, whose moments stay where weights are; use "
                f"one of {', '.join(OFFLOADED_OPTIMIZERS)}"
            )
        check_optimizer(self.optimizer)
        return self

    @property
    def history(self) -> list[StepRecord]:
        """One record an optimizer step, in order."""
        return self._history

    @property
    def masks(self) -> dict[str, Tensor]:
        """After training: kept entries of each pruned module's weight, bool, by module name, on the CPU."""
        return {name: unpack_bits(bits, shape) for name, (bits, shape) in self._masks.items()}

    @property
    def unreached(self) -> list[str]:
        """After training: the targets that had no gradient and were left as they were."""
        return self._unreached

    def targets_in(self, model: PreTrainedModel) -> list[Target]:
        """What would be pruned of a model, of which shapes are enough, and how much.

        :raises ValueError: if it has no such targets, or sparsity and shared_budget do not go together in it
        """
        refuse_unmatched(model, targets=self.targets, ignore=self.ignore)
        targets = self._find_targets(model)
        if budget := self._budget():
            budget.among(targets)
        return targets

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check model, data and recipe against each other, before the first step of any modifier.

        :raises ValueError, OSError: if the run cannot work; the message says which field to change
        """
        refuse_launchers()
        refuse_encoder_decoder(state.model)
        targets = self.targets_in(state.model)
        self._frozen = frozen_parameters(state.model, targets)
        if self._calibration_loader(state) is None:
            raise ValueError("ELSAModifier trains and needs text: pass dataset= to oneshot")
        recipe = active_session().lifecycle.recipe.modifiers
        check_recipe(recipe, state.model)
        whole = self.gradient_release and self.parallel == "ddp"
        ranks = launched_ranks()
        refuse_on_ranks(recipe, whole_gradients_released=whole, offloaded=self.offload_state, ranks=ranks)
        check_unquantized(state.model)
        check_values(state.model)
        self._experts = experts_to_fuse(state.model)
        if is_first_process():
            check_output_directory(state.model, self.checkpoint, [other for other in recipe if other is not self])
        # Two modifiers with the same fields are equal.
        place = [id(other) for other in recipe if trains(other)].index(id(self))
        self._checkpointing = checkpointing_of(self, place, output_directory())
        keep_in_recipe_file(recipe)
        self._later = following(self, recipe)
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Train, and leave the pruned weights in the model.

        :raises TrainingDiverged: at the first loss that is not finite
        :raises RankFailed: if another process of this run failed first
        """
        model: PreTrainedModel = state.model
        # A pipeline for all modifiers instead of one for each trains at its start, before any other has done its work.
        check_recipe(sorted(active_session().lifecycle.recipe.modifiers, key=lambda m: not trains(m)), model)
        with ranks_of_this_run() as ranks:
            masks = run_recipe(
                self,
                model,
                self._calibration_loader(state),
                ranks,
                frozen=self._frozen,
                checkpointing=self._checkpointing,
                history=self._history,
            )
        self._masks, self._unreached = masks.kept, masks.unreached
        keep_zeros(self._later)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Put back every zero that a later modifier lost, and have the history saved with the model.

        :raises RuntimeError: if a pruned weight is still not zero
        """
        if not self._masks:
            raise RuntimeError("ELSAModifier has not trained: its calibration never started")
        release(self._later)
        if any(trains(modifier) for modifier in self._later):
            # That one has chosen zeros, and a history to save, anew.
            return True
        pruned, lost = put_zeros_back(state.model, self._masks)
        message = f"ELSA: {pruned:,} pruned weights; zero before {pruned - lost:,}, after {pruned:,}"
        if self._unreached:
            message += f"; {len(self._unreached)} targets without a gradient are as they were"
        if lost:
            logger.warning(f"{message}. A later modifier had brought {lost:,} back.")
        elif is_first_process():
            logger.info(message)
        extend_save_pretrained(
            state.model,
            history=self._history_json(state.model),
            checkpoint=self.checkpoint,
            experts=self._experts,
            first=is_first_process(),
        )
        return True

    def _find_targets(self, model: PreTrainedModel) -> list[Target]:
        structure = parse_mask_structure(self.mask_structure)
        sparsity = structure.sparsity if self.sparsity is None else self.sparsity
        assert sparsity is not None
        return find_targets(model, targets=self.targets, ignore=self.ignore, sparsity=sparsity, structure=structure)

    def _budget(self) -> Budget | None:
        if self.shared_budget is not None:
            return self.shared_budget or None
        if isinstance(self.sparsity, float) and parse_mask_structure(self.mask_structure).is_unstructured:
            return Budget(cap=max(0.99, self.sparsity))
        return None

    @staticmethod
    def _calibration_loader(state: State) -> Any:
        return None if state.data is None else state.data.calib

    def _history_json(self, model: PreTrainedModel) -> str:
        recipe = {k: v for k, v in self.model_dump().items() if not k.endswith("_")}
        return json.dumps(
            {
                "model": model.config.name_or_path,
                "modifier": recipe,
                "unreached": self._unreached,
                "steps": [record.as_dict() for record in self._history],
            },
            indent=1,
        )
