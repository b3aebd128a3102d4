"""Tensors of every dtype and shape, with zeros in all proportions and any bits elsewhere."""

import math

import torch
from hypothesis import strategies as st

from elsa_sparse.symbols import DTYPES

SHAPES = st.lists(st.integers(0, 12), min_size=1, max_size=3) | st.tuples(st.integers(1, 5), st.integers(100, 700))


@st.composite
def tensors(draw, dtypes=tuple(DTYPES), shapes=SHAPES):
    """All bit patterns are possible: -0.0, infinities, NaNs with any payload, subnormals."""
    dtype = DTYPES[draw(st.sampled_from(dtypes))]
    shape = tuple(draw(shapes))
    zeros = draw(st.sampled_from([0.0, 0.03, 0.5, 0.9, 0.999, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    size = math.prod(shape)
    highest = 1 if dtype == torch.bool else 255
    raw = torch.randint(0, highest + 1, (size, dtype.itemsize), dtype=torch.uint8, generator=generator)
    if zeros == 0.0:
        raw[:, 0] |= 1
    raw[torch.rand(size, generator=generator) < zeros] = 0
    if draw(st.booleans()) and size:
        raw[0] = 0
        raw[0, -1] = highest if dtype == torch.bool else 128  # -0.0, for floats
    return raw.view(-1).view(dtype).view(shape)


def same_bits(one, other):
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    # Bytes, because == takes -0.0 to be 0.0, and no NaN to be itself.
    return one.numel() == 0 or bytes(one.reshape(-1).view(torch.uint8)) == bytes(other.reshape(-1).view(torch.uint8))
