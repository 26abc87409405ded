#include "step.cuh"

namespace symtele {

namespace {

cudaError_t launch_step(StepIn in, Dtype dtype, int64_t count, const Activation& activation, const void* base,
                        const void* change, const double* size, void* moved, void* targets, void* slopes,
                        cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const auto launch_of = dtype == Dtype::f32 ? launch_step_of<float> : launch_step_of<double>;
  return launch_of(in, count, activation, base, change, size, moved, targets, slopes, stream);
}

}  // namespace

cudaError_t launch_step_batch(Dtype dtype, int64_t count, Activation activation, const void* batch, const void* change,
                              const double* size, void* moved, void* targets, void* slopes, cudaStream_t stream) {
  return launch_step(StepIn::batch, dtype, count, activation, batch, change, size, moved, targets, slopes, stream);
}

cudaError_t launch_step_targets(Dtype dtype, int64_t count, Activation activation, const void* base,
                                const void* change, const double* size, void* moved, void* targets, void* slopes,
                                cudaStream_t stream) {
  return launch_step(StepIn::targets, dtype, count, activation, base, change, size, moved, targets, slopes, stream);
}

}  // namespace symtele
