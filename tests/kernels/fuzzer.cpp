// Changes packed tensors at random. Each must be refused by elsa_check, or be computed with without a wrong access:
// built with sanitizers, and every buffer has exactly the size that the interface promises.
// fuzzer FILE ROUNDS SEED: prints how many were refused and how many were computed with.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

extern "C" {
int elsa_set_level(int most);
const char* elsa_check(const uint8_t* data, int64_t nbytes);
const char* elsa_linear(const uint8_t* data, int64_t nbytes, const void* x, int x_type, int64_t tokens, int64_t columns,
                        int64_t rows, void* y);
const char* elsa_unpack(const uint8_t* data, int64_t nbytes, void* out, int type);
}

static uint64_t state;
static uint64_t random_below(uint64_t end) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (state >> 33) % end;
}

static void change(uint8_t* data, int64_t* nbytes) {
    const uint64_t kind = random_below(8);
    if (kind == 0) {
        *nbytes = (int64_t)random_below((uint64_t)*nbytes);
        return;
    }
    for (uint64_t i = 0; i <= random_below(4); i++) {
        // Half of the changes are in the header and in what follows it: the offsets that all else depends on.
        const uint64_t at = random_below(kind < 5 && *nbytes > 512 ? 512 : (uint64_t)*nbytes);
        data[at] = kind % 2 ? (uint8_t)random_below(256) : (uint8_t)(data[at] ^ 1 << random_below(8));
    }
}

static void compute(const uint8_t* data, int64_t nbytes, int64_t rows, int64_t columns) {
    const int64_t counts[] = {1, 3, 17, 40};
    for (int level = 0; level <= 3; level++) {
        if (elsa_set_level(level) != level) break;
        for (int type = 1; type <= 3; type++) {
            const int64_t size = type == 3 ? 4 : 2;
            for (int64_t tokens : counts) {
                uint8_t* x = (uint8_t*)calloc((size_t)(tokens * columns), (size_t)size);
                uint8_t* y = (uint8_t*)malloc((size_t)(tokens * rows * size));
                elsa_linear(data, nbytes, x, type, tokens, columns, rows, y);
                free(x);
                free(y);
            }
            uint8_t* dense = (uint8_t*)malloc((size_t)(rows * columns * size));
            elsa_unpack(data, nbytes, dense, type);
            free(dense);
        }
    }
}

int main(int, char** arguments) {
    FILE* file = fopen(arguments[1], "rb");
    if (!file) return 2;
    fseek(file, 0, SEEK_END);
    const int64_t whole = ftell(file);
    rewind(file);
    uint8_t* original = (uint8_t*)malloc((size_t)whole);
    if (fread(original, 1, (size_t)whole, file) != (size_t)whole) return 2;
    fclose(file);
    state = strtoull(arguments[3], nullptr, 10);
    long refused = 0, computed = 0;
    for (long round = atol(arguments[2]); round >= 0; round--) {
        int64_t nbytes = whole;
        uint8_t* changed = (uint8_t*)malloc((size_t)whole);
        memcpy(changed, original, (size_t)whole);
        if (round) change(changed, &nbytes);
        uint8_t* data = (uint8_t*)malloc((size_t)nbytes);
        memcpy(data, changed, (size_t)nbytes);
        free(changed);
        if (elsa_check(data, nbytes)) {
            refused++;
        } else {
            int64_t shape[2];
            memcpy(shape, data + 8, sizeof shape);
            compute(data, nbytes, shape[0], shape[1]);
            computed++;
        }
        free(data);
    }
    free(original);
    printf("%ld refused, %ld computed\n", refused, computed);
    return 0;
}
