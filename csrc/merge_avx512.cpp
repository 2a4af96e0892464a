// The row loop for AVX-512 (F, BW, DQ, VL) with F16C. Called only where the processor has them.
#include <immintrin.h>

#include "merge_rows.h"

namespace fastlora {
namespace {

struct Avx512 {
    using F = __m512;
    struct D {
        __m512d low, high;
    };

    static F zero() { return _mm512_setzero_ps(); }
    static D zero_double() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
    static F set1(float value) { return _mm512_set1_ps(value); }
    static F load(const float* source) { return _mm512_loadu_ps(source); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F abs(F a) { return _mm512_abs_ps(a); }
    static F zero_if_nan(F a) { return _mm512_maskz_mov_ps(__mmask16(~is_nan(a)), a); }
    static F nearest(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    template <class S>
    static F ulp(S, F weight) {
        return power_of_two(_mm512_sub_epi32(exponent_field_of<S>(weight), _mm512_set1_epi32(Ulp<S>::digits)));
    }
    template <class S>
    static F per_ulp(S, F weight) {
        return power_of_two(_mm512_sub_epi32(_mm512_set1_epi32(254 + Ulp<S>::digits), exponent_field_of<S>(weight)));
    }
    static F load_int8(const int8_t* source) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    }
    static void store_int8(int8_t* target, F units) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(units)));
    }
    static F min(F a, F b) { return _mm512_min_ps(a, b); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }  // b when a is NaN
    static F ratio(F a, F b) { return _mm512_div_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)); }
    static F unless_zero(F test, F a, F b) { return _mm512_mask_blend_ps(__mmask16(nonzero(test)), b, a); }

    static uint32_t nonzero(F a) { return _mm512_cmp_ps_mask(a, zero(), _CMP_NEQ_UQ); }
    static uint32_t equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
    static uint32_t greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
    static uint32_t not_finite(F a) { return _mm512_fpclass_ps_mask(a, 0x99); }  // both kinds of NaN, both infinities

    static void square_into(F a, D& sum) {
        const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(a));
        const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1));
        // The square of a float is exact in float64, so fused or not is the same sum.
        sum = {_mm512_fmadd_pd(low, low, sum.low), _mm512_fmadd_pd(high, high, sum.high)};
    }
    static void add_into(F a, D& sum) {
        sum.low = _mm512_add_pd(sum.low, _mm512_cvtps_pd(_mm512_castps512_ps256(a)));
        sum.high = _mm512_add_pd(sum.high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)));
    }
    static double sum(const D& sum) {
        alignas(64) double lanes[LANES];
        _mm512_store_pd(lanes, sum.low);
        _mm512_store_pd(lanes + 8, sum.high);
        double total = 0;
        for (double lane : lanes) total += lane;
        return total;
    }

    static __m512 bits(F32, const float* source) { return load(source); }
    static __m512 widen(F32, __m512 bits) { return bits; }
    static __m512 round(F32, F a) { return _mm512_mask_mov_ps(a, is_nan(a), set1(float_of(0x7fc00000u))); }
    static void store(F32, float* target, __m512 bits) { _mm512_storeu_ps(target, bits); }

    static __m256i bits(F16, const uint16_t* source) { return load_16(source); }
    static F widen(F16, __m256i bits) { return _mm512_cvtph_ps(bits); }
    static __m256i round(F16, F a) {
        const __m256i bits = _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        return _mm256_mask_mov_epi16(bits, is_nan(a), _mm256_set1_epi16(0x7e00));
    }
    static void store(F16, uint16_t* target, __m256i bits) { store_16(target, bits); }

    static __m256i bits(BF16, const uint16_t* source) { return load_16(source); }
    static F widen(BF16, __m256i bits) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    // Not the processor's own bfloat16 conversion: that one flushes subnormals.
    static __m256i round(BF16, F a) {
        const __m512i wide = _mm512_castps_si512(a);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(wide, 16), _mm512_set1_epi32(1));
        const __m512i up = _mm512_add_epi32(wide, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __m256i bits = _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
        return _mm256_mask_mov_epi16(bits, is_nan(a), _mm256_set1_epi16(0x7fc0));
    }
    static void store(BF16, uint16_t* target, __m256i bits) { store_16(target, bits); }

private:
    template <class S>
    static __m512i exponent_field_of(F weight) {
        const __m512i field = _mm512_and_si512(_mm512_srli_epi32(_mm512_castps_si512(weight), 23), _mm512_set1_epi32(255));
        return _mm512_min_epu32(_mm512_max_epu32(field, _mm512_set1_epi32(Ulp<S>::floor)), _mm512_set1_epi32(254));
    }
    static F power_of_two(__m512i field) { return _mm512_castsi512_ps(_mm512_slli_epi32(field, 23)); }
    static __mmask16 is_nan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
    static __m256i load_16(const uint16_t* source) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
    }
    static void store_16(uint16_t* target, __m256i bits) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), bits);
    }
};

}  // namespace

const Isa avx512_isa = isa_of<Avx512>("avx512");

}  // namespace fastlora
