// Merge on the CPU: threads over tiles of rows, the instruction set chosen at run time.
//
// A tile is TILE_ROWS rows of one weight. Its thread packs the column factor of the kept ranks into panels of 16
// columns (once for each weight and thread), computes the coefficients of its rows, and runs the loop of merge_rows.h.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <thread>

#ifdef FASTLORA_X86_64
#include <immintrin.h>
#endif

#include "checks.h"
#include "merge_isa.h"

namespace fastlora {

namespace {

constexpr int64_t TILE_ROWS = 32;
constexpr int64_t SMALL = 1 << 15;  // below so many elements a second thread costs more than it saves

std::vector<const Isa*> supported_isas() {
    std::vector<const Isa*> found{&scalar_isa};
#ifdef FASTLORA_X86_64
    __builtin_cpu_init();
    // Every processor with AVX2 and FMA has F16C.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2) found.push_back(&avx2_isa);
#ifdef FASTLORA_AVX512  // CMakeLists.txt leaves it out where the compiler cannot
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        found.push_back(&avx512_isa);
    }
#endif
#endif
    return found;
}

const Isa& isa_named(const std::string& name) {
    const std::vector<const Isa*> found = supported_isas();
    if (name == "auto") return *found.back();
    for (const Isa* isa : found) {
        if (name == isa->name) return *isa;
    }
    CHECK_ARG(false, "simd \"" << name << "\" is not among what this processor runs; see simd_levels()");
    return scalar_isa;
}

// Rounding to nearest and no flushing of subnormals while it lives, whatever torch.set_flush_denormal has set.
class DefaultFloatMode {
#ifdef FASTLORA_X86_64
    unsigned old_ = _mm_getcsr();

public:
    DefaultFloatMode() { _mm_setcsr(0x1f80); }
    ~DefaultFloatMode() { _mm_setcsr(old_); }
#else
public:
    DefaultFloatMode() {}
#endif
    DefaultFloatMode(const DefaultFloatMode&) = delete;
};

// work(thread, index) for every index, each once, handed out in order; with fewer threads if the system gives no more.
template <class Work>
void parallel_for(int64_t count, int threads, const Work& work) {
    std::atomic<int64_t> next{0};
    const auto loop = [&](int thread) {
        const DefaultFloatMode mode;
        for (int64_t i = next++; i < count; i = next++) work(thread, i);
    };
    std::vector<std::thread> others;
    others.reserve(threads);
    try {
        for (int thread = 1; thread < std::min<int64_t>(threads, count); ++thread) others.emplace_back(loop, thread);
    } catch (const std::exception&) {
        // The threads that exist, this one among them, share the work.
    }
    loop(0);
    for (std::thread& other : others) other.join();
}

struct Task {
    Oriented item;
    std::vector<int64_t> kept;       // ranks with gate != 0, in order
    std::vector<float> scaled_gate;  // of the kept ranks
    int64_t first_tile;
};

struct Scratch {  // of one thread
    int64_t task = -1;                // whose column factor lies in `panel`
    std::vector<float> panel, coef;   // see RowBlock
    std::vector<double> col_max;      // [rank]: largest |column factor|
};

struct Plan {
    std::vector<Task> tasks;
    int64_t tiles = 0, elements = 0;
    std::vector<Scratch> scratch;
    std::vector<TileStats> stats;

    Plan(const std::vector<MergeItem>& items, int threads) {
        const DefaultFloatMode mode;
        size_t panel = 0, coef = 0, ranks = 0;
        for (const MergeItem& item : items) {
            Task task{orient(item), {}, {}, tiles};
            for (int64_t r = 0; r < task.item.rank; ++r) {
                if (item.gate[r] == 0) continue;
                task.kept.push_back(r);
                task.scaled_gate.push_back(fastlora::scaled_gate(item.scaling, item.gate[r]));
            }
            const size_t kept = task.kept.size();
            if (kept && task.item.cols) tiles += (task.item.rows + TILE_ROWS - 1) / TILE_ROWS;
            elements += task.item.rows * task.item.cols;
            panel = std::max(panel, kept * ((task.item.cols + LANES - 1) / LANES * LANES));
            coef = std::max(coef, kept * TILE_ROWS);
            ranks = std::max(ranks, kept);
            tasks.push_back(std::move(task));
        }
        const int wanted = elements < SMALL ? 1 : int(std::max<int64_t>(1, std::min<int64_t>(threads, tiles)));
        scratch.resize(wanted);
        for (Scratch& mine : scratch) mine.panel.resize(panel), mine.coef.resize(coef), mine.col_max.resize(ranks);
        stats.resize(tiles);
    }

    int64_t task_of(int64_t tile) const {
        const auto after = std::upper_bound(tasks.begin(), tasks.end(), tile,
                                            [](int64_t value, const Task& task) { return value < task.first_tile; });
        return after - tasks.begin() - 1;  // the last of several that start here: the others have no tile
    }

    std::vector<ItemReport> reports() const {
        std::vector<ItemReport> out(tasks.size());
        for (size_t i = 0; i < tasks.size(); ++i) out[i].kept_rank = int64_t(tasks[i].kept.size());
        for (int64_t tile = 0; tile < tiles; ++tile) out[task_of(tile)].add(stats[tile]);
        return out;
    }
};

void pack_columns(const Task& task, Scratch& scratch) {
    const int64_t cols = task.item.cols, rank = int64_t(task.kept.size());
    std::fill_n(scratch.col_max.begin(), rank, 0.0);
    for (int64_t col = 0; col < cols; col += LANES) {
        float* panel = scratch.panel.data() + col * rank;
        for (int64_t r = 0; r < rank; ++r) {
            for (int64_t lane = 0; lane < LANES; ++lane) {
                const bool inside = col + lane < cols;
                const float value =
                    inside ? factor_value(task.item.col, task.kept[r], col + lane, task.scaled_gate[r]) : 0.0f;
                panel[r * LANES + lane] = value;
                // Not std::max: it would drop a NaN.
                if (!(std::fabs(value) <= scratch.col_max[r])) scratch.col_max[r] = std::fabs(value);
            }
        }
    }
}

void* row_of(void* data, DType dtype, int64_t row, int64_t stride) {
    return static_cast<char*>(data) + row * stride * (dtype == DType::float32 ? 4 : dtype == DType::int8 ? 1 : 2);
}

RowBlock block_of(const Task& task, int64_t tile, Scratch& scratch, bool write) {
    const Oriented& item = task.item;
    const int64_t first = (tile - task.first_tile) * TILE_ROWS, rows = std::min(TILE_ROWS, item.rows - first);
    const int64_t rank = int64_t(task.kept.size());
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t r = 0; r < rank; ++r) {
            scratch.coef[i * rank + r] = factor_value(item.row, task.kept[r], first + i, task.scaled_gate[r]);
        }
    }
    void* residual = item.residual ? row_of(item.residual, item.residual_dtype, first, item.residual_stride) : nullptr;
    return {row_of(item.weight, item.dtype, first, item.stride), item.dtype, rows, item.cols, item.stride, rank,
            scratch.panel.data(), scratch.coef.data(), write, residual, item.residual_dtype, item.residual_stride,
            item.rounding, first};
}

float largest_of(DType dtype) {
    return dtype == DType::float32 ? F32::max : dtype == DType::float16 ? F16::max : BF16::max;
}

// True when |weight| + |delta| cannot reach the dtype's limit anywhere in the block: no element need be computed then.
bool surely_finite(const RowBlock& block, const Scratch& scratch, const Isa& isa) {
    double most = 0;
    for (int64_t i = 0; i < block.rows; ++i) {
        double delta = 0;
        for (int64_t r = 0; r < block.rank; ++r) {
            delta += std::fabs(double(block.coef[i * block.rank + r])) * scratch.col_max[r];
        }
        double reach = delta + double(isa.max_abs(block.dtype, row_of(block.weight, block.dtype, i, block.stride),
                                                  block.cols));
        if (block.residual && block.residual_dtype != DType::int8) {  // int8: half an ulp at most, within the 1 %
            const void* row = row_of(block.residual, block.residual_dtype, i, block.residual_stride);
            reach += double(isa.max_abs(block.residual_dtype, row, block.cols));
        }
        if (!(reach <= most)) most = reach;
        if (std::isnan(most)) return false;
    }
    return most * 1.01 < double(largest_of(block.dtype));  // 1 % covers the float32 rounding of 80,000 ranks
}

int64_t count_not_finite(const Matrix& matrix, const Isa& isa) {
    if (matrix.dtype == DType::int8) return 0;
    const bool by_rows = matrix.stride_col == 1;
    const int64_t lines = by_rows ? matrix.rows : matrix.cols, length = by_rows ? matrix.cols : matrix.rows;
    const int64_t from_line = by_rows ? matrix.stride_row : matrix.stride_col;
    const int64_t step = by_rows ? matrix.stride_col : matrix.stride_row;
    int64_t bad = 0;
    for (int64_t line = 0; line < lines; ++line) {
        const void* start = row_of(matrix.data, matrix.dtype, line, from_line);
        // the whole line in vectors, and one by one only where something is wrong
        if (step == 1 && is_finite(isa.max_abs(matrix.dtype, start, length))) continue;
        for (int64_t i = 0; i < length; ++i) bad += !is_finite(load_as_float(start, matrix.dtype, i * step));
    }
    return bad;
}

void run_tiles(Plan& plan, const Isa& isa, bool write, const std::vector<ItemReport>* inputs) {
    parallel_for(plan.tiles, int(plan.scratch.size()), [&](int thread, int64_t tile) {
        const int64_t index = plan.task_of(tile);
        if (inputs && (*inputs)[index].bad_inputs()) return;
        Scratch& scratch = plan.scratch[thread];
        if (scratch.task != index) pack_columns(plan.tasks[index], scratch);
        scratch.task = index;
        const RowBlock block = block_of(plan.tasks[index], tile, scratch, write);
        if (write || !surely_finite(block, scratch, isa)) isa.merge(block, plan.stats[tile]);
    });
}

}  // namespace

std::vector<std::string> simd_levels() {
    std::vector<std::string> names;
    for (const Isa* isa : supported_isas()) names.emplace_back(isa->name);
    return names;
}

std::vector<ItemReport> check_cpu(const std::vector<MergeItem>& items, int threads, const std::string& simd) {
    const Isa& isa = isa_named(simd);
    Plan plan(items, threads);
    std::vector<ItemReport> inputs(items.size());
    parallel_for(int64_t(items.size()), int(plan.scratch.size()), [&](int, int64_t i) {
        const Matrix gate{const_cast<float*>(items[i].gate), DType::float32, 1, items[i].lora_a.rows, 0, 1};
        inputs[i].bad_a = count_not_finite(items[i].lora_a, isa);
        inputs[i].bad_b = count_not_finite(items[i].lora_b, isa);
        inputs[i].bad_gate = count_not_finite(gate, isa);
        if (items[i].residual.data) inputs[i].bad_residual = count_not_finite(items[i].residual, isa);
    });
    run_tiles(plan, isa, false, &inputs);
    const std::vector<ItemReport> results = plan.reports();
    for (size_t i = 0; i < items.size(); ++i) {
        inputs[i].kept_rank = results[i].kept_rank;
        inputs[i].not_finite = results[i].not_finite;
        inputs[i].largest = results[i].largest;
    }
    return inputs;
}

std::vector<ItemReport> merge_cpu(const std::vector<MergeItem>& items, int threads, const std::string& simd) {
    const Isa& isa = isa_named(simd);
    Plan plan(items, threads);
    run_tiles(plan, isa, true, nullptr);
    return plan.reports();
}

void round_cpu(DType dtype, const float* source, void* target, int64_t count, const std::string& simd) {
    const DefaultFloatMode mode;
    isa_named(simd).round(dtype, source, target, count);
}

void widen_cpu(DType dtype, const void* source, float* target, int64_t count, const std::string& simd) {
    const DefaultFloatMode mode;
    isa_named(simd).widen(dtype, source, target, count);
}

}  // namespace fastlora
