// Stands for torch's header of this name where csrc/ops.cpp is compiled for the CPU: devices need no guard there.
#pragma once

#include <c10/core/Device.h>
#include <cuda_runtime_api.h>

constexpr auto cudaErrorNoKernelImageForDevice = static_cast<cudaError_t>(209);
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };

inline const char* cudaGetErrorName(cudaError_t error) { return error == cudaSuccess ? "cudaSuccess" : "an error"; }
inline const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 0;
  return cudaSuccess;
}

namespace c10::cuda {

struct OptionalCUDAGuard {
  void set_device(Device) {}
};

struct CUDAGuard {
  explicit CUDAGuard(Device) {}
};

}  // namespace c10::cuda
