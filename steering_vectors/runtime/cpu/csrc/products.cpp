// x Wᵀ over packed weights for processors with AVX512-BF16.
//
// With few rows it is bound by reading the weights, with many by the multiplications.

#include "products.hpp"

#ifdef __AVX512BF16__
#include "quantized.hpp"
#include "tiles.hpp"

#include <omp.h>

using namespace tiles;

static inline __m512 part(const uint16_t* from, __mmask16 present) {
    return widened(_mm256_maskz_loadu_epi16(present, from));
}

void multiply_rows(const Product& p) {
    const auto store = [&p](__m512 sum, int64_t row, int64_t block) {
        const int64_t first = block * LANES, place = row * p.outputs + first;
        const __mmask16 present = lanes(p.outputs - first);
        if (p.bias != nullptr) sum = _mm512_add_ps(sum, part(p.bias + first, present));
        __m256i result = rounded(sum);
        if (p.added != nullptr) result = rounded(_mm512_add_ps(widened(result), part(p.added + place, present)));
        _mm256_mask_storeu_epi16(p.out + place, present, result);
    };
    const int64_t blocks = (p.outputs + LANES - 1) / LANES;
#pragma omp parallel
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const int64_t first = blocks * thread / threads, last = blocks * (thread + 1) / threads;
        if (p.kind == BFLOAT16) {
            multiply(Operands{p.x, p.inputs, p.rows, p.inputs, (const uint16_t*)p.weight}, first, last, store);
        } else {
            const Codes codes{p.x, p.rows, p.inputs, (const uint8_t*)p.weight, p.scales};
            p.kind == INT8 ? multiply<Int8>(codes, first, last, store) : multiply<Int4>(codes, first, last, store);
        }
    }
}

extern "C" int has_products() { return 1; }

extern "C" void product(const Product* given) { multiply_rows(*given); }

#else

extern "C" int has_products() { return 0; }

#endif
