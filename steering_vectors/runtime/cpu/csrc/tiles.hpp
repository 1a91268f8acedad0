// The inner loop of bfloat16 products for processors with AVX512-BF16.
//
// A weight [N, K] is packed as [N / 16][K / 2][16][2]: one vector holds two neighbouring inputs of sixteen outputs, and
// one instruction multiplies them by a pair of x and sums in float32. A row's sums do not depend on other rows.

#pragma once

#include "vectors.hpp"

#include <cstring>

namespace tiles {

using namespace vectors;  // a block has LANES outputs

constexpr int64_t PANEL = 9;  // blocks that stay in the processor's cache for all rows
constexpr int64_t AHEAD = 4;  // blocks that are prefetched ahead

struct Operands {
    const uint16_t* x;  // rows of `stride` numbers, of which the first `inputs` are used, an even number
    int64_t stride, rows, inputs;
    const uint16_t* weight;
    int64_t block = LANES * inputs;  // numbers from one block of outputs to the next
};

// Calls `store(sums, row, block)` with the sixteen sums of each row and block.
template <int BLOCKS, int ROWS, typename Store>
inline void tile(const Operands& o, int64_t row, int64_t block, const Store& store) {
    __m512 sums[BLOCKS][ROWS];
    for (int b = 0; b < BLOCKS; b++)
        for (int m = 0; m < ROWS; m++) sums[b][m] = _mm512_setzero_ps();
    const int64_t pairs = o.inputs / 2;
    const uint16_t* x = o.x + row * o.stride;
    const uint16_t* weight = o.weight + block * o.block;
    for (int64_t k = 0; k < pairs; k++) {
        __m512bh vectors[BLOCKS];
#pragma GCC unroll 9
        for (int b = 0; b < BLOCKS; b++) {
            const uint16_t* from = weight + b * o.block + k * 2 * LANES;
            vectors[b] = (__m512bh)_mm512_loadu_si512(from);
            // prefetch the next panel
            if (ROWS == 8) _mm_prefetch((const char*)(from + AHEAD * o.block), _MM_HINT_T1);
        }
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; m++) {
            int32_t pair;
            std::memcpy(&pair, x + m * o.stride + 2 * k, 4);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 9
            for (int b = 0; b < BLOCKS; b++) sums[b][m] = _mm512_dpbf16_ps(sums[b][m], vectors[b], both);
        }
    }
    for (int m = 0; m < ROWS; m++)
        for (int b = 0; b < BLOCKS; b++) store(sums[b][m], row + m, block + b);
}

template <int ROWS, typename Store>
void rows_of(const Operands& o, int64_t& row, int64_t first, int64_t end, const Store& store) {
    constexpr int BLOCKS = ROWS <= 2 ? 9 : 3;  // of a panel, as many as the registers hold sums for
    for (; row + ROWS <= o.rows; row += ROWS) {
        int64_t block = first;
        for (; block + BLOCKS <= end; block += BLOCKS) tile<BLOCKS, ROWS>(o, row, block, store);
        for (; block < end; block++) tile<1, ROWS>(o, row, block, store);
    }
}

// Multiplies all rows by the blocks `first` … `last`.
template <typename Store> void multiply(const Operands& o, int64_t first, int64_t last, const Store& store) {
    for (; first < last; first += PANEL) {
        const int64_t end = first + PANEL < last ? first + PANEL : last;
        int64_t row = 0;
        rows_of<8>(o, row, first, end, store);
        rows_of<4>(o, row, first, end, store);
        rows_of<2>(o, row, first, end, store);
        rows_of<1>(o, row, first, end, store);
    }
}

}  // namespace tiles
