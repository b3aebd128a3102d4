// x in bf16, from a few tokens to many: slices are unpacked a piece at a time into a buffer that stays in the cache, in
// the order that matrix tiles want, and multiplied there. From memory the weight is read in its packed form.
#include "kernels.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512VBMI2__) && defined(__linux__)
#define ELSA_AMX 1
#include "avx512.h"
#include "numbers.h"

namespace elsa {
namespace {

constexpr int TILE_COLUMNS = 32;       // columns of the weight in a tile
constexpr int TILE_NBYTES = 1024;      // 16 tokens x 32 columns, or 16 pairs of columns x 16 rows x 2
constexpr int TOKENS = 16;             // in a tile
constexpr int64_t PANEL_TOKENS = 128;  // whose x, SEGMENT columns of it, stays in the second-level cache
// Unpacked weights kept for the next panel; of 0.5, 1, 2, 4 and 64 MiB the fastest.
constexpr int64_t KEPT_NBYTES = 4 << 20;
// Columns of a bitmask unpacked at a time: the fewer, the better unpacking and multiplying overlap; for many tokens the
// sums are loaded and stored once a piece.
constexpr int64_t FEW_PIECE = 64, MANY_PIECE = 128;

struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_nbytes[16] = {};
    uint8_t rows[16] = {};

    // Tiles 0 to 3 sums, 4 and 5 tokens, 6 and 7 weights.
    explicit TileConfig(int tokens) {
        for (int tile = 0; tile < 8; tile++) {
            row_nbytes[tile] = 64;
            rows[tile] = tile < 6 ? (uint8_t)tokens : 16;
        }
    }
};

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

// Pairs of integers, exact in fp32, times their scales if SCALED, in bf16. A product is rounded, as a dense weight
// would be.
template <bool SCALED>
inline __m512i join(__m512 even, __m512 odd, __m512 scales) {
    if (!SCALED) {  // An integer of 8 bits has zeros below the upper half of its fp32.
        const __m512i upper = _mm512_and_si512(_mm512_castps_si512(odd), _mm512_set1_epi32((int)0xffff0000));
        return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(even), 16), upper);
    }
    const __m512i lower = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(even, scales)));
    const __m512i upper = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(odd, scales)));
    return _mm512_or_si512(lower, _mm512_slli_epi32(upper, 16));
}
inline __m512 lower_bf16(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline __m512 upper_bf16(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)));
}

template <bool SCALED>
inline __m512i scaled(__m512i integers, __m512 scales) {
    return SCALED ? join<true>(lower_bf16(integers), upper_bf16(integers), scales) : integers;
}

// Integers in the lower halves of 16-bit elements to bf16.
template <int64_t V, bool SCALED>
inline __m512i from_half(__m512i halves, __m512i table, __m512 scales) {
    if (V == INT4) return scaled<SCALED>(_mm512_permutexvar_epi16(halves, table), scales);
    const __m512i integers = _mm512_srai_epi16(_mm512_slli_epi16(halves, 8), 8);
    const __m512 even = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(integers, 16), 16));
    return join<SCALED>(even, _mm512_cvtepi32_ps(_mm512_srai_epi32(integers, 16)), scales);
}

// Columns from `from` to `to` of a slice into whole tiles; SCALED where a row has several scales. `from` starts a mask.
template <int64_t V, bool SCALED>
inline void unpack_bitmask(const Packed& p, int64_t slice, Cursor& cursor, int64_t from, int64_t to, uint8_t* out) {
    const Header& h = p.h;
    constexpr int WIDTH = V == BF16 ? 2 : 4, MASK_NBYTES = V == BF16 ? 4 : 8;
    const uint8_t* masks = p.masks + MASK_NBYTES * slice * h.slice_masks();
    const uint8_t* values = cursor.values;
    const __m512i table = int4_table();
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
                const __m512i halves = expand_halves<V>(mask, values);
                _mm512_store_si512(out, from_half<V, SCALED>(halves, table, scales));
                _mm512_store_si512(out + 64, from_half<V, SCALED>(_mm512_srli_epi16(halves, 8), table, scales));
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

// sums (tiles 0 to 3: token block 0 x slice 0, 0 x 1, 1 x 0, 1 x 1) += tokens x weights over `count` tiles of columns.
template <bool TWO_TOKENS, bool TWO_SLICES>
inline void multiply(const uint8_t* x, int64_t x_block, const uint8_t* w, int64_t w_slice, int64_t count) {
    for (int64_t k = 0; k < count; k++) {
        _tile_loadd(4, x + k * TILE_NBYTES, 64);
        _tile_loadd(6, w + k * TILE_NBYTES, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (TWO_SLICES) {
            _tile_loadd(7, w + w_slice + k * TILE_NBYTES, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (TWO_TOKENS) {
            _tile_loadd(5, x + x_block + k * TILE_NBYTES, 64);
            _tile_dpbf16ps(2, 5, 6);
            if (TWO_SLICES) _tile_dpbf16ps(3, 5, 7);
        }
    }
}
inline void multiply_any(bool two_tokens, bool two_slices, const uint8_t* x, int64_t x_block, const uint8_t* w,
                         int64_t w_slice, int64_t count) {
    if (two_tokens && two_slices) return multiply<true, true>(x, x_block, w, w_slice, count);
    if (two_tokens) return multiply<true, false>(x, x_block, w, w_slice, count);
    if (two_slices) return multiply<false, true>(x, x_block, w, w_slice, count);
    multiply<false, false>(x, x_block, w, w_slice, count);
}

inline void load_sums(const uint8_t* sums, int64_t slice_nbytes, bool zero) {
    if (zero) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        return;
    }
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + slice_nbytes, 64);
    _tile_loadd(2, sums + TILE_NBYTES, 64);
    _tile_loadd(3, sums + slice_nbytes + TILE_NBYTES, 64);
}
inline void store_sums(uint8_t* sums, int64_t slice_nbytes) {
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + slice_nbytes, 64);
    _tile_stored(2, sums + TILE_NBYTES, 64);
    _tile_stored(3, sums + slice_nbytes + TILE_NBYTES, 64);
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

// A panel of tokens: every segment of every pair of slices from first to last. With scratch.keep the slices are
// unpacked for the first panel and found there by the others.
void panel(const Product& product, int64_t first, int64_t last, int64_t token, const Scratch& scratch) {
    const Packed& p = *product.weight;
    const Header& h = p.h;
    const Unpack unpack = unpack_of(h);
    const int64_t tokens = product.tokens - token < PANEL_TOKENS ? product.tokens - token : PANEL_TOKENS;
    const int64_t tiles = product.stride, blocks = (tokens + TOKENS - 1) / TOKENS;
    // An even number of blocks, so that tiles 2 and 3 always have a place.
    const int64_t sums_nbytes = (blocks + 1) / 2 * 2 * TILE_NBYTES, x_block = tiles * TILE_NBYTES;
    const uint8_t* x = (const uint8_t*)product.x + token / TOKENS * x_block;
    const bool few = blocks <= 2, fresh = !scratch.keep || token == 0;
    const int64_t piece = h.layout == WINDOW ? SEGMENT : few && !scratch.keep ? FEW_PIECE : MANY_PIECE;
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
            if (few) load_sums(s, sums_nbytes, segment == 0);
            for (int64_t at = from; at < to; at += piece) {
                const int64_t end = at + piece < to ? at + piece : to, tile = at / TILE_COLUMNS;
                const int64_t count = (end - at + TILE_COLUMNS - 1) / TILE_COLUMNS, w_slice = count * TILE_NBYTES;
                uint8_t* w = scratch.keep ? kept + 2 * tile * TILE_NBYTES : scratch.weights;
                for (int i = 0; i <= two && fresh; i++) unpack(p, slice + i, cursors[i], at, end, w + i * w_slice);
                const uint8_t* xa = x + tile * TILE_NBYTES;
                if (few) {
                    multiply_any(blocks == 2, two, xa, x_block, w, w_slice, count);
                    continue;
                }
                for (int64_t b = 0; b < blocks; b += 2) {
                    load_sums(s + b * TILE_NBYTES, sums_nbytes, at == 0);
                    multiply_any(b + 1 < blocks, two, xa + b * x_block, x_block, w, w_slice, count);
                    store_sums(s + b * TILE_NBYTES, sums_nbytes);
                }
            }
            if (few) store_sums(s, sums_nbytes);
            if (segment + 1 < h.segments()) continue;
            for (int i = 0; i <= two; i++) finish(product, slice + i, s + i * sums_nbytes, token, tokens);
        }
    }
}

}  // namespace

int64_t amx_tiles_nbytes(int64_t tokens, int64_t columns) {
    return (tokens + TOKENS - 1) / TOKENS * ((columns + TILE_COLUMNS - 1) / TILE_COLUMNS) * TILE_NBYTES;
}

// x, (tokens, stride) bf16, as (blocks of 16 tokens, tiles of 32 columns, 16, 32), filled up with zeros; blocks first
// to last.
void amx_tiles(const Product& product, uint8_t* tiles, int64_t first, int64_t last) {
    const int64_t columns = product.weight->h.columns, count = (columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
    for (int64_t block = first; block < last; block++) {
        for (int64_t i = 0; i < TOKENS; i++) {
            const int64_t token = block * TOKENS + i;
            const uint16_t* x = (const uint16_t*)product.x + token * product.stride;
            for (int64_t k = 0; k < count; k++) {
                const int64_t left = token < product.tokens ? columns - k * TILE_COLUMNS : 0;
                const __mmask32 lanes = left >= 32 ? 0xffffffff : (1u << left) - 1;
                const __m512i row =
                    lanes ? _mm512_maskz_loadu_epi16(lanes, x + k * TILE_COLUMNS) : _mm512_setzero_si512();
                _mm512_store_si512(tiles + (block * count + k) * TILE_NBYTES + 64 * i, row);
            }
        }
    }
}

// product.x: what amx_tiles made; product.stride: tiles of columns in it.
bool amx_bf16(const Product& product, int64_t first, int64_t last) {
    const Header& h = product.weight->h;
    const bool keep = product.tokens > PANEL_TOKENS;
    int64_t group = last - first;
    if (keep) {  // An even number of slices that fit.
        const int64_t fit = KEPT_NBYTES / (product.stride * TILE_NBYTES) / 2 * 2;
        group = fit < 2 ? 2 : fit < group ? fit : group;
    }
    const int64_t held = h.segments() == 1 ? 2 : group + 1;
    const int64_t blocks = ((keep ? PANEL_TOKENS : product.tokens) + 2 * TOKENS - 1) / (2 * TOKENS) * 2;
    const int64_t weights_nbytes =
        keep ? (group + 1) * product.stride * TILE_NBYTES : 2 * SEGMENT / TILE_COLUMNS * TILE_NBYTES;
    uint8_t* memory = (uint8_t*)__builtin_malloc((size_t)(weights_nbytes + held * blocks * TILE_NBYTES + 64));
    if (!memory) return false;
    uint8_t* weights = memory + (-(uintptr_t)memory & 63);
    const Scratch scratch{weights, weights + weights_nbytes, keep};
    const TileConfig config(product.tokens < TOKENS ? (int)product.tokens : TOKENS);
    _tile_loadconfig(&config);
    for (int64_t slice = first; slice < last; slice += group)
        for (int64_t token = 0; token < product.tokens; token += PANEL_TOKENS)
            panel(product, slice, slice + group < last ? slice + group : last, token, scratch);
    _tile_release();
    __builtin_free(memory);
    return true;
}

}  // namespace elsa
#endif
