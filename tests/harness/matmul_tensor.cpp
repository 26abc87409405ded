// matmul_tensor ORDER INPUT OUTPUT: as matmul.cpp, with the kernels of csrc/matmul_tensor.cu.
#include "cutlass_on_cpu.h"

#include "matmul_tensor.cu"
#include "products.h"

namespace {

using namespace symtele;

enum Launcher : int64_t { chosen_tiles = 0, small_tiles = 64, large_tiles = 128 };

template <class Tiling>
cudaError_t launch_tiling(const Product& product) {
  const bool a_by_rows = product.a.column_stride == 1, b_by_rows = product.b.column_stride == 1;
  if (a_by_rows && b_by_rows) return launch_tensor_of<RowMajor, RowMajor, Tiling>(product, nullptr);
  if (a_by_rows) return launch_tensor_of<RowMajor, ColumnMajor, Tiling>(product, nullptr);
  if (b_by_rows) return launch_tensor_of<ColumnMajor, RowMajor, Tiling>(product, nullptr);
  return launch_tensor_of<ColumnMajor, ColumnMajor, Tiling>(product, nullptr);
}

cudaError_t run(int64_t launcher, const std::vector<Product>& group) {
  const Product& product = group.at(0);
  if (launcher == small_tiles) return launch_tiling<SmallTiles>(product);
  if (launcher == large_tiles) return launch_tiling<LargeTiles>(product);
  return launch_tensor(product, nullptr);
}

}  // namespace

int main(int, char** arguments) { harness::run_products(arguments, run); }
