// Merge on CUDA devices: the launch of merge_kernel.cuh on the caller's stream. Nothing here waits for the device.
#include <cuda_runtime.h>
#include <mma.h>

#include "checks.h"

namespace wmma = nvcuda::wmma;

#include "merge_kernel.cuh"

namespace fastlora {
namespace {

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

template <bool WRITE>
void launch(const std::vector<MergeItem>& source, int device, const Workspace& space, void* stream_ptr) {
    if (source.empty()) return;
    const Table table(source);
    CHECK_ARG(table.tiles < (int64_t(1) << 31), "the weights of one call make " << table.tiles
                                                                                << " tiles; at most 2^31 - 1");
    const OnDevice guard(device);
    const auto stream = static_cast<cudaStream_t>(stream_ptr);
    // from pinned memory, so that this returns at once, and a captured graph finds it again at each replay
    memcpy(space.table, table.items.data(), table.table_bytes());
    CHECK_CUDA(cudaMemcpyAsync(space.device, space.table, table.table_bytes(), cudaMemcpyHostToDevice, stream));
    const auto* items = static_cast<const DeviceItem*>(space.device);
    auto* records = reinterpret_cast<TileRecord*>(static_cast<char*>(space.device) + table.table_bytes());
    merge_kernel<WRITE><<<unsigned(table.tiles), THREADS, 0, stream>>>(items, int(source.size()), records);
    CHECK_LAUNCH();
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

WorkspaceSize cuda_workspace(const std::vector<MergeItem>& items) {
    const Table table(items);
    return {table.table_bytes(), table.bytes()};
}

void check_cuda(const std::vector<MergeItem>& items, int device, const Workspace& space, void* stream) {
    launch<false>(items, device, space, stream);
}

void merge_cuda(const std::vector<MergeItem>& items, int device, const Workspace& space, void* stream) {
    launch<true>(items, device, space, stream);
}

std::vector<ItemReport> cuda_reports(const std::vector<MergeItem>& items, const void* copy, bool checked) {
    const Table table(items);
    return table.reports(reinterpret_cast<const TileRecord*>(static_cast<const char*>(copy) + table.table_bytes()), checked);
}

}  // namespace fastlora
