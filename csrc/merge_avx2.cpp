// The row loop for AVX2, FMA and F16C: sixteen lanes as two halves. Called only where the processor has them.
#include <immintrin.h>

#include "merge_rows.h"

namespace fastlora {
namespace {

struct Avx2 {
    struct F {
        __m256 low, high;
    };
    struct D {
        __m256d quarter[4];
    };

    static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static D zero_double() {
        const __m256d zero = _mm256_setzero_pd();
        return {{zero, zero, zero, zero}};
    }
    static F set1(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
    static F load(const float* source) { return {_mm256_loadu_ps(source), _mm256_loadu_ps(source + 8)}; }
    static F fma(F a, F b, F c) {
        return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
    }
    static F add(F a, F b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
    static F sub(F a, F b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
    static F mul(F a, F b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
    static F abs(F a) { return {abs(a.low), abs(a.high)}; }
    static F zero_if_nan(F a) { return {number(a.low), number(a.high)}; }
    static F nearest(F a) {
        constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        return {_mm256_round_ps(a.low, mode), _mm256_round_ps(a.high, mode)};
    }
    template <class S>
    static F ulp(S, F weight) {
        const __m256i digits = _mm256_set1_epi32(Ulp<S>::digits);
        return {power_of_two(_mm256_sub_epi32(exponent_field_of<S>(weight.low), digits)),
                power_of_two(_mm256_sub_epi32(exponent_field_of<S>(weight.high), digits))};
    }
    template <class S>
    static F per_ulp(S, F weight) {
        const __m256i most = _mm256_set1_epi32(254 + Ulp<S>::digits);
        return {power_of_two(_mm256_sub_epi32(most, exponent_field_of<S>(weight.low))),
                power_of_two(_mm256_sub_epi32(most, exponent_field_of<S>(weight.high)))};
    }
    static F load_int8(const int8_t* source) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
        return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(bytes, bytes)))};
    }
    static void store_int8(int8_t* target, F units) {
        const __m256i mixed = _mm256_packs_epi32(_mm256_cvtps_epi32(units.low), _mm256_cvtps_epi32(units.high));
        const __m256i words = _mm256_permute4x64_epi64(mixed, _MM_SHUFFLE(3, 1, 2, 0));  // packs works within halves
        const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(target), bytes);
    }
    static F min(F a, F b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
    static F max(F a, F b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }  // b when a is NaN
    static F ratio(F a, F b) {
        return {_mm256_div_ps(abs(a.low), abs(b.low)), _mm256_div_ps(abs(a.high), abs(b.high))};
    }
    static F unless_zero(F test, F a, F b) {
        const __m256 zero = _mm256_setzero_ps();
        return {_mm256_blendv_ps(b.low, a.low, _mm256_cmp_ps(test.low, zero, _CMP_NEQ_UQ)),
                _mm256_blendv_ps(b.high, a.high, _mm256_cmp_ps(test.high, zero, _CMP_NEQ_UQ))};
    }

    static uint32_t nonzero(F a) { return compare<_CMP_NEQ_UQ>(a, zero()); }
    static uint32_t equal(F a, F b) { return compare<_CMP_EQ_OQ>(a, b); }
    static uint32_t greater(F a, F b) { return compare<_CMP_GT_OQ>(a, b); }
    static uint32_t not_finite(F a) {
        const __m256 inf = _mm256_set1_ps(float_of(0x7f800000u));
        return compare<_CMP_NLT_UQ>({abs(a.low), abs(a.high)}, {inf, inf});
    }

    static void square_into(F a, D& sum) {
        for (int i = 0; i < 4; ++i) {
            const __m256d wide = quarter(a, i);
            // The square of a float is exact in float64, so fused or not is the same sum.
            sum.quarter[i] = _mm256_fmadd_pd(wide, wide, sum.quarter[i]);
        }
    }
    static void add_into(F a, D& sum) {
        for (int i = 0; i < 4; ++i) sum.quarter[i] = _mm256_add_pd(sum.quarter[i], quarter(a, i));
    }
    static double sum(const D& sum) {
        alignas(32) double lanes[LANES];
        for (int i = 0; i < 4; ++i) _mm256_store_pd(lanes + 4 * i, sum.quarter[i]);
        double total = 0;
        for (double lane : lanes) total += lane;
        return total;
    }

    static F bits(F32, const float* source) { return load(source); }
    static F widen(F32, F bits) { return bits; }
    static F round(F32, F a) { return {one_nan(a.low), one_nan(a.high)}; }
    static void store(F32, float* target, F bits) {
        _mm256_storeu_ps(target, bits.low);
        _mm256_storeu_ps(target + 8, bits.high);
    }

    static __m256i bits(F16, const uint16_t* source) { return load_16(source); }
    static F widen(F16, __m256i bits) {
        return {_mm256_cvtph_ps(_mm256_castsi256_si128(bits)), _mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1))};
    }
    static __m256i round(F16, F a) {
        constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        // The positive canonical NaN of round(F32) becomes 0x7e00.
        return _mm256_set_m128i(_mm256_cvtps_ph(one_nan(a.high), mode), _mm256_cvtps_ph(one_nan(a.low), mode));
    }
    static void store(F16, uint16_t* target, __m256i bits) { store_16(target, bits); }

    static __m256i bits(BF16, const uint16_t* source) { return load_16(source); }
    static F widen(BF16, __m256i bits) {
        return {upper_half(_mm256_castsi256_si128(bits)), upper_half(_mm256_extracti128_si256(bits, 1))};
    }
    static __m256i round(BF16, F a) {
        const __m256i packed = _mm256_packus_epi32(rounded_half(a.low), rounded_half(a.high));
        return _mm256_permute4x64_epi64(packed, _MM_SHUFFLE(3, 1, 2, 0));  // packus works within 128-bit lanes
    }
    static void store(BF16, uint16_t* target, __m256i bits) { store_16(target, bits); }

private:
    template <class S>
    static __m256i exponent_field_of(__m256 weight) {
        const __m256i field = _mm256_and_si256(_mm256_srli_epi32(_mm256_castps_si256(weight), 23), _mm256_set1_epi32(255));
        return _mm256_min_epu32(_mm256_max_epu32(field, _mm256_set1_epi32(Ulp<S>::floor)), _mm256_set1_epi32(254));
    }
    static __m256 power_of_two(__m256i field) { return _mm256_castsi256_ps(_mm256_slli_epi32(field, 23)); }
    static __m256 number(__m256 a) { return _mm256_andnot_ps(is_nan(a), a); }
    static __m256 abs(__m256 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
    static __m256d quarter(F a, int i) {
        const __m256 half = i < 2 ? a.low : a.high;
        return _mm256_cvtps_pd(i % 2 ? _mm256_extractf128_ps(half, 1) : _mm256_castps256_ps128(half));
    }
    static __m256 is_nan(__m256 a) { return _mm256_cmp_ps(a, a, _CMP_UNORD_Q); }
    static __m256 one_nan(__m256 a) { return _mm256_blendv_ps(a, _mm256_set1_ps(float_of(0x7fc00000u)), is_nan(a)); }

    template <int PREDICATE>
    static uint32_t compare(F a, F b) {
        return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.low, b.low, PREDICATE))) |
               uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.high, b.high, PREDICATE))) << 8;
    }
    static __m256 upper_half(__m128i bits) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    static __m256i rounded_half(__m256 a) {
        const __m256i wide = _mm256_castps_si256(one_nan(a));
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(wide, 16), _mm256_set1_epi32(1));
        const __m256i up = _mm256_add_epi32(wide, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        // A NaN would carry into the sign; 0x7fc00000 + 0x7fff does not: its lower half is zero.
        return _mm256_srli_epi32(up, 16);
    }
    static __m256i load_16(const uint16_t* source) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
    }
    static void store_16(uint16_t* target, __m256i bits) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), bits);
    }
};

}  // namespace

const Isa avx2_isa = isa_of<Avx2>("avx2");

}  // namespace fastlora
