// The dense weight in bf16 from the bitmask layout: vectors of a few columns of 16 rows, turned into 32 columns of one.
#include "kernels.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
#include "avx512.h"

namespace elsa {
namespace {

constexpr int TILE = 32;  // columns: a vector of a row

// Two columns of all rows, a row in each 32-bit element, as bf16.
inline __m512i in_pairs(__m512 first, __m512 second) {
    const __m512i lower = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
    const __m512i upper = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
    return _mm512_or_si512(lower, _mm512_slli_epi32(upper, 16));
}

// An int8 of each 32-bit element, by how far it is from the upper end, times the row's scale; 0 is 0 at any scale.
template <int FROM_TOP>
inline __m512 scaled(__m512i bytes, __m512 scales) {
    const __m512i value = _mm512_srai_epi32(_mm512_slli_epi32(bytes, FROM_TOP), 24);
    return _mm512_maskz_mul_ps(_mm512_test_epi32_mask(value, value), _mm512_cvtepi32_ps(value), scales);
}

template <int64_t V>
void unpack_slice(const Product& product, int64_t slice) {
    const Packed& p = *product.weight;
    const Header& h = p.h;
    constexpr int WIDTH = V == BF16 ? 2 : 4, MASK_NBYTES = V == BF16 ? 4 : 8;
    const int64_t columns = h.columns, slice_masks = h.slice_masks();
    const uint8_t* masks = p.masks + MASK_NBYTES * slice * slice_masks;
    const uint8_t* values = p.values + load<int64_t>(p.value_offsets, slice * h.segments());
    const Rows rows(p, slice);
    alignas(64) uint32_t row[SLICE];
    _mm512_store_si512(row, rows.rows);
    alignas(64) __m512i tile[TILE / 2];
    const __m512i of_row = _mm512_slli_epi32(lane_numbers(), 4);
    __m512 scales = _mm512_set1_ps(1.0f);
    int64_t group = 0, next_group = 0;  // of integers
    for (int64_t from = 0; from < columns; from += TILE) {
        for (int i = 0; i < TILE / WIDTH; i++) {
            const int64_t at = from / WIDTH + i;
            if (at >= slice_masks) break;  // what is left in the tile is not stored
            if (V == BF16) {
                const uint32_t mask = load<uint32_t>(masks, at);
                tile[i] = expand16(mask, values);
                values += value_bytes<V>(__builtin_popcount(mask));
            } else {
                const uint64_t mask = load<uint64_t>(masks, at);
                // Of each row the columns 0, 2, 1 and 3, from the lowest byte up.
                __m512i bytes = expand_halves<V>(mask, values);
                if (V == INT4) bytes = _mm512_sub_epi8(bytes, _mm512_set1_epi8(8));
                if (at == next_group) {
                    scales = scales_of(p, slice, group++);
                    next_group = group < h.groups() ? group * h.group_size / WIDTH : slice_masks;
                }
                tile[2 * i] = in_pairs(scaled<24>(bytes, scales), scaled<8>(bytes, scales));
                tile[2 * i + 1] = in_pairs(scaled<16>(bytes, scales), scaled<0>(bytes, scales));
                values += value_bytes<V>(__builtin_popcountll(mask));
            }
        }
        const int64_t left = columns - from;
        const __mmask32 stored = left < TILE ? (1u << left) - 1 : 0xffffffff;
        for (uint32_t lanes = rows.lanes; lanes; lanes &= lanes - 1) {
            const int lane = __builtin_ctz(lanes);
            const __m512i line = _mm512_i32gather_epi32(of_row, (const int*)tile + lane, 4);
            _mm512_mask_storeu_epi16((uint16_t*)product.y + row[lane] * columns + from, stored, line);
        }
    }
}

}  // namespace

bool unpack_avx512(const Product& product, int64_t first, int64_t last) {
    const Header& h = product.weight->h;
    const auto unpack = h.values == BF16   ? unpack_slice<BF16>
                        : h.values == INT8 ? unpack_slice<INT8>
                        : h.values == INT4 ? unpack_slice<INT4>
                                           : nullptr;
    if (!unpack || h.layout != BITMASK || product.y_type != BF16) return unpack_avx2(product, first, last);
    for (int64_t slice = first; slice < last; slice++) unpack(product, slice);
    return true;
}

}  // namespace elsa
#endif
