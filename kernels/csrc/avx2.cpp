// The plain code with AVX2's and BMI's instructions: a gather of its vectors is slower than loads one by one.
#include "kernels.h"
#include "plain.h"

namespace elsa {

bool avx2(const Product& product, int64_t first, int64_t last) { return plain(product, first, last); }
bool unpack_avx2(const Product& product, int64_t first, int64_t last) { return unpack_plain(product, first, last); }

}  // namespace elsa
