// x Wᵀ in bfloat16 for processors with AVX512-BF16, over weights in the order in which they are read.
//
// A weight [N, K] is packed as [N / 16][K / 2][16][2]: one vector holds two neighbouring inputs of sixteen outputs, which
// one instruction multiplies by a pair of x and adds up in float32. At few rows the time is that of reading the weights,
// at many that of the multiplications; the panel after the present one is fetched meanwhile.

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef __AVX512BF16__
#include <immintrin.h>
#include <omp.h>

namespace {

constexpr int64_t LANES = 16, PANEL = 8;  // outputs in a block; blocks that stay in the cache for all rows

struct Product {
    const uint16_t *x, *weight, *bias, *added;  // bias [N] and added [M, N] may be missing
    uint16_t* out;
    int64_t rows, inputs, outputs;
};

inline __m512 up(const uint16_t* from, __mmask16 present) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(present, from)), 16));
}

inline __m256i down(__m512 values) { return (__m256i)_mm512_cvtneps_pbh(values); }

inline void store(const Product& p, __m512 sum, int64_t row, int64_t block) {
    const int64_t first = block * LANES, place = row * p.outputs + first;
    const __mmask16 present = __mmask16((1u << std::min(LANES, p.outputs - first)) - 1);
    if (p.bias != nullptr) sum = _mm512_add_ps(sum, up(p.bias + first, present));
    __m256i result = down(sum);
    if (p.added != nullptr) {
        const __m512 rounded = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(result), 16));
        result = down(_mm512_add_ps(rounded, up(p.added + place, present)));
    }
    _mm256_mask_storeu_epi16(p.out + place, present, result);
}

template <int BLOCKS, int ROWS> inline void tile(const Product& p, int64_t row, int64_t block) {
    __m512 sums[BLOCKS][ROWS];
    for (int b = 0; b < BLOCKS; b++)
        for (int m = 0; m < ROWS; m++) sums[b][m] = _mm512_setzero_ps();
    const int64_t pairs = p.inputs / 2;
    const uint16_t* x = p.x + row * p.inputs;
    const uint16_t* weight = p.weight + block * LANES * p.inputs;
    for (int64_t k = 0; k < pairs; k++) {
        __m512bh vectors[BLOCKS];
#pragma GCC unroll 8
        for (int b = 0; b < BLOCKS; b++) {
            const uint16_t* from = weight + (b * pairs + k) * 2 * LANES;
            vectors[b] = (__m512bh)_mm512_loadu_si512(from);
            if (ROWS == 8) _mm_prefetch((const char*)(from + PANEL / 2 * LANES * p.inputs), _MM_HINT_T1);
        }
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; m++) {
            int32_t pair;
            std::memcpy(&pair, x + m * p.inputs + 2 * k, 4);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
            for (int b = 0; b < BLOCKS; b++) sums[b][m] = _mm512_dpbf16_ps(sums[b][m], vectors[b], both);
        }
    }
    for (int m = 0; m < ROWS; m++)
        for (int b = 0; b < BLOCKS; b++) store(p, sums[b][m], row + m, block + b);
}

template <int ROWS> void panel(const Product& p, int64_t& row, int64_t first, int64_t end) {
    constexpr int BLOCKS = ROWS == 1 ? 8 : ROWS == 8 ? 3 : 4;  // as many sums as there are registers
    for (; row + ROWS <= p.rows; row += ROWS) {
        int64_t block = first;
        for (; block + BLOCKS <= end; block += BLOCKS) tile<BLOCKS, ROWS>(p, row, block);
        for (; block < end; block++) tile<1, ROWS>(p, row, block);
    }
}

}  // namespace

extern "C" int has_products() { return 1; }

extern "C" void product(const Product* p) {
    const int64_t blocks = (p->outputs + LANES - 1) / LANES;
#pragma omp parallel
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const int64_t last = blocks * (thread + 1) / threads;
        for (int64_t first = blocks * thread / threads; first < last; first += PANEL) {
            const int64_t end = std::min(first + PANEL, last);
            int64_t row = 0;
            panel<8>(*p, row, first, end);
            panel<4>(*p, row, first, end);
            panel<2>(*p, row, first, end);
            panel<1>(*p, row, first, end);
        }
    }
}

#else

extern "C" int has_products() { return 0; }

#endif
