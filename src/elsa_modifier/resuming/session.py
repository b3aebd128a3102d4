"""A run with training checkpoints from its first step, or the one that it goes on from, to its last."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elsa_modifier.fields import CheckpointEvery
from elsa_modifier.resuming.checkpoints import Run, TrainingCheckpoints, check_identity, restore
from elsa_modifier.resuming.directory import CheckpointDirectory, find_checkpoint
from elsa_modifier.resuming.ranks import first_rank_decides, is_first_rank, new_cpu_group
from elsa_modifier.resuming.signals import StopRequest, catching_stop_requests
from elsa_modifier.tracking import Metrics, check_trackers

__all__ = ["Checkpointing", "checkpointing_of"]


@dataclass(frozen=True)
class Checkpointing:
    """What the recipe says about training checkpoints.

    :param directory: of this modifier's run; None makes and reads none, unless ``resume`` is a path
    :param resume: ``auto``, ``never`` or a path
    """

    every: CheckpointEvery | None
    directory: Path | None
    keep: int
    resume: str
    track: Sequence[str]

    @property
    def in_use(self) -> bool:
        """Whether there is anything to do."""
        return self.directory is not None or self.resume not in ("auto", "never")

    @contextmanager
    def watching(self, run: Run, configuration: Mapping[str, Any]) -> Iterator[TrainingCheckpoints | None]:
        """Put the run where it goes on from; within the context, make checkpoints of it.

        :param configuration: what trackers show
        :raises ValueError: if there is a checkpoint that is damaged, or of another run
        :raises OSError: if the directory cannot be written to, or another process does
        """
        group = new_cpu_group()
        with ExitStack() as stack:
            directory = None
            if self.directory is not None:
                directory = CheckpointDirectory(self.directory, self.keep)
                first_rank_decides(directory.open, group)
                stack.callback(directory.release)
            found = None
            if self.resume != "never":
                found = first_rank_decides(lambda: find_checkpoint(self.resume, self.directory), group)
            if found is not None:
                check_identity(*found, run.identity, by_path=self.resume != "auto")
                restore(run, *found)
            if directory is None:
                yield None
                return
            checkpoint = found[0] if found else None
            metrics = None
            if is_first_rank():
                if self.every is not None:
                    directory.go_on_from(checkpoint)
                metrics = Metrics(directory.path, run.history, self.track, configuration)
                stack.callback(metrics.close)
            request = StopRequest()
            if self.every is not None:
                request = stack.enter_context(catching_stop_requests())
            checkpoints = TrainingCheckpoints(
                run, directory, every=self.every, request=request, metrics=metrics, resumed=checkpoint
            )
            stack.callback(checkpoints.close)
            yield checkpoints


def checkpointing_of(modifier: Any, place: int, output: Path | None) -> Checkpointing:
    """What the fields of an ELSAModifier say.

    :param place: among the modifiers of the recipe that train, from 0; each has a directory of its own
    :param output: where the pruned model will be saved, if that is known
    :raises ValueError: if a directory is needed and none is known, or a tracker is not to be had
    """
    check_trackers(modifier.track)
    directory = None
    if modifier.checkpoint_dir is not None:
        directory = Path(modifier.checkpoint_dir)
    elif output is not None:
        directory = output.with_name(f"{output.name}-training")
    wanted = [name for name in ("checkpoint_every", "track") if getattr(modifier, name)]
    if wanted and directory is None:
        raise ValueError(
            f"{wanted[0]} is set, and where to write is not known: set checkpoint_dir, or give oneshot an output_dir"
        )
    if not wanted and modifier.checkpoint_dir is None:
        directory = None
    if directory is not None and place:
        directory = directory / f"modifier-{place + 1}"
    return Checkpointing(
        modifier.checkpoint_every, directory, modifier.checkpoint_keep, modifier.resume, list(modifier.track)
    )
