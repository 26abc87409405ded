// Products as the tests write them: read those of a group, run them together, write their results.
#pragma once

#include <vector>

#include "activations.h"
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

// A product and the memory that it reads and writes.
struct HeldProduct {
  symtele::Product product;
  std::vector<Buffer> operands;
  Buffer first, second;
};

inline HeldProduct read_product(Reader& in) {
  symtele::Product product{};
  product.dtype = static_cast<symtele::Dtype>(in.number());
  product.rows = in.number();
  product.columns = in.number();
  product.inner = in.number();
  symtele::Epilogue& epilogue = product.epilogue;
  epilogue.kind = static_cast<symtele::EpilogueKind>(in.number());
  epilogue.activation = read_activation(in);
  epilogue.alpha = in.number<double>();
  epilogue.beta = in.number<double>();
  epilogue.column_stride = in.number();
  epilogue.row_stride = in.number();

  const size_t element_bytes = product.dtype == symtele::Dtype::f32 ? 4 : 8;
  std::vector<Buffer> operands;
  for (symtele::Matrix* matrix : {&product.a, &product.b}) {
    Strided strided = read_matrix(in, element_bytes);
    *matrix = strided.matrix;
    operands.push_back(std::move(strided.buffer));
  }
  for (const void** operand : {&epilogue.source, &epilogue.at, &epilogue.column, &epilogue.row}) {
    *operand = operands.emplace_back(in.buffer()).get();
  }
  Buffer first = in.buffer(), second(in.number());  // as `first` is before the launch; the size only
  epilogue.first = first.get();
  epilogue.second = second.get();
  return {product, std::move(operands), std::move(first), std::move(second)};
}

// `run` gets the number that says how to launch, and the products, and returns the launcher's error.
template <class Run>
void run_group(Reader& in, Writer& out, const Run& run) {
  const int64_t launcher = in.number(), count = in.number();
  std::vector<HeldProduct> held;
  std::vector<symtele::Product> products;
  for (int64_t i = 0; i < count; ++i) products.push_back(held.emplace_back(read_product(in)).product);
  out.number(run(launcher, products));
  for (const HeldProduct& one : held) {
    out.buffer(one.first);
    out.buffer(one.second);
  }
}

// The body of main: ORDER INPUT OUTPUT, as tests/test_kernels_on_cpu.py calls it.
template <class Run>
void run_products(char** arguments, const Run& run) {
  cuda_on_cpu::set_order(arguments[1]);
  Reader in(arguments[2]);
  Writer out(arguments[3]);
  for (int64_t left = in.number(); left > 0; --left) run_group(in, out, run);
}

}  // namespace harness
