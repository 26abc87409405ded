// Products as the tests write them: read one, run it, write its results.
#pragma once

#include "buffers.h"
#include "cuda_on_cpu.h"
#include "kernels.h"

namespace harness {

struct Strided {
  symtele::Matrix matrix;
  Buffer buffer;
};

// A matrix that begins `offset` elements behind the beginning of its buffer.
inline Strided read_matrix(Reader& in, size_t element_bytes) {
  const int64_t offset = in.number(), row_stride = in.number(), column_stride = in.number();
  Buffer buffer = in.buffer();
  const unsigned char* bytes = buffer.get<unsigned char>();
  const void* data = bytes ? bytes + offset * element_bytes : nullptr;
  return {{data, row_stride, column_stride}, std::move(buffer)};
}

// `run` gets the number that says how to launch, and the product, and returns the launcher's error.
template <class Run>
void run_product(Reader& in, Writer& out, const Run& run) {
  const int64_t launcher = in.number();
  symtele::Product product{};
  product.dtype = static_cast<symtele::Dtype>(in.number());
  product.rows = in.number();
  product.columns = in.number();
  product.inner = in.number();
  symtele::Epilogue& epilogue = product.epilogue;
  epilogue.kind = static_cast<symtele::EpilogueKind>(in.number());
  epilogue.activation.kind = static_cast<symtele::ActivationKind>(in.number());
  epilogue.activation.parameter = in.number<double>();
  epilogue.alpha = in.number<double>();
  epilogue.beta = in.number<double>();
  epilogue.column_stride = in.number();
  epilogue.row_stride = in.number();

  const size_t element_bytes = product.dtype == symtele::Dtype::f32 ? 4 : 8;
  const Strided a = read_matrix(in, element_bytes), b = read_matrix(in, element_bytes);
  const Buffer source = in.buffer(), at = in.buffer(), column = in.buffer(), row = in.buffer();
  const Buffer first = in.buffer(), second(in.number());  // as `first` is before the launch; the size only
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

// The body of main: ORDER INPUT OUTPUT, as tests/test_kernels_on_cpu.py calls it.
template <class Run>
void run_products(char** arguments, const Run& run) {
  cuda_on_cpu::set_order(arguments[1]);
  Reader in(arguments[2]);
  Writer out(arguments[3]);
  for (int64_t left = in.number(); left > 0; --left) run_product(in, out, run);
}

}  // namespace harness
