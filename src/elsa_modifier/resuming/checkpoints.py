"""Making training checkpoints while a run is under way, and going on from one."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from elsa_modifier.admm.optimizer import ADMMOptimizer
from elsa_modifier.fields import CheckpointEvery
from elsa_modifier.resuming.directory import CheckpointDirectory
from elsa_modifier.resuming.fingerprint import MAY_CHANGE, differences
from elsa_modifier.resuming.manifest import Manifest
from elsa_modifier.resuming.ranks import is_first_rank, largest_of, new_cpu_group, rank
from elsa_modifier.resuming.signals import StopRequest, stop
from elsa_modifier.resuming.state import Local, itself, load_state, run_tensors
from elsa_modifier.resuming.storage import load_tensors, save_tensors
from elsa_modifier.tracking import Metrics
from elsa_modifier.training.data import ResumableSource
from elsa_modifier.training.loop import StepRecord
from elsa_modifier.training.randomness import random_states, restore_random_states

__all__ = ["Run", "TrainingCheckpoints", "check_identity", "restore"]

_CHECKED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Run:
    """What is under way.

    :param identity: what tells it from others: fingerprints of ``model``, ``recipe`` and ``data``
    :param steps: that it is to take
    :param local: what is stepped of a parameter that is spread over ranks
    """

    model: PreTrainedModel
    optimizer: ADMMOptimizer
    scheduler: LambdaLR
    batches: ResumableSource
    history: list[StepRecord]
    identity: Mapping[str, Mapping[str, Any]]
    steps: int
    local: Local = itself


class TrainingCheckpoints:
    """Makes a checkpoint whenever one is due, and after the last step; a :class:`StepWatcher`.

    With weights on an accelerator the run goes on while a copy in the host's memory is written, where there is room for
    it. On a CPU, writing takes the time of the cores that train, whenever it is done.

    :param directory: where
    :param every: None makes none, also not when told to stop
    :param request: by which to stop
    :param metrics: are told of every step too
    :param resumed: the checkpoint that the run goes on from, if any
    :param asynchronous: None decides as said above
    """

    def __init__(
        self,
        run: Run,
        directory: CheckpointDirectory,
        *,
        every: CheckpointEvery | None,
        request: StopRequest,
        metrics: Metrics | None,
        resumed: Path | None = None,
        asynchronous: bool | None = None,
    ) -> None:
        self._run = run
        self._directory = directory
        self._every = every
        self._request = request
        self._metrics = metrics
        self._last = resumed
        self._last_time = time.monotonic()
        self._agreement, self._writing = new_cpu_group(), new_cpu_group()
        self._asynchronous = asynchronous
        self._stager: DefaultStager | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="elsa-checkpoint")
        self._pending: Future[None] | None = None

    def log(self, record: StepRecord) -> None:
        """Tell the metrics of a step."""
        if self._metrics is not None:
            self._metrics.log(record)

    def after_step(self, step: int, catch_up: Callable[[], None]) -> None:
        """Write what is due.

        :param catch_up: completes the history
        :raises TrainingStopped, SystemExit: if there was a request to stop, once the checkpoint is complete
        """
        if self._every is None:
            return
        if self._pending is not None and self._pending.done():
            self._wait()
        signal, due = largest_of([self._request.signal, self._is_due(step)], self._agreement)
        is_last = step == self._run.steps
        if signal or due or is_last:
            catch_up()
            self._save(step, at_once=bool(signal) or is_last)
        if signal:
            logger.warning(f"Stopped after step {step} of {self._run.steps}. {self.left_behind()}")
            stop(signal)

    def left_behind(self) -> str:
        """What there is to go on from."""
        self._wait()
        if self._last is None:
            return "There is no training checkpoint yet, so the run has to start again from its beginning"
        changeable = ", ".join(sorted(MAY_CHANGE))
        return (
            f"The last training checkpoint is {self._last}. The same command goes on from it; with another value of "
            f"{changeable}, set resume to its path"
        )

    def close(self) -> None:
        """Wait for what is being written."""
        self._wait()
        self._pool.shutdown()
        if self._stager is not None:
            self._stager.close()

    def _is_due(self, step: int) -> bool:
        assert self._every is not None
        if self._every.steps is not None:
            return step % self._every.steps == 0
        assert self._every.minutes is not None
        return is_first_rank() and time.monotonic() - self._last_time >= 60 * self._every.minutes

    def _save(self, step: int, *, at_once: bool) -> None:
        self._wait()
        self._last_time = time.monotonic()
        tensors = run_tensors(self._run.model, self._run.optimizer, self._run.local)
        broken = _not_finite(tensors)
        if largest_of([broken is not None], self._agreement) != [0]:
            logger.warning(
                f"No training checkpoint was made after step {step}: {broken or 'a tensor of another rank'} is not "
                "finite. Those made before stay as they are."
            )
            return
        number = rank()
        for kind, states in (("random", random_states()), ("data", self._run.batches.position())):
            tensors |= {f"{kind}.{number}.{name}": state for name, state in states.items()}
        described = self._described(step)
        if at_once or not self._can_copy(tensors):
            self._write(step, tensors, described)
            return
        if self._stager is None:
            on_device = any(t.device.type != "cpu" for t in tensors.values())
            self._stager = DefaultStager(StagingOptions(on_device, False, False, False))
        staged = self._stager.stage(tensors)
        assert isinstance(staged, dict)
        self._pending = self._pool.submit(self._write, step, staged, described)

    def _can_copy(self, tensors: Mapping[str, Tensor]) -> bool:
        if self._run.optimizer.kept.moves:
            # There is a copy of them in main memory already: the one that the run goes on with.
            return False
        if self._asynchronous is None:
            held = [t.to_local() if isinstance(t, DTensor) else t for t in tensors.values()]
            needed = sum(t.nbytes for t in held if t.device.type != "cpu")
            fits = self._stager is not None or 0 < needed < 0.5 * _memory_available()
            return largest_of([not fits], self._agreement) == [0]
        return self._asynchronous

    def _described(self, step: int) -> dict[str, Any]:
        scheduler = self._run.scheduler
        return {
            "step": step,
            "identity": self._run.identity,
            "progress": self._run.optimizer.progress(),
            "scheduler": {"last_epoch": scheduler.last_epoch, "step_count": scheduler._step_count},
            "history": [record.as_dict() for record in self._run.history],
        }

    def _write(self, step: int, tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> None:
        started = time.monotonic()
        partial = self._directory.partial(step)
        try:
            save_tensors(tensors, partial, described, self._writing)
            place = self._directory.path / f"step-{step:08d}"
            if is_first_rank():
                place = self._directory.commit(partial)
        except OSError as error:
            if is_first_rank():
                self._directory.discard(partial)
            last = self._last or "none"
            logger.warning(
                f"The training checkpoint of step {step} could not be written ({error}); the run goes on, and the "
                f"last good one is {last}. Free some space in {self._directory.path}, or lower checkpoint_keep."
            )
            return
        self._last = place
        logger.info(f"Training checkpoint {place}: {time.monotonic() - started:.1f} s")

    def _wait(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()


def check_identity(
    checkpoint: Path, manifest: Manifest, identity: Mapping[str, Mapping[str, Any]], *, by_path: bool
) -> None:
    """Refuse to go on from another run's checkpoint.

    :param by_path: whether it was named, and so a few fields of the recipe may be others
    :raises ValueError: says what differs
    """
    saved: dict[str, dict[str, Any]] = manifest.run["identity"]
    found = []
    for kind, now in identity.items():
        allowed = MAY_CHANGE if by_path and kind == "recipe" else frozenset()
        there = {k: v for k, v in saved[kind].items() if k not in allowed}
        here = {k: v for k, v in now.items() if k not in allowed}
        found += [f"{kind}: {difference}" for difference in differences(there, here)]
    if found:
        changeable = ", ".join(sorted(MAY_CHANGE))
        raise ValueError(
            f"the training checkpoint {checkpoint} is not of this run. {'; '.join(found)}. Give what it was made with "
            f"({changeable} may be others if resume is its path); or set resume to never, which begins anew and "
            "replaces it, or checkpoint_dir to another directory"
        )


def restore(run: Run, checkpoint: Path, manifest: Manifest) -> None:
    """Put a run that has taken no step where the checkpoint's was. Random generators come last."""
    group = new_cpu_group()
    load_state(run.model, run.optimizer, checkpoint, manifest, local=run.local, group=group)
    run.optimizer.restore_progress(manifest.run["progress"])
    _restore_scheduler(run.scheduler, manifest.run["scheduler"])
    run.history[:] = [StepRecord(**record) for record in manifest.run["history"]]
    own: dict[str, dict[str, Tensor]] = {}
    for kind in ("data", "random"):
        prefix = f"{kind}.{rank()}."
        own[kind] = {
            name.removeprefix(prefix): torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
            for name, entry in manifest.tensors.items()
            if name.startswith(prefix)
        }
    named = {f"{kind}.{rank()}.{name}": t for kind, states in own.items() for name, t in states.items()}
    load_tensors(named, checkpoint, manifest, group)
    run.batches.restore_position(own["data"])
    if own["random"]:
        restore_random_states(own["random"])
    logger.info(f"Going on after step {manifest.run['step']} of {run.steps}, from {checkpoint}.")


def _restore_scheduler(scheduler: LambdaLR, saved: Mapping[str, int]) -> None:
    scheduler.last_epoch, scheduler._step_count = saved["last_epoch"], saved["step_count"]
    for group, base, factor in zip(
        scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        rate = base * factor(scheduler.last_epoch)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


def _not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor that has a value that is not finite."""
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.dtype in _CHECKED and not name.startswith("random.") and not bool(torch.isfinite(local).all()):
            return name
    return None


def _memory_available() -> int:
    """Bytes of the host's memory that nothing needs; 0 where it cannot be told."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 0)
