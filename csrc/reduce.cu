#include "reduce.cuh"

namespace symtele {

int64_t dot_sum_workspace() { return most_partial_sums * int64_t{sizeof(double)}; }

cudaError_t launch_dot_sum(Dtype dtype, const TensorPairs& pairs, double scale, bool root, double* partial,
                           double* result, cudaStream_t stream) {
  const auto launch_of = dtype == Dtype::f32 ? launch_dot_sum_of<float> : launch_dot_sum_of<double>;
  return launch_of(pairs, {scale, root}, partial, result, stream);
}

int64_t squared_norms_workspace() { return max_tensors * most_partial_sums * int64_t{sizeof(double)}; }

cudaError_t launch_squared_norms(const MixedTensors& tensors, double* partial, double* result, cudaStream_t stream) {
  if (tensors.count == 0) return cudaSuccess;
  int64_t bytes = 0;
  for (int i = 0; i < tensors.count; ++i) {
    bytes = max(bytes, tensors.elements[i] * (tensors.dtype[i] == Dtype::f64 ? 8 : 4));
  }
  const auto blocks = static_cast<unsigned>(count_blocks(bytes, most_partial_sums));
  const auto count = static_cast<unsigned>(tensors.count);
  const size_t shared_bytes = reduce_threads * sizeof(double);
  const cudaError_t error =
      launch(sum_each_squared, dim3(blocks, count), reduce_threads, shared_bytes, stream, tensors, partial);
  if (error != cudaSuccess) return error;
  return launch(sum_each_partial, count, reduce_threads, shared_bytes, stream, partial, blocks, result);
}

int64_t near_dependence_workspace() { return most_partial_sums * int64_t{sizeof(SquaredNorms)}; }

cudaError_t launch_near_dependence(const GramList& grams, double largest, double* partial, bool* beyond,
                                   cudaStream_t stream) {
  int64_t elements = 0;
  for (int i = 0; i < grams.count; ++i) elements = max(elements, grams.elements[i]);
  const int64_t most = most_partial_sums / max(grams.count, 1);  // of a matrix
  const auto blocks = static_cast<unsigned>(count_blocks(elements * int64_t{sizeof(double)}, most));
  auto* const norms = reinterpret_cast<SquaredNorms*>(partial);
  if (grams.count > 0) {
    const dim3 grid(blocks, static_cast<unsigned>(grams.count));
    const cudaError_t error =
        launch(sum_squares, grid, reduce_threads, reduce_threads * sizeof(double), stream, grams, norms);
    if (error != cudaSuccess) return error;
  }
  const double limit = largest * largest * largest * largest;
  return launch(any_beyond, 1, reduce_threads, reduce_threads * sizeof(SquaredNorms), stream, grams, norms, blocks,
                limit, beyond);
}

}  // namespace symtele
