// A step of the search in activation space: the moved activations B', their targets Y' (B' = sigma(Y')) and sigma'(Y'),
// of several layers in one pass.
#include "activation.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "packs.cuh"

namespace symtele {

// A LayerStep in the precision of its tensors.
template <class T>
struct StepOf {
  bool along_targets;
  bool aligned;
  ActivationOf<T> activation;
  int64_t elements;
  const T* base;
  const T* change;
  T* moved;
  T* targets;
  T* slopes;

  StepOf() = default;
  explicit StepOf(const LayerStep& step)
      : along_targets(step.along_targets),
        aligned(are_aligned(step.base, step.change, step.moved, step.targets, step.slopes)),
        activation(step.activation),
        elements(step.elements),
        base(static_cast<const T*>(step.base)),
        change(static_cast<const T*>(step.change)),
        moved(static_cast<T*>(step.moved)),
        targets(static_cast<T*>(step.targets)),
        slopes(static_cast<T*>(step.slopes)) {}
};

template <class T>
struct Steps {
  StepOf<T> of_layer[max_steps];
};

template <int width, class T>
__device__ void step_pack(const StepOf<T>& step, T size, int64_t element) {
  const Pack<T, width> base = load_pack<width>(step.base + element), change = load_pack<width>(step.change + element);
  Pack<T, width> moved, targets, slopes;
  for (int q = 0; q < width; ++q) {
    const T stepped = base.at[q] + size * change.at[q];
    moved.at[q] = step.along_targets ? step.activation.forward(stepped) : stepped;
    targets.at[q] = step.along_targets ? stepped : step.activation.inverse(stepped);
    slopes.at[q] = step.activation.derivative(targets.at[q]);
  }
  store_pack(step.moved + element, moved);
  store_pack(step.targets + element, targets);
  store_pack(step.slopes + element, slopes);
}

// Layer blockIdx.y, shared out over blockIdx.x.
template <class T>
__global__ void __launch_bounds__(pack_threads)
    take_steps(const __grid_constant__ Steps<T> steps, const double* __restrict__ size) {
  const StepOf<T>& step = steps.of_layer[blockIdx.y];
  const T length = static_cast<T>(*size);
  for_packs<T>(step.elements, step.aligned,
               [&](int64_t i, auto width) { step_pack<decltype(width)::value>(step, length, i); });
}

template <class T>
cudaError_t launch_steps_of(const LayerStep* steps, int count, const double* size, cudaStream_t stream) {
  Steps<T> typed{};
  int64_t most_elements = 0;
  for (int layer = 0; layer < count; ++layer) {
    typed.of_layer[layer] = StepOf<T>(steps[layer]);
    most_elements = max(most_elements, steps[layer].elements);
  }
  if (most_elements == 0) return cudaSuccess;
  const dim3 grid(pack_blocks<T>(most_elements), static_cast<unsigned>(count));
  return launch(take_steps<T>, grid, pack_threads, 0, stream, typed, size);
}

cudaError_t launch_steps(Dtype dtype, const LayerStep* steps, int count, const double* size, cudaStream_t stream) {
  const auto launch_of = dtype == Dtype::f32 ? launch_steps_of<float> : launch_steps_of<double>;
  return launch_of(steps, count, size, stream);
}

}  // namespace symtele
