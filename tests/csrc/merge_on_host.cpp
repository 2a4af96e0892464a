// csrc/merge_kernel.cuh, the code that a GPU runs, on the host; called by test_merge_kernel.py.
#include "cuda_on_host.h"

#include "merge_kernel.cuh"

using namespace fastlora;

// figures: 12 a module, in the order of `told`. Returns the number of tiles.
extern "C" int64_t run_merge_kernel(const MergeItem* items, int64_t count, bool write, bool backward, double* figures) {
    const Table table(std::vector<MergeItem>(items, items + count));
    std::vector<TileRecord> records(table.tiles);
    memset(static_cast<void*>(records.data()), 0xff, records.size() * sizeof(TileRecord));
    for (int64_t tile = 0; tile < table.tiles; ++tile) {
        host::run_block(unsigned(tile), THREADS, backward, [&] {
            write ? merge_kernel<true>(table.items.data(), int(count), records.data())
                  : merge_kernel<false>(table.items.data(), int(count), records.data());
        });
    }
    for (const ItemReport& report : table.reports(records.data(), !write)) {
        const double told[] = {double(report.kept_rank), report.delta_square, report.lost_square,
                               double(report.updated), double(report.unchanged), double(report.not_finite),
                               report.largest, report.max_relative, double(report.bad_a), double(report.bad_b),
                               double(report.bad_gate), double(report.bad_residual)};
        figures = std::copy(std::begin(told), std::end(told), figures);
    }
    return table.tiles;
}
