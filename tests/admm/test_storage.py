from typing import get_args

import pytest
import torch

from elsa_modifier.admm import storage
from elsa_modifier.admm.bitmask import pack_bits
from elsa_modifier.admm.storage import (
    BLOCK,
    Scratch,
    StateDtype,
    StoredPair,
    chunks,
    in_blocks,
    read_stored,
    write_stored,
)
from tests.reference.admm import stored

CPU = torch.device("cpu")
FORMATS = get_args(StateDtype)


def _written(values, mask, dtype, *, both_kinds=True):
    pair = StoredPair(values.numel(), dtype, CPU, both_kinds=both_kinds)
    scratch = Scratch(values.numel(), CPU)
    bits = pack_bits(mask)
    spans = [(start, end, bits[start // 8 : -(-end // 8)]) for start, end in chunks(values.numel(), CPU)]
    for start, end, part in spans:
        write_stored(pair.part(start, end), in_blocks(values[start:end].clone()), part, scratch)
    return pair, torch.cat([read_stored(pair.part(a, b), part, scratch).flatten().clone() for a, b, part in spans])


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("entries", [1, 255, 256, 257, 3000])
def test_agrees_with_its_twin(dtype, entries, monkeypatch):
    monkeypatch.setattr(storage, "_CPU_CHUNK", 4 * BLOCK)
    generator = torch.Generator().manual_seed(entries)
    mask = torch.rand(entries, generator=generator) < 0.3
    # A thousandth of the magnitude outside: each kind needs a scale of its own.
    values = torch.randn(entries, generator=generator) * torch.where(mask, 1.0, 1e-3)
    _, read = _written(values, mask, dtype)
    assert torch.allclose(read, stored(values * mask, dtype) + stored(values * ~mask, dtype), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", FORMATS)
def test_one_kind_leaves_zeros_inside_the_mask(dtype):
    mask = torch.rand(1000) < 0.5
    values = torch.randn(1000) * ~mask
    _, read = _written(values, mask, dtype, both_kinds=False)
    assert not read[mask].any()
    assert torch.allclose(read, stored(values, dtype), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("dtype", "error"), [("bf16", 2**-8), ("float8_e4m3fn", 2**-4), ("float8_e5m2", 2**-3)])
def test_floats_keep_their_relative_precision(dtype, error):
    values = torch.logspace(-3, 0, BLOCK)
    _, read = _written(values, torch.ones(BLOCK, dtype=torch.bool), dtype)
    assert float(((read - values) / values).abs().max()) <= 1.01 * error


@pytest.mark.parametrize(
    ("dtype", "both_kinds", "expected"),
    [
        ("fp32", True, 4),
        ("bf16", True, 2),
        ("int8", False, 1 + 4 / 256),
        ("float8_e4m3fn", True, 1 + 8 / 256),
        ("float8_e5m2", False, 1 + 4 / 256),
    ],
)
def test_bytes_an_entry(dtype, both_kinds, expected):
    assert StoredPair(256 * 40, dtype, CPU, both_kinds=both_kinds).nbytes == expected * 256 * 40


@pytest.mark.parametrize("dtype", FORMATS)
def test_zeros_stay_zeros(dtype):
    _, read = _written(torch.zeros(300), torch.rand(300) < 0.5, dtype)
    assert torch.equal(read, torch.zeros(300))
