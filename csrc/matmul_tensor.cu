#include "matmul_tensor.cuh"

namespace symtele {

cudaError_t launch_tensor(const Product& product, cudaStream_t stream) {
  if (!tensor_route_accepts(product)) return cudaErrorInvalidValue;
  return product.a.column_stride == 1 ? launch_tensor_with<RowMajor>(product, stream)
                                      : launch_tensor_with<ColumnMajor>(product, stream);
}

}  // namespace symtele
