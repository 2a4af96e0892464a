// AdamW and the proximal step on the CPU: one pass over param, grad and state, threads over chunks of them.
//
// The operations and their order are those of torch's AdamW on a CPU, fused products and sums included, so that the
// state has the same bits. The parameters differ where torch's sqrt, which may be MKL's, is an ulp off.
#include "prox_adamw.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <thread>
#include <vector>

#include "checks.h"
#include "merge.h"

namespace fastlora {
namespace {

constexpr int64_t SMALL = 1 << 15;  // below so many elements a second thread costs more than it saves

// Scalars of one tensor's step, computed in double and rounded once, as torch does.
struct Factors {
    float decay, weight1, beta2, weight2, bias2_sqrt, eps, minus_step_size;
};

Factors factors_of(const AdamGroup& group, double step) {
    const double bias1 = 1 - std::pow(group.beta1, step), bias2 = 1 - std::pow(group.beta2, step);
    return {float(1 - group.lr * group.weight_decay),
            float(1 - group.beta1),
            float(group.beta2),
            float(1 - group.beta2),
            float(std::sqrt(bias2)),
            float(group.eps),
            float(-(group.lr / bias1))};
}

// Inlined into one function for each instruction set, which the compiler vectorizes for that set.
template <bool SMALL_WEIGHT, bool DECAY>
[[gnu::always_inline]] inline void adamw_range(float* __restrict param, const float* __restrict grad,
                                               float* __restrict exp_avg, float* __restrict exp_avg_sq, int64_t count,
                                               const Factors& f) {
    const float decay = f.decay, weight1 = f.weight1, beta2 = f.beta2, weight2 = f.weight2;
    const float bias2_sqrt = f.bias2_sqrt, eps = f.eps, minus_step_size = f.minus_step_size;
    for (int64_t i = 0; i < count; ++i) {
        const float g = grad[i], difference = g - exp_avg[i];
        // torch.lerp: from the end that is nearer
        const float m = SMALL_WEIGHT ? std::fma(weight1, difference, exp_avg[i]) : std::fma(weight1 - 1, difference, g);
        const float v = std::fma(weight2 * g, g, exp_avg_sq[i] * beta2);  // torch.addcmul
        const float denominator = std::sqrt(v) / bias2_sqrt + eps;
        const float p = DECAY ? param[i] * decay : param[i];
        exp_avg[i] = m;
        exp_avg_sq[i] = v;
        param[i] = p + minus_step_size * m / denominator;
    }
}

[[gnu::always_inline]] inline void adamw_any(const AdamTensor& t, int64_t first, int64_t count, const Factors& f) {
    const bool small = std::fabs(f.weight1) < 0.5f, decay = f.decay != 1.0f;
    float *p = t.param + first, *m = t.exp_avg + first, *v = t.exp_avg_sq + first;
    const float* g = t.grad + first;
    if (small && !decay) adamw_range<true, false>(p, g, m, v, count, f);
    if (small && decay) adamw_range<true, true>(p, g, m, v, count, f);
    if (!small && !decay) adamw_range<false, false>(p, g, m, v, count, f);
    if (!small && decay) adamw_range<false, true>(p, g, m, v, count, f);
}

using Range = void (*)(const AdamTensor&, int64_t, int64_t, const Factors&);

void adamw_scalar(const AdamTensor& t, int64_t first, int64_t count, const Factors& f) {
    adamw_any(t, first, count, f);
}
#ifdef FASTLORA_X86_64
[[gnu::target("avx2,fma")]] void adamw_avx2(const AdamTensor& t, int64_t first, int64_t count, const Factors& f) {
    adamw_any(t, first, count, f);
}
#endif

// AVX-512 gains nothing here: the loop waits for memory.
Range range_named(const std::string& name) {
    CHECK_ARG(name == "auto" || name == "scalar" || name == "avx2",
              "simd \"" << name << "\" is unknown; it must be auto, scalar or avx2");
#ifdef FASTLORA_X86_64
    const std::vector<std::string> levels = simd_levels();
    const bool runs_avx2 = std::find(levels.begin(), levels.end(), "avx2") != levels.end();
    CHECK_ARG(runs_avx2 || name != "avx2", "this processor has no AVX2; pass simd=\"auto\"");
    if (runs_avx2 && name != "scalar") return adamw_avx2;
#else
    CHECK_ARG(name != "avx2", "this processor has no AVX2; pass simd=\"auto\"");
#endif
    return adamw_scalar;
}

// fastlora/reference.py, soft_threshold
float soft_threshold(float v, float kappa, bool released) {
    const float size = std::fabs(v), shrunk = v > 0 ? v - kappa : v < 0 ? v + kappa : v;
    if (!released) return size <= kappa && kappa > 0 ? 0.0f : shrunk;
    const float moved = size > kappa ? shrunk : v;
    return std::fabs(moved) < kappa ? 0.0f : moved;
}

int64_t threshold_and_count(float* gate, int64_t count, float kappa, bool released) {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (kappa > 0) gate[i] = soft_threshold(gate[i], kappa, released);
        kept += gate[i] != 0;  // a NaN is no zero
    }
    return kept;
}

// work(part) for each part once, each in a thread of its own, or here where the system gives no more.
template <class Work>
void run_parts(int64_t parts, const Work& work) {
    std::vector<std::thread> others;
    others.reserve(parts);
    try {
        while (int64_t(others.size()) + 1 < parts) others.emplace_back(work, int64_t(others.size()) + 1);
    } catch (const std::exception&) {
        for (int64_t part = int64_t(others.size()) + 1; part < parts; ++part) work(part);
    }
    work(0);
    for (std::thread& other : others) other.join();
}

}  // namespace

void prox_adamw_cpu(const AdamTensor* tensors, int64_t count, const AdamGroup* groups, bool released, int64_t* kept,
                    int threads, const std::string& simd) {
    const Range range = range_named(simd);
    std::vector<Factors> factors(count);
    std::vector<int64_t> before(count + 1, 0);  // elements of the tensors before each
    for (int64_t i = 0; i < count; ++i) {
        const AdamTensor& t = tensors[i];
        before[i + 1] = before[i] + (t.grad ? t.numel : 0);
        if (!t.grad) continue;
        *t.step += 1;
        // pow is slow, and neighbours are nearly always at the same step of the same group
        const AdamTensor& last = tensors[i ? i - 1 : 0];
        const bool known = i && last.grad && last.group == t.group && *last.step == *t.step;
        factors[i] = known ? factors[i - 1] : factors_of(groups[t.group], double(*t.step));
    }
    const int64_t total = before[count], parts = total < SMALL ? 1 : std::max(threads, 1);
    const int64_t share = (total + parts - 1) / parts;
    run_parts(parts, [&](int64_t part) {
        const int64_t begin = std::min(part * share, total), end = std::min(begin + share, total);
        int64_t i = std::upper_bound(before.begin(), before.end(), begin) - before.begin() - 1;
        for (; i < count && before[i] < end; ++i) {
            const int64_t first = std::max(begin, before[i]), last = std::min(end, before[i + 1]);
            if (first < last) range(tensors[i], first - before[i], last - first, factors[i]);
        }
    });
    for (int64_t i = 0; i < count; ++i) {
        const AdamTensor& t = tensors[i];
        if (t.gate < 0) continue;
        kept[t.gate] = threshold_and_count(t.param, t.numel, float(groups[t.group].kappa), released);
    }
}

}  // namespace fastlora
