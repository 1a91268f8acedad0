// A product over a weight in the order in which it is read: pointers to contiguous memory.

#pragma once

#include <cstdint>

struct Product {
    const uint16_t *x, *weight, *bias, *added;  // bias [N] and added [M, N] may be missing
    uint16_t* out;                              // may be `added` itself
    int64_t rows, inputs, outputs;
};

extern "C" void product(const Product* given);
