"""Weights in shards on threads that stand for ranks, against the same weights in one piece."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from elsa_modifier.admm import ADMMOptimizer, PenaltySchedule, PrunedWeight, SharedBudget, SparsitySchedule
from elsa_modifier.admm.budget import shared_keeps
from elsa_modifier.admm.choosing import Source, choose
from elsa_modifier.admm.constraint import Constraint
from elsa_modifier.admm.projection import MaskStructure, parse_mask_structure, sparse_mask
from elsa_modifier.admm.selection import Shards
from elsa_modifier.admm.thresholds import Demand, count_scores, find_cuts
from tests.reference.selection import sorted_mask

# Few distinct values make ties; the rest reaches from the smallest subnormal to the largest float.
VALUES = st.sampled_from([0.0, 1.0, 0.5, 1e-45, 3e-39, 3.4028234663852886e38]) | st.floats(
    0.0, 3.4028234663852886e38, width=32
)


class LockStep:
    """Sums over threads that wait for one another, as ranks do in an all-reduce; counts them, and their bytes."""

    def __init__(self, count):
        self.barrier = threading.Barrier(count, timeout=20)
        self.given = [None] * count
        self.sums = []

    def adder(self, rank):
        def add(counts):
            self.given[rank] = counts.clone()
            self.barrier.wait()
            total = torch.stack(self.given).sum(dim=0)
            if rank == 0:
                self.sums.append(counts.nbytes)
            self.barrier.wait()
            return total

        return add


def on_shards(parts, work, scores=0):
    """``work(part, shards)`` of each part, in a thread each: results, or what was raised; and the sums that it took."""
    step = LockStep(len(parts))
    results = [None] * len(parts)

    def run(rank):
        try:
            results[rank] = work(parts[rank], Shards(rank, len(parts), step.adder(rank), scores))
        except ValueError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, step.sums


CPU = torch.device("cpu")


def counted(part, demand, shards):
    """Cuts and numbers of kept entries of tensors in main memory."""
    counters = [lambda low, width, shift, t=t: count_scores(t, int(low), width, shift) for t in part]
    return find_cuts(counters, demand, shards, CPU)


def masks_of(part, keeps, shards):
    cuts, kept = counted(part, Demand(keeps, keeps), shards)
    assert kept == keeps
    return [cut(t) for cut, t in zip(cuts, part, strict=True)]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.lists(VALUES, max_size=6), min_size=3, max_size=3), min_size=1, max_size=4),
    st.sampled_from([0, 100, 10**6]),
    st.data(),
)
def test_cuts_are_those_of_the_sorted_whole(tensors, total, data):
    """Tensors of three shards each, some of them empty; few bins, and many."""
    shards = [[torch.tensor(part, dtype=torch.float32) for part in tensor] for tensor in tensors]
    wholes = [torch.cat(parts) for parts in shards]
    keeps = [data.draw(st.integers(0, whole.numel())) for whole in wholes]
    by_rank = [[parts[rank] for parts in shards] for rank in range(3)]
    found, _ = on_shards(by_rank, lambda part, shards: masks_of(part, keeps, shards), scores=total)
    for i, whole in enumerate(wholes):
        assert torch.equal(torch.cat([masks[i] for masks in found]), sorted_mask(whole, keeps[i]))


def test_sums_do_not_grow_with_the_number_of_tensors():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.rand(3000, generator=generator) for _ in range(40)]
    counts = []
    for some in (tensors[:1], tensors):
        parts = [[t[:1000] for t in some], [t[1000:] for t in some]]
        total = sum(t.numel() for t in some)
        keeps = [777] * len(some)
        found, sums = on_shards(parts, lambda part, shards, keeps=keeps: masks_of(part, keeps, shards), scores=total)
        for i, tensor in enumerate(some):
            assert torch.equal(torch.cat([masks[i] for masks in found]), sorted_mask(tensor, 777))
        counts.append(len(sums))
        assert sum(sums) < 4 * total / 2
    assert counts[0] == counts[1] <= 8


@pytest.mark.parametrize("bad,message", [(float("nan"), "NaN or infinity"), (-1.0, "negative"), (-0.0, "negative")])
def test_every_shard_refuses_what_one_holds(bad, message):
    parts = [[torch.rand(5), torch.rand(3)], [torch.rand(2), torch.tensor([bad, 1.0])], [torch.rand(0), torch.rand(0)]]
    errors, _ = on_shards(parts, lambda part, shards: masks_of(part, [3, 3], shards))
    assert all(message in str(error) and "tensor 1" in str(error) for error in errors)


def test_more_than_there_is_cannot_be_kept():
    errors, _ = on_shards([[torch.rand(2)], [torch.rand(3)]], lambda part, shards: masks_of(part, [6], shards))
    assert all("cannot keep 6 of 5" in str(error) for error in errors)


@pytest.mark.parametrize("keep", [24, 30, 48])
def test_patterns_lie_in_rows(keep):
    """As many as 2:4 leaves are chosen without a sum over ranks, more with the same result as in one piece."""
    structure = parse_mask_structure("2:4")
    whole = torch.rand(6, 8, generator=torch.Generator().manual_seed(0)).mul_(4).floor_()

    def work(part, shards):
        weight = PrunedWeight("w", nn.Parameter(part), keep, structure, entries=48)
        source = Source(lambda: part.clone(), list, structure)
        constraint = Constraint([weight], SparsitySchedule())
        (choice,), kept = choose(constraint, Demand([keep], [keep]), [source], shards, CPU)
        assert kept == [keep]
        return choice.mask(part.clone())

    found, sums = on_shards([whole[:4], whole[4:], whole[6:]], work)
    assert torch.equal(torch.cat(found), sparse_mask(whole, keep, structure))
    assert bool(sums) == (keep > 24)


def run(weights, shards, fields, gradients):
    """ADMM on random gradients, of these rows: weights, masks and statistics."""
    parameters = [nn.Parameter(w.clone()) for w in weights]
    pruned = [
        PrunedWeight(f"w{i}", p, fields["keeps"][i], fields["structure"], entries=64) for i, p in enumerate(parameters)
    ]
    optimizer = ADMMOptimizer(
        torch.optim.Adam(parameters, lr=0.05),
        pruned,
        penalty=PenaltySchedule(0.2, "linear", 8),
        form=fields["form"],
        dual=True,
        interval=2,
        freeze_step=9,
        budget=fields["budget"],
        sparsity_schedule=SparsitySchedule("cubic", 6),
        shards=shards,
    )
    found = []
    for step in range(12):
        for parameter, gradient in zip(parameters, gradients[step], strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
            optimizer.mask_gradient_(parameter)
        optimizer.step()
        found.append((int(optimizer.last_entered), float(optimizer.last_residual), optimizer.sparsity))
    return [p.detach() for p in parameters], [s.mask for s in optimizer.states], found, optimizer.unreached


@pytest.mark.parametrize("kind", ["budget", "own", "2:4"])
@pytest.mark.parametrize("form", ["coupled", "decoupled"])
def test_admm_on_shards_is_admm_on_the_whole(kind, form):
    generator = torch.Generator().manual_seed(1)
    wholes = [torch.randn(8, 8, generator=generator) for _ in range(3)]
    gradients = [[torch.randn(8, 8, generator=generator) * 10.0**-i for i in range(3)] for _ in range(12)]
    for step in range(12):
        # The last weight's first gradient comes late, and in the rows of one shard alone.
        gradients[step][2] = None if step < 2 else gradients[step][2] * (step > 3)
        if gradients[step][2] is not None:
            gradients[step][2][:6] = 0
    fields = dict(
        form=form,
        keeps=[32] * 3 if kind == "2:4" else [30, 13, 20],
        structure=parse_mask_structure("2:4") if kind == "2:4" else MaskStructure(),
        budget=SharedBudget(floor=0.2, cap=0.9) if kind == "budget" else None,
    )
    weights, masks, statistics, unreached = run(wholes, Shards(), fields, gradients)
    assert not unreached
    rows = [slice(0, 5), slice(5, 8), slice(8, 8)]

    def work(part, shards):
        mine = [[None if g is None else g[part] for g in step] for step in gradients]
        return run([w[part] for w in wholes], shards, fields, mine)

    found, _ = on_shards(rows, work, scores=192)
    for i in range(3):
        assert torch.equal(torch.cat([of[1][i] for of in found]), masks[i])
        assert torch.equal(torch.cat([of[0][i] for of in found]), weights[i])
    for of in found:
        assert [s[0] for s in of[2]] == [s[0] for s in statistics]
        assert [s[1] for s in of[2]] == pytest.approx([s[1] for s in statistics], rel=1e-5)
        assert [s[2] for s in of[2]] == [s[2] for s in statistics]


@pytest.mark.parametrize("values", ["normal", "few"])
def test_a_budget_of_shards_is_that_of_the_whole(values):
    """Enough scores that a sample of them brackets the threshold."""
    generator = torch.Generator().manual_seed(2)
    wholes = [torch.randn(n, generator=generator).abs_() * 3.0**i for i, n in enumerate((9000, 20_000, 12_000))]
    if values == "few":
        wholes = [whole.floor_() for whole in wholes]
    sizes = [whole.numel() for whole in wholes]
    limits = [0, 100, 6000], [9000, 9000, 12_000]
    alone = shared_keeps(lambda i: wholes[i], sizes, 17_000, *limits)
    parts = [[w[: w.numel() // 3] for w in wholes], [w[w.numel() // 3 :] for w in wholes], [w[:0] for w in wholes]]

    def work(part, shards):
        return counted(part, Demand(*limits, 17_000), shards)

    found, sums = on_shards(parts, work, scores=sum(sizes))
    assert [kept for _, kept in found] == [alone] * 3
    for i, whole in enumerate(wholes):
        masks = [cuts[i](part[i]) for part, (cuts, _) in zip(parts, found, strict=True)]
        assert torch.equal(torch.cat(masks), sorted_mask(whole, alone[i]))
    assert sum(sums) < 4 * sum(sizes)
