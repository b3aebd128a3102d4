"""Fields of ELSAModifier that have fields of their own."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator
from transformers import PreTrainedModel

from elsa_modifier.admm.budget import SharedBudget
from elsa_modifier.admm.constraint import SparsityScheduleName
from elsa_modifier.admm.penalty import PenaltyForm, ScheduleName
from elsa_modifier.admm.storage import StateDtype
from elsa_modifier.deprecation import Removed, Renamed, with_current_names
from elsa_modifier.targets import Target, fractions_of
from elsa_modifier.training.distillation import Distillation, copy_as_teacher, default_teacher_weight
from elsa_modifier.training.objective import Objective, next_token_loss

__all__ = [
    "CHANGED_FIELDS",
    "Budget",
    "CheckpointEvery",
    "ObjectiveName",
    "Penalty",
    "Tightening",
    "TrainingObjective",
]

_ONE_TENSOR = Removed(
    "one tensor holds dual and split here, in one format. Set state_dtype instead, to the more precise of the two; "
    f"allowed are {', '.join(get_args(StateDtype))}"
)
# The paper's way to name formats, one of u and one of z.
CHANGED_FIELDS: dict[str, Renamed | Removed] = {"dual_dtype": _ONE_TENSOR, "split_dtype": _ONE_TENSOR}
_CHANGED_IN_PENALTY: dict[str, Renamed | Removed] = {
    "free_support": Removed(
        "kept weights move freely in the decoupled form, and are held to their copy in the coupled one. Leave it out, "
        "and choose penalty.form"
    ),
}

ObjectiveName = Literal["next_token", "distill", "distill_hidden", "reconstruction"]


class _Named(BaseModel):
    """A field that may be its name alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _may_be_a_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class TrainingObjective(_Named):
    """What is minimized: ``next_token`` alone, or with the dense model, as it was before the run, for a teacher.

    :param name: ``next_token``, its cross-entropy; ``distill`` = (1 - weight) x next_token + weight x KL divergence to
        the teacher's distribution over the whole vocabulary; ``distill_hidden`` = the same + hidden_weight x relative
        squared error of every layer's hidden states; ``reconstruction``, that error alone
    :param weight: of the KL divergence, 0 to 1; None is 0.5 up to a sparsity of 50%, 1 from 80%, and between the
        two in proportion
    :param hidden_weight: of the hidden states' error
    :param temperature: of both distributions
    """

    name: ObjectiveName = "distill"
    weight: float | None = Field(None, ge=0, le=1)
    hidden_weight: float = Field(3.0, gt=0, allow_inf_nan=False)
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)

    @property
    def has_teacher(self) -> bool:
        """Whether a copy of the dense model is kept for the run."""
        return self.name != "next_token"

    def of(
        self, model: PreTrainedModel, teacher: Callable[[], PreTrainedModel] | None = None, *, sparsity: float
    ) -> Objective:
        """The objective for training ``model``, of which a teacher is copied now, by ``teacher`` if that is given.

        :param sparsity: fraction of zeros over all pruned weights
        """
        if not self.has_teacher:
            return next_token_loss
        has_head = self.name != "reconstruction"
        weight = default_teacher_weight(sparsity) if self.weight is None else self.weight
        return Distillation(
            copy_as_teacher(model) if teacher is None else teacher(),
            next_token=(1 - weight) * has_head,
            logits=weight * has_head,
            hidden=self.hidden_weight * (self.name != "distill"),
            temperature=self.temperature,
        )


class CheckpointEvery(BaseModel):
    """How often a training checkpoint is made; one of the two, and always after the last step.

    :param steps: optimizer steps from one to the next
    :param minutes: the least time from one to the next
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int | None = Field(None, ge=1)
    minutes: float | None = Field(None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _is_one_of_them(self) -> "CheckpointEvery":
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("checkpoint_every takes one of steps and minutes, for example {minutes: 10}")
        return self


class Tightening(_Named):
    """How the constraint tightens over the run.

    :param name: ``constant``, all zeros are asked for from the start; ``linear`` or ``cubic``, from none to all
    :param end: the fraction of the steps after which all are; at the latest when the mask is fixed
    """

    name: SparsityScheduleName = "cubic"
    end: float = Field(0.6, ge=0, le=1)


class Penalty(BaseModel):
    """What holds the weights to their sparse copy.

    :param value: final penalty. Decoupled: ``rho``, the fraction of the gap closed in every step, 0 to 1.
        Coupled: ``lam``, any non-negative number; what the paper prints was divided by the authors' number of GPUs
    :param schedule: ``constant``, or growing to ``value`` until the mask is fixed: ``linear`` or ``cosine`` from 0,
        ``exponential`` from a thousandth of it
    :param form: ``decoupled`` takes the proximal step after the optimizer's, like decoupled weight decay;
        ``coupled`` adds its gradient to the loss gradient, as published, and holds kept weights to their copy as well
    :param dual: whether the decoupled form has one (docs/method.md says when it helps); the coupled form always has
    """

    model_config = ConfigDict(extra="forbid")

    value: float = Field(0.3, ge=0, allow_inf_nan=False)
    schedule: ScheduleName = "constant"
    form: PenaltyForm = "decoupled"
    dual: bool = False

    @model_validator(mode="before")
    @classmethod
    def _has_current_names(cls, value: Any) -> Any:
        return with_current_names(value, _CHANGED_IN_PENALTY, "penalty.")

    @model_validator(mode="after")
    def _fits_its_form(self) -> "Penalty":
        if self.form == "decoupled" and self.value > 1:
            raise ValueError(f"penalty.value is {self.value}; the decoupled form allows 0 to 1, a fraction per step")
        if self.form == "coupled" and "value" not in self.model_fields_set:
            raise ValueError(
                "penalty.value is not set; the coupled form has no default that fits every model (try 1e-3)"
            )
        return self


class Budget(BaseModel):
    """All targets together keep as many weights as ``sparsity`` says, and one threshold decides which.

    Layers that matter more keep more. Each fraction is of zeros in a target, one for all or by name patterns, of which
    the first that matches decides; targets that none matches have the default.

    :param floor: the least of a target; default 0
    :param cap: the largest of a target; default 0.99
    """

    model_config = ConfigDict(extra="forbid")

    floor: float | dict[str, float] = 0.0
    cap: float | dict[str, float] = 0.99

    @model_validator(mode="after")
    def _are_fractions(self) -> "Budget":
        for name, value in (("floor", self.floor), ("cap", self.cap)):
            for fraction in value.values() if isinstance(value, dict) else [value]:
                if not 0 <= fraction <= 1:
                    raise ValueError(f"shared_budget.{name} is {fraction}; allowed is 0 to 1, a fraction of zeros")
        return self

    def among(self, targets: Sequence[Target]) -> SharedBudget:
        """The budget of these targets, whose ``keep`` says what they have together.

        :raises ValueError: if a pattern matches no target, or floor and cap do not allow what they have together
        """
        budget = SharedBudget(
            floor=fractions_of(targets, "shared_budget.floor", self.floor, default=0.0),
            cap=fractions_of(targets, "shared_budget.cap", self.cap, default=0.99),
        )
        sizes, keep = [t.weight.numel() for t in targets], sum(t.keep for t in targets)
        fewest, most = map(sum, budget.limits(sizes))
        if not fewest <= keep <= most:
            zeros = 1 - keep / sum(sizes)
            raise ValueError(
                f"shared_budget.floor and .cap allow a sparsity of {1 - most / sum(sizes):.4g} to "
                f"{1 - fewest / sum(sizes):.4g}, and sparsity asks for {zeros:.4g}; widen them"
            )
        return budget
