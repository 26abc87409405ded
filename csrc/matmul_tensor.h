// Which products the tensor-core kernels of matmul_tensor.cu compute. Host code, nothing of CUDA but its types.
#pragma once

#include <cstdint>
#include <limits>

#include "kernels.h"

namespace symtele {

// The kernels move operands and results in pieces of 16 bytes, which is four floats.
constexpr int64_t tensor_piece = 4;

inline bool lies_at_pieces(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Whether a matrix can be read in pieces along the dimension that is contiguous: it starts at one, its rows (or
// columns) lie whole pieces apart, and no piece reaches over the end of a row (or column).
inline bool reads_in_pieces(const Matrix& matrix, int64_t rows, int64_t columns) {
  const bool by_rows = matrix.column_stride == 1;
  const int64_t contiguous = by_rows ? columns : rows;
  const int64_t leading = by_rows ? matrix.row_stride : matrix.column_stride;
  return (by_rows || matrix.row_stride == 1) && lies_at_pieces(matrix.data) && contiguous % tensor_piece == 0 &&
         leading % tensor_piece == 0 && leading >= 0 && leading <= std::numeric_limits<int32_t>::max();
}

// The tensor-core kernels take float32 products of which
//   - a and b are row-major or column-major, each on its own, and can be read in pieces: a row-major a or a
//     column-major b needs `inner` to be a multiple of 4, a column-major a `rows`, a row-major b `columns`;
//   - columns is a multiple of 4 in any case;
//   - source, at, first and second lie at multiples of 16 bytes (rows x columns, contiguous; null is fine);
//   - rows, columns and inner are positive and at most 2^24, so that no count of tiles overflows.
// `column` and `row` may have any stride.
inline bool tensor_route_accepts(const Product& product) {
  const int64_t limit = int64_t{1} << 24;
  const Epilogue& epilogue = product.epilogue;
  return product.dtype == Dtype::f32 && product.rows > 0 && product.columns > 0 && product.inner > 0 &&
         product.rows <= limit && product.columns <= limit && product.inner <= limit &&
         product.columns % tensor_piece == 0 && reads_in_pieces(product.a, product.rows, product.inner) &&
         reads_in_pieces(product.b, product.inner, product.columns) && lies_at_pieces(epilogue.source) &&
         lies_at_pieces(epilogue.at) && lies_at_pieces(epilogue.first) && lies_at_pieces(epilogue.second);
}

}  // namespace symtele
