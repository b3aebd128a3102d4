"""The two encodings of sparse checkpoints, symbol by symbol, as their documentation says it."""

import zlib

import torch


def bitmask_parts(tensor):
    """Parts of a matrix, from Python lists."""
    rows, columns = tensor.shape
    width = -(-columns // 8)
    bitmask = torch.zeros((rows, width), dtype=torch.uint8)
    kept, offsets = [], []
    raw = tensor.contiguous().view(torch.uint8).view(rows, columns, -1) if tensor.numel() else None
    for i in range(rows):
        offsets.append(len(kept))
        for j in range(columns):
            if raw[i, j].any():
                bitmask[i, j // 8] |= 1 << (j % 8)
                kept.append((i, j))
    values = [tensor[i, j] for i, j in kept]
    return {
        "bitmask": bitmask,
        "compressed": torch.stack(values) if values else torch.empty(0, dtype=tensor.dtype),
        "row_offsets": torch.tensor(offsets, dtype=torch.int64),
        "shape": torch.tensor([rows, columns]),
    }


def _stream(layout, parts, name):
    stored = bytes(parts[name].tolist())
    return zlib.decompress(stored, -15) if name in layout.deflated else stored


def coded_symbols(layout, parts, *, rotated, size):
    """The list of a coded tensor's symbols."""
    planes = [_stream(layout, parts, f"plane{i}") for i in range(max(1, layout.symbol_bits // 8))]
    kept = []
    for bytes_of_symbol in zip(*planes, strict=True):
        symbol = sum(byte << (8 * i) for i, byte in enumerate(bytes_of_symbol))
        if rotated:
            symbol = (symbol >> 1) | ((symbol & 1) << (layout.symbol_bits - 1))
        kept.append(symbol)
    if layout.gap_bytes is None:
        return kept
    symbols, values = [], iter(kept)
    for gap in _stream(layout, parts, "gaps"):
        symbols += [layout.fill] * gap
        if gap < 255:
            symbols.append(next(values))
    assert next(values, None) is None
    return symbols + [layout.fill] * (size - len(symbols))


def without_negative_zeros(tensor):
    """0.0 for every entry that compares equal to zero; dtypes without a zero have none that does."""
    as_double = tensor.double() if tensor.dtype.is_floating_point else tensor
    changed = tensor.clone().view(-1)
    if tensor.dtype.is_floating_point:
        for i in (as_double.view(-1) == 0).nonzero().view(-1).tolist():
            changed[i : i + 1].view(torch.uint8).zero_()
    return changed.view(tensor.shape)
