// x Wᵀ over packed weights: what a product is given, and the function for those who call it from C++.

#pragma once

#include <cstdint>

// Numbers that a weight is made of.
enum Kind : int64_t { BFLOAT16 = 0, INT8 = 1, INT4 = 2 };

struct Product {
    const uint16_t* x;  // [M, K]
    const void* weight;
    const uint16_t *bias, *added;  // bias [N] and added [M, N] may be missing
    uint16_t* out;                 // [M, N]; may be `added` itself
    int64_t rows, inputs, outputs;
    int64_t kind;            // a Kind
    const uint16_t* scales;  // bfloat16; see quantized.hpp
};

// Takes all of OpenMP's threads. A row's result does not depend on its neighbours.
void multiply_rows(const Product& product);
