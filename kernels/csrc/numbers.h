// Conversions between number formats, in plain C++: what every instruction set can fall back to.
#pragma once
#include "packed.h"

namespace elsa {

static inline float bits_to_float(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}
static inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits;
}
static inline float from_bf16(uint16_t v) { return bits_to_float((uint32_t)v << 16); }
static inline uint16_t to_bf16(float value) {
    uint32_t bits = float_to_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)((bits >> 16) | 0x40);  // NaN stays NaN
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static inline float from_fp16(uint16_t v) {
    uint32_t sign = (uint32_t)(v & 0x8000) << 16, rest = v & 0x7fff;
    if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest < 0x400) return bits_to_float(sign | float_to_bits((float)rest * 0x1p-24f));
    return bits_to_float(sign | ((rest << 13) + (112u << 23)));
}
static inline uint16_t to_fp16(float value) {
    uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // rounds past the largest
    if (rest < 0x38800000) {                                   // subnormal: let the addition round
        return (uint16_t)(sign | (float_to_bits(bits_to_float(rest) + 0.5f) - float_to_bits(0.5f)));
    }
    return (uint16_t)(sign | ((rest + 0xfff + ((rest >> 13) & 1) - (112u << 23)) >> 13));
}

static inline float load_value(const uint8_t* values, int64_t type, int64_t index) {
    switch (type) {
        case BF16:
            return from_bf16(load<uint16_t>(values, index));
        case FP16:
            return from_fp16(load<uint16_t>(values, index));
        case FP32:
            return load<float>(values, index);
        case INT8:
            return (float)load<int8_t>(values, index);
        default:
            return (float)((int)(values[index >> 1] >> (4 * (index & 1)) & 15) - 8);
    }
}
// Codes of scales are those of bf16, fp16 and fp32.
static inline float load_scale(const uint8_t* scales, int64_t type, int64_t index) {
    return type ? load_value(scales, type, index) : 1.0f;
}
static inline void store_float(void* to, Values type, int64_t index, float value) {
    if (type == BF16)
        store<uint16_t>((uint8_t*)to, index, to_bf16(value));
    else if (type == FP16)
        store<uint16_t>((uint8_t*)to, index, to_fp16(value));
    else
        store<float>((uint8_t*)to, index, value);
}

}  // namespace elsa
