"""A run whose losses are read some steps late, as on an accelerator, in main memory."""

import pytest
import torch

from elsa_modifier.admm import placement
from elsa_modifier.admm.storage import chunks
from elsa_modifier.training import late
from elsa_modifier.training.loop import TrainingDiverged
from elsa_modifier.training.stochastic_adam import StochasticAdam
from tests.training.test_loop import run


@pytest.fixture
def pretend(monkeypatch):
    """Main memory is taken for an accelerator's."""
    monkeypatch.setattr(placement, "_EAGER", set())
    monkeypatch.setattr(placement, "_fused", lambda update: update)
    monkeypatch.setattr(late, "start_copy", lambda numbers: (numbers.clone(), None))
    monkeypatch.setattr("elsa_modifier.training.loop.to_device", lambda tensor, device: tensor)
    chunks.cache_clear()
    yield
    chunks.cache_clear()


def adam(parameters, lr):
    return torch.optim.Adam(parameters, lr=lr, fused=True)


def test_history_is_the_same(load, pretend, monkeypatch):
    history = run(load(), base=adam)
    monkeypatch.undo()
    chunks.cache_clear()
    expected = run(load(), base=adam)
    assert [r.step for r in history] == list(range(1, 9))
    for found, wanted in zip(history, expected, strict=True):
        assert found.loss == pytest.approx(wanted.loss, rel=1e-4)
        assert found.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-3)
        assert (found.residual is None) == (wanted.residual is None) and found.sparsity == wanted.sparsity


@pytest.mark.parametrize("base", [adam, StochasticAdam])
def test_a_loss_that_is_not_finite_is_refused_later_and_has_not_spread(load, pretend, base):
    model, kept, steps = load(), {}, []
    embedding = model.model.embed_tokens.weight

    def break_in_the_third_step(module, arguments, output):
        steps.append(None)
        if len(steps) == 3:
            kept.update({n: p.detach().clone() for n, p in model.named_parameters()})
            return output * float("nan")
        if len(steps) == 4:
            # What the third step left: nothing of it.
            assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters())
        return output

    model.model.embed_tokens.register_forward_hook(break_in_the_third_step)
    with pytest.raises(TrainingDiverged, match=r"step 3: loss nan"):
        run(model, base=base)
    assert len(steps) == 5 and embedding.isfinite().all()
