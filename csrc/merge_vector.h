// One vector of sixteen elements: the three ways to store its sums, and what it adds to the report. Written once over a
// vector type V, of 16 lanes in every instruction set: a report is summed lane by lane, so the sets agree in every bit.
//
// V has: F (16 floats), D (16 doubles); zero, set1, load, fma, add, sub, mul, abs, unless_zero, zero_if_nan, ratio, min,
// max, nearest, square_into, add_into, sum; bits / widen / round / store and ulp / per_ulp for each storage type;
// load_int8, store_int8; and nonzero, equal, greater, not_finite, which return 16 bits.
#pragma once

#include "merge_random.h"

namespace fastlora {
namespace {  // internal linkage, for the reason that merge_core.h gives

// ---- sums of a report; they live in registers through the loop, TileStats would live in memory

template <class V>
struct Sums {
    typename V::F square = V::zero(), gone_square = V::zero();  // of the rows in work
    typename V::D delta_square = V::zero_double(), lost_square = V::zero_double();
    typename V::F relative = V::zero();
    int64_t updated = 0, unchanged = 0;
};

[[gnu::noinline, gnu::cold]] inline void record_not_finite(uint32_t bad, const float* sums, TileStats& stats) {
    for (int lane = 0; lane < LANES; ++lane) {
        if (!(bad >> lane & 1u)) continue;
        stats.not_finite += 1;
        stats.largest = larger(fabsf(sums[lane]), stats.largest);
    }
}

// What one vector of elements adds to the report. `gone` is what storing lost.
template <class V, class F = typename V::F>
[[gnu::always_inline]] inline void tally(F old, F delta, F sum, F stored, F gone, uint32_t valid, Sums<V>& sums,
                                         TileStats& stats) {
    const uint32_t updated = V::nonzero(delta) & valid, bad = V::not_finite(stored) & valid;
    sums.updated += __builtin_popcount(updated);
    sums.unchanged += __builtin_popcount(updated & V::equal(stored, old));
    if (__builtin_expect(bad, 0)) {
        alignas(64) float sums_in_memory[LANES];  // here: GCC 12 copied an argument of type F before it looked at `bad`
        V::store(F32{}, sums_in_memory, sum);
        record_not_finite(bad, sums_in_memory, stats);
    }
    // a product for most vectors and a division for the few that raise the maximum: dividing always took a fifth longer
    if (V::greater(V::abs(gone), V::mul(sums.relative, V::abs(sum)))) {
        sums.relative = V::max(V::ratio(gone, sum), sums.relative);
    }
    sums.square = V::fma(delta, delta, sums.square);
    sums.gone_square = V::fma(gone, gone, sums.gone_square);
}

// After each block of rows the float32 sums of squares go into float64, before they can lose digits.
template <class V>
inline void fold(Sums<V>& sums) {
    V::add_into(sums.square, sums.delta_square);
    V::add_into(sums.gone_square, sums.lost_square);
    sums.square = sums.gone_square = V::zero();
}

// ---- the three ways

// dropped() of merge_core.h
template <class V, class F = typename V::F>
inline F dropped(F a, F b, F sum) {
    const F part = V::sub(sum, a);
    return V::add(V::sub(a, V::sub(sum, part)), V::sub(b, part));
}

// lost() of merge_core.h
template <class V, class F = typename V::F>
inline F lost(F32, F weight, F delta, F sum, F stored) {
    return V::add(V::sub(sum, stored), dropped<V>(weight, delta, sum));
}
template <class V, class Half, class F = typename V::F>
inline F lost(Half, F, F, F sum, F stored) {
    return V::sub(sum, stored);
}

template <class S, class M>
struct Place {  // of 16 elements
    typename S::Store* weight;
    typename M::template Residual<S>::Store* residual;
    const uint32_t* draws;
    uint32_t valid;
};

// merge_rounding.h's Nearest in vectors
template <class V, class S, bool WRITE>
[[gnu::always_inline]] inline void finish(Nearest, const Place<S, Nearest>& at, typename V::F delta, Sums<V>& sums,
                                          TileStats& stats) {
    const typename V::F old = V::widen(S{}, V::bits(S{}, at.weight));
    const typename V::F sum = V::unless_zero(delta, V::add(old, delta), old);
    const auto bits = V::round(S{}, sum);
    const typename V::F stored = V::widen(S{}, bits);
    if (WRITE) V::store(S{}, at.weight, bits);
    tally<V>(old, delta, sum, stored, lost<V>(S{}, old, delta, sum, stored), at.valid, sums, stats);
}

// The residual of 16 elements as it lies in memory, in units: of 1, or of ulp / 254
template <class V, class S>
inline typename V::F units_of(S, S, const typename S::Store* residual) {
    return V::widen(S{}, V::bits(S{}, residual));
}
template <class V, class S>
inline typename V::F units_of(S, I8, const int8_t* residual) {
    return V::load_int8(residual);
}

template <class V, class S>
inline typename V::F residual_value(S, S, typename V::F units, typename V::F) {
    return units;
}
template <class V, class S>
inline typename V::F residual_value(S, I8, typename V::F units, typename V::F weight) {
    return V::mul(V::mul(units, V::ulp(S{}, weight)), V::set1(1.0f / 254.0f));
}

// residual_store() of merge_rounding.h, up to the writing
template <class V, class S>
inline typename V::F units_for(S, S, typename V::F rest, typename V::F) {
    return V::widen(S{}, V::round(S{}, V::zero_if_nan(rest)));
}
template <class V, class S>
inline typename V::F units_for(S, I8, typename V::F rest, typename V::F weight) {
    const typename V::F units = V::mul(V::mul(V::zero_if_nan(rest), V::per_ulp(S{}, weight)), V::set1(254.0f));
    return V::nearest(V::max(V::min(units, V::set1(127.0f)), V::set1(-127.0f)));
}

template <class V, class S>
inline void store_units(S, S, typename S::Store* residual, typename V::F units) {
    V::store(S{}, residual, V::round(S{}, units));  // exact: they are numbers of S
}
template <class V, class S>
inline void store_units(S, I8, int8_t* residual, typename V::F units) {
    V::store_int8(residual, units);
}

// merge_rounding.h's Compensated in vectors
template <class V, class S, bool WRITE, class E>
[[gnu::always_inline]] inline void finish(Compensated<E>, const Place<S, Compensated<E>>& at, typename V::F delta,
                                          Sums<V>& sums, TileStats& stats) {
    using F = typename V::F;
    const F old = V::widen(S{}, V::bits(S{}, at.weight)), before = units_of<V>(S{}, E{}, at.residual);
    const F had = residual_value<V>(S{}, E{}, before, old), step = V::add(delta, had);
    const F sum = V::unless_zero(delta, V::add(old, step), old);
    const auto bits = V::round(S{}, sum);
    const F stored = V::widen(S{}, bits);
    const F rest = V::add(V::sub(sum, stored), V::add(dropped<V>(old, step, sum), dropped<V>(delta, had, step)));
    const F left = V::unless_zero(delta, units_for<V>(S{}, E{}, rest, stored), before);
    if (WRITE) V::store(S{}, at.weight, bits);
    if (WRITE) store_units<V>(S{}, E{}, at.residual, left);
    const F gone = V::unless_zero(delta, V::sub(rest, residual_value<V>(S{}, E{}, left, stored)), V::zero());
    tally<V>(old, delta, sum, stored, gone, at.valid, sums, stats);
}

// merge_rounding.h's Stochastic in vectors
template <class V, class S, bool WRITE>
[[gnu::always_inline]] inline void finish(Stochastic, const Place<S, Stochastic>& at, typename V::F delta, Sums<V>& sums,
                                          TileStats& stats) {
    const typename V::F old = V::widen(S{}, V::bits(S{}, at.weight));
    const typename V::F sum = V::unless_zero(delta, V::add(old, delta), old);
    Floats values;
    V::store(F32{}, reinterpret_cast<float*>(&values), sum);
    Words draws;
    memcpy(&draws, at.draws, sizeof draws);
    alignas(64) typename S::Store bits[LANES];
    round_randomly(S{}, values, draws, bits);
    const typename V::F stored = V::widen(S{}, V::bits(S{}, bits));
    if (WRITE) memcpy(at.weight, bits, sizeof bits);
    tally<V>(old, delta, sum, stored, lost<V>(S{}, old, delta, sum, stored), at.valid, sums, stats);
}

}  // namespace
}  // namespace fastlora
