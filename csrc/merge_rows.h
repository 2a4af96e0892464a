// The loop over a block of rows, written once over a vector type V of 16 lanes and compiled once for each instruction
// set. Sixteen lanes in every set: sums of a report are kept lane by lane, so the sets agree in every bit.
//
// V has: F (16 floats), D (16 doubles); zero, set1, load, fma, add, sub, mul, abs, unless_zero, zero_if_nan, ratio, min,
// max, nearest, square_into, add_into, sum; bits / widen / round / store and ulp / per_ulp for each storage type;
// load_int8, store_int8; and nonzero, equal, greater, not_finite, which return 16 bits. Rounding to nearest and residuals
// are written with them, random words and what is done with them in the compiler's own vectors.
#pragma once

#include "merge.h"
#include "merge_rounding.h"

namespace fastlora {

constexpr int LANES = 16;
constexpr int ROW_BLOCK = 4;  // rows that share one load of the panel

struct RowBlock {
    void* weight;
    DType dtype;
    int64_t rows, cols, stride;
    int64_t rank;        // kept ranks
    const float* panel;  // [ceil(cols / 16)][rank][16], zero beyond cols
    const float* coef;   // [rows][rank]
    bool write;
    void* residual;      // or null
    DType residual_dtype;
    int64_t residual_stride;
    Rounding rounding;
    int64_t first_row;   // in the weight's storage
};

// One table for each instruction set.
struct Isa {
    const char* name;
    void (*merge)(const RowBlock&, TileStats&);
    float (*max_abs)(DType, const void*, int64_t count);  // NaN or infinite when an element is
    void (*round)(DType, const float*, void*, int64_t count);
    void (*widen)(DType, const void*, float*, int64_t count);
};

extern const Isa scalar_isa;
#ifdef FASTLORA_X86_64
extern const Isa avx2_isa, avx512_isa;
#endif

namespace {  // internal linkage, for the reason that merge_core.h gives

// ---- sixteen integers or floats in the compiler's own vectors, which it splits as the instruction set needs

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

// ---- sums of a report; they live in registers through the loop, TileStats would live in memory

template <class V>
struct Sums {
    typename V::F square = V::zero(), gone_square = V::zero();  // of the rows in work
    typename V::D delta_square = V::zero_double(), lost_square = V::zero_double();
    typename V::F relative = V::zero();
    int64_t updated = 0, unchanged = 0;
};

template <class V>
[[gnu::noinline, gnu::cold]] void record_not_finite(uint32_t bad, typename V::F sum, TileStats& stats) {
    alignas(64) float sums[LANES];
    V::store(F32{}, sums, sum);
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
    if (__builtin_expect(bad, 0)) record_not_finite<V>(bad, sum, stats);
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

// ---- one vector of elements

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

// delta[i] of rows i of one panel: the fused multiply-adds of the kept ranks, in order.
template <class V, int ROWS>
[[gnu::always_inline]] inline void accumulate(const float* panel, const float* coef, int64_t rank,
                                              typename V::F (&delta)[ROWS]) {
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) delta[i] = V::zero();
    for (int64_t r = 0; r < rank; ++r) {
        const typename V::F a = V::load(panel + r * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) delta[i] = V::fma(V::set1(coef[i * rank + r]), a, delta[i]);
    }
}

// ---- rows

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

template <class S, class M>
inline Place<S, M> place(const RowBlock& block, int64_t row, int64_t col, const uint32_t* draws) {
    using Kept = typename M::template Residual<S>::Store;
    Kept* residual = static_cast<Kept*>(block.residual);
    return {static_cast<typename S::Store*>(block.weight) + row * block.stride + col,
            residual ? residual + row * block.residual_stride + col : nullptr, draws, 0xffffu};
}

// The last panel of a row whose length is no multiple of 16, through padded copies. Not inlined: its calls of memcpy
// would push the sums of the main loop out of the registers.
template <class V, class S, class M, bool WRITE, int ROWS>
[[gnu::noinline]] void merge_tail(const RowBlock& block, int64_t row, int64_t col, Sums<V>& sums, TileStats& stats) {
    using Store = typename S::Store;
    using Kept = typename M::template Residual<S>::Store;
    typename V::F delta[ROWS];
    accumulate<V, ROWS>(block.panel + col * block.rank, block.coef + row * block.rank, block.rank, delta);
    Draws draws;
    if (M::draws) draws.fill(block.rounding, block.first_row + row, col);
    const int64_t left = block.cols - col;
    for (int i = 0; i < ROWS; ++i) {
        const Place<S, M> there = place<S, M>(block, row + i, col, draws.word[i]);
        Store rest[LANES] = {};
        Kept kept[LANES] = {};
        memcpy(rest, there.weight, left * sizeof(Store));
        if (there.residual) memcpy(kept, there.residual, left * sizeof(Kept));
        finish<V, S, WRITE>(M{}, Place<S, M>{rest, kept, there.draws, (1u << left) - 1u}, delta[i], sums, stats);
        if (WRITE) memcpy(there.weight, rest, left * sizeof(Store));
        if (WRITE && there.residual) memcpy(there.residual, kept, left * sizeof(Kept));
    }
}

template <class V, class S, class M, bool WRITE, int ROWS>
[[gnu::always_inline]] inline void merge_block(const RowBlock& block, int64_t row, Sums<V>& sums, TileStats& stats) {
    const float* coef = block.coef + row * block.rank;
    Draws draws;
    int64_t col = 0;
    for (; col + LANES <= block.cols; col += LANES) {
        typename V::F delta[ROWS];
        accumulate<V, ROWS>(block.panel + col * block.rank, coef, block.rank, delta);
        if (M::draws) draws.fill(block.rounding, block.first_row + row, col);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
            finish<V, S, WRITE>(M{}, place<S, M>(block, row + i, col, draws.word[i]), delta[i], sums, stats);
        }
    }
    if (col < block.cols) {
        Sums<V> tail = sums;  // a copy, so that `sums` itself has no address
        merge_tail<V, S, M, WRITE, ROWS>(block, row, col, tail, stats);
        sums = tail;
    }
    fold<V>(sums);
}

// Again, each square in float64: for updates so small or large that their squares leave float32's range.
template <class V>
[[gnu::noinline, gnu::cold]] double exact_delta_square(const RowBlock& block) {
    typename V::D square = V::zero_double();
    for (int64_t row = 0; row < block.rows; ++row) {
        for (int64_t col = 0; col < block.cols; col += LANES) {
            typename V::F delta[1];
            accumulate<V, 1>(block.panel + col * block.rank, block.coef + row * block.rank, block.rank, delta);
            V::square_into(delta[0], square);
        }
    }
    return V::sum(square);
}

template <class V, class S, class M, bool WRITE>
void merge_rows_of(const RowBlock& block, TileStats& stats) {
    Sums<V> sums;
    int64_t row = 0;
    for (; row + ROW_BLOCK <= block.rows; row += ROW_BLOCK) {
        merge_block<V, S, M, WRITE, ROW_BLOCK>(block, row, sums, stats);
    }
    for (; row < block.rows; ++row) merge_block<V, S, M, WRITE, 1>(block, row, sums, stats);
    const double square = V::sum(sums.delta_square), in_range = 1e-26 * double(sums.updated);
    stats.updated += sums.updated;
    stats.unchanged += sums.unchanged;
    stats.delta_square += square >= in_range && square < 1e37 ? square : exact_delta_square<V>(block);
    stats.lost_square += V::sum(sums.lost_square);
    alignas(64) float relative[LANES];
    V::store(F32{}, relative, sums.relative);
    for (float value : relative) stats.max_relative = larger(value, stats.max_relative);
}

template <class V>
void merge_rows(const RowBlock& block, TileStats& stats) {
    const auto with = [&](auto storage, auto mode) {
        using S = decltype(storage);
        using M = decltype(mode);
        block.write ? merge_rows_of<V, S, M, true>(block, stats) : merge_rows_of<V, S, M, false>(block, stats);
    };
    const auto run = [&](auto storage) {
        using S = decltype(storage);
        if (block.residual && block.residual_dtype == DType::int8) return with(storage, Compensated<I8>{});
        if (block.residual) return with(storage, Compensated<S>{});
        if (block.rounding.stochastic && block.dtype != DType::float32) return with(storage, Stochastic{});
        with(storage, Nearest{});
    };
    if (block.dtype == DType::float32) run(F32{});
    if (block.dtype == DType::float16) run(F16{});
    if (block.dtype == DType::bfloat16) run(BF16{});
}

// Integer comparison orders |x| with infinity and NaN on top, and the compiler vectorizes it.
template <class Bits>
Bits max_abs_bits(const void* data, int64_t count) {
    const Bits* bits = static_cast<const Bits*>(data);
    constexpr Bits mask = Bits(~Bits(0)) >> 1;
    Bits most = 0;
    for (int64_t i = 0; i < count; ++i) {
        const Bits size = bits[i] & mask;
        most = size > most ? size : most;
    }
    return most;
}

inline float max_abs_of(DType dtype, const void* data, int64_t count) {
    if (dtype == DType::float32) return float_of(max_abs_bits<uint32_t>(data, count));
    const uint16_t most = max_abs_bits<uint16_t>(data, count);
    return dtype == DType::float16 ? widen(F16{}, most) : widen(BF16{}, most);
}

// Whole vectors, then a padded one: what merge_block does with a row.
template <class V, class S>
void round_of(const float* source, typename S::Store* target, int64_t count) {
    for (; count >= LANES; count -= LANES, source += LANES, target += LANES) {
        V::store(S{}, target, V::round(S{}, V::load(source)));
    }
    float in[LANES] = {};
    typename S::Store out[LANES];
    memcpy(in, source, count * sizeof(float));
    V::store(S{}, out, V::round(S{}, V::load(in)));
    memcpy(target, out, count * sizeof out[0]);
}

template <class V, class S>
void widen_of(const typename S::Store* source, float* target, int64_t count) {
    for (; count >= LANES; count -= LANES, source += LANES, target += LANES) {
        V::store(F32{}, target, V::widen(S{}, V::bits(S{}, source)));
    }
    typename S::Store in[LANES] = {};
    float out[LANES];
    memcpy(in, source, count * sizeof in[0]);
    V::store(F32{}, out, V::widen(S{}, V::bits(S{}, in)));
    memcpy(target, out, count * sizeof(float));
}

template <class V>
void round_rows(DType dtype, const float* source, void* target, int64_t count) {
    if (dtype == DType::float32) round_of<V, F32>(source, static_cast<float*>(target), count);
    if (dtype == DType::float16) round_of<V, F16>(source, static_cast<uint16_t*>(target), count);
    if (dtype == DType::bfloat16) round_of<V, BF16>(source, static_cast<uint16_t*>(target), count);
}

template <class V>
void widen_rows(DType dtype, const void* source, float* target, int64_t count) {
    if (dtype == DType::float32) widen_of<V, F32>(static_cast<const float*>(source), target, count);
    if (dtype == DType::float16) widen_of<V, F16>(static_cast<const uint16_t*>(source), target, count);
    if (dtype == DType::bfloat16) widen_of<V, BF16>(static_cast<const uint16_t*>(source), target, count);
}

template <class V>
constexpr Isa isa_of(const char* name) {
    return {name, merge_rows<V>, max_abs_of, round_rows<V>, widen_rows<V>};
}

}  // namespace
}  // namespace fastlora
