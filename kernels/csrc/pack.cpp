// Dense weights to the two layouts in slices. Twice over the same code: first counting, then storing.
#include "pack.h"

#include "numbers.h"

namespace elsa {

// The bits of an element, 0 for zero of either sign.
static inline uint32_t element(const PackJob& job, int64_t row, int64_t column) {
    const int64_t at = row * job.columns + column;
    const uint8_t* from = (const uint8_t*)job.stored;
    switch (job.values) {
        case BF16:
        case FP16: {
            const uint32_t bits = load<uint16_t>(from, at);
            return bits & 0x7fff ? bits : 0;
        }
        case FP32: {
            const uint32_t bits = load<uint32_t>(from, at);
            return bits & 0x7fffffff ? bits : 0;
        }
        default:
            return from[at];
    }
}

namespace {

// Where the next value goes, or would go.
struct Writer {
    int64_t type;
    uint8_t* values;  // nullptr while counting
    int64_t nbytes;
    int held;  // a first half of a byte waits for its second

    void put(uint32_t bits) {
        if (type == INT4) {
            const uint8_t code = (uint8_t)(((int)(int8_t)bits + 8) & 15);
            if (values) values[nbytes] = held ? (uint8_t)(values[nbytes] | code << 4) : code;
            nbytes += held;
            held ^= 1;
        } else if (type == INT8) {
            if (values) values[nbytes] = (uint8_t)bits;
            nbytes++;
        } else if (type == FP32) {
            if (values) store<uint32_t>(values + nbytes, 0, bits);
            nbytes += 4;
        } else {
            if (values) store<uint16_t>(values + nbytes, 0, (uint16_t)bits);
            nbytes += 2;
        }
    }
    void end_mask() {  // every mask's values start at a byte
        nbytes += held;
        held = 0;
    }
};

struct Slice {
    const PackJob& job;
    int64_t index;
    int64_t rows[SLICE];  // -1 past the last
    Writer writer;
    int64_t steps, kept;

    Slice(const PackJob& j, int64_t slice) : job(j), index(slice), writer{j.values, nullptr, 0, 0}, steps(0), kept(0) {
        for (int lane = 0; lane < SLICE; lane++) {
            const uint32_t row = j.order[slice * SLICE + lane];
            rows[lane] = row == NO_ROW ? (int64_t)-1 : (int64_t)row;
        }
        if (j.target) {
            writer.values = (uint8_t*)j.target->values;
            steps = j.counts[3 * slice];
            kept = j.counts[3 * slice + 1];
            writer.nbytes = j.counts[3 * slice + 2];
        }
    }
    void finish() const {
        if (job.target) return;
        job.counts[3 * index] = steps;
        job.counts[3 * index + 1] = kept;
        job.counts[3 * index + 2] = writer.nbytes;
    }
    void start_segment(int64_t column) const {
        const int64_t segment = index * job.header.segments() + column / SEGMENT;
        store<int64_t>((uint8_t*)job.target->value_offsets, segment, writer.nbytes);
        if (job.header.layout == WINDOW) {
            store<uint32_t>((uint8_t*)job.target->kept_offsets, segment, (uint32_t)kept);
        }
    }
};

void pack_bitmask(Slice& s) {
    const PackJob& job = s.job;
    const bool quantized = job.header.quantized();
    const int width = (int)job.header.mask_columns();
    for (int64_t first = 0; first < job.columns; first += width) {
        if (job.target && first % SEGMENT == 0) s.start_segment(first);
        uint64_t mask = 0;
        for (int bit = 0; bit < width * SLICE; bit++) {
            const int64_t row = s.rows[bit / width], column = first + column_of_bit(quantized, bit);
            if (row < 0 || column >= job.columns) continue;
            const uint32_t bits = element(job, row, column);
            if (!bits) continue;
            mask |= (uint64_t)1 << bit;
            s.kept++;
            s.writer.put(bits);
        }
        s.writer.end_mask();
        if (job.target && quantized)
            store<uint64_t>((uint8_t*)job.target->masks, s.steps, mask);
        else if (job.target)
            store<uint32_t>((uint8_t*)job.target->masks, s.steps, (uint32_t)mask);
        s.steps++;
    }
}

// Steps of one block of columns. The window starts at the leftmost weight that is not yet stored.
void pack_block(Slice& s, int64_t from, int64_t to, uint16_t* scratch) {
    const PackJob& job = s.job;
    int count[SLICE], done[SLICE];
    for (int lane = 0; lane < SLICE; lane++) {
        count[lane] = done[lane] = 0;
        if (s.rows[lane] < 0) continue;
        for (int64_t column = from; column < to; column++)
            if (element(job, s.rows[lane], column)) scratch[lane * SEGMENT + count[lane]++] = (uint16_t)(column - from);
    }
    const int64_t last_base = job.columns > REACH ? job.columns - REACH : 0;
    for (;;) {
        int64_t base = to;
        for (int lane = 0; lane < SLICE; lane++)
            if (done[lane] < count[lane] && from + scratch[lane * SEGMENT + done[lane]] < base)
                base = from + scratch[lane * SEGMENT + done[lane]];
        if (base == to) return;
        if (base > last_base) base = last_base;
        uint32_t mask = 0;
        for (int slot = 0; slot < 2 * SLICE; slot++) {
            const int lane = slot / 2;
            if (done[lane] == count[lane]) continue;
            const int64_t column = from + scratch[lane * SEGMENT + done[lane]];
            if (column >= base + REACH) continue;
            done[lane]++;
            mask |= 1u << slot;
            if (job.target) ((uint8_t*)job.target->indices)[s.kept] = (uint8_t)(column - base);
            s.kept++;
            s.writer.put(element(job, s.rows[lane], column));
        }
        s.writer.end_mask();
        if (job.target) {
            store<uint32_t>((uint8_t*)job.target->masks, s.steps, mask);
            store<uint16_t>((uint8_t*)job.target->bases, s.steps, (uint16_t)base);
        }
        s.steps++;
    }
}

void pack_window(Slice& s, uint16_t* scratch) {
    const PackJob& job = s.job;
    int64_t block = s.index * job.header.blocks();
    for (int64_t from = 0; from < job.columns; block++) {
        const int64_t to = job.header.next_boundary(from);
        if (job.target) {
            if (from % SEGMENT == 0) s.start_segment(from);
            store<uint32_t>((uint8_t*)job.target->step_offsets, block, (uint32_t)s.steps);
        }
        pack_block(s, from, to, scratch);
        from = to;
    }
}

}  // namespace

bool pack_slices(const PackJob& job, int64_t first, int64_t last) {
    uint16_t* scratch = nullptr;
    if (job.header.layout == WINDOW) {
        scratch = (uint16_t*)__builtin_malloc(sizeof(uint16_t) * SLICE * SEGMENT);
        if (!scratch) return false;
    }
    for (int64_t index = first; index < last; index++) {
        Slice slice(job, index);
        if (scratch)
            pack_window(slice, scratch);
        else
            pack_bitmask(slice);
        slice.finish();
    }
    __builtin_free(scratch);
    return true;
}

// The entries past the last slice, and the parts that are not counted.
void finish_pack(const PackJob& job, int64_t value_nbytes) {
    const Header& h = job.header;
    store<int64_t>((uint8_t*)job.target->value_offsets, h.slices() * h.segments(), value_nbytes);
    for (int64_t i = 0; i < h.slices() * SLICE; i++) store<uint32_t>((uint8_t*)job.target->order, i, job.order[i]);
    if (h.layout == BITMASK) return;
    store<uint32_t>((uint8_t*)job.target->step_offsets, h.slices() * h.blocks(), (uint32_t)h.steps);
    store<uint32_t>((uint8_t*)job.target->kept_offsets, h.slices() * h.segments(), (uint32_t)h.kept);
}

}  // namespace elsa
