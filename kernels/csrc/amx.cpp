// Products of bf16 in tiles that AMX multiplies, from a few tokens to many: slices are unpacked a piece at a time into
// a buffer that stays in the cache, in the order that a product wants, and multiplied there. From memory the weight is
// read in its packed form.
#include "kernels.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512VBMI2__) && defined(__linux__)
#include "unpack.h"

namespace elsa {
namespace {

constexpr int64_t PANEL_TOKENS = 128;  // whose x, SEGMENT columns of it, stays in the second-level cache
// Unpacked weights kept for the next panel; of 0.5, 1, 2, 4 and 64 MiB the fastest.
constexpr int64_t KEPT_NBYTES = 4 << 20;
// Columns of a bitmask unpacked at a time: the fewer, the better unpacking and multiplying overlap; for many tokens the
// sums are loaded and stored once a piece.
constexpr int64_t FEW_PIECE = 64, MANY_PIECE = 128;

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

// Up to two blocks of tokens times up to two slices of weights, over some tiles of columns. Each pair of a block and a
// slice has a tile of sums, (16 tokens, 16 rows) fp32; the second block's lies behind the first's.
struct Corner {
    const uint8_t *x, *w;
    uint8_t* sums;
    int64_t x_block, w_slice, sums_slice;  // bytes from the first to the second
    int64_t tokens;                        // 1 to 32; the tiles of x are filled up with zeros
    bool two_slices;
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

inline void load_sums(const Corner& c, bool zero) {
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

inline void multiply(const Corner& c, int64_t count) {
    const bool two_tokens = c.tokens > TILE_TOKENS;
    if (two_tokens && c.two_slices) return multiply_tiles<true, true>(c, count);
    if (two_tokens) return multiply_tiles<true, false>(c, count);
    if (c.two_slices) return multiply_tiles<false, true>(c, count);
    multiply_tiles<false, false>(c, count);
}

inline void store_sums(const Corner& c) {
    _tile_stored(0, c.sums, 64);
    _tile_stored(1, c.sums + c.sums_slice, 64);
    _tile_stored(2, c.sums + TILE_NBYTES, 64);
    _tile_stored(3, c.sums + c.sums_slice + TILE_NBYTES, 64);
}

// Where a kernel call works: `weights` holds a piece of two slices, or with `keep` all columns of the call's slices.
struct Scratch {
    uint8_t *weights, *sums;
    bool keep;
};

// A panel of tokens: every segment of every pair of slices from first to last. With scratch.keep the slices are
// unpacked for the first panel and found there by the others.
void panel(const Product& product, int64_t first, int64_t last, int64_t token, const Scratch& scratch) {
    const Packed& p = *product.weight;
    const Header& h = p.h;
    const Unpack unpack = unpack_of(h);
    const int64_t left = product.tokens - token;
    const int64_t tokens = left < PANEL_TOKENS ? left : PANEL_TOKENS;
    const int64_t tiles = product.stride, blocks = (tokens + TILE_TOKENS - 1) / TILE_TOKENS;
    // An even number of blocks, so that the sums of a corner always have a place.
    const int64_t sums_nbytes = (blocks + 1) / 2 * 2 * TILE_NBYTES, x_block = tiles * TILE_NBYTES;
    const uint8_t* x = (const uint8_t*)product.x + token / TILE_TOKENS * x_block;
    const bool few = blocks <= 2, fresh = !scratch.keep || token == 0;
    const int64_t piece = h.layout == WINDOW ? SEGMENT : few && !scratch.keep ? FEW_PIECE : MANY_PIECE;
    int64_t next_block = 0;
    for (int64_t segment = 0; segment < h.segments(); segment++) {
        const int64_t from = segment * SEGMENT, to = from + SEGMENT < h.columns ? from + SEGMENT : h.columns;
        const int64_t first_block = next_block;
        for (int64_t column = from; column < to; column = h.next_boundary(column)) next_block++;
        for (int64_t slice = first; slice < last; slice += 2) {
            const bool two = slice + 1 < last;
            uint8_t* s = scratch.sums + (h.segments() == 1 ? 0 : (slice - first) * sums_nbytes);
            uint8_t* kept = scratch.weights + (slice - first) * tiles * TILE_NBYTES;
            Cursor cursors[2];
            for (int i = 0; i <= two && fresh; i++) cursors[i] = enter(p, slice + i, segment, first_block);
            Corner corner{x, kept, s, x_block, 0, sums_nbytes, tokens, two};
            if (few) load_sums(corner, segment == 0);
            for (int64_t at = from; at < to; at += piece) {
                const int64_t end = at + piece < to ? at + piece : to, tile = at / TILE_COLUMNS;
                const int64_t count = (end - at + TILE_COLUMNS - 1) / TILE_COLUMNS;
                corner.w = scratch.keep ? kept + 2 * tile * TILE_NBYTES : scratch.weights;
                corner.w_slice = count * TILE_NBYTES;
                for (int i = 0; i <= two && fresh; i++)
                    unpack(p, slice + i, cursors[i], at, end, (uint8_t*)corner.w + i * corner.w_slice);
                corner.x = x + tile * TILE_NBYTES;
                if (few) {
                    multiply(corner, count);
                    continue;
                }
                for (int64_t b = 0; b < blocks; b += 2) {
                    const int64_t rest = tokens - b * TILE_TOKENS;
                    Corner of_blocks = corner;
                    of_blocks.x += b * x_block;
                    of_blocks.sums += b * TILE_NBYTES;
                    of_blocks.tokens = rest < 2 * TILE_TOKENS ? rest : 2 * TILE_TOKENS;
                    load_sums(of_blocks, at == 0);
                    multiply(of_blocks, count);
                    store_sums(of_blocks);
                }
            }
            if (few) store_sums(corner);
            if (segment + 1 < h.segments()) continue;
            for (int i = 0; i <= two; i++) finish(product, slice + i, s + i * sums_nbytes, token, tokens);
        }
    }
}

// Slices first to last of a product whose x is what arrange_tiles made, its stride the tiles of columns in it.
bool in_panels(const Product& product, int64_t first, int64_t last) {
    const Header& h = product.weight->h;
    const bool keep = product.tokens > PANEL_TOKENS;
    int64_t group = last - first;
    if (keep) {  // An even number of slices that fit.
        const int64_t fit = KEPT_NBYTES / (product.stride * TILE_NBYTES) / 2 * 2;
        group = fit < 2 ? 2 : fit < group ? fit : group;
    }
    const int64_t held = h.segments() == 1 ? 2 : group + 1;
    const int64_t blocks = ((keep ? PANEL_TOKENS : product.tokens) + 2 * TILE_TOKENS - 1) / (2 * TILE_TOKENS) * 2;
    const int64_t weights_nbytes =
        keep ? (group + 1) * product.stride * TILE_NBYTES : 2 * SEGMENT / TILE_COLUMNS * TILE_NBYTES;
    uint8_t* memory = (uint8_t*)__builtin_malloc((size_t)(weights_nbytes + held * blocks * TILE_NBYTES + 64));
    if (!memory) return false;
    uint8_t* weights = memory + (-(uintptr_t)memory & 63);
    const Scratch scratch{weights, weights + weights_nbytes, keep};
    for (int64_t slice = first; slice < last; slice += group)
        for (int64_t token = 0; token < product.tokens; token += PANEL_TOKENS)
            panel(product, slice, slice + group < last ? slice + group : last, token, scratch);
    __builtin_free(memory);
    return true;
}

}  // namespace

bool amx_bf16(const Product& product, int64_t first, int64_t last) {
    const TileConfig config(product.tokens < TILE_TOKENS ? (int)product.tokens : TILE_TOKENS);
    _tile_loadconfig(&config);
    const bool done = in_panels(product, first, last);
    _tile_release();
    return done;
}

}  // namespace elsa
#endif
