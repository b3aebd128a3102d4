import pytest
import torch

from elsa_modifier.admm import ADMMOptimizer, MaskStructure, PenaltySchedule, PrunedWeight
from elsa_modifier.training.base_optimizer import build_base_optimizer
from elsa_modifier.training.gradient_release import releasing_gradients
from elsa_modifier.training.parallel import Alone
from elsa_modifier.training.stochastic_adam import StochasticAdam


def chain(count):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(8, 8) / 8**0.5) for _ in range(count)]


def loss_of(parameters):
    x = torch.ones(3, 8)
    for parameter in parameters:
        x = torch.tanh(x @ parameter)
    return x.square().sum()


def admm(base, parameters):
    return ADMMOptimizer(
        base,
        [PrunedWeight(f"w{i}", p, 16, MaskStructure()) for i, p in enumerate(parameters[::2])],
        penalty=PenaltySchedule(0.1, "constant", 4),
        interval=2,
        freeze_step=4,
    )


@pytest.mark.parametrize("name", ["adam", "adamw"])  # no bit of which is drawn
def test_released_steps_are_the_ordinary_ones(name):
    """With two groups, and a learning rate that a scheduler changes while their parameters are stepped one by one."""

    def train(released):
        parameters = chain(6)
        base = build_base_optimizer(name, parameters[:3], lr=1e-2, betas=(0.9, 0.99))
        base.add_param_group({"params": parameters[3:], "lr": 3e-2})
        optimizer = admm(base, parameters)
        scheduler = torch.optim.lr_scheduler.LinearLR(base, 1.0, 0.1, total_iters=6)
        groups = base.param_groups
        torch.manual_seed(1)
        for _ in range(6):
            if released:
                with releasing_gradients(optimizer, Alone(torch.nn.ParameterList(parameters))) as release:
                    loss_of(parameters).backward()
                    release.finish()
            else:
                loss_of(parameters).backward()
                optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        assert base.param_groups is groups and [len(group["params"]) for group in groups] == [3, 3]
        return parameters

    for ordinary, one_by_one in zip(train(False), train(True), strict=True):
        assert torch.equal(ordinary, one_by_one)


class Counted(list):
    looked_at = 0

    def __iter__(self):
        for item in super().__iter__():
            Counted.looked_at += 1
            yield item


@pytest.mark.parametrize("count", [50, 200])
def test_a_released_step_looks_each_parameter_up_a_fixed_number_of_times(count, monkeypatch):
    parameters = chain(count)
    base = StochasticAdam(parameters, lr=1e-3)
    base.param_groups[0]["params"] = Counted(base.param_groups[0]["params"])
    optimizer = admm(base, parameters)
    monkeypatch.setattr(Counted, "looked_at", 0)
    with releasing_gradients(optimizer, Alone(torch.nn.ParameterList(parameters))) as release:
        loss_of(parameters).backward()
        release.finish()
    assert count <= Counted.looked_at <= 3 * count


def test_a_group_that_is_replaced_between_steps_is_found():
    """As load_state_dict does."""
    parameters = chain(2)
    base = torch.optim.SGD(parameters, lr=0.0)
    optimizer = ADMMOptimizer(
        base,
        [PrunedWeight("w", parameters[0], 16, MaskStructure())],
        penalty=PenaltySchedule(0.0, "constant", 9),
        projection="magnitude",
        freeze_step=9,
    )
    with releasing_gradients(optimizer, Alone(torch.nn.ParameterList(parameters))) as release:
        for lr in (0.0, 0.1):
            before = parameters[1].detach().clone()
            base.load_state_dict(
                {**base.state_dict(), "param_groups": [base.state_dict()["param_groups"][0] | {"lr": lr}]}
            )
            loss_of(parameters).backward()
            release.finish()
            assert torch.equal(parameters[1], before) == (lr == 0.0)
