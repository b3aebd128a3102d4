// What Python calls, through ctypes: a plain C interface. A function that returns text returns null, or what is wrong.
#include "dispatch.h"
#include "kernels.h"
#include "numbers.h"
#include "pack.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace elsa {
namespace {

Level level = PORTABLE;

// The OpenMP runtime that the caller already uses, so that there is one pool of threads; without one, no threads.
struct OpenMP {
    void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags);
    int (*max_threads)();
} openmp = {nullptr, nullptr};

template <class Body>
struct Shared {
    Body& body;
    int64_t next, pieces;
    bool failed;
};

// body(piece) for each piece, on all threads; false if one of them returned false.
template <class Body>
bool in_parallel(int64_t pieces, Body body) {
    Shared<Body> shared{body, 0, pieces, false};
    auto work = [](void* data) {
        Shared<Body>& s = *(Shared<Body>*)data;
        for (int64_t piece; (piece = __atomic_fetch_add(&s.next, 1, __ATOMIC_RELAXED)) < s.pieces;)
            if (!s.body(piece)) __atomic_store_n(&s.failed, true, __ATOMIC_RELAXED);
    };
    if (openmp.parallel && pieces > 1)
        openmp.parallel(work, &shared, 0, 0);
    else
        work(&shared);
    return !shared.failed;
}

int64_t threads() { return openmp.max_threads ? openmp.max_threads() : 1; }

// Work that is done before slice: steps, masks or kept weights.
int64_t work_before(const Packed& p, int64_t slice) {
    const Header& h = p.h;
    if (h.layout == BITMASK) return slice;
    if (h.layout == WINDOW) return load<uint32_t>(p.step_offsets, slice * h.blocks());
    const int64_t row = slice * SLICE < h.rows ? slice * SLICE : h.rows;
    return load<uint32_t>(p.offsets, row);
}

// First slice of a piece, so that all have about the same work.
int64_t piece_start(const Packed& p, int64_t piece, int64_t pieces) {
    int64_t low = 0, high = p.h.slices();
    if (piece == pieces) return high;
    const int64_t wanted = (int64_t)((double)work_before(p, high) * (double)piece / (double)pieces);
    if (work_before(p, high) == 0) return high * piece / pieces;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (work_before(p, middle) < wanted)
            low = middle + 1;
        else
            high = middle;
    }
    return piece ? low : 0;
}

bool over_slices(const Product& product, Kernel kernel) {
    const Packed& p = *product.weight;
    // Four pieces a thread: one that is held up by something else on the machine leaves its share to others.
    int64_t pieces = threads() > 1 ? 4 * threads() : 1;
    if (pieces > p.h.slices()) pieces = p.h.slices();
    // Waking a second thread takes longer than this.
    if (p.h.kept * (product.tokens + 1) < 1 << 16) pieces = 1;
    return in_parallel(pieces, [&](int64_t piece) {
        const int64_t first = piece_start(p, piece, pieces), last = piece_start(p, piece + 1, pieces);
        return first >= last || kernel(product, first, last);
    });
}

// Rows of x that kernels may load whole vectors and pairs from: copied, and converted, only where they are not yet.
struct Input {
    const void* x;
    int64_t stride;
    uint8_t* memory = nullptr;

    bool prepare(const void* from, Values type, int64_t tokens, int64_t columns, XForm form) {
        const int64_t padded = columns < REACH ? REACH : (columns + 3) / 4 * 4;
        x = from;
        stride = columns;
        if (padded == columns && type == (form == ROWS_FP32 ? FP32 : BF16)) return true;
        const int64_t size = form == ROWS_FP32 ? 4 : 2;
        x = memory = (uint8_t*)__builtin_calloc((size_t)(tokens * padded), (size_t)size);
        if (!memory) return false;
        stride = padded;
        for (int64_t token = 0; token < tokens; token++) {
            uint8_t* to = memory + token * padded * size;
            const uint8_t* row = (const uint8_t*)from + token * columns * (type == FP32 ? 4 : 2);
            if (size == 2 || type == FP32)
                __builtin_memcpy(to, row, (size_t)(columns * size));
            else if (type == BF16)
                for (int64_t i = 0; i < columns; i++) store<float>(to, i, from_bf16(load<uint16_t>(row, i)));
            else
                for (int64_t i = 0; i < columns; i++) store<float>(to, i, from_fp16(load<uint16_t>(row, i)));
        }
        return true;
    }
    ~Input() { __builtin_free(memory); }
};

#if defined(ELSA_WITH_AVX512)
bool in_tiles(const Product& rows, Kernel kernel) {
    const int64_t columns = rows.weight->h.columns, blocks = (rows.tokens + 15) / 16;
    uint8_t* memory = (uint8_t*)__builtin_malloc((size_t)tiles_nbytes(rows.tokens, columns) + 64);
    if (!memory) return false;
    uint8_t* tiles = memory + (-(uintptr_t)memory & 63);
    in_parallel(blocks, [&](int64_t block) {
        arrange_tiles(rows, tiles, block, block + 1);
        return true;
    });
    Product product = rows;
    product.x = tiles;
    product.stride = (columns + 31) / 32;
    const bool done = over_slices(product, kernel);
    __builtin_free(memory);
    return done;
}
#else
bool in_tiles(const Product&, Kernel) { return false; }
#endif

const char* const NO_MEMORY = "there is no memory for it";
const char* const DENSE = "dense";

}  // namespace
}  // namespace elsa

using namespace elsa;

// Instruction sets up to `most` are used from now on; which that is.
EXPORT int elsa_set_level(int most) {
    level = best_level();
    if (most < (int)level) level = (Level)(most < 0 ? 0 : most);
    return level;
}

EXPORT void elsa_use_openmp(void* parallel, void* max_threads) {
    openmp.parallel = (decltype(openmp.parallel))parallel;
    openmp.max_threads = (decltype(openmp.max_threads))max_threads;
}

EXPORT const char* elsa_check(const uint8_t* data, int64_t nbytes) {
    Packed packed;
    const char* problem = open_packed(data, nbytes, &packed);
    return problem ? problem : check_parts(packed);
}

// y (tokens, rows) = x (tokens, columns) times the weight, both of x_type. "dense": nothing was done, and a dense
// product of the unpacked weight is faster.
EXPORT const char* elsa_linear(const uint8_t* data, int64_t nbytes, const void* x, int x_type, int64_t tokens,
                               int64_t columns, int64_t rows, void* y) {
    Packed packed;
    if (const char* problem = open_packed(data, nbytes, &packed)) return problem;
    if (packed.h.rows != rows || packed.h.columns != columns) return "it has other rows and columns than x and rows";
    if (tokens == 0) return nullptr;
    const Plan chosen = plan(level, packed.h, (Values)x_type, tokens);
    if (!chosen.kernel) return DENSE;
    Input input;
    if (chosen.form == TILES) {
        const Product product{&packed, x, columns, tokens, y, (Values)x_type};
        return in_tiles(product, chosen.kernel) ? nullptr : NO_MEMORY;
    }
    if (!input.prepare(x, (Values)x_type, tokens, columns, chosen.form)) return NO_MEMORY;
    const Product product{&packed, input.x, input.stride, tokens, y, (Values)x_type};
    return over_slices(product, chosen.kernel) ? nullptr : NO_MEMORY;
}

// The dense weight, (rows, columns) of a floating point type.
EXPORT const char* elsa_unpack(const uint8_t* data, int64_t nbytes, void* out, int type) {
    Packed packed;
    if (const char* problem = open_packed(data, nbytes, &packed)) return problem;
    const Product product{&packed, nullptr, 0, 0, out, (Values)type};
    over_slices(product, unpack_kernel(level));
    return nullptr;
}

// How many steps, kept weights and bytes of values each slice comes to: counts (slices, 3).
EXPORT const char* elsa_pack_count(const void* stored, int64_t values, int64_t rows, int64_t columns, int64_t layout,
                                   int64_t group_size, const uint32_t* order, int64_t* counts) {
    PackJob job{};
    job.stored = stored, job.values = values, job.rows = rows, job.columns = columns;
    job.header.rows = rows, job.header.columns = columns, job.header.layout = layout;
    job.header.group_size = group_size, job.header.values = values;
    job.order = order, job.counts = counts;
    return in_parallel(job.header.slices(), [&](int64_t slice) { return pack_slices(job, slice, slice + 1); })
               ? nullptr
               : NO_MEMORY;
}

// Fills the parts of a packed tensor whose header is there; counts (slices, 3) of all slices before each.
EXPORT const char* elsa_pack_store(const void* stored, const uint32_t* order, int64_t* counts, uint8_t* data,
                                   int64_t nbytes) {
    Packed packed;
    if (const char* problem = open_packed(data, nbytes, &packed)) return problem;
    const Header& h = packed.h;
    const PackJob job{stored, h.values, h.rows, h.columns, h, order, counts, &packed};
    if (!in_parallel(h.slices(), [&](int64_t slice) { return pack_slices(job, slice, slice + 1); })) return NO_MEMORY;
    finish_pack(job, h.value_nbytes);
    return nullptr;
}
