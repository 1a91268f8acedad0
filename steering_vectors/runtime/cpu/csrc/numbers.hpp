// float32 and bfloat16: conversion, rounding, and an exponential that vectorises.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct Bfloat16 {
    uint16_t bits;
};

inline float up(float value) { return value; }
inline float up(Bfloat16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

template <typename T> T down(float value);
template <> inline float down<float>(float value) { return value; }
template <> inline Bfloat16 down<Bfloat16>(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to the nearest, ties to even
    return {uint16_t(value == value ? rounded : 0x7fc0)};
}

// A value rounded to T and read back.
template <typename T> inline float stored(float value) { return up(down<T>(value)); }

// e^x with a relative error of 2e-7: 2^n times a polynomial (Cephes' expf), in a form that vectorises.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;  // to the nearest integer
    const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const float value = p * r * r + r + 1.0f;
    const int32_t scale = (int32_t(n) + 127) << 23;
    float power;
    std::memcpy(&power, &scale, 4);
    return value * power;
}

constexpr int64_t SERIAL = 16384;  // elements; fewer are not worth a parallel region
