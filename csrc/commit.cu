// Copies that happen only if a flag on the device says so.
#include "kernels.h"
#include "launch.cuh"
#include "packs.cuh"

namespace symtele {

// Copy blockIdx.y, shared out over blockIdx.x.
__global__ void __launch_bounds__(pack_threads) copy_if(const bool* accept, ByteCopies copies) {
  if (!*accept) return;
  auto* target = static_cast<unsigned char*>(copies.target[blockIdx.y]);
  const auto* source = static_cast<const unsigned char*>(copies.source[blockIdx.y]);
  for_packs<unsigned char>(copies.bytes[blockIdx.y], are_aligned(target, source), [&](int64_t i, auto width) {
    store_pack(target + i, load_pack<decltype(width)::value>(source + i));
  });
}

cudaError_t launch_commit(const bool* accept, const ByteCopies& copies, cudaStream_t stream) {
  int64_t largest = 0;
  for (int i = 0; i < copies.count; ++i) largest = max(largest, copies.bytes[i]);
  if (largest == 0) return cudaSuccess;
  const dim3 grid(pack_blocks<unsigned char>(largest), static_cast<unsigned>(copies.count));
  return launch(copy_if, grid, pack_threads, 0, stream, accept, copies);
}

}  // namespace symtele
