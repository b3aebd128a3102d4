// Whether a packed tensor can be trusted. The contract of memory safety is kept here: docs/kernels.md.
#include "packed.h"

namespace elsa {

static const char* contradiction(const Header& h) {
    const int64_t limit = (int64_t)1 << 31;
    const bool quantized = h.quantized();
    if (h.values < BF16 || h.values > INT4) return "code of values";
    if (h.layout < CSR || h.layout > WINDOW) return "code of layout";
    if (h.rows <= 0 || h.rows >= limit || h.columns <= 0 || h.columns >= limit) return "rows or columns";
    if (h.rows * h.columns > (int64_t)1 << 40) return "rows and columns";
    if (h.kept < 0 || h.kept >= limit || h.kept > h.rows * h.columns) return "number of kept weights";
    if (h.scales < 0 || h.scales > FP32 || quantized != (h.scales != 0)) return "code of scales";
    if (quantized ? h.group_size < 1 || h.group_size > h.columns : h.group_size != 0) return "group_size";
    if (h.steps < 0 || h.steps >= limit || h.value_nbytes < 0 || h.value_nbytes >= (int64_t)1 << 40) return "steps";
    if (h.layout == CSR && h.steps) return "steps";
    if (h.layout == BITMASK && h.steps != h.slices() * h.slice_masks()) return "number of masks";
    if (h.layout == BITMASK && quantized && h.group_size < h.columns && h.group_size % 4) return "group_size";
    if (h.layout == WINDOW && h.columns > 1 << 16) return "columns";
    for (int64_t unused : h.unused)
        if (unused) return "unused fields";
    return nullptr;
}

const char* open_packed(const uint8_t* data, int64_t nbytes, Packed* packed) {
    if (nbytes < (int64_t)sizeof(Header)) return "it has fewer bytes than a header";
    Header& h = packed->h;
    __builtin_memcpy(&h, data, sizeof h);
    if (h.magic != MAGIC) return "it does not start with ELSASPW1";
    if (const char* problem = contradiction(h)) return problem;
    int64_t at = sizeof(Header);
    auto part = [&](int64_t size) {
        const uint8_t* start = data + at;
        at += (size + 63) / 64 * 64;
        return start;
    };
    const int64_t scale_nbytes = h.scales == 0 ? 0 : h.scales == FP32 ? 4 : 2;
    const int64_t slices = h.slices();
    // Only what is inside is ever read: the sum of the sizes is compared with the tensor's below.
    if (h.layout == CSR) {
        packed->offsets = part(4 * (h.rows + 1));
        packed->columns = part((h.columns <= 1 << 16 ? 2 : 4) * h.kept);
    } else {
        packed->order = part(4 * SLICE * slices);
        packed->value_offsets = part(8 * (slices * h.segments() + 1));
        if (h.layout == WINDOW) {
            packed->step_offsets = part(4 * (slices * h.blocks() + 1));
            packed->kept_offsets = part(4 * (slices * h.segments() + 1));
        }
        packed->masks = part(h.mask_nbytes() * h.steps);
        if (h.layout == WINDOW) {
            packed->bases = part(2 * h.steps);
            packed->indices = part(h.kept);
        }
    }
    packed->values = part(h.value_nbytes);
    packed->scales = part(scale_nbytes * h.groups() * (h.layout == CSR ? h.rows : SLICE * slices));
    if (at + 64 != h.nbytes || nbytes != h.nbytes) return "number of bytes";
    return nullptr;
}

// Without an instruction for it the compiler would call its run-time library.
static int popcount(uint64_t bits) {
    int count = 0;
    for (; bits; bits &= bits - 1) count++;
    return count;
}

static int64_t value_bytes(int64_t values, int64_t count) {
    return values == FP32 ? 4 * count : values == INT8 ? count : values == INT4 ? (count + 1) / 2 : 2 * count;
}

static const char* check_csr(const Packed& p) {
    const Header& h = p.h;
    if (h.value_nbytes != value_bytes(h.values, h.kept)) return "bytes of values";
    uint32_t before = load<uint32_t>(p.offsets);
    if (before != 0) return "offsets of rows";
    for (int64_t row = 0; row < h.rows; row++) {
        const uint32_t after = load<uint32_t>(p.offsets, row + 1);
        if (after < before || after > h.kept) return "offsets of rows";
        int64_t last = -1;
        for (uint32_t i = before; i < after; i++) {
            const int64_t column = h.columns <= 1 << 16 ? load<uint16_t>(p.columns, i) : load<uint32_t>(p.columns, i);
            if (column <= last || column >= h.columns) return "columns of a row";
            last = column;
        }
        before = after;
    }
    return before == h.kept ? nullptr : "offsets of rows";
}

// Every row once. The bits of `order` cannot be marked in place, so rows are counted through their sum and a bitmap.
static const char* check_order(const Packed& p) {
    const int64_t lanes = p.h.slices() * SLICE;
    int64_t found = 0;
    for (int64_t i = 0; i < lanes; i++) {
        const uint32_t row = load<uint32_t>(p.order, i);
        if (row == NO_ROW) continue;
        if (row >= p.h.rows) return "order of rows";
        found++;
    }
    if (found != p.h.rows) return "order of rows";
    uint8_t* seen = (uint8_t*)__builtin_calloc((size_t)p.h.rows, 1);
    if (!seen) return "there is no memory to check it";
    bool twice = false;
    for (int64_t i = 0; i < lanes; i++) {
        const uint32_t row = load<uint32_t>(p.order, i);
        if (row != NO_ROW) twice |= seen[row]++ != 0;
    }
    __builtin_free(seen);
    return twice ? "order of rows" : nullptr;
}

// Bits of a mask that stand for lanes past the last row, and with `columns` for columns past the last.
static uint64_t empty_bits(const Packed& p, int64_t slice, int width, bool quantized, int64_t columns) {
    uint64_t bits = 0;
    for (int lane = 0; lane < SLICE; lane++) {
        const bool empty = load<uint32_t>(p.order, slice * SLICE + lane) == NO_ROW;
        for (int column = 0; column < width; column++)
            if (empty || column >= columns) bits |= (uint64_t)1 << mask_bit(quantized, lane, column);
    }
    return bits;
}

static const char* check_bitmask(const Packed& p) {
    const Header& h = p.h;
    const bool quantized = h.quantized();
    const int width = (int)h.mask_columns();
    int64_t kept = 0, bytes = 0;
    for (int64_t slice = 0; slice < h.slices(); slice++) {
        uint64_t empty = empty_bits(p, slice, width, quantized, width);
        for (int64_t i = 0; i < h.slice_masks(); i++) {
            const int64_t column = i * width, at = slice * h.slice_masks() + i;
            if (column % SEGMENT == 0 &&
                load<int64_t>(p.value_offsets, slice * h.segments() + column / SEGMENT) != bytes)
                return "offsets of values";
            if (column + width > h.columns) empty = empty_bits(p, slice, width, quantized, h.columns - column);
            const uint64_t mask = quantized ? load<uint64_t>(p.masks, at) : load<uint32_t>(p.masks, at);
            if (mask & empty) return "masks";
            const int count = popcount(mask);
            kept += count;
            bytes += value_bytes(h.values, count);
        }
    }
    if (load<int64_t>(p.value_offsets, h.slices() * h.segments()) != bytes) return "offsets of values";
    return kept == h.kept && bytes == h.value_nbytes ? nullptr : "number of kept weights";
}

static const char* check_window(const Packed& p) {
    const Header& h = p.h;
    const int64_t slices = h.slices(), segments = h.segments(), blocks = h.blocks();
    int64_t kept = 0, bytes = 0, step = 0;
    for (int64_t slice = 0; slice < slices; slice++) {
        const uint64_t empty = empty_bits(p, slice, 2, false, 2);
        int64_t last[SLICE];
        for (int64_t& column : last) column = -1;
        int64_t block = slice * blocks, last_base = 0;
        for (int64_t from = 0; from < h.columns; block++) {
            const int64_t to = h.next_boundary(from);
            if (from % SEGMENT == 0) {
                const int64_t segment = slice * segments + from / SEGMENT;
                if (load<int64_t>(p.value_offsets, segment) != bytes) return "offsets of values";
                if (load<uint32_t>(p.kept_offsets, segment) != kept) return "offsets of indices";
            }
            if (load<uint32_t>(p.step_offsets, block) != step) return "offsets of steps";
            const int64_t end = load<uint32_t>(p.step_offsets, block + 1);
            if (end < step || end > h.steps) return "offsets of steps";
            for (; step < end; step++) {
                const uint32_t mask = load<uint32_t>(p.masks, step);
                const int64_t base = load<uint16_t>(p.bases, step);
                const int count = popcount(mask);
                if (mask & empty) return "masks";
                if (base < last_base || (base && base + REACH > h.columns)) return "bases";
                last_base = base;
                if (kept + count > h.kept) return "number of kept weights";
                for (uint32_t left = mask; left; left &= left - 1) {
                    const int lane = __builtin_ctz(left) / 2;
                    const int64_t index = p.indices[kept++], column = base + index;
                    if (index >= REACH || column < from || column >= to || column <= last[lane]) return "indices";
                    last[lane] = column;
                }
                bytes += value_bytes(h.values, count);
            }
            from = to;
        }
    }
    if (load<int64_t>(p.value_offsets, slices * segments) != bytes) return "offsets of values";
    if (load<uint32_t>(p.kept_offsets, slices * segments) != kept) return "offsets of indices";
    if (load<uint32_t>(p.step_offsets, slices * blocks) != h.steps || step != h.steps) return "offsets of steps";
    return kept == h.kept && bytes == h.value_nbytes ? nullptr : "number of kept weights";
}

const char* check_parts(const Packed& p) {
    if (p.h.layout == CSR) return check_csr(p);
    if (const char* problem = check_order(p)) return problem;
    return p.h.layout == BITMASK ? check_bitmask(p) : check_window(p);
}

}  // namespace elsa
