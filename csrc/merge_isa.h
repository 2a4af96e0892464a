// A block of rows as the loops see it, and the table of loops that each instruction set fills: merge_rows.h writes them
// once, merge_scalar.cpp, merge_avx2.cpp and merge_avx512.cpp compile them, merge_cpu.cpp chooses.
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
    void* residual;      // or null
    DType residual_dtype;
    int64_t residual_stride;
    Rounding rounding;
    int64_t first_row;   // in the weight's storage
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

}  // namespace fastlora
