"""The packed weight of GPUs, byte by byte, as its documentation says it."""

import struct

import torch

CODES = {torch.bfloat16: 1, torch.float16: 2, torch.int8: 4}
LETTERS = {torch.bfloat16: "H", torch.float16: "H", torch.int8: "b"}


def slots_of_row(row):
    """(gap, value) of each slot of a row, from its list of values."""
    slots, before = [], -1
    for column, value in enumerate(row):
        if value != 0:
            gap = column - before - 1
            while gap > 15:
                slots.append((15, 0))
                gap -= 16
            slots.append((gap, value))
            before = column
    while len(slots) % 16:
        slots.append((15, 0))
    return slots


def packed_bytes(weight, scales=None):
    """The whole packed tensor, as bytes; scales, (rows, groups), where weight is int8."""
    rows, columns = weight.shape
    starts, gaps, values = [0], b"", b""
    for i in range(rows):
        if weight.dtype == torch.int8:
            row = weight[i].tolist()
        else:
            bits = weight[i].view(torch.int16).tolist()
            row = [b & 0xFFFF if v != 0 else 0 for b, v in zip(bits, weight[i].tolist(), strict=True)]
        slots = slots_of_row(row)
        starts.append(starts[-1] + len(slots) // 16)
        for (low, _), (high, _) in zip(slots[::2], slots[1::2], strict=True):
            gaps += bytes([low + 16 * high])
        values += b"".join(struct.pack("<" + LETTERS[weight.dtype], value) for _, value in slots)
    groups = 0 if scales is None else scales.shape[1]
    parts = [struct.pack(f"<{rows + 1}i", *starts), gaps, values]
    parts.append(b"" if scales is None else struct.pack(f"<{rows * groups}f", *scales.flatten().tolist()))
    offsets, body = [], b""
    for part in parts:
        offsets.append((64 + len(body)) // 16)
        body += part + bytes(-len(part) % 16)
    size = 0 if scales is None else columns // groups
    shift = size.bit_length() - 1 if groups > 1 else 31
    header = struct.pack(
        "<8s10i", b"ELSAGAP1", rows, columns, CODES[weight.dtype], size, shift, groups, starts[-1], *offsets[1:]
    )
    return header.ljust(64, b"\0") + body
