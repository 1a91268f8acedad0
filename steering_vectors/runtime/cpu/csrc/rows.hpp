// What is done to a row of numbers: its norm, and the turn of a head by its position.

#pragma once

#include "numbers.hpp"

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

// A head turned by its position: x · cos + rotate_half(x) · sin (RoFormer, arXiv:2104.09864), after a norm if asked.
template <typename T>
void rotate(const T* x, const T* weight, float epsilon, const T* cos, const T* sin, T* out, int64_t size) {
    T normed[512];
    if (weight != nullptr) {
        norm_row(x, weight, normed, size, epsilon);
        x = normed;
    }
    T turned[512];
    const int64_t half = size / 2;
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        const float a = up(x[i]), b = up(x[i + half]);
        turned[i] = down<T>(stored<T>(a * up(cos[i])) + stored<T>(-b * up(sin[i])));
        turned[i + half] = down<T>(stored<T>(b * up(cos[i + half])) + stored<T>(a * up(sin[i + half])));
    }
    std::memcpy(out, turned, size * sizeof(T));
}
