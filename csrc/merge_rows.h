// The loop over a block of rows, and the conversion of whole rows: written once over a vector type V (merge_vector.h),
// compiled once for each instruction set.
#pragma once

#include "merge_vector.h"

namespace fastlora {
namespace {  // internal linkage, for the reason that merge_core.h gives

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

// ---- rows of numbers

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
