"""One compressed layer against torch.nn.Linear with the same weight."""

import copy
import io

import pytest
import torch
from torch import nn

from elsa_sparse.compression_rule import packed_size
from elsa_sparse.sparse_linear import SparseLinear, pack_weight

elsa_kernels = pytest.importorskip("elsa_kernels")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROWS, COLUMNS = 48, 64


def sparse_weight(dtype=torch.float32, sparsity=0.8, rows=ROWS, columns=COLUMNS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight.masked_fill_(torch.rand(rows, columns, generator=generator) < sparsity, 0).to(dtype)


def layer(dtype=torch.float32, bias=True, seed=0):
    values = torch.arange(ROWS).to(dtype) if bias else None
    return SparseLinear(pack_weight(sparse_weight(dtype, seed=seed)), values)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(COLUMNS,), (1, COLUMNS), (2, 3, COLUMNS), (0, COLUMNS)])
def test_it_is_the_dense_layer(dtype, bias, shape):
    ours = layer(dtype, bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = nn.functional.linear(x.double(), ours.unpack(torch.float64), ours.bias.double() if bias else None)
    y = ours(x)
    assert y.dtype == dtype and y.shape == (*shape[:-1], ROWS)
    # Accumulated in fp32, rounded once for the product and once for the bias.
    assert torch.allclose(y.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-4)
    assert torch.equal(ours.weight, sparse_weight(dtype)) and (ours.in_features, ours.out_features) == (COLUMNS, ROWS)


def test_an_input_of_another_dtype_than_the_weight():
    ours, x = layer(torch.bfloat16), torch.randn(3, COLUMNS)
    assert torch.allclose(ours(x), x @ ours.weight.float().T + ours.bias.float(), atol=1e-4)


def test_to_converts_the_bias_and_keeps_the_weight():
    ours = layer(torch.bfloat16)
    before = ours.packed.clone()
    assert ours.to(torch.float32).bias.dtype == torch.float32
    assert torch.equal(ours.packed, before) and ours.weight.dtype == torch.bfloat16


def test_it_stays_where_kernels_are(monkeypatch):
    assert layer().to("meta").packed.is_meta
    ours = layer()
    monkeypatch.setattr(nn.Module, "_apply", lambda *_: pytest.fail("moved"))
    with pytest.raises(NotImplementedError, match="cannot be moved to fake:0: there are kernels for CPUs and"):
        ours._apply(lambda tensor: type("Moved", (), {"device": _Device("fake:0")}))


class _Device(str):
    @property
    def type(self):
        return self.partition(":")[0]


def test_state_dict_and_copies():
    ours, other = layer(seed=0), layer(seed=1)
    assert ours.state_dict().keys() == {"packed", "bias"}
    copied = copy.deepcopy(ours)
    assert copied.packed.data_ptr() != ours.packed.data_ptr() and torch.equal(copied.packed, ours.packed)
    # Another length, since another number of weights is kept.
    assert ours.packed.numel() != other.packed.numel()
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other.weight, ours.weight) and other.packed.data_ptr() != ours.packed.data_ptr()
    stream = io.BytesIO()
    torch.save(ours.state_dict(), stream)
    stream.seek(0)
    third = layer(seed=2)
    third.load_state_dict(torch.load(stream), assign=True)
    assert torch.equal(third.weight, ours.weight)


def test_a_dense_state_dict_is_packed():
    ours = layer(seed=1)
    dense = {"weight": sparse_weight(seed=2), "bias": torch.ones(ROWS)}
    given = dict(dense)
    ours.load_state_dict(dense)
    assert torch.equal(ours.weight, dense["weight"]) and torch.equal(ours.bias, torch.ones(ROWS))
    assert dense.keys() == given.keys()


def test_what_is_not_such_a_weight_is_refused_and_changes_nothing():
    ours = layer()
    before = ours.packed.clone()
    narrow = pack_weight(sparse_weight(columns=COLUMNS - 1))
    cut = ours.packed[:-64].clone()
    for state, said in (
        ({"packed": narrow}, "it is \\(48, 63\\), this layer's is \\(48, 64\\)"),
        ({"packed": cut}, "packed cannot be loaded"),
        ({"packed": torch.zeros(4000, dtype=torch.uint8)}, "packed cannot be loaded"),
        ({"weight": torch.ones(ROWS, COLUMNS, dtype=torch.int32)}, "packed cannot be loaded"),
        ({}, "Missing key.*packed"),
    ):
        with pytest.raises(RuntimeError, match=said):
            ours.load_state_dict(state | {"bias": torch.ones(ROWS)})
        assert torch.equal(ours.packed, before)


def test_gradients_are_refused_in_words():
    ours, x = layer(), torch.randn(2, COLUMNS, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradients: it is for inference"):
        ours(x)
    with torch.no_grad():
        assert not ours(x).requires_grad
    assert not ours(x.detach()).requires_grad


@pytest.mark.parametrize("bias", [False, True])
def test_it_compiles_to_one_graph(bias):
    ours = layer(torch.bfloat16, bias)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for rows in (1, 5):
            x = torch.randn(rows, COLUMNS).bfloat16()
            assert torch.equal(compiled(x), ours(x))


def test_the_operation_is_what_torch_expects():
    x = torch.randn(2, 3, COLUMNS)
    torch.library.opcheck(torch.ops.elsa_kernels.linear.default, (x, layer().packed, ROWS))


def test_its_repr_says_what_it_holds():
    text = repr(layer())
    zeros = float((sparse_weight() == 0).double().mean())
    assert f"in_features=64, out_features=48, bias=True, values=fp32, sparsity={zeros:.3f}, nbytes=" in text


def test_fp32_that_bf16_holds_is_held_so():
    weight = sparse_weight(torch.bfloat16)
    assert elsa_kernels.describe(pack_weight(weight.float())).values == "bf16"
    assert elsa_kernels.describe(pack_weight(sparse_weight())).values == "fp32"


def test_the_rule():
    """Compressed where enough is zero and it is smaller; the size is that of what is packed."""
    weight = sparse_weight(torch.bfloat16, rows=256, columns=256)
    kept = int(weight.count_nonzero())
    size = packed_size(256, 256, kept, torch.bfloat16)
    # Some layouts' sizes are estimates.
    assert size == pytest.approx(pack_weight(weight).numel(), rel=0.03) and size < 256 * 256
    assert packed_size(256, 256, kept, torch.bfloat16, min_sparsity=0.9) is None
    assert pack_weight(weight, min_sparsity=0.9) is None
    half = sparse_weight(torch.bfloat16, 0.35, rows=256, columns=256)
    assert pack_weight(half) is None
    # Too small for what the header takes.
    assert pack_weight(sparse_weight(torch.bfloat16, rows=4, columns=4)) is None
    assert packed_size(256, 256, kept, torch.float64) is packed_size(0, 256, 0, torch.bfloat16) is None
    assert packed_size(256, 256, 0, torch.bfloat16) < 4096
    for values, group_size in (("int8", None), ("int8", 64), ("int4", None)):
        rounded = pack_weight(weight, values=values, group_size=group_size)
        info = elsa_kernels.describe(rounded)
        stated = packed_size(256, 256, info.kept, torch.bfloat16, values=values, group_size=group_size)
        assert stated == pytest.approx(rounded.numel(), rel=0.05) and rounded.numel() < size
