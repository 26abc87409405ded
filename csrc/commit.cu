#include "commit.cuh"

namespace symtele {

cudaError_t launch_commit(const bool* accept, const ByteCopies& copies, cudaStream_t stream) {
  int64_t largest = 0;
  for (int i = 0; i < copies.count; ++i) largest = max(largest, copies.bytes[i]);
  if (largest == 0) return cudaSuccess;
  const int64_t blocks = min(divide_up(largest, bytes_of_commit_block), most_commit_blocks);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(copies.count));
  return launch(copy_if, grid, commit_threads, 0, stream, accept, copies);
}

}  // namespace symtele
