#include "matmul.cuh"

namespace symtele {

cudaError_t launch_fused(const Product& product, cudaStream_t stream) {
  if (product.rows == 0 || product.columns == 0) return cudaSuccess;
  return product.dtype == Dtype::f32 ? launch_fused_of<float>(product, stream)
                                     : launch_fused_of<double>(product, stream);
}

cudaError_t launch_epilogue(const Product& product, cudaStream_t stream) {
  if (product.rows == 0 || product.columns == 0) return cudaSuccess;
  return product.dtype == Dtype::f32 ? launch_epilogue_of<float>(product, stream)
                                     : launch_epilogue_of<double>(product, stream);
}

}  // namespace symtele
