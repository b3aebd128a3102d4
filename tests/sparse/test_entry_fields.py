"""Every field of a tensor's entry: what is written is read, and what is not allowed is named with what is."""

import pytest
import torch

from elsa_sparse.bitmask import decode_bitmask, encode_bitmask
from elsa_sparse.entry import ENCODINGS, TensorEntry, encode
from elsa_sparse.errors import SparseCheckpointError
from elsa_sparse.symbols import DTYPES, SAFETENSORS_DTYPES, from_symbols, symbol_dtype, to_symbols


def _coded():
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(64, 96, generator=generator) * (torch.rand(64, 96, generator=generator) < 0.2)
    entry, _ = encode("w", tensor.bfloat16(), "coded")
    assert entry.encoding == "coded"
    return entry.to_json()


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("encoding", "zip", "one of dense, bitmask, coded"),
        ("dtype", "bfloat17", "one of float64, float32, float16, bfloat16,"),
        ("dtype", 16, "one of float64,"),
        ("shape", "64", "a list of dimensions"),
        ("shape", [64, -1], "a list of dimensions"),
        ("shape", [1] * 17, "a list of dimensions"),
        ("shape", [64, 96.0], "a list of dimensions"),
        ("shape", [True, 96], "a list of dimensions"),
        ("sparsity", -0.01, "a number from 0 to 1"),
        ("sparsity", 1.01, "a number from 0 to 1"),
        ("sparsity", True, "a number from 0 to 1"),
        ("sparsity", "0.5", "a number from 0 to 1"),
        ("sha256", "0" * 63, "64 hexadecimal digits"),
        ("sha256", None, "64 hexadecimal digits"),
        ("symbol_bits", 32, "4, 8, 16, 32 or 64, at most 16"),
        ("symbol_bits", 5, "4, 8, 16, 32 or 64, at most 16"),
        ("fill", -1, "0 to 65535"),
        ("fill", 2**16, "0 to 65535"),
        ("kept", -1, "a count"),
        ("kept", 2**63, "a count"),
        ("kept", 1.5, "a count"),
        ("gap_bytes", "1", "a count or null"),
        ("deflated", "gaps", "a list of streams"),
    ],
)
def test_a_value_that_is_not_allowed(field, value, allowed):
    data = _coded()
    assert field in data
    with pytest.raises(SparseCheckpointError) as error:
        TensorEntry.from_json("w", data | {field: value})
    assert f"{field} is {value!r:.80}; allowed is {allowed}" in str(error.value) and "w" in str(error.value)


@pytest.mark.parametrize("field", ["encoding", "dtype", "shape", "sparsity", "sha256", "symbol_bits", "fill", "kept"])
def test_a_field_that_is_missing(field):
    data = _coded()
    del data[field]
    with pytest.raises(SparseCheckpointError, match=f"{field} is missing; allowed is "):
        TensorEntry.from_json("w", data)


def test_an_entry_is_read_as_it_was_written():
    data = _coded()
    assert TensorEntry.from_json("w", data).to_json() == data
    with pytest.raises(SparseCheckpointError, match="unknown fields: colour, size"):
        TensorEntry.from_json("w", data | {"colour": 1, "size": 2})
    with pytest.raises(SparseCheckpointError, match="its entry is not an object"):
        TensorEntry.from_json("w", [data])
    with pytest.raises(SparseCheckpointError, match=r"deflated is \['nothing'\], streams are"):
        TensorEntry.from_json("w", data | {"deflated": ["nothing"]})
    assert ENCODINGS == ("dense", "bitmask", "coded")


@pytest.mark.parametrize("sparsity", [0, 1, 0.0, 1.0])
def test_the_last_sparsities_that_are_allowed(sparsity):
    assert TensorEntry.from_json("w", _coded() | {"sparsity": sparsity}).sparsity == sparsity


WIDTHS = [(bits, dtype) for dtype in SAFETENSORS_DTYPES.values() for bits in (4, 8, 16, 32, 64)]


@pytest.mark.parametrize(("bits", "dtype"), [(b, d) for b, d in WIDTHS if b <= 8 * d.itemsize], ids=str)
def test_symbols_are_a_tensor_s_bits(bits, dtype):
    raw = torch.randint(0, 256, (6 * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    raw = raw & 1 if dtype == torch.bool else raw
    tensor = raw.view(dtype).view(2, 3)
    symbols = to_symbols(tensor, bits)
    whole = int.from_bytes(bytes(raw.tolist()), "little")
    assert symbols.tolist() == [whole >> i & (1 << bits) - 1 for i in range(0, 8 * len(raw), bits)]
    assert symbols.dtype == symbol_dtype(bits)
    back = from_symbols(symbols, bits, dtype, (2, 3))
    assert back.dtype == dtype and back.shape == (2, 3) and torch.equal(back.view(torch.uint8).view(-1), raw)
    assert DTYPES[str(dtype).removeprefix("torch.")] is dtype


@pytest.mark.parametrize("dimensions", [1, 2, 3, 16])
def test_bitmasks_have_up_to_16_dimensions(dimensions):
    tensor = torch.tensor([0.0, 1.0, 0.0, 2.0]).view([1] * (dimensions - 1) + [4])
    parts = encode_bitmask(tensor)
    assert parts["shape"].tolist() == list(tensor.shape) and torch.equal(decode_bitmask(parts), tensor)


def test_bitmasks_have_no_more():
    with pytest.raises(SparseCheckpointError, match="shape is not a list of 1 to 16 dimensions"):
        decode_bitmask(encode_bitmask(torch.ones([1] * 17)))
