"""Making a model ready to be trained, over as many ranks as there are, and giving it back."""

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from elsa_modifier.training.fully_sharded import FullySharded
from elsa_modifier.training.model_state import trainable, training_mode, undispatched
from elsa_modifier.training.parallel import Alone, ParallelName, Replicated
from elsa_modifier.training.ranks import Ranks

__all__ = ["spread"]


@contextmanager
def spread(
    model: PreTrainedModel,
    device: torch.device,
    ranks: Ranks | None,
    *,
    parallel: ParallelName,
    seed: int,
    autocast: bool,
    dtype: torch.dtype,
    activation_checkpointing: bool,
    frozen: AbstractSet[str],
) -> Iterator[Alone]:
    """Within the context there is something to train; afterwards ``model`` has the trained values.

    On ranks where it is a placeholder (:mod:`elsa_modifier.training.loading`) it stays one. If the body fails among
    several ranks with a part each, the model is as it was.

    :param ranks: None for one process
    :param parallel: how several ranks share the work; see :class:`~elsa_modifier.modifier.ELSAModifier`
    :param autocast: whether the model computes in bf16
    :param dtype: see :func:`~elsa_modifier.training.model_state.trainable`, as for the others
    """
    if ranks is None or parallel == "ddp":
        with trainable(model, device, dtype=dtype, activation_checkpointing=activation_checkpointing, frozen=frozen):
            yield Alone(model) if ranks is None else Replicated(model, ranks, seed)
        return
    with undispatched(model, device):
        run = FullySharded(model, ranks, seed, dtype=dtype, autocast=autocast, frozen=frozen)
        with training_mode(run.model, activation_checkpointing=activation_checkpointing):
            yield run
        run.write_back()
