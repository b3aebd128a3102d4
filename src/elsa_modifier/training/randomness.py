"""Random generators: what they are in the middle of, as tensors, and putting them back."""

import math
import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

__all__ = ["random_states", "restore_random_states"]


def random_states() -> dict[str, Tensor]:
    """The states of torch's (of the CPU and of the CUDA device in use), NumPy's and Python's generators, on the CPU."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    _, python, python_kept = random.getstate()
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    position = [numpy["state"]["pos"], numpy["has_gauss"]]
    states["python"] = torch.tensor(python, dtype=torch.int64)
    states["numpy"] = torch.tensor([*numpy["state"]["key"].tolist(), *position], dtype=torch.int64)
    # The second of a pair of normal numbers, if only the first was asked for.
    kept = [math.nan if python_kept is None else python_kept, numpy["gauss"]]
    states["kept"] = torch.tensor(kept, dtype=torch.float64)
    return states


def restore_random_states(states: Mapping[str, Tensor]) -> None:
    """Put the generators into states that :func:`random_states` found them in, a device's if there is one."""
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    python, numpy, kept = (states[name].tolist() for name in ("python", "numpy", "kept"))
    random.setstate((3, tuple(python), None if math.isnan(kept[0]) else kept[0]))
    np.random.set_state(("MT19937", np.array(numpy[:-2], dtype=np.uint32), numpy[-2], numpy[-1], kept[1]))
