#include "curvature.cuh"

namespace symtele {

cudaError_t launch_times_curvature(Dtype dtype, int64_t count, Activation activation, const void* left,
                                   const void* right, const void* at, const void* source, void* result,
                                   cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const auto launch_of = dtype == Dtype::f32 ? launch_times_curvature_of<float> : launch_times_curvature_of<double>;
  return launch_of(count, activation, left, right, at, source, result, stream);
}

}  // namespace symtele
