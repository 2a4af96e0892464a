// Draws for sixteen elements at a time, and stochastic rounding by them: what merge_rounding.h does for one, in the
// compiler's own vectors, which it splits as the instruction set needs.
#pragma once

#include "merge_isa.h"
#include "merge_rounding.h"

namespace fastlora {
namespace {  // internal linkage, for the reason that merge_core.h gives

using Words [[gnu::vector_size(64)]] = uint32_t;
using Integers [[gnu::vector_size(64)]] = int32_t;
using Floats [[gnu::vector_size(64)]] = float;
using Products [[gnu::vector_size(64)]] = uint64_t;

// Upper and lower halves of 16 products of 32 bits, those of even and odd lanes apart.
inline void multiply(uint32_t factor, const Words& words, Words& high, Words& low) {
    const Products even = (Products(words) & 0xffffffffu) * factor, odd = (Products(words) >> 32) * factor;
    high = Words((even >> 32) | (odd & ~Products{} << 32));
    low = words * factor;
}

// philox_round() of merge_rounding.h
inline void philox_round(Words (&word)[4], PhiloxKey key) {
    Words high_a, low_a, high_b, low_b;
    multiply(0xD2511F53u, word[0], high_a, low_a);
    multiply(0xCD9E8D57u, word[2], high_b, low_b);
    word[0] = high_b ^ word[1] ^ key.low;
    word[1] = low_b;
    word[2] = high_a ^ word[3] ^ key.high;
    word[3] = low_a;
}

// round_randomly() of merge_rounding.h
inline void round_randomly(F32, const Floats& values, const Words&, float* out) {
    for (int lane = 0; lane < LANES; ++lane) out[lane] = round_to(F32{}, values[lane]);
}

inline void round_randomly(BF16, const Floats& values, const Words& draws, uint16_t* out) {
    const Words rounded = (Words(values) + (draws >> 16)) >> 16, nan = Words{} + 0x7fc0u;
    const Words bits = values == values ? rounded : nan;
    for (int lane = 0; lane < LANES; ++lane) out[lane] = uint16_t(bits[lane]);
}

inline void round_randomly(F16, const Floats& values, const Words& draws, uint16_t* out) {
    const Words zero = {}, size = Words(values) & 0x7fffffffu, sign = (Words(values) >> 16) & 0x8000u;
    const Words normal = size >= 0x47800000u ? zero + 0x7c00u : (size - 0x38000000u + (draws >> 19)) >> 13;
    const Floats small = Floats(size < 0x38800000u ? size : zero) * 16777216.0f;
    const Integers whole = __builtin_convertvector(small, Integers);
    const Floats rest = (small - __builtin_convertvector(whole, Floats)) * 16777216.0f;
    const Integers up = __builtin_convertvector(Integers(draws >> 8), Floats) < rest;  // -1 where it is
    const Words finite = sign | (size < 0x38800000u ? Words(whole - up) : normal);
    const Words bits = size > 0x7f800000u ? zero + 0x7e00u : finite;
    for (int lane = 0; lane < LANES; ++lane) out[lane] = uint16_t(bits[lane]);
}

struct Draws {
    uint32_t word[ROW_BLOCK][LANES];  // [row][column within the panel]

    // draws_of() of merge_rounding.h for four rows of a panel: sixteen counters side by side
    void fill(const Rounding& rounding, int64_t row, int64_t col) {
        constexpr int QUADS = LANES / 4;
        Words made[4] = {};
        for (int lane = 0; lane < LANES; ++lane) {
            made[0][lane] = uint32_t(row) + lane / QUADS, made[1][lane] = uint32_t(col / 4) + lane % QUADS;
        }
        made[2] += rounding.module;
        PhiloxKey key{uint32_t(rounding.seed), uint32_t(rounding.seed >> 32)};
        for (int round = 0; round < PHILOX_ROUNDS; ++round, key = next_key(key)) philox_round(made, key);
        for (int lane = 0; lane < LANES; ++lane) {
            for (int i = 0; i < 4; ++i) word[lane / QUADS][lane % QUADS * 4 + i] = made[i][lane];
        }
    }
};

}  // namespace
}  // namespace fastlora
