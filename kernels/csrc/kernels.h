// The kernels of each instruction set. One that is not compiled for this processor is a null pointer.
#pragma once
#include "packed.h"

namespace elsa {

// x in fp32, every layout.
bool portable(const Product&, int64_t first, int64_t last);
bool unpack_portable(const Product&, int64_t first, int64_t last);

#if defined(__x86_64__) && defined(__GNUC__)
#define ELSA_X86 1
// x in fp32, every layout.
bool avx2(const Product&, int64_t first, int64_t last);
bool unpack_avx2(const Product&, int64_t first, int64_t last);
// x in fp32, BITMASK and WINDOW.
bool avx512_fp32(const Product&, int64_t first, int64_t last);
// x in bf16, BITMASK and WINDOW, values bf16, int8 or int4.
bool avx512_bf16(const Product&, int64_t first, int64_t last);
// The same; x in tiles, see tiles.h.
bool avx512_tiles(const Product&, int64_t first, int64_t last);
bool amx_bf16(const Product&, int64_t first, int64_t last);
int64_t tiles_nbytes(int64_t tokens, int64_t columns);
void arrange_tiles(const Product&, uint8_t* tiles, int64_t first, int64_t last);
#endif

}  // namespace elsa
