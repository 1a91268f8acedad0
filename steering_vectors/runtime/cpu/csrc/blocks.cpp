// A Llama-like decoder block in one call, in bfloat16, for processors with AVX512-BF16:
//
//     h ← h + o(attention(qkv(norm(h))));   h ← h + down(silu(gate(norm(h))) · up(norm(h)))
//
// Intermediate results use buffers that are kept from block to block.

#ifdef __AVX512BF16__
#include "attention.hpp"
#include "products.hpp"
#include "vectors.hpp"

#include <vector>

extern "C" void norm_bfloat16(const void* x, const void* weight, void* out, int64_t rows, int64_t size, float epsilon);
extern "C" void gated_bfloat16(const void* both, void* out, int64_t rows, int64_t size);
extern "C" void attend_bfloat16(const Attention* given);
extern "C" void attend_prompts(const Attention* given);

namespace {

struct Norm {
    const void* weight;
    float epsilon;
};

// A buffer for an intermediate result.
class Scratch {
    std::vector<uint16_t> numbers;

  public:
    uint16_t* of(int64_t count) {
        if (int64_t(numbers.size()) < count) numbers.resize(count);
        return numbers.data();
    }
};

// to ← to + shift, the same shift for all tokens of a row.
void shift_rows(uint16_t* to, const uint16_t* shift, int64_t rows, int64_t queries, int64_t size) {
    using namespace vectors;
#pragma omp parallel for if (rows * queries * size >= SERIAL)
    for (int64_t token = 0; token < rows * queries; token++) {
        const uint16_t* from = shift + token / queries * size;
        for (int64_t i = 0; i < size; i += LANES) {
            const __mmask16 there = lanes(size - i);
            const __m512 shifted = _mm512_add_ps(widened(_mm256_maskz_loadu_epi16(there, to + token * size + i)),
                                                 widened(_mm256_maskz_loadu_epi16(there, from + i)));
            _mm256_mask_storeu_epi16(to + token * size + i, there, rounded(shifted));
        }
    }
}

void multiply(Product p, const uint16_t* x, int64_t tokens, uint16_t* out, const uint16_t* added = nullptr) {
    p.x = x, p.rows = tokens, p.out = out, p.added = added;
    multiply_rows(p);
}

}  // namespace

struct Block {
    Norm first, second;
    Product joined, output, gate_up, down;  // joined: queries, keys and values
    Attention attention;                    // the part that is known before a pass
};

// Computes `out` from `hidden`, both [rows, queries, inputs], and adds `shift` [rows, inputs] unless it is null.
extern "C" void block(const Block* given, const Pass* pass, const uint16_t* hidden, const uint16_t* shift,
                      uint16_t* out) {
    thread_local Scratch normed, joined, seen, both, gated;
    const Block& b = *given;
    const int64_t tokens = pass->rows * pass->queries, size = b.joined.inputs, inner = b.down.inputs;
    uint16_t* normalised = normed.of(tokens * size);

    norm_bfloat16(hidden, b.first.weight, normalised, tokens, size, b.first.epsilon);
    multiply(b.joined, normalised, tokens, joined.of(tokens * b.joined.outputs));
    Attention a = b.attention;
    static_cast<Pass&>(a) = *pass;
    a.joined = joined.of(0), a.out = seen.of(tokens * b.output.inputs);
    a.queries == 1 ? attend_bfloat16(&a) : attend_prompts(&a);
    multiply(b.output, seen.of(0), tokens, out, hidden);

    norm_bfloat16(out, b.second.weight, normalised, tokens, size, b.second.epsilon);
    multiply(b.gate_up, normalised, tokens, both.of(tokens * 2 * inner));
    gated_bfloat16(both.of(0), gated.of(tokens * inner), tokens, inner);
    multiply(b.down, gated.of(0), tokens, out, out);
    if (shift != nullptr) shift_rows(out, shift, pass->rows, pass->queries, size);
}
#endif
