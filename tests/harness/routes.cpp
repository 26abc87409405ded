// Stands for csrc/route.cpp and csrc/matmul_tensor.cu where csrc/ops.cpp is compiled for the CPU: the program chooses
// the route by torch's switch for TF32. Nothing goes to the tensor cores, which fail, but a product of 1313 columns.
#include "kernels.h"

namespace symtele {

Route choose_route(const Product& product, bool allow_tf32, int) {
  if (product.columns == 1313) return Route::tensor;
  return allow_tf32 ? Route::library : Route::fused;
}

cudaError_t launch_tensor(const Product&, cudaStream_t) { return cudaErrorInvalidValue; }

}  // namespace symtele
