"""Passes over fp32 scores, read as the integers that their bits spell: counting, collecting, histograms, masks.

The bit patterns of non-negative floats rank as the floats do, and infinity and NaN come above all finite ones. So an
interval of scores is an interval of int32, exact ranks come from counting, and what is not finite shows in the maximum.

Every pass goes through the tensor in chunks and never holds more than a chunk of temporaries. numpy reads them in main
memory, several times faster than torch compares and counts there; what lies elsewhere is counted otherwise.
"""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = ["HIGHEST", "Scan", "fault_of", "histogram", "mask_from", "scan", "score_bits"]

# Bits of the largest finite float. Above it: infinity, NaN and, read as unsigned, everything with a sign.
HIGHEST = 0x7F7FFFFF
_NEGATIVE = range(0x80000000, 0xFF800000)

# Smaller chunks would stay in a core's cache, but threads that hand each other the interpreter's lock after every
# operation on one lose more than that.
_CHUNK = 1 << 20
# Fewer entries than this are read before a second thread has started.
_ENTRIES_PER_THREAD = 1 << 19

_Array = Any  # one-dimensional int32
_T = TypeVar("_T")


@dataclass(frozen=True)
class Scan:
    """What one pass found out about an interval of scores.

    :param above: how many scores are above it
    :param inside: how many are in it
    :param candidates: the positions and the bits of those in it, in order, int64 and int32; None if they
        are too many
    :param fault: what makes the scores unusable, or the empty string
    """

    above: int
    inside: int
    candidates: tuple[Tensor, Tensor] | None
    fault: str


def score_bits(scores: Tensor) -> Tensor:
    """The bits of fp32 ``scores``, flattened, int32; no copy of a contiguous tensor.

    :raises ValueError: for another dtype
    """
    if scores.dtype != torch.float32:
        raise ValueError(f"the scores are {scores.dtype}; allowed is torch.float32: convert them first")
    return scores.detach().flatten().view(torch.int32)


def fault_of(bits: Tensor) -> str:
    """What makes scores unusable, as in :class:`Scan`; there must be one score at least."""
    return _fault(int(_highest(bits.numpy())))


def scan(bits: Tensor, low: int, high: int, limit: int, mask: Tensor | None = None) -> Scan:
    """Count the scores above and inside ``[low, high]``, and collect those inside.

    :param bits: int32, one-dimensional
    :param limit: collect no more than about this many
    :param mask: bool, as long, that is set to which scores are at least ``low``
    """
    entries = bits.numpy()
    out = None if mask is None else mask.numpy()

    def run(part: slice) -> tuple[Any, int, int, list[_Array], list[_Array]]:
        above = 0
        inside, extremes, positions, found = 0, [], [], []
        # New memory for each chunk would take longer than what is done with it.
        first = entries[part][:_CHUNK]
        buffers = [np.empty_like(first, dtype=np.bool_) for _ in range(2 if out is None else 1)]
        for where in _chunks(part):
            chunk = entries[where]
            over = buffers[0][: len(chunk)]
            least = buffers[1][: len(chunk)] if out is None else out[where]
            extremes.append(_highest(chunk))
            np.greater(chunk, high, out=over)
            above += np.count_nonzero(over)
            np.greater_equal(chunk, low, out=least)
            among = np.bitwise_xor(over, least, out=over)
            local = np.argwhere(among)[:, 0]
            inside += len(local)
            if inside <= limit:
                found.append(chunk[local])
                local += where.start
                positions.append(local)
        return above, inside, max((int(e) for e in extremes), default=0), positions, found

    parts = _on_parts(run, bits)
    inside = sum(part[1] for part in parts)
    candidates = None
    if inside <= limit:
        positions = [torch.as_tensor(chunk) for part in parts for chunk in part[3]]
        found = [torch.as_tensor(chunk) for part in parts for chunk in part[4]]
        candidates = torch.cat(positions or [bits[:0].long()]), torch.cat(found or [bits[:0]])
    return Scan(sum(int(part[0]) for part in parts), inside, candidates, _fault(max(part[2] for part in parts)))


def histogram(bits: Tensor, low: int, high: int, shift: int) -> Tensor:
    """Count the scores in ``[low, high]`` by ``(score - low) >> shift``: int64 in main memory.

    :param bits: int32, one-dimensional
    """
    entries = bits.numpy()
    bins = ((high - low) >> shift) + 1

    def run(part: slice) -> Tensor:
        counts = np.bincount(entries[:0], minlength=bins)
        for where in _chunks(part):
            chunk = entries[where]
            among = chunk[(chunk >= low) & (chunk <= high)]
            counts += np.bincount((among - low) >> shift, minlength=bins)
        return torch.as_tensor(counts)

    return torch.stack(_on_parts(run, bits)).sum(dim=0)


def mask_from(bits: Tensor, threshold: int, surplus: int) -> Tensor:
    """Boolean mask of the scores from ``threshold`` up, but for the last ``surplus`` ones that equal it.

    :param bits: int32, one-dimensional
    """
    mask = torch.empty_like(bits, dtype=torch.bool)
    entries, kept = bits.numpy(), mask.numpy()
    _on_parts(lambda part: np.greater_equal(entries[part], threshold, out=kept[part]), bits)
    for where in reversed(list(_chunks(slice(0, len(entries))))):
        if not surplus:
            break
        ties = entries[where] == threshold
        count = int(np.count_nonzero(ties))
        if count > surplus:
            ties[np.argwhere(ties)[: count - surplus, 0]] = False
            count = surplus
        kept[where] ^= ties
        surplus -= count
    return mask


def _on_parts(work: Callable[[slice], _T], bits: Tensor) -> list[_T]:
    """``work`` on contiguous parts, by a thread each: numpy lets go of the interpreter's lock."""
    threads = max(1, min(torch.get_num_threads(), bits.numel() // _ENTRIES_PER_THREAD))
    edges = [bits.numel() * i // threads for i in range(threads + 1)]
    parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
    if threads == 1:
        return [work(parts[0])]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, parts))


def _chunks(part: slice) -> Iterator[slice]:
    return (slice(start, min(start + _CHUNK, part.stop)) for start in range(part.start, part.stop, _CHUNK))


def _highest(chunk: _Array) -> _Array:
    """The highest bits of a chunk, read as unsigned."""
    return chunk.view(np.uint32).max()


def _fault(highest: int) -> str:
    if highest <= HIGHEST:
        return ""
    return "negative" if highest in _NEGATIVE else "not finite"
