// The tiles of AMX in plain C++, for processors that have none: included before every file, it takes the place of the
// instructions in those that are compiled for AMX. See test_emulated_amx.py.
#if defined(__AMX_TILE__) && defined(__cplusplus)
#include <immintrin.h>
#include <string.h>

namespace emulated {

struct Tiles {
    unsigned char bytes[8][16][64], rows[8];
    unsigned short row_nbytes[8];
};
static thread_local Tiles tiles;

static inline void configure(const void* config) {
    const unsigned char* from = (const unsigned char*)config;
    memset(&tiles, 0, sizeof tiles);
    memcpy(tiles.row_nbytes, from + 16, sizeof tiles.row_nbytes);
    memcpy(tiles.rows, from + 48, sizeof tiles.rows);
}
static inline void zero(int tile) { memset(tiles.bytes[tile], 0, sizeof tiles.bytes[tile]); }
static inline void load(int tile, const void* from, long stride) {
    zero(tile);
    for (int row = 0; row < tiles.rows[tile]; row++)
        memcpy(tiles.bytes[tile][row], (const char*)from + row * stride, tiles.row_nbytes[tile]);
}
static inline void store(int tile, void* to, long stride) {
    for (int row = 0; row < tiles.rows[tile]; row++)
        memcpy((char*)to + row * stride, tiles.bytes[tile][row], tiles.row_nbytes[tile]);
}
static inline float bf16(const unsigned char* from) {
    unsigned short half;
    memcpy(&half, from, 2);
    const unsigned bits = (unsigned)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
// sums (rows, 16) fp32 += a (rows, 32) x b (16 pairs of its rows, 16, 2)
static inline void multiply(int sums, int a, int b) {
    for (int row = 0; row < tiles.rows[sums]; row++)
        for (int column = 0; column < 16; column++) {
            float sum;
            memcpy(&sum, &tiles.bytes[sums][row][4 * column], 4);
            for (int k = 0; k < 32; k++)
                sum += bf16(&tiles.bytes[a][row][2 * k]) * bf16(&tiles.bytes[b][k / 2][4 * column + 2 * (k % 2)]);
            memcpy(&tiles.bytes[sums][row][4 * column], &sum, 4);
        }
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_release
#define _tile_loadconfig(config) emulated::configure(config)
#define _tile_loadd(tile, from, stride) emulated::load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated::store(tile, to, stride)
#define _tile_zero(tile) emulated::zero(tile)
#define _tile_dpbf16ps(sums, a, b) emulated::multiply(sums, a, b)
#define _tile_release() (void)0
#endif
