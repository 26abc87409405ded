#include "step.cuh"

namespace symtele {

cudaError_t launch_steps(Dtype dtype, const LayerStep* steps, int count, const double* size, cudaStream_t stream) {
  const auto launch_of = dtype == Dtype::f32 ? launch_steps_of<float> : launch_steps_of<double>;
  return launch_of(steps, count, size, stream);
}

}  // namespace symtele
