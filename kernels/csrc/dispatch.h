// Which kernel computes what. The crossovers were measured: docs/kernels.md.
#pragma once
#include "packed.h"

namespace elsa {

enum Level { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AMX = 3 };
// What x is handed over as.
enum XForm { ROWS_FP32, ROWS_BF16, TILES };

struct Plan {
    Kernel kernel;  // nullptr: unpack the whole weight and leave the product to the caller's dense one
    XForm form;
};

// The best that this build has and this processor and its system can run.
Level best_level();
// y = the dense weight.
Kernel unpack_kernel(Level level);
Plan plan(Level level, const Header& weight, Values x_type, int64_t tokens);

}  // namespace elsa
