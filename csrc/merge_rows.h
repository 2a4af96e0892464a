// The loop over a block of rows, written once over a vector type V of 16 lanes and compiled once for each instruction
// set. Sixteen lanes in every set: sums of a report are kept lane by lane, so the sets agree in every bit.
//
// V has: F (16 floats), D (16 doubles); zero, set1, load, fma, add, sub, unless_zero, ratio, max, square_into, sum;
// bits / widen / round / store for each storage type; and nonzero, equal, not_finite, which return 16 bits.
#pragma once

#include "merge.h"

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

template <class V>
struct Sums {  // lives in registers through the loop; TileStats would live in memory
    typename V::D square = V::zero_double();
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

// lost() of merge_core.h
template <class V, class F = typename V::F>
inline F lost(F32, F weight, F delta, F sum, F stored) {
    const F part = V::sub(sum, weight);
    return V::add(V::sub(sum, stored), V::add(V::sub(weight, V::sub(sum, part)), V::sub(delta, part)));
}
template <class V, class Half, class F = typename V::F>
inline F lost(Half, F, F, F sum, F stored) {
    return V::sub(sum, stored);
}

template <class V, class S, bool WRITE>
[[gnu::always_inline]] inline void finish(typename S::Store* weight, uint32_t valid, typename V::F delta, Sums<V>& sums,
                                          TileStats& stats) {
    const typename V::F old = V::widen(S{}, V::bits(S{}, weight));
    const typename V::F sum = V::unless_zero(delta, V::add(old, delta), old);
    const auto bits = V::round(S{}, sum);
    const typename V::F stored = V::widen(S{}, bits);
    if (WRITE) V::store(S{}, weight, bits);

    const uint32_t updated = V::nonzero(delta) & valid, bad = V::not_finite(stored) & valid;
    sums.updated += __builtin_popcount(updated);
    sums.unchanged += __builtin_popcount(updated & V::equal(stored, old));
    if (__builtin_expect(bad, 0)) record_not_finite<V>(bad, sum, stats);
    sums.relative = V::max(V::ratio(lost<V>(S{}, old, delta, sum, stored), sum), sums.relative);
    V::square_into(delta, sums.square);
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

// The last panel of a row whose length is no multiple of 16, through a padded copy. Not inlined: its calls of memcpy
// would push the sums of the main loop out of the registers.
template <class V, class S, bool WRITE, int ROWS>
[[gnu::noinline]] void merge_tail(const RowBlock& block, int64_t row, int64_t col, Sums<V>& sums, TileStats& stats) {
    using Store = typename S::Store;
    typename V::F delta[ROWS];
    accumulate<V, ROWS>(block.panel + col * block.rank, block.coef + row * block.rank, block.rank, delta);
    const int64_t left = block.cols - col;
    for (int i = 0; i < ROWS; ++i) {
        Store* weight = static_cast<Store*>(block.weight) + (row + i) * block.stride + col;
        Store rest[LANES] = {};
        memcpy(rest, weight, left * sizeof(Store));
        finish<V, S, WRITE>(rest, (1u << left) - 1u, delta[i], sums, stats);
        if (WRITE) memcpy(weight, rest, left * sizeof(Store));
    }
}

template <class V, class S, bool WRITE, int ROWS>
[[gnu::always_inline]] inline void merge_block(const RowBlock& block, int64_t row, Sums<V>& sums, TileStats& stats) {
    using Store = typename S::Store;
    const float* coef = block.coef + row * block.rank;
    Store* weight = static_cast<Store*>(block.weight) + row * block.stride;
    int64_t col = 0;
    for (; col + LANES <= block.cols; col += LANES) {
        typename V::F delta[ROWS];
        accumulate<V, ROWS>(block.panel + col * block.rank, coef, block.rank, delta);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
            finish<V, S, WRITE>(weight + i * block.stride + col, 0xffffu, delta[i], sums, stats);
        }
    }
    if (col < block.cols) {
        Sums<V> tail = sums;  // a copy, so that `sums` itself has no address
        merge_tail<V, S, WRITE, ROWS>(block, row, col, tail, stats);
        sums = tail;
    }
}

template <class V, class S, bool WRITE>
void merge_rows_of(const RowBlock& block, TileStats& stats) {
    Sums<V> sums;
    int64_t row = 0;
    for (; row + ROW_BLOCK <= block.rows; row += ROW_BLOCK) {
        merge_block<V, S, WRITE, ROW_BLOCK>(block, row, sums, stats);
    }
    for (; row < block.rows; ++row) merge_block<V, S, WRITE, 1>(block, row, sums, stats);
    stats.updated += sums.updated;
    stats.unchanged += sums.unchanged;
    stats.delta_square += V::sum(sums.square);
    alignas(64) float relative[LANES];
    V::store(F32{}, relative, sums.relative);
    for (float value : relative) stats.max_relative = larger(value, stats.max_relative);
}

template <class V>
void merge_rows(const RowBlock& block, TileStats& stats) {
    const auto run = [&](auto storage) {
        using S = decltype(storage);
        block.write ? merge_rows_of<V, S, true>(block, stats) : merge_rows_of<V, S, false>(block, stats);
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
