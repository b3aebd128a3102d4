"""The path of accelerators on tensors in main memory, uncompiled, against the one of main memory."""

import pytest
import torch
from torch import nn

from elsa_modifier.admm import placement
from elsa_modifier.admm.bitmask import count_entered, pack_bits, select_by_bits, unpack_bits
from elsa_modifier.admm.budget import SharedBudget
from elsa_modifier.admm.constraint import PrunedWeight, SparsitySchedule
from elsa_modifier.admm.moments import FirstMoment, SecondMoment
from elsa_modifier.admm.optimizer import ADMMOptimizer
from elsa_modifier.admm.penalty import PenaltySchedule
from elsa_modifier.admm.projection import MaskStructure
from elsa_modifier.admm.rounding import Place, hashed_int16, key_of
from elsa_modifier.admm.storage import chunks
from elsa_modifier.training.stochastic_adam import StochasticAdam

DENSE = MaskStructure()


@pytest.fixture
def fuse(monkeypatch):
    """Function that has main memory taken for an accelerator's."""

    def fuse():
        monkeypatch.setattr(placement, "_EAGER", set())
        monkeypatch.setattr(placement, "_fused", lambda update: update)
        chunks.cache_clear()

    yield fuse
    chunks.cache_clear()


def weights(dtype, structure):
    """Whole blocks, several rows of ties each; not whole blocks; few entries."""
    generator = torch.Generator().manual_seed(0)
    # A group of 3 divides all widths of the second list, and no block.
    shapes = [(64, 96), (10, 33), (3, 12)] if structure.group == 3 else [(64, 64), (33, 20), (3, 4)]
    return [nn.Parameter((torch.randn(shape, generator=generator) * 8).round().div(8).to(dtype)) for shape in shapes]


def tightening(base, pruned, **options):
    """An optimizer that projects after every second step, and has the mask fixed in the seventh."""
    return ADMMOptimizer(
        base,
        pruned,
        penalty=PenaltySchedule(0.2, "linear", 8),
        interval=2,
        freeze_step=7,
        sparsity_schedule=SparsitySchedule("cubic", 6),
        **options,
    )


def run(adam, dtype, structure, budget, form="decoupled", dual=False, state_dtype="fp32", ok=None, steps=9):
    torch.manual_seed(0)
    parameters = weights(dtype, structure)
    share = 0.3 if structure.is_unstructured else 1 - structure.zeroed / structure.group
    pruned = [PrunedWeight(f"w{i}", p, round(share * p.numel()), structure) for i, p in enumerate(parameters)]
    options = {"form": form, "dual": dual, "state_dtype": state_dtype}
    optimizer = tightening(adam(parameters), pruned, budget=budget, **options)
    generator = torch.Generator().manual_seed(1)
    found = [optimizer.masks]
    for step in range(steps):
        for i, parameter in enumerate(parameters):
            parameter.grad = torch.randn(parameter.shape, generator=generator).mul_(10.0**-i).to(dtype)
            if i == 2 and step < 2:
                parameter.grad = None
            optimizer.mask_gradient_(parameter)
        optimizer.step()
        found.append(dict(optimizer.masks))
        found.append({"entered": optimizer.last_entered, "residual": optimizer.last_residual})
    return parameters, found, [state.keep for state in optimizer.states], optimizer


def torch_adam(parameters):
    return torch.optim.Adam(parameters, lr=0.05)


@pytest.mark.parametrize("budget", [None, SharedBudget(0.2, 0.9), SharedBudget(0.68, 0.72)])
@pytest.mark.parametrize("form,dual", [("coupled", True), ("decoupled", True), ("decoupled", False)])
@pytest.mark.parametrize("structure", [DENSE, MaskStructure(2, 4), MaskStructure(2, 3)], ids=str)
@pytest.mark.parametrize("state_dtype", ["fp32", "int8"])
def test_both_paths_agree(structure, form, dual, budget, state_dtype, fuse):
    if budget is not None and not structure.is_unstructured:
        pytest.skip("a structure shares no budget")
    options = (torch_adam, torch.float32, structure, budget, form, dual, state_dtype)
    parameters, found, keeps, _ = run(*options)
    fuse()
    other, others, other_keeps, _ = run(*options)
    assert keeps == other_keeps
    for a, b in zip(found, others, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=0)
    for a, b in zip(parameters, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("budget", [None, SharedBudget(0.2, 0.9)])
def test_what_is_rounded_stochastically_agrees_on_average(budget, fuse):
    """Noise is another, so masks and weights agree for the most part."""
    options = (lambda p: StochasticAdam(p, lr=0.05, seed=3), torch.bfloat16, DENSE, budget)
    parameters, found, keeps, _ = run(*options)
    fuse()
    other, others, other_keeps, _ = run(*options)
    assert sum(keeps) == sum(other_keeps)
    assert float((found[-2]["w0"] == others[-2]["w0"]).float().mean()) > 0.97
    difference = (parameters[0] - other[0]).detach().float()
    both = found[-2]["w0"] & others[-2]["w0"]
    assert float(difference[both].abs().mean()) < 0.02 and abs(float(difference[both].mean())) < 0.003


def fused_adam(parameters):
    return torch.optim.Adam(parameters, lr=0.05, fused=True)


def stochastic_adam(parameters):
    return StochasticAdam(parameters, lr=0.05)


@pytest.mark.parametrize("adam", [fused_adam, stochastic_adam])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dual", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(adam, dtype, frozen, dual, fuse):
    fuse()
    parameters, _, _, optimizer = run(adam, dtype, DENSE, None, dual=dual, steps=8 if frozen else 3)

    def everything():
        moments = [optimizer.base.state[p][key] for p in parameters for key in ("exp_avg", "exp_avg_sq")]
        held = [m.clone() if isinstance(m, torch.Tensor) else m.dequantize() for m in moments]
        return [p.detach().clone() for p in parameters] + held + [s.bits.clone() for s in optimizer.states]

    before = everything()
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step(ok=torch.tensor(False))
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(ok=torch.tensor(True))
    assert not any(torch.equal(a, b) for a, b in zip(before[:3], everything()[:3], strict=True))


@pytest.mark.parametrize("structure", [DENSE, MaskStructure(2, 4)], ids=str)
@pytest.mark.parametrize("bad,message", [(float("nan"), "NaN or infinity"), (float("-inf"), "NaN or infinity")])
def test_weights_that_are_not_finite_are_refused_before_a_mask_moves(structure, bad, message, fuse):
    fuse()
    parameters, _, _, optimizer = run(torch_adam, torch.float32, structure, None, steps=2)
    before = {name: mask.clone() for name, mask in optimizer.masks.items()}
    parameters[1].data[1, 1] = bad
    with pytest.raises(ValueError, match=f"w1: the scores to project hold {message}"):
        optimizer.project()
    assert all(torch.equal(mask, before[name]) for name, mask in optimizer.masks.items())


@pytest.mark.parametrize("entries", [1, 7, 8, 9, 300])
def test_bits_by_shifts_are_bits_by_tables(entries, fuse):
    generator = torch.Generator().manual_seed(entries)
    masks = [torch.rand(entries, generator=generator) < 0.5 for _ in range(2)]

    def everything():
        bits = [pack_bits(mask) for mask in masks]
        shape = torch.Size([entries])
        return [*bits, unpack_bits(bits[0], shape), select_by_bits(bits[0], shape, 2.5, -1.0), count_entered(*bits)]

    eager = everything()
    fuse()
    assert all(torch.equal(a, b) for a, b in zip(eager, everything(), strict=True))


@pytest.mark.parametrize("kind", [FirstMoment, SecondMoment])
def test_codes_mean_the_same(kind, fuse):
    moment = kind(torch.zeros(2, 256))
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).repeat(2)
    # e4m3fn has two codes for NaN.
    codes = torch.where((codes & 127) == 127, 0, codes) if kind is FirstMoment else codes
    moment.codes.copy_(codes.view(moment.codes.dtype))
    moment.scale.copy_(torch.tensor([3.0, 1e-20]))
    eager = moment.dequantize()
    fuse()
    assert torch.equal(eager, moment.dequantize())


def test_hashed_noise_is_a_function_of_the_entry():
    device, count = torch.device("cpu"), 200_000
    place = Place(3, 0, count)

    def noise(key, place, start, entries):
        return hashed_int16(key_of(key, place, start), torch.Size([entries]), device)

    whole = noise((1, 2), place, 0, count)
    for first, end in ((0, 1), (65_535, 65_537), (70_000, count)):
        for part in (noise((1, 2), place, first, end - first), noise((1, 2), Place(3, first, count), 0, end - first)):
            assert all(torch.equal(a, b[first:end]) for a, b in zip(part, whole, strict=True))
    others = [noise(key, p, 0, count) for key, p in (((0, 2), place), ((1, 3), place), ((1, 2), Place(4, 0, count)))]
    for a in (*whole, *(half for other in others for half in other)):
        assert a.min() >= -(2**15) and a.max() < 2**15
        assert abs(float(a.double().mean())) < 4 * 2**16 / (12 * count) ** 0.5
        # Every bit, and neighbours.
        for bit in range(16):
            ones = ((a >> bit) & 1).double()
            assert abs(float(ones.mean()) - 0.5) < 5 * 0.5 / count**0.5
            assert abs(float((ones[1:] != ones[:-1]).double().mean()) - 0.5) < 5 * 0.5 / count**0.5
    different = [whole[0], whole[1], *(other[0] for other in others)]
    for i, a in enumerate(different):
        for b in different[:i]:
            assert float((a == b).double().mean()) < 1e-3


@torch._dynamo.config.patch(recompile_limit=64)
def test_every_update_is_one_graph(fuse, monkeypatch):
    """Nothing in them is left to Python, and what changes from step to step is not compiled in."""
    fuse()
    compiled = {}

    def traced(update):
        if update not in compiled:
            compiled[update] = torch.compile(update, backend="eager", fullgraph=True, dynamic=False)
        return compiled[update]

    monkeypatch.setattr(placement, "_fused", traced)
    torch._dynamo.reset()
    weight = nn.Parameter(torch.randn(64, 64).bfloat16())
    optimizer = ADMMOptimizer(
        StochasticAdam([weight], lr=1e-3, seed=0),
        [PrunedWeight("w", weight, 900, DENSE)],
        penalty=PenaltySchedule(0.3, "cosine", 9),
        dual=True,
        state_dtype="int8",
        interval=1,
        freeze_step=99,
        budget=SharedBudget(0.0, 0.99),
    )
    graphs = []
    for _ in range(3):
        weight.grad = torch.randn(64, 64).bfloat16()
        optimizer.step()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 5 and graphs[1] == graphs[2]
