from typing import get_args

import pytest
import torch

from elsa_modifier.admm.penalty import PenaltySchedule
from elsa_modifier.admm.projection import MaskStructure
from elsa_modifier.admm.state import ADMMState, pull_
from elsa_modifier.admm.storage import Scratch, StateDtype, chunks, in_blocks
from tests.reference.admm import TwoTensorADMM, penalty_at

SCHEDULES = ["constant", "linear", "cosine", "exponential"]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", get_args(StateDtype))
@pytest.mark.parametrize(
    "form,dual,ascent", [("coupled", True, 1.0), ("decoupled", True, 0.5), ("decoupled", False, 1.0)]
)
@pytest.mark.parametrize("structure", [MaskStructure(), MaskStructure(2, 4)], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("with_scratch", [False, True])
def test_one_tensor_agrees_with_two(dtype, form, dual, ascent, structure, schedule, with_scratch):
    torch.manual_seed(0)
    x = torch.randn(30, 20)  # two blocks and a part
    keep = 300 if structure.sparsity else 125
    scratch = Scratch(x.numel(), x.device) if with_scratch else None
    state = ADMMState(x, keep, structure, form=form, dual=dual, dtype=dtype)
    group = None if structure.is_unstructured else (structure.zeroed, structure.group)
    twin = TwoTensorADMM(x.clone(), keep, group, form=form, dual=dual, dtype=dtype)
    penalty = PenaltySchedule(0.3, schedule, 40)
    for step in range(60):
        lam = penalty(step)
        x += 0.1 * torch.randn_like(x)
        grad = torch.randn_like(x)
        if lam > 0 and form == "coupled":
            expected_grad = grad + twin.proximal_gradient(x, lam)
            state.add_proximal_gradient_(grad, x, lam, scratch)
            close(grad, expected_grad)
        if lam > 0 and form == "decoupled":
            expected_x = twin.pull(x, lam)
            for start, end in chunks(x.numel(), x.device):
                pull_(in_blocks(x.view(-1)[start:end]), state.pull(start, end, lam, scratch))
            close(x, expected_x)
        if step % 7 == 0:
            twin.follow(x)
            gap = (x - twin.z).square().sum()
            close(state.residual_sums(x, scratch), torch.stack([gap, x.square().sum()]))
            fisher = torch.rand_like(x)
            before = twin.mask
            twin.update(x, lam, fisher, ascent)
            assert int(state.update(x, lam, fisher, scratch, ascent=ascent)) == int((twin.mask & ~before).sum())
            assert torch.equal(state.mask, twin.mask)
            if form == "coupled":
                close(state.split(x), twin.z)
            close(state.dual(lam), twin.u)


def test_supports_are_disjoint_and_add_up():
    torch.manual_seed(1)
    x = torch.randn(8, 8)
    state = ADMMState(x, 16, MaskStructure(), form="coupled")
    state.update(x, 0.1)
    u = state.dual(0.1)
    x = torch.randn(8, 8)
    state.update(x, 0.1)
    z, dual = state.split(x), state.dual(0.1)
    assert not (z * dual).any()
    close(z + dual, x + u)


def test_scaled_dual_keeps_the_unscaled_one():
    torch.manual_seed(2)
    x = torch.randn(8, 8)
    state = ADMMState(x, 16, MaskStructure())
    state.update(x, 0.1)
    y = 0.1 * state.dual(0.1)
    close(0.4 * state.dual(0.4), y)


def test_no_dual_builds_up_without_a_penalty():
    x = torch.randn(8, 8)
    state = ADMMState(x, 16, MaskStructure())
    state.update(x, 0.0)
    assert not state.dual(0.0).any() and not state.dual(0.1).any()


@pytest.mark.parametrize("shape", [(64, 64), (100, 33)])
def test_memory_is_one_tensor_and_one_bit(shape):
    x = torch.randn(shape)
    state = ADMMState(x, 5, MaskStructure())
    state.update(x, 0.1)
    assert state.nbytes == 4 * x.numel() + -(-x.numel() // 8)
    assert state.nbytes / x.numel() <= 4.13


def test_state_starts_at_the_magnitude_projection_without_dual():
    x = torch.tensor([[3.0, -1.0, 0.5, -2.0]])
    state = ADMMState(x, 2, MaskStructure(), form="coupled")
    assert state.split(x).tolist() == [[3.0, 0.0, 0.0, -2.0]]
    assert not state.dual(1.0).any()


def test_mask_zeroes_what_is_outside():
    x = torch.randn(5, 5)
    state = ADMMState(x, 3, MaskStructure())
    kept = x[state.mask].clone()
    pull_(in_blocks(x.view(-1)), state.mask_out(0, 25))
    assert int((x != 0).sum()) == 3
    assert torch.equal(x[state.mask], kept)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_penalty_schedules_agree_with_the_twin(schedule):
    penalty = PenaltySchedule(0.7, schedule, 50)
    values = [penalty(t) for t in range(80)]
    assert values == pytest.approx([penalty_at(t, 0.7, schedule, 50) for t in range(80)])
    assert values[50:] == [0.7] * 30
    assert values == sorted(values)


def test_penalty_schedule_of_no_steps_is_its_value():
    assert PenaltySchedule(0.7, "cosine", 0)(0) == 0.7
