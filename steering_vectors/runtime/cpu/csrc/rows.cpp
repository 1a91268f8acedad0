// RMS norm and gated SiLU over all rows, each in one pass over memory. They round where the modelling code rounds.
//
// The exported functions take raw pointers to contiguous memory.

#include "rows.hpp"

#ifdef __AVX512BF16__
#include "vectors.hpp"
#endif

namespace {

template <typename T>
void norm(const T* x, const T* weight, T* out, int64_t rows, int64_t size, float epsilon) {
#pragma omp parallel for if (rows * size >= SERIAL)
    for (int64_t row = 0; row < rows; row++) norm_row(x + row * size, weight, out + row * size, size, epsilon);
}

// silu(gate) · other.
template <typename T> void gate_row(const T* gate, const T* other, T* to, int64_t size) {
#pragma omp simd
    for (int64_t i = 0; i < size; i++) {
        const float g = up(gate[i]);
        const float silu = g < -88.0f ? 0.0f : g / (1.0f + exponential(-g));
        to[i] = down<T>(stored<T>(silu) * up(other[i]));
    }
}

#ifdef __AVX512BF16__
void gate_row(const Bfloat16* gate, const Bfloat16* other, Bfloat16* to, int64_t size) {
    using namespace vectors;
    const __m512 one = _mm512_set1_ps(1.0f);
    for (int64_t i = 0; i < size; i += LANES) {
        const __mmask16 there = lanes(size - i);
        const __m512 g = widened(_mm256_maskz_loadu_epi16(there, gate + i));
        const __mmask16 counts = _mm512_cmp_ps_mask(g, _mm512_set1_ps(-88.0f), _CMP_NLT_UQ);
        const __m512 below = _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), g)));
        const __m512 silu = _mm512_maskz_div_ps(counts, g, below);
        const __m512 product = _mm512_mul_ps(widened(rounded(silu)), widened(_mm256_maskz_loadu_epi16(there, other + i)));
        _mm256_mask_storeu_epi16(to + i, there, rounded(product));
    }
}
#endif

// The same for rows that hold both halves side by side.
template <typename T> void gated(const T* both, T* out, int64_t rows, int64_t size) {
#pragma omp parallel for if (rows * size >= SERIAL)
    for (int64_t row = 0; row < rows; row++) {
        const T* gate = both + row * 2 * size;
        gate_row(gate, gate + size, out + row * size, size);
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
