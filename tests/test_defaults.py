"""What a recipe that sets nothing gets, and the last values that are allowed: changes of these reach every user."""

import json

import pytest
from llmcompressor import oneshot
from llmcompressor.core import State
from llmcompressor.modifiers import Modifier

from elsa_modifier import ELSAModifier, MaskedGPTQModifier
from elsa_modifier.fields import Budget, Penalty, Tightening, TrainingObjective

DEFAULTS = dict(
    sparsity=0.9,
    mask_structure="unstructured",
    shared_budget=None,
    targets=["Linear"],
    ignore=["lm_head"],
    steps=4096,
    batch_size=8,
    gradient_accumulation_steps=1,
    sequence_length=2048,
    objective=dict(name="distill", weight=None, hidden_weight=3.0, temperature=1.0),
    lr=None,
    lr_schedule="linear",
    warmup_steps=0,
    betas=[0.9, 0.999],
    max_grad_norm=1.0,
    optimizer="adam",
    sparsity_schedule=dict(name="cubic", end=0.6),
    interval=None,
    penalty=dict(value=0.3, schedule="constant", form="decoupled", dual=False),
    projection="fisher",
    finalize_at=0.8,
    seed=0,
    precision="auto",
    weight_dtype="fp32",
    state_dtype="fp32",
    prune_unreached=False,
    gradient_release=False,
    offload_state=False,
    activation_checkpointing=False,
    checkpoint="dense",
    checkpoint_every=None,
    checkpoint_dir=None,
    checkpoint_keep=2,
    resume="auto",
    track=[],
)
QUICK = dict(sparsity=0.9, steps=1, batch_size=1, sequence_length=2)


def test_a_recipe_that_sets_only_the_sparsity():
    fields = ELSAModifier(sparsity=0.9).model_dump()
    assert {name: fields[name] for name in DEFAULTS} == DEFAULTS


def test_fields_that_have_fields():
    assert Penalty().model_dump() == DEFAULTS["penalty"]
    assert Tightening().model_dump() == DEFAULTS["sparsity_schedule"]
    assert TrainingObjective().model_dump() == DEFAULTS["objective"]
    assert Budget().model_dump() == dict(floor=0.0, cap=0.99)
    assert (MaskedGPTQModifier().refinements, MaskedGPTQModifier().fit_scales) == (4, True)


@pytest.mark.parametrize(
    "fields",
    [
        dict(sparsity=0.0),
        dict(sparsity={"a": 0.0, "b": 0.5}),
        dict(sparsity=0.5, mask_structure="2:4"),
        dict(steps=1, warmup_steps=0),
        dict(steps=2, warmup_steps=1),
        dict(batch_size=1, gradient_accumulation_steps=1, sequence_length=2, interval=1, seed=0),
        dict(betas=[0.0, 0.0]),
        dict(finalize=0.0),
        dict(finalize=1.0),
        dict(finalize_at=0.3),
        dict(penalty=dict(value=0.0)),
        dict(objective="next_token"),
        dict(objective=dict(weight=0.0)),
        dict(objective=dict(name="distill_hidden", weight=0.5)),
        dict(sparsity_schedule="linear"),
        dict(sparsity_schedule=dict(end=1.0)),
        dict(sparsity_schedule=dict(end=0.0)),
        dict(penalty=dict(value=1.0)),
        dict(penalty=dict(form="coupled", value=2.0)),
        dict(shared_budget=dict(floor=0.0, cap=1.0)),
        dict(targets="Linear", ignore="lm_head"),
    ],
    ids=str,
)
def test_the_last_values_that_are_allowed(fields):
    ELSAModifier(**dict(sparsity=0.9) | fields)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        (dict(gradient_accumulation_steps=0), "gradient_accumulation_steps"),
        (dict(warmup_steps=-1), "warmup_steps"),
        (dict(lr=float("inf")), "lr"),
        (dict(max_grad_norm=float("inf")), "max_grad_norm"),
        (dict(seed=-1), "seed"),
        (dict(betas=[0.9, 0.99, 0.999]), "betas"),
        (dict(betas=[-0.1, 0.9]), "betas"),
        (dict(finalize=-0.1), "finalize"),
        (dict(steps=2, warmup_steps=2), "warmup_steps"),
        (dict(penalty=dict(value=-0.1)), "penalty"),
        (dict(penalty=dict(free_support=True)), "free_support"),
        (dict(objective="kl"), "objective"),
        (dict(objective=dict(weight=1.1)), "weight"),
        (dict(objective=dict(temperature=0.0)), "temperature"),
        (dict(objective=dict(hidden_weight=0.0)), "hidden_weight"),
        (dict(sparsity_schedule="cosine"), "sparsity_schedule"),
        (dict(sparsity_schedule=dict(end=1.1)), "end"),
        (dict(penalty=dict(form="coupled", value=float("inf"))), "penalty"),
        (dict(shared_budget=dict(floor={"a": -0.1})), "shared_budget.floor"),
        (dict(shared_budget=dict(unknown=1)), "unknown"),
        (dict(mask_structure="2:4", sparsity=0.6), "leave"),
        (dict(split_dtype="int8"), "Set state_dtype instead"),
        (dict(checkpoint="zip"), "checkpoint"),
    ],
    ids=str,
)
def test_the_first_that_are_not(fields, name):
    with pytest.raises(ValueError, match=name):
        ELSAModifier(**dict(sparsity=0.9) | fields)


@pytest.mark.parametrize("refinements", [-1])
def test_refinements_that_are_not_allowed(refinements):
    with pytest.raises(ValueError, match="refinements"):
        MaskedGPTQModifier(refinements=refinements)
    assert MaskedGPTQModifier(refinements=0).refinements == 0


def test_history_holds_the_fields_and_nothing_of_the_lifecycle(load, texts, tmp_path):
    model = oneshot(model=load(), dataset=texts, recipe=[ELSAModifier(**QUICK)], output_dir=str(tmp_path))
    history = json.loads((tmp_path / "elsa_history.json").read_text())
    own = set(ELSAModifier.model_fields) - {name for name in Modifier.model_fields if name.endswith("_")}
    assert set(history["modifier"]) == own
    assert {name: history["modifier"][name] for name in DEFAULTS} == DEFAULTS | QUICK
    assert [step["step"] for step in history["steps"]] == [1] and model is not None


def test_a_state_without_data_has_no_loader(load):
    assert ELSAModifier._calibration_loader(State(model=load(), data=None)) is None
