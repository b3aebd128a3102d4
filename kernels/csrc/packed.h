// The packed weight as kernels see it. layout.py says the same in Python and describes each field.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace elsa {

enum Values : int64_t { BF16 = 1, FP16 = 2, FP32 = 3, INT8 = 4, INT4 = 5 };
enum Layout : int64_t { CSR = 1, BITMASK = 2, WINDOW = 3 };

constexpr int SLICE = 16;                      // rows, a lane each
constexpr int REACH = 64;                      // columns of x that a step of the window layout can read
constexpr int SEGMENT = 4096;                  // columns between places where a slice can be entered
constexpr int64_t MAGIC = 0x3157505341534c45;  // "ELSASPW1"
constexpr uint32_t NO_ROW = 0xffffffff;        // in `order`: a lane past the last row

struct Header {
    int64_t magic, rows, columns, kept, values, layout, group_size, scales, steps, value_nbytes, nbytes, unused[5];

    int64_t slices() const { return (rows + SLICE - 1) / SLICE; }
    // Columns that a mask of the bitmask layout has bits for: 32 bits for floating point, 64 for integers.
    int64_t mask_columns() const { return quantized() ? 4 : 2; }
    int64_t mask_nbytes() const { return layout == BITMASK && quantized() ? 8 : 4; }
    int64_t slice_masks() const { return (columns + mask_columns() - 1) / mask_columns(); }
    int64_t groups() const { return group_size ? (columns + group_size - 1) / group_size : 1; }
    int64_t segments() const { return (columns + SEGMENT - 1) / SEGMENT; }
    bool quantized() const { return values == INT8 || values == INT4; }
    int64_t next_boundary(int64_t column) const;
    int64_t blocks() const;
};
static_assert(sizeof(Header) == 128, "layout.py writes 128 bytes");

// Blocks of columns: from one multiple of group_size or SEGMENT to the next. A step lies in one block.
inline int64_t Header::next_boundary(int64_t column) const {
    int64_t next = (column / SEGMENT + 1) * SEGMENT;
    if (group_size) {
        int64_t group = (column / group_size + 1) * group_size;
        if (group < next) next = group;
    }
    return next < columns ? next : columns;
}
inline int64_t Header::blocks() const {
    if (!group_size) return segments();
    int64_t both = 0;  // boundaries that groups and segments share
    for (int64_t at = 0; at < columns; at += SEGMENT) both += at % group_size == 0;
    return segments() + groups() - both;
}

// The bit of a row's column in a mask. Of four columns the first two and the last two alternate: in the vector of bytes
// that a mask of integers expands to, each 16-bit element has one of either in its halves.
inline int mask_bit(bool quantized, int row, int column) {
    return quantized ? 4 * row + 2 * (column % 2) + column / 2 : 2 * row + column;
}
inline int column_of_bit(bool quantized, int bit) { return quantized ? 2 * (bit % 2) + bit / 2 % 2 : bit % 2; }

// Where the parts of a packed tensor are; which of them there are depends on the layout.
struct Packed {
    Header h;
    const uint8_t *offsets, *columns;                              // CSR
    const uint8_t *order, *value_offsets, *masks;                  // BITMASK and WINDOW
    const uint8_t *step_offsets, *kept_offsets, *bases, *indices;  // WINDOW
    const uint8_t *values, *scales;
};

template <class T>
inline T load(const uint8_t* from, int64_t index = 0) {
    T value;
    __builtin_memcpy(&value, from + index * (int64_t)sizeof(T), sizeof(T));
    return value;
}
template <class T>
inline void store(uint8_t* to, int64_t index, T value) {
    __builtin_memcpy(to + index * (int64_t)sizeof(T), &value, sizeof(T));
}

// Fills `packed` from a tensor of nbytes; nullptr, or what is wrong with its header. Reads nothing past the header.
const char* open_packed(const uint8_t* data, int64_t nbytes, Packed* packed);
// nullptr, or what is wrong with the parts. Afterwards kernels read nothing outside of the tensor and of x.
const char* check_parts(const Packed& packed);

// One call: y (tokens, rows) = x (tokens, stride columns) times the weight.
struct Product {
    const Packed* weight;
    const void* x;   // bf16 or fp32, see each kernel; at least max(64, columns rounded up to 4) readable a row
    int64_t stride;  // elements between rows of x
    int64_t tokens;
    void* y;        // (tokens, rows) of y_type
    Values y_type;  // BF16, FP16 or FP32
};

// Computes the slices (in CSR: the blocks of 16 rows) from first to last of a product; false if there is no memory.
typedef bool (*Kernel)(const Product&, int64_t first, int64_t last);

}  // namespace elsa
