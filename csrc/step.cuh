// A step of the search in activation space: the moved activations B', their targets Y' (B' = sigma(Y')) and sigma'(Y').
#pragma once

#include "activation.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "packs.cuh"

namespace symtele {

// What the step is taken in: B', and Y' follows, or Y', and B' follows.
enum class StepIn { batch, targets };

template <class T>
struct Step {
  StepIn in;
  ActivationOf<T> activation;
  const T* base;
  const T* change;
  const double* size;
  T* moved;
  T* targets;
  T* slopes;
};

template <int width, class T>
__device__ void step_pack(const Step<T>& step, T size, int64_t element) {
  const Pack<T, width> base = load_pack<width>(step.base + element), change = load_pack<width>(step.change + element);
  Pack<T, width> moved, targets, slopes;
  for (int q = 0; q < width; ++q) {
    const T stepped = base.at[q] + size * change.at[q];
    const bool in_batch = step.in == StepIn::batch;
    moved.at[q] = in_batch ? stepped : step.activation.forward(stepped);
    targets.at[q] = in_batch ? step.activation.inverse(stepped) : stepped;
    slopes.at[q] = step.activation.derivative(targets.at[q]);
  }
  store_pack(step.moved + element, moved);
  store_pack(step.targets + element, targets);
  store_pack(step.slopes + element, slopes);
}

template <class T>
__global__ void __launch_bounds__(pack_threads) take_step(Step<T> step, int64_t count, bool aligned) {
  const T size = static_cast<T>(*step.size);
  for_packs<T>(count, aligned, [&](int64_t i, auto width) { step_pack<decltype(width)::value>(step, size, i); });
}

template <class T>
cudaError_t launch_step_of(StepIn in, int64_t count, const Activation& activation, const void* base, const void* change,
                           const double* size, void* moved, void* targets, void* slopes, cudaStream_t stream) {
  const Step<T> step{in,
                     ActivationOf<T>(activation),
                     static_cast<const T*>(base),
                     static_cast<const T*>(change),
                     size,
                     static_cast<T*>(moved),
                     static_cast<T*>(targets),
                     static_cast<T*>(slopes)};
  const bool aligned = are_aligned(base, change, moved, targets, slopes);
  return launch(take_step<T>, pack_blocks<T>(count), pack_threads, 0, stream, step, count, aligned);
}

}  // namespace symtele
