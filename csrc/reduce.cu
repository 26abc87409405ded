// Sums over whole tensors, in float64 and in the same order in every run: every block sums its share, and a last block
// the sums of the blocks. The sum of the dot products of pairs, the squared norms of tensors, and the bound of the
// condition of Gram matrices.
#include "kernels.h"
#include "launch.cuh"
#include "packs.cuh"

namespace symtele {

constexpr int reduce_threads = 256;
constexpr int64_t most_partial_sums = reduce_threads;  // the last block takes one a thread

// To use all of an H200's bandwidth, some 3 MB must be on their way at a time (4.8 TB/s, 600 ns). A thread requests so
// many packs before it waits, in all blocks that there may be 4 MB, and a block is launched for each share of that.
constexpr int packs_at_once = 4;
// On a multiprocessor: 256 blocks for 132 of them. Told so, the compiler keeps all packs of a thread in registers; for
// the sake of more blocks it would wait for half of them first.
constexpr int summing_blocks_at_once = 2;
constexpr int64_t bytes_of_block = 16 * packs_at_once * reduce_threads;

inline int64_t count_blocks(int64_t bytes, int64_t most) {
  return max(min(divide_up(bytes, bytes_of_block), most), int64_t{1});
}

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

template <class T, int width>
struct PackPair {
  static constexpr int elements = width;
  Pack<T, width> left, right;
};

template <int width, class T>
__device__ PackPair<T, width> load_pair(const T* left, const T* right) {
  return {load_pack<width>(left), load_pack<width>(right)};
}

// The only block writes the result, one of several its share of the sum.
template <class T>
__global__ void __launch_bounds__(reduce_threads, summing_blocks_at_once)
    sum_products(TensorPairs pairs, DotFinish finish, double* result) {
  double sum = 0;
  for (int p = 0; p < pairs.count; ++p) {
    const T* left = static_cast<const T*>(pairs.left[p]);
    const T* right = static_cast<const T*>(pairs.right[p]);
    const auto load = [&](int64_t i, auto width) { return load_pair<decltype(width)::value>(left + i, right + i); };
    read_packs<T, packs_at_once>(pairs.elements[p], are_aligned(left, right), load, [&](const auto& pair) {
      for (int q = 0; q < pair.elements; ++q) sum += double(pair.left.at[q]) * double(pair.right.at[q]);
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
  int64_t elements = 0;
  for (int p = 0; p < pairs.count; ++p) elements += pairs.elements[p];
  const int64_t blocks = count_blocks(elements * int64_t{sizeof(T)}, most_partial_sums);
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
  const auto load = [&](int64_t i, auto width) { return load_pack<decltype(width)::value>(data + i); };
  read_packs<T, packs_at_once>(elements, are_aligned(data), load, [&](const auto& values) {
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
__global__ void __launch_bounds__(reduce_threads, summing_blocks_at_once)
    sum_each_squared(MixedTensors tensors, double* partial) {
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

// The squares of the Frobenius norms of a matrix and its inverse.
struct SquaredNorms {
  double gram;
  double inverse;
};

// Matrix blockIdx.y, shared out over blockIdx.x.
__global__ void __launch_bounds__(reduce_threads, summing_blocks_at_once)
    sum_squares(GramList grams, SquaredNorms* partial) {
  const int64_t elements = grams.elements[blockIdx.y];
  const double gram = sum_of_squares<double>(grams.gram[blockIdx.y], elements);
  const double inverse = sum_of_squares<double>(grams.inverse[blockIdx.y], elements);
  const double gram_total = sum_block(gram);
  __syncthreads();  // the sums' memory serves both
  const double inverse_total = sum_block(inverse);
  if (threadIdx.x == 0) partial[blockIdx.y * gridDim.x + blockIdx.x] = {gram_total, inverse_total};
}

// Thread m blocks + b takes partial sum b of matrix m, of which there are no more than threads. What is not below the
// limit is beyond it, a NaN too.
__global__ void __launch_bounds__(reduce_threads)
    any_beyond(GramList grams, const SquaredNorms* partial, unsigned blocks, double limit, bool* beyond) {
  SquaredNorms* const norms = shared_memory<SquaredNorms>() + threadIdx.x;
  const unsigned m = threadIdx.x / blocks, b = threadIdx.x % blocks;
  const bool has_sum = m < static_cast<unsigned>(grams.count);
  if (has_sum) *norms = partial[threadIdx.x];
  __syncthreads();
  for (unsigned width = blocks, half; width > 1; width = half) {
    half = (width + 1) / 2;
    if (has_sum && b + half < width) {
      norms->gram += norms[half].gram;
      norms->inverse += norms[half].inverse;
    }
    __syncthreads();
  }
  double found = 0;
  if (has_sum && b == 0) found = !(norms->gram * norms->inverse <= limit) || *grams.info[m] != 0;
  __syncthreads();  // their memory serves the last sum too
  const double total = sum_block(found);
  if (threadIdx.x == 0) *beyond = total > 0;
}

int64_t dot_sum_workspace() { return most_partial_sums * int64_t{sizeof(double)}; }

cudaError_t launch_dot_sum(Dtype dtype, const TensorPairs& pairs, double scale, bool root, double* partial,
                           double* result, cudaStream_t stream) {
  const auto launch_of = dtype == Dtype::f32 ? launch_dot_sum_of<float> : launch_dot_sum_of<double>;
  return launch_of(pairs, {scale, root}, partial, result, stream);
}

int64_t squared_norms_workspace() { return max_tensors * most_partial_sums * int64_t{sizeof(double)}; }

cudaError_t launch_squared_norms(const MixedTensors& tensors, double* partial, double* result, cudaStream_t stream) {
  if (tensors.count == 0) return cudaSuccess;
  int64_t bytes = 0;
  for (int i = 0; i < tensors.count; ++i) {
    bytes = max(bytes, tensors.elements[i] * (tensors.dtype[i] == Dtype::f64 ? 8 : 4));
  }
  const auto blocks = static_cast<unsigned>(count_blocks(bytes, most_partial_sums));
  const auto count = static_cast<unsigned>(tensors.count);
  const size_t shared_bytes = reduce_threads * sizeof(double);
  const cudaError_t error =
      launch(sum_each_squared, dim3(blocks, count), reduce_threads, shared_bytes, stream, tensors, partial);
  if (error != cudaSuccess) return error;
  return launch(sum_each_partial, count, reduce_threads, shared_bytes, stream, partial, blocks, result);
}

int64_t near_dependence_workspace() { return most_partial_sums * int64_t{sizeof(SquaredNorms)}; }

cudaError_t launch_near_dependence(const GramList& grams, double largest, double* partial, bool* beyond,
                                   cudaStream_t stream) {
  int64_t elements = 0;
  for (int i = 0; i < grams.count; ++i) elements = max(elements, grams.elements[i]);
  const int64_t most = most_partial_sums / max(grams.count, 1);  // of a matrix
  const auto blocks = static_cast<unsigned>(count_blocks(elements * int64_t{sizeof(double)}, most));
  auto* const norms = reinterpret_cast<SquaredNorms*>(partial);
  if (grams.count > 0) {
    const dim3 grid(blocks, static_cast<unsigned>(grams.count));
    const cudaError_t error =
        launch(sum_squares, grid, reduce_threads, reduce_threads * sizeof(double), stream, grams, norms);
    if (error != cudaSuccess) return error;
  }
  const double limit = largest * largest * largest * largest;
  return launch(any_beyond, 1, reduce_threads, reduce_threads * sizeof(SquaredNorms), stream, grams, norms, blocks,
                limit, beyond);
}

}  // namespace symtele
