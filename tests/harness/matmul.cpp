// matmul ORDER INPUT OUTPUT: runs the groups of products that INPUT describes (tests/test_kernels_on_cpu.py writes it) with the
// kernels of csrc/matmul.cu and epilogue.cuh on the CPU, the threads in ORDER (cuda_on_cpu::set_order), and writes for
// each the launcher's error code and the two results.
#include "matmul.cu"
#include "products.h"

namespace {

using namespace symtele;

enum Launcher : int64_t { fused = 0, tile_of_16 = 16, tile_of_32 = 32, tile_of_64 = 64, epilogue_alone = 1 };

template <class T>
cudaError_t launch_tile(int64_t launcher, const Product* products, int count) {
  switch (launcher) {
    case tile_of_16:
      return launch_multiply<T, 16>(products, count, nullptr);
    case tile_of_32:
      return launch_multiply<T, 32>(products, count, nullptr);
    default:
      return launch_multiply<T, 64>(products, count, nullptr);
  }
}

cudaError_t run(int64_t launcher, const std::vector<Product>& group) {
  const Product* const products = group.data();
  const int count = static_cast<int>(group.size());
  if (launcher == fused) return launch_fused(products, count, nullptr);
  if (launcher == epilogue_alone) return launch_epilogue(group.at(0), nullptr);
  return group.at(0).dtype == Dtype::f32 ? launch_tile<float>(launcher, products, count)
                                         : launch_tile<double>(launcher, products, count);
}

}  // namespace

int main(int, char** arguments) { harness::run_products(arguments, run); }
