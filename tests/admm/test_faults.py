import math

import pytest
import torch

from elsa_modifier.admm import bitscan
from elsa_modifier.admm.bitscan import HIGHEST, fault_of, score_bits
from elsa_modifier.admm.selection import largest_mask
from tests.admm.test_optimizer import build, problem

LARGEST, SMALLEST = torch.finfo(torch.float32).max, 2.0**-149

FAULTS = [
    (0.0, ""),
    (SMALLEST, ""),
    (LARGEST, ""),
    (math.inf, "not finite"),
    (math.nan, "not finite"),
    (-0.0, "negative"),
    (-SMALLEST, "negative"),
    (-LARGEST, "negative"),
    (-math.inf, "not finite"),
    (-math.nan, "not finite"),
]


@pytest.mark.parametrize(("score", "fault"), FAULTS, ids=str)
@pytest.mark.parametrize("count", [1, 7])
def test_the_borders_of_what_can_be_ranked(count, score, fault):
    scores = torch.ones(count)
    scores[-1] = score
    assert fault_of(score_bits(scores)) == fault
    if fault:
        with pytest.raises(ValueError, match="NaN or infinity" if fault == "not finite" else r"negative, or -0\.0"):
            largest_mask(scores, 1)
    else:
        assert int(largest_mask(scores, 1).sum()) == 1


def test_bits_rank_as_floats_do():
    scores = torch.tensor([0.0, SMALLEST, 1e-38, 1e-3, 1.0, 1.5, 1e30, LARGEST])
    bits = score_bits(scores)
    assert bits.dtype == torch.int32 and bits.tolist() == sorted(bits.tolist()) and int(bits[-1]) == HIGHEST
    assert score_bits(scores.view(2, 4).T).shape == (8,)


def test_nothing_has_entered_before_the_first_projection():
    weight, bias, loss = problem()
    optimizer = build(weight, torch.optim.Adam([weight, bias], lr=0.01), interval=4)
    assert float(optimizer.last_residual) >= 0 and int(optimizer.last_entered) == 0
    loss(0).backward()
    optimizer.step()
    assert 0 < float(optimizer.last_residual) <= 1 and optimizer.projection_count == 1


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_parts_cover_the_entries_once(threads, monkeypatch):
    monkeypatch.setattr(bitscan, "_ENTRIES_PER_THREAD", 10)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    parts = bitscan._on_parts(lambda part: part, torch.arange(35, dtype=torch.int32))
    assert len(parts) == threads and [i for part in parts for i in range(part.start, part.stop)] == list(range(35))
    # Too little for a second thread.
    assert bitscan._on_parts(lambda part: part, torch.arange(19, dtype=torch.int32)) == [slice(0, 19)]
