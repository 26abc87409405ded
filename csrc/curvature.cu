// What a step's second derivatives add to a gradient: left * right * sigma''(at) + source, elementwise.
#include "activation.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "packs.cuh"

namespace symtele {

template <class T>
struct CurvatureTerm {
  ActivationOf<T> activation;
  const T* left;
  const T* right;
  const T* at;
  const T* source;  // or null
  T* result;
};

template <int width, class T>
__device__ void curvature_pack(const CurvatureTerm<T>& term, int64_t element) {
  const Pack<T, width> left = load_pack<width>(term.left + element), right = load_pack<width>(term.right + element);
  const Pack<T, width> at = load_pack<width>(term.at + element);
  Pack<T, width> sum{};
  if (term.source != nullptr) sum = load_pack<width>(term.source + element);
  for (int q = 0; q < width; ++q) {
    sum.at[q] += left.at[q] * right.at[q] * term.activation.second_derivative(at.at[q]);
  }
  store_pack(term.result + element, sum);
}

// Four blocks on a multiprocessor leave 64 registers a thread. Left to itself the compiler gives 48 on 12.0, and spills.
template <class T>
__global__ void __launch_bounds__(pack_threads, 4)
    times_curvature(CurvatureTerm<T> term, int64_t count, bool aligned) {
  for_packs<T>(count, aligned, [&](int64_t i, auto width) { curvature_pack<decltype(width)::value>(term, i); });
}

template <class T>
cudaError_t launch_times_curvature_of(int64_t count, const Activation& activation, const void* left, const void* right,
                                      const void* at, const void* source, void* result, cudaStream_t stream) {
  const CurvatureTerm<T> term{ActivationOf<T>(activation),   static_cast<const T*>(left),
                              static_cast<const T*>(right),  static_cast<const T*>(at),
                              static_cast<const T*>(source), static_cast<T*>(result)};
  const bool aligned = are_aligned(left, right, at, source, result);  // null counts as aligned
  return launch(times_curvature<T>, pack_blocks<T>(count), pack_threads, 0, stream, term, count, aligned);
}

cudaError_t launch_times_curvature(Dtype dtype, int64_t count, Activation activation, const void* left,
                                   const void* right, const void* at, const void* source, void* result,
                                   cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const auto launch_of = dtype == Dtype::f32 ? launch_times_curvature_of<float> : launch_times_curvature_of<double>;
  return launch_of(count, activation, left, right, at, source, result, stream);
}

}  // namespace symtele
