// route INPUT OUTPUT: the route that choose_route takes for each product of INPUT (tests/test_route.py writes it).
#include "buffers.h"
#include "kernels.h"

namespace {

symtele::Matrix read_matrix(harness::Reader& in) {
  const auto address = reinterpret_cast<const void*>(in.number());  // never followed
  const int64_t row_stride = in.number(), column_stride = in.number();
  return {address, row_stride, column_stride};
}

}  // namespace

int main(int, char** arguments) {
  harness::Reader in(arguments[1]);
  harness::Writer out(arguments[2]);
  for (int64_t left = in.number(); left > 0; --left) {
    symtele::Product product{};
    product.dtype = static_cast<symtele::Dtype>(in.number());
    product.rows = in.number();
    product.columns = in.number();
    product.inner = in.number();
    product.a = read_matrix(in);
    product.b = read_matrix(in);
    const bool allow_tf32 = in.number();
    const int compute_capability = static_cast<int>(in.number());
    out.number(static_cast<int64_t>(choose_route(product, allow_tf32, compute_capability)));
  }
}
