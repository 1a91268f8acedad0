// As many float32 numbers at a time as a register holds: 8 with AVX2, 16 with AVX512.

#pragma once

#include <cstdint>
#include <cstring>
#include <immintrin.h>

namespace floats {

#ifdef __AVX512F__
constexpr int64_t WIDTH = 16;
#else
constexpr int64_t WIDTH = 8;
#endif

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Integers __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));

template <typename V> inline V loaded(const void* from) {
    V found;
    std::memcpy(&found, from, sizeof(V));
    return found;
}

inline void store(float* to, Floats values) { std::memcpy(to, &values, sizeof(Floats)); }

// a · b + c, rounded once.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#ifdef __AVX512F__
    return _mm512_fmadd_ps(a, b, c);
#else
    return _mm256_fmadd_ps(a, b, c);
#endif
}

inline Floats repeated(float value) {
#ifdef __AVX512F__
    return _mm512_set1_ps(value);
#else
    return _mm256_set1_ps(value);
#endif
}

// Numbers in half precision.
inline Floats from_half(const uint8_t* from) {
#ifdef __AVX512F__
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)from));
#else
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#endif
}

// Words below 2³¹ as numbers.
inline Floats from_words(Words values) { return __builtin_convertvector((Integers)values, Floats); }

}  // namespace floats
