// Functions of one row of numbers: RMS norm, and the rotary embedding of a head.

#pragma once

#include "numbers.hpp"

constexpr int64_t MAX_HEAD_SIZE = 512;

// Root mean square normalisation (arXiv:1910.07467).
template <typename T>
void norm_row(const T* x, const T* weight, T* out, int64_t size, float epsilon) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < size; i++) squares += up(x[i]) * up(x[i]);
    const float scale = 1.0f / std::sqrt(squares / float(size) + epsilon);
#pragma omp simd
    for (int64_t i = 0; i < size; i++) out[i] = down<T>(up(weight[i]) * stored<T>(up(x[i]) * scale));
}

// Rotary embedding of a head, x · cos + rotate_half(x) · sin (RoFormer, arXiv:2104.09864), after a norm if `weight` is
// not null.
template <typename T>
void rotate(const T* x, const T* weight, float epsilon, const T* cos, const T* sin, T* out, int64_t size) {
    T normed[MAX_HEAD_SIZE];
    if (weight != nullptr) {
        norm_row(x, weight, normed, size, epsilon);
        x = normed;
    }
    T rotated[MAX_HEAD_SIZE];
    const int64_t half = size / 2;
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        const float a = up(x[i]), b = up(x[i + half]);
        rotated[i] = down<T>(stored<T>(a * up(cos[i])) + stored<T>(-b * up(sin[i])));
        rotated[i + half] = down<T>(stored<T>(b * up(cos[i + half])) + stored<T>(a * up(sin[i + half])));
    }
    std::memcpy(out, rotated, size * sizeof(T));
}
