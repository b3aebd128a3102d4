import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from elsa_modifier.admm import ADMMOptimizer, MaskStructure, PenaltySchedule, PrunedWeight, SharedBudget, selection
from elsa_modifier.admm.budget import shared_keeps
from elsa_modifier.admm.constraint import SparsitySchedule
from elsa_modifier.admm.thresholds import Demand
from tests.admm.test_thresholds import VALUES, counted, on_shards
from tests.reference.admm import entries_kept
from tests.reference.selection import greedy_keeps, sorted_mask


def keeps_of(tensors, *rest):
    return shared_keeps(lambda i: tensors[i], [t.numel() for t in tensors], *rest)


@st.composite
def problems(draw):
    values = draw(st.lists(st.lists(VALUES, max_size=20), min_size=1, max_size=6))
    tensors = [torch.tensor(v, dtype=torch.float32) for v in values]
    limits = [sorted(draw(st.tuples(*[st.integers(0, t.numel())] * 2))) for t in tensors]
    smallest, largest = [list(bound) for bound in zip(*limits, strict=True)]
    return tensors, draw(st.integers(sum(smallest), sum(largest))), smallest, largest


@settings(max_examples=400, deadline=None)
@given(problems(), st.booleans())
def test_keeps_are_the_greedy_ones(problem, from_a_sample):
    tensors, total, smallest, largest = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_SAMPLED_FROM", 1 if from_a_sample else 1 << 14)
        keeps = keeps_of(tensors, total, smallest, largest)
    assert sum(keeps) == total
    assert keeps == greedy_keeps(tensors, total, smallest, largest)


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5, 0.9])
def test_large_tensors_of_different_scales(fraction):
    generator = torch.Generator().manual_seed(0)
    scales = [0.01, 0.5, 1.0, 1.0, 8.0, 0.0]
    tensors = [
        scale * torch.randn(n, generator=generator).abs_() for n, scale in zip([30_000] * 6, scales, strict=True)
    ]
    total = round(fraction * 180_000)
    limits = ([round(0.3 * fraction * 30_000)] * 6, [min(30_000, round(2 * fraction * 30_000))] * 6)
    assert keeps_of(tensors, total, *limits) == greedy_keeps(tensors, total, *limits)


def test_a_tensor_keeps_what_is_above_the_common_threshold():
    tensors = [torch.tensor([1.0, 5.0, 3.0]), torch.tensor([4.0, 2.0, 6.0])]
    assert keeps_of(tensors, 3, [0, 0], [3, 3]) == [1, 2]
    assert keeps_of(tensors, 3, [2, 0], [3, 3]) == [2, 1]
    assert keeps_of(tensors, 3, [0, 0], [3, 1]) == [2, 1]


def test_ties_go_to_earlier_tensors_first():
    assert keeps_of([torch.ones(5), torch.ones(5), torch.ones(5)], 8, [1, 1, 1], [5, 5, 5]) == [5, 2, 1]


def test_many_tensors_with_fewer_bins(monkeypatch):
    monkeypatch.setattr(selection, "_ALL_BIN_BITS", 0)
    tensors = [torch.rand(2_000, generator=torch.Generator().manual_seed(i)) for i in range(20)]
    limits = ([50] * 20, [500] * 20)
    assert keeps_of(tensors, 4_567, *limits) == greedy_keeps(tensors, 4_567, *limits)


def test_scores_are_asked_for_one_at_a_time_and_few_times():
    tensors = [torch.rand(50_000) for _ in range(4)]
    asked = []

    def scores(i):
        asked.append(i)
        return tensors[i]

    shared_keeps(scores, [50_000] * 4, 60_000, [0] * 4, [50_000] * 4)
    assert asked == [0, 1, 2, 3] * 2


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shards_change_nothing(count):
    tensors = [torch.rand(20_000).pow_(i + 1) for i in range(3)]
    expected = keeps_of(tensors, 12_345, [2_000] * 3, [9_000] * 3)
    parts = list(zip(*[t.tensor_split([7, 11_000][: count - 1]) for t in tensors], strict=True))
    keeps, _ = on_shards(
        parts,
        lambda part, shards: counted(part, Demand([2_000] * 3, [9_000] * 3, 12_345), shards),
    )
    assert [found[1] for found in keeps] == [expected] * count


@pytest.mark.parametrize("total", [2, 11])
def test_a_budget_outside_the_limits_is_refused(total):
    with pytest.raises(ValueError, match=f"total_keep is {total}; allowed is 3 to 10"):
        keeps_of([torch.ones(6), torch.ones(6)], total, [1, 2], [6, 4])


@pytest.mark.parametrize("smallest,largest", [([-1, 0], [6, 6]), ([4, 0], [3, 6]), ([0, 0], [6, 7])])
def test_limits_that_contradict_each_other_are_refused(smallest, largest):
    with pytest.raises(ValueError, match=r"tensor \d of 6 entries is to keep"):
        keeps_of([torch.ones(6), torch.ones(6)], 5, smallest, largest)


def test_limits_of_fractions():
    assert SharedBudget(0.5, 0.95).limits([100, 60]) == ([5, 3], [50, 30])
    assert SharedBudget([0.5, 0.0], 0.9).limits([100, 60]) == ([10, 6], [50, 60])


@pytest.mark.parametrize(
    "floor,cap,message",
    [
        (-0.1, 0.5, r"floor is -0.1; allowed is 0 to 1"),
        (0.1, 1.5, r"cap is 1.5; allowed is 0 to 1"),
        ([0.1, 2.0], 1.0, r"floor is 2.0"),
        (0.6, 0.5, r"floor is 0.6; allowed is 0 to its cap, 0.5"),
        ([0.1], 1.0, r"floor has 1 fractions; allowed is one, or one for each of the 2 weights"),
    ],
)
def test_bad_fractions_are_refused(floor, cap, message):
    with pytest.raises(ValueError, match=message):
        SharedBudget(floor, cap).limits([10, 10])


def build(budget, *, keeps=(24, 16), structure=None, freeze_step=20, base=torch.optim.Adam, **options):
    torch.manual_seed(0)
    first, second = nn.Parameter(torch.randn(8, 12)), nn.Parameter(0.3 * torch.randn(8, 8))
    pruned = [
        PrunedWeight("first", first, keeps[0], MaskStructure()),
        PrunedWeight("second", second, keeps[1], structure or MaskStructure()),
    ]
    return ADMMOptimizer(
        base([first, second], lr=0.01),
        pruned,
        penalty=PenaltySchedule(0.2, "cosine", max(freeze_step, 1)),
        dual=True,
        interval=4,
        budget=budget,
        freeze_step=freeze_step,
        **options,
    )


def train(optimizer, steps, idle=None):
    weights = [w.weight for w in optimizer.weights]
    for step in range(steps):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        for weight in weights:
            if weight is not idle:
                (torch.randn(16, weight.shape[1], generator=generator) @ weight.T - 1).square().mean().backward()
        optimizer.step()


def written_out(optimizer, projection, penalty):
    """The masks that a projection must give, by one sort over the scores of all weights."""
    scores = []
    for pruned, state in zip(optimizer.weights, optimizer.states, strict=True):
        v = pruned.weight.detach() + state.dual(penalty)
        moments = optimizer.base.state.get(pruned.weight)
        if projection == "fisher":
            group = optimizer.base.param_groups[0]
            fisher = moments["exp_avg_sq"].double() / (1 - group["betas"][1] ** moments["step"].double())
            scores.append((fisher.sqrt() * v.abs()).flatten())
        else:
            scores.append(v.abs().flatten())
    mask = sorted_mask(torch.cat(scores), sum(w.keep for w in optimizer.weights))
    return [m.view_as(w.weight) for m, w in zip(mask.split([96, 64]), optimizer.weights, strict=True)]


@pytest.mark.parametrize("projection", ["fisher", "magnitude"])
def test_a_projection_without_limits_is_one_sort_of_all_scores(projection):
    optimizer = build(SharedBudget(), projection=projection)
    train(optimizer, 7)
    optimizer.zero_grad()
    # Weights that have taken different numbers of steps, so that a bias left in the Fisher would show.
    optimizer.base.state[optimizer.weights[0].weight]["step"].fill_(2000)
    with torch.no_grad():  # so that masks change
        for pruned in optimizer.weights:
            pruned.weight.add_(torch.randn_like(pruned.weight))
    expected = written_out(optimizer, projection, optimizer.penalty(optimizer.step_count))
    before = optimizer.masks
    optimizer.project()
    for state, mask in zip(optimizer.states, expected, strict=True):
        assert torch.equal(state.mask, mask)
    assert any(not torch.equal(before[name], mask) for name, mask in optimizer.masks.items())


def test_first_masks_go_by_magnitude():
    optimizer = build(SharedBudget(), freeze_step=0)
    magnitudes = torch.cat([w.weight.detach().abs().flatten() for w in build(None).weights])
    kept = torch.cat([mask.flatten() for mask in optimizer.masks.values()])
    assert torch.equal(kept, sorted_mask(magnitudes, 40))
    train(optimizer, 1)
    assert sum(int((w.weight != 0).sum()) for w in optimizer.weights) == 40


def test_limits_hold_and_the_sum_stays():
    optimizer = build(SharedBudget(0.6, 0.8))
    train(optimizer, 25)
    kept = [int(mask.sum()) for mask in optimizer.masks.values()]
    assert sum(kept) == 40 and optimizer.sparsity == pytest.approx(0.75)
    assert 96 - round(0.8 * 96) <= kept[0] <= 96 - round(0.6 * 96)
    assert 64 - round(0.8 * 64) <= kept[1] <= 64 - round(0.6 * 64)
    assert kept != [24, 16]


@pytest.mark.parametrize("projection", ["fisher", "magnitude"])
def test_a_weight_without_gradient_takes_no_part(projection):
    """The others share what they bring, whatever magnitudes gave it in the first masks."""
    optimizer = build(SharedBudget(), projection=projection)
    idle = optimizer.weights[1].weight
    before = idle.detach().clone()
    assert int(optimizer.masks["second"].sum()) != 16
    train(optimizer, 25, idle=idle)
    assert [int(mask.sum()) for mask in optimizer.masks.values()] == [24, 16]
    assert torch.equal(idle, before) and int((optimizer.weights[0].weight != 0).sum()) == 24
    assert optimizer.sparsity == 0.75


def test_limits_that_only_an_unreached_weight_could_meet_bend():
    optimizer = build(SharedBudget([0.9, 0.0], 1.0))
    train(optimizer, 25, idle=optimizer.weights[1].weight)
    # 24 entries are asked of the first, and its floor leaves it 10.
    assert int((optimizer.weights[0].weight != 0).sum()) == 10
    assert optimizer.sparsity == pytest.approx(1 - 10 / 96)


def test_an_optimizer_without_second_moments_shares_by_magnitude():
    optimizer = build(SharedBudget(), base=torch.optim.SGD, projection="magnitude")
    train(optimizer, 25)
    assert sum(int(mask.sum()) for mask in optimizer.masks.values()) == 40


def test_scores_are_those_that_an_update_ranks():
    optimizer = build(SharedBudget())
    train(optimizer, 9)
    weight, state = optimizer.weights[0].weight.detach(), optimizer.states[0]
    fisher = optimizer.base.state[optimizer.weights[0].weight]["exp_avg_sq"]
    dual, bits = state.dual(0.1).clone(), state.bits.clone()
    scores = state.scores(weight, 0.1, fisher)
    assert torch.equal(state.dual(0.1), dual) and torch.equal(state.bits, bits)
    state.update(weight, 0.1, fisher)
    assert torch.equal(state.mask, sorted_mask(scores, state.keep))


def test_a_structure_cannot_share():
    with pytest.raises(ValueError, match="second has mask structure 2:4"):
        build(SharedBudget(), keeps=(24, 32), structure=MaskStructure(2, 4))


def test_a_budget_that_no_split_meets_is_refused():
    with pytest.raises(ValueError, match="total_keep is 40; allowed is 80 to 144"):
        build(SharedBudget(0.1, 0.5))


def test_diverged_weights_are_refused():
    optimizer = build(SharedBudget())
    optimizer.weights[1].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"step 1: .*NaN"):
        train(optimizer, 1)


@pytest.mark.parametrize("budget", [SharedBudget(), SharedBudget(0.6, 0.9), SharedBudget(0.75, 0.75)], ids=str)
def test_a_shared_budget_tightens_and_its_floor_with_it(budget):
    optimizer = build(budget, sparsity_schedule=SparsitySchedule("cubic", 15))
    assert [state.keep for state in optimizer.states] == [96, 64]
    for _ in range(5):
        train(optimizer, 4)
        steps = optimizer.step_count - (optimizer.step_count - 1) % 4 if optimizer.step_count < 20 else 20
        first, second = (int(mask.sum()) for mask in optimizer.masks.values())
        asked = entries_kept(96, 24, steps, "cubic", 15) + entries_kept(64, 16, steps, "cubic", 15)
        assert abs(first + second - asked) <= 1  # floor and cap are rounded for each
        rising = 1 - (1 - min(steps / 15, 1)) ** 3
        assert first <= 96 - round(rising * budget.floor * 96) and second <= 64 - round(rising * budget.floor * 64)
    assert first + second == 40
