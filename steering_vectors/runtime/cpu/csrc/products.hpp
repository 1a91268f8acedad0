// x Wᵀ over packed weights: its arguments and its C++ function.

#pragma once

#include <cstdint>

// The number format of a weight.
enum Kind : int64_t { BFLOAT16 = 0, INT8 = 1, INT4 = 2 };

struct Product {
    const uint16_t* x;  // [M, K]
    const void* weight;
    const uint16_t *bias, *added;  // bias [N] and added [M, N], each may be null
    uint16_t* out;                 // [M, N]; may be `added` itself
    int64_t rows, inputs, outputs;
    int64_t kind;            // a Kind
    const uint16_t* scales;  // bfloat16; see quantized.hpp
};

// Uses all OpenMP threads. A row's result does not depend on other rows.
void multiply_rows(const Product& product);
