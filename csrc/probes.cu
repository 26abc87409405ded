#include "probes.cuh"

namespace symtele {

cudaError_t launch_probes(Dtype dtype, int64_t count, void* values, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const auto launch_of = dtype == Dtype::f32 ? launch_probes_of<float> : launch_probes_of<double>;
  return launch_of(count, values, stream);
}

}  // namespace symtele
