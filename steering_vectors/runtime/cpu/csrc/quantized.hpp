// Products over weights of 8 and 4 bits for processors with AVX512-BF16 and AVX512-VBMI.
//
// A code is an integer and exact in bfloat16, so the bfloat16 dot product instruction sums code · x in float32, and the
// sum is multiplied by the codes' scale: one for each output in 8 bits, one for each output and GROUP inputs in 4 bits.
// Sixteen outputs form a block here too, [N / 16][vectors][64 bytes]: a vector holds their codes of STEPS neighbouring
// pairs of inputs, and the last vector is padded with zeros. A row's sums do not depend on other rows.

#pragma once

#include "tiles.hpp"

#include <algorithm>

namespace tiles {

constexpr int64_t GROUP = 32;  // inputs

struct Codes {
    const uint16_t* x;  // rows of `inputs` numbers, an even number
    int64_t rows, inputs;
    const uint8_t* codes;
    const uint16_t* scales;  // [blocks, groups, 16]
};

inline uint16_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return uint16_t(bits >> 16);
}

// Codes from -127 to 127 as sign and magnitude. Byte 16 i + 8 t + j of a vector is number 8 i + j of pair t.
struct Int8 {
    static constexpr int64_t STEPS = 2;
    __m512i low[2], high[2];  // low and high bytes of 0 … 127 in bfloat16
    __m512i sign = _mm512_set1_epi8(-128);

    Int8() {
        uint8_t bytes[2][128];
        for (int i = 0; i < 128; i++) bytes[0][i] = uint8_t(bits_of(float(i))), bytes[1][i] = bits_of(float(i)) >> 8;
        for (int half = 0; half < 2; half++) {
            low[half] = _mm512_loadu_si512(bytes[0] + 64 * half);
            high[half] = _mm512_loadu_si512(bytes[1] + 64 * half);
        }
    }

    static int64_t pairs_of_scale(int64_t pairs) { return pairs; }

    inline void decode(const uint8_t* from, __m512i (&to)[STEPS]) const {
        const __m512i codes = _mm512_loadu_si512(from);
        const __m512i lows = _mm512_permutex2var_epi8(low[0], codes, low[1]);  // uses seven bits of a code
        const __m512i sizes = _mm512_permutex2var_epi8(high[0], codes, high[1]);
        const __m512i highs = _mm512_ternarylogic_epi32(sizes, codes, sign, 0xf8);  // sizes | (codes & sign)
        to[0] = _mm512_unpacklo_epi8(lows, highs);
        to[1] = _mm512_unpackhi_epi8(lows, highs);
    }
};

// Codes from -8 to 7 as nibbles. Nibble t of a vector's words is pair t.
struct Int4 {
    static constexpr int64_t STEPS = 4;
    __m512i table;  // the sixteen numbers, twice: the lookup uses five bits of a word, one of which belongs to the next nibble

    Int4() {
        uint16_t values[32];
        for (int i = 0; i < 32; i++) values[i] = bits_of(float(i % 16 < 8 ? i % 16 : i % 16 - 16));
        table = _mm512_loadu_si512(values);
    }

    static int64_t pairs_of_scale(int64_t) { return GROUP / 2; }

    inline void decode(const uint8_t* from, __m512i (&to)[STEPS]) const {
        const __m512i codes = _mm512_loadu_si512(from);
        to[0] = _mm512_permutexvar_epi16(codes, table);
        to[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table);
        to[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), table);
        to[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), table);
    }
};

template <int BLOCKS, int ROWS> using Sums = __m512[BLOCKS][ROWS];

template <int BLOCKS, int ROWS> inline void clear(Sums<BLOCKS, ROWS>& sums) {
    for (int b = 0; b < BLOCKS; b++)
        for (int m = 0; m < ROWS; m++) sums[b][m] = _mm512_setzero_ps();
}

// Adds the products of a vector's first `steps` pairs. Blocks are `block` bytes apart.
template <typename Format, int BLOCKS, int ROWS>
inline __attribute__((always_inline)) void add(
    const Format& format, const uint16_t* x, int64_t stride, const uint8_t* codes, int64_t block, int64_t steps,
    Sums<BLOCKS, ROWS>& sums
) {
    __m512i vectors[BLOCKS][Format::STEPS];
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; b++) {
        format.decode(codes + b * block, vectors[b]);
        _mm_prefetch((const char*)(codes + (b + AHEAD) * block), _MM_HINT_T1);
    }
#pragma GCC unroll 4
    for (int t = 0; t < Format::STEPS; t++) {
        if (t >= steps) return;
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; m++) {
            int32_t pair;
            std::memcpy(&pair, x + m * stride + 2 * t, 4);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int b = 0; b < BLOCKS; b++) sums[b][m] = _mm512_dpbf16_ps(sums[b][m], (__m512bh)vectors[b][t], both);
        }
    }
}

// Calls `store(sums, row, block)` with the sixteen sums of each row and block.
template <typename Format, int BLOCKS, int ROWS, typename Store>
inline void tile(const Format& format, const Codes& o, int64_t row, int64_t block, const Store& store) {
    constexpr int64_t STEPS = Format::STEPS;
    const int64_t pairs = o.inputs / 2, bytes = 64 * ((pairs + STEPS - 1) / STEPS);
    const int64_t shared = Format::pairs_of_scale(pairs), groups = (pairs + shared - 1) / shared;
    const uint16_t* x = o.x + row * o.inputs;
    const uint8_t* codes = o.codes + block * bytes;
    const uint16_t* scales = o.scales + block * groups * LANES;
    Sums<BLOCKS, ROWS> totals;
    clear<BLOCKS, ROWS>(totals);
    for (int64_t group = 0; group < groups; group++) {
        Sums<BLOCKS, ROWS> sums;
        clear<BLOCKS, ROWS>(sums);
        const int64_t last = std::min(pairs, (group + 1) * shared);
        int64_t pair = group * shared;
        for (; pair + STEPS <= last; pair += STEPS)
            add<Format, BLOCKS, ROWS>(format, x + 2 * pair, o.inputs, codes + pair / STEPS * 64, bytes, STEPS, sums);
        if (pair < last)
            add<Format, BLOCKS, ROWS>(
                format, x + 2 * pair, o.inputs, codes + pair / STEPS * 64, bytes, last - pair, sums);
        for (int b = 0; b < BLOCKS; b++) {
            const __m512 scale = widened(_mm256_loadu_si256((const __m256i*)(scales + (b * groups + group) * LANES)));
            for (int m = 0; m < ROWS; m++) totals[b][m] = _mm512_fmadd_ps(sums[b][m], scale, totals[b][m]);
        }
    }
    for (int m = 0; m < ROWS; m++)
        for (int b = 0; b < BLOCKS; b++) store(totals[b][m], row + m, block + b);
}

template <typename Format, int ROWS, typename Store>
void rows_of(const Format& format, const Codes& o, int64_t& row, int64_t first, int64_t end, const Store& store) {
    constexpr int BLOCKS = ROWS == 8 ? 2 : ROWS == 4 ? 3 : 4;  // as many as the registers hold sums for
    for (; row + ROWS <= o.rows; row += ROWS) {
        int64_t block = first;
        for (; block + BLOCKS <= end; block += BLOCKS) tile<Format, BLOCKS, ROWS>(format, o, row, block, store);
        for (; block < end; block++) tile<Format, 1, ROWS>(format, o, row, block, store);
    }
}

// Multiplies all rows by the blocks `first` … `last`.
template <typename Format, typename Store>
void multiply(const Codes& o, int64_t first, int64_t last, const Store& store) {
    constexpr int64_t CODED_PANEL = 12;  // a multiple of every BLOCKS above
    const Format format;
    for (; first < last; first += CODED_PANEL) {
        const int64_t end = std::min(last, first + CODED_PANEL);
        int64_t row = 0;
        rows_of<Format, 8>(format, o, row, first, end, store);
        rows_of<Format, 4>(format, o, row, first, end, store);
        rows_of<Format, 2>(format, o, row, first, end, store);
        rows_of<Format, 1>(format, o, row, first, end, store);
    }
}

}  // namespace tiles
