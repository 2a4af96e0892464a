// What a merge is given, what it tells, and the functions that do it. Raw memory, strides in elements, no Python.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "merge_core.h"

namespace fastlora {

// Somebody's two-dimensional memory.
struct Matrix {
    void* data;
    DType dtype;
    int64_t rows, cols;
    int64_t stride_row, stride_col;
};

// How sums become weights where no residual keeps what is dropped: to nearest even, or at random by seed and module.
struct Rounding {
    bool stochastic;
    uint64_t seed;
    uint32_t module;
};

// weight += scaling * lora_b @ diag(gate) @ lora_a
struct MergeItem {
    Matrix weight;      // [N, K], one of its strides is 1
    Matrix lora_a;      // [R, K]
    Matrix lora_b;      // [N, R]
    const float* gate;  // [R], effective (already thresholded), contiguous, where the weight is
    double scaling;
    Matrix residual;    // [N, K] of the weight's dtype or int8, its unit stride where the weight's is; data null: none
    Rounding rounding;
};

// Sums over one tile of a weight. Tiles do not depend on the number of threads, so neither do their sums.
struct TileStats {
    double delta_square = 0;  // sum of delta^2
    int64_t updated = 0;      // elements with delta != 0
    int64_t unchanged = 0;    // of these, the ones whose stored value did not change
    int64_t not_finite = 0;   // results that are infinite or NaN in the weight's dtype
    float largest = 0;        // of these, the largest |weight + delta| in float32
    float max_relative = 0;   // largest |lost| / |weight + delta|
    double lost_square = 0;   // sum of lost^2; lost: what neither the weight nor its residual holds of the sum
};

struct ItemReport : TileStats {
    int64_t kept_rank = 0;                      // gates != 0; the others are never visited
    // non-finite values, dead ranks included; counted by a check alone
    int64_t bad_a = 0, bad_b = 0, bad_gate = 0, bad_residual = 0;
    bool bad_inputs() const { return bad_a || bad_b || bad_gate || bad_residual; }
    void add(const TileStats& tile);
};

// The two factors of the update as the loops see them: `row` varies down the weight's storage, `col` along its unit
// stride. For transposed storage (stride_row == 1) the roles of lora_a and lora_b change places, and the products stay
// the same ones, bit for bit.
struct Factor {
    const void* data;
    DType dtype;
    int64_t stride_rank, stride_pos;
    bool scaled;  // lora_b: multiplied by scaling * gate
};

struct Oriented {
    void* weight;
    DType dtype;
    int64_t rows, cols, stride;  // of the weight; stride from row to row
    void* residual;
    DType residual_dtype;
    int64_t residual_stride;
    Rounding rounding;
    Factor row, col;
    const float* gate;
    double scaling;
    int64_t rank;
};

Oriented orient(const MergeItem& item);

FASTLORA_HD float load_as_float(const void* data, DType dtype, int64_t index) {
    if (dtype == DType::float32) return static_cast<const float*>(data)[index];
    if (dtype == DType::int8) return static_cast<const int8_t*>(data)[index];
    const uint16_t stored = static_cast<const uint16_t*>(data)[index];
    return dtype == DType::float16 ? widen(F16{}, stored) : widen(BF16{}, stored);
}

FASTLORA_HD float factor_value(const Factor& factor, int64_t rank, int64_t pos, float sg) {
    const float value = load_as_float(factor.data, factor.dtype, rank * factor.stride_rank + pos * factor.stride_pos);
    return factor.scaled ? value * sg : value;
}

// ---- CPU. simd: "auto" or one of simd_levels(); every level gives the same bits, statistics included.

std::vector<std::string> simd_levels();  // what this processor runs, slowest first
// Read only: non-finite adapters, and results that are not finite. The other figures are left at zero.
std::vector<ItemReport> check_cpu(const std::vector<MergeItem>& items, int threads, const std::string& simd);
// Writes every weight. Whatever can fail, memory and threads, is had before the first write.
std::vector<ItemReport> merge_cpu(const std::vector<MergeItem>& items, int threads, const std::string& simd);
void round_cpu(DType dtype, const float* source, void* target, int64_t count, const std::string& simd);
void widen_cpu(DType dtype, const void* source, float* target, int64_t count, const std::string& simd);

// ---- CUDA. All items lie on `device`. The first two enqueue on `stream` and return; whoever wants the reports copies
// the workspace to the host, which waits.

struct WorkspaceSize {
    int64_t table, whole;  // bytes
};

struct Workspace {
    void* device;  // WorkspaceSize::whole bytes on the device
    void* table;   // WorkspaceSize::table bytes of pinned memory, left alone until the stream has passed
};

#ifdef FASTLORA_CUDA
// Why this device cannot run the kernels (driver, architecture), or "".
std::string cuda_obstacle(int device);
WorkspaceSize cuda_workspace(const std::vector<MergeItem>& items);
void check_cuda(const std::vector<MergeItem>& items, int device, const Workspace& space, void* stream);
void merge_cuda(const std::vector<MergeItem>& items, int device, const Workspace& space, void* stream);
// copy: of the workspace, on the host. checked: after check_cuda.
std::vector<ItemReport> cuda_reports(const std::vector<MergeItem>& items, const void* copy, bool checked);
#endif

}  // namespace fastlora
