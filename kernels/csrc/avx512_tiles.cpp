// Products of bf16 in tiles that AVX-512 multiplies, a lane a row, from a few tokens to many, where there is no AMX.
// While one piece of two slices is multiplied, which keeps the units for products busy, the next is unpacked mask by
// mask in between, which needs the others.
#include "kernels.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
#include "tiles.h"

namespace elsa {
namespace {

constexpr int64_t PANEL_TOKENS = 512;
// Tokens whose sums are in registers at once, times two slices.
constexpr int REGISTER_TOKENS = 8;
// Columns unpacked at a time, at most; and the most bytes of unpacked weights that are kept for the next panel.
constexpr int64_t PIECE = 256, KEPT_NBYTES = 4 << 20;

// How a weight's columns are cut.
struct Pieces {
    int64_t columns, count, nbytes;  // of a piece, all of them, and of two slices' unpacked piece

    Pieces(const Header& h, int64_t piece)
        : columns(piece), count((h.columns + piece - 1) / piece), nbytes(2 * piece / TILE_COLUMNS * TILE_NBYTES) {}
};

// The piece of two slices that is unpacked.
template <int64_t V, bool SCALED>
struct Unpacking {
    BitmaskUnpacking<V, SCALED> first, second;

    explicit Unpacking(const Packed& p) : first(p), second(p) {}
    void finish() { first.finish(), second.finish(); }
};

// Some tokens of a block times a piece of one or two slices.
struct Part {
    const uint8_t *x, *w;
    uint8_t* sums;
    int64_t w_slice, sums_slice;  // bytes from the first slice to the second
    int64_t tiles;
    int64_t apart;  // a power of 2, less 1: pairs of columns between the steps that are unpacked meanwhile
    __m512 scales[2];
};

// sums += TOKENS tokens x SLICES slices, times the scales.
template <int TOKENS, int SLICES, class Next>
void multiply_few(const Part& part, Next& shared) {
    const uint8_t *x = part.x, *w = part.w;
    const int64_t w_slice = part.w_slice, tiles = part.tiles, apart = part.apart;
    const Tables tables;
    // A copy, which the compiler knows that no store changes.
    Next next = shared;
    __m512 sums[SLICES][TOKENS];
    for (auto& of_slice : sums)
        for (__m512& sum : of_slice) sum = _mm512_setzero_ps();
    for (int64_t tile = 0; tile < tiles; tile++, x += TILE_NBYTES, w += TILE_NBYTES) {
#pragma GCC unroll 4
        for (int pair = 0; pair < TILE_COLUMNS / 2; pair++) {
            __m512bh weights[SLICES];
            for (int i = 0; i < SLICES; i++) weights[i] = (__m512bh)_mm512_load_si512(w + i * w_slice + 64 * pair);
            for (int t = 0; t < TOKENS; t++) {
                const __m512bh xs = (__m512bh)_mm512_set1_epi32(load<int>(x + 64 * t, pair));
                for (int i = 0; i < SLICES; i++) sums[i][t] = _mm512_dpbf16_ps(sums[i][t], weights[i], xs);
            }
            if (pair & apart) continue;
            next.first.step(tables);
            next.second.step(tables);
        }
    }
    shared = next;
    for (int i = 0; i < SLICES; i++) {
        for (int t = 0; t < TOKENS; t++) {
            float* total = (float*)(part.sums + i * part.sums_slice + 64 * t);
            _mm512_store_ps(total, _mm512_fmadd_ps(sums[i][t], part.scales[i], _mm512_load_ps(total)));
        }
    }
}

template <int SLICES, class Next>
void multiply_block(Part part, int64_t tokens, Next& next) {
    for (; tokens > 0; tokens -= REGISTER_TOKENS) {
        if (tokens > 6)
            multiply_few<8, SLICES>(part, next);
        else if (tokens > 4)
            multiply_few<6, SLICES>(part, next);
        else if (tokens > 2)
            multiply_few<4, SLICES>(part, next);
        else
            multiply_few<2, SLICES>(part, next);
        part.x += 64 * REGISTER_TOKENS;
        part.sums += 64 * REGISTER_TOKENS;
    }
}

// Slices from `start` to `stop`, unpacked for the first panel of tokens: into a place for each piece if they are kept
// for the others, into one of two in turn if not.
template <int64_t V, bool SCALED>
class Group {
public:
    Group(const Product& p, const Pieces& of, int64_t first, int64_t last, uint8_t* memory, int64_t count)
        : product(p), pieces(of), start(first), stop(last), weights(memory), places(count), next(*p.weight) {}

    void panel(int64_t token, int64_t tokens, uint8_t* sums, int64_t sums_slice) {
        const Packed& p = *product.weight;
        const int64_t total = (stop - start + 1) / 2 * pieces.count;
        const bool fresh = token == 0;
        // So far apart that the steps are spread over all the tokens.
        int64_t apart = BitmaskUnpacking<V, SCALED>::MASK_COLUMNS / 2;
        for (int64_t left = tokens / REGISTER_TOKENS; left > 1 && apart < TILE_COLUMNS / 2; left /= 2) apart *= 2;
        if (fresh) begin(0), next.finish();
        for (int64_t number = 0; number < total; number++) {
            if (fresh && number + 1 < total) begin(number + 1);
            const int64_t slice = slice_of(number), column = column_of(number);
            const bool two = slice + 1 < stop;
            if (column == 0) __builtin_memset(sums, 0, (size_t)(2 * sums_slice));
            const int64_t tile = column / TILE_COLUMNS, left = product.stride - tile,
                          most = pieces.columns / TILE_COLUMNS;
            const uint8_t* x = (const uint8_t*)product.x + (token / TILE_TOKENS * product.stride + tile) * TILE_NBYTES;
            Part part{x, place(number), sums, pieces.nbytes / 2, sums_slice, left < most ? left : most, apart - 1, {}};
            const bool scale = !SCALED && p.h.groups() > 1;
            for (int i = 0; i < 2; i++)
                part.scales[i] = scale ? scales_of(p, slice + i * two, column / p.h.group_size) : _mm512_set1_ps(1.0f);
            for (int64_t t = 0; t < tokens; t += TILE_TOKENS) {
                const int64_t now = tokens - t < TILE_TOKENS ? tokens - t : TILE_TOKENS;
                if (two)
                    multiply_block<2>(part, now, next);
                else
                    multiply_block<1>(part, now, next);
                part.x += product.stride * TILE_NBYTES;
                part.sums += TILE_NBYTES;
            }
            next.finish();
            if (number % pieces.count + 1 < pieces.count) continue;
            for (int i = 0; i <= two; i++) finish(product, slice + i, sums + i * sums_slice, token, tokens);
        }
    }

private:
    const Product& product;
    Pieces pieces;
    int64_t start, stop;
    uint8_t* weights;
    int64_t places;
    Unpacking<V, SCALED> next;

    int64_t slice_of(int64_t number) const { return start + number / pieces.count * 2; }
    int64_t column_of(int64_t number) const { return number % pieces.count * pieces.columns; }
    uint8_t* place(int64_t number) const { return weights + number % places * pieces.nbytes; }

    void begin(int64_t number) {
        const Packed& p = *product.weight;
        const int64_t slice = slice_of(number), from = column_of(number), left = p.h.columns - from;
        const int64_t columns = left < pieces.columns ? left : pieces.columns;
        auto values = [&](int64_t of) { return p.values + load<int64_t>(p.value_offsets, of * p.h.segments()); };
        if (from == 0) next.first.enter(slice, 0, values(slice));
        next.first.begin(columns, place(number));
        if (slice + 1 == stop) return;
        if (from == 0) next.second.enter(slice + 1, 0, values(slice + 1));
        next.second.begin(columns, place(number) + pieces.nbytes / 2);
    }
};

template <int64_t V, bool SCALED>
bool in_groups(const Product& product, int64_t first, int64_t last, int64_t piece) {
    const Pieces pieces(product.weight->h, piece);
    const bool keep = product.tokens > PANEL_TOKENS;
    int64_t group = last - first;
    if (keep) {  // An even number of slices that fit.
        const int64_t fit = KEPT_NBYTES / (pieces.count * pieces.nbytes) * 2;
        group = fit < 2 ? 2 : fit < group ? fit : group;
    }
    const int64_t places = keep ? (group + 1) / 2 * pieces.count : 2;
    const int64_t most = keep ? PANEL_TOKENS : product.tokens;
    const int64_t sums_slice = (most + TILE_TOKENS - 1) / TILE_TOKENS * TILE_NBYTES;
    uint8_t* memory = (uint8_t*)__builtin_malloc((size_t)(places * pieces.nbytes + 2 * sums_slice + 64));
    if (!memory) return false;
    uint8_t* const weights = memory + (-(uintptr_t)memory & 63);
    for (int64_t slice = first; slice < last; slice += group) {
        const int64_t stop = slice + group < last ? slice + group : last;
        Group<V, SCALED> of_slices(product, pieces, slice, stop, weights, places);
        for (int64_t token = 0; token < product.tokens; token += PANEL_TOKENS) {
            const int64_t left = product.tokens - token;
            of_slices.panel(token, left < PANEL_TOKENS ? left : PANEL_TOKENS, weights + places * pieces.nbytes,
                            sums_slice);
        }
    }
    __builtin_free(memory);
    return true;
}

// A scale of a piece multiplies its sums, which is exact and takes less than to multiply each weight; but pieces are
// not to become so small that sums are loaded and stored all the time.
template <int64_t V>
bool integers(const Product& product, int64_t first, int64_t last) {
    const Header& h = product.weight->h;
    for (int64_t piece = PIECE; piece >= PIECE / 2; piece /= 2)
        if (h.groups() == 1 || h.group_size % piece == 0) return in_groups<V, false>(product, first, last, piece);
    return in_groups<V, true>(product, first, last, PIECE);
}

}  // namespace

bool avx512_tiles(const Product& product, int64_t first, int64_t last) {
    switch (product.weight->h.values) {
        case BF16:
            return in_groups<BF16, false>(product, first, last, PIECE);
        case INT8:
            return integers<INT8>(product, first, last);
        default:
            return integers<INT4>(product, first, last);
    }
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
