"""The product against its fp64 twin: instruction sets, layouts, formats, dtypes, shapes, numbers of tokens."""

import shutil

import pytest
import torch
from elsa_kernels.layout import Layout
from elsa_kernels.packing import pack_integers

from tests.kernels.weights import FLOATS, SHAPES, VALUES, assert_product, pack, sparse_weight

LAYOUTS = [Layout.CSR, Layout.BITMASK, Layout.WINDOW]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name.lower())
@pytest.mark.parametrize("values", VALUES)
def test_product_agrees_with_twin(values, layout, isa):
    for shape in SHAPES:
        for density in (0.0, 0.1, 0.6):
            packed = pack(sparse_weight(*shape, density), layout, values=values)
            for dtype in FLOATS.values():
                for tokens in (1, 2, 7):
                    assert_product(torch.randn(tokens, shape[1]).to(dtype), packed)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name.lower())
@pytest.mark.parametrize("values", VALUES)
def test_many_tokens(values, layout, isa):
    packed = pack(sparse_weight(50, 197, 0.2, uneven=True), layout, values=values)
    for tokens in (3, 15, 16, 17, 33, 48, 127, 150, 300, 1030):
        for dtype in (torch.bfloat16, torch.float32):
            assert_product(torch.randn(tokens, 197).to(dtype), packed)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name.lower())
@pytest.mark.parametrize("values", ["bf16", "int8", "int4"])
def test_more_columns_than_a_segment(values, layout, isa):
    """Slices are entered every 4,096 columns; groups of 96 and 4,100 columns end elsewhere."""
    weight = sparse_weight(35, 8300, 0.05)
    for group_size in (None,) if values == "bf16" else (96, 4100, 8300):
        packed = pack(weight, layout, values=values, group_size=group_size)
        for tokens in (1, 4, 40, 130):
            assert_product(torch.randn(tokens, 8300).bfloat16(), packed)


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_groups_of_scales_in_tiles(values, isa):
    """Groups of whole pieces, of half a piece, and of columns that fit neither; slices alone and in pairs."""
    weight = sparse_weight(50, 644, 0.4) * torch.rand(50, 1).add(0.1)
    weight[:, 256:] *= 4
    weight[:, 400:] /= 16
    for group_size in (256, 128, 64, 20):
        packed = pack(weight, Layout.BITMASK, values=values, group_size=group_size)
        for tokens in (9, 30, 70, 600):
            assert_product(torch.randn(tokens, 644).bfloat16(), packed)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name.lower())
def test_rows_with_very_different_counts_are_sorted_and_come_back_in_place(layout, isa):
    packed = pack(sparse_weight(100, 300, 0.2, uneven=True).bfloat16(), layout)
    for dtype in FLOATS.values():
        for tokens in (1, 20):
            assert_product(torch.randn(tokens, 300).to(dtype), packed)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name.lower())
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scale_dtype", FLOATS.values(), ids=str)
def test_integers_are_not_rounded_for_one_token(scale_dtype, bits, layout, isa):
    """Every integer, the lowest too, times its scale in fp32."""
    if isa == "torch":
        pytest.skip("through torch the weight is rounded to bf16")
    low = -(1 << (bits - 1))
    integers = torch.arange(32 * 64).remainder(-2 * low).add(low).view(32, 64).to(torch.int8)
    for group_size in (64, 16):
        scales = (torch.rand(32, 64 // group_size) + 0.5).to(scale_dtype)
        if layout != Layout.CSR and isa == "torch":
            continue
        packed = pack_integers(integers, scales, bits=bits, group_size=group_size, layout=layout)
        assert_product(torch.randn(1, 64).bfloat16(), packed, weight_rounding=0.0)


def test_more_columns_than_16_bits_can_count(isa):
    weight = torch.zeros(3, 70_000)
    weight[0, 69_999], weight[1, 65_535], weight[2, 0], weight[2, 65_536] = 1.0, 2.0, 3.0, 4.0
    for layout in (None, Layout.CSR):
        packed = pack(weight, layout)
        for tokens in (1, 5):
            assert_product(torch.randn(tokens, 70_000), packed)


def test_leading_dimensions_and_strides(isa):
    packed = pack(sparse_weight(20, 96, 0.3))
    x = torch.randn(2, 96, 3)
    assert_product(x.transpose(1, 2), packed)
    assert_product(x[0, :, 0], packed)
    assert torch.ops.elsa_kernels.linear(torch.randn(0, 96), packed, 20).shape == (0, 20)


def test_two_threads_share_the_slices(isa):
    torch.set_num_threads(2)
    for layout in LAYOUTS if isa != "torch" else [Layout.CSR]:
        packed = pack(sparse_weight(500, 700, 0.2, uneven=True).bfloat16(), layout)
        for tokens in (1, 20):
            assert_product(torch.randn(tokens, 700).bfloat16(), packed)


def test_packed_may_lie_at_any_address(isa):
    for layout in (Layout.CSR, Layout.BITMASK, Layout.WINDOW) if isa != "torch" else (Layout.CSR,):
        packed = pack(sparse_weight(20, 96, 0.3), layout)
        shifted = torch.empty(packed.numel() + 1, dtype=torch.uint8)[1:]
        shifted.copy_(packed)
        for tokens in (1, 20):
            assert_product(torch.randn(tokens, 96).bfloat16(), shifted)


def test_wrong_arguments_are_refused(isa):
    packed = pack(sparse_weight(20, 96, 0.3))
    linear = torch.ops.elsa_kernels.linear
    with pytest.raises(ValueError, match="rows and columns"):
        linear(torch.randn(2, 95), packed, 20)
    with pytest.raises(ValueError, match="rows and columns"):
        linear(torch.randn(2, 96), packed, 21)
    with pytest.raises(ValueError, match="x is"):
        linear(torch.randn(2, 96).double(), packed, 20)
    with pytest.raises(ValueError, match="bytes"):
        linear(torch.randn(2, 96), packed[:-1], 20)
    with pytest.raises(ValueError, match="1-D"):
        linear(torch.randn(2, 96), packed.float(), 20)
    with pytest.raises(ValueError, match="ELSASPW1"):
        linear(torch.randn(2, 96), torch.zeros(1000, dtype=torch.uint8), 20)


def test_operation_passes_torchs_checks(isa):
    packed = pack(sparse_weight(20, 96, 0.3))
    for dtype in FLOATS.values():
        torch.library.opcheck(torch.ops.elsa_kernels.linear, (torch.randn(2, 3, 96).to(dtype), packed, 20))


def test_layers_compile_into_one_graph():
    if not (shutil.which("g++") or shutil.which("c++")):
        pytest.skip("torch.compile needs a C++ compiler")
    packed = pack(sparse_weight(20, 96, 0.3))

    def layer(x, packed):
        return torch.relu(torch.ops.elsa_kernels.linear(x, packed, 20)) + 1

    x = torch.randn(3, 96)
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x, packed), layer(x, packed))
    other = pack(sparse_weight(20, 96, 0.3, seed=1))  # No address and no weight is part of the graph.
    torch.testing.assert_close(compiled(x, other), layer(x, other))
