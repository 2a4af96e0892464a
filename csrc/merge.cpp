// What the merges of all devices share: the two factors as a loop sees them, and sums over tiles.
#include "merge.h"

namespace fastlora {

void ItemReport::add(const TileStats& tile) {
    delta_square += tile.delta_square;
    updated += tile.updated;
    unchanged += tile.unchanged;
    not_finite += tile.not_finite;
    largest = larger(tile.largest, largest);
    max_relative = larger(tile.max_relative, max_relative);
    lost_square += tile.lost_square;
}

Oriented orient(const MergeItem& item) {
    const Matrix &w = item.weight, &a = item.lora_a, &b = item.lora_b;
    const Factor down{a.data, a.dtype, a.stride_row, a.stride_col, false};
    const Factor up{b.data, b.dtype, b.stride_col, b.stride_row, true};
    const Matrix& e = item.residual;
    Oriented out{w.data,       w.dtype, w.rows, w.cols,    w.stride_row, e.data, e.dtype, e.stride_row,
                 item.rounding, up,      down,   item.gate, item.scaling, a.rows};
    if (w.stride_col != 1) {
        out.rows = w.cols, out.cols = w.rows, out.stride = w.stride_col, out.residual_stride = e.stride_col;
        out.row = down, out.col = up;
    }
    return out;
}

}  // namespace fastlora
