// Stands for torch's header of this name where csrc/ops.cpp is compiled for the CPU: there is one stream.
#pragma once

#include <c10/core/Device.h>
#include <cuda_runtime_api.h>

namespace c10::cuda {

inline cudaStream_t getCurrentCUDAStream(DeviceIndex) { return nullptr; }

}  // namespace c10::cuda
