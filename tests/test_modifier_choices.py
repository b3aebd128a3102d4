"""What ELSAModifier decides itself where a recipe leaves it open, and what it puts right at the end."""

from types import SimpleNamespace

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier

from elsa_modifier import ELSAModifier
from elsa_modifier.targets import find_targets, fractions_of
from elsa_modifier.training.learning_rate import default_learning_rate
from elsa_modifier.training.run import _default_learning_rate, _first_token
from tests.test_modifier import linears

QUICK = dict(sparsity=0.5, steps=4, batch_size=2, sequence_length=16, precision="fp32")


def run(model, texts, others=(), **fields):
    modifier = ELSAModifier(**QUICK | fields)
    oneshot(model=model, dataset=texts, recipe=[modifier, *others])
    return modifier.history


def test_the_learning_rate_follows_steps_width_and_what_is_pruned(load, texts):
    (first, *_) = run(load(), texts, sparsity={"re:.*up_proj": 0.9, "re:.*down_proj": 0.7})
    assert first.learning_rate == pytest.approx(default_learning_rate(steps=4, width=32, sparsity=0.8), rel=1e-3)
    assert run(load(), texts, lr=3e-4)[0].learning_rate == 3e-4


def test_a_model_without_a_width_has_that_of_its_first_target():
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
    weights = [
        SimpleNamespace(weight=torch.zeros(10, 128), size=1280, keep=128),
        SimpleNamespace(weight=torch.zeros(8, 64), size=512, keep=51),
    ]
    found = _default_learning_rate(4, SimpleNamespace(config=config), weights)
    assert found == default_learning_rate(steps=4, width=128, sparsity=1 - 179 / (1280 + 512))


@pytest.mark.parametrize(("asked", "used"), [(2, 2), (63, 63), (64, 64), (65, 64), (2048, 64)])
def test_sequences_are_no_longer_than_the_model_s_positions(asked, used, load, texts):
    assert run(load(), texts, steps=1, sequence_length=asked)[0].tokens == 2 * (used - 1)


@pytest.mark.parametrize(
    ("fields", "updates"),
    [
        (dict(steps=10), [1, 2, 3, 4, 5, 6, 7, 8]),
        (dict(steps=63), [*range(1, 51, 2), 50]),
        (dict(steps=10, interval=4), [1, 5, 8]),
        (dict(steps=10, finalize=0.0), []),
        (dict(steps=10, finalize=1.0, interval=8), [1, 9, 10]),
        (dict(steps=7, finalize=0.5, interval=8), [1, 4]),
    ],
    ids=str,
)
def test_a_short_run_has_25_updates(fields, updates, load, texts):
    history = run(load(), texts, **fields)
    assert [record.step for record in history if record.residual is not None] == updates
    fixed = updates[-1] if updates else 1
    assert [record.sparsity > 0 for record in history] == [record.step >= fixed for record in history]


@pytest.mark.parametrize(("token", "first"), [(None, None), (7, 7), ([5, 6], 5)])
def test_the_first_of_several_tokens_ends_documents(token, first):
    assert _first_token(token) == first


class Reviving(Modifier):
    """Fills a weight after it was pruned, as a quantizer that knows no mask does to single entries."""

    def on_initialize(self, state, **kwargs):
        return True

    def on_calibration_start(self, state, event, **kwargs):
        with torch.no_grad():
            state.model.model.layers[1].mlp.up_proj.weight.fill_(3.0)


def test_zeros_that_a_later_modifier_lost_are_put_back(load, texts):
    modifier = ELSAModifier(**QUICK)
    model = oneshot(model=load(), dataset=texts, recipe=[modifier, Reviving()])
    for name, module in linears(model).items():
        mask = modifier.masks[name]
        assert torch.equal(module.weight != 0, mask), name
        assert (module.weight[mask] == 3.0).all() == (name == "model.layers.1.mlp.up_proj")


def test_each_weight_is_a_target_once_and_the_first_pattern_decides(load):
    from elsa_modifier.admm.projection import MaskStructure

    model = load()
    # A second name for the same weight.
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    sparsity = {"re:.*up_proj": 0.9, "re:.*mlp.*": 0.5}
    found = find_targets(model, targets=["Linear"], ignore=["lm_head"], sparsity=sparsity, structure=MaskStructure())
    names = {target.name: target for target in found}
    assert [name for name in names if "up_proj" in name] == ["model.layers.0.mlp.up_proj"]
    assert {name.split(".")[-1] for name in names} == {"up_proj", "gate_proj", "down_proj"}
    size = 32 * 48
    kept = {name: target.keep for name, target in names.items()}
    assert all(keep == size - round((0.9 if "up_proj" in name else 0.5) * size) for name, keep in kept.items())
    fractions = fractions_of(found, "field", {"re:.*layers.1.*": 0.3, "re:.*down_proj": 0.2}, default=0.1)
    expected = [0.3 if ".1." in t.name else 0.2 if "down_proj" in t.name else 0.1 for t in found]
    assert fractions == expected and fractions_of(found, "field", 0.4, default=0.1) == [0.4] * len(found)


@pytest.mark.parametrize(("structure", "kept"), [((2, 4), 0.5), ((1, 4), 0.75), ((4, 8), 0.5), ((3, 8), 0.625)])
def test_structures_keep_their_share(structure, kept, load):
    from elsa_modifier.admm.projection import MaskStructure

    found = find_targets(
        load(), targets=["Linear"], ignore=["lm_head"], sparsity=0.0, structure=MaskStructure(*structure)
    )
    assert all(target.keep == kept * target.weight.numel() for target in found) and len(found) == 14
