#include "dispatch.h"

#include "kernels.h"

#if defined(ELSA_X86)
#include <cpuid.h>
#endif
#if defined(ELSA_X86) && defined(ELSA_WITH_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace elsa {

// From how many tokens on tiles are faster than a lane a row.
constexpr int64_t AMX_BITMASK_TOKENS = 2, AMX_WINDOW_TOKENS = 24;
constexpr int64_t AVX512_BITMASK_TOKENS = 9;  // WINDOW never
// From how many tokens on unpacking the weight and a dense product are faster.
constexpr int64_t DENSE_FP32_TOKENS = 32, DENSE_PLAIN_TOKENS = 8;

#if defined(ELSA_EMULATED_AMX)  // by tests/kernels/emulated_amx.h
static bool has_amx() { return true; }
#elif defined(ELSA_X86) && defined(ELSA_WITH_AMX) && defined(__linux__)
// The processor has tiles of bf16, and the system lets this process use them.
static bool has_amx() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if (!(d >> 22 & 1) || !(d >> 24 & 1)) return false;
    const long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#else
static bool has_amx() { return false; }
#endif

Level best_level() {
#if defined(ELSA_X86)
    __builtin_cpu_init();
#if defined(ELSA_WITH_AVX512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi2") &&
        __builtin_cpu_supports("avx512bf16"))
        return has_amx() ? AMX : AVX512;
#endif
#if defined(ELSA_WITH_AVX2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return AVX2;
#endif
#endif
    (void)has_amx;
    return PORTABLE;
}

Kernel unpack_kernel(Level level) {
#if defined(ELSA_WITH_AVX2)
    if (level >= AVX2) return unpack_avx2;
#endif
    (void)level;
    return unpack_portable;
}

Plan plan(Level level, const Header& weight, Values x_type, int64_t tokens) {
#if defined(ELSA_WITH_AVX512)
    if (level >= AVX512 && weight.layout != CSR) {
        if (x_type != BF16 || weight.values == FP16 || weight.values == FP32)
            return {tokens < DENSE_FP32_TOKENS ? avx512_fp32 : nullptr, ROWS_FP32};
        const bool bitmask = weight.layout == BITMASK;
#if defined(ELSA_WITH_AMX)
        if (level == AMX && tokens >= (bitmask ? AMX_BITMASK_TOKENS : AMX_WINDOW_TOKENS)) return {amx_bf16, TILES};
#endif
        if (level == AVX512 && bitmask && tokens >= AVX512_BITMASK_TOKENS) return {avx512_tiles, TILES};
        return {avx512_bf16, ROWS_BF16};
    }
#endif
    (void)weight, (void)x_type;
    if (tokens >= DENSE_PLAIN_TOKENS) return {nullptr, ROWS_FP32};
#if defined(ELSA_WITH_AVX2)
    if (level >= AVX2) return {avx2, ROWS_FP32};
#endif
    (void)level;
    return {portable, ROWS_FP32};
}

}  // namespace elsa
