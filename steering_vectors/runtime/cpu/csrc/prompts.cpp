// Attention of many new tokens a row in bfloat16, for processors with AVX512-BF16.
//
// Scores and weighted sums are products like those of the layers: keys are packed as a weight whose outputs are the
// columns, values as a weight whose inputs are the columns. The queries that share a key head are rows of one product. A
// tile of them covers columns up to the last that any of its queries sees. Softmax weights are rounded to bfloat16 before
// they are divided by their sum.

#ifdef __AVX512BF16__
#include "attention.hpp"
#include "tiles.hpp"

#include <algorithm>
#include <vector>

namespace {

using namespace tiles;

constexpr int64_t TILE = 64;  // queries whose scores stay in the processor's cache

inline int64_t whole_blocks(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// The number of columns up to the last one that the mask shows.
int64_t end_of(const uint8_t* seen, int64_t length) {
    uint64_t eight = 0;
    while (length >= 8 && (std::memcpy(&eight, seen + length - 8, 8), eight == 0)) length -= 8;
    while (length > 0 && !seen[length - 1]) length--;
    return length;
}

// Packs sixteen keys as a block of a weight, [size / 2][16][2]; zeros beyond `count`.
void pack_keys(const uint16_t* keys, int64_t size, int64_t count, uint16_t* to) {
    for (int64_t key = 0; key < LANES; key++)
        for (int64_t pair = 0; pair < size / 2; pair++) {
            uint32_t both = 0;
            if (key < count) std::memcpy(&both, keys + key * size + 2 * pair, 4);
            std::memcpy(to + (pair * LANES + key) * 2, &both, 4);
        }
}

// Packs sixteen values as inputs of a weight [size / 16][inputs / 2][16][2], from input `place` on.
void pack_values(const uint16_t* values, int64_t size, int64_t count, int64_t place, int64_t inputs, uint16_t* to) {
    for (int64_t pair = 0; pair < LANES / 2; pair++)
        for (int64_t block = 0; block < size / LANES; block++) {
            const uint16_t* from = values + 2 * pair * size + block * LANES;
            const __mmask16 even = 2 * pair < count ? 0xffff : 0, odd = 2 * pair + 1 < count ? 0xffff : 0;
            const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(even, from));
            const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd, from + size));
            const __m512i both = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
            _mm512_storeu_si512(to + ((block * inputs / 2) + place / 2 + pair) * 2 * LANES, both);
        }
}

struct Scratch {
    std::vector<uint16_t> keys, values;  // packed, for each row and group
    std::vector<int64_t> ends;           // for each row and query
    int64_t inputs;                      // columns, rounded up to whole blocks
};

// The queries `first` … `last` of one row and group; query q is head q % share of token q / share.
void attend_tile(const Attention& a, const Scratch& s, int64_t row, int64_t group, int64_t first, int64_t last) {
    const int64_t d = a.size, share = a.heads / a.groups, count = last - first, place = (row * a.groups + group);
    thread_local std::vector<uint16_t> rotated, weights;
    thread_local std::vector<float> scores;
    rotated.resize(TILE * d);
    weights.resize(TILE * s.inputs);
    scores.resize(TILE * s.inputs);
    int64_t end = 0;
    for (int64_t q = first; q < last; q++) {
        a.rotate_head(a.new_head<Bfloat16>(row, q / share, group * share + q % share), a.query_norm, row, q / share,
               (Bfloat16*)rotated.data() + (q - first) * d);
        end = std::max(end, s.ends[row * a.queries + q / share]);
    }
    end = whole_blocks(end);
    const Operands looking{rotated.data(), d, count, d, s.keys.data() + place * s.inputs * d};
    multiply(looking, 0, end / LANES, [&](__m512 sums, int64_t query, int64_t block) {
        _mm512_storeu_ps(scores.data() + query * s.inputs + block * LANES, sums);
    });
    float shares[TILE];
    for (int64_t q = 0; q < count; q++) {
        const uint8_t* seen = a.mask + (row * a.queries + (first + q) / share) * a.length;
        const float* mine = scores.data() + q * s.inputs;
        uint16_t* to = weights.data() + q * s.inputs;
        const auto keep = [to](__m512 found, int64_t place) {
            _mm256_storeu_si256((__m256i*)(to + place), rounded(found));
        };
        const float total = vectors::softmax_weights(mine, seen, std::min(end, a.length), a.scaling, keep);
        shares[q] = total > 0 ? 1.0f / total : 0.0f;
    }
    const Operands weighing{weights.data(), s.inputs, count, end, s.values.data() + place * s.inputs * d,
                            LANES * s.inputs};
    multiply(weighing, 0, d / LANES, [&](__m512 sums, int64_t query, int64_t block) {
        const int64_t q = first + query, head = (row * a.queries + q / share) * a.heads + group * share + q % share;
        const __m512 found = _mm512_mul_ps(sums, _mm512_set1_ps(shares[query]));
        _mm256_storeu_si256((__m256i*)((uint16_t*)a.out + head * d + block * LANES), rounded(found));
    });
}

}  // namespace

// For head sizes that fill whole blocks.
extern "C" void attend_prompts(const Attention* given) {
    const Attention& a = *given;
    thread_local Scratch kept;
    Scratch& s = kept;
    const int64_t d = a.size, share = a.heads / a.groups, pairs = a.rows * a.groups;
    s.inputs = whole_blocks(a.length);
    s.keys.resize(pairs * s.inputs * d);
    s.values.resize(pairs * s.inputs * d);
    s.ends.resize(a.rows * a.queries);
    const int64_t blocks = s.inputs / LANES, tiles = (a.queries * share + TILE - 1) / TILE;
#pragma omp parallel
    {
#pragma omp for
        for (int64_t pair = 0; pair < pairs; pair++)
            for (int64_t query = 0; query < a.queries; query++) a.keep<Bfloat16>(pair / a.groups, query, pair % a.groups);
#pragma omp for nowait
        for (int64_t token = 0; token < a.rows * a.queries; token++)
            s.ends[token] = end_of(a.mask + token * a.length, a.length);
#pragma omp for
        for (int64_t task = 0; task < pairs * blocks; task++) {
            const int64_t pair = task / blocks, block = task % blocks, first = block * LANES;
            const int64_t row = pair / a.groups, group = pair % a.groups, count = std::min(LANES, a.length - first);
            const auto* keys = (const uint16_t*)a.cache<Bfloat16>(a.keys, row, group) + first * d;
            const auto* values = (const uint16_t*)a.cache<Bfloat16>(a.cached, row, group) + first * d;
            pack_keys(keys, d, count, s.keys.data() + (pair * s.inputs + first) * d);
            pack_values(values, d, count, first, s.inputs, s.values.data() + pair * s.inputs * d);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < pairs * tiles; task++) {
            const int64_t pair = task / tiles, first = task % tiles * TILE;
            attend_tile(a, s, pair / a.groups, pair % a.groups, first, std::min(first + TILE, a.queries * share));
        }
    }
}
#endif
