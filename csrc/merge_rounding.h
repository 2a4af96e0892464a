// The two other ways to store a sum: stochastic rounding, and a residual that keeps what rounding dropped. One element
// each, for host and device; merge_core.h holds the arithmetic that they share with rounding to nearest.
#pragma once

#include "merge_core.h"

namespace fastlora {

// ---- stochastic: up with the probability of the dropped part, so that the expectation is the sum itself

// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): four words for a counter and a key.
struct PhiloxKey {
    uint32_t low, high;
};

FASTLORA_HD void philox_round(uint32_t& word0, uint32_t& word1, uint32_t& word2, uint32_t& word3, PhiloxKey key) {
    const uint64_t a = uint64_t(0xD2511F53u) * word0, b = uint64_t(0xCD9E8D57u) * word2;
    word0 = uint32_t(b >> 32) ^ word1 ^ key.low;
    word1 = uint32_t(b);
    word2 = uint32_t(a >> 32) ^ word3 ^ key.high;
    word3 = uint32_t(a);
}

FASTLORA_HD PhiloxKey next_key(PhiloxKey key) { return {key.low + 0x9E3779B9u, key.high + 0xBB67AE85u}; }

constexpr int PHILOX_ROUNDS = 10;

// The draws of columns 4 * quad to 4 * quad + 3 in one row of a weight's storage: a function of seed, module and place, so
// that neither the grid nor the number of threads matters.
FASTLORA_HD void draws_of(uint64_t seed, uint32_t module, int64_t row, int64_t quad, uint32_t (&word)[4]) {
    word[0] = uint32_t(row), word[1] = uint32_t(quad), word[2] = module, word[3] = 0;
    PhiloxKey key{uint32_t(seed), uint32_t(seed >> 32)};
    for (int round = 0; round < PHILOX_ROUNDS; ++round, key = next_key(key)) {
        philox_round(word[0], word[1], word[2], word[3], key);
    }
}

FASTLORA_HD float round_randomly(F32, float value, uint32_t) { return round_to(F32{}, value); }  // nothing is dropped

FASTLORA_HD uint16_t round_randomly(BF16, float value, uint32_t draw) {
    const uint32_t bits = bits_of(value);
    return value == value ? uint16_t((bits + (draw >> 16)) >> 16) : uint16_t(0x7fc0);
}

FASTLORA_HD uint16_t round_randomly(F16, float value, uint32_t draw) {
    const uint32_t bits = bits_of(value), size = bits & 0x7fffffffu;
    const uint32_t sign = (bits >> 16) & 0x8000u;
    // from 2^-14 on 13 bits are dropped; above 65536 all is infinite
    const uint32_t normal = size >= 0x47800000u ? 0x7c00u : (size - 0x38000000u + (draw >> 19)) >> 13;
    // below, in units of 2^-24: exact products, and 24 bits of the draw against the fraction
    const float small = size < 0x38800000u ? float_of(size) * 16777216.0f : 0.0f;
    const uint32_t whole = uint32_t(int32_t(small));
    const uint32_t subnormal = whole + (float(int32_t(draw >> 8)) < (small - float(int32_t(whole))) * 16777216.0f);
    return uint16_t(size > 0x7f800000u ? 0x7e00u : sign | (size < 0x38800000u ? subnormal : normal));
}

// ---- compensated: weight + residual is the sum; the weight alone is the sum rounded once

struct I8 {  // in units of ulp(weight) / 254, so that 127 is half an ulp; an ulp counts as at least that of the floor
    using Store = int8_t;
};

template <class S>
struct Ulp;  // bits dropped from the exponent's power of two, and the smallest exponent field that is looked at
template <>
struct Ulp<F32> {
    static constexpr uint32_t digits = 23, floor = 24;
};
template <>
struct Ulp<F16> {
    static constexpr uint32_t digits = 10, floor = 113;  // that of 2^-14: subnormals share its ulp
};
template <>
struct Ulp<BF16> {
    static constexpr uint32_t digits = 7, floor = 14;
};

template <class S>
FASTLORA_HD uint32_t exponent_field(float weight) {
    const uint32_t field = (bits_of(weight) >> 23) & 255u;
    return field < Ulp<S>::floor ? Ulp<S>::floor : field > 254u ? 254u : field;
}

template <class S>
FASTLORA_HD float ulp_of(float weight) {
    return float_of((exponent_field<S>(weight) - Ulp<S>::digits) << 23);
}

template <class S>
FASTLORA_HD float per_ulp_of(float weight) {
    return float_of((254u + Ulp<S>::digits - exponent_field<S>(weight)) << 23);
}

template <class S>
FASTLORA_HD float residual_value(S, I8, int8_t kept, float weight) {
    return (float(kept) * ulp_of<S>(weight)) * (1.0f / 254.0f);
}

template <class S>
FASTLORA_HD int8_t residual_store(S, I8, float rest, float weight) {
    float units = (rest * per_ulp_of<S>(weight)) * 254.0f;  // the first product is exact
    units = units > 127.0f ? 127.0f : units;
    units = units > -127.0f ? units : -127.0f;
    units = rest == rest ? units : 0.0f;
    // the sum's last bit is worth 1: rounds to nearest even, as rint does
    return int8_t(int32_t(bits_of(units + 12582912.0f)) - 0x4b400000);
}

template <class S>
FASTLORA_HD float residual_value(S, S, typename S::Store kept, float) {
    return widen(S{}, kept);
}

template <class S>
FASTLORA_HD typename S::Store residual_store(S, S, float rest, float) {
    return round_to(S{}, rest == rest ? rest : 0.0f);
}

// ---- one element, in the three ways

struct NoResidual {
    using Store = uint8_t;
};

template <class S, class E>
struct Outcome {
    typename S::Store bits;
    typename E::Store kept;         // the new residual
    float old, sum, stored, gone;   // gone: what neither weight nor residual holds
};

struct Nearest {
    static constexpr bool draws = false, residual = false;
    template <class S>
    using Residual = NoResidual;

    template <class S>
    FASTLORA_HD Outcome<S, NoResidual> merge(S, typename S::Store weight, uint8_t, float delta, uint32_t) {
        const float old = widen(S{}, weight), sum = delta != 0 ? old + delta : old;
        const typename S::Store bits = round_to(S{}, sum);
        const float stored = widen(S{}, bits);
        return {bits, 0, old, sum, stored, lost(S{}, old, delta, sum, stored)};
    }
};

struct Stochastic {
    static constexpr bool draws = true, residual = false;
    template <class S>
    using Residual = NoResidual;

    template <class S>
    FASTLORA_HD Outcome<S, NoResidual> merge(S, typename S::Store weight, uint8_t, float delta, uint32_t draw) {
        const float old = widen(S{}, weight), sum = delta != 0 ? old + delta : old;
        const typename S::Store bits = round_randomly(S{}, sum, draw);
        const float stored = widen(S{}, bits);
        return {bits, 0, old, sum, stored, lost(S{}, old, delta, sum, stored)};
    }
};

template <class E>
struct Compensated {
    static constexpr bool draws = false, residual = true;
    template <class S>
    using Residual = E;

    template <class S>
    FASTLORA_HD Outcome<S, E> merge(S, typename S::Store weight, typename E::Store kept, float delta, uint32_t) {
        const float old = widen(S{}, weight), had = residual_value(S{}, E{}, kept, old), step = delta + had;
        const float sum = delta != 0 ? old + step : old;
        const typename S::Store bits = round_to(S{}, sum);
        const float stored = widen(S{}, bits);
        const float rest = (sum - stored) + (dropped(old, step, sum) + dropped(delta, had, step));
        const typename E::Store left = delta != 0 ? residual_store(S{}, E{}, rest, stored) : kept;
        return {bits, left, old, sum, stored, delta != 0 ? rest - residual_value(S{}, E{}, left, stored) : 0.0f};
    }
};

}  // namespace fastlora
