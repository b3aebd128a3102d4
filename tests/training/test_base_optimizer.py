import pytest
import torch

from elsa_modifier.admm import ADMMOptimizer, MaskStructure, PenaltySchedule, PrunedWeight
from elsa_modifier.training import base_optimizer
from elsa_modifier.training.base_optimizer import LOW_BIT_OPTIMIZERS, build_base_optimizer

SETTINGS = dict(lr=1e-2, betas=(0.9, 0.999))


@pytest.fixture(autouse=True)
def without_compiler(monkeypatch):
    """Compiling the step for a shape takes many times as long as these tests."""
    monkeypatch.setattr(base_optimizer.shutil, "which", lambda _: None)


def _weight(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Parameter(torch.randn(64, 128).to(dtype))


@pytest.mark.parametrize("name", LOW_BIT_OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_bit_adam_goes_where_adam_goes(name, dtype):
    def train(name, dtype):
        weight = _weight(dtype)
        optimizer = build_base_optimizer(name, [weight], **SETTINGS)
        for _ in range(20):
            (weight.float() - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return weight.detach().float(), optimizer

    exact, _ = train("adam", torch.float32)
    found, optimizer = train(name, dtype)
    moved = float((exact - _weight().detach()).norm())
    assert float((found - exact).norm()) < (0.1 if name != "adam4bit" else 0.5) * moved
    (moments,) = optimizer.state.values()
    assert moments["exp_avg_sq"].codes.element_size() == 1


@pytest.mark.parametrize("name", LOW_BIT_OPTIMIZERS)
def test_the_fisher_is_the_dequantized_second_moment(name):
    """Entries with large gradients are kept, though their weights are no larger than the others."""
    weight = torch.nn.Parameter(torch.ones(64, 128))
    base = build_base_optimizer(name, [weight], **SETTINGS)
    optimizer = ADMMOptimizer(
        base,
        [PrunedWeight("w", weight, 64 * 32, MaskStructure())],
        penalty=PenaltySchedule(0.1, "constant", 3),
        interval=1,
        freeze_step=3,
        state_dtype="int8",
    )
    important = torch.zeros(64, 128, dtype=torch.bool)
    important[:, ::4] = True
    for _ in range(3):
        weight.grad = torch.where(important, 1.0, 0.01) * torch.randn(64, 128).sign()
        optimizer.step()
    assert torch.equal(optimizer.masks["w"], important)


def test_a_missing_torchao_is_named(monkeypatch):
    monkeypatch.setattr(base_optimizer.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"optimizer is 'adam4bit', which needs torchao: pip install"):
        build_base_optimizer("adam4bit", [_weight()], **SETTINGS)
    build_base_optimizer("adam", [_weight()], **SETTINGS)


def test_schedulers_reach_low_bit_optimizers():
    weight = _weight()
    optimizer = build_base_optimizer("adamfp8", [weight], **SETTINGS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    scheduler.step()
    after = weight.detach().clone()
    optimizer.step()
    assert torch.equal(weight, after)
