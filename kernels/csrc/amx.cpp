// x in bf16, from a few tokens to many: slices are unpacked a piece at a time into a buffer that stays in the cache, in
// the order that matrix tiles want, and multiplied there. From memory the weight is read in its packed form.
#include "kernels.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512VBMI2__) && defined(__linux__)
#define ELSA_AMX 1
#include "avx512.h"
#include "numbers.h"

namespace elsa {
namespace {

constexpr int TILE_COLUMNS = 32;               // columns of the weight in a tile
constexpr int TILE_NBYTES = 1024;              // 16 tokens x 32 columns, or 16 pairs of columns x 16 rows x 2
constexpr int TOKENS = 16;                     // in a tile
constexpr int64_t PANEL_TOKENS = 128;          // whose x, SEGMENT columns of it, stays in the second-level cache
constexpr int64_t PIECE = 512;                 // columns unpacked at a time for few tokens, so that they stay in the first
constexpr int64_t SEGMENT_TILES = SEGMENT / TILE_COLUMNS;

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

// One slice's bitmask, entered at a segment and unpacked piece by piece.
struct Cursor {
    const uint8_t *values, *indices;
    int64_t step, block;
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

// Integers in bf16 times their scales, rounded to bf16, as a dense bf16 weight would be.
inline __m512i scaled(__m512i integers, __m512 scales) {
    const __m512 even = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(integers, 16)), scales);
    const __m512i high = _mm512_and_si512(integers, _mm512_set1_epi32((int)0xffff0000));
    const __m512 odd = _mm512_mul_ps(_mm512_castsi512_ps(high), scales);
    const __m512i lower = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
    const __m512i upper = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
    return _mm512_or_si512(lower, _mm512_slli_epi32(upper, 16));
}

// Pairs from `from` to `to` of a slice into whole tiles; SCALED where a row has several scales.
template <int64_t V, bool SCALED>
inline void unpack_bitmask(const Packed& p, int64_t slice, Cursor& cursor, int64_t from, int64_t to, uint8_t* out) {
    const Header& h = p.h;
    const uint8_t* masks = p.masks + 4 * slice * h.pairs();
    const uint8_t* values = cursor.values;
    const __m512i table = int4_table();
    const int64_t half_group = SCALED ? h.group_size / 2 : h.pairs();
    for (int64_t pair = from; pair < to;) {
        const int64_t group = pair / half_group;
        const int64_t group_end = (group + 1) * half_group < to ? (group + 1) * half_group : to;
        const __m512 scales = SCALED ? scales_of(p, slice, group) : _mm512_setzero_ps();
#pragma GCC unroll 4
        for (; pair < group_end; pair++) {
            if (pair % 4 == 0) prefetch(values + 1024), prefetch(values + 1088);
            const uint32_t mask = load<uint32_t>(masks, pair);
            __m512i w = V == BF16   ? expand16(mask, values)
                        : V == INT8 ? int8_to_bf16(mask, values)
                                    : _mm512_permutexvar_epi16(int4_codes(mask, values), table);
            if (SCALED) w = scaled(w, scales);
            _mm512_store_si512(out + 64 * (pair - from), w);
            values += value_bytes<V>(__builtin_popcount(mask));
        }
    }
    for (int64_t pair = to; (pair - from) % 16; pair++) _mm512_store_si512(out + 64 * (pair - from), _mm512_setzero_si512());
    cursor.values = values;
}

// A segment, `from` to `to` columns, of a slice into zeroed whole tiles.
template <int64_t V, bool SCALED>
inline void unpack_window(const Packed& p, int64_t slice, Cursor& cursor, int64_t from, int64_t to, uint8_t* out) {
    const Header& h = p.h;
    __builtin_memset(out, 0, (size_t)((to - from + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_NBYTES));
    // Element (column, row) of a tile's buffer: column / 2 rows of 32, then row * 2 + column % 2.
    alignas(64) uint16_t row_parts[32], places[32], weights[32];
    for (int slot = 0; slot < 32; slot++) row_parts[slot] = (uint16_t)(slot / 2 * 2);
    const __m512i row_part = _mm512_load_si512(row_parts);
    const __m512i table = int4_table();
    for (int64_t column = from; column < to; cursor.block++) {
        const int64_t block_end = h.next_boundary(column);
        const int64_t end = load<uint32_t>(p.step_offsets, cursor.block + 1);
        const __m512 scales = SCALED ? scales_of(p, slice, column / h.group_size) : _mm512_setzero_ps();
        for (; cursor.step < end; cursor.step++) {
            const uint32_t mask = load<uint32_t>(p.masks, cursor.step);
            const int count = __builtin_popcount(mask);
            const int base = (int)(load<uint16_t>(p.bases, cursor.step) - from);
            const __m512i index = _mm512_cvtepu8_epi16(expand8(mask, cursor.indices));
            // The base may lie before the segment; the sum does not, where a weight is kept.
            const __m512i at = _mm512_add_epi16(index, _mm512_set1_epi16((short)base));
            const __m512i one = _mm512_set1_epi16(1);
            const __m512i place = _mm512_or_si512(
                row_part, _mm512_or_si512(_mm512_slli_epi16(_mm512_andnot_si512(one, at), 4), _mm512_and_si512(at, one)));
            _mm512_store_si512(places, _mm512_maskz_compress_epi16(mask, place));
            const uint8_t* source = cursor.values;
            if (V != BF16) {
                __m512i w = V == INT8 ? int8_to_bf16(mask, cursor.values)
                                      : _mm512_permutexvar_epi16(int4_codes(mask, cursor.values), table);
                if (SCALED) w = scaled(w, scales);
                _mm512_store_si512(weights, _mm512_maskz_compress_epi16(mask, w));
                source = (const uint8_t*)weights;
            }
            for (int i = 0; i < count; i++) store<uint16_t>(out, places[i], load<uint16_t>(source, i));
            cursor.indices += count;
            cursor.values += value_bytes<V>(count);
        }
        column = block_end;
    }
}

typedef void (*Unpack)(const Packed&, int64_t slice, Cursor&, int64_t from, int64_t to, uint8_t* out);

// In the bitmask layout from and to are pairs, in the window layout columns of a whole segment.
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

// A panel of tokens: every segment of every pair of slices.
void panel(const Product& product, int64_t first, int64_t last, int64_t token, int64_t tokens, uint8_t* weights,
           uint8_t* sums) {
    const Packed& p = *product.weight;
    const Header& h = p.h;
    const bool bitmask = h.layout == BITMASK;
    const Unpack unpack = unpack_of(h);
    const int64_t tiles = product.stride, blocks = (tokens + TOKENS - 1) / TOKENS;
    // An even number of blocks, so that tiles 2 and 3 always have a place.
    const int64_t sums_nbytes = (blocks + 1) / 2 * 2 * TILE_NBYTES, x_block = tiles * TILE_NBYTES;
    const uint8_t* x = (const uint8_t*)product.x + token / TOKENS * x_block;
    int64_t first_block = 0;
    for (int64_t segment = 0; segment < h.segments(); segment++) {
        const int64_t from = segment * SEGMENT, to = from + SEGMENT < h.columns ? from + SEGMENT : h.columns;
        const uint8_t* xs = x + from / TILE_COLUMNS * TILE_NBYTES;
        const bool few = bitmask && blocks <= 2;
        const int64_t piece = few ? PIECE : SEGMENT;
        for (int64_t slice = first; slice < last; slice += 2) {
            const bool two = slice + 1 < last;
            uint8_t* s = sums + (h.segments() == 1 ? 0 : (slice - first) * sums_nbytes);
            Cursor cursors[2];
            for (int i = 0; i <= two; i++) cursors[i] = enter(p, slice + i, segment, first_block);
            if (few) load_sums(s, sums_nbytes, segment == 0);
            for (int64_t at = from; at < to; at += piece) {
                const int64_t end = at + piece < to ? at + piece : to;
                const int64_t count = (end - at + TILE_COLUMNS - 1) / TILE_COLUMNS, w_slice = count * TILE_NBYTES;
                for (int i = 0; i <= two; i++) {
                    if (bitmask) unpack(p, slice + i, cursors[i], at / 2, (end + 1) / 2, weights + i * w_slice);
                    else unpack(p, slice + i, cursors[i], at, end, weights + i * w_slice);
                }
                const uint8_t* xa = xs + (at - from) / TILE_COLUMNS * TILE_NBYTES;
                if (few) {
                    multiply_any(blocks == 2, two, xa, x_block, weights, w_slice, count);
                    continue;
                }
                for (int64_t b = 0; b < blocks; b += 2) {
                    load_sums(s + b * TILE_NBYTES, sums_nbytes, segment == 0);
                    multiply_any(b + 1 < blocks, two, xa + b * x_block, x_block, weights, w_slice, count);
                    store_sums(s + b * TILE_NBYTES, sums_nbytes);
                }
            }
            if (few) store_sums(s, sums_nbytes);
            if (segment + 1 < h.segments()) continue;
            for (int i = 0; i <= two; i++) finish(product, slice + i, s + i * sums_nbytes, token, tokens);
        }
        for (int64_t column = from; column < to; column = h.next_boundary(column)) first_block++;
    }
}

}  // namespace

int64_t amx_tiles_nbytes(int64_t tokens, int64_t columns) {
    return (tokens + TOKENS - 1) / TOKENS * ((columns + TILE_COLUMNS - 1) / TILE_COLUMNS) * TILE_NBYTES;
}

// x, (tokens, stride) bf16, as (blocks of 16 tokens, tiles of 32 columns, 16, 32), filled up with zeros; blocks first to
// last.
void amx_tiles(const Product& product, uint8_t* tiles, int64_t first, int64_t last) {
    const int64_t columns = product.weight->h.columns, count = (columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
    for (int64_t block = first; block < last; block++) {
        for (int64_t i = 0; i < TOKENS; i++) {
            const int64_t token = block * TOKENS + i;
            const uint16_t* x = (const uint16_t*)product.x + token * product.stride;
            for (int64_t k = 0; k < count; k++) {
                const int64_t left = token < product.tokens ? columns - k * TILE_COLUMNS : 0;
                const __mmask32 lanes = left >= 32 ? 0xffffffff : (1u << left) - 1;
                const __m512i row = lanes ? _mm512_maskz_loadu_epi16(lanes, x + k * TILE_COLUMNS) : _mm512_setzero_si512();
                _mm512_store_si512(tiles + (block * count + k) * TILE_NBYTES + 64 * i, row);
            }
        }
    }
}

// product.x: what amx_tiles made; product.stride: tiles of columns in it.
bool amx_bf16(const Product& product, int64_t first, int64_t last) {
    const Header& h = product.weight->h;
    const int64_t panel_tokens = product.tokens < PANEL_TOKENS ? product.tokens : PANEL_TOKENS;
    const int64_t slices = h.segments() == 1 ? 2 : last - first + 1;
    const size_t weights_nbytes = 2 * SEGMENT_TILES * TILE_NBYTES;
    const size_t sums_nbytes = (size_t)(slices * ((panel_tokens + 2 * TOKENS - 1) / (2 * TOKENS)) * 2 * TILE_NBYTES);
    uint8_t* memory = (uint8_t*)__builtin_malloc(weights_nbytes + sums_nbytes + 64);
    if (!memory) return false;
    uint8_t* weights = memory + (-(uintptr_t)memory & 63);
    const TileConfig config(product.tokens < TOKENS ? (int)product.tokens : TOKENS);
    _tile_loadconfig(&config);
    for (int64_t token = 0; token < product.tokens; token += PANEL_TOKENS) {
        const int64_t tokens = product.tokens - token < PANEL_TOKENS ? product.tokens - token : PANEL_TOKENS;
        panel(product, first, last, token, tokens, weights, weights + weights_nbytes);
    }
    _tile_release();
    __builtin_free(memory);
    return true;
}

}  // namespace elsa
#endif
