// The merge kernel: all weights of a call in one launch over a table of tiles. Also compiled for the host, where
// tests/csrc/merge_on_host.cpp runs it block by block against merge_cpu.
//
// A block owns TILE_ROWS x TILE_COLS elements of one weight, a thread ROWS x COLS of them: eight elements side by side
// are 16 bytes in half precision. The block walks over the kept ranks in
// order, so each element sees the fused multiply-adds of merge_core.h in the order in which the CPU does them; weights in
// half precision with many kept ranks go to the tensor cores instead, where the FP32 cores would take longer than memory.
#pragma once

#include "merge.h"
#include "merge_rounding.h"

namespace fastlora {
namespace {

constexpr int WARP = 32, WARPS = 8, THREADS = WARP * WARPS;
constexpr int ROWS = 4, COLS = 8;                                // of a thread
constexpr int TILE_ROWS = ROWS * WARPS, TILE_COLS = COLS * WARP;  // of a block
constexpr int RANK_STEP = 16;                                    // ranks looked at together
constexpr int TENSOR_CORE_RANK = 24;  // from more kept ranks on; at 24 both take as long as reading and writing

struct DeviceItem {
    Oriented item;
    int64_t first_tile;
    int64_t col_tiles;
};

// Narrow, since a model of 7 billion parameters has 800,000 tiles. Of the adapters each tile tells its share: the first
// column of tiles looks at the row factor, the first row at the other.
struct TileRecord {
    double delta_square, lost_square;
    float largest, max_relative;
    int32_t updated, unchanged, not_finite, kept_rank, bad_row, bad_col, bad_gate, bad_residual;

    TileStats stats() const {
        TileStats out;
        out.delta_square = delta_square, out.lost_square = lost_square;
        out.largest = largest, out.max_relative = max_relative;
        out.updated = updated, out.unchanged = unchanged, out.not_finite = not_finite;
        return out;
    }
};

struct alignas(16) Four {
    float v[4];
};
template <class T>
struct alignas(sizeof(T) > 1 ? 16 : 8) Eight {  // one or two instructions to load or store
    T v[COLS];
};

struct Shared {
    union {
        struct {
            Four col[RANK_STEP][TILE_COLS / 4];  // columns in the order of `slot`
            Four row[RANK_STEP][TILE_ROWS / 4];
        } factor;
        Four delta[TILE_ROWS][TILE_COLS / 4];  // what the tensor cores made, columns in the order of `slot`
        double doubles[THREADS];
        int32_t integers[THREADS];
        float floats[THREADS];
    };
    float gate[RANK_STEP], sg[RANK_STEP];
    int64_t rank[RANK_STEP];
    int kept;
};

// Where column `col` of a tile lies in shared memory: the two fours of a thread apart, so that the 32 threads of a warp
// read 512 bytes side by side.
__device__ int slot(int col) { return col / 4 % 2 * (TILE_COLS / 2) + col / COLS * 4 + col % 4; }

// ---- which tile, which ranks

// The entries of `items` start at increasing tiles; the last one that starts at or before `tile` owns it.
__device__ int owner_of(const DeviceItem* items, int count, int64_t tile) {
    int low = 0, high = count - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (items[middle].first_tile <= tile) low = middle;
        else high = middle - 1;
    }
    return low;
}

__device__ int32_t kept_rank(const Oriented& item) {  // every thread counts: a broadcast read, and no barrier
    int32_t kept = 0;
    for (int64_t rank = 0; rank < item.rank; ++rank) kept += item.gate[rank] != 0;
    return kept;
}

// List the ranks from `base` on whose gate is not zero, in order.
__device__ void list_ranks(const Oriented& item, int64_t base, Shared& shared) {
    const int mine = int(threadIdx.x);
    if (mine < RANK_STEP) shared.gate[mine] = base + mine < item.rank ? item.gate[base + mine] : 0.0f;
    __syncthreads();  // also behind the last use of the list before
    if (mine < RANK_STEP) {
        int place = 0;
        for (int before = 0; before < mine; ++before) place += shared.gate[before] != 0;
        if (shared.gate[mine] != 0) {
            shared.rank[place] = base + mine;
            shared.sg[place] = scaled_gate(item.scaling, shared.gate[mine]);
        }
        if (mine == RANK_STEP - 1) shared.kept = place + (shared.gate[mine] != 0);
    }
    __syncthreads();
}

// The factors of the listed ranks; zero beyond the weight, and for ranks up to `padded`.
__device__ void load_factors(const Oriented& item, int64_t row0, int64_t col0, int padded, Shared& shared) {
    const auto value = [&](const Factor& factor, int j, int64_t pos, int64_t length) {
        if (j >= shared.kept || pos >= length) return 0.0f;
        return factor_value(factor, shared.rank[j], pos, shared.sg[j]);
    };
    for (int at = int(threadIdx.x); at < padded * TILE_COLS; at += THREADS) {
        const int j = at / TILE_COLS, i = at % TILE_COLS;
        shared.factor.col[j][slot(i) / 4].v[i % 4] = value(item.col, j, col0 + i, item.cols);
    }
    for (int at = int(threadIdx.x); at < padded * TILE_ROWS; at += THREADS) {
        const int j = at / TILE_ROWS, i = at % TILE_ROWS;
        shared.factor.row[j][i / 4].v[i % 4] = value(item.row, j, row0 + i, item.rows);
    }
    __syncthreads();
}

// ---- the update of a tile: delta[i][j] of this thread's rows i and columns j

__device__ void update_on_fp32_cores(const Oriented& item, int64_t row0, int64_t col0, Shared& shared,
                                     float (&delta)[ROWS][COLS]) {
    const int warp = int(threadIdx.x) / WARP, lane = int(threadIdx.x) % WARP;
    for (int64_t base = 0; base < item.rank; base += RANK_STEP) {
        list_ranks(item, base, shared);
        load_factors(item, row0, col0, shared.kept, shared);
        for (int r = 0; r < shared.kept; ++r) {
            const Four c = shared.factor.row[r][warp];
            const Four a[2] = {shared.factor.col[r][lane], shared.factor.col[r][TILE_COLS / 8 + lane]};
#pragma unroll
            for (int i = 0; i < ROWS; ++i) {
#pragma unroll
                for (int j = 0; j < COLS; ++j) delta[i][j] = multiply_add(c.v[i], a[j / 4].v[j % 4], delta[i][j]);
            }
        }
    }
}

// a * b in three products of TF32 parts: a = high + low, low * low is below float32's last digit.
template <class Fragment>
__device__ void split(Fragment& high, Fragment& low) {
    for (int i = 0; i < int(high.num_elements); ++i) {
        const float value = high.x[i];
        high.x[i] = wmma::__float_to_tf32(value);
        low.x[i] = wmma::__float_to_tf32(value - high.x[i]);
    }
}

// Each warp makes all 32 rows of 32 columns, in fragments of 16 x 16.
__device__ void update_on_tensor_cores(const Oriented& item, int64_t row0, int64_t col0, Shared& shared,
                                       float (&delta)[ROWS][COLS]) {
    constexpr int SIDE = 16, DEPTH = 8;
    using Left = wmma::fragment<wmma::matrix_a, SIDE, SIDE, DEPTH, wmma::precision::tf32, wmma::col_major>;
    using Right = wmma::fragment<wmma::matrix_b, SIDE, SIDE, DEPTH, wmma::precision::tf32, wmma::row_major>;
    wmma::fragment<wmma::accumulator, SIDE, SIDE, DEPTH, float> sum[2][2];
    const int warp = int(threadIdx.x) / WARP, lane = int(threadIdx.x) % WARP;
    for (auto& row : sum) {
        for (auto& each : row) wmma::fill_fragment(each, 0.0f);
    }
    for (int64_t base = 0; base < item.rank; base += RANK_STEP) {
        list_ranks(item, base, shared);
        const int padded = (shared.kept + DEPTH - 1) / DEPTH * DEPTH;
        load_factors(item, row0, col0, padded, shared);
        for (int r = 0; r < padded; r += DEPTH) {
            for (int n = 0; n < 2; ++n) {
                Right b, b_low;
                wmma::load_matrix_sync(b, shared.factor.col[r][0].v + warp * WARP + n * SIDE, TILE_COLS);
                split(b, b_low);
                for (int m = 0; m < 2; ++m) {
                    Left a, a_low;
                    wmma::load_matrix_sync(a, shared.factor.row[r][0].v + m * SIDE, TILE_ROWS);
                    split(a, a_low);
                    wmma::mma_sync(sum[m][n], a_low, b, sum[m][n]);
                    wmma::mma_sync(sum[m][n], a, b_low, sum[m][n]);
                    wmma::mma_sync(sum[m][n], a, b, sum[m][n]);
                }
            }
        }
    }
    __syncthreads();
    for (int m = 0; m < 2; ++m) {
        for (int n = 0; n < 2; ++n) {
            float* at = shared.delta[m * SIDE][0].v + warp * WARP + n * SIDE;
            wmma::store_matrix_sync(at, sum[m][n], TILE_COLS, wmma::mem_row_major);
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
#pragma unroll
        for (int j = 0; j < COLS; ++j) {
            delta[i][j] = shared.delta[warp * ROWS + i][j / 4 * (TILE_COLS / 8) + lane].v[j % 4];
        }
    }
}

// ---- storing it

template <class T>
__device__ bool wide(const T* at) {
    return reinterpret_cast<uintptr_t>(at) % alignof(Eight<T>) == 0;
}

template <class T>
__device__ Eight<T> load(const T* at, int count) {
    if (count == COLS && wide(at)) return *reinterpret_cast<const Eight<T>*>(at);
    Eight<T> out = {};
    for (int j = 0; j < COLS; ++j) {
        if (j < count) out.v[j] = at[j];
    }
    return out;
}

template <class T>
__device__ void store(T* at, int count, const Eight<T>& values) {
    if (count == COLS && wide(at)) {
        *reinterpret_cast<Eight<T>*>(at) = values;
        return;
    }
    for (int j = 0; j < COLS; ++j) {
        if (j < count) at[j] = values.v[j];
    }
}

struct Sums {  // of the 32 elements of a thread
    float square = 0, lost_square = 0, largest = 0;
    float worst_gone = 0, worst_sum = 1;  // whose ratio is the largest so far: compared by products, divided once
    int updated = 0, unchanged = 0, not_finite = 0, bad_residual = 0;
    double delta_square = 0;
};

template <class O>
__device__ void tally(const O& out, float delta, Sums& sums) {
    sums.square = multiply_add(delta, delta, sums.square);
    sums.lost_square = multiply_add(out.gone, out.gone, sums.lost_square);
    sums.updated += delta != 0;
    sums.unchanged += delta != 0 && out.stored == out.old;
    if (fabsf(out.gone) * sums.worst_sum > sums.worst_gone * fabsf(out.sum)) {
        sums.worst_gone = fabsf(out.gone), sums.worst_sum = fabsf(out.sum);
    }
    if (is_finite(out.stored)) return;
    sums.not_finite += 1;
    sums.largest = larger(fabsf(out.sum), sums.largest);
}

template <class S, class M, bool WRITE>
__device__ void finish(const Oriented& item, int64_t row0, int64_t col, const float (&delta)[ROWS][COLS], Sums& sums) {
    using Store = typename S::Store;
    using Kept = typename M::template Residual<S>::Store;
    if (col >= item.cols) return;
    const int count = item.cols - col < COLS ? int(item.cols - col) : COLS;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        if (row0 + i >= item.rows) break;
        Store* at = static_cast<Store*>(item.weight) + (row0 + i) * item.stride + col;
        Kept* rest = M::residual ? static_cast<Kept*>(item.residual) + (row0 + i) * item.residual_stride + col : nullptr;
        Eight<Store> weight = load(at, count);
        Eight<Kept> kept = {};
        if (M::residual) kept = load(rest, count);
        uint32_t word[COLS / 4][4] = {};
        for (int quad = 0; quad < COLS / 4 && M::draws; ++quad) {
            draws_of(item.rounding.seed, item.rounding.module, row0 + i, col / 4 + quad, word[quad]);
        }
#pragma unroll
        for (int j = 0; j < COLS; ++j) {
            if (j >= count) break;
            if constexpr (M::residual && !WRITE) {
                sums.bad_residual += !is_finite(residual_value(S{}, typename M::template Residual<S>{}, kept.v[j], 1.0f));
            }
            const auto out = M::merge(S{}, weight.v[j], kept.v[j], delta[i][j], word[j / 4][j % 4]);
            weight.v[j] = out.bits;
            kept.v[j] = out.kept;
            tally(out, delta[i][j], sums);
        }
        if (WRITE) store(at, count, weight);
        if (WRITE && M::residual) store(rest, count, kept);
    }
    // squares that leave float32's range are taken again
    const bool in_range = sums.square < 1e37f && sums.square >= 1e-26f * float(sums.updated);
    double exact = 0;
    for (int i = 0; i < ROWS && !in_range; ++i) {
        for (int j = 0; j < COLS; ++j) {
            if (row0 + i < item.rows && j < count) exact += double(delta[i][j]) * double(delta[i][j]);
        }
    }
    sums.delta_square = in_range ? double(sums.square) : exact;
}

template <class S, bool WRITE>
__device__ void finish_in(const Oriented& item, int64_t row0, int64_t col, const float (&delta)[ROWS][COLS],
                          Sums& sums) {
    if (item.residual && item.residual_dtype == DType::int8) {
        finish<S, Compensated<I8>, WRITE>(item, row0, col, delta, sums);
    } else if (item.residual) {
        finish<S, Compensated<S>, WRITE>(item, row0, col, delta, sums);
    } else if (item.rounding.stochastic && sizeof(typename S::Store) == 2) {
        finish<S, Stochastic, WRITE>(item, row0, col, delta, sums);
    } else {
        finish<S, Nearest, WRITE>(item, row0, col, delta, sums);
    }
}

// ---- the whole

template <class T, class Combine>
__device__ T reduce(T value, T* shared, Combine combine) {  // a fixed tree: the same sum in every run
    __syncthreads();
    shared[threadIdx.x] = value;
    for (int width = THREADS / 2; width > 0; width /= 2) {
        __syncthreads();
        if (int(threadIdx.x) < width) shared[threadIdx.x] = combine(shared[threadIdx.x], shared[threadIdx.x + width]);
    }
    __syncthreads();
    return shared[0];
}

// Non-finite values of one factor in this tile's share of positions, dead ranks included.
__device__ int32_t count_bad(const Factor& factor, int64_t rank, int64_t first, int length, int64_t end) {
    int32_t bad = 0;
    for (int64_t at = threadIdx.x; at < rank * length; at += THREADS) {
        const int64_t pos = first + at % length;
        bad += pos < end && !is_finite(factor_value(factor, at / length, pos, 1.0f));
    }
    return bad;
}

template <bool WRITE>
__global__ void __launch_bounds__(THREADS, 2) merge_kernel(const DeviceItem* items, int count, TileRecord* records) {
    __shared__ Shared shared;
    const int64_t tile = blockIdx.x;
    const DeviceItem& owner = items[owner_of(items, count, tile)];
    const Oriented& item = owner.item;
    const int64_t tile_row = (tile - owner.first_tile) / owner.col_tiles;
    const int64_t tile_col = (tile - owner.first_tile) % owner.col_tiles;
    const int64_t row0 = tile_row * TILE_ROWS, col0 = tile_col * TILE_COLS;
    const int32_t kept = kept_rank(item);

    Sums sums;
    if (kept > 0) {  // no kept rank: not even a NaN of the weight is looked at
        float delta[ROWS][COLS] = {};
        if (kept > TENSOR_CORE_RANK && item.dtype != DType::float32) {
            update_on_tensor_cores(item, row0, col0, shared, delta);
        } else {
            update_on_fp32_cores(item, row0, col0, shared, delta);
        }
        const int64_t row = row0 + int(threadIdx.x) / WARP * ROWS, col = col0 + int(threadIdx.x) % WARP * COLS;
        if (item.dtype == DType::float32) finish_in<F32, WRITE>(item, row, col, delta, sums);
        if (item.dtype == DType::float16) finish_in<F16, WRITE>(item, row, col, delta, sums);
        if (item.dtype == DType::bfloat16) finish_in<BF16, WRITE>(item, row, col, delta, sums);
    }

    const auto add = [](auto a, auto b) { return a + b; };
    const auto most = [](float a, float b) { return larger(a, b); };
    TileRecord record = {};
    record.delta_square = reduce(sums.delta_square, shared.doubles, add);
    record.lost_square = reduce(double(sums.lost_square), shared.doubles, add);
    record.largest = reduce(sums.largest, shared.floats, most);
    record.max_relative = reduce(sums.worst_gone / sums.worst_sum, shared.floats, most);
    record.updated = reduce(sums.updated, shared.integers, add);
    record.unchanged = reduce(sums.unchanged, shared.integers, add);
    record.not_finite = reduce(sums.not_finite, shared.integers, add);
    record.kept_rank = tile_row == 0 && tile_col == 0 ? kept : 0;
    if (!WRITE) {
        const Factor gate{item.gate, DType::float32, 1, 0, false};
        const bool first_row = tile_row == 0, first_col = tile_col == 0;
        const int32_t in_row = first_col ? count_bad(item.row, item.rank, row0, TILE_ROWS, item.rows) : 0;
        const int32_t in_col = first_row ? count_bad(item.col, item.rank, col0, TILE_COLS, item.cols) : 0;
        const int32_t in_gate = first_row && first_col ? count_bad(gate, item.rank, 0, 1, 1) : 0;
        record.bad_row = reduce(in_row, shared.integers, add);
        record.bad_col = reduce(in_col, shared.integers, add);
        record.bad_gate = reduce(in_gate, shared.integers, add);
        record.bad_residual = reduce(sums.bad_residual, shared.integers, add);
    }
    if (threadIdx.x == 0) records[tile] = record;
}

// ---- the table, made and read on the host

struct Table {
    std::vector<DeviceItem> items;
    int64_t tiles = 0;

    explicit Table(const std::vector<MergeItem>& source) {
        const auto tiles_of = [](int64_t size, int64_t tile) { return size > tile ? (size + tile - 1) / tile : 1; };
        for (const MergeItem& each : source) {
            const Oriented item = orient(each);
            const int64_t col_tiles = tiles_of(item.cols, TILE_COLS);
            items.push_back({item, tiles, col_tiles});
            tiles += tiles_of(item.rows, TILE_ROWS) * col_tiles;  // one at least, which counts the kept ranks
        }
    }

    int64_t table_bytes() const { return int64_t(items.size() * sizeof(DeviceItem)); }
    int64_t bytes() const { return table_bytes() + tiles * int64_t(sizeof(TileRecord)); }

    // Sums over the tiles of each item, in order.
    std::vector<ItemReport> reports(const TileRecord* records, bool checked) const {
        std::vector<ItemReport> out(items.size());
        for (size_t i = 0; i < items.size(); ++i) {
            const int64_t end = i + 1 < items.size() ? items[i + 1].first_tile : tiles;
            const bool swapped = items[i].item.col.scaled;  // the scaled factor is lora_b, however the weight is stored
            ItemReport& report = out[i];
            for (int64_t tile = items[i].first_tile; tile < end; ++tile) {
                const TileRecord& record = records[tile];
                report.add(record.stats());
                report.kept_rank += record.kept_rank;
                report.bad_a += swapped ? record.bad_row : record.bad_col;
                report.bad_b += swapped ? record.bad_col : record.bad_row;
                report.bad_gate += record.bad_gate, report.bad_residual += record.bad_residual;
            }
            // As on the CPU: what bad inputs lead to is not told beside them.
            if (checked && report.bad_inputs()) report.not_finite = 0, report.largest = 0;
        }
        return out;
    }
};

}  // namespace
}  // namespace fastlora
