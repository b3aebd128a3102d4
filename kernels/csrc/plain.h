// Every layout and format in plain C++. portable.cpp and avx2.cpp compile it, each for its own processors; everything
// is static, so that neither's copy is ever linked into the other.
#pragma once
#include "numbers.h"

namespace elsa {

namespace {

// What a layout's positions are walked with: found(lane, column, value without scale).
template <class Found>
void walk_csr(const Packed& p, int lane, int64_t row, Found found) {
    const Header& h = p.h;
    const uint32_t end = load<uint32_t>(p.offsets, row + 1);
    for (uint32_t i = load<uint32_t>(p.offsets, row); i < end; i++) {
        const int64_t column = h.columns <= 1 << 16 ? load<uint16_t>(p.columns, i) : load<uint32_t>(p.columns, i);
        found(lane, column, load_value(p.values, h.values, i));
    }
}

inline int64_t value_bytes(int64_t type, int count) {
    return type == FP32 ? 4 * count : type == INT8 ? count : type == INT4 ? (count + 1) / 2 : 2 * count;
}

template <class Found>
void walk_bitmask(const Packed& p, int64_t slice, Found found) {
    const Header& h = p.h;
    const uint8_t* values = p.values + load<int64_t>(p.value_offsets, slice * h.segments());
    const bool quantized = h.quantized();
    const int width = (int)h.mask_columns();
    for (int64_t i = 0; i < h.slice_masks(); i++) {
        const int64_t at = slice * h.slice_masks() + i;
        int count = 0;
        for (uint64_t left = quantized ? load<uint64_t>(p.masks, at) : load<uint32_t>(p.masks, at); left;
             left &= left - 1) {
            const int bit = __builtin_ctzll(left);
            found(bit / width, i * width + column_of_bit(quantized, bit), load_value(values, h.values, count++));
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
    for (int lane = 0; lane < SLICE && rows[lane] >= 0; lane++) walk_csr(p, lane, rows[lane], found);
}

inline float scale_of(const Packed& p, int64_t slice, int lane, int64_t row, int64_t group) {
    const int64_t index =
        p.h.layout == CSR ? row * p.h.groups() + group : (slice * p.h.groups() + group) * SLICE + lane;
    return load_scale(p.scales, p.h.scales, index);
}

// One row of CSR times one token, in four sums that do not wait for each other.
template <int64_t V, class Column>
float dot_csr(const Packed& p, int64_t row, const float* x) {
    const uint8_t* columns = p.columns;
    auto product = [&](int64_t i) { return load_value(p.values, V, i) * x[load<Column>(columns, i)]; };
    int64_t i = load<uint32_t>(p.offsets, row);
    const int64_t end = load<uint32_t>(p.offsets, row + 1), group_size = p.h.group_size, groups = p.h.groups();
    float total = 0.0f;
    for (int64_t group = 0; group < groups && i < end; group++) {
        int64_t group_end = end;
        if (groups > 1)
            for (group_end = i; group_end < end && load<Column>(columns, group_end) < (group + 1) * group_size;)
                group_end++;
        float sums[4] = {};
        for (; i + 4 <= group_end; i += 4)
            for (int k = 0; k < 4; k++) sums[k] += product(i + k);
        for (; i < group_end; i++) sums[0] += product(i);
        total += (sums[0] + sums[1] + (sums[2] + sums[3])) * load_scale(p.scales, p.h.scales, row * groups + group);
    }
    return total;
}

template <int64_t V>
float dot_csr(const Packed& p, int64_t row, const float* x) {
    return p.h.columns <= 1 << 16 ? dot_csr<V, uint16_t>(p, row, x) : dot_csr<V, uint32_t>(p, row, x);
}

void csr(const Product& product, int64_t first, int64_t last) {
    const Packed& p = *product.weight;
    auto dot = p.h.values == BF16   ? dot_csr<BF16>
               : p.h.values == FP16 ? dot_csr<FP16>
               : p.h.values == FP32 ? dot_csr<FP32>
               : p.h.values == INT8 ? dot_csr<INT8>
                                    : dot_csr<INT4>;
    const int64_t end = last * SLICE < p.h.rows ? last * SLICE : p.h.rows;
    for (int64_t row = first * SLICE; row < end; row++)
        for (int64_t token = 0; token < product.tokens; token++)
            store_float(product.y, product.y_type, token * p.h.rows + row,
                        dot(p, row, (const float*)product.x + token * product.stride));
}

// x is fp32. A lane a row, tokens in turn, in blocks that share the walk.
bool plain(const Product& product, int64_t first, int64_t last) {
    constexpr int TOKENS = 8;
    const Packed& p = *product.weight;
    if (p.h.layout == CSR) {
        csr(product, first, last);
        return true;
    }
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
bool unpack_plain(const Product& product, int64_t first, int64_t last) {
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

}  // namespace
}  // namespace elsa
