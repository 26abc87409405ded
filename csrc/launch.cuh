// What the kernels' files share: launches and shared memory. Device code here and in the other files compiles with nvcc
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

// The shared memory of a multiprocessor of the architecture that is compiled for, by the technical specifications in
// the CUDA C++ Programming Guide. No host code asks for it.
#ifndef __CUDA_ARCH__
constexpr size_t shared_bytes_of_multiprocessor = 0;
#elif __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 870
constexpr size_t shared_bytes_of_multiprocessor = size_t{164} << 10;
#elif __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
constexpr size_t shared_bytes_of_multiprocessor = size_t{228} << 10;
#else
constexpr size_t shared_bytes_of_multiprocessor = size_t{100} << 10;
#endif

// How many blocks __launch_bounds__ should ask for on a multiprocessor: `wanted`, or what its shared memory holds, of
// which a block takes 1 KiB more than it is launched with. To ask for more takes registers away and brings no block.
constexpr int blocks_at_once(int wanted, size_t shared_bytes) {
  const auto held = static_cast<int>(shared_bytes_of_multiprocessor / (shared_bytes + (size_t{1} << 10)));
  return held < 1 ? 1 : held < wanted ? held : wanted;
}

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
