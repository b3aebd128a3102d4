// What runs where there is nothing better, and what the rest is tested against.
#include "kernels.h"
#include "plain.h"

namespace elsa {

bool portable(const Product& product, int64_t first, int64_t last) { return plain(product, first, last); }
bool unpack_portable(const Product& product, int64_t first, int64_t last) { return unpack_plain(product, first, last); }

}  // namespace elsa
