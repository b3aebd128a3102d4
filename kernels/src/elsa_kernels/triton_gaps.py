"""Triton kernels over the packed weight of GPUs (``gpu_layout``): product with few tokens, and the dense weight.

Checked by Triton's interpreter and compiled for NVIDIA GPUs; not yet run on a GPU. Nobody has timed them.

Slots are loaded in pairs: a byte has the gaps of both, and a word their values, so that the prefix sum of gaps is over
half as many elements and no lane needs another's half byte. A slot of value 0 reads no activation: slots between
distant columns and at a row's end cost a load and nothing else, and cannot make a NaN of an infinite activation.
"""
# The parameters of a kernel are Triton's, which has no types for them.
# mypy: ignore-errors

import triton
import triton.language as tl

__all__ = ["dense_kernel", "linear_kernel"]

# The same as in gpu_layout, in words of the header, and as the compiler wants constants.
MAGIC_LOW = tl.constexpr(int.from_bytes(b"ELSA", "little"))
MAGIC_HIGH = tl.constexpr(int.from_bytes(b"GAP1", "little"))
ROW_STARTS = tl.constexpr(16)
BLOCK_PAIRS = tl.constexpr(8)
BF16 = tl.constexpr(1)
FP16 = tl.constexpr(2)
INT8 = tl.constexpr(4)


@triton.jit
def _readable_rows(words, rows, columns):
    """All rows if the header is that of a weight of this shape; none of one for CPUs, or of another shape."""
    named = (tl.load(words) == MAGIC_LOW) & (tl.load(words + 1) == MAGIC_HIGH)
    return tl.where(named & (tl.load(words + 2) == rows) & (tl.load(words + 3) == columns), rows, 0)


@triton.jit
def _row_span(words, row, readable):
    """First pair of each row, and its number of pairs."""
    start = tl.load(words + ROW_STARTS + row, mask=row < readable, other=0)
    stop = tl.load(words + ROW_STARTS + 1 + row, mask=row < readable, other=0)
    return start.to(tl.int64) * BLOCK_PAIRS, (stop - start) * BLOCK_PAIRS


@triton.jit
def _next_pairs(words, row, first, length, at, free, PAIRS: tl.constexpr, VALUES: tl.constexpr):
    """Columns and values of some pairs of each row.

    :param row: [ROWS], with first and length those of ``_row_span``
    :param at: pairs of each row that came before
    :param free: [ROWS], the column after the last slot of those
    :return: columns of the first slots and of the second, [ROWS, PAIRS] int32; their values, fp32; the next ``free``
    """
    pair = at + tl.arange(0, PAIRS)
    inside = pair[None, :] < length[:, None]
    where = first[:, None] + pair[None, :]

    gaps = words.to(tl.pointer_type(tl.uint8)) + tl.load(words + 9).to(tl.int64) * 16
    both = tl.load(gaps + where, mask=inside, other=0).to(tl.int32)
    second_gap = both >> 4
    steps = (both & 15) + second_gap + 2
    second = free[:, None] + tl.cumsum(steps, axis=1) - 1
    first_column = second - second_gap - 1

    offset = tl.load(words + 10).to(tl.int64) * 16
    if VALUES == INT8:
        halves = (words.to(tl.pointer_type(tl.uint8)) + offset).to(tl.pointer_type(tl.int16))
        loaded = tl.load(halves + where, mask=inside, other=0).to(tl.int32)
        a = ((loaded << 24) >> 24).to(tl.float32)
        b = (loaded >> 8).to(tl.float32)
        scales = words.to(tl.pointer_type(tl.float32)) + tl.load(words + 11).to(tl.int64) * 4
        shift = tl.load(words + 6)
        scale_row = scales + row.to(tl.int64)[:, None] * tl.load(words + 7)
        a *= tl.load(scale_row + (first_column >> shift), mask=a != 0, other=0)
        b *= tl.load(scale_row + (second >> shift), mask=b != 0, other=0)
    else:
        loaded = tl.load(words + offset // 4 + where, mask=inside, other=0)
        if VALUES == BF16:
            a = (loaded << 16).to(tl.float32, bitcast=True)
            b = ((loaded >> 16) << 16).to(tl.float32, bitcast=True)
        else:
            a = loaded.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            b = (loaded >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return first_column, second, a, b, free + tl.sum(steps, axis=1)


@triton.jit
def _products(x, column, value, columns, TOKENS: tl.constexpr):
    """Value times activation of each slot and token, [ROWS, PAIRS, TOKENS] fp32, or [ROWS, PAIRS] for one token."""
    # Of columns past the last, which a corrupt weight may have, nothing is read either.
    column = tl.where((value != 0) & (column < columns), column, -1)
    if TOKENS == 1:
        # Without a third dimension the compiler leaves a slot in the lane that loaded it.
        products = value * tl.load(x + column, mask=column >= 0, other=0).to(tl.float32)
    else:
        column, value = column[:, :, None], value[:, :, None]
        at = x + column * TOKENS + tl.arange(0, TOKENS)[None, None, :]
        products = value * tl.load(at, mask=column >= 0, other=0).to(tl.float32)
    return products


@triton.jit
def _row_products(
    words, x, row, readable, columns,
    ROWS: tl.constexpr, PAIRS: tl.constexpr, TOKENS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Sums of value times activation, [ROWS, TOKENS] fp32."""
    SHAPE: tl.constexpr = [ROWS, PAIRS] if TOKENS == 1 else [ROWS, PAIRS, TOKENS]
    first, length = _row_span(words, row, readable)
    free = tl.zeros([ROWS], tl.int32)
    sums = tl.zeros(SHAPE, tl.float32)
    for at in range(0, tl.max(length, axis=0), PAIRS):
        column_a, column_b, a, b, free = _next_pairs(words, row, first, length, at, free, PAIRS, VALUES)
        sums += _products(x, column_a, a, columns, TOKENS) + _products(x, column_b, b, columns, TOKENS)
    return tl.reshape(tl.sum(sums, axis=1), [ROWS, TOKENS])


@triton.jit
def linear_kernel(x, words, y, rows, columns, tokens, ROWS: tl.constexpr, PAIRS: tl.constexpr, TOKENS: tl.constexpr):
    """``y = x W^T`` for at most TOKENS tokens; y is NaN where the packed weight is not one of this shape.

    A program works out ROWS rows for all tokens, PAIRS pairs of slots at a time.

    :param x: (columns, TOKENS), zeros after the last token; any floating dtype
    :param words: the packed weight as int32
    :param y: (tokens, rows), any floating dtype
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    readable = _readable_rows(words, rows, columns)
    code = tl.load(words + 4)
    # The loop for each dtype, rather than the dtype asked for in each turn of one loop.
    if code == BF16:
        sums = _row_products(words, x, row, readable, columns, ROWS, PAIRS, TOKENS, BF16)
    elif code == FP16:
        sums = _row_products(words, x, row, readable, columns, ROWS, PAIRS, TOKENS, FP16)
    else:
        sums = _row_products(words, x, row, readable, columns, ROWS, PAIRS, TOKENS, INT8)
    sums = tl.where((row < readable)[:, None], sums, float("nan"))
    token = tl.arange(0, TOKENS)
    at = y + token[None, :].to(tl.int64) * rows + row[:, None]
    tl.store(at, sums.to(y.dtype.element_ty), mask=(row < rows)[:, None] & (token < tokens)[None, :])


@triton.jit
def _scatter_rows(words, dense, row, readable, columns, ROWS: tl.constexpr, PAIRS: tl.constexpr, VALUES: tl.constexpr):
    first, length = _row_span(words, row, readable)
    free = tl.zeros([ROWS], tl.int32)
    at_row = dense + row.to(tl.int64)[:, None] * columns
    for at in range(0, tl.max(length, axis=0), PAIRS):
        column_a, column_b, a, b, free = _next_pairs(words, row, first, length, at, free, PAIRS, VALUES)
        tl.store(at_row + column_a, a.to(dense.dtype.element_ty), mask=(a != 0) & (column_a < columns))
        tl.store(at_row + column_b, b.to(dense.dtype.element_ty), mask=(b != 0) & (column_b < columns))


@triton.jit
def dense_kernel(words, dense, rows, columns, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """Kept weights into (rows, columns) zeros; column 0 is NaN where the packed weight is not one of this shape."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    readable = _readable_rows(words, rows, columns)
    code = tl.load(words + 4)
    if code == BF16:
        _scatter_rows(words, dense, row, readable, columns, ROWS, PAIRS, BF16)
    elif code == FP16:
        _scatter_rows(words, dense, row, readable, columns, ROWS, PAIRS, FP16)
    else:
        _scatter_rows(words, dense, row, readable, columns, ROWS, PAIRS, INT8)
    nan = tl.full([ROWS], float("nan"), tl.float32)
    tl.store(dense + row.to(tl.int64) * columns, nan.to(dense.dtype.element_ty), mask=(row < rows) & (row >= readable))
