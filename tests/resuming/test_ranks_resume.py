"""Training checkpoints of real runs under torchrun, gone on from by as many processes, by one, and by more."""

import pytest
import torch

from elsa_modifier.resuming.directory import complete_checkpoints
from elsa_modifier.resuming.manifest import read_verified
from tests.training.ranks_worker import run, save_models
from tests.training.test_ranks import flat, torchrun

ON_TWO = ["stopped", "stopped elsa-l", "goes on from 1", "goes on from 2", "elsa-l goes on from 2", "disk full"]
# After the first of these the process group is that of a run that was stopped, or failed.
ON_TWO += ["told to stop", "goes on after the signal", "damaged", "diverges"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By number of processes and name; every run takes 12 steps, those that go on the last 8 of them."""
    place = tmp_path_factory.mktemp("ranks")
    save_models(place)
    done = {(1, "stopped"): run("stopped", place)}
    printed = torchrun(2, place, place / "2.pt", *ON_TWO)
    assert printed.returncode == 0, printed.stderr[-3000:]
    done |= {(2, name): result for name, result in torch.load(place / "2.pt").items()}
    for name, result in torch.load(place / "2.pt.1").items():
        done[2, name]["other"] = result
    done[1, "goes on from 2"] = run("goes on from 2", place)
    done["said"] = printed.stdout + printed.stderr
    done["place"] = place
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


def checkpoints(runs, name):
    return [path.name for path in complete_checkpoints(runs["place"] / f"{name}-2")][::-1]


def test_a_signal_to_one_rank_stops_all_after_the_step(runs):
    stopped = runs[2, "told to stop"]
    assert stopped["raised"] == stopped["other"] == "SystemExit: 143"
    assert "Stopped after step 3 of 12" in runs["said"]
    assert checkpoints(runs, "told to stop")[0] == "step-00000003"
    assert "Going on after step 3 of 12" in runs["said"]
    resumed = runs[2, "goes on after the signal"]
    assert len(resumed["sent"]) == 9
    for key, weight in runs[2, "stopped"]["weights"].items():
        assert torch.equal(resumed["weights"][key], weight), key


def test_a_disk_that_is_full_for_one_rank_does_not_end_the_run(runs):
    for key, weight in runs[2, "stopped"]["weights"].items():
        assert torch.equal(runs[2, "disk full"]["weights"][key], weight), key
    assert checkpoints(runs, "disk full") == ["step-00000004"]
    read_verified(runs["place"] / "disk full-2" / "step-00000004")
    for step in (8, 12):
        assert f"The training checkpoint of step {step} could not be written ([Errno 28] No space left" in runs["said"]


def test_all_ranks_refuse_a_damaged_checkpoint(runs):
    refused = runs[2, "damaged"]
    assert refused["raised"] == refused["other"]
    assert refused["raised"].startswith("CheckpointDamaged: ") and "rank-00001.safetensors" in refused["raised"]


def test_all_ranks_stop_at_a_loss_that_is_not_finite(runs):
    diverged = runs[2, "diverges"]
    assert diverged["raised"] == diverged["other"]
    assert diverged["raised"].startswith("TrainingDiverged: step ") and "Lower lr" in diverged["raised"]
