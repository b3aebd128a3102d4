import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elsa_modifier.admm.bitmask import count_entered, pack_bits, select_by_bits, unpack_bits
from elsa_modifier.admm.projection import MaskStructure, parse_mask_structure, projection_scores, sparse_mask
from tests.reference.admm import fisher_scores, keep_mask

# Few distinct values make ties; the extremes make overflow and underflow.
VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 3e-39, 1e-30, -3e38, 3e38]) | st.floats(
    -(2.0**100), 2.0**100, width=32
)
FLOAT32 = dict(dtype=torch.float32)


@st.composite
def matrices(draw, columns=None):
    rows, cols = draw(st.integers(1, 8)), draw(st.integers(1, 40) if columns is None else columns)
    return torch.tensor(draw(st.lists(VALUES, min_size=rows * cols, max_size=rows * cols)), **FLOAT32).view(rows, cols)


@settings(max_examples=400, deadline=None)
@given(matrices(), st.data())
def test_unstructured_mask_is_the_twins(v, data):
    keep = data.draw(st.sampled_from([0, v.numel(), v.numel() // 2]) | st.integers(0, v.numel()))
    mask = sparse_mask(projection_scores(v), keep)
    assert mask.dtype == torch.bool and mask.shape == v.shape
    assert int(mask.sum()) == keep
    assert torch.equal(mask, keep_mask(v.abs(), keep))


@settings(max_examples=200, deadline=None)
@given(matrices(), st.data())
def test_fisher_mask_is_the_twins(v, data):
    v = v.clamp(-1e15, 1e15)
    fisher = torch.tensor(
        data.draw(st.lists(st.sampled_from([0.0, -0.0, 1e-12, 1.0, 4.0]), min_size=v.numel(), max_size=v.numel())),
        **FLOAT32,
    ).view_as(v)
    keep = data.draw(st.integers(0, v.numel()))
    assert torch.equal(sparse_mask(projection_scores(v, fisher), keep), keep_mask(fisher_scores(v, fisher), keep))


def test_where_the_fisher_is_zero_magnitudes_decide():
    v = torch.tensor([[0.1, -3.0, 2.0, 0.0, 1e-6, -1.0]])
    fisher = torch.tensor([[0.0, 0.0, -0.0, 0.0, 1e-20, 0.0]])
    # The one entry that is known to matter comes first, however small; the others follow by size.
    for keep, kept in ((1, [4]), (2, [1, 4]), (3, [1, 2, 4]), (4, [1, 2, 4, 5]), (5, [0, 1, 2, 4, 5])):
        assert sparse_mask(projection_scores(v, fisher), keep).flatten().nonzero().flatten().tolist() == kept
    structure = MaskStructure(2, 3)
    assert sparse_mask(projection_scores(v, torch.zeros_like(v)), 0, structure).flatten().tolist() == [0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize("size", range(2, 17))
def test_every_pattern_is_the_twins(size):
    torch.manual_seed(size)
    for zeroed in range(1, size):
        # Small integers: most groups hold ties.
        scores = torch.randint(0, 4, (5, 3 * size)).float()
        mask = sparse_mask(scores, 0, MaskStructure(zeroed, size))
        assert (mask.view(-1, size).sum(dim=1) == size - zeroed).all()
        assert torch.equal(mask, keep_mask(scores, 0, (zeroed, size)))


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 9).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))), st.data())
def test_patterns_on_generated_values(pattern, data):
    zeroed, size = pattern
    v = data.draw(matrices(columns=st.integers(1, 4).map(lambda groups: groups * size)))
    assert torch.equal(sparse_mask(v.abs(), 0, MaskStructure(zeroed, size)), keep_mask(v.abs(), 0, pattern))


@pytest.mark.parametrize("shape", [(1, 1), (1,), (0, 3)])
@pytest.mark.parametrize("everything", [False, True])
def test_smallest_tensors(shape, everything):
    scores = torch.ones(shape)
    keep = scores.numel() if everything else 0
    assert torch.equal(sparse_mask(scores, keep), torch.full(shape, everything))


def test_large_tensor_of_ties_keeps_the_first():
    scores = torch.ones(300_000)
    scores[7] = 2.0
    mask = sparse_mask(scores, 100_001)
    assert mask[:100_001].all() and not mask[100_001:].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("structure", [MaskStructure(), MaskStructure(2, 4)])
def test_a_value_that_is_not_finite_is_refused(bad, structure):
    v = torch.randn(4, 8)
    v[2, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        sparse_mask(projection_scores(v), 16, structure)


@pytest.mark.parametrize("keep", [-1, 33])
def test_keep_outside_the_tensor_is_refused(keep):
    with pytest.raises(ValueError, match="allowed is 0 to 32"):
        sparse_mask(torch.ones(4, 8), keep)


def test_width_must_fit_the_group():
    with pytest.raises(ValueError, match="divisible by 4, not 6"):
        sparse_mask(torch.ones(2, 6), 0, MaskStructure(2, 4))


def test_parse_mask_structure():
    assert parse_mask_structure("unstructured").is_unstructured
    assert parse_mask_structure("4:8") == MaskStructure(4, 8)
    for text in ("4:4", "0:4", "4:2", "2-4", "", "2:4:8", "dense"):
        with pytest.raises(ValueError, match="mask_structure is"):
            parse_mask_structure(text)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.booleans(), max_size=70), st.data())
def test_bits_round_trip(entries, data):
    mask = torch.tensor(entries, dtype=torch.bool)
    bits = pack_bits(mask)
    assert bits.numel() == -(-len(entries) // 8)
    assert torch.equal(unpack_bits(bits, mask.shape), mask)
    expected = torch.where(mask, 2.5, -1.0)
    assert torch.equal(select_by_bits(bits, mask.shape, 2.5, -1.0), expected)
    assert torch.equal(select_by_bits(bits, mask.shape, 2.5, -1.0, torch.empty(len(entries) + 7)), expected)
    other = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=len(entries), max_size=len(entries))), dtype=torch.bool
    )
    assert int(count_entered(pack_bits(other), bits)) == int((other & ~mask).sum())


def test_bit_order_is_little_endian():
    assert pack_bits(torch.tensor([True, False, False, True] + [False] * 8 + [True])).tolist() == [0b1001, 0b10000]
