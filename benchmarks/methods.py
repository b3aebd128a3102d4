"""The ways to reach a sparsity that ``compare_methods`` compares, each a line of ``METHODS``.

Every method goes through ``oneshot`` and gets the same tokens of the same documents (see ``benchmarks.models``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

from benchmarks.baselines.alps import ALPSModifier
from benchmarks.baselines.gradual import GradualPruningModifier
from benchmarks.baselines.l_admm import LADMMModifier
from benchmarks.baselines.masked_finetuning import MaskedFinetuningModifier
from benchmarks.baselines.safe import SAFEModifier
from benchmarks.measuring import ROOT
from benchmarks.models import BenchmarkModel
from elsa_modifier import ELSAModifier
from elsa_modifier.admm import parse_mask_structure
from elsa_modifier.training.distillation import default_teacher_weight

__all__ = ["METHODS", "Method", "Setting"]


@dataclass(frozen=True)
class Setting:
    """What one modifier is made for.

    :param sparsity: a fraction, or an ``N:M`` structure
    :param lr: peak learning rate; None for methods that are not tuned
    """

    model: BenchmarkModel
    sparsity: float | str
    lr: float | None = None
    seed: int = 0

    @property
    def fraction(self) -> float:
        """Of zeros."""
        structure = parse_mask_structure(self.sparsity) if isinstance(self.sparsity, str) else None
        fraction = structure.sparsity if structure else self.sparsity
        assert isinstance(fraction, float)
        return fraction

    @property
    def learning_rates(self) -> list[float]:
        """Those to try."""
        return self.model.learning_rates(self.fraction)

    @property
    def structure(self) -> str:
        return self.sparsity if isinstance(self.sparsity, str) else "unstructured"

    @property
    def training(self) -> dict[str, Any]:
        """Fields of a modifier that trains."""
        return {"sparsity": self.fraction, "lr": self.lr, "seed": self.seed} | self.model.budget


@dataclass(frozen=True)
class Method:
    """A way to prune.

    :param make: the modifier for a setting, or several in order; None prunes by magnitude
    :param tuned: whether several learning rates are tried, of which the best counts
    :param seeded: whether another seed gives another result
    :param structured: whether it can do an ``N:M`` structure
    :param fits: whether there is anything to measure in a setting
    """

    make: Callable[[Setting], Any]
    tuned: bool = False
    seeded: bool = False
    structured: bool = False
    fits: Callable[[Setting], bool] = lambda setting: True


def _elsa(setting: Setting, **fields: Any) -> ELSAModifier:
    pattern = {"sparsity": setting.fraction, "mask_structure": setting.structure}
    return ELSAModifier(**pattern, **setting.model.budget, seed=setting.seed, **fields)


def _layer_wise(setting: Setting) -> dict[str, Any]:
    structure = "0:0" if setting.structure == "unstructured" else setting.structure
    return {
        "sparsity": setting.fraction,
        "mask_structure": structure,
        "targets": ["Linear"],
        "ignore": ["re:.*lm_head"],
    }


def _finetuning(setting: Setting, **fields: Any) -> MaskedFinetuningModifier:
    """Of what the modifiers before it have pruned, on windows of the same text."""
    training = {name: value for name, value in setting.training.items() if name != "sparsity"}
    return MaskedFinetuningModifier(**training, **fields)


def _taught(setting: Setting) -> dict[str, Any]:
    """Fields of a baseline whose teacher is to count as much as ELSA's."""
    return {"objective": "distill", "weight": default_teacher_weight(setting.fraction)}


def _published_recipe(setting: Setting) -> Path:
    """Of the paper's OPT-125M, the smallest published model."""
    name = f"{round(setting.fraction * 100)}" if setting.structure == "unstructured" else setting.structure
    return ROOT / "recipes" / "paper" / "opt-125m" / f"elsa_{name.replace(':', 'of')}.yaml"


def _published(setting: Setting) -> ELSAModifier:
    """All that the recipe says but the budget. One GPU: lam as printed."""
    recipe = yaml.safe_load(_published_recipe(setting).read_text())
    fields: dict[str, Any] = recipe["prune_stage"]["prune_modifiers"]["ELSAModifier"]
    return ELSAModifier(**(fields | setting.model.budget | {"seed": setting.seed}))


METHODS: dict[str, Method] = {
    "magnitude": Method(lambda s: None, structured=True),
    "Wanda": Method(lambda s: WandaPruningModifier(**_layer_wise(s)), structured=True),
    "SparseGPT": Method(lambda s: SparseGPTModifier(**_layer_wise(s)), structured=True),
    "L-ADMM": Method(lambda s: LADMMModifier(sparsity=s.fraction)),
    "ALPS": Method(lambda s: ALPSModifier(sparsity=s.fraction)),
    "magnitude + finetuning": Method(
        lambda s: _elsa(s, finalize=0.0, objective="next_token", shared_budget=False, lr=s.lr),
        tuned=True,
        seeded=True,
        structured=True,
    ),
    "SparseGPT + finetuning": Method(
        lambda s: [SparseGPTModifier(**_layer_wise(s)), _finetuning(s)],
        tuned=True,
        seeded=True,
        structured=True,
    ),
    "ALPS + distilled finetuning": Method(
        lambda s: [ALPSModifier(sparsity=s.fraction), _finetuning(s, **_taught(s))], tuned=True, seeded=True
    ),
    "SAFE+": Method(lambda s: SAFEModifier(activation=True, **s.training), tuned=True, seeded=True),
    "gradual magnitude": Method(lambda s: GradualPruningModifier(fisher=False, **s.training), tuned=True, seeded=True),
    "gradual Fisher": Method(lambda s: GradualPruningModifier(fisher=True, **s.training), tuned=True, seeded=True),
    "gradual Fisher, distilled": Method(
        lambda s: GradualPruningModifier(fisher=True, objective="distill", **s.training), tuned=True, seeded=True
    ),
    # From 80% on the same as the one before.
    "gradual Fisher, ELSA's objective": Method(
        lambda s: GradualPruningModifier(fisher=True, **_taught(s), **s.training),
        tuned=True,
        seeded=True,
        fits=lambda s: s.fraction < 0.8,
    ),
    "ELSA as published": Method(_published, seeded=True, structured=True, fits=lambda s: _published_recipe(s).exists()),
    "ELSA": Method(_elsa, seeded=True, structured=True),
}
