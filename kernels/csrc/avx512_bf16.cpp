// x in bf16, a few tokens: each result's products are accumulated in fp32 in a lane of its own, in registers.
#include "kernels.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
#include "avx512.h"

namespace elsa {
namespace {

inline __m512 dot(__m512 sum, __m512i weights, __m512i x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)x);
}
inline __m512i broadcast(const uint16_t* x) {
    int pair;
    __builtin_memcpy(&pair, x, 4);
    return _mm512_set1_epi32(pair);
}

// An int8 in two bf16, which hold 8 bits: with t its lower 7 bits, (128 + t) - 128, or - 256 if it is negative.
struct Int8Halves {
    __m512i positive, negative;
    // In the lower halves of 16-bit elements, whatever is in the upper ones.
    explicit Int8Halves(__m512i bytes) {
        const int and_or = 0xEA;  // (a & b) | c
        positive = _mm512_ternarylogic_epi32(bytes, _mm512_set1_epi16(0x7f), _mm512_set1_epi16(0x4300), and_or);
        negative = _mm512_ternarylogic_epi32(bytes, _mm512_set1_epi16(0x80), _mm512_set1_epi16((short)0xC300), and_or);
    }
};

// sums += two columns of weights times x. Integers are in the lower halves of 16-bit elements; int8 for more tokens
// than one, where two products of a half each take longer than to look a bf16 up, are bf16 already.
template <int64_t V, int TOKENS, int CHAINS>
inline void add_pair(__m512 (&sums)[TOKENS][CHAINS], int chain, __m512i weights, const uint16_t* x, int64_t stride,
                     __m512i table) {
    if (V == INT8 && TOKENS == 1) {
        const Int8Halves w(weights);
        for (int t = 0; t < TOKENS; t++) {
            const __m512i xs = broadcast(x + t * stride);
            sums[t][chain] = dot(dot(sums[t][chain], w.positive, xs), w.negative, xs);
        }
    } else {
        const __m512i w = V != INT4 ? weights : _mm512_permutexvar_epi16(weights, table);
        for (int t = 0; t < TOKENS; t++) sums[t][chain] = dot(sums[t][chain], w, broadcast(x + t * stride));
    }
}

template <int64_t V, int TOKENS>
inline void bitmask_slice(const Product& product, int64_t slice, int64_t token) {
    const Packed& p = *product.weight;
    const Header& h = p.h;
    constexpr int WIDTH = V == BF16 ? 2 : 4, MASK_NBYTES = V == BF16 ? 4 : 8;
    const int64_t stride = product.stride, slice_masks = h.slice_masks(), groups = h.groups();
    const uint16_t* x = (const uint16_t*)product.x + token * stride;
    const uint8_t* masks = p.masks + MASK_NBYTES * slice * slice_masks;
    const uint8_t* values = p.values + load<int64_t>(p.value_offsets, slice * h.segments());
    const __m512i table = int4_table();
    const Int8Table int8s;
    __m512 total[TOKENS];
    for (__m512& t : total) t = _mm512_setzero_ps();
    // A sum of its own for neighbouring pairs hides the latency of dot.
    constexpr int CHAINS = TOKENS >= 4 ? 1 : TOKENS >= 2 ? 2 : 4;
    for (int64_t group = 0; group < groups; group++) {
        const int64_t end = group + 1 == groups ? slice_masks : (group + 1) * h.group_size / WIDTH;
        __m512 sums[TOKENS][CHAINS];
        for (auto& of_token : sums)
            for (__m512& sum : of_token) sum = _mm512_setzero_ps();
        auto step = [&](int64_t i, int chain) __attribute__((always_inline)) {
            const uint16_t* at = x + WIDTH * i;
            if (V == BF16) {
                const uint32_t mask = load<uint32_t>(masks, i);
                add_pair<V>(sums, chain % CHAINS, expand16(mask, values), at, stride, table);
                values += value_bytes<V>(__builtin_popcount(mask));
            } else {
                const uint64_t mask = load<uint64_t>(masks, i);
                const __m512i bytes = expand_halves<V>(mask, values);
                __m512i halves[2] = {bytes, _mm512_srli_epi16(bytes, 8)};
                if (V == INT8 && TOKENS > 1) int8s.convert(bytes, halves);
                for (int half = 0; half < 2; half++)
                    add_pair<V>(sums, (2 * chain + half) % CHAINS, halves[half], at + 2 * half, stride, table);
                values += value_bytes<V>(__builtin_popcountll(mask));
            }
        };
        int64_t i = group * h.group_size / WIDTH;
        for (; i + 4 <= end; i += 4) {
            prefetch(values + AHEAD);
            if (V != INT4) prefetch(values + AHEAD + 64);
            prefetch(masks + MASK_NBYTES * i + AHEAD / 2);
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) step(i + k, k);
        }
        for (; i < end; i++) step(i, 0);
        const __m512 scales = V == BF16 ? _mm512_set1_ps(1.0f) : scales_of(p, slice, group);
        for (int t = 0; t < TOKENS; t++) {
            for (int chain = 1; chain < CHAINS; chain++) sums[t][0] = _mm512_add_ps(sums[t][0], sums[t][chain]);
            total[t] = _mm512_fmadd_ps(sums[t][0], scales, total[t]);
        }
    }
    const Rows rows(p, slice);
    for (int t = 0; t < TOKENS; t++) rows.put((uint8_t*)product.y + 2 * (token + t) * h.rows, product.y_type, total[t]);
}

template <int64_t V, int TOKENS>
inline void window_slice(const Product& product, int64_t slice, int64_t token) {
    const Packed& p = *product.weight;
    const Header& h = p.h;
    const int64_t stride = product.stride, blocks = h.blocks();
    const uint16_t* x = (const uint16_t*)product.x + token * stride;
    const uint8_t* values = p.values + load<int64_t>(p.value_offsets, slice * h.segments());
    const uint8_t* indices = p.indices + load<uint32_t>(p.kept_offsets, slice * h.segments());
    const __m512i table = int4_table();
    int64_t step = load<uint32_t>(p.step_offsets, slice * blocks);
    __m512 total[TOKENS], sums[TOKENS];
    for (__m512& t : total) t = _mm512_setzero_ps();
    int64_t from = 0;
    for (int64_t block = 1; block <= blocks; block++) {
        const int64_t end = load<uint32_t>(p.step_offsets, slice * blocks + block);
        for (__m512& sum : sums) sum = _mm512_setzero_ps();
        for (; step < end; step++) {
            prefetch(values + AHEAD);
            prefetch(indices + AHEAD / 2);
            const uint32_t mask = load<uint32_t>(p.masks, step);
            const uint16_t* at = x + load<uint16_t>(p.bases, step);
            const int count = __builtin_popcount(mask);
            const __m512i index = _mm512_cvtepu8_epi16(expand8(mask, indices));
            auto look_up = [&](int t) __attribute__((always_inline)) {
                const uint16_t* reach = at + t * stride;
                return _mm512_permutex2var_epi16(_mm512_loadu_si512(reach), index, _mm512_loadu_si512(reach + 32));
            };
            if (V == INT8) {
                const Int8Halves w(_mm512_cvtepu8_epi16(expand8(mask, values)));
                for (int t = 0; t < TOKENS; t++) {
                    const __m512i xs = look_up(t);
                    sums[t] = dot(dot(sums[t], w.positive, xs), w.negative, xs);
                }
            } else {
                const __m512i w =
                    V == BF16 ? expand16(mask, values) : _mm512_permutexvar_epi16(int4_codes(mask, values), table);
                for (int t = 0; t < TOKENS; t++) sums[t] = dot(sums[t], w, look_up(t));
            }
            indices += count;
            values += value_bytes<V>(count);
        }
        const __m512 scales = V == BF16 ? _mm512_set1_ps(1.0f) : scales_of(p, slice, from / h.group_size);
        for (int t = 0; t < TOKENS; t++) total[t] = _mm512_fmadd_ps(sums[t], scales, total[t]);
        from = h.next_boundary(from);
    }
    const Rows rows(p, slice);
    for (int t = 0; t < TOKENS; t++) rows.put((uint8_t*)product.y + 2 * (token + t) * h.rows, product.y_type, total[t]);
}

template <int64_t V, int TOKENS>
inline void slice_of(const Product& product, int64_t slice, int64_t token) {
    if (product.weight->h.layout == BITMASK)
        bitmask_slice<V, TOKENS>(product, slice, token);
    else
        window_slice<V, TOKENS>(product, slice, token);
}

// Tokens whose x stays in the second-level cache while all slices pass.
constexpr int64_t PANEL_TOKENS = 64;

// The most tokens whose sums are in registers at once.
constexpr int MOST_TOKENS = 8;

// The last tokens of a panel, TOKENS or fewer, at once.
template <int64_t V, int TOKENS>
void rest_of_panel(const Product& product, int64_t slice, int64_t token, int64_t tokens) {
    if (tokens == TOKENS) return slice_of<V, TOKENS>(product, slice, token);
    if constexpr (TOKENS > 1) rest_of_panel<V, TOKENS - 1>(product, slice, token, tokens);
}

template <int64_t V>
bool all(const Product& product, int64_t first, int64_t last) {
    for (int64_t panel = 0; panel < product.tokens; panel += PANEL_TOKENS) {
        const int64_t end = panel + PANEL_TOKENS < product.tokens ? panel + PANEL_TOKENS : product.tokens;
        for (int64_t slice = first; slice < last; slice++) {
            int64_t token = panel;
            for (; token + MOST_TOKENS <= end; token += MOST_TOKENS) slice_of<V, MOST_TOKENS>(product, slice, token);
            rest_of_panel<V, MOST_TOKENS - 1>(product, slice, token, end - token);
        }
    }
    return true;
}

}  // namespace

bool avx512_bf16(const Product& product, int64_t first, int64_t last) {
    switch (product.weight->h.values) {
        case BF16:
            return all<BF16>(product, first, last);
        case INT8:
            return all<INT8>(product, first, last);
        default:
            return all<INT4>(product, first, last);
    }
}

}  // namespace elsa
#endif
