#include "commit.cuh"

namespace symtele {

cudaError_t launch_commit(const bool* accept, const ByteCopies& copies, cudaStream_t stream) {
  int64_t largest = 0;
  for (int i = 0; i < copies.count; ++i) largest = max(largest, copies.bytes[i]);
  if (largest == 0) return cudaSuccess;
  const dim3 grid(pack_blocks<unsigned char>(largest), static_cast<unsigned>(copies.count));
  return launch(copy_if, grid, pack_threads, 0, stream, accept, copies);
}

}  // namespace symtele
