"""Metrics while a run is under way: a line of JSON a step, and accelerate's trackers (TensorBoard and others)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from loguru import logger

from elsa_modifier.training.loop import StepRecord

__all__ = ["METRICS_FILE", "Metrics", "check_trackers"]

METRICS_FILE = "metrics.jsonl"
_RUN_NAME = "elsa"


def check_trackers(names: Sequence[str]) -> None:
    """:raises ValueError: for a tracker that accelerate does not know, or whose package is not installed"""
    installed = sorted(str(name) for name in get_available_trackers())
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"track has {name!r}; allowed are {', '.join(sorted(map(str, LOGGER_TYPE_TO_CLASS)))}")
        if name not in installed:
            found = f"here there are {', '.join(installed)}" if installed else "none is installed here"
            raise ValueError(f"track has {name!r}, which is not installed ({found}); pip install {name}")


class Metrics:
    """``metrics.jsonl`` in a directory, a step record a line, and the same for trackers.

    What cannot be written is told once, and stops no run.

    :param directory: exists
    :param past: records of the steps before this process, which the file is to have and may have more than
    :param trackers: see :func:`check_trackers`
    :param configuration: what trackers show beside the run
    """

    def __init__(
        self, directory: Path, past: Sequence[StepRecord], trackers: Sequence[str], configuration: Mapping[str, Any]
    ) -> None:
        self._file = directory / METRICS_FILE
        self._failed = False
        self._trackers = [_start(name, directory, configuration) for name in trackers]
        self._write("w", past)

    def log(self, record: StepRecord) -> None:
        """Write a step."""
        self._write("a", [record])
        values = record.as_dict()
        step = values.pop("step")
        for tracker in self._trackers:
            tracker.log(values, step=step)

    def close(self) -> None:
        """End what trackers have begun."""
        for tracker in self._trackers:
            tracker.finish()

    def _write(self, mode: str, records: Sequence[StepRecord]) -> None:
        if self._failed:
            return
        try:
            with self._file.open(mode) as opened:
                opened.writelines(json.dumps(record.as_dict()) + "\n" for record in records)
        except OSError as error:
            self._failed = True
            logger.warning(f"{self._file} cannot be written ({error.strerror}); the run goes on without it.")


def _start(name: str, directory: Path, configuration: Mapping[str, Any]) -> GeneralTracker:
    kind = LOGGER_TYPE_TO_CLASS[name]
    where = {"logging_dir": str(directory)} if kind.requires_logging_directory else {}
    tracker = kind(_RUN_NAME, **where)
    tracker.start()
    flat = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in configuration.items()}
    tracker.store_init_configuration(flat)
    return tracker
