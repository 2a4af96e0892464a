// Merge on CUDA devices: all weights of a call in one launch over a table of tiles, beside a small one that looks at
// the adapters.
//
// A block owns TILE_ROWS x TILE_COLS elements of one weight, one column a thread. It walks the kept ranks in order, so
// each element sees the fused multiply-adds of merge_core.h in the order in which the CPU does them.
#include <cuda_runtime.h>

#include <algorithm>

#include "checks.h"
#include "merge.h"

namespace fastlora {
namespace {

constexpr int TILE_ROWS = 32;
constexpr int TILE_COLS = 256;    // threads of a block
constexpr int RANK_STEP = 32;     // ranks looked at together, one for each lane of the first warp

struct DeviceItem {
    Oriented item;
    int64_t first_tile;
    int64_t col_tiles;
};

struct InputStats {
    int64_t kept_rank, bad_a, bad_b, bad_gate;
};

// ---- kernels

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

template <class T, class Combine>
__device__ T reduce(T value, T* shared, Combine combine) {  // a fixed tree: the same sum in every run
    __syncthreads();
    shared[threadIdx.x] = value;
    for (int width = TILE_COLS / 2; width > 0; width /= 2) {
        __syncthreads();
        if (threadIdx.x < width) shared[threadIdx.x] = combine(shared[threadIdx.x], shared[threadIdx.x + width]);
    }
    __syncthreads();
    return shared[0];
}

template <class S, bool WRITE>
__device__ void finish(const Oriented& item, int64_t row0, int64_t col, const float (&delta)[TILE_ROWS],
                       TileStats& mine) {
    using Store = typename S::Store;
    if (col >= item.cols) return;
#pragma unroll
    for (int i = 0; i < TILE_ROWS; ++i) {
        if (row0 + i >= item.rows) break;
        Store* at = static_cast<Store*>(item.weight) + (row0 + i) * item.stride + col;
        const float old = widen(S{}, *at), sum = delta[i] != 0 ? old + delta[i] : old;
        const Store bits = round_to(S{}, sum);
        const float stored = widen(S{}, bits);
        if (WRITE) *at = bits;

        mine.delta_square += double(delta[i]) * double(delta[i]);
        mine.updated += delta[i] != 0;
        mine.unchanged += delta[i] != 0 && stored == old;
        mine.max_relative = larger(fabsf(lost(S{}, old, delta[i], sum, stored)) / fabsf(sum), mine.max_relative);
        if (is_finite(stored)) continue;
        mine.not_finite += 1;
        mine.largest = larger(fabsf(sum), mine.largest);
    }
}

template <bool WRITE>
__global__ void __launch_bounds__(TILE_COLS) merge_kernel(const DeviceItem* items, int count, TileStats* stats) {
    __shared__ union {
        struct {
            float coef[RANK_STEP][TILE_ROWS], sg[RANK_STEP];
            int64_t rank[RANK_STEP];
            int kept;
        } step;
        double doubles[TILE_COLS];
        int64_t integers[TILE_COLS];
        float floats[TILE_COLS];
    } shared;

    const int64_t tile = blockIdx.x;
    const DeviceItem& mine = items[owner_of(items, count, tile)];
    const Oriented& item = mine.item;
    const int64_t row0 = (tile - mine.first_tile) / mine.col_tiles * TILE_ROWS;
    const int64_t col = (tile - mine.first_tile) % mine.col_tiles * TILE_COLS + threadIdx.x;

    float delta[TILE_ROWS] = {};  // [TILE_ROWS] of this thread's column
    bool any = false;
    for (int64_t base = 0; base < item.rank; base += RANK_STEP) {
        __syncthreads();
        if (threadIdx.x < 32) {  // the first warp lists the ranks whose gate is not zero, in order
            const int64_t rank = base + threadIdx.x;
            const float gate = rank < item.rank ? item.gate[rank] : 0.0f;
            const unsigned live = __ballot_sync(0xffffffffu, gate != 0);
            if (gate != 0) {
                const int place = __popc(live & ((1u << threadIdx.x) - 1u));
                shared.step.rank[place] = rank;
                shared.step.sg[place] = scaled_gate(item.scaling, gate);
            }
            if (threadIdx.x == 0) shared.step.kept = __popc(live);
        }
        __syncthreads();
        const int kept = shared.step.kept;
        any = any || kept > 0;
        for (int at = threadIdx.x; at < kept * TILE_ROWS; at += TILE_COLS) {
            const int j = at / TILE_ROWS, i = at % TILE_ROWS;
            const bool inside = row0 + i < item.rows;
            shared.step.coef[j][i] =
                inside ? factor_value(item.row, shared.step.rank[j], row0 + i, shared.step.sg[j]) : 0.0f;
        }
        __syncthreads();
        for (int j = 0; j < kept && col < item.cols; ++j) {
            const float a = factor_value(item.col, shared.step.rank[j], col, shared.step.sg[j]);
#pragma unroll
            for (int i = 0; i < TILE_ROWS; ++i) delta[i] = multiply_add(shared.step.coef[j][i], a, delta[i]);
        }
    }

    TileStats sums;
    if (any) {  // no kept rank: not even a NaN of the weight is looked at
        if (item.dtype == DType::float32) finish<F32, WRITE>(item, row0, col, delta, sums);
        if (item.dtype == DType::float16) finish<F16, WRITE>(item, row0, col, delta, sums);
        if (item.dtype == DType::bfloat16) finish<BF16, WRITE>(item, row0, col, delta, sums);
    }
    const auto add = [](auto a, auto b) { return a + b; };
    const auto most = [](float a, float b) { return larger(a, b); };
    sums.delta_square = reduce(sums.delta_square, shared.doubles, add);
    sums.updated = reduce(sums.updated, shared.integers, add);
    sums.unchanged = reduce(sums.unchanged, shared.integers, add);
    sums.not_finite = reduce(sums.not_finite, shared.integers, add);
    sums.largest = reduce(sums.largest, shared.floats, most);
    sums.max_relative = reduce(sums.max_relative, shared.floats, most);
    if (threadIdx.x == 0) stats[tile] = sums;
}

// One block a weight: kept ranks, and non-finite values of its adapter.
__global__ void __launch_bounds__(TILE_COLS) inputs_kernel(const DeviceItem* items, InputStats* stats) {
    __shared__ int64_t shared[TILE_COLS];
    const Oriented& item = items[blockIdx.x].item;
    const auto count = [&](const Factor& factor, int64_t length) {
        int64_t bad = 0;
        for (int64_t rank = 0; rank < item.rank; ++rank) {
            for (int64_t pos = threadIdx.x; pos < length; pos += TILE_COLS) {
                bad += !is_finite(factor_value(factor, rank, pos, 1.0f));
            }
        }
        return reduce(bad, shared, [](int64_t a, int64_t b) { return a + b; });
    };
    int64_t kept = 0;
    for (int64_t rank = threadIdx.x; rank < item.rank; rank += TILE_COLS) kept += item.gate[rank] != 0;
    kept = reduce(kept, shared, [](int64_t a, int64_t b) { return a + b; });
    const Factor gate{item.gate, DType::float32, 1, 0, false};
    const int64_t bad_gate = count(gate, 1), in_row = count(item.row, item.rows), in_col = count(item.col, item.cols);
    // The scaled factor is lora_b, whichever way the weight is stored.
    if (threadIdx.x == 0) {
        stats[blockIdx.x] = {kept, item.row.scaled ? in_col : in_row, item.row.scaled ? in_row : in_col, bad_gate};
    }
}

// ---- launchers

class OnDevice {
    int old_ = 0;

public:
    explicit OnDevice(int device) {
        CHECK_CUDA(cudaGetDevice(&old_));
        CHECK_CUDA(cudaSetDevice(device));
    }
    ~OnDevice() { cudaSetDevice(old_); }
    OnDevice(const OnDevice&) = delete;
};

struct Table {
    std::vector<DeviceItem> items;
    int64_t tiles = 0;

    explicit Table(const std::vector<MergeItem>& source) {
        for (const MergeItem& each : source) {
            const Oriented item = orient(each);
            const int64_t col_tiles = (item.cols + TILE_COLS - 1) / TILE_COLS;
            items.push_back({item, tiles, std::max<int64_t>(col_tiles, 1)});
            if (item.rank) tiles += (item.rows + TILE_ROWS - 1) / TILE_ROWS * col_tiles;
        }
        CHECK_ARG(tiles < (int64_t(1) << 31), "the weights of one call make " << tiles << " tiles; at most 2^31 - 1");
    }
};

// The workspace: items, then the figures of their inputs, then those of the tiles; all of them 8-byte things.
struct Workspace {
    DeviceItem* items;
    InputStats* inputs;
    TileStats* tiles;

    Workspace(void* start, const Table& table)
        : items(static_cast<DeviceItem*>(start)),
          inputs(reinterpret_cast<InputStats*>(items + table.items.size())),
          tiles(reinterpret_cast<TileStats*>(inputs + table.items.size())) {}
};

template <bool WRITE>
std::vector<ItemReport> launch(const std::vector<MergeItem>& source, int device, void* start, void* stream_ptr) {
    std::vector<ItemReport> reports(source.size());
    if (source.empty()) return reports;
    const Table table(source);
    std::vector<InputStats> inputs(source.size());
    std::vector<TileStats> tiles(table.tiles);

    const OnDevice guard(device);
    const auto stream = static_cast<cudaStream_t>(stream_ptr);
    const Workspace space(start, table);
    const size_t item_bytes = table.items.size() * sizeof(DeviceItem);
    CHECK_CUDA(cudaMemcpyAsync(space.items, table.items.data(), item_bytes, cudaMemcpyHostToDevice, stream));
    inputs_kernel<<<unsigned(source.size()), TILE_COLS, 0, stream>>>(space.items, space.inputs);
    CHECK_LAUNCH();
    const size_t input_bytes = inputs.size() * sizeof(InputStats), tile_bytes = tiles.size() * sizeof(TileStats);
    CHECK_CUDA(cudaMemcpyAsync(inputs.data(), space.inputs, input_bytes, cudaMemcpyDeviceToHost, stream));
    if (table.tiles) {
        const int count = int(source.size());
        merge_kernel<WRITE><<<unsigned(table.tiles), TILE_COLS, 0, stream>>>(space.items, count, space.tiles);
        CHECK_LAUNCH();
        CHECK_CUDA(cudaMemcpyAsync(tiles.data(), space.tiles, tile_bytes, cudaMemcpyDeviceToHost, stream));
    }
    CHECK_CUDA(cudaStreamSynchronize(stream));

    for (size_t i = 0; i < source.size(); ++i) {
        const int64_t end = i + 1 < source.size() ? table.items[i + 1].first_tile : table.tiles;
        for (int64_t tile = table.items[i].first_tile; tile < end; ++tile) reports[i].add(tiles[tile]);
        reports[i].kept_rank = inputs[i].kept_rank;
        if (WRITE) continue;
        const auto [kept, bad_a, bad_b, bad_gate] = inputs[i];
        reports[i].bad_a = bad_a, reports[i].bad_b = bad_b, reports[i].bad_gate = bad_gate;
        // As on the CPU: what bad inputs lead to is not told beside them.
        if (bad_a || bad_b || bad_gate) reports[i].not_finite = 0, reports[i].largest = 0;
    }
    return reports;
}

}  // namespace

std::string cuda_obstacle(int device) {
    int driver = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no CUDA driver answers";
    if (driver / 1000 < CUDART_VERSION / 1000) {
        std::ostringstream text;
        text << "the driver knows CUDA " << driver / 1000 << "." << driver % 1000 / 10
             << " and fastlora._C was built with CUDA " << CUDART_VERSION / 1000 << "." << CUDART_VERSION % 1000 / 10;
        return text.str();
    }
    try {
        const OnDevice guard(device);
        cudaFuncAttributes attributes;
        const cudaError_t status = cudaFuncGetAttributes(&attributes, merge_kernel<true>);
        if (status == cudaSuccess) return "";
        cudaGetLastError();  // clear it
        return std::string("fastlora._C has no code for this device: ") + cudaGetErrorString(status);
    } catch (const std::runtime_error& error) {
        return error.what();
    }
}

int64_t cuda_workspace(const std::vector<MergeItem>& items) {
    const Table table(items);
    return int64_t(items.size()) * int64_t(sizeof(DeviceItem) + sizeof(InputStats)) +
           table.tiles * int64_t(sizeof(TileStats));
}

std::vector<ItemReport> check_cuda(const std::vector<MergeItem>& items, int device, void* workspace, void* stream) {
    return launch<false>(items, device, workspace, stream);
}

std::vector<ItemReport> merge_cuda(const std::vector<MergeItem>& items, int device, void* workspace, void* stream) {
    return launch<true>(items, device, workspace, stream);
}

}  // namespace fastlora
