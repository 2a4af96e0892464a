// AdamW with a proximal step on the gates, over every tensor of an optimizer in one call. Raw memory, no Python.
#pragma once

#include <cstdint>
#include <string>

namespace fastlora {

// One parameter tensor and its state, contiguous float32: a row of the table that fastlora/ops/prox_adamw.py builds.
// The kernel of triton_kernels/prox_adamw.py reads the same rows.
struct AdamTensor {
    float* param;       // [numel]
    const float* grad;  // [numel], or null: no AdamW step, which torch gives to a parameter without a gradient
    float* exp_avg;     // [numel]
    float* exp_avg_sq;  // [numel]
    float* step;        // steps taken so far
    int64_t numel;
    int64_t group;
    int64_t gate;  // place among the gate tensors, -1 for others
};

// What a parameter group is stepped with; kappa acts on its gates alone. The logarithms serve the GPU.
struct AdamGroup {
    double lr, beta1, beta2, eps, weight_decay, kappa, log_beta1, log_beta2;
};

// param, exp_avg, exp_avg_sq, step in place; then gate <- soft threshold, and kept[gate] = number of gates != 0.
// simd: "auto", "scalar" or "avx2"; every one gives the same bits, and so does every number of threads.
void prox_adamw_cpu(const AdamTensor* tensors, int64_t count, const AdamGroup* groups, bool released, int64_t* kept,
                    int threads, const std::string& simd);

}  // namespace fastlora
