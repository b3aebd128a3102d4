"""What a recipe's fields ask of the training run, seen from inside it: ``oneshot`` on tiny random models."""

import math

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier

from elsa_modifier import ELSAModifier

STEPS = 8
QUICK = dict(sparsity=0.5, steps=STEPS, batch_size=2, sequence_length=16, interval=3, lr=1e-3, precision="fp32")
# Not a teacher, whose passes would be seen as well.
QUICK |= dict(objective="next_token")


@pytest.fixture
def watched(before_first_step):
    """Function that has another called with the model and the optimizer before the first step."""

    def watched(watch):
        before_first_step(lambda run, targets, optimizer: watch(run.model, optimizer))

    return watched


def run(model, texts, others=(), **fields):
    modifier = ELSAModifier(**QUICK | fields)
    oneshot(model=model, dataset=texts, recipe=[modifier, *others])
    return modifier


def test_every_module_is_in_training_mode(load, texts, watched):
    modes = []

    def watching(model, _):
        model.register_forward_pre_hook(lambda *_: modes.append([m.training for m in model.modules()]))

    model = load("opt").eval()
    watched(watching)
    run(model, texts)
    assert len(modes) == STEPS and all(all(modules) for modules in modes)
    assert not any(module.training for module in model.modules())


def test_dropout_drops(load, texts):
    """OPT's is a part of its training: without it the losses are others."""
    dropped = run(load("opt"), texts)
    model = load("opt")
    model.config.dropout = 0.0
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    assert dropped.history[0].loss != run(model, texts).history[0].loss


@pytest.mark.parametrize(("fields", "passes"), [(dict(), 1), (dict(activation_checkpointing=True), 2)])
def test_checkpointed_layers_run_again_in_the_backward_pass(fields, passes, load, texts, watched):
    calls = []

    def watching(model, _):
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))

    model = load()
    watched(watching)
    run(model, texts, **fields)
    assert len(calls) == passes * STEPS * len(model.model.layers)


SCHEDULES = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "constant": lambda done: 1.0,
}


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_learning_rate_rises_and_falls_as_asked(schedule, warmup, load, texts, watched):
    used = []

    def watching(_, optimizer):
        optimizer.base.register_step_pre_hook(lambda base, *_: used.append(base.param_groups[0]["lr"]))

    watched(watching)
    modifier = run(load(), texts, lr_schedule=schedule, warmup_steps=warmup)
    falling = [SCHEDULES[schedule](i / (STEPS - warmup)) for i in range(STEPS - warmup)]
    expected = [1e-3 * factor for factor in [i / warmup for i in range(warmup)] + falling]
    assert [record.learning_rate for record in modifier.history] == pytest.approx(expected)
    assert used == pytest.approx(expected)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "adam8bit_sr", "adamfp8"])
def test_betas_are_the_optimizers(optimizer, load, texts, watched):
    found = []
    watched(lambda _, optimizer: found.extend(group["betas"] for group in optimizer.base.param_groups))
    run(load(), texts, optimizer=optimizer, betas=[0.7, 0.8])
    assert found and all(tuple(betas) == (0.7, 0.8) for betas in found)


@pytest.mark.parametrize("betas", [[0.9, 0.99], [0.8, 0.999]])
def test_each_of_the_betas_matters(betas, load, texts):
    losses = [[r.loss for r in run(load(), texts, betas=b).history] for b in ([0.9, 0.999], betas)]
    # The first step is the same with any betas, but for the rounding of what corrects the bias.
    assert losses[0][:2] == pytest.approx(losses[1][:2], rel=1e-6)
    assert losses[0][3:] != pytest.approx(losses[1][3:], rel=1e-6)


class Hooked(Modifier):
    """Has a hook on a layer from the beginning, as modifiers that smooth or observe do."""

    def on_initialize(self, state, **kwargs):
        self.register_hook(state.model.model.layers[0].mlp, lambda *_: SEEN.append(1), "forward")
        return True


SEEN = []


def test_hooks_of_other_modifiers_do_not_fire(load, texts, watched):
    SEEN.clear()
    seen_in_training = []

    def watching(model, _):
        model.register_forward_hook(lambda *_: seen_in_training.append(len(SEEN)))

    model = load()
    watched(watching)
    run(model, texts, others=[Hooked()])
    assert seen_in_training == [0] * STEPS
    before = len(SEEN)
    model(input_ids=torch.arange(8).view(1, 8))
    assert len(SEEN) == before + 1


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_layers_compute_in_the_precision(precision, dtype, load, texts, watched):
    dtypes = set()

    def watching(model, _):
        for layer in model.model.layers:
            layer.mlp.up_proj.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))

    watched(watching)
    run(load(), texts, precision=precision)
    assert dtypes == {dtype}


@pytest.mark.parametrize("release", [False, True])
def test_precision_changes_losses_a_little(release, load, texts):
    fields = dict(gradient_release=release, max_grad_norm=None)
    exact, rounded = (run(load(), texts, precision=p, **fields).history[0].loss for p in ("fp32", "bf16"))
    assert exact != rounded and rounded == pytest.approx(exact, rel=1e-2)
