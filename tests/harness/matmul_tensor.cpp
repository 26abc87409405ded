// matmul_tensor ORDER INPUT OUTPUT: as matmul.cpp, with the kernels of csrc/matmul_tensor.cuh.
#include "cutlass_on_cpu.h"

#include "buffers.h"
#include "matmul_tensor.cu"

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

cudaError_t run(int64_t launcher, const Product& product) {
  if (launcher == small_tiles) return launch_tiling<SmallTiles>(product);
  if (launcher == large_tiles) return launch_tiling<LargeTiles>(product);
  return launch_tensor(product, nullptr);
}

struct Strided {
  Matrix matrix;
  harness::Buffer buffer;
};

Strided read_matrix(harness::Reader& in) {
  const int64_t offset = in.number(), row_stride = in.number(), column_stride = in.number();
  harness::Buffer buffer = in.buffer();
  return {{buffer.get<float>() + offset, row_stride, column_stride}, std::move(buffer)};
}

void run_case(harness::Reader& in, harness::Writer& out) {
  const int64_t launcher = in.number();
  Product product{};
  product.dtype = static_cast<Dtype>(in.number());
  product.rows = in.number();
  product.columns = in.number();
  product.inner = in.number();
  Epilogue& epilogue = product.epilogue;
  epilogue.kind = static_cast<EpilogueKind>(in.number());
  epilogue.activation.kind = static_cast<ActivationKind>(in.number());
  epilogue.activation.parameter = in.number<double>();
  epilogue.alpha = in.number<double>();
  epilogue.beta = in.number<double>();
  epilogue.column_stride = in.number();
  epilogue.row_stride = in.number();
  const Strided a = read_matrix(in), b = read_matrix(in);
  const harness::Buffer source = in.buffer(), at = in.buffer(), column = in.buffer(), row = in.buffer();
  const harness::Buffer first = in.buffer(), second(in.number());
  product.a = a.matrix;
  product.b = b.matrix;
  epilogue.source = source.get();
  epilogue.at = at.get();
  epilogue.column = column.get();
  epilogue.row = row.get();
  epilogue.first = first.get();
  epilogue.second = second.get();
  out.number(run(launcher, product));
  out.buffer(first);
  out.buffer(second);
}

}  // namespace

int main(int, char** arguments) {
  cuda_on_cpu::set_order(arguments[1]);
  harness::Reader in(arguments[2]);
  harness::Writer out(arguments[3]);
  for (int64_t left = in.number(); left > 0; --left) run_case(in, out);
}
