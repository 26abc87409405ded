// matmul ORDER INPUT OUTPUT: runs the products that INPUT describes (tests/test_kernels_on_cpu.py writes it) with the
// kernels of csrc/matmul.cuh and epilogue.cuh on the CPU, the threads in ORDER (cuda_on_cpu::set_order), and writes for
// each the launcher's error code and the two results.
#include "buffers.h"
#include "matmul.cu"

namespace {

using namespace symtele;

enum Launcher : int64_t { fused = 0, tile_of_16 = 16, tile_of_32 = 32, tile_of_64 = 64, epilogue_alone = 1 };

template <class T>
cudaError_t launch_tile(int64_t launcher, const Product& product) {
  switch (launcher) {
    case tile_of_16:
      return launch_multiply<T, 16>(product, nullptr);
    case tile_of_32:
      return launch_multiply<T, 32>(product, nullptr);
    default:
      return launch_multiply<T, 64>(product, nullptr);
  }
}

cudaError_t run(int64_t launcher, const Product& product) {
  if (launcher == fused) return launch_fused(product, nullptr);
  if (launcher == epilogue_alone) return launch_epilogue(product, nullptr);
  return product.dtype == Dtype::f32 ? launch_tile<float>(launcher, product) : launch_tile<double>(launcher, product);
}

struct Strided {
  Matrix matrix;
  harness::Buffer buffer;
};

// A matrix that begins `offset` elements behind the beginning of its buffer.
Strided read_matrix(harness::Reader& in, size_t element_bytes) {
  const int64_t offset = in.number(), row_stride = in.number(), column_stride = in.number();
  harness::Buffer buffer = in.buffer();
  const unsigned char* bytes = buffer.get<unsigned char>();
  const void* data = bytes ? bytes + offset * element_bytes : nullptr;
  return {{data, row_stride, column_stride}, std::move(buffer)};
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

  const size_t element_bytes = product.dtype == Dtype::f32 ? 4 : 8;
  const Strided a = read_matrix(in, element_bytes), b = read_matrix(in, element_bytes);
  const harness::Buffer source = in.buffer(), at = in.buffer(), column = in.buffer(), row = in.buffer();
  const harness::Buffer first = in.buffer(), second(in.number());  // as `first` is before the launch; the size only
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
