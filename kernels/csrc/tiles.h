// What the kernels share that multiply in tiles of bf16: their layout, bitmasks unpacked into them, and where the sums
// go.
#pragma once
#include "avx512.h"
#include "numbers.h"

namespace elsa {
namespace {

constexpr int TILE_COLUMNS = 32;   // columns of the weight in a tile
constexpr int TILE_NBYTES = 1024;  // 16 tokens x 32 columns, or 16 pairs of columns x 16 rows x 2
constexpr int TILE_TOKENS = 16;

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

// The vectors that unpacking looks numbers up in.
struct Tables {
    __m512i int4s = int4_table(), interleave;
    Int8Table int8s;
    __m512 int4_numbers = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);

    Tables() {
        alignas(64) uint16_t from[32];
        for (int i = 0; i < 32; i++) from[i] = (uint16_t)(i / 2 + i % 2 * 16);
        interleave = _mm512_load_si512(from);
    }
};

// What a mask of integers expands to, four columns of 16 rows, to bf16: the first two columns, then the last two.
template <int64_t V, bool SCALED>
inline void store_columns(__m512i bytes, const Tables& tables, __m512 scales, uint8_t* out) {
    __m512i halves[2];
    if (V == INT4 && SCALED) {
        auto column = [&](int byte) __attribute__((always_inline)) {
            const __m512i codes = _mm512_srli_epi32(bytes, 8 * (unsigned)byte);
            return _mm512_mul_ps(_mm512_permutexvar_ps(codes, tables.int4_numbers), scales);
        };
        halves[0] = (__m512i)_mm512_cvtne2ps_pbh(column(2), column(0));
        halves[1] = (__m512i)_mm512_cvtne2ps_pbh(column(3), column(1));
        for (__m512i& half : halves) half = _mm512_permutexvar_epi16(tables.interleave, half);
    } else if (V == INT8) {
        tables.int8s.convert(bytes, halves);
        for (__m512i& half : halves) half = scaled<SCALED>(half, scales);
    } else {
        halves[0] = _mm512_permutexvar_epi16(bytes, tables.int4s);
        halves[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 8), tables.int4s);
    }
    _mm512_store_si512(out, halves[0]);
    _mm512_store_si512(out + 64, halves[1]);
}

// Columns of a slice of the bitmask layout, unpacked into whole tiles a mask at a time, piece by piece. SCALED if they
// are to be multiplied by the scales of their groups.
template <int64_t V, bool SCALED>
class BitmaskUnpacking {
public:
    static constexpr int MASK_COLUMNS = V == BF16 ? 2 : 4;

    explicit BitmaskUnpacking(const Packed& packed) : p(&packed) {}

    // The column starts a mask; its values are at `from`.
    void enter(int64_t entered, int64_t column, const uint8_t* from) {
        slice = entered, values = from;
        masks = p->masks + MASK_NBYTES * (slice * p->h.slice_masks() + column / MASK_COLUMNS);
        if (!SCALED) return;
        group = column / p->h.group_size;
        in_group = ((group + 1) * p->h.group_size - column) / MASK_COLUMNS;
        scales = scales_of(*p, slice, group);
    }
    // The next `columns` go to `tiles`: step() unpacks a mask of them, finish() what is left.
    void begin(int64_t columns, uint8_t* tiles) {
        left = (columns + MASK_COLUMNS - 1) / MASK_COLUMNS;
        out = tiles, tiles_end = tiles + (columns + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_NBYTES;
    }
    __attribute__((always_inline)) void step(const Tables& tables) {
        if (!left) return;
        left--;
        if (left % 4 == 0) {
            prefetch(values + AHEAD);
            if (V != INT4) prefetch(values + AHEAD + 64);
            prefetch(masks + AHEAD / 2);
        }
        if (SCALED && in_group-- == 0) {
            scales = scales_of(*p, slice, ++group);
            in_group = p->h.group_size / MASK_COLUMNS - 1;
        }
        if (V == BF16) {
            const uint32_t mask = load<uint32_t>(masks);
            _mm512_store_si512(out, expand16(mask, values));
            values += value_bytes<V>(__builtin_popcount(mask));
        } else {
            const uint64_t mask = load<uint64_t>(masks);
            store_columns<V, SCALED>(expand_halves<V>(mask, values), tables, scales, out);
            values += value_bytes<V>(__builtin_popcountll(mask));
        }
        masks += MASK_NBYTES;
        out += 32 * MASK_COLUMNS;
    }
    // Where the values of the next piece are.
    const uint8_t* finish() {
        const Tables tables;
#pragma GCC unroll 4
        while (left) step(tables);
        for (; out < tiles_end; out += 64) _mm512_store_si512(out, _mm512_setzero_si512());
        return values;
    }

private:
    static constexpr int MASK_NBYTES = V == BF16 ? 4 : 8;
    const Packed* p;
    const uint8_t *masks = nullptr, *values = nullptr;
    uint8_t *out = nullptr, *tiles_end = nullptr;
    int64_t slice = 0, group = 0, in_group = 0, left = 0;
    __m512 scales = _mm512_setzero_ps();
};

// Sums of one slice, (tokens, 16 rows) fp32, to y, from a token on; times the scales of rows that have but one.
inline void finish(const Product& product, int64_t slice, const uint8_t* sums, int64_t token, int64_t tokens) {
    const Packed& p = *product.weight;
    const Rows rows(p, slice);
    const bool scale = p.h.quantized() && p.h.groups() == 1;
    const __m512 scales = scale ? scales_of(p, slice, 0) : _mm512_set1_ps(1.0f);
    for (int64_t t = 0; t < tokens; t++)
        rows.put((uint8_t*)product.y + 2 * (token + t) * p.h.rows, product.y_type,
                 _mm512_mul_ps(_mm512_loadu_ps(sums + 64 * t), scales));
}

}  // namespace
}  // namespace elsa
