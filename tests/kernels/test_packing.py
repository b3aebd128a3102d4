"""Packing and back: every format, odd shapes, and what must be refused."""

import os
import subprocess
import sys

import elsa_kernels
import pytest
import torch
from elsa_kernels.layout import Layout
from elsa_kernels.packing import choose_layout, packed_nbytes

from tests.kernels.weights import FLOATS, SHAPES, pack, sparse_weight
from tests.reference.sparse_product import dequantized


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("values", FLOATS)
def test_floats_come_back_as_they_were(values, density, shape):
    weight = sparse_weight(*shape, density).to(FLOATS[values])
    packed = elsa_kernels.pack(weight)
    assert packed.dtype == torch.uint8 and packed.dim() == 1
    found = elsa_kernels.unpack(packed)
    assert found.dtype == weight.dtype and torch.equal(found, weight)
    info = elsa_kernels.describe(packed)
    assert (info.rows, info.columns, info.values, info.group_size) == (*shape, values, 0)
    assert info.kept == int((weight != 0).sum()) and info.nbytes == packed.numel()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scale_dtype", FLOATS.values())
def test_integers_come_back_exactly(scale_dtype, bits, shape):
    generator = torch.Generator().manual_seed(0)
    low = -(1 << (bits - 1))
    integers = torch.randint(low, -low, shape, generator=generator, dtype=torch.int8)
    integers[torch.rand(shape, generator=generator) < 0.7] = 0
    integers[0, 0], integers[-1, -1] = low, -low - 1
    for group_size in {min(32, shape[1]), shape[1], 1}:
        groups = -(-shape[1] // group_size)
        scales = torch.rand(shape[0], groups, generator=generator).to(scale_dtype)
        packed = elsa_kernels.pack_integers(integers, scales, bits=bits, group_size=group_size)
        found = elsa_kernels.unpack(packed)
        assert torch.equal(found, dequantized(integers, scales, group_size).float())
        info = elsa_kernels.describe(packed)
        assert (info.values, info.group_size) == (f"int{bits}", group_size)
        assert info.kept == int((integers != 0).sum())


def test_bits_are_kept_but_for_negative_zero():
    weight = torch.tensor([[-0.0, 0.0, float("nan"), float("inf"), -1e-40, 3.0]])
    found = elsa_kernels.unpack(elsa_kernels.pack(weight))
    expected = weight.clone()
    expected[0, 0] = 0.0
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize(("values", "levels", "group_size"), [("int8", 127, None), ("int4", 7, None), ("int4", 7, 32)])
def test_rounding_is_to_the_nearest_multiple_of_the_scale(values, levels, group_size):
    weight = sparse_weight(33, 256, 0.4)
    packed = elsa_kernels.pack(weight, values=values, group_size=group_size)
    size = elsa_kernels.describe(packed).group_size
    assert size == (group_size or (256 if values == "int8" else 128))
    scale = weight.view(33, -1, size).abs().amax(-1, keepdim=True) / levels
    error = (elsa_kernels.unpack(packed) - weight).view(33, -1, size).abs()
    assert bool((error <= scale * 0.51 * (1 + levels * 2**-11)).all())


def test_scales_outside_of_fp16_stay_in_fp32():
    weight = torch.tensor([[1e-9, 0.0], [2e-9, 1e-9]])
    assert torch.allclose(elsa_kernels.unpack(elsa_kernels.pack(weight, values="int8")), weight, rtol=0.01, atol=0)


def test_what_cannot_be_packed_is_refused():
    weight = torch.ones(4, 8)
    for bad in (weight.double(), weight[0], weight[:0]):
        with pytest.raises(TypeError, match="weight is"):
            elsa_kernels.pack(bad)
    with pytest.raises(ValueError, match="values is 'int2'"):
        elsa_kernels.pack(weight, values="int2")
    with pytest.raises(ValueError, match="group_size is 4"):
        elsa_kernels.pack(weight, group_size=4)
    with pytest.raises(ValueError, match="not finite"):
        elsa_kernels.pack(weight * torch.inf, values="int8")
    integers = torch.full((4, 8), 8, dtype=torch.int8)
    with pytest.raises(ValueError, match="4 bits hold -8 to 7"):
        elsa_kernels.pack_integers(integers, torch.ones(4, 1), bits=4)
    with pytest.raises(ValueError, match="scales is"):
        elsa_kernels.pack_integers(integers, torch.ones(3, 1), bits=8)
    with pytest.raises(ValueError, match="group_size 8"):
        elsa_kernels.pack_integers(integers, torch.ones(4, 2), bits=8, group_size=8)


@pytest.mark.parametrize("values", [*FLOATS, "int8", "int4"])
@pytest.mark.parametrize("layout", list(Layout), ids=lambda layout: layout.name.lower())
def test_nbytes_are_known_without_packing(layout, values):
    exact = layout == Layout.CSR or (layout == Layout.BITMASK and values != "int4")
    for density in (0.02, 0.05, 0.1, 0.2, 0.5):
        for shape in ((256, 1024), (250, 1030)):
            packed = pack(sparse_weight(*shape, density), layout, values=values)
            info = elsa_kernels.describe(packed)
            arguments = *shape, info.kept, info.values, info.group_size
            estimate = packed_nbytes(*arguments, layout=layout)
            assert estimate == info.nbytes if exact else abs(estimate / info.nbytes - 1) < 0.1, (density, shape)
            if layout == Layout[info.layout.upper()] == choose_layout(*arguments):
                assert packed_nbytes(*arguments) == estimate


PEAK = """
import re, torch, elsa_kernels
from elsa_kernels.layout import Layout
def memory(kind):
    return 1024 * int(re.search(kind + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
weight = torch.randn(2048, 4096).to(torch.bfloat16)
weight[torch.rand(2048, 4096) < 0.5] = 0
elsa_kernels.pack(weight[:16], layout=Layout.CSR)
before = memory("VmRSS")
packed = elsa_kernels.pack(weight, layout=Layout.CSR)
print((memory("VmHWM") - before) / (2 * weight.numel()))
"""


def test_packing_takes_little_more_than_what_it_makes():
    """What is packed, its parts once more (each as much as the dense weight here), and the positions of some rows.
    Without the library positions are looked at all at once, in integers of 64 bits."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    found = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, env=environment)
    assert float(found.stdout) < (15 if elsa_kernels.backend() == "torch" else 5)
