"""The parts of a stored state, each against what it says of itself."""

import pytest
import torch

from elsa_modifier.admm import storage
from elsa_modifier.admm.projection import MaskStructure
from elsa_modifier.admm.state import ADMMState
from elsa_modifier.admm.storage import (
    BLOCK,
    Scratch,
    as_float,
    block_maxima,
    chunks,
    padded,
    scale_blocks_,
)

CPU = torch.device("cpu")


def test_whole_blocks():
    assert [padded(n) for n in (0, 1, 255, 256, 257)] == [0, 256, 256, 256, 512]


@pytest.mark.parametrize(("device", "size"), [("cpu", 1 << 18), ("meta", 1 << 24)])
def test_chunks_cover_a_tensor_once(device, size):
    spans = chunks(2 * size + 5, torch.device(device))
    assert spans == [(0, size), (size, 2 * size), (2 * size, 2 * size + 5)]
    assert chunks(size, torch.device(device)) == [(0, size)] and size % BLOCK == 0


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.bfloat16])
def test_every_code_is_its_value(dtype):
    count = 1 << 8 * dtype.itemsize
    codes = torch.arange(count, dtype=torch.int32).to(torch.uint8 if count == 256 else torch.uint16).view(dtype)
    expected = codes.to(torch.float32)
    # e4m3fn has two codes for NaN, which nothing that is finite is stored as.
    finite = expected.isfinite()
    found = as_float(codes, torch.empty(count))
    assert torch.equal(found[finite], expected[finite]) and int(finite.sum()) > 0.9 * count


@pytest.mark.parametrize("entries", [1, BLOCK, BLOCK + 3, 3 * BLOCK - 1])
def test_blocks_have_their_own_maximum_and_scale(entries):
    values = torch.randn(entries, generator=torch.Generator().manual_seed(entries))
    blocks = values.split(BLOCK)
    maxima = block_maxima(values)
    assert maxima.tolist() == [float(block.abs().max()) for block in blocks]
    expected = torch.cat([block / m for block, m in zip(blocks, maxima, strict=True)])
    scaled = values.clone()
    scale_blocks_(scaled, maxima[:, None], torch.Tensor.div_)
    assert torch.equal(scaled, expected)


@pytest.mark.parametrize("entries", [0, 1, 300])
def test_scratch_fits_the_largest_weight(entries):
    scratch = Scratch(entries, CPU)
    for buffer in (scratch.selection, scratch.stored, scratch.weight):
        assert buffer.shape == (padded(entries),) and buffer.dtype == torch.float32
    assert scratch.whole.shape == (entries,)


def in_chunks(apply_, x, *arguments):
    scratch = Scratch(x.numel(), x.device)
    for start, end in chunks(x.numel(), x.device):
        apply_(start, end, x.view(-1)[start:end], *arguments, scratch)


@pytest.mark.parametrize("form", ["coupled", "decoupled"])
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_chunks_change_nothing(dtype, form, monkeypatch):
    """A weight of many chunks, the last of them short, against the same in one."""

    def run():
        chunks.cache_clear()
        x = torch.randn(40, 33, generator=torch.Generator().manual_seed(0))
        state = ADMMState(x, 200, MaskStructure(), form=form, dtype=dtype)
        found = [state.split(x)]
        for _ in range(3):
            gradient = torch.zeros_like(x)
            if form == "coupled":
                state.add_proximal_gradient_(gradient, x, 0.2)
            else:
                in_chunks(state.pull_, x, 0.2)
            found += [gradient, state.residual_sums(x), state.update(x, 0.2, x.square()), x.clone(), state.dual(0.2)]
        in_chunks(state.mask_, x)
        return [*found, x]

    whole = run()
    monkeypatch.setattr(storage, "_CPU_CHUNK", 2 * BLOCK)
    parts = run()
    chunks.cache_clear()
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)
