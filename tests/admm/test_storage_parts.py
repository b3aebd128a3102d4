"""The parts of a stored state, each against what it says of itself."""

import pytest
import torch

from elsa_modifier.admm import storage
from elsa_modifier.admm.projection import MaskStructure
from elsa_modifier.admm.state import ADMMState, pull_
from elsa_modifier.admm.storage import (
    BLOCK,
    Scratch,
    as_float,
    chunks,
    in_blocks,
    padded,
)

CPU = torch.device("cpu")


def test_whole_blocks():
    assert [padded(n) for n in (0, 1, 255, 256, 257)] == [0, 256, 256, 256, 512]


def test_chunks_cover_a_tensor_once():
    size = 1 << 18
    *whole, last, rest = chunks(2 * size + 300, CPU)
    assert whole == [(0, size), (size, 2 * size)]
    assert last == (2 * size, 2 * size + 256) and rest == (2 * size + 256, 2 * size + 300)
    assert chunks(size, CPU) == [(0, size)] and size % BLOCK == 0
    assert chunks(0, CPU) == [] and chunks(5, CPU) == [(0, 5)]
    # An accelerator has no use for more than a part that is whole blocks.
    meta = torch.device("meta")
    assert chunks(2 * size + 300, meta) == [(0, 2 * size + 256), (2 * size + 256, 2 * size + 300)]


@pytest.mark.parametrize(("entries", "block", "shape"), [(768, 256, (3, 1, 256)), (768, 64, (3, 4, 64))])
@pytest.mark.parametrize("rest", [(192, 64, (1, 3, 64)), (7, 256, (1, 1, 7))])
def test_blocks_are_views(entries, block, shape, rest):
    for count, size, expected in ((entries, block, shape), rest):
        part = torch.arange(count)
        assert in_blocks(part, size).shape == expected
        assert in_blocks(part, size).data_ptr() == part.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.bfloat16])
def test_every_code_is_its_value(dtype):
    count = 1 << 8 * dtype.itemsize
    codes = torch.arange(count, dtype=torch.int32).to(torch.uint8 if count == 256 else torch.uint16).view(dtype)
    expected = codes.to(torch.float32)
    # e4m3fn has two codes for NaN, which nothing that is finite is stored as.
    finite = expected.isfinite()
    found = as_float(codes, torch.empty(count + 3))
    assert torch.equal(found[finite], expected[finite]) and int(finite.sum()) > 0.9 * count


@pytest.mark.parametrize(("entries", "part"), [(0, 0), (1, 256), (300, 256), (600, 512)])
def test_scratch_fits_the_largest_weight(entries, part):
    scratch = Scratch(entries, CPU)
    for buffer in (scratch.selection, scratch.stored, scratch.weight):
        assert buffer.shape == (part,) and buffer.dtype == torch.float32
    assert scratch.whole.shape == (entries,)


def in_chunks(pull_of, x, *arguments):
    for start, end in chunks(x.numel(), x.device):
        pull_(in_blocks(x.view(-1)[start:end]), pull_of(start, end, *arguments))


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
                in_chunks(state.pull, x, 0.2)
            found += [gradient, state.residual_sums(x), state.update(x, 0.2, x.square()), x.clone(), state.dual(0.2)]
        in_chunks(state.mask_out, x)
        return [*found, x]

    whole = run()
    monkeypatch.setattr(storage, "_CPU_CHUNK", 2 * BLOCK)
    parts = run()
    chunks.cache_clear()
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)
