// Attention of one new token a row over the keys that the row's mask shows.

#include "attention.hpp"

#include <vector>

#ifdef __AVX512BF16__
#include "vectors.hpp"
#endif

namespace {

// out[s][place] = query s · key place, for `share` queries of `size` numbers and `count` keys.
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

// sums[s] = Σ weights[s][place] · value place. Values at masked places are not read.
template <typename T>
void weigh(const float* weights, const uint8_t* seen, const T* values, int64_t share, int64_t size, int64_t count,
           float* sums) {
    for (int64_t i = 0; i < share * size; i++) sums[i] = 0;
    for (int64_t place = 0; place < count; place++)
        for (int64_t s = 0; seen[place] && s < share; s++) {
            const float weight = weights[s * count + place];
            const T* value = values + place * size;
            float* to = sums + s * size;
#pragma omp simd
            for (int64_t i = 0; i < size; i++) to[i] += weight * up(value[i]);
        }
}

#ifdef __AVX512BF16__
// The sums of sixteen vectors, in order.
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

// The same, sixteen keys at a time, for head sizes that fill whole vectors.
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
void weigh_some(const float* weights, const uint8_t* seen, const Bfloat16* values, int64_t size, int64_t count,
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
                value[i] = vectors::widened(half);
            }
#pragma GCC unroll 4
            for (int s = 0; s < SHARE; s++) {
                const __m512 weight = _mm512_set1_ps(weights[s * count + place]);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) totals[s][i] = _mm512_fmadd_ps(weight, value[i], totals[s][i]);
            }
        }
        for (int s = 0; s < SHARE; s++)
            for (int i = 0; i < 4; i++) _mm512_storeu_ps(sums + s * size + first + 16 * i, totals[s][i]);
    }
}

void weigh(const float* weights, const uint8_t* seen, const Bfloat16* values, int64_t share, int64_t size,
           int64_t count, float* sums) {
    if (size % 64 != 0) return weigh<Bfloat16>(weights, seen, values, share, size, count, sums);
    int64_t s = 0;
    for (; s + 4 <= share; s += 4) weigh_some<4>(weights + s * count, seen, values, size, count, sums + s * size);
    if (share - s == 3) weigh_some<3>(weights + s * count, seen, values, size, count, sums + s * size);
    if (share - s == 2) weigh_some<2>(weights + s * count, seen, values, size, count, sums + s * size);
    if (share - s == 1) weigh_some<1>(weights + s * count, seen, values, size, count, sums + s * size);
}
#endif

// Turns scores into softmax weights that are not normalised, in place: e^(scaling · score − maximum), 0 at masked
// places. Returns their sum.
inline float weights_of(float* scores, const uint8_t* seen, int64_t count, float scaling) {
#ifdef __AVX512BF16__
    return vectors::softmax_weights(scores, seen, count, scaling, [scores, count](__m512 found, int64_t place) {
        _mm512_mask_storeu_ps(scores + place, vectors::lanes(count - place), found);
    });
#else
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
    return total;
#endif
}

// One row's queries that share one key head.
template <typename T> void attend_group(const Attention& a, int64_t row, int64_t group) {
    const int64_t d = a.size, share = a.heads / a.groups;
    a.keep<T>(row, 0, group);
    const T* keys = a.cache<T>(a.keys, row, group);
    const T* values = a.cache<T>(a.cached, row, group);

    const uint8_t* seen = a.mask + row * a.length;
    int64_t first = 0, end = a.length;
    while (end > 0 && !seen[end - 1]) end--;
    while (first < end && !seen[first]) first++;
    const int64_t span = end - first;

    thread_local std::vector<float> scratch;
    scratch.resize(share * (d + span + 1));
    float* sums = scratch.data();
    float* weights = sums + share * d;
    thread_local std::vector<T> queries;
    queries.resize(share * d);
    for (int64_t s = 0; s < share; s++)
        a.rotate_head(a.new_head<T>(row, 0, group * share + s), a.query_norm, row, 0, queries.data() + s * d);
    scores_of(queries.data(), keys + first * d, share, d, span, weights);
    float* totals = sums + share * (d + span);
    for (int64_t s = 0; s < share; s++) totals[s] = weights_of(weights + s * span, seen + first, span, a.scaling);
    weigh(weights, seen + first, values + first * d, share, d, span, sums);
    T* result = (T*)a.out + (row * a.heads + group * share) * d;
    for (int64_t s = 0; s < share; s++) {
        const float part = 1.0f / totals[s];
        for (int64_t i = s * d; i < (s + 1) * d; i++) result[i] = down<T>(sums[i] * part);
    }
}

template <typename T> void attend(const Attention& a) {
    const int64_t tasks = a.rows * a.groups;
#pragma omp parallel for schedule(dynamic, 1) if (tasks * a.length * a.size >= SERIAL)
    for (int64_t task = 0; task < tasks; task++) attend_group<T>(a, task / a.groups, task % a.groups);
}

}  // namespace

extern "C" void attend_float32(const Attention* a) { attend<float>(*a); }
extern "C" void attend_bfloat16(const Attention* a) { attend<Bfloat16>(*a); }
