// Lets g++ run kernels that are written with CUTLASS: the emulator of cuda_on_cpu.h beside CUDA's own headers, whose
// number types CUTLASS needs, and the three instructions of a warp that CUTLASS has in assembly. The test that builds
// with this header puts calls of these functions in the place of the assembly (tests/test_tensor_kernels_on_cpu.py).
#pragma once

// CUDA's headers, before the emulator takes the names of what it does itself.
#include <cuComplex.h>
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#undef __host__
#undef __device__
#undef __global__
#undef __forceinline__
#undef __launch_bounds__
#undef __align__

#define dim3 emulated_dim3
#define uint3 emulated_uint3
#define float2 emulated_float2
#define float4 emulated_float4
#define double2 emulated_double2
#define uint2 emulated_uint2
#define uint4 emulated_uint4
#define cudaError_t emulated_error
#define cudaSuccess emulated_success
#define cudaErrorInvalidValue emulated_invalid_value
#define cudaErrorInvalidConfiguration emulated_invalid_configuration
#define cudaFuncAttribute emulated_attribute
#define cudaFuncAttributeMaxDynamicSharedMemorySize emulated_shared_size
#define cudaLaunchConfig_t emulated_config
#define cudaFuncSetAttribute emulated_set_attribute
#define cudaLaunchKernelEx emulated_launch
#define cudaGetLastError emulated_last_error
#define cudaMemsetAsync emulated_memset

#include "cuda_on_cpu.h"

#undef uint3
#undef float2
#undef float4
#undef double2
#undef uint2
#undef uint4

// What CUTLASS declares too late or not at all for g++; nothing of it is called.
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline int __syncthreads_and(int) { cuda_on_cpu::fail("not modelled"); }
inline int __dp4a(int, int, int) { cuda_on_cpu::fail("not modelled"); }
inline unsigned __byte_perm(unsigned, unsigned, unsigned) { cuda_on_cpu::fail("not modelled"); }

namespace cutlass {
namespace arch {
inline int LaneId() { return cuda_on_cpu::lane(); }
}  // namespace arch
}  // namespace cutlass

namespace cuda_on_cpu {

constexpr int largest_warps = 32;

// ldmatrix.sync.aligned.x`count`.m8n8: lane 8 m + r gives the address of row r of matrix m, 16 bytes, and every lane
// gets 4 bytes of each matrix.
template <int count>
void load_matrices(void* to, const void* row) {
  for (int m = 0; m < count; ++m) {
    const auto words = static_cast<const uint32_t*>(exchange(row, 8 * m + lane() / 4, __LINE__));
    static_cast<uint32_t*>(to)[m] = words[lane() % 4];
  }
}

// Towards zero, as the tensor cores round sums.
inline float cut_off(double exact) {
  const float near = static_cast<float>(exact);
  return std::fabs(static_cast<double>(near)) > std::fabs(exact) ? std::nextafterf(near, 0.0f) : near;
}

// What a tensor core sees of a float: TF32 has 10 bits of mantissa.
inline float as_tf32(uint32_t bits) {
  bits &= 0xffffe000;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32: D = A B + C, the elements lying on the lanes as PTX has it.
inline void multiply_16_8_8(float* d, const void* a, const void* b, const float* c) {
  static float rows[largest_warps][16][8], columns[largest_warps][8][8];
  const int warp = threadIdx.x / warpSize, group = lane() / 4, place = lane() % 4;
  uint32_t of_a[4], of_b[2];
  std::memcpy(of_a, a, sizeof of_a);
  std::memcpy(of_b, b, sizeof of_b);
  for (int i = 0; i < 4; ++i) rows[warp][group + i % 2 * 8][place + i / 2 * 4] = as_tf32(of_a[i]);
  for (int i = 0; i < 2; ++i) columns[warp][group][place + i * 4] = as_tf32(of_b[i]);
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    double sum = c[i];
    for (int k = 0; k < 8; ++k) {
      sum += static_cast<double>(rows[warp][group + i / 2 * 8][k]) * columns[warp][place * 2 + i % 2][k];
    }
    d[i] = cut_off(sum);
  }
  __syncwarp();
}

}  // namespace cuda_on_cpu
