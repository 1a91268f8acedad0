// The norm and the gated unit of all rows, each in one pass over its memory; rounded where plain modelling code rounds.
//
// Called through C's calling convention, with raw pointers to contiguous memory.

#include "rows.hpp"

namespace {

template <typename T>
void norm(const T* x, const T* weight, T* out, int64_t rows, int64_t size, float epsilon) {
#pragma omp parallel for if (rows * size >= SERIAL)
    for (int64_t row = 0; row < rows; row++) norm_row(x + row * size, weight, out + row * size, size, epsilon);
}

// silu(gate) · up, of rows that hold both side by side.
template <typename T> void gated(const T* both, T* out, int64_t rows, int64_t size) {
#pragma omp parallel for if (rows * size >= SERIAL)
    for (int64_t row = 0; row < rows; row++) {
        const T* gate = both + row * 2 * size;
        const T* other = gate + size;
        T* to = out + row * size;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) {
            const float g = up(gate[i]);
            const float silu = g < -88.0f ? 0.0f : g / (1.0f + exponential(-g));
            to[i] = down<T>(stored<T>(silu) * up(other[i]));
        }
    }
}

}  // namespace

#define EXPORTED(T, SUFFIX)                                                                                      \
    extern "C" void norm_##SUFFIX(const void* x, const void* weight, void* out, int64_t rows, int64_t size,      \
                                  float epsilon) {                                                               \
        norm((const T*)x, (const T*)weight, (T*)out, rows, size, epsilon);                                       \
    }                                                                                                            \
    extern "C" void gated_##SUFFIX(const void* both, void* out, int64_t rows, int64_t size) {                    \
        gated((const T*)both, (T*)out, rows, size);                                                              \
    }

EXPORTED(float, float32)
EXPORTED(Bfloat16, bfloat16)
