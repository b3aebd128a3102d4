// Products of bf16 in tiles, from a few tokens to many: slices are unpacked a piece at a time into a buffer that stays
// in the cache, in the order that a product wants, and multiplied there. From memory the weight is read in its packed
// form. What multiplies is the including file's: a Multiplier, see in_panels.
#pragma once
#include "avx512.h"
#include "numbers.h"

namespace elsa {
namespace {

constexpr int TILE_COLUMNS = 32;   // columns of the weight in a tile
constexpr int TILE_NBYTES = 1024;  // 16 tokens x 32 columns, or 16 pairs of columns x 16 rows x 2
constexpr int TILE_TOKENS = 16;

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

// Pairs of bf16 times their row's scale if SCALED. A product is rounded, as a dense weight would be.
template <bool SCALED>
inline __m512i scaled(__m512i pairs, __m512 scales) {
    if (!SCALED) return pairs;
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)));
    const __m512i lower = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(even, scales)));
    const __m512i upper = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(odd, scales)));
    return _mm512_or_si512(lower, _mm512_slli_epi32(upper, 16));
}

// Two integers in each 16-bit element to bf16: those in the lower halves, and those in the upper ones.
template <int64_t V, bool SCALED>
inline void from_halves(__m512i bytes, __m512i int4s, const Int8Table& int8s, __m512 scales, uint8_t* out) {
    __m512i halves[2];
    if (V == INT8) {
        int8s.convert(bytes, halves);
    } else {
        halves[0] = _mm512_permutexvar_epi16(bytes, int4s);
        halves[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 8), int4s);
    }
    for (int i = 0; i < 2; i++) _mm512_store_si512(out + 64 * i, scaled<SCALED>(halves[i], scales));
}

// Columns from `from` to `to` of a slice into whole tiles; SCALED where a row has several scales. `from` starts a mask.
template <int64_t V, bool SCALED>
inline void unpack_bitmask(const Packed& p, int64_t slice, Cursor& cursor, int64_t from, int64_t to, uint8_t* out) {
    const Header& h = p.h;
    constexpr int WIDTH = V == BF16 ? 2 : 4, MASK_NBYTES = V == BF16 ? 4 : 8;
    const uint8_t* masks = p.masks + MASK_NBYTES * slice * h.slice_masks();
    const uint8_t* values = cursor.values;
    const __m512i int4s = int4_table();
    const Int8Table int8s;
    const int64_t last = (to + WIDTH - 1) / WIDTH, in_group = SCALED ? h.group_size / WIDTH : last;
    uint8_t* const tiles_end = out + (to - from + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_NBYTES;
    for (int64_t i = from / WIDTH; i < last;) {
        const int64_t group = SCALED ? i / in_group : 0;
        const int64_t end = (group + 1) * in_group < last ? (group + 1) * in_group : last;
        const __m512 scales = SCALED ? scales_of(p, slice, group) : _mm512_setzero_ps();
#pragma GCC unroll 4
        for (; i < end; i++) {
            if (i % 4 == 0) {
                prefetch(values + AHEAD);
                if (V != INT4) prefetch(values + AHEAD + 64);
                prefetch(masks + MASK_NBYTES * i + AHEAD / 2);
            }
            if (V == BF16) {
                const uint32_t mask = load<uint32_t>(masks, i);
                _mm512_store_si512(out, expand16(mask, values));
                values += value_bytes<V>(__builtin_popcount(mask));
                out += 64;
            } else {
                const uint64_t mask = load<uint64_t>(masks, i);
                from_halves<V, SCALED>(expand_halves<V>(mask, values), int4s, int8s, scales, out);
                values += value_bytes<V>(__builtin_popcountll(mask));
                out += 128;
            }
        }
    }
    for (; out < tiles_end; out += 64) _mm512_store_si512(out, _mm512_setzero_si512());
    cursor.values = values;
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

// Sums of one slice, (token blocks, 16 tokens, 16 rows) fp32, to y.
inline void finish(const Product& product, int64_t slice, const uint8_t* sums, int64_t token, int64_t tokens) {
    const Packed& p = *product.weight;
    const Rows rows(p, slice);
    const bool scale = p.h.quantized() && p.h.groups() == 1;
    const __m512 scales = scale ? scales_of(p, slice, 0) : _mm512_set1_ps(1.0f);
    for (int64_t t = 0; t < tokens; t++)
        rows.put((uint8_t*)product.y + 2 * (token + t) * p.h.rows, product.y_type,
                 _mm512_mul_ps(_mm512_loadu_ps(sums + 64 * t), scales));
}

// Where a kernel call works: `weights` holds a piece of two slices, or with `keep` all columns of the call's slices.
struct Scratch {
    uint8_t *weights, *sums;
    bool keep;
};

// Up to two blocks of tokens times up to two slices of weights, over some tiles of columns. Each pair of a block and a
// slice has a tile of sums, (16 tokens, 16 rows) fp32; the second block's lies behind the first's.
struct Corner {
    const uint8_t *x, *w;
    uint8_t* sums;
    int64_t x_block, w_slice, sums_slice;  // bytes from the first to the second
    int64_t tokens;                        // 1 to 32; the tiles of x are filled up with zeros
    bool two_slices;
};

// A panel of tokens: every segment of every pair of slices from first to last. With scratch.keep the slices are
// unpacked for the first panel and found there by the others.
template <class Multiplier>
void panel(const Product& product, int64_t first, int64_t last, int64_t token, const Scratch& scratch) {
    const Packed& p = *product.weight;
    const Header& h = p.h;
    const Unpack unpack = unpack_of(h);
    const int64_t left = product.tokens - token;
    const int64_t tokens = left < Multiplier::PANEL_TOKENS ? left : Multiplier::PANEL_TOKENS;
    const int64_t tiles = product.stride, blocks = (tokens + TILE_TOKENS - 1) / TILE_TOKENS;
    // An even number of blocks, so that the sums of a corner always have a place.
    const int64_t sums_nbytes = (blocks + 1) / 2 * 2 * TILE_NBYTES, x_block = tiles * TILE_NBYTES;
    const uint8_t* x = (const uint8_t*)product.x + token / TILE_TOKENS * x_block;
    const bool few = blocks <= 2, fresh = !scratch.keep || token == 0;
    const int64_t piece = h.layout == WINDOW     ? SEGMENT
                          : few && !scratch.keep ? Multiplier::FEW_PIECE
                                                 : Multiplier::MANY_PIECE;
    int64_t next_block = 0;
    for (int64_t segment = 0; segment < h.segments(); segment++) {
        const int64_t from = segment * SEGMENT, to = from + SEGMENT < h.columns ? from + SEGMENT : h.columns;
        const int64_t first_block = next_block;
        for (int64_t column = from; column < to; column = h.next_boundary(column)) next_block++;
        for (int64_t slice = first; slice < last; slice += 2) {
            const bool two = slice + 1 < last;
            uint8_t* s = scratch.sums + (h.segments() == 1 ? 0 : (slice - first) * sums_nbytes);
            uint8_t* kept = scratch.weights + (slice - first) * tiles * TILE_NBYTES;
            Cursor cursors[2];
            for (int i = 0; i <= two && fresh; i++) cursors[i] = enter(p, slice + i, segment, first_block);
            Corner corner{x, kept, s, x_block, 0, sums_nbytes, tokens, two};
            if (few) Multiplier::begin(corner, segment == 0);
            for (int64_t at = from; at < to; at += piece) {
                const int64_t end = at + piece < to ? at + piece : to, tile = at / TILE_COLUMNS;
                const int64_t count = (end - at + TILE_COLUMNS - 1) / TILE_COLUMNS;
                corner.w = scratch.keep ? kept + 2 * tile * TILE_NBYTES : scratch.weights;
                corner.w_slice = count * TILE_NBYTES;
                for (int i = 0; i <= two && fresh; i++)
                    unpack(p, slice + i, cursors[i], at, end, (uint8_t*)corner.w + i * corner.w_slice);
                corner.x = x + tile * TILE_NBYTES;
                if (few) {
                    Multiplier::multiply(corner, count);
                    continue;
                }
                for (int64_t b = 0; b < blocks; b += 2) {
                    const int64_t rest = tokens - b * TILE_TOKENS;
                    Corner of_blocks = corner;
                    of_blocks.x += b * x_block;
                    of_blocks.sums += b * TILE_NBYTES;
                    of_blocks.tokens = rest < 2 * TILE_TOKENS ? rest : 2 * TILE_TOKENS;
                    Multiplier::begin(of_blocks, at == 0);
                    Multiplier::multiply(of_blocks, count);
                    Multiplier::end(of_blocks);
                }
            }
            if (few) Multiplier::end(corner);
            if (segment + 1 < h.segments()) continue;
            for (int i = 0; i <= two; i++) finish(product, slice + i, s + i * sums_nbytes, token, tokens);
        }
    }
}

// Slices first to last of a product whose x is what arrange_tiles made, its stride the tiles of columns in it. A
// Multiplier says how many tokens a panel has and how many columns are unpacked at a time, and has begin(corner, zero),
// multiply(corner, count) and end(corner).
template <class Multiplier>
bool in_panels(const Product& product, int64_t first, int64_t last) {
    constexpr int64_t PANEL_TOKENS = Multiplier::PANEL_TOKENS;
    const Header& h = product.weight->h;
    const bool keep = product.tokens > PANEL_TOKENS;
    int64_t group = last - first;
    if (keep) {  // An even number of slices that fit.
        const int64_t fit = Multiplier::KEPT_NBYTES / (product.stride * TILE_NBYTES) / 2 * 2;
        group = fit < 2 ? 2 : fit < group ? fit : group;
    }
    const int64_t held = h.segments() == 1 ? 2 : group + 1;
    const int64_t blocks = ((keep ? PANEL_TOKENS : product.tokens) + 2 * TILE_TOKENS - 1) / (2 * TILE_TOKENS) * 2;
    const int64_t weights_nbytes =
        keep ? (group + 1) * product.stride * TILE_NBYTES : 2 * SEGMENT / TILE_COLUMNS * TILE_NBYTES;
    uint8_t* memory = (uint8_t*)__builtin_malloc((size_t)(weights_nbytes + held * blocks * TILE_NBYTES + 64));
    if (!memory) return false;
    uint8_t* weights = memory + (-(uintptr_t)memory & 63);
    const Scratch scratch{weights, weights + weights_nbytes, keep};
    for (int64_t slice = first; slice < last; slice += group)
        for (int64_t token = 0; token < product.tokens; token += PANEL_TOKENS)
            panel<Multiplier>(product, slice, slice + group < last ? slice + group : last, token, scratch);
    __builtin_free(memory);
    return true;
}

}  // namespace
}  // namespace elsa
