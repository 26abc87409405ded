// Sums over whole tensors, in float64 and in the same order in every run: every block sums its share, and a last block
// the sums of the blocks. The sum of the dot products of pairs, the squared norms of tensors, and the bound of the
// condition of Gram matrices.
#pragma once

#include "kernels.h"
#include "launch.cuh"
#include "packs.cuh"

namespace symtele {

constexpr int reduce_threads = 256;
constexpr int64_t most_partial_sums = reduce_threads;  // the last block takes one a thread
constexpr int64_t elements_of_block = 4096;

// The sum over the block's threads, in thread 0. All threads come here together.
__device__ inline double sum_block(double value) {
  double* sums = shared_memory<double>();
  sums[threadIdx.x] = value;
  __syncthreads();
  for (unsigned half = reduce_threads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  return sums[0];
}

// What a sum of dot products is turned into.
struct DotFinish {
  double scale;
  bool root;

  __device__ double operator()(double sum) const { return root ? sqrt(scale * sum) : scale * sum; }
};

// The only block writes the result, one of several its share of the sum.
template <class T>
__global__ void __launch_bounds__(reduce_threads) sum_products(TensorPairs pairs, DotFinish finish, double* result) {
  double sum = 0;
  for (int p = 0; p < pairs.count; ++p) {
    const T* left = static_cast<const T*>(pairs.left[p]);
    const T* right = static_cast<const T*>(pairs.right[p]);
    for_packs<T>(pairs.elements[p], are_aligned(left, right), [&](int64_t i, auto width) {
      constexpr int elements = decltype(width)::value;
      const Pack<T, elements> a = load_pack<elements>(left + i), b = load_pack<elements>(right + i);
      for (int q = 0; q < elements; ++q) sum += double(a.at[q]) * double(b.at[q]);
    });
  }
  const double total = sum_block(sum);
  if (threadIdx.x == 0) result[blockIdx.x] = gridDim.x == 1 ? finish(total) : total;
}

__global__ void __launch_bounds__(reduce_threads)
    sum_partial(const double* partial, unsigned count, DotFinish finish, double* result) {
  const double total = sum_block(threadIdx.x < count ? partial[threadIdx.x] : 0);
  if (threadIdx.x == 0) *result = finish(total);
}

template <class T>
cudaError_t launch_dot_sum_of(const TensorPairs& pairs, const DotFinish& finish, double* partial, double* result,
                              cudaStream_t stream) {
  int64_t elements = 1;
  for (int p = 0; p < pairs.count; ++p) elements += pairs.elements[p];
  const int64_t blocks = min(divide_up(elements, elements_of_block), most_partial_sums);
  const size_t shared_bytes = reduce_threads * sizeof(double);
  double* sums = blocks == 1 ? result : partial;
  const cudaError_t error =
      launch(sum_products<T>, static_cast<unsigned>(blocks), reduce_threads, shared_bytes, stream, pairs, finish, sums);
  if (error != cudaSuccess || blocks == 1) return error;
  return launch(sum_partial, 1, reduce_threads, shared_bytes, stream, partial, static_cast<unsigned>(blocks), finish,
                result);
}

template <class T>
__device__ double sum_of_squares(const void* tensor, int64_t elements) {
  const T* data = static_cast<const T*>(tensor);
  double sum = 0;
  for_packs<T>(elements, are_aligned(data), [&](int64_t i, auto width) {
    const auto values = load_pack<decltype(width)::value>(data + i);
    for (T value : values.at) sum += double(value) * double(value);
  });
  return sum;
}

__device__ inline double sum_of_squares(Dtype dtype, const void* tensor, int64_t elements) {
  switch (dtype) {
    case Dtype::f32:
      return sum_of_squares<float>(tensor, elements);
    case Dtype::f64:
      return sum_of_squares<double>(tensor, elements);
    case Dtype::i32:
      return sum_of_squares<int32_t>(tensor, elements);
  }
  return 0;
}

// Tensor blockIdx.y, shared out over blockIdx.x.
__global__ void __launch_bounds__(reduce_threads) sum_each_squared(MixedTensors tensors, double* partial) {
  const unsigned t = blockIdx.y;
  const double total = sum_block(sum_of_squares(tensors.dtype[t], tensors.data[t], tensors.elements[t]));
  if (threadIdx.x == 0) partial[t * gridDim.x + blockIdx.x] = total;
}

// The sums of tensor blockIdx.x.
__global__ void __launch_bounds__(reduce_threads)
    sum_each_partial(const double* partial, unsigned count, double* result) {
  const double total = sum_block(threadIdx.x < count ? partial[blockIdx.x * count + threadIdx.x] : 0);
  if (threadIdx.x == 0) result[blockIdx.x] = total;
}

constexpr int64_t most_norm_blocks = 16;  // of a matrix

// The squares of the Frobenius norms of a matrix and its inverse.
struct SquaredNorms {
  double gram;
  double inverse;
};

// Matrix blockIdx.y, shared out over blockIdx.x.
__global__ void __launch_bounds__(reduce_threads) sum_squares(GramList grams, SquaredNorms* partial) {
  const int64_t elements = grams.elements[blockIdx.y];
  const double gram = sum_block(sum_of_squares<double>(grams.gram[blockIdx.y], elements));
  __syncthreads();  // the sums' memory serves both
  const double inverse = sum_block(sum_of_squares<double>(grams.inverse[blockIdx.y], elements));
  if (threadIdx.x == 0) partial[blockIdx.y * gridDim.x + blockIdx.x] = {gram, inverse};
}

// A thread judges a matrix. What is not below the limit is beyond it, a NaN too.
__global__ void __launch_bounds__(reduce_threads)
    any_beyond(GramList grams, const SquaredNorms* partial, int64_t blocks, double limit, bool* beyond) {
  double found = 0;
  if (threadIdx.x < grams.count) {
    SquaredNorms norms{};
    for (int64_t b = 0; b < blocks; ++b) {
      norms.gram += partial[threadIdx.x * blocks + b].gram;
      norms.inverse += partial[threadIdx.x * blocks + b].inverse;
    }
    found = !(norms.gram * norms.inverse <= limit) || *grams.info[threadIdx.x] != 0;
  }
  const double total = sum_block(found);
  if (threadIdx.x == 0) *beyond = total > 0;
}

}  // namespace symtele
