// x in bf16, in tiles that AMX multiplies: see tiles.h.
#include "kernels.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512VBMI2__) && defined(__linux__)
#include "tiles.h"

namespace elsa {
namespace {

struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_nbytes[16] = {};
    uint8_t rows[16] = {};

    // Tiles 0 to 3 sums (token block 0 x slice 0, 0 x 1, 1 x 0, 1 x 1), 4 and 5 tokens, 6 and 7 weights.
    explicit TileConfig(int tokens) {
        for (int tile = 0; tile < 8; tile++) {
            row_nbytes[tile] = 64;
            rows[tile] = tile < 6 ? (uint8_t)tokens : 16;
        }
    }
};

template <bool TWO_TOKENS, bool TWO_SLICES>
inline void multiply_tiles(const Corner& c, int64_t count) {
    for (int64_t k = 0; k < count; k++) {
        _tile_loadd(4, c.x + k * TILE_NBYTES, 64);
        _tile_loadd(6, c.w + k * TILE_NBYTES, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (TWO_SLICES) {
            _tile_loadd(7, c.w + c.w_slice + k * TILE_NBYTES, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (TWO_TOKENS) {
            _tile_loadd(5, c.x + c.x_block + k * TILE_NBYTES, 64);
            _tile_dpbf16ps(2, 5, 6);
            if (TWO_SLICES) _tile_dpbf16ps(3, 5, 7);
        }
    }
}

struct AMXTiles {
    static constexpr int64_t PANEL_TOKENS = 128;  // whose x, SEGMENT columns of it, stays in the second-level cache
    // Unpacked weights kept for the next panel; of 0.5, 1, 2, 4 and 64 MiB the fastest.
    static constexpr int64_t KEPT_NBYTES = 4 << 20;
    // Columns of a bitmask unpacked at a time: the fewer, the better unpacking and multiplying overlap; for many tokens
    // the sums are loaded and stored once a piece.
    static constexpr int64_t FEW_PIECE = 64, MANY_PIECE = 128;

    static void begin(const Corner& c, bool zero) {
        if (zero) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            return;
        }
        _tile_loadd(0, c.sums, 64);
        _tile_loadd(1, c.sums + c.sums_slice, 64);
        _tile_loadd(2, c.sums + TILE_NBYTES, 64);
        _tile_loadd(3, c.sums + c.sums_slice + TILE_NBYTES, 64);
    }
    static void multiply(const Corner& c, int64_t count) {
        const bool two_tokens = c.tokens > TILE_TOKENS;
        if (two_tokens && c.two_slices) return multiply_tiles<true, true>(c, count);
        if (two_tokens) return multiply_tiles<true, false>(c, count);
        if (c.two_slices) return multiply_tiles<false, true>(c, count);
        multiply_tiles<false, false>(c, count);
    }
    static void end(const Corner& c) {
        _tile_stored(0, c.sums, 64);
        _tile_stored(1, c.sums + c.sums_slice, 64);
        _tile_stored(2, c.sums + TILE_NBYTES, 64);
        _tile_stored(3, c.sums + c.sums_slice + TILE_NBYTES, 64);
    }
};

}  // namespace

bool amx_bf16(const Product& product, int64_t first, int64_t last) {
    const TileConfig config(product.tokens < TILE_TOKENS ? (int)product.tokens : TILE_TOKENS);
    _tile_loadconfig(&config);
    const bool done = in_panels<AMXTiles>(product, first, last);
    _tile_release();
    return done;
}

}  // namespace elsa
#endif
