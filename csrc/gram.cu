#include "gram.cuh"

namespace symtele {

cudaError_t launch_gram(Dtype dtype, const Matrix& h, int64_t rows, int64_t columns, bool bias, double* exact,
                        void* rounded, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  const auto launch_of = dtype == Dtype::f32 ? launch_gram_of<float> : launch_gram_of<double>;
  return launch_of(h, rows, columns, bias, exact, rounded, stream);
}

}  // namespace symtele
