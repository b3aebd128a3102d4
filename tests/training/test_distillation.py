"""Objectives with a teacher against the same written out token by token."""

import contextlib
import copy

import pytest
import torch

from elsa_modifier.training import distillation, objective, precision
from elsa_modifier.training.distillation import Distillation, copy_as_teacher
from elsa_modifier.training.layers import layer_outputs
from elsa_modifier.training.objective import next_token_loss
from tests.reference.objective import distilled_loss
from tests.training.test_objective import WORDS, batch, build, differentiated

WEIGHTS = {
    "distill": dict(next_token=0.5, logits=0.5, hidden=0.0, temperature=1.0),
    "warm": dict(next_token=0.3, logits=0.7, hidden=0.0, temperature=2.0),
    "divergence alone": dict(next_token=0.0, logits=1.0, hidden=0.0, temperature=1.0),
    "hidden": dict(next_token=0.25, logits=0.75, hidden=3.0, temperature=1.0),
    "reconstruction": dict(next_token=0.0, logits=0.0, hidden=2.0, temperature=1.0),
}


@pytest.fixture
def exact_teacher(monkeypatch):
    """A teacher in fp32, so that nothing is rounded."""
    monkeypatch.setattr(distillation, "trained_dtype", lambda *_: torch.float32)
    monkeypatch.setattr(distillation.torch, "autocast", lambda *_, **__: contextlib.nullcontext())


def pair(name="llama"):
    """A model that has moved away from its teacher."""
    model = build(name)
    teacher = copy_as_teacher(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, teacher


@contextlib.contextmanager
def but_the_last(model):
    with layer_outputs(model) as found:
        yield found
        del found[-1]


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=list(WEIGHTS))
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2"])
@pytest.mark.parametrize("in_chunks", [False, True])
def test_agrees_with_the_loss_written_out(name, weights, in_chunks, monkeypatch, exact_teacher):
    model, teacher = pair(name)
    expected, wanted = differentiated(model, lambda m, b: distilled_loss(m, teacher, b, **weights), batch())
    if in_chunks:
        monkeypatch.setattr(objective, "CHUNK_BYTES", 7 * 4 * WORDS)
    monkeypatch.setattr(distillation, "layer_outputs", but_the_last)
    loss, found = differentiated(model, Distillation(teacher, **weights), batch())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert not any(p.grad is not None for p in teacher.parameters())
    total = torch.stack([g.norm() for g in wanted.values()]).norm()
    for key in wanted:
        gradient = found.get(key, torch.zeros(()))
        assert (gradient - wanted[key]).norm() <= 1e-5 * total, key


def test_padding_has_no_hidden_states_to_compare(exact_teacher):
    model, teacher = pair()
    inputs = batch() | {"attention_mask": torch.ones(3, 11, dtype=torch.int64)}
    inputs["attention_mask"][1, 6:] = 0
    inputs["labels"][1, 6:] = -100
    loss_of = Distillation(teacher, next_token=0.0, logits=0.0, hidden=1.0)
    before = loss_of(model, inputs)
    inputs["input_ids"][1, 6:] = 5  # whatever the padding is
    torch.testing.assert_close(loss_of(model, inputs), before)


def test_a_model_that_is_its_teacher_has_nothing_to_learn(exact_teacher):
    model = build("llama")
    teacher = copy_as_teacher(model)
    loss_of = Distillation(teacher, next_token=0.0, logits=1.0, hidden=1.0, temperature=3.0)
    loss, gradients = differentiated(model, loss_of, batch())
    assert abs(float(loss)) < 1e-4
    assert max(float(g.abs().max()) for g in gradients.values()) < 1e-5
    half = Distillation(teacher, next_token=0.5, logits=0.5)
    torch.testing.assert_close(half(model, batch()), 0.5 * next_token_loss(model, batch()), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_teacher_is_a_copy_in_half_the_bytes(name, monkeypatch):
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: True)
    model = build(name).train()
    before = copy.deepcopy(model.state_dict())
    teacher = copy_as_teacher(model)
    for (key, own), (_, copied) in zip(model.named_parameters(), teacher.named_parameters(), strict=True):
        assert copied.dtype == (torch.bfloat16 if own.ndim > 1 else torch.float32) and not copied.requires_grad
        assert torch.equal(copied, own.to(copied.dtype)), key
    for own, copied in zip(model.buffers(), teacher.buffers(), strict=True):
        assert own.dtype == copied.dtype and own.data_ptr() != copied.data_ptr()
    head, embeddings = teacher.get_output_embeddings().weight, teacher.get_input_embeddings().weight
    assert (head is embeddings) == (name == "llama-tied")
    assert not any(module.training for module in teacher.modules()) and model.training
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for key, value in teacher.state_dict().items():
        assert torch.equal(value.float(), before[key].to(value.dtype).float()), key


def test_layers_are_heard_only_within_the_context():
    model = build("llama")
    ids = torch.zeros(2, 5, dtype=torch.int64)
    with layer_outputs(model) as found:
        hidden = model(ids, output_hidden_states=True).hidden_states
    model(ids)
    assert len(found) == 2 and torch.equal(found[0], hidden[1])
