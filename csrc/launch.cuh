// What the kernels' files share: launches and shared memory. Device code here and in the other .cuh compiles with nvcc
// and, against tests/harness/cuda_on_cpu.h in place of CUDA's headers, with g++, which runs it on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime_api.h>

namespace symtele {

// The block's dynamic shared memory, 16-byte aligned: its size is that of the launch. There is no static one.
template <class T>
__device__ T* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
#else
  return reinterpret_cast<T*>(cuda_on_cpu::shared.get());
#endif
}

__host__ __device__ constexpr int64_t divide_up(int64_t count, int64_t by) { return (count + by - 1) / by; }

constexpr size_t shared_bytes_without_asking = size_t{48} << 10;

// Launch kernel(arguments...) on `stream`; the first error of it, which is no longer pending then.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (shared_bytes > shared_bytes_without_asking) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

}  // namespace symtele
