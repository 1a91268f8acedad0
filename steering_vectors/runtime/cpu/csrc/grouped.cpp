// x Wᵀ in float32, over plain weights or over those in the codes of a GGUF file: w = scale · code + least.
//
// GROUP inputs of an output share a scale and a least weight, both in half precision as in the file; without a least
// weight the code of zero is in the middle, least = −scale · 2^(bits − 1). A weight [N, K] is packed as [N / 16][K / 32]
// [group], and a group of sixteen outputs holds 16 scales, 16 least weights if there are any, and its codes as 32-bit
// words [BITS][16]: bit field t of word i is input i · 32 / BITS + t. Plain weights are packed as [N / 16][K][16].
//
// One rounding gives the very weight in float32 that the file represents, and a sum adds its inputs in order, however
// many rows there are. With few rows weights are expanded in registers; with more, sixteen outputs by CHUNK inputs are
// expanded into the first-level cache and multiplied by all rows.

#include "floats.hpp"

#include <algorithm>
#include <omp.h>
#include <type_traits>

namespace {

using namespace floats;

constexpr int64_t LANES = 16;   // outputs of a block; the last block is padded with zeros
constexpr int64_t GROUP = 32;   // inputs
constexpr int64_t CHUNK = 256;  // inputs expanded at a time, whole groups
constexpr int64_t AHEAD = 24;   // inputs whose weights are fetched before they are needed
constexpr int64_t SLAB = 240;   // rows whose sums are kept at a time
constexpr int PARTS = LANES / WIDTH;
constexpr int TILE = PARTS == 1 ? 12 : 6;  // rows whose sums the registers hold beside a block's weights

}  // namespace

enum CodeKind : int64_t { BYTES = 0, NIBBLES = 1, NIBBLES_LEAST = 2, FLOATS = 3 };

struct GroupedProduct {
    const float* x;  // [M, K]
    const uint8_t* weight;
    const float *bias, *added;  // bias [N] and added [M, N], each may be null
    float* out;                 // [M, N]; may be `added` itself
    int64_t rows, inputs, outputs;
    int64_t kind;  // a CodeKind
};

namespace {

template <int BITS_, bool LEAST_> struct Format {
    static constexpr int BITS = BITS_, FIELDS = 32 / BITS;
    static constexpr int64_t CODES = LANES * 2 * (1 + LEAST_);        // bytes before a group's codes
    static constexpr int64_t BYTES = CODES + LANES * GROUP * BITS / 8;  // of a group

    // Calls `use(input, weights)` for each input of a group, with the weights of BLOCKS · 16 outputs.
    template <int BLOCKS, typename Use>
    static inline __attribute__((always_inline)) void expand(const uint8_t* group, int64_t block, const Use& use) {
        constexpr int VECTORS = BLOCKS * PARTS;
        Floats scales[VECTORS], least[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            const uint8_t* from = group + v / PARTS * block + v % PARTS * WIDTH * 2;
            scales[v] = from_half(from);
            least[v] = LEAST_ ? from_half(from + LANES * 2) : scales[v] * repeated(-float(1 << (BITS - 1)));
        }
        for (int word = 0; word < BITS; word++) {
            Words words[VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++)
                words[v] = loaded<Words>(group + v / PARTS * block + CODES + (word * LANES + v % PARTS * WIDTH) * 4);
#pragma GCC unroll 8
            for (int t = 0; t < FIELDS; t++) {
                Floats weights[VECTORS];
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) {
                    const Words codes = (words[v] >> (BITS * t)) & ((1u << BITS) - 1);
                    weights[v] = multiply_add(scales[v], from_words(codes), least[v]);
                }
                use(word * FIELDS + t, weights);
            }
        }
    }
};

// Plain weights, in groups too.
struct Plain {
    static constexpr int64_t BYTES = LANES * GROUP * sizeof(float);  // of a group

    template <int BLOCKS, typename Use>
    static inline __attribute__((always_inline)) void expand(const uint8_t* group, int64_t block, const Use& use) {
        constexpr int VECTORS = BLOCKS * PARTS;
        for (int input = 0; input < GROUP; input++) {
            Floats weights[VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++)
                weights[v] = loaded<Floats>(group + v / PARTS * block + (input * LANES + v % PARTS * WIDTH) * 4);
            use(input, weights);
        }
    }
};

// The sums of ROWS rows and BLOCKS blocks, or their next inputs: x and weights of `count` inputs.
template <int VECTORS, int ROWS>
inline __attribute__((always_inline)) void add(const float* x, int64_t stride, const Floats* weights,
                                               Floats (&sums)[ROWS][VECTORS]) {
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; m++) {
        const Floats input = repeated(x[m * stride]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sums[m][v] = multiply_add(weights[v], input, sums[m][v]);
    }
}

// Writes a row's sums of one block, with bias and addend.
void finish(const GroupedProduct& p, const float* sums, int64_t row, int64_t block) {
    const int64_t first = block * LANES, count = std::min(LANES, p.outputs - first), place = row * p.outputs + first;
    for (int64_t i = 0; i < count; i++) {
        float sum = sums[i];
        if (p.bias != nullptr) sum += p.bias[first + i];
        if (p.added != nullptr) sum += p.added[place + i];
        p.out[place + i] = sum;
    }
}

template <typename F> int64_t bytes_of_block(const GroupedProduct& p) { return p.inputs / GROUP * F::BYTES; }

// ROWS rows by BLOCKS blocks, with the weights expanded in registers.
template <typename F, int ROWS, int BLOCKS> void few_rows(const GroupedProduct& p, int64_t block) {
    constexpr int VECTORS = BLOCKS * PARTS;
    const int64_t bytes = bytes_of_block<F>(p);
    const uint8_t* group = p.weight + block * bytes;
    Floats sums[ROWS][VECTORS] = {};
    for (const float* x = p.x; x < p.x + p.inputs; x += GROUP, group += F::BYTES)
        F::template expand<BLOCKS>(group, bytes, [&](int input, const Floats* weights) __attribute__((always_inline)) {
            add<VECTORS, ROWS>(x + input, p.inputs, weights, sums);
        });
    for (int m = 0; m < ROWS; m++)
        for (int b = 0; b < BLOCKS; b++) {
            alignas(64) float found[LANES];
            std::memcpy(found, &sums[m][b * PARTS], sizeof found);
            finish(p, found, m, block + b);
        }
}

template <typename F, int ROWS> void few_rows(const GroupedProduct& p, int64_t first, int64_t last) {
    constexpr int BLOCKS = (ROWS <= 2 ? 4 : 2) / PARTS;  // independent sums hide the latency of an addition
    for (; first + BLOCKS <= last; first += BLOCKS) few_rows<F, ROWS, BLOCKS>(p, first);
    for (; first < last; first++) few_rows<F, ROWS, 1>(p, first);
}

// Adds the products of ROWS rows and `count` expanded inputs to the sums, both [.., 16].
template <int ROWS> void add_tile(const float* x, int64_t stride, const float* panel, int64_t count, float* kept) {
    Floats sums[ROWS][PARTS];
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; m++)
        for (int part = 0; part < PARTS; part++) sums[m][part] = loaded<Floats>(kept + m * LANES + part * WIDTH);
    for (int64_t input = 0; input < count; input++) {
        Floats weights[PARTS];
        __builtin_prefetch(panel + (input + AHEAD) * LANES);
#pragma GCC unroll 2
        for (int part = 0; part < PARTS; part++) weights[part] = loaded<Floats>(panel + input * LANES + part * WIDTH);
        add<PARTS, ROWS>(x + input, stride, weights, sums);
    }
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; m++)
        for (int part = 0; part < PARTS; part++) store(kept + m * LANES + part * WIDTH, sums[m][part]);
}

template <int ROWS>
void add_rows(const float* x, int64_t stride, const float* panel, int64_t count, float* kept, int64_t rows) {
    for (; rows >= ROWS; rows -= ROWS, x += ROWS * stride, kept += ROWS * LANES)
        add_tile<ROWS>(x, stride, panel, count, kept);
    if constexpr (ROWS > 1)
        if (rows > 0) add_rows<ROWS - 1>(x, stride, panel, count, kept, rows);
}

template <typename F> void many_rows(const GroupedProduct& p, int64_t first, int64_t last) {
    alignas(64) float panel[CHUNK * LANES], sums[SLAB * LANES];
    const int64_t groups = p.inputs / GROUP, chunks = (p.inputs + CHUNK - 1) / CHUNK;
    for (int64_t row = 0; row < p.rows; row += SLAB)
        for (int64_t block = first; block < last; block++) {
            const int64_t rows = std::min(SLAB, p.rows - row);
            std::fill_n(sums, rows * LANES, 0.0f);
            for (int64_t chunk = 0; chunk < chunks; chunk++) {
                const int64_t start = groups * chunk / chunks, end = groups * (chunk + 1) / chunks;
                const uint8_t* codes = p.weight + (block * groups + start) * F::BYTES;
                const float* weights = panel;
                if constexpr (std::is_same_v<F, Plain>) {
                    weights = reinterpret_cast<const float*>(codes);
                } else {
                    float* to = panel;
                    for (int64_t group = start; group < end; group++, codes += F::BYTES, to += GROUP * LANES)
                        F::template expand<1>(
                            codes, 0, [to](int input, const Floats* found) __attribute__((always_inline)) {
                                for (int part = 0; part < PARTS; part++)
                                    store(to + input * LANES + part * WIDTH, found[part]);
                            });
                }
                const int64_t count = (end - start) * GROUP;
                add_rows<TILE>(p.x + row * p.inputs + start * GROUP, p.inputs, weights, count, sums, rows);
            }
            for (int64_t i = 0; i < rows; i++) finish(p, sums + i * LANES, row + i, block);
        }
}

// All rows by the blocks `first` … `last`. From five rows on, the registers do not hold the sums beside a group's scales.
template <typename F> void multiply(const GroupedProduct& p, int64_t first, int64_t last) {
    switch (p.rows) {
        case 1: return few_rows<F, 1>(p, first, last);
        case 2: return few_rows<F, 2>(p, first, last);
        case 3: return few_rows<F, 3>(p, first, last);
        case 4: return few_rows<F, 4>(p, first, last);
        default: return many_rows<F>(p, first, last);
    }
}

}  // namespace

extern "C" void grouped_product(const GroupedProduct* given) {
    const GroupedProduct& p = *given;
    const int64_t blocks = (p.outputs + LANES - 1) / LANES;
#pragma omp parallel
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const int64_t first = blocks * thread / threads, last = blocks * (thread + 1) / threads;
        if (p.kind == BYTES) multiply<Format<8, false>>(p, first, last);
        if (p.kind == NIBBLES) multiply<Format<4, false>>(p, first, last);
        if (p.kind == NIBBLES_LEAST) multiply<Format<4, true>>(p, first, last);
        if (p.kind == FLOATS) multiply<Plain>(p, first, last);
    }
}
