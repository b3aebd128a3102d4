import gc
import weakref

import pytest
import torch
from torch import nn

from elsa_modifier.admm.constraint import PrunedWeight, SparsitySchedule
from elsa_modifier.admm.optimizer import ADMMOptimizer
from elsa_modifier.admm.penalty import PenaltySchedule
from elsa_modifier.admm.projection import MaskStructure
from elsa_modifier.training.stochastic_adam import StochasticAdam
from tests.reference.admm import TwoTensorADMM, entries_kept, keep_mask

DENSE = MaskStructure()


def problem():
    """A weight to prune, one to train along, and a loss of both whose data is fixed by the step."""
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(8, 12)), nn.Parameter(torch.zeros(8))
    teacher = torch.randn(8, 12) * (torch.rand(8, 12) < 0.3)

    def loss(step):
        data = torch.randn(32, 12, generator=torch.Generator().manual_seed(step))
        return (data @ weight.T + bias - data @ teacher.T).square().mean()

    return weight, bias, loss


def build(weight, base, *, keep=24, structure=DENSE, value=0.2, schedule="cosine", freeze_step=40, **options):
    penalty = PenaltySchedule(value, schedule, freeze_step)
    pruned = [PrunedWeight("weight", weight, keep, structure)]
    return ADMMOptimizer(base, pruned, penalty=penalty, freeze_step=freeze_step, **options)


def run(optimizer, loss, steps, first=0):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()


FORMS = [("coupled", True), ("decoupled", True), ("decoupled", False)]


@pytest.mark.parametrize("form,dual", FORMS)
@pytest.mark.parametrize("projection", ["fisher", "magnitude"])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("tightening", ["constant", "cubic"])
@pytest.mark.parametrize("structure,keep", [(DENSE, 24), (MaskStructure(3, 4), 24)], ids=str)
@pytest.mark.parametrize("adam_class", [torch.optim.Adam, StochasticAdam])
def test_agrees_with_the_algorithm_written_out(
    form, dual, projection, schedule, tightening, structure, keep, adam_class
):
    options = dict(form=form, dual=dual, projection=projection, interval=4, structure=structure)
    weight, bias, loss = problem()
    optimizer = build(
        weight,
        adam_class([weight, bias], lr=0.01),
        schedule=schedule,
        sparsity_schedule=SparsitySchedule(tightening, 30),
        **options,
    )
    run(optimizer, loss, 40)

    x, b, loss = problem()
    adam = adam_class([x, b], lr=0.01)
    group = None if structure is DENSE else (structure.zeroed, structure.group)
    twin = TwoTensorADMM(x.detach().clone(), entries_kept(96, keep, 0, tightening, 30), group, form=form, dual=dual)
    penalty = PenaltySchedule(0.2, schedule, 40)
    for step in range(40):
        adam.zero_grad()
        loss(step).backward()
        if form == "coupled" and penalty(step) > 0:
            x.grad += twin.proximal_gradient(x.detach(), penalty(step))
        adam.step()
        with torch.no_grad():
            if form == "decoupled" and penalty(step) > 0:
                x.copy_(twin.pull(x, penalty(step)))
            done = step + 1
            if done % 4 == 1 or done == 40:
                moment = adam.state[x]["exp_avg_sq"]
                fisher = moment if isinstance(moment, torch.Tensor) else moment.dequantize()
                twin.keep = entries_kept(96, keep, done, tightening, 30)
                ascent = 1.0 if form == "coupled" else 1 - (1 - penalty(done)) ** 4
                twin.update(x, penalty(done), fisher if projection == "fisher" else None, ascent)
                assert int(twin.mask.sum()) == twin.keep
    torch.testing.assert_close(weight.detach(), x.detach() * twin.mask, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(bias.detach(), b.detach(), rtol=1e-4, atol=1e-6)
    assert torch.equal(optimizer.masks["weight"], twin.mask)


def test_updates_come_after_the_first_step_and_then_every_interval():
    weight, bias, loss = problem()
    optimizer = build(weight, torch.optim.Adam([weight, bias], lr=0.01), interval=5, freeze_step=18)
    steps = []
    for step in range(25):
        before = optimizer.projection_count
        run(optimizer, loss, 1, step)
        if optimizer.projection_count > before:
            steps.append(step + 1)
    assert steps == [1, 6, 11, 16, 18]


@pytest.mark.parametrize(
    "base", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.SGD, StochasticAdam]
)
def test_weights_outside_the_mask_are_zero_after_every_step(base):
    weight, bias, loss = problem()
    inner = base([weight, bias], lr=0.01)
    optimizer = build(
        weight, inner, freeze_step=10, interval=3, projection="magnitude" if base is torch.optim.SGD else "fisher"
    )
    run(optimizer, loss, 10)
    mask = optimizer.masks["weight"]
    assert int(mask.sum()) == 24
    for step in range(10, 30):
        before = weight.detach().clone()
        run(optimizer, loss, 1, step)
        assert not weight[~mask].any()
        assert (weight[mask] != before[mask]).any()
    assert torch.equal(optimizer.masks["weight"], mask)
    assert optimizer.sparsity == pytest.approx(0.75)


@pytest.mark.parametrize("dual", [False, True])
def test_both_parts_of_a_step_are_rounded_to_bf16_once(dual):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.ones(600_001, dtype=torch.bfloat16))
    base = StochasticAdam([weight], lr=0.002)
    optimizer = build(weight, base, keep=200_000, value=0.003, schedule="constant", dual=dual)
    mask = optimizer.masks["weight"]
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept, pruned = 0.998, 0.998 * 0.997
    for entries, value, neighbours in ((mask, kept, (255 / 256, 1.0)), (~mask, pruned, (254 / 256, 255 / 256))):
        found = weight.detach()[entries].double()
        assert tuple(found.unique().tolist()) == neighbours
        assert float(found.mean()) == pytest.approx(value, abs=2e-5)


def test_mask_fixed_from_the_start_is_the_magnitude_mask():
    weight, bias, loss = problem()
    largest = weight.detach().abs().flatten().topk(24).indices.sort().values
    optimizer = build(weight, torch.optim.Adam([weight, bias], lr=0.01), freeze_step=0)
    run(optimizer, loss, 3)
    assert torch.equal(weight.flatten().nonzero().squeeze(1), largest)


ALSO_TRAINED = [torch.optim.Adam, torch.optim.AdamW, StochasticAdam]


def with_idle(adam_class, *, gradient="none", freeze_step=8, keep=4, **options):
    """The problem with a weight that its loss does not reach; as a step's function, weights and the optimizer.

    :param gradient: of the idle weight: ``none``, ``zeros``, or a step whose gradient is real after zeros
    """
    weight, bias, loss = problem()
    idle = nn.Parameter(torch.randn(4, 4))
    base = adam_class([weight, bias, idle], lr=0.01)
    pruned = [PrunedWeight("idle", idle, keep, DENSE), PrunedWeight("weight", weight, 24, DENSE)]
    schedule = PenaltySchedule(0.2, "constant", max(1, freeze_step))
    optimizer = ADMMOptimizer(base, pruned, penalty=schedule, freeze_step=freeze_step, interval=3, **options)

    def step(number):
        optimizer.zero_grad()
        loss(number).backward()
        if gradient != "none":
            idle.grad = torch.ones_like(idle) if number == gradient else torch.zeros_like(idle)
        optimizer.step()

    return step, idle, weight, optimizer


@pytest.mark.parametrize("form,dual", FORMS)
@pytest.mark.parametrize("projection", ["fisher", "magnitude"])
@pytest.mark.parametrize("gradient", ["none", "zeros"])
@pytest.mark.parametrize("freeze_step", [0, 8])
@pytest.mark.parametrize("adam_class", ALSO_TRAINED)
def test_a_weight_without_gradient_keeps_its_bits(adam_class, freeze_step, gradient, projection, form, dual):
    step, idle, weight, optimizer = with_idle(
        adam_class,
        gradient=gradient,
        freeze_step=freeze_step,
        form=form,
        projection=projection,
        dual=dual,
    )
    before = idle.detach().clone()
    for number in range(12):
        step(number)
    assert torch.equal(idle, before) and optimizer.unreached == ["idle"]
    assert int((weight != 0).sum()) == 24 and optimizer.sparsity == 0.75
    if form == "decoupled":  # all that is pruned is zero
        assert float(optimizer.residual()) == 0.0


@pytest.mark.parametrize("gradient", ["none", "zeros"])
@pytest.mark.parametrize("freeze_step", [0, 8])
@pytest.mark.parametrize("adam_class", ALSO_TRAINED)
def test_asked_for_it_is_pruned_by_magnitude(adam_class, freeze_step, gradient):
    step, idle, _, optimizer = with_idle(adam_class, gradient=gradient, freeze_step=freeze_step, prune_unreached=True)
    before = idle.detach().clone()
    for number in range(12):
        step(number)
    assert torch.equal(idle, before * keep_mask(before.abs(), 4)) and optimizer.unreached == ["idle"]


@pytest.mark.parametrize("form,dual", FORMS)
@pytest.mark.parametrize("first", [2, 10])
@pytest.mark.parametrize("adam_class", ALSO_TRAINED)
def test_a_weight_takes_part_from_its_first_gradient_on(adam_class, first, form, dual):
    """Also when the mask is fixed by then."""
    step, idle, _, optimizer = with_idle(adam_class, gradient=first, form=form, dual=dual)
    before = idle.detach().clone()
    for number in range(first):
        step(number)
        assert torch.equal(idle, before) and not optimizer.states[0].dual(0.2).any()
    step(first)
    assert optimizer.unreached == [] and not torch.equal(idle, before)
    for number in range(first + 1, 14):
        step(number)
    assert int((idle != 0).sum()) == 4
    if first > 8:
        assert torch.equal(idle != 0, keep_mask(before.abs(), 4))


def test_fisher_needs_a_second_moment():
    weight, bias, loss = problem()
    optimizer = build(weight, torch.optim.SGD([weight, bias], lr=0.01, momentum=0.9))
    with pytest.raises(ValueError, match="SGD keeps no second moment"):
        run(optimizer, loss, 1)


def test_diverged_weights_are_named():
    weight, bias, loss = problem()
    optimizer = build(weight, torch.optim.Adam([weight, bias], lr=0.01))
    weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"projection of weight at step 1: .*NaN"):
        run(optimizer, loss, 1)


@pytest.mark.parametrize("adam_class", [torch.optim.Adam, StochasticAdam])
def test_state_is_gone_with_the_optimizer(adam_class):
    """At once: no cycle of references has to be found by the garbage collector first."""
    weight, bias, loss = problem()
    base = adam_class([weight, bias], lr=0.01)
    optimizer = build(weight, base)
    run(optimizer, loss, 2)
    state = weakref.ref(optimizer.states[0])
    gc.disable()
    try:
        del optimizer
        assert state() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("form,dual", FORMS)
def test_state_is_at_most_one_tensor_and_one_bit(form, dual):
    weight = nn.Parameter(torch.randn(64, 64))
    optimizer = build(weight, torch.optim.Adam([weight], lr=0.01), keep=400, form=form, dual=dual)
    assert optimizer.state_nbytes == 64 * 64 * 4 * dual + 64 * 64 // 8


@pytest.mark.parametrize("name", ["linear", "cubic"])
def test_the_constraint_tightens_until_it_is_whole_and_masks_follow(name):
    weight, bias, loss = problem()
    base = torch.optim.Adam([weight, bias], lr=0.01)
    optimizer = build(weight, base, interval=1, sparsity_schedule=SparsitySchedule(name, 30))
    assert int(optimizer.masks["weight"].sum()) == 96
    before, grown = optimizer.masks["weight"], 0
    for step in range(40):
        run(optimizer, loss, 1, step)
        mask = optimizer.masks["weight"]
        assert int(mask.sum()) == entries_kept(96, 24, step + 1, name, 30)
        assert int(optimizer.last_entered) == int((mask & ~before).sum())
        before, grown = mask, grown + int((mask & ~before).sum())
    assert grown > 0


def test_a_constraint_is_whole_when_the_mask_is_fixed():
    weight, bias, loss = problem()
    base = torch.optim.Adam([weight, bias], lr=0.01)
    optimizer = build(weight, base, freeze_step=10, sparsity_schedule=SparsitySchedule("cubic", 30))
    run(optimizer, loss, 10)
    assert int((weight != 0).sum()) == 24


@pytest.mark.parametrize(
    "options,message",
    [(dict(interval=0), "interval is 0"), (dict(value=1.5), "penalty is 1.5"), (dict(value=-0.1), "penalty is -0.1")],
)
def test_bad_options_are_refused(options, message):
    weight = nn.Parameter(torch.randn(8, 12))
    with pytest.raises(ValueError, match=message):
        build(weight, torch.optim.Adam([weight], lr=0.01), **options)


def test_nothing_to_prune_is_refused():
    weight = nn.Parameter(torch.randn(8, 12))
    with pytest.raises(ValueError, match="no weight to prune"):
        ADMMOptimizer(torch.optim.Adam([weight]), [], penalty=PenaltySchedule(0.1, "constant", 1), freeze_step=1)


@pytest.mark.parametrize("dual", [False, True])
def test_bf16_weights_are_pulled_as_fp32_ones_are_on_average(dual):
    """By a base optimizer that rounds on its own, so that the pull is rounded again."""
    torch.manual_seed(0)
    exact = torch.randn(64, 64).bfloat16()
    moved = []
    for dtype, runs in ((torch.float32, 1), (torch.bfloat16, 200)):
        mean = torch.zeros(64, 64)
        for _ in range(runs):
            weight = nn.Parameter(exact.to(dtype, copy=True))
            base = torch.optim.SGD([weight], lr=0.0)
            optimizer = build(
                weight, base, keep=1000, value=0.01, schedule="constant", projection="magnitude", dual=dual
            )
            weight.grad = torch.ones_like(weight)
            optimizer.step()
            mean += weight.detach().float() / runs
        moved.append(mean - exact.float())
    fp32, bf16 = moved
    assert float((bf16 - fp32).abs().max()) < 0.003
    assert float((bf16 * fp32).sum() / fp32.square().sum()) == pytest.approx(1, abs=0.02)
