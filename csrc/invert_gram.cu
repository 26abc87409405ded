#include "invert_gram.cuh"

namespace symtele {

int64_t invert_gram_workspace(int64_t size) { return size > sweep_width ? size * size * int64_t{sizeof(double)} : 0; }

cudaError_t launch_invert_gram(int64_t size, const double* gram, double* inverse, int32_t* info, void* workspace,
                               cudaStream_t stream) {
  if (size == 0) return cudaMemsetAsync(info, 0, sizeof(*info), stream);
  const int64_t blocks = divide_up(size, sweep_width);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(blocks));
  const double* from = gram;
  for (int64_t k = 0; k < blocks; ++k) {
    // No launch writes what it reads, and the last one writes the inverse.
    double* to = (blocks - 1 - k) % 2 == 0 ? inverse : static_cast<double*>(workspace);
    const cudaError_t error =
        launch(sweep_pivots, grid, sweep_threads, sizeof(SweepMemory), stream, size, k, from, to, info);
    if (error != cudaSuccess) return error;
    from = to;
  }
  return cudaSuccess;
}

}  // namespace symtele
