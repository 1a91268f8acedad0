// Sixteen numbers at a time, for processors with AVX512-BF16: conversion from and to bfloat16, the exponential, softmax.

#pragma once

#include <cmath>
#include <cstdint>
#include <immintrin.h>

namespace vectors {

constexpr int64_t LANES = 16;

inline __m512 widened(__m256i values) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

inline __m256i rounded(__m512 values) { return (__m256i)_mm512_cvtneps_pbh(values); }

// A mask of the first `count` lanes, or of all if there are more.
inline __mmask16 lanes(int64_t count) { return __mmask16((1u << (count < LANES ? count : LANES)) - 1); }

// The exponential of sixteen numbers, as `exponential` of one.
inline __m512 exponential(__m512 x) {
    // if either operand is NaN, the result is the second
    x = _mm512_min_ps(_mm512_set1_ps(88.0f), _mm512_max_ps(_mm512_set1_ps(-87.0f), x));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

// Softmax weights of `count` scores that are not normalised: e^(scaling · score − maximum), 0 at masked places. Calls
// `store` with sixteen of them at a time and the place of the first. Returns their sum, 0 if all are masked.
template <typename Store>
float softmax_weights(const float* scores, const uint8_t* seen, int64_t count, float scaling, const Store& store) {
    const auto seen_at = [&](int64_t i) {
        const __mmask16 there = lanes(count - i);
        const __m128i bytes = _mm_maskz_loadu_epi8(there, seen + i);
        return _mm_test_epi8_mask(bytes, bytes);
    };
    const __m512 scale = _mm512_set1_ps(scaling);
    __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += LANES) {
        const __mmask16 present = seen_at(i);
        most = _mm512_mask_max_ps(most, present, most, _mm512_mul_ps(_mm512_maskz_loadu_ps(present, scores + i), scale));
    }
    const __m512 highest = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t i = 0; i < count; i += LANES) {
        const __mmask16 present = seen_at(i);
        const __m512 score = _mm512_mul_ps(_mm512_maskz_loadu_ps(present, scores + i), scale);
        const __m512 weight = _mm512_maskz_mov_ps(present, exponential(_mm512_sub_ps(score, highest)));
        total = _mm512_add_ps(total, weight);
        store(weight, i);
    }
    return _mm512_reduce_add_ps(total);
}

}  // namespace vectors
