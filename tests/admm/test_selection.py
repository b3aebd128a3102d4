import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elsa_modifier.admm import bitscan, selection
from elsa_modifier.admm.bitscan import score_bits
from elsa_modifier.admm.selection import find_threshold, largest_mask
from tests.reference.selection import sorted_mask

# Few distinct values make ties; the rest reaches from the smallest subnormal to the largest float.
VALUES = st.sampled_from([0.0, 1.0, 0.5, 1e-45, 3e-39, 3.4028234663852886e38]) | st.floats(
    0.0, 3.4028234663852886e38, width=32
)


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """Count the smallest tensors too, rather than partition them."""
    monkeypatch.setattr(selection, "_PARTITIONED_BELOW", 0)


@pytest.fixture(params=["partition", "counts"])
def backend(request, monkeypatch):
    """Both ways to select; counts in chunks that a small tensor has several of."""
    if request.param == "partition":
        monkeypatch.setattr(selection, "_PARTITIONED_BELOW", 1 << 20)
    else:
        monkeypatch.setattr(bitscan, "_CHUNK", 10_007)


@pytest.fixture
def sampled(monkeypatch):
    """Take a sample of the smallest tensors too."""
    monkeypatch.setattr(selection, "_SAMPLED_FROM", 1)


def tensors():
    """Large enough for a sample and several chunks, of every kind of distribution."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(200_000, generator=generator).abs_()
    uniform = torch.rand(200_000, generator=generator)
    return {
        "normal": normal,
        "wide": (normal * 30).exp_().clamp_(max=3e38),
        "half zeros": normal * (uniform < 0.5),
        "few values": (uniform * 5).floor_(),
        "all equal": torch.full((200_000,), 0.25),
        "subnormal": uniform * 1e-39,
        "ascending": uniform.sort().values,
        # No entry of the sample is like the others.
        "one in a row": torch.where(torch.arange(200_000) % 59 == 29, 1e6 * uniform, uniform),
    }


TENSORS = tensors()
KEEPS = [0, 1, 2, 777, 20_000, 99_999, 100_000, 150_001, 199_999, 200_000]


@pytest.mark.parametrize("name", TENSORS)
def test_mask_is_the_sorted_ones(name, backend):
    scores = TENSORS[name]
    for keep in KEEPS:
        assert torch.equal(largest_mask(scores, keep), sorted_mask(scores, keep)), keep


@settings(max_examples=300, deadline=None)
@given(st.lists(VALUES, max_size=60), st.data())
def test_small_tensors(values, data):
    scores = torch.tensor(values, dtype=torch.float32)
    keep = data.draw(st.integers(0, len(values)))
    assert torch.equal(largest_mask(scores, keep), sorted_mask(scores, keep))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_bracket_that_misses_changes_nothing(data):
    scores = torch.tensor(data.draw(st.lists(VALUES, min_size=1, max_size=60)), dtype=torch.float32)
    keep = data.draw(st.integers(0, scores.numel()))
    ends = sorted(data.draw(st.integers(0, bitscan.HIGHEST)) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_SAMPLED_FROM", 1)
        patch.setattr(selection, "_sampled_bracket", lambda *arguments: tuple(ends))
        assert torch.equal(largest_mask(scores, keep), sorted_mask(scores, keep))


def test_threads_change_nothing(monkeypatch):
    monkeypatch.setattr(bitscan, "_ENTRIES_PER_THREAD", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for name in ("normal", "few values", "all equal"):
        assert torch.equal(largest_mask(TENSORS[name], 77_777), sorted_mask(TENSORS[name], 77_777))


def test_threshold_counts_what_is_above_and_equal():
    scores = torch.tensor([3.0, 1.0, 2.0, 2.0, 2.0, 0.0])
    found = find_threshold([lambda: score_bits(scores)], [6], 3, [0], [6])
    assert torch.tensor(found.bits, dtype=torch.int32).view(torch.float32) == 2.0
    assert (found.above.tolist(), found.ties.tolist()) == ([1], [3])


def test_one_read_in_the_order_of_the_tensor_is_not_needed():
    """A transposed view has the indices of its own shape."""
    scores = TENSORS["few values"].view(400, 500).T
    assert torch.equal(largest_mask(scores, 70_000), sorted_mask(scores.contiguous(), 70_000))


def test_ties_are_not_copied():
    scores = torch.zeros(4_000_000)
    scores[::2] = torch.rand(2_000_000)
    held = bitscan.scan(score_bits(scores), 0, 1, int(selection._HELD_FRACTION * scores.numel()))
    assert held.inside >= 2_000_000 and held.candidates is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("nan")])
@pytest.mark.parametrize("size", [10, 100_000])
def test_a_score_that_is_not_finite_is_refused_wherever_it_is(bad, size, backend):
    for position in (0, size // 2, size - 1):
        scores = torch.rand(size)
        scores[position] = bad
        for keep in (0, size // 3, size):
            with pytest.raises(ValueError, match="NaN or infinity"):
                largest_mask(scores, keep)


@pytest.mark.parametrize("bad", [-1.0, -0.0, -1e-45])
@pytest.mark.parametrize("size", [10, 100_000])
def test_a_score_with_a_sign_is_refused(bad, size, backend):
    scores = torch.rand(size)
    scores[size // 2] = bad
    with pytest.raises(ValueError, match="take their absolute values"):
        largest_mask(scores, size // 3)


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match=r"allowed is torch\.float32"):
        largest_mask(torch.ones(4, dtype=torch.bfloat16), 2)


def test_samples_find_the_bracket(sampled):
    """The sample is there to save time: on scores without many ties it must hold few candidates, and not miss."""
    for name in ("normal", "wide", "subnormal", "ascending"):
        bits = score_bits(TENSORS[name])
        target = selection._Target(40_000, torch.tensor([0]), torch.tensor([200_000]))
        low, high = selection._sampled_bracket([lambda bits=bits: bits], 200_000, target)
        found = bitscan.scan(bits, low, high, 200_000)
        assert found.above < 40_000 <= found.above + found.inside
        assert found.inside < 0.1 * 200_000
