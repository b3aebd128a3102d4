// x in fp32, every format of values, products in fp32: for fp16 and fp32, where bf16 would lose what x or the weight
// has.
#include "kernels.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
#include "avx512.h"

namespace elsa {
namespace {

// The weights of a mask's even and odd bits: the two of each row.
struct Pair {
    __m512 even, odd;
};

inline __m512 from_half(__m512i lower16, bool fp16) {
    return fp16 ? _mm512_cvtph_ps(_mm512_cvtepi32_epi16(lower16)) : _mm512_castsi512_ps(_mm512_slli_epi32(lower16, 16));
}

inline Pair from_integers(__m512i both) {
    return {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(both, 16), 16)),
            _mm512_cvtepi32_ps(_mm512_srai_epi32(both, 16))};
}

template <int64_t V>
inline Pair expand(uint32_t mask, const uint8_t* values) {
    if (V == FP32) {
        const __m512i lower = expand32((__mmask16)mask, values);
        const __m512i upper = expand32((__mmask16)(mask >> 16), values + 4 * __builtin_popcount(mask & 0xffff));
        const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
        return {_mm512_castsi512_ps(_mm512_permutex2var_epi32(lower, evens, upper)),
                _mm512_castsi512_ps(_mm512_permutex2var_epi32(lower, odds, upper))};
    }
    if (V == BF16 || V == FP16) {
        const __m512i both = expand16(mask, values);
        return {from_half(both, V == FP16), from_half(_mm512_srli_epi32(both, 16), V == FP16)};
    }
    return from_integers(V == INT8 ? _mm512_cvtepi8_epi16(expand8(mask, values))
                                   : _mm512_sub_epi16(int4_codes(mask, values), _mm512_set1_epi16(8)));
}

// One of the two pairs of columns of a mask of integers.
template <int64_t V>
inline Pair of_halves(__m512i halves, bool upper) {
    if (upper) halves = _mm512_srli_epi16(halves, 8);
    if (V == INT8) return from_integers(_mm512_srai_epi16(_mm512_slli_epi16(halves, 8), 8));
    return from_integers(_mm512_sub_epi16(_mm512_and_si512(halves, _mm512_set1_epi16(15)), _mm512_set1_epi16(8)));
}

template <int64_t V, int TOKENS>
void slice_of(const Product& product, int64_t slice, int64_t token) {
    const Packed& p = *product.weight;
    const Header& h = p.h;
    constexpr bool INTEGERS = V == INT8 || V == INT4;
    constexpr int WIDTH = INTEGERS ? 4 : 2;
    const bool bitmask = h.layout == BITMASK;
    const int64_t stride = product.stride, blocks = h.blocks(), first_mask = slice * h.slice_masks();
    const float* x = (const float*)product.x + token * stride;
    const uint8_t* values = p.values + load<int64_t>(p.value_offsets, slice * h.segments());
    const uint8_t* indices = bitmask ? nullptr : p.indices + load<uint32_t>(p.kept_offsets, slice * h.segments());
    int64_t step = bitmask ? first_mask : load<uint32_t>(p.step_offsets, slice * blocks);
    __m512 total[TOKENS], even[TOKENS], odd[TOKENS];
    for (__m512& t : total) t = _mm512_setzero_ps();
    auto add = [&](const Pair& w, const float* at) __attribute__((always_inline)) {
        for (int t = 0; t < TOKENS; t++) {
            even[t] = _mm512_fmadd_ps(w.even, _mm512_set1_ps(at[t * stride]), even[t]);
            odd[t] = _mm512_fmadd_ps(w.odd, _mm512_set1_ps(at[t * stride + 1]), odd[t]);
        }
    };
    // In the bitmask layout a group starts where a mask does, or is the only one.
    for (int64_t from = 0, block = 1; block <= blocks; block++) {
        const int64_t to = h.next_boundary(from);
        const int64_t end =
            bitmask ? first_mask + (to + WIDTH - 1) / WIDTH : load<uint32_t>(p.step_offsets, slice * blocks + block);
        for (int t = 0; t < TOKENS; t++) even[t] = odd[t] = _mm512_setzero_ps();
        for (; step < end; step++) {
            const float* at = x + (bitmask ? WIDTH * (step - first_mask) : load<uint16_t>(p.bases, step));
            if (bitmask && INTEGERS) {
                const uint64_t mask = load<uint64_t>(p.masks, step);
                const __m512i halves = expand_halves<V == INT4 ? INT4 : INT8>(mask, values);
                add(of_halves<V>(halves, false), at);
                add(of_halves<V>(halves, true), at + 2);
                values += value_bytes<V>(__builtin_popcountll(mask));
                continue;
            }
            const uint32_t mask = load<uint32_t>(p.masks, step);
            const Pair w = expand<V>(mask, values);
            const int count = __builtin_popcount(mask);
            values += value_bytes<V>(count);
            if (bitmask) {
                add(w, at);
                continue;
            }
            const __m512i index = _mm512_cvtepu8_epi16(expand8(mask, indices));
            const __m512i evens = _mm512_and_si512(index, _mm512_set1_epi32(0xffff));
            const __m512i odds = _mm512_srli_epi32(index, 16);
            for (int t = 0; t < TOKENS; t++) {
                even[t] = _mm512_fmadd_ps(w.even, _mm512_i32gather_ps(evens, at + t * stride, 4), even[t]);
                odd[t] = _mm512_fmadd_ps(w.odd, _mm512_i32gather_ps(odds, at + t * stride, 4), odd[t]);
            }
            indices += count;
        }
        const __m512 scales = INTEGERS ? scales_of(p, slice, from / h.group_size) : _mm512_set1_ps(1.0f);
        for (int t = 0; t < TOKENS; t++) total[t] = _mm512_fmadd_ps(_mm512_add_ps(even[t], odd[t]), scales, total[t]);
        from = to;
    }
    const Rows rows(p, slice);
    const int64_t size = product.y_type == FP32 ? 4 : 2;
    for (int t = 0; t < TOKENS; t++)
        rows.put((uint8_t*)product.y + size * (token + t) * h.rows, product.y_type, total[t]);
}

template <int64_t V>
bool all(const Product& product, int64_t first, int64_t last) {
    for (int64_t slice = first; slice < last; slice++) {
        int64_t token = 0;
        for (; token + 4 <= product.tokens; token += 4) slice_of<V, 4>(product, slice, token);
        for (; token < product.tokens; token++) slice_of<V, 1>(product, slice, token);
    }
    return true;
}

}  // namespace

bool avx512_fp32(const Product& product, int64_t first, int64_t last) {
    switch (product.weight->h.values) {
        case BF16:
            return all<BF16>(product, first, last);
        case FP16:
            return all<FP16>(product, first, last);
        case FP32:
            return all<FP32>(product, first, last);
        case INT8:
            return all<INT8>(product, first, last);
        default:
            return all<INT4>(product, first, last);
    }
}

}  // namespace elsa
#endif
