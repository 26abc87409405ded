// K = H H^T (+ 1), products and sums in float64, for several H in float32 or float64.
#include "kernels.h"
#include "launch.cuh"

namespace symtele {

constexpr int gram_side = 16;   // of the tile of K that a block makes
constexpr int gram_depth = 64;  // columns of H in shared memory at a time
constexpr int gram_threads = 256;
// A thread sums a piece of 4 x 4 elements of the tile over every gram_groups-th column of H.
constexpr int gram_micro = 4;
constexpr int gram_pieces = (gram_side / gram_micro) * (gram_side / gram_micro);
constexpr int gram_groups = gram_threads / gram_pieces;
constexpr int gram_fetched = gram_side * gram_depth / gram_threads;  // elements of a slab, by a thread

struct alignas(16) GramRow {
  double at[gram_micro];
};

// 16 rows of H, one column after the other. Two more elements keep the columns that a half warp writes in different
// banks, and every column aligned to 16 bytes.
struct GramSlab {
  double column[gram_depth][gram_side + 2];
};

union GramMemory {
  GramSlab slabs[2];  // of the rows of H that belong to the rows of the tile, and to its columns
  double partial[gram_groups][gram_side][gram_side];
};

// Which element of a slab a thread fetches in turn q: eight columns of four rows a warp, so that whole sectors are read
// and no two elements of a half warp go to one bank.
struct GramPlace {
  int row, column;
  __device__ explicit GramPlace(int q) {
    const int element = q * gram_threads + threadIdx.x;
    row = element / 8 % gram_side;
    column = element / (8 * gram_side) * 8 + element % 8;
  }
};

template <class T>
struct GramRows {
  const T* data;
  int64_t row_stride, column_stride, rows, columns;

  __device__ T at(int64_t row, int64_t column) const {
    return row < rows && column < columns ? data[row * row_stride + column * column_stride] : T(0);
  }
};

template <class T>
struct GramFetch {
  T of_rows[gram_fetched], of_columns[gram_fetched];

  __device__ void read(const GramRows<T>& h, int64_t top, int64_t left, int64_t start) {
    for (int q = 0; q < gram_fetched; ++q) {
      const GramPlace place(q);
      of_rows[q] = h.at(top + place.row, start + place.column);
      of_columns[q] = h.at(left + place.row, start + place.column);
    }
  }

  __device__ void write(GramSlab* slabs) const {
    for (int q = 0; q < gram_fetched; ++q) {
      const GramPlace place(q);
      slabs[0].column[place.column][place.row] = of_rows[q];
      slabs[1].column[place.column][place.row] = of_columns[q];
    }
  }
};

// A GramProduct in the precision of its rows; `added` is 1 with bias, else 0.
template <class T>
struct GramOf {
  GramRows<T> h;
  double added;
  double* exact;
  T* rounded;
};

template <class T>
struct Grams {
  GramOf<T> matrices[max_grams];
};

// Tile (blockIdx.y, blockIdx.x) of the lower triangle of matrix blockIdx.z, written to both triangles.
template <class T>
__global__ void __launch_bounds__(gram_threads) gram_tile(const __grid_constant__ Grams<T> grams) {
  if (blockIdx.x > blockIdx.y) return;
  const GramRows<T>& h = grams.matrices[blockIdx.z].h;
  double* __restrict__ exact = grams.matrices[blockIdx.z].exact;
  T* __restrict__ rounded = grams.matrices[blockIdx.z].rounded;
  const int64_t top = int64_t{blockIdx.y} * gram_side, left = int64_t{blockIdx.x} * gram_side;
  GramMemory& memory = *shared_memory<GramMemory>();
  const int piece = threadIdx.x % gram_pieces, group = threadIdx.x / gram_pieces;
  const int piece_row = piece / (gram_side / gram_micro) * gram_micro;
  const int piece_column = piece % (gram_side / gram_micro) * gram_micro;

  double sum[gram_micro][gram_micro] = {};
  GramFetch<T> next;
  next.read(h, top, left, 0);
  for (int64_t start = 0; start < h.columns; start += gram_depth) {
    next.write(memory.slabs);
    __syncthreads();
    next.read(h, top, left, start + gram_depth);
    for (int q = 0; q < gram_depth / gram_groups; ++q) {
      const int c = q * gram_groups + group;
      const GramRow a = *reinterpret_cast<const GramRow*>(&memory.slabs[0].column[c][piece_row]);
      const GramRow b = *reinterpret_cast<const GramRow*>(&memory.slabs[1].column[c][piece_column]);
      for (int i = 0; i < gram_micro; ++i) {
        for (int j = 0; j < gram_micro; ++j) sum[i][j] += a.at[i] * b.at[j];
      }
    }
    __syncthreads();
  }

  for (int i = 0; i < gram_micro; ++i) {
    for (int j = 0; j < gram_micro; ++j) memory.partial[group][piece_row + i][piece_column + j] = sum[i][j];
  }
  __syncthreads();
  const int i = threadIdx.x / gram_side, j = threadIdx.x % gram_side;
  const int64_t row = top + i, column = left + j;
  if (row >= h.rows || column > row) return;
  double total = 0;
  for (int g = 0; g < gram_groups; ++g) total += memory.partial[g][i][j];
  total += grams.matrices[blockIdx.z].added;
  const int64_t below = row * h.rows + column, above = column * h.rows + row;
  exact[below] = exact[above] = total;
  if (rounded) rounded[below] = rounded[above] = static_cast<T>(total);
}

template <class T>
cudaError_t launch_grams_of(int64_t rows, const GramProduct* grams, int count, cudaStream_t stream) {
  Grams<T> typed{};
  for (int m = 0; m < count; ++m) {
    const GramProduct& gram = grams[m];
    typed.matrices[m] = {
        {static_cast<const T*>(gram.h.data), gram.h.row_stride, gram.h.column_stride, rows, gram.columns},
        gram.bias ? 1.0 : 0.0,
        gram.exact,
        static_cast<T*>(gram.rounded)};
  }
  const auto tiles = static_cast<unsigned>(divide_up(rows, gram_side));
  const dim3 grid(tiles, tiles, static_cast<unsigned>(count));
  return launch(gram_tile<T>, grid, gram_threads, sizeof(GramMemory), stream, typed);
}

cudaError_t launch_grams(Dtype dtype, int64_t rows, const GramProduct* grams, int count, cudaStream_t stream) {
  if (rows == 0 || count == 0) return cudaSuccess;
  const auto launch_of = dtype == Dtype::f32 ? launch_grams_of<float> : launch_grams_of<double>;
  return launch_of(rows, grams, count, stream);
}

}  // namespace symtele
