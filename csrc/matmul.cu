#include "matmul.cuh"

namespace symtele {

cudaError_t launch_fused(const Product* products, int count, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  return products[0].dtype == Dtype::f32 ? launch_fused_of<float>(products, count, stream)
                                         : launch_fused_of<double>(products, count, stream);
}

cudaError_t launch_epilogue(const Product& product, cudaStream_t stream) {
  if (product.rows == 0 || product.columns == 0) return cudaSuccess;
  return product.dtype == Dtype::f32 ? launch_epilogue_of<float>(product, stream)
                                     : launch_epilogue_of<double>(product, stream);
}

}  // namespace symtele
