// Placeholder to be specialised.
#include "kernels.h"
namespace elsa {
bool avx2(const Product& product, int64_t first, int64_t last) { return portable(product, first, last); }
}  // namespace elsa
