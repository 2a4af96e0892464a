// The Python module fastlora._C: addresses, sizes and strides in, reports out. fastlora/ops/ alone calls it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "checks.h"
#include "merge.h"
#include "prox_adamw.h"

namespace py = pybind11;
using namespace fastlora;

namespace {

Matrix make_matrix(uintptr_t data, DType dtype, int64_t rows, int64_t cols, int64_t stride_row, int64_t stride_col) {
    CHECK_ARG(rows >= 0 && cols >= 0, "shape is [" << rows << ", " << cols << "]; sizes must be >= 0");
    CHECK_ARG(data != 0 || rows == 0 || cols == 0, "address is 0 for [" << rows << ", " << cols << "] elements");
    CHECK_ARG(stride_row >= 0 && stride_col >= 0,
              "strides are [" << stride_row << ", " << stride_col << "]; they must be >= 0");
    return {reinterpret_cast<void*>(data), dtype, rows, cols, stride_row, stride_col};
}

void check_residual(const Matrix& weight, const Matrix& residual) {
    CHECK_ARG(residual.rows == weight.rows && residual.cols == weight.cols,
              "residual is [" << residual.rows << ", " << residual.cols << "] and weight [" << weight.rows << ", "
                              << weight.cols << "]; they must have one shape");
    CHECK_ARG(residual.dtype == weight.dtype || residual.dtype == DType::int8,
              "residual must have the weight's dtype or int8");
    const bool by_rows = weight.stride_col == 1;
    CHECK_ARG((by_rows ? residual.stride_col : residual.stride_row) == 1,
              "residual has strides [" << residual.stride_row << ", " << residual.stride_col
                                       << "]; its unit stride must be where the weight's is");
}

MergeItem make_item(const Matrix& weight, const Matrix& lora_a, const Matrix& lora_b, uintptr_t gate, double scaling,
                    const std::optional<Matrix>& residual, const std::optional<uint64_t>& seed, uint32_t module) {
    CHECK_ARG(weight.dtype != DType::int8, "weight is int8; a merge needs float32, float16 or bfloat16");
    CHECK_ARG(lora_a.cols == weight.cols && lora_b.rows == weight.rows && lora_b.cols == lora_a.rows,
              "lora_a is [" << lora_a.rows << ", " << lora_a.cols << "] and lora_b [" << lora_b.rows << ", "
                            << lora_b.cols << "]; with weight [" << weight.rows << ", " << weight.cols
                            << "] they must be [R, " << weight.cols << "] and [" << weight.rows << ", R]");
    const bool by_rows = weight.stride_col == 1 && (weight.rows <= 1 || weight.stride_row >= weight.cols);
    const bool by_cols = weight.stride_row == 1 && (weight.cols <= 1 || weight.stride_col >= weight.rows);
    CHECK_ARG(by_rows || by_cols, "weight has strides [" << weight.stride_row << ", " << weight.stride_col
                                                         << "]; one must be 1 and the other span a row");
    CHECK_ARG(gate != 0 || lora_a.rows == 0, "the address of the gate is 0 for rank " << lora_a.rows);
    if (residual) check_residual(weight, *residual);
    return {weight,  lora_a, lora_b, reinterpret_cast<const float*>(gate),
            scaling, residual.value_or(Matrix{}), {seed.has_value(), seed.value_or(0), module}};
}

py::dict build_info() {
    py::dict info;
    info["version"] = FASTLORA_VERSION;
    info["compiler"] = __VERSION__;
    info["simd"] = simd_levels();
#ifdef FASTLORA_CUDA
    info["cuda"] = true;
    info["cuda_version"] = FASTLORA_CUDA_VERSION;
    info["cuda_archs"] = FASTLORA_CUDA_ARCHS;
#else
    info["cuda"] = false;
#endif
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "C++ and CUDA of fastlora: the merge and the optimizer step. Use fastlora.ops.merge_ and ProxAdamW.";

    py::enum_<DType>(m, "DType")
        .value("float32", DType::float32)
        .value("float16", DType::float16)
        .value("bfloat16", DType::bfloat16)
        .value("int8", DType::int8);
    py::class_<Matrix>(m, "Matrix")
        .def(py::init(&make_matrix), py::arg("data"), py::arg("dtype"), py::arg("rows"), py::arg("cols"),
             py::arg("stride_row"), py::arg("stride_col"));
    py::class_<MergeItem>(m, "MergeItem")
        .def(py::init(&make_item), py::arg("weight"), py::arg("lora_a"), py::arg("lora_b"), py::arg("gate"),
             py::arg("scaling"), py::arg("residual") = py::none(), py::arg("seed") = py::none(),
             py::arg("module") = 0);
    py::class_<ItemReport>(m, "ItemReport")
        .def_readonly("kept_rank", &ItemReport::kept_rank)
        .def_readonly("delta_square", &ItemReport::delta_square)
        .def_readonly("updated", &ItemReport::updated)
        .def_readonly("unchanged", &ItemReport::unchanged)
        .def_readonly("not_finite", &ItemReport::not_finite)
        .def_readonly("largest", &ItemReport::largest)
        .def_readonly("max_relative", &ItemReport::max_relative)
        .def_readonly("lost_square", &ItemReport::lost_square)
        .def_readonly("bad_residual", &ItemReport::bad_residual)
        .def_readonly("bad_a", &ItemReport::bad_a)
        .def_readonly("bad_b", &ItemReport::bad_b)
        .def_readonly("bad_gate", &ItemReport::bad_gate);

    const auto free_gil = py::call_guard<py::gil_scoped_release>();
    m.def("build_info", &build_info);
    m.def("simd_levels", &simd_levels);
    m.def("check_cpu", &check_cpu, py::arg("items"), py::arg("threads"), py::arg("simd") = "auto", free_gil);
    m.def("merge_cpu", &merge_cpu, py::arg("items"), py::arg("threads"), py::arg("simd") = "auto", free_gil);
    m.def("prox_adamw_cpu", [](uintptr_t tensors, int64_t count, uintptr_t groups, bool released, uintptr_t kept,
                               int threads, const std::string& simd) {
        prox_adamw_cpu(reinterpret_cast<const AdamTensor*>(tensors), count, reinterpret_cast<const AdamGroup*>(groups),
                       released, reinterpret_cast<int64_t*>(kept), threads, simd);
    }, py::arg("tensors"), py::arg("count"), py::arg("groups"), py::arg("released"), py::arg("kept"),
       py::arg("threads"), py::arg("simd") = "auto", free_gil);

    // For the tests of merge_core.h: `count` elements from one address to another.
    m.def("round_to", [](DType dtype, uintptr_t source, uintptr_t target, int64_t count, const std::string& simd) {
        round_cpu(dtype, reinterpret_cast<const float*>(source), reinterpret_cast<void*>(target), count, simd);
    }, py::arg("dtype"), py::arg("source"), py::arg("target"), py::arg("count"), py::arg("simd") = "auto");
    m.def("widen", [](DType dtype, uintptr_t source, uintptr_t target, int64_t count, const std::string& simd) {
        widen_cpu(dtype, reinterpret_cast<const void*>(source), reinterpret_cast<float*>(target), count, simd);
    }, py::arg("dtype"), py::arg("source"), py::arg("target"), py::arg("count"), py::arg("simd") = "auto");

#ifdef FASTLORA_CUDA
    m.def("cuda_obstacle", &cuda_obstacle, py::arg("device"));
    m.def("cuda_workspace", [](const std::vector<MergeItem>& items) {
        const WorkspaceSize size = cuda_workspace(items);
        return std::make_pair(size.table, size.whole);
    }, py::arg("items"));
    const auto launcher = [](auto launch) {
        return [launch](const std::vector<MergeItem>& items, int device, uintptr_t workspace, uintptr_t table,
                        uintptr_t stream) {
            const Workspace space{reinterpret_cast<void*>(workspace), reinterpret_cast<void*>(table)};
            launch(items, device, space, reinterpret_cast<void*>(stream));
        };
    };
    m.def("check_cuda", launcher(check_cuda), py::arg("items"), py::arg("device"), py::arg("workspace"),
          py::arg("table"), py::arg("stream"), free_gil);
    m.def("merge_cuda", launcher(merge_cuda), py::arg("items"), py::arg("device"), py::arg("workspace"),
          py::arg("table"), py::arg("stream"), free_gil);
    m.def("cuda_reports", [](const std::vector<MergeItem>& items, uintptr_t copy, bool checked) {
        return cuda_reports(items, reinterpret_cast<const void*>(copy), checked);
    }, py::arg("items"), py::arg("copy"), py::arg("checked"));
#endif
}
