// What happens to an element of a matrix product on its way to memory: the formulas of EpilogueKind in kernels.h.
#pragma once

#include "activation.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace symtele {

// What an element's results are made of: (A B)_ij, to which alpha applies, beta source_ij, and at_ij.
template <class T>
struct Terms {
  T sum;
  T added;
  T at;
};

// An Epilogue in the precision of its product. T is float or double.
template <class T>
struct EpilogueOf {
  EpilogueKind kind;
  ActivationOf<T> activation;
  T alpha;
  T beta;
  int64_t columns;
  const T* source;
  const T* at;
  const T* column;
  int64_t column_stride;
  const T* row;
  int64_t row_stride;
  T* first;
  T* second;

  EpilogueOf() = default;
  explicit EpilogueOf(const Product& product)
      : kind(product.epilogue.kind),
        activation(product.epilogue.activation),
        alpha(static_cast<T>(product.epilogue.alpha)),
        beta(static_cast<T>(product.epilogue.beta)),
        columns(product.columns),
        source(static_cast<const T*>(product.epilogue.source)),
        at(static_cast<const T*>(product.epilogue.at)),
        column(static_cast<const T*>(product.epilogue.column)),
        column_stride(product.epilogue.column_stride),
        row(static_cast<const T*>(product.epilogue.row)),
        row_stride(product.epilogue.row_stride),
        first(static_cast<T*>(product.epilogue.first)),
        second(static_cast<T*>(product.epilogue.second)) {
    if (kind == EpilogueKind::inverse_activation || kind == EpilogueKind::times_slope) {  // of A B itself
      alpha = 1;
      row = nullptr;
    }
  }

  // The terms that lie in memory; the product is still to be added to `sum`, which is column_i row_j.
  __device__ Terms<T> read(int64_t i, int64_t j) const {
    const int64_t element = i * columns + j;
    const T factor = row && column ? column[i * column_stride] : T(1);
    return {row ? factor * row[j * row_stride] : T(0), source ? beta * source[element] : T(0),
            at ? at[element] : T(0)};
  }

  // Write the results of an element, counted row by row.
  __device__ void write(int64_t element, const Terms<T>& terms) const {
    const T total = alpha * terms.sum + terms.added;
    switch (kind) {
      case EpilogueKind::linear:
        first[element] = total;
        break;
      case EpilogueKind::activation:
        first[element] = total;
        second[element] = activation.forward(total);
        break;
      case EpilogueKind::inverse_activation: {
        const T inverse = activation.inverse(terms.sum);
        first[element] = inverse;
        second[element] = inverse + beta * terms.at;
        break;
      }
      case EpilogueKind::over_slope:
        first[element] = total;
        second[element] = total / activation.derivative(terms.at);
        break;
      case EpilogueKind::times_slope:
        first[element] = terms.sum * activation.derivative(terms.at) + terms.added;
        break;
      case EpilogueKind::masked:
        first[element] = total;
        second[element] = total * terms.at;
        break;
    }
  }

  // Both for (A B)_ij = sum. No other element of a matrix is read or written.
  __device__ void apply(int64_t i, int64_t j, T sum) const {
    Terms<T> terms = read(i, j);
    terms.sum += sum;
    write(i * columns + j, terms);
  }
};

constexpr int pass_height = 16;
constexpr int pass_width = 128;
constexpr int pass_threads = 256;

// The epilogue alone, for a product that `first` holds already; a block does a tile of it.
template <class T>
__global__ void __launch_bounds__(pass_threads) apply_epilogue(const EpilogueOf<T> epilogue, int64_t rows) {
  const int64_t tiles_across = divide_up(epilogue.columns, pass_width);
  const int64_t top = blockIdx.x / tiles_across * pass_height, left = blockIdx.x % tiles_across * pass_width;
  for (int element = threadIdx.x; element < pass_height * pass_width; element += pass_threads) {
    const int64_t i = top + element / pass_width, j = left + element % pass_width;
    if (i < rows && j < epilogue.columns) epilogue.apply(i, j, epilogue.first[i * epilogue.columns + j]);
  }
}

template <class T>
cudaError_t launch_epilogue_of(const Product& product, cudaStream_t stream) {
  const int64_t tiles = divide_up(product.rows, pass_height) * divide_up(product.columns, pass_width);
  return launch(apply_epilogue<T>, static_cast<unsigned>(tiles), pass_threads, 0, stream, EpilogueOf<T>(product),
                product.rows);
}

}  // namespace symtele
