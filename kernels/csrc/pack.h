#pragma once
#include "packed.h"

namespace elsa {

struct PackJob {
    const void* stored;  // (rows, columns) bf16, fp16, fp32 or int8
    int64_t values;
    int64_t rows, columns;
    Header header;          // its rows, columns, layout and group_size; kept and steps too once they are known
    const uint32_t* order;  // row of each lane
    int64_t* counts;        // (slices, 3): steps, kept, bytes of values; of each slice, then of those before it
    const Packed* target;   // nullptr while counting
};

// False if there is no memory.
bool pack_slices(const PackJob& job, int64_t first, int64_t last);
void finish_pack(const PackJob& job, int64_t value_nbytes);

}  // namespace elsa
