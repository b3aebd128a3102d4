"""Trackers are told what the history has; a disk that is full stops no run."""

import json

import pytest
from accelerate import tracking
from accelerate.tracking import GeneralTracker

from elsa_modifier import ELSAModifier
from elsa_modifier.tracking import Metrics, check_trackers
from elsa_modifier.training.loop import StepRecord
from tests.resuming.conftest import prune

__all__ = ["prune"]


def record(step):
    return StepRecord(step, 2.5, 1e-3, 0.3, 1.0, 30, 0.1, 0.0)


@pytest.fixture
def recorder(monkeypatch):
    """A tracker that keeps what it is told, under a name that accelerate finds installed."""
    told = []

    class Recorder(GeneralTracker):
        name = "recorder"
        requires_logging_directory = True

        def __init__(self, run_name, logging_dir):
            super().__init__()
            told.append(("started", run_name, logging_dir))

        tracker = property(lambda self: None)

        def store_init_configuration(self, values):
            told.append(("configuration", values))

        def log(self, values, step=None, **kwargs):
            told.append((step, values))

        def finish(self):
            told.append(("finished",))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    monkeypatch.setattr("elsa_modifier.tracking.get_available_trackers", lambda: ["recorder"])
    return told


def test_a_tracker_gets_every_step(prune, tmp_path, recorder):
    _, modifier = prune(track="recorder", checkpoint_every=None)
    started, configuration, *steps, finished = recorder
    assert started == ("started", "elsa", str(tmp_path / "out-training")) and finished == ("finished",)
    assert configuration[1]["sparsity"] == 0.8 and configuration[1]["penalty"].startswith("{")
    assert steps == [(r.step, {k: v for k, v in r.as_dict().items() if k != "step"}) for r in modifier.history]
    assert not list((tmp_path / "out-training").glob("step-*"))


def test_trackers_that_are_not_to_be_had(recorder):
    with pytest.raises(ValueError, match=r"track has 'paper'; allowed are .*tensorboard"):
        check_trackers(["paper"])
    with pytest.raises(ValueError, match=r"track has 'wandb', which is not installed \(here there are recorder\)"):
        check_trackers(["recorder", "wandb"])
    assert ELSAModifier(sparsity=0.5, track="wandb").track == ["wandb"]


def test_a_full_disk_is_told_once(tmp_path):
    from loguru import logger

    metrics = Metrics(tmp_path, [record(1)], [], {})
    metrics.log(record(2))
    (tmp_path / "metrics.jsonl").rename(tmp_path / "kept")
    (tmp_path / "metrics.jsonl").mkdir()
    said = []
    handler = logger.add(lambda message: said.append(message), level="WARNING")
    metrics.log(record(3))
    metrics.log(record(4))
    logger.remove(handler)
    assert len(said) == 1 and "cannot be written" in said[0]
    assert [json.loads(line)["step"] for line in (tmp_path / "kept").read_text().splitlines()] == [1, 2]
