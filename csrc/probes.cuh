// Fixed vectors to try a matrix on, spread like random ones: the hash of every element's number.
#pragma once

#include "kernels.h"
#include "launch.cuh"

namespace symtele {

constexpr int probe_threads = 256;
constexpr int64_t most_probe_blocks = 1024;

__device__ inline uint32_t hash_of(uint32_t k) {
  const uint32_t mixed = k * 0x9E3779B1u;
  return (mixed ^ (mixed >> 15)) * 0x2C1B3C6Du;
}

template <class T>
__global__ void __launch_bounds__(probe_threads) fill_probes(int64_t count, T* values) {
  const int64_t threads = int64_t{gridDim.x} * probe_threads;
  for (int64_t i = int64_t{blockIdx.x} * probe_threads + threadIdx.x; i < count; i += threads) {
    values[i] = static_cast<T>(hash_of(static_cast<uint32_t>(i + 1))) * T(0x1p-31) - T(1);
  }
}

template <class T>
cudaError_t launch_probes_of(int64_t count, void* values, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(min(divide_up(count, probe_threads), most_probe_blocks));
  return launch(fill_probes<T>, blocks, probe_threads, 0, stream, count, static_cast<T*>(values));
}

}  // namespace symtele
