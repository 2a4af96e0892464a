// Arithmetic of one element of a merge, shared by host and device: what the CPU tests prove is what the GPU computes.
//
//   sg[r]       = float32(scaling * gate[r])                  product in float64, rounded once
//   c[n, r]     = lora_b[n, r] * sg[r]                        float32
//   delta[n, k] = fma over the kept ranks, in rank order, from 0: fma(c[n, r], lora_a[r, k], delta)      float32
//   weight      = delta == 0 ? weight : round_to_dtype(float32(weight) + delta)
//
// One rounding to the weight's dtype, to nearest even. delta == 0 keeps the bits, so that -0 stays -0. Compile without
// contraction (-ffp-contract=off, --fmad=false): every operation below is meant as written.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// static: a copy for each file, since the files are compiled for different instruction sets and the linker would keep
// any one of several external copies.
#ifdef __CUDACC__
#define FASTLORA_HD static __host__ __device__ __forceinline__
#else
#define FASTLORA_HD static inline
#endif

namespace fastlora {

enum class DType : int32_t { float32, float16, bfloat16, int8 };  // int8: of residuals alone

struct F32 {
    using Store = float;
    static constexpr float max = 3.4028234663852886e38f;
};
struct F16 {
    using Store = uint16_t;
    static constexpr float max = 65504.0f;
};
struct BF16 {
    using Store = uint16_t;
    static constexpr float max = 3.3895313892515355e38f;
};

FASTLORA_HD uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

FASTLORA_HD float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// ---- storage -> float32: exact; a NaN becomes some NaN

FASTLORA_HD float widen(F32, float stored) { return stored; }

FASTLORA_HD float widen(BF16, uint16_t stored) { return float_of(uint32_t(stored) << 16); }

FASTLORA_HD float widen(F16, uint16_t stored) {
    const uint32_t sign = uint32_t(stored & 0x8000u) << 16, exponent = (stored >> 10) & 31u, mantissa = stored & 1023u;
    if (exponent == 31) return float_of(sign | 0x7f800000u | (mantissa << 13));
    // A subnormal is mantissa * 2^-24; both factors and the product are exact in float32.
    if (exponent == 0) return float_of(sign | bits_of(float(mantissa) * 5.9604644775390625e-8f));
    return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

// ---- float32 -> storage: to nearest even, overflow to infinity, every NaN to one NaN so that all paths agree in bits

FASTLORA_HD float round_to(F32, float value) { return value == value ? value : float_of(0x7fc00000u); }

FASTLORA_HD uint16_t round_to(BF16, float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

FASTLORA_HD uint16_t round_to(F16, float value) {
    const uint32_t bits = bits_of(value), size = bits & 0x7fffffffu;
    const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
    if (size > 0x7f800000u) return 0x7e00;
    if (size >= 0x477ff000u) return sign | 0x7c00;  // 65520, halfway between the largest half and 2^16, is a tie: up
    if (size < 0x38800000u) {
        // Below 2^-14 the spacing is 2^-24: in [0.5, 1) that is float32's own, so this sum rounds at the right bit.
        return sign | uint16_t(bits_of(float_of(size) + 0.5f) - 0x3f000000u);
    }
    const uint32_t rebased = size - 0x38000000u;  // exponent bias 127 -> 15
    return sign | uint16_t((rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13);
}

// ---- the update

FASTLORA_HD float scaled_gate(double scaling, float gate) { return float(scaling * double(gate)); }

FASTLORA_HD float multiply_add(float c, float a, float delta) { return fmaf(c, a, delta); }

FASTLORA_HD bool is_finite(float value) { return (bits_of(value) & 0x7fffffffu) < 0x7f800000u; }

// What the float32 sum of a and b dropped, exactly (two-sum, Knuth).
FASTLORA_HD float dropped(float a, float b, float sum) {
    const float part = sum - a;
    return (a - (sum - part)) + (b - part);
}

// What storing lost of weight + delta. Beside the rounding to 16 bits, what the float32 sum dropped is nothing.
FASTLORA_HD float lost(F32, float weight, float delta, float sum, float stored) {
    return (sum - stored) + dropped(weight, delta, sum);
}

template <class Half>
FASTLORA_HD float lost(Half, float, float, float sum, float stored) {
    return sum - stored;
}

FASTLORA_HD float larger(float value, float most) { return value > most ? value : most; }  // a NaN never wins

}  // namespace fastlora
