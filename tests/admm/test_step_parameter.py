"""A parameter's own part of a step is of that parameter alone, whatever gradients others hold."""

import pytest
import torch

from elsa_modifier.training.stochastic_adam import StochasticAdam
from tests.admm.test_optimizer import build, problem


@pytest.mark.parametrize("adam_class", [torch.optim.Adam, StochasticAdam])
@pytest.mark.parametrize("form", ["coupled", "decoupled"])
def test_one_after_the_other_is_all_at_once(form, adam_class):
    together, apart = [], []
    for found, in_parts in ((together, False), (apart, True)):
        weight, bias, loss = problem()
        optimizer = build(weight, adam_class([weight, bias], lr=0.01), form=form, interval=3, freeze_step=8)
        torch.manual_seed(0)
        for step in range(12):
            optimizer.zero_grad()
            loss(step).backward()
            if in_parts:
                before = bias.detach().clone()
                optimizer.step_parameter(weight)
                assert torch.equal(bias, before)
                after = weight.detach().clone()
                optimizer.step_parameter(bias)
                assert torch.equal(weight, after) and not torch.equal(bias, before)
                optimizer.end_step()
            else:
                optimizer.step()
            found += [weight.detach().clone(), bias.detach().clone(), optimizer.masks["weight"]]
        (group,) = optimizer.base.param_groups
        assert [id(p) for p in group["params"]] == [id(weight), id(bias)]
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


def test_groups_are_whole_again_after_a_step_that_fails(monkeypatch):
    weight, bias, loss = problem()
    optimizer = build(weight, torch.optim.Adam([weight, bias], lr=0.01))
    loss(0).backward()

    def fail():
        raise RuntimeError("no step")

    monkeypatch.setattr(optimizer.base, "step", fail)
    with pytest.raises(RuntimeError, match="no step"):
        optimizer.step_parameter(bias)
    (group,) = optimizer.base.param_groups
    assert [id(p) for p in group["params"]] == [id(weight), id(bias)]


def test_the_base_optimizer_is_its_own_between_steps():
    weight, bias, loss = problem()
    base = StochasticAdam([weight, bias], lr=0.01)
    optimizer = build(weight, base)
    for step in range(2):
        loss(step).backward()
        optimizer.step()
        assert base.before_rounding is None
