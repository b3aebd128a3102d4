"""The packed weight of GPUs against its twin, byte for byte, and what refuses one that is not right."""

import pytest
import torch
from elsa_kernels import gpu_layout
from elsa_kernels.gpu_layout import GpuHeader, pack_for_gpu, pack_integers_for_gpu, read_gpu_header, unpack_gpu

from tests.kernels.weights import SHAPES, sparse_weight
from tests.reference.gap_layout import packed_bytes

DTYPES = [torch.bfloat16, torch.float16]
DENSITIES = [0.0, 0.02, 0.2, 1.0]


def integers_and_scales(rows, columns, density, groups=1):
    integers = (sparse_weight(rows, columns, density) * 2000).round().clamp(-128, 127).to(torch.int8)
    return integers, 0.01 + torch.rand(rows, groups)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_the_twins(shape, dtype, density):
    weight = sparse_weight(*shape, density, uneven=True).to(dtype)
    packed = pack_for_gpu(weight)
    assert packed.dtype == torch.uint8 and bytes(packed.tolist()) == packed_bytes(weight)
    assert torch.equal(unpack_gpu(packed), weight)


@pytest.mark.parametrize("groups", [1, 2, 8, 64])
@pytest.mark.parametrize("density", DENSITIES)
def test_bytes_of_integers_are_the_twins(density, groups):
    integers, scales = integers_and_scales(9, 64, density, groups)
    packed = pack_integers_for_gpu(integers, scales)
    assert bytes(packed.tolist()) == packed_bytes(integers, scales)
    assert torch.equal(unpack_gpu(packed), integers * scales.repeat_interleave(64 // groups, dim=1))


@pytest.mark.parametrize("column", [0, 14, 15, 16, 31, 32, 33, 299])
def test_gaps_around_the_largest(column):
    weight = torch.zeros(2, 300, dtype=torch.float16)
    weight[1, column] = 3.0
    assert bytes(pack_for_gpu(weight).tolist()) == packed_bytes(weight)
    assert torch.equal(unpack_gpu(pack_for_gpu(weight)), weight)


def test_special_values_are_kept_and_zeros_of_either_sign_are_not():
    weight = torch.tensor([[float("nan"), float("-inf"), -0.0, 0.0, 2.0**-24, 1.0]], dtype=torch.float16)
    back = unpack_gpu(pack_for_gpu(weight)).view(torch.int16)
    weight[0, 2] = 0.0
    assert torch.equal(back, weight.view(torch.int16))


def test_packing_in_pieces_changes_nothing(monkeypatch):
    weight = sparse_weight(40, 65, 0.3).bfloat16()
    whole = pack_for_gpu(weight)
    monkeypatch.setattr(gpu_layout, "_CHUNK", 200)
    assert torch.equal(pack_for_gpu(weight), whole)


def test_header_says_what_was_packed():
    integers, scales = integers_and_scales(9, 64, 0.5, 4)
    header = read_gpu_header(pack_integers_for_gpu(integers, scales))
    assert (header.rows, header.columns, header.dtype, header.group_size, header.groups) == (9, 64, torch.int8, 16, 4)
    assert read_gpu_header(pack_for_gpu(torch.eye(3).half())) == GpuHeader(3, 3, torch.float16, 0, 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda: pack_for_gpu(torch.ones(2, 2)),
        lambda: pack_for_gpu(torch.ones(4).half()),
        lambda: pack_for_gpu(torch.ones(0, 4).half()),
        lambda: pack_integers_for_gpu(torch.ones(2, 2), torch.ones(2, 1)),
    ],
)
def test_what_is_no_weight_is_refused(call):
    with pytest.raises(TypeError, match="it must be 2-D, not empty"):
        call()


def test_columns_beyond_what_kernels_count_are_refused(monkeypatch):
    monkeypatch.setattr(gpu_layout, "COLUMNS_LIMIT", 64)
    with pytest.raises(TypeError, match="at most 64 columns"):
        pack_for_gpu(torch.ones(2, 65).half())


@pytest.mark.parametrize("shape", [(2, 5), (2, 4), (3, 1), (2, 0), (2,)], ids=str)
def test_scales_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match="scales"):
        pack_integers_for_gpu(torch.ones(2, 12, dtype=torch.int8), torch.ones(shape))


def test_every_word_of_the_header_is_checked():
    packed = pack_integers_for_gpu(*integers_and_scales(9, 64, 0.5, 4))
    for word in range(16):
        for changed in (-1, 0, 1, 3, 7, 1 << 24, (1 << 31) - 1):
            broken = packed.clone()
            words = broken[:64].view(torch.int32)
            if words[word] != changed:
                words[word] = changed
                with pytest.raises(ValueError, match="packed"):
                    read_gpu_header(broken)


def test_rows_that_do_not_follow_one_another_are_refused():
    packed = pack_for_gpu(sparse_weight(9, 64, 0.5).half())
    for row in range(10):
        broken = packed.clone()
        broken[64 : 64 + 40].view(torch.int32)[row] += 1000
        with pytest.raises(ValueError, match="rows"):
            read_gpu_header(broken)


@pytest.mark.parametrize("cut", [lambda p: p[:40], lambda p: p[:-16], lambda p: p.view(2, -1), lambda p: p.short()])
def test_what_is_cut_off_or_no_packed_weight_is_refused(cut):
    packed = pack_for_gpu(sparse_weight(9, 64, 0.5).half())
    with pytest.raises(ValueError, match="packed"):
        read_gpu_header(cut(packed))
