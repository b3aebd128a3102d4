"""Selection by sorting everything. What ``elsa_modifier.admm.selection`` and ``budget`` must agree with."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def sorted_mask(scores: Tensor, keep: int) -> Tensor:
    """The ``keep`` largest scores by a stable sort: ties to the lower index."""
    flat = scores.flatten()
    mask = torch.zeros(flat.numel(), dtype=torch.bool)
    mask[torch.from_numpy(np.argsort(-flat.numpy(), kind="stable")[:keep])] = True
    return mask.reshape(scores.shape)


def greedy_keeps(
    scores: Sequence[Tensor], total_keep: int, smallest: Sequence[int], largest: Sequence[int]
) -> list[int]:
    """Each tensor takes its fewest; the largest scores not yet taken get what is left, unless their tensor is full."""
    keeps = list(smallest)
    waiting = []
    for i, tensor in enumerate(scores):
        descending = sorted(tensor.flatten().tolist(), reverse=True)
        waiting += [(-score, i) for score in descending[smallest[i] :]]
    for _, i in sorted(waiting):
        if sum(keeps) < total_keep and keeps[i] < largest[i]:
            keeps[i] += 1
    return keeps
