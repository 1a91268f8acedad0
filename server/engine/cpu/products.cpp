// x Wᵀ in bfloat16 for processors with AVX512-BF16, over weights in the order in which they are read.
//
// At few rows the time is that of reading the weights, at many that of the multiplications.

#include "products.hpp"

#include <algorithm>

#ifdef __AVX512BF16__
#include "tiles.hpp"

#include <omp.h>

using namespace tiles;

static inline __m512 part(const uint16_t* from, __mmask16 present) {
    return widened(_mm256_maskz_loadu_epi16(present, from));
}

extern "C" int has_products() { return 1; }

extern "C" void product(const Product* given) {
    const Product& p = *given;
    const auto store = [&p](__m512 sum, int64_t row, int64_t block) {
        const int64_t first = block * LANES, place = row * p.outputs + first;
        const __mmask16 present = __mmask16((1u << std::min(LANES, p.outputs - first)) - 1);
        if (p.bias != nullptr) sum = _mm512_add_ps(sum, part(p.bias + first, present));
        __m256i result = rounded(sum);
        if (p.added != nullptr) result = rounded(_mm512_add_ps(widened(result), part(p.added + place, present)));
        _mm256_mask_storeu_epi16(p.out + place, present, result);
    };
    const int64_t blocks = (p.outputs + LANES - 1) / LANES;
#pragma omp parallel
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const Operands operands{p.x, p.inputs, p.rows, p.inputs, p.weight};
        multiply(operands, blocks * thread / threads, blocks * (thread + 1) / threads, store);
    }
}

#else

extern "C" int has_products() { return 0; }

#endif
