from pathlib import Path

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from loguru import logger

from elsa_modifier import ELSAModifier
from elsa_modifier.resuming.checkpoints import TrainingCheckpoints
from elsa_modifier.training import loop

FIELDS = dict(
    sparsity=0.8, steps=12, batch_size=2, sequence_length=16, interval=3, lr=1e-3, precision="fp32", finalize=0.7
)


class Killed(BaseException):
    """As after kill -9 nothing of the package runs any more, this is nothing that it could catch for a reason."""


@pytest.fixture
def prune(checkpoint, texts, tmp_path, monkeypatch):
    """Function that runs ``oneshot`` on a tiny model, perhaps until after a step only; returns model and modifier."""

    def prune(out="out", *, model="llama", dataset=None, killed_after=None, modifier=None, save=True, **fields):
        reset_session()
        modifier = modifier or ELSAModifier(**(FIELDS | {"checkpoint_every": {"steps": 3}} | fields))
        inner = TrainingCheckpoints.after_step

        def after_step(self, step, catch_up):
            inner(self, step, catch_up)
            if step == killed_after:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(TrainingCheckpoints, "after_step", after_step)
            result = oneshot(
                model=str(model if isinstance(model, Path) else checkpoint(model)),
                dataset=texts if dataset is None else dataset,
                recipe=[modifier],
                output_dir=str(tmp_path / out) if save else None,
            )
        return result, modifier

    return prune


def different(a, b):
    """Names of the tensors that are not the same in two models, bit for bit."""
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    return [n for n in first if not torch.equal(first[n], second[n]) or first[n].dtype != second[n].dtype]


@pytest.fixture
def at_step(monkeypatch):
    """Function that has an action run in the middle of a step, in the forward pass, from 1; with the live model."""

    def at_step(step, action):
        inner = loop._accumulate_gradients
        count = iter(range(1, 1000))

        def accumulate(model, *args):
            if next(count) == step:
                action(model)
            return inner(model, *args)

        monkeypatch.setattr(loop, "_accumulate_gradients", accumulate)

    return at_step


@pytest.fixture
def warnings_said():
    """What is logged as a warning or worse."""
    said = []
    handler = logger.add(lambda message: said.append(message.record["message"]), level="WARNING")
    yield said
    logger.remove(handler)
