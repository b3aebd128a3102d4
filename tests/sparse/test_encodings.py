import math
import zlib
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elsa_sparse.bitmask import decode_bitmask, encode_bitmask
from elsa_sparse.coded import decode_coded, encode_coded
from elsa_sparse.entry import MAX_EXPANSION, TensorEntry, decode, digest, encode, sparsity_of
from elsa_sparse.errors import SparseCheckpointError
from elsa_sparse.symbols import DTYPES, to_symbols
from tests.reference.sparse import bitmask_parts, coded_symbols, without_negative_zeros
from tests.sparse.strategies import same_bits, tensors

MATRICES = st.tuples(st.integers(0, 6), st.integers(0, 40))


@settings(max_examples=300, deadline=None)
@given(tensor=tensors())
def test_bitmask_round_trip(tensor):
    assert same_bits(decode_bitmask(encode_bitmask(tensor)), tensor)


@settings(max_examples=300, deadline=None)
@given(tensor=tensors())
def test_coded_round_trip(tensor):
    layout, parts = encode_coded(tensor)
    assert same_bits(decode_coded(layout, parts, tensor.dtype, tuple(tensor.shape)), tensor)


@settings(max_examples=300, deadline=None)
@given(tensor=tensors(), encoding=st.sampled_from(["dense", "bitmask", "coded"]), bit_equal=st.booleans())
def test_entry_round_trip(tensor, encoding, bit_equal):
    entry, parts = encode("w", tensor, encoding, bit_equal=bit_equal)
    kept = bit_equal or entry.encoding == "dense"
    assert same_bits(decode(entry, parts), tensor if kept else without_negative_zeros(tensor))
    assert set(parts) == set(entry.parts)
    assert type(entry).from_json("w", entry.to_json()) == entry


@settings(max_examples=60, deadline=None)
@given(tensor=tensors(shapes=MATRICES))
def test_bitmask_is_what_its_twin_writes(tensor):
    ours, twin = encode_bitmask(tensor), bitmask_parts(tensor)
    assert all(same_bits(ours[part], twin[part]) for part in twin)


@settings(max_examples=100, deadline=None)
@given(tensor=tensors())
def test_coded_is_what_its_twin_reads(tensor):
    layout, parts = encode_coded(tensor)
    size = tensor.numel() * tensor.dtype.itemsize * 8 // layout.symbol_bits
    rotated = tensor.dtype.is_floating_point and layout.symbol_bits >= 16
    symbols = coded_symbols(layout, parts, rotated=rotated, size=size)
    assert symbols == to_symbols(tensor, layout.symbol_bits).tolist()


def test_gaps_longer_than_a_byte_and_than_a_chunk():
    for size, places in [(3_000_000, [0, 254, 510, 765, 1_021, 2_900_000]), (2**20 + 1, [2**20]), (2**21, [])]:
        tensor = torch.zeros(size, dtype=torch.bfloat16)
        tensor[places] = torch.arange(1, len(places) + 1, dtype=torch.bfloat16)
        layout, parts = encode_coded(tensor)
        assert layout.kept == len(places)
        assert torch.equal(decode_coded(layout, parts, tensor.dtype, (size,)), tensor)


@pytest.mark.parametrize("zero_point", [8, 3])
def test_packed_int4_is_coded_by_its_nibbles(zero_point):
    """What pack-quantized leaves: eight integers in an int32, zero being the nibble 8 (or a zero point)."""
    generator = torch.Generator().manual_seed(0)
    nibbles = torch.randint(0, 16, (64, 1024), generator=generator)
    nibbles[torch.rand(nibbles.shape, generator=generator) < 0.9] = zero_point
    packed = torch.zeros((64, 128), dtype=torch.int32)
    for i in range(8):
        packed |= (nibbles[:, i::8] << (4 * i)).to(torch.int32)
    entry, parts = encode("w", packed, "coded")
    assert entry.layout.fill in (zero_point, zero_point * 17)
    stored = sum(part.numel() for part in parts.values())
    assert packed.numel() * 4 / stored > 4
    assert torch.equal(decode(entry, parts), packed)


def test_coded_size_is_near_the_entropy():
    generator = torch.Generator().manual_seed(0)
    for sparsity in (0.5, 0.9, 0.99):
        tensor = torch.randn(1_000_000, generator=generator).to(torch.bfloat16)
        tensor[torch.rand(tensor.shape, generator=generator) < sparsity] = 0
        _, parts = encode_coded(tensor)
        kept = tensor[tensor != 0].view(torch.int16)
        counts = np.bincount(kept.numpy().view(np.uint16))
        frequencies = counts[counts > 0] / kept.numel()
        p = kept.numel() / tensor.numel()
        bits = -p * math.log2(p) - (1 - p) * math.log2(1 - p) - p * (frequencies * np.log2(frequencies)).sum()
        stored = 8 * sum(part.numel() for part in parts.values()) / tensor.numel()
        assert bits < stored < 1.03 * bits


def test_what_would_not_shrink_is_stored_dense():
    noise = torch.randint(-(2**31), 2**31 - 1, (64, 64), dtype=torch.int32)
    for tensor in (noise, torch.ones(100), torch.tensor(3.0), torch.empty(0, 7)):
        for encoding in ("bitmask", "coded"):
            entry, parts = encode("w", tensor, encoding)
            assert (entry.encoding, list(parts)) == ("dense", ["dense"])


def test_dense_bf16_tensors_are_coded_by_their_exponents():
    entry, parts = encode("w", torch.randn(100_000).to(torch.bfloat16), "coded")
    assert entry.encoding == "coded" and "gaps" not in parts
    assert 200_000 / sum(part.numel() for part in parts.values()) > 1.4


def test_a_tensor_of_zeros_is_stored_so_that_reading_it_is_bounded():
    entry, parts = encode("w", torch.zeros(2000, 2000), "coded")
    assert entry.encoding == "bitmask"
    assert entry.dense_bytes <= MAX_EXPANSION * sum(part.numel() * part.element_size() for part in parts.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["bitmask"].view(-1)[0].bitwise_xor_(1), "bits, compressed"),
        (lambda p: p["bitmask"][:, -1].bitwise_or_(128), "beyond its 21 columns"),
        (lambda p: p["row_offsets"][1].add_(1), "row_offsets do not agree"),
        (lambda p: p.update(compressed=p["compressed"][1:]), "bits, compressed"),
        (lambda p: p["shape"][0].add_(1), "needs a uint8 bitmask of"),
        (lambda p: p["shape"][0].mul_(-1), "not a list of 1 to 16 dimensions"),
        (lambda p: p["shape"][1].fill_(2**62), "needs a uint8 bitmask of"),
        (lambda p: p.update(shape=p["shape"].float()), "not a list of 1 to 16 dimensions"),
        (lambda p: p.update(row_offsets=p["row_offsets"].int()), "row_offsets int64"),
    ],
)
def test_bitmask_parts_that_contradict_each_other(change, message):
    tensor = torch.randn(10, 21) * (torch.rand(10, 21) < 0.3)
    parts = encode_bitmask(tensor)
    change(parts)
    with pytest.raises(SparseCheckpointError, match=message):
        decode_bitmask(parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lay, p: (replace(lay, kept=lay.kept + 1), p), "bytes"),
        (lambda lay, p: (replace(lay, gap_bytes=lay.gap_bytes - 1), p), "does not decode to"),
        (lambda lay, p: (replace(lay, gap_bytes=None), p), "no gaps"),
        (lambda lay, p: (replace(lay, deflated=()), p), "plane0 has"),
        (lambda lay, p: (lay, p | {"gaps": p["gaps"][:-3]}), "does not decode to"),
        (lambda lay, p: (lay, p | {"gaps": torch.cat([p["gaps"], p["gaps"]])}), "does not decode to"),
        (lambda lay, p: (lay, p | {"plane0": p["plane0"][1:]}), "plane0"),
        (lambda lay, p: (lay, p | {"plane0": p["plane0"].view(-1, 1)}), "not bytes"),
    ],
)
def test_coded_streams_that_contradict_the_layout(change, message):
    tensor = (torch.randn(5000) * (torch.rand(5000) < 0.3)).to(torch.bfloat16)
    layout, parts = change(*encode_coded(tensor))
    with pytest.raises(SparseCheckpointError, match=message):
        decode_coded(layout, parts, tensor.dtype, (5000,))


def test_gaps_that_leave_the_tensor():
    tensor = torch.ones(5000, dtype=torch.bfloat16)
    tensor[:4000] = 0
    layout, parts = encode_coded(tensor)
    with pytest.raises(SparseCheckpointError, match="beyond the 4,999 symbols"):
        decode_coded(layout, parts, tensor.dtype, (4999,))


def test_a_deflate_bomb_is_cut_short():
    """A stream that would inflate to 100 MB is stopped after what the layout promises."""
    tensor = (torch.randn(5000) * (torch.rand(5000) < 0.3)).to(torch.bfloat16)
    layout, parts = encode_coded(tensor)
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = coder.compress(bytes(100_000_000)) + coder.flush()
    parts["gaps"] = torch.frombuffer(bytearray(bomb), dtype=torch.uint8)
    with pytest.raises(SparseCheckpointError, match="gaps does not decode to"):
        decode_coded(layout, parts, tensor.dtype, (5000,))


def test_a_small_file_cannot_ask_for_a_large_tensor():
    entry, parts = encode("w", torch.randn(64, 64) * (torch.rand(64, 64) < 0.3), "coded")
    data = entry.to_json() | {"shape": [2**30, 2**30]}
    lie = TensorEntry.from_json("w", data)
    lie = replace(lie, sha256=digest(lie, parts))
    with pytest.raises(SparseCheckpointError, match="claim to hold a tensor of"):
        decode(lie, parts)


def test_unknown_dtype_is_named():
    with pytest.raises(
        SparseCheckpointError, match=r"tensor w: dtype complex64 cannot be stored; allowed are .*bfloat16"
    ):
        encode("w", torch.zeros(3, dtype=torch.complex64), "coded")


def test_every_dtype_is_covered():
    assert {"bfloat16", "float16", "float32", "int8", "int32", "float8_e4m3fn"} <= set(DTYPES)


SIGNED = [d for d, dtype in DTYPES.items() if dtype.is_floating_point and dtype != torch.float8_e8m0fnu]


@pytest.mark.parametrize("encoding", ["coded", "bitmask"])
@pytest.mark.parametrize("dtype", SIGNED)
def test_a_weight_pruned_by_its_mask_is_as_small_as_one_with_zeros(dtype, encoding):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(100, 200, generator=generator).mul_(0.1).to(DTYPES[dtype])
    mask = torch.rand(weight.shape, generator=generator) < 0.1
    masked = (weight.float() * mask).to(DTYPES[dtype])
    zeros = torch.where(mask, weight.float(), 0.0).to(DTYPES[dtype])
    assert masked.float().signbit().sum() > zeros.float().signbit().sum()
    entry, parts = encode("w", masked, encoding)
    plain, plain_parts = encode("w", zeros, encoding)
    assert entry.encoding == encoding and entry.sparsity == plain.sparsity == sparsity_of(masked)
    assert {p: t.shape for p, t in parts.items()} == {p: t.shape for p, t in plain_parts.items()}
    assert torch.equal(decode(entry, parts).float(), masked.float())
    signs, signed_parts = encode("w", masked, encoding, bit_equal=True)
    assert same_bits(decode(signs, signed_parts), masked) and signs.sparsity == entry.sparsity


@pytest.mark.parametrize("dtype", ["float8_e8m0fnu", "int8", "int32", "uint8"])
def test_what_has_no_negative_zero_keeps_its_sign_bit(dtype):
    tensor = torch.zeros(100, 200, dtype=torch.int8).view(-1)
    tensor[:: 3 * DTYPES[dtype].itemsize] = -128
    tensor = tensor.view(DTYPES[dtype])
    entry, parts = encode("w", tensor, "coded")
    assert entry.encoding == "coded" and same_bits(decode(entry, parts), tensor)


def test_sparsity_of_tables_that_counted_signed_zeros_as_values():
    """Checkpoints of before are still read."""
    tensor = torch.zeros(4096)
    tensor[::8], tensor[1::8] = 1.0, -0.0
    entry, parts = encode("w", tensor, "coded", bit_equal=True)
    assert entry.sparsity == 0.875
    for sparsity, message in [(0.75, None), (0.625, "config.json says sparsity")]:
        older = replace(entry, sparsity=sparsity)
        older = replace(older, sha256=digest(older, parts))
        with pytest.raises(SparseCheckpointError, match=message) if message else nullcontext():
            assert same_bits(decode(older, parts), tensor)
