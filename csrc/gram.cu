#include "gram.cuh"

namespace symtele {

cudaError_t launch_grams(Dtype dtype, int64_t rows, const GramProduct* grams, int count, cudaStream_t stream) {
  if (rows == 0 || count == 0) return cudaSuccess;
  const auto launch_of = dtype == Dtype::f32 ? launch_grams_of<float> : launch_grams_of<double>;
  return launch_of(rows, grams, count, stream);
}

}  // namespace symtele
