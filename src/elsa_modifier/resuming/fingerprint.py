"""What a training checkpoint may be resumed with: the same model, recipe and data. And saying what differs."""

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from elsa_modifier.training.digest import sha256_of
from elsa_sparse.errors import printable

__all__ = ["MAY_CHANGE", "differences", "model_fingerprint", "recipe_fingerprint"]

# Entries of a tensor that are looked at. A model trained further differs in nearly all.
_SAMPLED = 1024
_TOLD = 3
# Fields that say where and when something is written or kept, and nothing about the weights.
_ELSEWHERE = {"checkpoint", "checkpoint_every", "checkpoint_dir", "checkpoint_keep"}
_ELSEWHERE |= {"resume", "track", "parallel", "offload_state"}
# Fields that neither the shape of the run's state nor what came before depends on: they may differ where a checkpoint
# is named by its path, as one that is to go on in another way has to be.
MAY_CHANGE = frozenset({"lr", "max_grad_norm", "precision", "activation_checkpointing"})


def model_fingerprint(model: nn.Module) -> dict[str, str]:
    """Dtype, shape and a checksum of some entries of every parameter, by name; every rank must call this."""
    return {name: _of_tensor(p.detach()) for name, p in model.named_parameters()}


def recipe_fingerprint(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the result depends on."""
    # Of llm-compressor's own (names with _ at the end, and what it keeps) none does.
    own = {"index", "group", "start", "end", "update"}
    found = {k: v for k, v in fields.items() if not k.endswith("_") and k not in own | _ELSEWHERE}
    read_again: dict[str, Any] = json.loads(json.dumps(found))
    return read_again


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, in words: ``name: a there, b here``; the first few, and how many more there are."""
    missing = "nothing"
    found = [
        f"{printable(name, 100)}: {printable(saved.get(name, missing), 100)} there, "
        f"{printable(now.get(name, missing), 100)} here"
        for name in {**saved, **now}
        if saved.get(name, missing) != now.get(name, missing)
    ]
    more = len(found) - _TOLD
    return [*found[:_TOLD], f"and {more} more"] if more > 0 else found


def _of_tensor(tensor: Tensor) -> str:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    flat = whole.reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED]
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {sha256_of(sample)[:16]}"
