// Just enough of CUDA C++ to run a kernel on the host, a block at a time: threads are fibers that take turns at
// __syncthreads(). A barrier that not all threads reach ends the program. Tensor-core fragments hold the whole tile in
// every thread, so that what a warp does together is done by each of its threads alone, with the same result.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

struct Index {
    unsigned x;
};
inline Index threadIdx, blockIdx;

namespace host {

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(256 * 1024);
    bool done = false;
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline const std::function<void()>* body;

inline void enter() {
    (*body)();
    fibers[threadIdx.x].done = true;
}

// backward: the last thread first, so that a missing barrier shows in one of the two orders.
inline void run_block(unsigned block, unsigned threads, bool backward, const std::function<void()>& work) {
    fibers.resize(threads);
    body = &work;
    blockIdx.x = block;
    for (Fiber& fiber : fibers) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = &scheduler;
        fiber.done = false;
        makecontext(&fiber.context, enter, 0);
    }
    for (unsigned finished = 0; finished < threads;) {
        finished = 0;
        for (unsigned i = 0; i < threads; ++i) {
            threadIdx.x = backward ? threads - 1 - i : i;
            swapcontext(&scheduler, &fibers[threadIdx.x].context);
            finished += fibers[threadIdx.x].done;
        }
        if (finished && finished < threads) {
            fprintf(stderr, "%u of %u threads never reached a barrier\n", finished, threads);
            abort();
        }
    }
}

}  // namespace host

inline void __syncthreads() { swapcontext(&host::fibers[threadIdx.x].context, &host::scheduler); }

namespace wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
namespace precision {
struct tf32 {};
}
enum layout_t { mem_row_major };

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
    static constexpr int rows = std::is_same_v<Use, matrix_b> ? K : M;
    static constexpr int cols = std::is_same_v<Use, matrix_a> ? K : N;
    static constexpr int num_elements = rows * cols;
    float x[num_elements];  // row by row
};

inline float __float_to_tf32(float value) {  // ten bits behind the leading one, ties away from zero
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits = (bits + 0x1000u) & ~0x1fffu;
    memcpy(&value, &bits, 4);
    return value;
}

template <class Fragment>
void fill_fragment(Fragment& fragment, float value) {
    for (float& each : fragment.x) each = value;
}

template <class Use, int M, int N, int K, class T, class Layout>
void load_matrix_sync(fragment<Use, M, N, K, T, Layout>& out, const float* from, unsigned stride) {
    for (int i = 0; i < out.rows; ++i) {
        for (int j = 0; j < out.cols; ++j) {
            out.x[i * out.cols + j] = std::is_same_v<Layout, row_major> ? from[i * stride + j] : from[j * stride + i];
        }
    }
}

template <class Sum, class Left, class Right>
void mma_sync(Sum& out, const Left& a, const Right& b, const Sum& c) {
    for (int i = 0; i < out.rows; ++i) {
        for (int j = 0; j < out.cols; ++j) {
            float sum = c.x[i * out.cols + j];
            for (int k = 0; k < a.cols; ++k) sum += a.x[i * a.cols + k] * b.x[k * b.cols + j];
            out.x[i * out.cols + j] = sum;
        }
    }
}

template <class Sum>
void store_matrix_sync(float* to, const Sum& from, unsigned stride, layout_t) {
    for (int i = 0; i < from.rows; ++i) {
        for (int j = 0; j < from.cols; ++j) to[i * stride + j] = from.x[i * from.cols + j];
    }
}

}  // namespace wmma
