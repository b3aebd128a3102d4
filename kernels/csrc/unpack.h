// Slices unpacked into tiles of bf16 piece by piece, in either layout.
#pragma once
#include "tiles.h"

namespace elsa {
namespace {

// A slice that was entered at a segment and is unpacked piece by piece.
struct Cursor {
    const uint8_t *values, *indices;
    int64_t step, block;  // of the window layout
};

inline Cursor enter(const Packed& p, int64_t slice, int64_t segment, int64_t first_block) {
    const Header& h = p.h;
    Cursor c{p.values + load<int64_t>(p.value_offsets, slice * h.segments() + segment), nullptr, 0, 0};
    if (h.layout == WINDOW) {
        c.indices = p.indices + load<uint32_t>(p.kept_offsets, slice * h.segments() + segment);
        c.block = slice * h.blocks() + first_block;
        c.step = load<uint32_t>(p.step_offsets, c.block);
    }
    return c;
}

inline __m512i int8_to_bf16(__mmask32 mask, const uint8_t* from) {
    const __m256i bytes = expand8(mask, from);
    const __m512i lower = _mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes));
    const __m512i upper = _mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1));
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(upper), _mm512_cvtepi32_ps(lower));
}

// Columns from `from` to `to` of a slice into whole tiles; SCALED where a row has several scales.
template <int64_t V, bool SCALED>
inline void unpack_bitmask(const Packed& p, int64_t slice, Cursor& cursor, int64_t from, int64_t to, uint8_t* out) {
    BitmaskUnpacking<V, SCALED> unpacking(p);
    unpacking.enter(slice, from, cursor.values);
    unpacking.begin(to - from, out);
    cursor.values = unpacking.finish();
}

// The same for the window layout, a whole segment.
template <int64_t V, bool SCALED>
inline void unpack_window(const Packed& p, int64_t slice, Cursor& cursor, int64_t from, int64_t to, uint8_t* out) {
    const Header& h = p.h;
    const int64_t pairs = (to - from + TILE_COLUMNS - 1) / TILE_COLUMNS * (TILE_COLUMNS / 2);
    // A pair of columns is 64 bytes of the tiles; they are zeroed just before the window reaches them.
    int64_t zeroed = 0;
    auto zero_to = [&](int64_t pair) __attribute__((always_inline)) {
        for (; zeroed < pair && zeroed < pairs; zeroed++) _mm512_store_si512(out + 64 * zeroed, _mm512_setzero_si512());
    };
    // Element (column, row) of a tile's buffer: column / 2 rows of 32, then row * 2 + column % 2.
    alignas(64) uint16_t row_parts[32], places[32], weights[32];
    for (int slot = 0; slot < 32; slot++) row_parts[slot] = (uint16_t)(slot / 2 * 2);
    const __m512i row_part = _mm512_load_si512(row_parts), one = _mm512_set1_epi16(1), table = int4_table();
    for (int64_t column = from; column < to; column = h.next_boundary(column), cursor.block++) {
        const int64_t end = load<uint32_t>(p.step_offsets, cursor.block + 1);
        const __m512 scales = SCALED ? scales_of(p, slice, column / h.group_size) : _mm512_setzero_ps();
        for (; cursor.step < end; cursor.step++) {
            prefetch(cursor.values + AHEAD);
            prefetch(cursor.indices + AHEAD / 2);
            const uint32_t mask = load<uint32_t>(p.masks, cursor.step);
            if (!mask) continue;
            const int count = __builtin_popcount(mask);
            const int base = (int)(load<uint16_t>(p.bases, cursor.step) - from);
            zero_to((base + REACH + 1) / 2);
            const __m512i index = _mm512_cvtepu8_epi16(expand8(mask, cursor.indices));
            // The base may lie before the segment; the sum does not, where a weight is kept.
            const __m512i at = _mm512_add_epi16(index, _mm512_set1_epi16((short)base));
            const __m512i pair = _mm512_slli_epi16(_mm512_andnot_si512(one, at), 4);
            const __m512i place = _mm512_or_si512(row_part, _mm512_or_si512(pair, _mm512_and_si512(at, one)));
            __m512i w;
            if (V == BF16) {
                w = _mm512_loadu_si512(cursor.values);
            } else {
                w = V == INT8 ? int8_to_bf16(mask, cursor.values)
                              : _mm512_permutexvar_epi16(int4_codes(mask, cursor.values), table);
                w = scaled<SCALED>(w, scales);
                w = _mm512_maskz_compress_epi16(mask, w);
            }
            // Past the last, the first again, so that eight at a time can be stored.
            const __mmask32 kept = _bzhi_u32(0xffffffff, (unsigned)count);
            const __m512i compressed = _mm512_maskz_compress_epi16(mask, place);
            const __m512i first = _mm512_broadcastw_epi16(_mm512_castsi512_si128(compressed));
            const __m512i first_weight = _mm512_broadcastw_epi16(_mm512_castsi512_si128(w));
            _mm512_store_si512(places, _mm512_mask_mov_epi16(first, kept, compressed));
            _mm512_store_si512(weights, _mm512_mask_mov_epi16(first_weight, kept, w));
            uint16_t* to_tiles = (uint16_t*)out;
            for (int i = 0; i < count; i += 8) {
#pragma GCC unroll 8
                for (int k = i; k < i + 8; k++) to_tiles[places[k]] = weights[k];
            }
            cursor.indices += count;
            cursor.values += value_bytes<V>(count);
        }
    }
    zero_to(pairs);
}

typedef void (*Unpack)(const Packed&, int64_t slice, Cursor&, int64_t from, int64_t to, uint8_t* out);

inline Unpack unpack_of(const Header& h) {
    const bool s = h.groups() > 1;
    if (h.layout == BITMASK) {
        if (h.values == BF16) return unpack_bitmask<BF16, false>;
        if (h.values == INT8) return s ? unpack_bitmask<INT8, true> : unpack_bitmask<INT8, false>;
        return s ? unpack_bitmask<INT4, true> : unpack_bitmask<INT4, false>;
    }
    if (h.values == BF16) return unpack_window<BF16, false>;
    if (h.values == INT8) return s ? unpack_window<INT8, true> : unpack_window<INT8, false>;
    return s ? unpack_window<INT4, true> : unpack_window<INT4, false>;
}

}  // namespace
}  // namespace elsa
