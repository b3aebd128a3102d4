// What the AVX-512 kernels share. Everything is static: a copy of an inline function that was compiled for AVX-512 must
// never be the one that the linker keeps for other files.
#pragma once
#include <immintrin.h>

#include "packed.h"

namespace elsa {
namespace {

// A full load and an expansion in a register: masked expanding loads are slow, and merging into a zeroed register
// breaks what is on some processors a dependency on the destination's old value.
inline __m512i expand16(__mmask32 mask, const uint8_t* from) {
    __m512i zero = _mm512_setzero_si512(), all = _mm512_loadu_si512(from);
    __asm__("" : "+v"(zero));
    __asm__("" : "+v"(all));
    return _mm512_mask_expand_epi16(zero, mask, all);
}
inline __m256i expand8(__mmask32 mask, __m256i all, __m256i background) {
    __asm__("" : "+v"(background));
    __asm__("" : "+v"(all));
    return _mm256_mask_expand_epi8(background, mask, all);
}
inline __m256i expand8(__mmask32 mask, const uint8_t* from) {
    return expand8(mask, _mm256_loadu_si256((const __m256i*)from), _mm256_setzero_si256());
}
inline __m512i expand32(__mmask16 mask, const uint8_t* from) {
    __m512i zero = _mm512_setzero_si512(), all = _mm512_loadu_si512(from);
    __asm__("" : "+v"(zero));
    __asm__("" : "+v"(all));
    return _mm512_mask_expand_epi32(zero, mask, all);
}
inline __m512i expand64(__mmask64 mask, __m512i all, __m512i background) {
    __asm__("" : "+v"(background));
    __asm__("" : "+v"(all));
    return _mm512_mask_expand_epi8(background, mask, all);
}
// A mask of the bitmask layout: two int8, or codes of int4, in each 16-bit element.
template <int64_t V>
inline __m512i expand_halves(__mmask64 mask, const uint8_t* from) {
    if (V == INT8) return expand64(mask, _mm512_loadu_si512(from), _mm512_setzero_si512());
    const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from));
    const __m512i codes = _mm512_and_si512(_mm512_or_si512(bytes, _mm512_slli_epi16(bytes, 4)), _mm512_set1_epi8(15));
    return expand64(mask, codes, _mm512_set1_epi8(8));
}
// Up to 32 codes of int4, a byte each.
inline __m256i nibbles(const uint8_t* from) {
    const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)from));
    return _mm256_and_si256(_mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4)), _mm256_set1_epi8(15));
}
// Bytes from what is read to what is fetched into the cache meanwhile. What the processor fetches by itself stops at
// the end of a page, and comes to two thirds of this.
constexpr int AHEAD = 2048;
inline void prefetch(const uint8_t* from) { _mm_prefetch((const char*)from, _MM_HINT_T0); }

template <int64_t V>
inline int64_t value_bytes(int count) {
    return V == FP32 ? 4 * count : V == INT8 ? count : V == INT4 ? (count + 1) >> 1 : 2 * count;
}

// bf16 of the codes 0 to 15 of int4, twice.
inline __m512i int4_table() {
    const __m256i half =
        _mm256_setr_epi16((short)0xC100, (short)0xC0E0, (short)0xC0C0, (short)0xC0A0, (short)0xC080, (short)0xC040,
                          (short)0xC000, (short)0xBF80, 0, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0);
    return _mm512_broadcast_i64x4(half);
}
inline __m512i int4_codes(__mmask32 mask, const uint8_t* from) {
    return _mm512_cvtepu8_epi16(expand8(mask, nibbles(from), _mm256_set1_epi8(8)));
}

// The lower and the upper bytes of 0 to 127 in bf16.
struct alignas(64) BF16Bytes {
    uint8_t lower[128] = {}, upper[128] = {};

    constexpr BF16Bytes() {
        for (int i = 1; i < 128; i++) {
            int exponent = 6;
            while (i >> exponent == 0) exponent--;
            const int bits = (127 + exponent) << 7 | (i << (7 - exponent) & 0x7f);
            lower[i] = (uint8_t)bits;
            upper[i] = (uint8_t)(bits >> 8);
        }
    }
};
constexpr BF16Bytes BF16_BYTES;

// int8 to bf16, which holds all of them.
struct Int8Table {
    __m512i lower[2], upper[2];

    Int8Table() {
        for (int i = 0; i < 2; i++) {
            lower[i] = _mm512_load_si512(BF16_BYTES.lower + 64 * i);
            upper[i] = _mm512_load_si512(BF16_BYTES.upper + 64 * i);
        }
    }
    // What is in the lower halves of 16-bit elements, and what is in the upper ones.
    void convert(__m512i bytes, __m512i (&halves)[2]) const {
        const __m512i magnitude = _mm512_abs_epi8(bytes), sign = _mm512_set1_epi8((char)0x80);
        const __m512i low = _mm512_permutex2var_epi8(lower[0], magnitude, lower[1]);
        __m512i high = _mm512_permutex2var_epi8(upper[0], magnitude, upper[1]);
        const int or_and = 0xF8, select = 0xD8;  // a | (b & c); c ? b : a
        high = _mm512_ternarylogic_epi32(high, bytes, sign, or_and);
        // -128, whose magnitude the tables have not: 0xC300.
        high = _mm512_mask_mov_epi8(high, _mm512_cmpeq_epi8_mask(bytes, sign), _mm512_set1_epi8((char)0xC3));
        const __m512i uppers = _mm512_set1_epi16((short)0xff00);
        halves[0] = _mm512_ternarylogic_epi32(low, _mm512_slli_epi16(high, 8), uppers, select);
        halves[1] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(low, 8), high, uppers, select);
    }
};

inline __m512i lane_numbers() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

// Scales of the 16 rows of a slice in one group.
inline __m512 scales_of(const Packed& p, int64_t slice, int64_t group) {
    const int64_t at = (slice * p.h.groups() + group) * SLICE;
    if (p.h.scales == FP32) return _mm512_loadu_ps(p.scales + 4 * at);
    const __m256i half = _mm256_loadu_si256((const __m256i*)(p.scales + 2 * at));
    if (p.h.scales == FP16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline __m256i narrow(__m512 values, Values type) {
    if (type == FP16) return _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return (__m256i)_mm512_cvtneps_pbh(values);
}

// The rows of a slice: in a run that can be stored at once, or one by one.
struct Rows {
    __m512i rows;
    __mmask16 lanes;
    int64_t start;
    bool run;

    Rows(const Packed& p, int64_t slice) {
        rows = _mm512_loadu_si512(p.order + 4 * slice * SLICE);
        lanes = _mm512_cmpneq_epi32_mask(rows, _mm512_set1_epi32(-1));
        start = load<uint32_t>(p.order, slice * SLICE);
        const __m512i wanted = _mm512_add_epi32(_mm512_set1_epi32((int)start), lane_numbers());
        run = lanes & 1 && _mm512_mask_cmpneq_epi32_mask(lanes, rows, wanted) == 0;
    }
    // y: the first of a token's results
    void put(uint8_t* y, Values type, __m512 values) const {
        if (run && type == FP32) return _mm512_mask_storeu_ps(y + 4 * start, lanes, values);
        if (run) return _mm256_mask_storeu_epi16(y + 2 * start, lanes, narrow(values, type));
        if (type == FP32) return _mm512_mask_i32scatter_ps(y, lanes, rows, values, 4);
        alignas(64) uint32_t row[SLICE];
        alignas(32) uint16_t value[SLICE];
        _mm512_store_si512(row, rows);
        _mm256_store_si256((__m256i*)value, narrow(values, type));
        for (uint32_t left = lanes; left; left &= left - 1) {
            const int lane = __builtin_ctz(left);
            store<uint16_t>(y, row[lane], value[lane]);
        }
    }
};

}  // namespace
}  // namespace elsa
