"""Packed weights that go from a CPU to a GPU and back. No kernel runs; the CPU is taken for the GPU."""

import elsa_kernels
import pytest
import torch
from elsa_kernels import describe, pack, pack_integers, to_device, unpack, unpack_integers
from elsa_kernels.gpu_layout import is_for_gpu, pack_for_gpu, pack_integers_for_gpu

from tests.kernels.weights import FLOATS, SHAPES, sparse_weight
from tests.pretended_gpu import cpu_as_gpu

CPU = torch.device("cpu")
DENSITIES = [0.0, 0.02, 0.3, 1.0]


def on_gpu(packed):
    with cpu_as_gpu():
        return to_device(packed, CPU)


def test_which_devices_take_which_layout():
    for name, has, gpu in (("cpu", True, False), ("cuda", True, True), ("cuda:1", True, True), ("xpu", False, False)):
        device = torch.device(name)
        assert elsa_kernels.has_kernels(device) == has and elsa_kernels.takes_gpu_layout(device) == gpu


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("values", ["bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_floats_keep_every_bit(shape, values, density, isa):
    weight = sparse_weight(*shape, density, uneven=True).to(FLOATS[values])
    packed = pack(weight)
    moved = on_gpu(packed)
    assert torch.equal(moved, pack_for_gpu(weight)) and torch.equal(unpack(moved), weight)
    assert torch.equal(to_device(moved, CPU), packed)
    assert (describe(moved).values, describe(moved).kept) == (values, describe(packed).kept)


def test_values_that_are_not_numbers_are_kept():
    weight = torch.tensor([[float("nan"), float("-inf"), 0.0, 2.0**-24]]).half()
    back = to_device(on_gpu(pack(weight)), CPU)
    assert torch.equal(unpack(back).view(torch.int16), weight.view(torch.int16))


@pytest.mark.parametrize("columns,group_size", [(64, 64), (64, 16), (72, 16), (63, 7), (130, 128), (130, 130)])
@pytest.mark.parametrize("scales", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("bits", [4, 8])
def test_integers_and_scales_are_kept(bits, scales, columns, group_size, isa):
    """Of groups, too, that the layout of GPUs has not: those that do not fill the columns, or are no power of two."""
    limit = 1 << bits - 1
    integers = (sparse_weight(9, columns, 0.3) * 50 * limit).round().clamp(-limit, limit - 1).to(torch.int8)
    integers[0, 0] = -limit
    given = (0.01 + torch.rand(9, -(-columns // group_size))).to(FLOATS[scales])
    packed = pack_integers(integers, given, bits=bits, group_size=group_size)
    expected = integers * given.float().repeat_interleave(group_size, 1)[:, :columns]
    moved = on_gpu(packed)
    back = to_device(moved, CPU)
    for found in (packed, moved, back):
        assert torch.equal(unpack(found), expected)
        assert torch.equal(unpack_integers(found)[0], integers)
    info = describe(moved)
    assert is_for_gpu(moved) and info.values == "int8" and info.layout == "gaps"
    assert info.group_size == columns if group_size == columns else group_size % info.group_size == 0
    assert describe(back).values == f"int{bits}" and back.numel() <= packed.numel() * columns / info.group_size
    assert unpack_integers(back)[1].dtype == (torch.float32 if scales == "fp32" else torch.float16)


@pytest.mark.parametrize("values,group_size", [("int8", None), ("int4", None), ("int4", 24)])
def test_rounding_is_the_same(values, group_size):
    """Whether a weight is rounded on the CPU and moved, or rounded on the GPU."""
    weight = sparse_weight(16, 72, 0.3).bfloat16()
    arguments = {"values": values, "group_size": group_size}
    with cpu_as_gpu():
        there = pack(weight, **arguments)
    assert torch.equal(there, on_gpu(pack(weight, **arguments)))


def test_packing_on_a_gpu():
    weight = sparse_weight(16, 64, 0.3)
    with cpu_as_gpu():
        assert torch.equal(pack(weight.half()), pack_for_gpu(weight.half()))
        assert torch.equal(pack(weight, values="bf16"), pack_for_gpu(weight.bfloat16()))
        with pytest.raises(TypeError, match="float32; it must be 2-D, not empty, bfloat16 or float16"):
            pack(weight)
    with pytest.raises(TypeError, match="float32"):
        on_gpu(pack(weight))


def test_scales_that_fp16_does_not_hold():
    integers, scales = torch.ones(2, 32, dtype=torch.int8), torch.tensor([[1e-9], [1.0]])
    for given, dtype in ((scales.bfloat16(), torch.bfloat16), (scales + 1e-6, torch.float32)):
        back = to_device(on_gpu(pack_integers(integers, given, bits=8)), CPU)
        assert torch.equal(unpack_integers(back)[1], given) and unpack_integers(back)[1].dtype == dtype


def test_what_is_wrong_is_said_before_a_gpu_reads_it():
    weight = torch.zeros(1, 90).half()
    weight[0, 89] = 2.0
    packed = pack_for_gpu(weight)
    elsa_kernels.check(packed)
    packed[82] += 16  # The gap before the last column.
    for read in (elsa_kernels.check, unpack, lambda packed: to_device(packed, CPU)):
        with pytest.raises(ValueError, match="gaps lead past the last column"):
            read(packed)
    for floating in (pack(weight), pack_for_gpu(weight)):
        with pytest.raises(ValueError, match="only int8"):
            unpack_integers(floating)
    with pytest.raises(ValueError, match="fewer than its header"):
        describe(pack_for_gpu(weight)[:32])
    assert not is_for_gpu(pack_integers_for_gpu(torch.ones(1, 2, dtype=torch.int8), torch.ones(1, 1))[:32])
