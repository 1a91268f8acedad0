// The small operations of a decoder block between its matrix products, each in one pass over its memory.
//
// For one new token a row. Numbers are float32 or bfloat16 and are rounded where the plain modelling code rounds them;
// sums are float32. Plain C++17 with OpenMP's pragmas, for any processor: the compiler vectorises the loops.
// Called through C's calling convention, with raw pointers to contiguous memory.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

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

// What is left of a value after it was stored.
template <typename T> inline float stored(float value) { return up(down<T>(value)); }

// e^x with a relative error of 2e-7: 2^n times a polynomial (Cephes' expf), in a form that vectorises.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;  // to the nearest whole number
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

constexpr int64_t SERIAL = 16384;  // elements; a parallel region costs as much as so many

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

template <typename T>
void norm(const T* x, const T* weight, T* out, int64_t rows, int64_t size, float epsilon) {
#pragma omp parallel for if (rows * size >= SERIAL)
    for (int64_t row = 0; row < rows; row++) norm_row(x + row * size, weight, out + row * size, size, epsilon);
}

// silu(gate) · up, of rows that hold both side by side.
template <typename T> void gated(const T* both, T* out, int64_t rows, int64_t size) {
#pragma omp parallel for if (rows * size >= SERIAL)
    for (int64_t row = 0; row < rows; row++) {
        const T* gate = both + row * 2 * size;
        const T* other = gate + size;
        T* to = out + row * size;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) {
            const float g = up(gate[i]);
            const float silu = g < -88.0f ? 0.0f : g / (1.0f + exponential(-g));
            to[i] = down<T>(stored<T>(silu) * up(other[i]));
        }
    }
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

// out[s][place] = query s · key place, of `share` queries of `size` numbers and `count` keys.
template <typename T>
void scores_of(const T* queries, const T* keys, int64_t share, int64_t size, int64_t count, float* out) {
    for (int64_t place = 0; place < count; place++)
        for (int64_t s = 0; s < share; s++) {
            const T *query = queries + s * size, *key = keys + place * size;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < size; i++) sum += up(query[i]) * up(key[i]);
            out[s * count + place] = sum;
        }
}

// sums[s] = Σ chances[s][place] · value place; a place that is not seen is not read.
template <typename T>
void weigh(const float* chances, const uint8_t* seen, const T* values, int64_t share, int64_t size, int64_t count,
           float* sums) {
    for (int64_t i = 0; i < share * size; i++) sums[i] = 0;
    for (int64_t place = 0; place < count; place++)
        for (int64_t s = 0; seen[place] && s < share; s++) {
            const float chance = chances[s * count + place];
            const T* value = values + place * size;
            float* to = sums + s * size;
#pragma omp simd
            for (int64_t i = 0; i < size; i++) to[i] += chance * up(value[i]);
        }
}

#ifdef __AVX512BF16__
// The sum of each of sixteen vectors, in their order.
inline __m512 sums_of(const __m512* v) {
    __m512 pairs[8], fours[4];
    for (int i = 0; i < 8; i++)
        pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
        fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    const auto lanes = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    return lanes(lanes(fours[0], fours[1]), lanes(fours[2], fours[3]));
}

// Sixteen keys at a time, for heads of whole vectors.
void scores_of(const Bfloat16* queries, const Bfloat16* keys, int64_t share, int64_t size, int64_t count, float* out) {
    if (size % 32 != 0) return scores_of<Bfloat16>(queries, keys, share, size, count, out);
    for (int64_t place = 0; place < count; place += 16) {
        const int64_t there = count - place < 16 ? count - place : 16;
        for (int64_t i = 0; i < 16 * size; i += 32) _mm_prefetch((const char*)(keys + (place + 32) * size + i), _MM_HINT_T0);
        for (int64_t s = 0; s < share; s++) {
            __m512 products[16];
            for (int j = 0; j < 16; j++) products[j] = _mm512_setzero_ps();
            for (int64_t i = 0; i < size; i += 32) {
                const __m512bh query = (__m512bh)_mm512_loadu_si512(queries + s * size + i);
                const Bfloat16* key = keys + place * size + i;
                if (there == 16) {
#pragma GCC unroll 16
                    for (int j = 0; j < 16; j++)
                        products[j] = _mm512_dpbf16_ps(products[j], query, (__m512bh)_mm512_loadu_si512(key + j * size));
                } else {
                    for (int j = 0; j < there; j++)
                        products[j] = _mm512_dpbf16_ps(products[j], query, (__m512bh)_mm512_loadu_si512(key + j * size));
                }
            }
            _mm512_mask_storeu_ps(out + s * count + place, __mmask16((1u << there) - 1), sums_of(products));
        }
    }
}

template <int SHARE>
void weigh_some(const float* chances, const uint8_t* seen, const Bfloat16* values, int64_t size, int64_t count,
                float* sums) {
    for (int64_t first = 0; first < size; first += 64) {
        __m512 totals[SHARE][4];
        for (auto& total : totals)
            for (auto& part : total) part = _mm512_setzero_ps();
        for (int64_t place = 0; place < count; place++) {
            _mm_prefetch((const char*)(values + (place + 24) * size + first), _MM_HINT_T0);
            _mm_prefetch((const char*)(values + (place + 24) * size + first + 32), _MM_HINT_T0);
            if (!seen[place]) continue;
            __m512 value[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const __m256i half = _mm256_loadu_si256((const __m256i*)(values + place * size + first + 16 * i));
                value[i] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
            }
#pragma GCC unroll 4
            for (int s = 0; s < SHARE; s++) {
                const __m512 chance = _mm512_set1_ps(chances[s * count + place]);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) totals[s][i] = _mm512_fmadd_ps(chance, value[i], totals[s][i]);
            }
        }
        for (int s = 0; s < SHARE; s++)
            for (int i = 0; i < 4; i++) _mm512_storeu_ps(sums + s * size + first + 16 * i, totals[s][i]);
    }
}

void weigh(const float* chances, const uint8_t* seen, const Bfloat16* values, int64_t share, int64_t size,
           int64_t count, float* sums) {
    if (size % 64 != 0) return weigh<Bfloat16>(chances, seen, values, share, size, count, sums);
    int64_t s = 0;
    for (; s + 4 <= share; s += 4) weigh_some<4>(chances + s * count, seen, values, size, count, sums + s * size);
    if (share - s == 3) weigh_some<3>(chances + s * count, seen, values, size, count, sums + s * size);
    if (share - s == 2) weigh_some<2>(chances + s * count, seen, values, size, count, sums + s * size);
    if (share - s == 1) weigh_some<1>(chances + s * count, seen, values, size, count, sums + s * size);
}
#endif

// Scores into chances, in place: the softmax of the places that are seen, 0 elsewhere.
inline void chances_of(float* scores, const uint8_t* seen, int64_t count, float scaling) {
    float highest = -INFINITY, total = 0;
#pragma omp simd reduction(max : highest)
    for (int64_t i = 0; i < count; i++) {
        scores[i] = seen[i] ? scores[i] * scaling : -INFINITY;
        highest = scores[i] > highest ? scores[i] : highest;
    }
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < count; i++) {
        scores[i] = seen[i] ? exponential(scores[i] - highest) : 0.0f;
        total += scores[i];
    }
    const float share = 1.0f / total;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) scores[i] *= share;
}

struct Attention {
    int64_t rows, heads, groups, size;  // query heads, key heads, numbers a head
    int64_t columns;                    // of the cache, a slot and head
    int64_t length;                     // columns that the mask covers
    float scaling, epsilon;             // epsilon of the norms of single heads
};

// The attention of one key head's queries for one row: its key and value go into the cache first.
template <typename T>
void attend_group(const Attention& a, int64_t row, int64_t group, const T* joined, const T* cos, const T* sin,
                  const T* query_weight, const T* key_weight, T* keys, T* values, int64_t slot, int64_t column,
                  const uint8_t* mask, T* out) {
    const int64_t d = a.size, share = a.heads / a.groups;
    const T* here = joined + row * (a.heads + 2 * a.groups) * d;
    T* k = keys + (slot * a.groups + group) * a.columns * d;
    T* v = values + (slot * a.groups + group) * a.columns * d;
    const T* turn_cos = cos + row * d;
    const T* turn_sin = sin + row * d;
    rotate(here + (a.heads + group) * d, key_weight, a.epsilon, turn_cos, turn_sin, k + column * d, d);
    std::memcpy(v + column * d, here + (a.heads + a.groups + group) * d, d * sizeof(T));

    const uint8_t* seen = mask + row * a.length;
    int64_t first = 0, end = a.length;
    while (end > 0 && !seen[end - 1]) end--;
    while (first < end && !seen[first]) first++;
    const int64_t span = end - first;

    thread_local std::vector<float> scratch;
    scratch.resize(share * (d + span));
    float* sums = scratch.data();
    float* chances = sums + share * d;
    thread_local std::vector<T> queries;
    queries.resize(share * d);
    for (int64_t s = 0; s < share; s++)
        rotate(here + (group * share + s) * d, query_weight, a.epsilon, turn_cos, turn_sin, queries.data() + s * d, d);
    scores_of(queries.data(), k + first * d, share, d, span, chances);
    for (int64_t s = 0; s < share; s++) chances_of(chances + s * span, seen + first, span, a.scaling);
    weigh(chances, seen + first, v + first * d, share, d, span, sums);
    T* result = out + (row * a.heads + group * share) * d;
    for (int64_t i = 0; i < share * d; i++) result[i] = down<T>(sums[i]);
}

template <typename T>
void attend(const Attention& a, const T* joined, const T* cos, const T* sin, const T* query_weight,
            const T* key_weight, T* keys, T* values, const int64_t* slots, const int64_t* columns,
            const uint8_t* mask, T* out) {
    const int64_t tasks = a.rows * a.groups;
#pragma omp parallel for schedule(dynamic, 1) if (tasks * a.length * a.size >= SERIAL)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t row = task / a.groups;
        attend_group(a, row, task % a.groups, joined, cos, sin, query_weight, key_weight, keys, values, slots[row],
                     columns[row], mask, out);
    }
}

}  // namespace

#define EXPORTED(T, SUFFIX)                                                                                       \
    extern "C" void norm_##SUFFIX(const void* x, const void* weight, void* out, int64_t rows, int64_t size,       \
                                  float epsilon) {                                                                \
        norm((const T*)x, (const T*)weight, (T*)out, rows, size, epsilon);                                        \
    }                                                                                                             \
    extern "C" void gated_##SUFFIX(const void* both, void* out, int64_t rows, int64_t size) {                     \
        gated((const T*)both, (T*)out, rows, size);                                                               \
    }                                                                                                             \
    extern "C" void attend_##SUFFIX(const Attention* a, const void* joined, const void* cos, const void* sin,     \
                                    const void* query_weight, const void* key_weight, void* keys, void* values,   \
                                    const int64_t* slots, const int64_t* columns, const uint8_t* mask,            \
                                    void* out) {                                                                  \
        attend(*a, (const T*)joined, (const T*)cos, (const T*)sin, (const T*)query_weight, (const T*)key_weight,  \
               (T*)keys, (T*)values, slots, columns, mask, (T*)out);                                              \
    }

EXPORTED(float, float32)
EXPORTED(Bfloat16, bfloat16)
