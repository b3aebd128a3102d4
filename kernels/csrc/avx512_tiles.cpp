// x in bf16, in tiles that AVX-512 multiplies, a lane a row: see tiles.h. Where there is no AMX.
#include "kernels.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
#include "tiles.h"

namespace elsa {
namespace {

// Tokens whose sums are in registers at once, times two slices.
constexpr int REGISTER_TOKENS = 8;

// sums += TOKENS tokens of one block x SLICES slices.
template <int TOKENS, int SLICES>
void multiply_few(const Corner& c, const uint8_t* x, uint8_t* sums, int64_t count) {
    __m512 sum[SLICES][TOKENS];
    for (int i = 0; i < SLICES; i++)
        for (int t = 0; t < TOKENS; t++) sum[i][t] = _mm512_load_ps(sums + i * c.sums_slice + 64 * t);
    for (int64_t k = 0; k < count; k++) {
#pragma GCC unroll 4
        for (int pair = 0; pair < TILE_COLUMNS / 2; pair++) {
            __m512bh w[SLICES];
            for (int i = 0; i < SLICES; i++)
                w[i] = (__m512bh)_mm512_load_si512(c.w + i * c.w_slice + k * TILE_NBYTES + 64 * pair);
            for (int t = 0; t < TOKENS; t++) {
                const __m512bh xs = (__m512bh)_mm512_set1_epi32(load<int>(x + k * TILE_NBYTES + 64 * t, pair));
                for (int i = 0; i < SLICES; i++) sum[i][t] = _mm512_dpbf16_ps(sum[i][t], w[i], xs);
            }
        }
    }
    for (int i = 0; i < SLICES; i++)
        for (int t = 0; t < TOKENS; t++) _mm512_store_ps(sums + i * c.sums_slice + 64 * t, sum[i][t]);
}

template <int SLICES>
void multiply_block(const Corner& c, const uint8_t* x, uint8_t* sums, int64_t tokens, int64_t count) {
    for (; tokens > 0; tokens -= REGISTER_TOKENS, x += 64 * REGISTER_TOKENS, sums += 64 * REGISTER_TOKENS) {
        if (tokens > 6)
            multiply_few<8, SLICES>(c, x, sums, count);
        else if (tokens > 4)
            multiply_few<6, SLICES>(c, x, sums, count);
        else if (tokens > 2)
            multiply_few<4, SLICES>(c, x, sums, count);
        else
            multiply_few<2, SLICES>(c, x, sums, count);
    }
}

struct AVX512Tiles {
    static constexpr int64_t PANEL_TOKENS = 512, KEPT_NBYTES = 4 << 20, FEW_PIECE = 256, MANY_PIECE = 512;

    static void begin(const Corner& c, bool zero) {
        if (!zero) return;
        for (int i = 0; i <= c.two_slices; i++) __builtin_memset(c.sums + i * c.sums_slice, 0, 2 * TILE_NBYTES);
    }
    static void multiply(const Corner& c, int64_t count) {
        // Pieces of the window layout are long; what is multiplied at a time is to stay in the first-level cache.
        for (int64_t k = 0; k < count; k += MANY_PIECE / TILE_COLUMNS) {
            const int64_t now = count - k < MANY_PIECE / TILE_COLUMNS ? count - k : MANY_PIECE / TILE_COLUMNS;
            Corner here = c;
            here.w += k * TILE_NBYTES;
            for (int64_t block = 0; block * TILE_TOKENS < c.tokens; block++) {
                const int64_t left = c.tokens - block * TILE_TOKENS, tokens = left < TILE_TOKENS ? left : TILE_TOKENS;
                const uint8_t* x = c.x + block * c.x_block + k * TILE_NBYTES;
                uint8_t* sums = c.sums + block * TILE_NBYTES;
                if (c.two_slices)
                    multiply_block<2>(here, x, sums, tokens, now);
                else
                    multiply_block<1>(here, x, sums, tokens, now);
            }
        }
    }
    static void end(const Corner&) {}
};

}  // namespace

bool avx512_tiles(const Product& product, int64_t first, int64_t last) {
    return in_panels<AVX512Tiles>(product, first, last);
}

int64_t tiles_nbytes(int64_t tokens, int64_t columns) {
    return (tokens + TILE_TOKENS - 1) / TILE_TOKENS * ((columns + TILE_COLUMNS - 1) / TILE_COLUMNS) * TILE_NBYTES;
}

// x, (tokens, stride) bf16, as (blocks of 16 tokens, tiles of 32 columns, 16, 32), filled up with zeros; blocks first
// to last.
void arrange_tiles(const Product& product, uint8_t* tiles, int64_t first, int64_t last) {
    const int64_t columns = product.weight->h.columns, count = (columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
    for (int64_t block = first; block < last; block++) {
        for (int64_t i = 0; i < TILE_TOKENS; i++) {
            const int64_t token = block * TILE_TOKENS + i;
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

}  // namespace elsa
#endif
