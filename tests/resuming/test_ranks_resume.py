"""Training checkpoints of real runs under torchrun, gone on from by as many processes, by one, and by more."""

import pytest
import torch

from tests.training.ranks_worker import run, save_models
from tests.training.test_ranks import flat, torchrun

ON_TWO = ["stopped", "stopped elsa-l", "goes on from 1", "goes on from 2", "elsa-l goes on from 2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By number of processes and name; every run takes 12 steps, those that go on the last 8 of them."""
    place = tmp_path_factory.mktemp("ranks")
    save_models(place)
    done = {(1, "stopped"): run("stopped", place)}
    printed = torchrun(2, place, place / "2.pt", *ON_TWO)
    assert printed.returncode == 0, printed.stderr[-3000:]
    done |= {(2, name): result for name, result in torch.load(place / "2.pt").items()}
    done[1, "goes on from 2"] = run("goes on from 2", place)
    return done


@pytest.mark.parametrize("whole,resumed", [("stopped", "goes on from 2"), ("stopped elsa-l", "elsa-l goes on from 2")])
def test_as_many_processes_end_with_the_same_bits(whole, resumed, runs):
    for key, weight in runs[2, whole]["weights"].items():
        assert torch.equal(runs[2, resumed]["weights"][key], weight), key
    assert len(runs[2, resumed]["history"]) == 12 and len(runs[2, resumed]["sent"]) == 8


@pytest.mark.parametrize("count,resumed,whole", [(1, "goes on from 2", 1), (2, "goes on from 1", 2)])
def test_another_number_of_processes_changes_the_order_of_sums_alone(count, resumed, whole, runs):
    several, one = runs[count, resumed], runs[whole, "stopped"]
    assert all(torch.equal(several["masks"][name], mask) for name, mask in one["masks"].items())
    weights, expected = flat(several["weights"]), flat(one["weights"])
    assert float((weights - expected).norm() / expected.norm()) < 1e-5
    assert len(several["sent"]) == 8
