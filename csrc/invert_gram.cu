#include "invert_gram.cuh"

namespace symtele {

int64_t invert_grams_workspace(int count, int64_t size) {
  return size > sweep_width ? count * size * size * int64_t{sizeof(double)} : 0;
}

cudaError_t launch_invert_grams(int64_t size, const SquareMatrices& grams, int32_t* infos, double* workspace,
                                cudaStream_t stream) {
  const int count = grams.count;
  if (count == 0) return cudaSuccess;
  if (size == 0) return cudaMemsetAsync(infos, 0, count * sizeof(*infos), stream);
  const int64_t blocks = divide_up(size, sweep_width);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(blocks), static_cast<unsigned>(count));
  SquareMatrices sweep = grams;
  for (int64_t k = 0; k < blocks; ++k) {
    // No launch writes what it reads, and the last one writes the inverses.
    const bool to_inverses = (blocks - 1 - k) % 2 == 0;
    for (int m = 0; m < count; ++m) sweep.to[m] = to_inverses ? grams.to[m] : workspace + m * size * size;
    const cudaError_t error =
        launch(sweep_pivots, grid, sweep_threads, sizeof(SweepMemory), stream, size, k, sweep, infos);
    if (error != cudaSuccess) return error;
    for (int m = 0; m < count; ++m) sweep.from[m] = sweep.to[m];
  }
  return cudaSuccess;
}

}  // namespace symtele
