"""Passes over fp32 scores, read as the integers that their bits spell: counting, collecting, histograms, masks.

The bit patterns of non-negative floats rank as the floats do, and infinity and NaN come above all finite ones. So an
interval of scores is an interval of int32, exact ranks come from counting, and what is not finite shows in the maximum.

Every pass goes through the tensor in chunks and never holds more than a chunk of temporaries. numpy reads tensors in
main memory, several times faster than torch compares and counts there; torch reads all others. Both take the same
steps, written once: ``_Namespace`` is numpy or torch.
"""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = ["HIGHEST", "Scan", "histogram", "mask_from", "scan", "score_bits"]

# Bits of the largest finite float. Above it: infinity, NaN and, read as unsigned, everything with a sign.
HIGHEST = 0x7F7FFFFF
_NEGATIVE = range(0x80000000, 0xFF800000)

# In main memory a chunk and its temporaries stay in a core's cache; elsewhere a chunk is worth starting kernels for.
_HOST_CHUNK = 1 << 16
_DEVICE_CHUNK = 1 << 26
# Fewer entries than this are read before a second thread has started.
_ENTRIES_PER_THREAD = 1 << 19

_Array = Any  # one-dimensional int32: numpy.ndarray or Tensor
_T = TypeVar("_T")


@dataclass(frozen=True)
class Scan:
    """What one pass found out about an interval of scores.

    :param above: how many scores are above it
    :param inside: how many are in it
    :param candidates: bits of those in it, in order, int32 in main memory; None if they were too many
    :param fault: what makes the scores unusable, or the empty string
    """

    above: int
    inside: int
    candidates: Tensor | None
    fault: str


def score_bits(scores: Tensor) -> Tensor:
    """The bits of fp32 ``scores``, flattened, int32; no copy of a contiguous tensor.

    :raises ValueError: for another dtype
    """
    if scores.dtype != torch.float32:
        raise ValueError(f"the scores are {scores.dtype}; allowed is torch.float32: convert them first")
    return scores.detach().flatten().view(torch.int32)


def scan(bits: Tensor, low: int, high: int, limit: int) -> Scan:
    """Count the scores above and inside ``[low, high]``, and collect those inside.

    :param bits: int32, one-dimensional
    :param limit: collect no more than about this many
    """
    xp = _namespace(bits)
    parts = _on_parts(lambda part: _scan_part(xp, part, low, high, limit), bits)
    above, inside = sum(int(part[0]) for part in parts), sum(int(part[1]) for part in parts)
    candidates = None
    if inside <= limit:
        found = [chunk for part in parts for chunk in part[2]]
        candidates = torch.as_tensor(xp.concatenate(found) if found else bits[:0]).cpu()
    return Scan(above, inside, candidates, _fault(max((part[3] for part in parts), default=0)))


def _scan_part(xp: ModuleType, part: _Array, low: int, high: int, limit: int) -> tuple[Any, Any, list[_Array], int]:
    above = inside = 0
    collected: list[_Array] = []
    extremes: list[_Array] = []
    for chunk in _chunks(part):
        extremes.append(_highest(chunk))
        over = chunk > high
        among = (chunk >= low) ^ over
        above += xp.count_nonzero(over)
        inside += xp.count_nonzero(among)
        if inside <= limit:
            collected.append(chunk[among])
    return above, inside, collected, max((int(e) for e in extremes), default=0)


def histogram(bits: Tensor, low: int, high: int, shift: int) -> Tensor:
    """Count the scores in ``[low, high]`` by ``(score - low) >> shift``: int64 in main memory.

    :param bits: int32, one-dimensional
    """
    xp = _namespace(bits)
    bins = ((high - low) >> shift) + 1

    def count(part: _Array) -> Any:
        total: Any = 0
        for chunk in _chunks(part):
            among = chunk[(chunk >= low) & (chunk <= high)]
            total = total + xp.bincount((among - low) >> shift, minlength=bins)
        return total

    counts = [torch.as_tensor(part).cpu() for part in _on_parts(count, bits)]
    return torch.stack(counts).sum(dim=0) if bits.numel() else torch.zeros(bins, dtype=torch.int64)


def mask_from(bits: Tensor, threshold: int, surplus: int) -> Tensor:
    """Boolean mask of the scores from ``threshold`` up, but for the last ``surplus`` ones that equal it.

    :param bits: int32, one-dimensional
    """
    mask = torch.empty_like(bits, dtype=torch.bool)
    xp = _namespace(bits)
    _on_parts(lambda part, out: xp.greater_equal(part, threshold, out=out), bits, mask)
    entries, kept = _array(bits), _array(mask)
    size = _chunk_size(entries)
    for start in reversed(range(0, len(entries), size)):
        if not surplus:
            break
        chunk, out = entries[start : start + size], kept[start : start + size]
        ties = chunk == threshold
        count = int(xp.count_nonzero(ties))
        if count > surplus:
            ties[xp.argwhere(ties)[: count - surplus, 0]] = False
            count = surplus
        out ^= ties
        surplus -= count
    return mask


def _on_parts(work: Callable[..., _T], *tensors: Tensor) -> list[_T]:
    """``work`` on contiguous parts of equally long tensors, a thread each (numpy lets go of the interpreter's lock)."""
    arrays = [_array(tensor) for tensor in tensors]
    length = tensors[0].numel()
    threads = min(torch.get_num_threads(), length // _ENTRIES_PER_THREAD) if isinstance(arrays[0], np.ndarray) else 1
    if threads <= 1:
        return [work(*arrays)]
    edges = [length * i // threads for i in range(threads + 1)]
    parts = [[array[a:b] for array in arrays] for a, b in itertools.pairwise(edges)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda part: work(*part), parts))


def _namespace(tensor: Tensor) -> ModuleType:
    return np if tensor.device.type == "cpu" else torch


def _array(tensor: Tensor) -> _Array:
    return tensor.numpy() if _namespace(tensor) is np else tensor


def _chunk_size(array: _Array) -> int:
    return _HOST_CHUNK if isinstance(array, np.ndarray) else _DEVICE_CHUNK


def _chunks(array: _Array) -> Iterator[_Array]:
    size = _chunk_size(array)
    return (array[start : start + size] for start in range(0, len(array), size))


def _highest(chunk: _Array) -> _Array:
    """The highest bits of a chunk, read as unsigned."""
    if isinstance(chunk, np.ndarray):
        return chunk.view(np.uint32).max()
    # torch has no maximum of unsigned integers: what is negative as a signed one is the highest.
    low, high = torch.aminmax(chunk)
    return torch.where(low < 0, low.long() + (1 << 32), high.long())


def _fault(highest: int) -> str:
    if highest <= HIGHEST:
        return ""
    return "negative" if highest in _NEGATIVE else "not finite"
