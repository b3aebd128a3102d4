// Every layout and format in plain C++: what runs where there is nothing better, and what the rest is tested against.
#include "kernels.h"
#include "numbers.h"

namespace elsa {

namespace {

// What a layout's positions are walked with: found(row, column, value without scale).
template <class Found>
void walk_csr(const Packed& p, int64_t row, Found found) {
    const Header& h = p.h;
    const uint32_t end = load<uint32_t>(p.offsets, row + 1);
    for (uint32_t i = load<uint32_t>(p.offsets, row); i < end; i++) {
        const int64_t column = h.columns <= 1 << 16 ? load<uint16_t>(p.columns, i) : load<uint32_t>(p.columns, i);
        found(0, column, load_value(p.values, h.values, i));
    }
}

inline int64_t value_bytes(int64_t type, int count) {
    return type == FP32 ? 4 * count : type == INT8 ? count : type == INT4 ? (count + 1) / 2 : 2 * count;
}

template <class Found>
void walk_bitmask(const Packed& p, int64_t slice, Found found) {
    const Header& h = p.h;
    const uint8_t* values = p.values + load<int64_t>(p.value_offsets, slice * h.segments());
    for (int64_t pair = 0; pair < h.pairs(); pair++) {
        const uint32_t mask = load<uint32_t>(p.masks, slice * h.pairs() + pair);
        int count = 0;
        for (uint32_t left = mask; left; left &= left - 1) {
            const int slot = __builtin_ctz(left);
            found(slot / 2, 2 * pair + slot % 2, load_value(values, h.values, count++));
        }
        values += value_bytes(h.values, count);
    }
}

template <class Found>
void walk_window(const Packed& p, int64_t slice, Found found) {
    const Header& h = p.h;
    const uint8_t* values = p.values + load<int64_t>(p.value_offsets, slice * h.segments());
    const uint8_t* indices = p.indices + load<uint32_t>(p.kept_offsets, slice * h.segments());
    const int64_t end = load<uint32_t>(p.step_offsets, (slice + 1) * h.blocks());
    for (int64_t step = load<uint32_t>(p.step_offsets, slice * h.blocks()); step < end; step++) {
        const int64_t base = load<uint16_t>(p.bases, step);
        int count = 0;
        for (uint32_t left = load<uint32_t>(p.masks, step); left; left &= left - 1) {
            found(__builtin_ctz(left) / 2, base + *indices++, load_value(values, h.values, count++));
        }
        values += value_bytes(h.values, count);
    }
}

// Rows of a slice, -1 past the last; in CSR they are in their order.
void rows_of(const Packed& p, int64_t slice, int64_t rows[SLICE]) {
    for (int lane = 0; lane < SLICE; lane++) {
        if (p.h.layout == CSR) {
            rows[lane] = slice * SLICE + lane < p.h.rows ? slice * SLICE + lane : -1;
        } else {
            const uint32_t row = load<uint32_t>(p.order, slice * SLICE + lane);
            rows[lane] = row == NO_ROW ? (int64_t)-1 : (int64_t)row;
        }
    }
}

template <class Found>
void walk(const Packed& p, int64_t slice, const int64_t rows[SLICE], Found found) {
    if (p.h.layout == BITMASK) return walk_bitmask(p, slice, found);
    if (p.h.layout == WINDOW) return walk_window(p, slice, found);
    for (int lane = 0; lane < SLICE && rows[lane] >= 0; lane++)
        walk_csr(p, rows[lane], [&](int, int64_t column, float value) { found(lane, column, value); });
}

inline float scale_of(const Packed& p, int64_t slice, int lane, int64_t row, int64_t group) {
    const int64_t index = p.h.layout == CSR ? row * p.h.groups() + group : (slice * p.h.groups() + group) * SLICE + lane;
    return load_scale(p.scales, p.h.scales, index);
}

}  // namespace

// x is fp32. A lane a row, tokens in turn, in blocks that share the walk.
bool portable(const Product& product, int64_t first, int64_t last) {
    constexpr int TOKENS = 8;
    const Packed& p = *product.weight;
    const float* x = (const float*)product.x;
    const int64_t stride = product.stride, group_size = p.h.group_size;
    for (int64_t slice = first; slice < last; slice++) {
        int64_t rows[SLICE];
        rows_of(p, slice, rows);
        for (int64_t token = 0; token < product.tokens; token += TOKENS) {
            const int count = (int)(product.tokens - token < TOKENS ? product.tokens - token : TOKENS);
            const float* xs = x + token * stride;
            float sums[SLICE][TOKENS] = {};
            walk(p, slice, rows, [&](int lane, int64_t column, float value) {
                if (group_size) value *= scale_of(p, slice, lane, rows[lane], column / group_size);
                for (int t = 0; t < count; t++) sums[lane][t] += value * xs[t * stride + column];
            });
            for (int lane = 0; lane < SLICE; lane++)
                for (int t = 0; t < count && rows[lane] >= 0; t++)
                    store_float(product.y, product.y_type, (token + t) * p.h.rows + rows[lane], sums[lane][t]);
        }
    }
    return true;
}

// The dense weight, (rows, columns); y_type is its format, x is not looked at.
bool unpack_portable(const Product& product, int64_t first, int64_t last) {
    const Packed& p = *product.weight;
    const int64_t columns = p.h.columns, size = product.y_type == FP32 ? 4 : 2;
    for (int64_t slice = first; slice < last; slice++) {
        int64_t rows[SLICE];
        rows_of(p, slice, rows);
        for (int64_t row : rows)
            if (row >= 0) __builtin_memset((uint8_t*)product.y + row * columns * size, 0, (size_t)(columns * size));
        walk(p, slice, rows, [&](int lane, int64_t column, float value) {
            if (p.h.group_size) value *= scale_of(p, slice, lane, rows[lane], column / p.h.group_size);
            store_float(product.y, product.y_type, rows[lane] * columns + column, value);
        });
    }
    return true;
}

}  // namespace elsa
