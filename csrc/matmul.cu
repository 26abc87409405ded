// The fused matrix product on the ordinary cores, in the precision of its operands: float32 or float64 throughout.
//
// A block computes a square tile of A B and takes it through the epilogue. The inner dimension is cut into stages; all
// threads carry a stage from global to shared memory in 16-byte pieces, the next one waiting in registers while the
// present one is multiplied. Within a stage the threads are divided into slices, each with its own part of the inner
// dimension and a whole tile of partial sums, 8 x 4 of them a thread: a small product keeps its threads busy by a long
// inner dimension. The slices' sums are added in shared memory, in one order in every run.
#include "epilogue.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace symtele {

constexpr int multiply_threads = 256;
constexpr int thread_rows = 8;
constexpr int thread_columns = 4;
constexpr int stage_bytes = 16 << 10;  // of one operand

template <class T>
constexpr int piece_length = 16 / sizeof(T);

// 16 bytes: neighbours in memory, moved by one instruction.
template <class T>
struct alignas(16) Piece {
  T element[piece_length<T>];
};

constexpr int stage_pieces = stage_bytes / 16 / multiply_threads;  // of one operand, a thread

// The shape of a block's work where its tile has `extent` rows and columns.
template <class T, int extent>
struct Tile {
  static constexpr int stage_elements = stage_bytes / sizeof(T);
  static constexpr int depth = stage_elements / extent;     // of a stage, in the inner dimension
  static constexpr int piece_distance = depth / stage_pieces;  // between two pieces of a thread, there too
  static constexpr int row_groups = extent / thread_rows;
  static constexpr int column_groups = extent / thread_columns;
  static constexpr int column_distance = column_groups * piece_length<T>;  // between two pieces of a thread's columns
  static constexpr int slices = multiply_threads / (row_groups * column_groups);
  static constexpr int slice_depth = depth / slices;
  static_assert(piece_distance * extent == multiply_threads * piece_length<T>, "the pieces are the stage");
  static_assert(piece_distance % (4 * piece_length<T>) == 0, "the pieces of a thread are turned alike");
  static_assert(slice_depth % piece_length<T> == 0, "a slice is made of pieces");

  static constexpr int partial_sums = slices > 3 ? slices : 3;  // an element's, or what `finish` keeps in their place
  static constexpr int partial_bytes = partial_sums * extent * extent * sizeof(T);
  static constexpr int two_stages_bytes = 2 * 2 * stage_bytes;  // of two operands
  static constexpr int shared_bytes = partial_bytes > two_stages_bytes ? partial_bytes : two_stages_bytes;
};

// A, or B transposed: `size` rows or columns ("outer"), each with `inner` elements.
template <class T>
struct Operand {
  const T* data;
  int64_t size;
  int64_t inner;
  int64_t outer_stride;
  int64_t inner_stride;
  bool along_inner;  // the direction in which neighbours are neighbours in memory
  bool aligned;      // every piece_length-th element in that direction lies at a multiple of 16 bytes

  Operand() = default;
  Operand(const void* data, int64_t size, int64_t inner, int64_t outer_stride, int64_t inner_stride)
      : data(static_cast<const T*>(data)),
        size(size),
        inner(inner),
        outer_stride(outer_stride),
        inner_stride(inner_stride),
        along_inner(inner_stride == 1 && outer_stride != 1),
        aligned(reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
                (along_inner ? outer_stride : inner_stride) % piece_length<T> == 0) {}
};

// Element (k, outer) of an operand's stage lies in shared memory at (k extent + outer) ^ turn_of(k's piece). Neighbours
// of one k make a piece, which a thread reads at once. Without the turn, the elements that a warp writes at once where
// the operand is stored along the inner dimension, of four pieces in eight rows, would go to a few banks.
template <class T>
__device__ constexpr unsigned turn_of(unsigned k_piece) {
  return k_piece % 4 * 2 * piece_length<T>;
}

// `place` with the bits of `difference` flipped. Those from turned_below on must be zero in `place`: a sum
// flips them too then, which costs nothing where `difference` is a constant.
template <class T>
__device__ unsigned place_beside(unsigned place, unsigned difference) {
  constexpr unsigned turned_below = 8 * piece_length<T>;
  return (place ^ (difference % turned_below)) + difference / turned_below * turned_below;
}

// One thread's share of carrying an operand, stage by stage, from global to shared memory.
template <class T, int extent>
struct Carrier {
  const Operand<T>& operand;
  unsigned k;      // of this thread's first piece, in a stage
  unsigned place;  // of the same, in shared memory
  int outer_left;  // elements of the operand from there on, as far as they matter; none if not positive
  int64_t offset;  // of the same in the next stage, in global memory
  Piece<T> pieces[stage_pieces];

  __device__ Carrier(const Operand<T>& operand, unsigned tile) : operand(operand) {
    constexpr unsigned piece = piece_length<T>;
    const int64_t first_outer = int64_t{tile} * extent;
    unsigned outer;
    if (operand.along_inner) {  // four threads a row: whole sectors of it, and no bank conflict when they write
      outer = threadIdx.x / 4 % extent;
      k = (threadIdx.x / (4 * extent) * 4 + threadIdx.x % 4) * piece;
    } else {
      outer = threadIdx.x % (extent / piece) * piece;
      k = threadIdx.x / (extent / piece);
    }
    place = (k * extent + outer) ^ turn_of<T>(k / piece);
    outer_left = static_cast<int>(min(operand.size - first_outer, int64_t{extent})) - static_cast<int>(outer);
    offset = (first_outer + outer) * operand.outer_stride + k * operand.inner_stride;
  }

  // Read the next stage, from which on the operand has `inner_left` elements more; zeros outside of it.
  __device__ void fetch(int64_t inner_left) {
    const int left = static_cast<int>(min(inner_left, int64_t{Tile<T, extent>::depth})) - static_cast<int>(k);
#pragma unroll
    for (int i = 0; i < stage_pieces; ++i) {
      const int distance = i * Tile<T, extent>::piece_distance;
      pieces[i] = read(offset + distance * operand.inner_stride, left - distance);
    }
    offset += Tile<T, extent>::depth * operand.inner_stride;
  }

  __device__ Piece<T> read(int64_t from, int inner_left) const {
    Piece<T> piece{};
    if (outer_left <= 0 || inner_left <= 0) return piece;
    const int left = operand.along_inner ? inner_left : outer_left;
    const T* const data = operand.data + from;
    if (operand.aligned && left >= piece_length<T>) return *reinterpret_cast<const Piece<T>*>(data);
#pragma unroll
    for (int i = 0; i < piece_length<T>; ++i) {
      if (i < left) piece.element[i] = data[i];
    }
    return piece;
  }

  __device__ void store(T* stage) const {
#pragma unroll
    for (unsigned i = 0; i < stage_pieces; ++i) {
      const unsigned distance = i * Tile<T, extent>::piece_distance;
      if (operand.along_inner) {
#pragma unroll
        for (unsigned j = 0; j < piece_length<T>; ++j) {
          stage[place_beside<T>(place, (distance + j) * extent)] = pieces[i].element[j];
        }
      } else {
        *reinterpret_cast<Piece<T>*>(stage + place_beside<T>(place, distance * extent)) = pieces[i];
      }
    }
  }
};

// What a thread multiplies: in its slice, thread_rows neighbouring rows of the tile and thread_columns columns. The
// columns lie apart in pieces, those of neighbouring threads side by side, for the sake of the banks.
template <class T, int extent>
struct Position {
  unsigned slice = threadIdx.x / (Tile<T, extent>::row_groups * Tile<T, extent>::column_groups);
  unsigned row = threadIdx.x / Tile<T, extent>::column_groups % Tile<T, extent>::row_groups * thread_rows;
  unsigned column = threadIdx.x % Tile<T, extent>::column_groups * piece_length<T>;
};

// `count` elements of one k in a stage: pieces, the first at `place`, each `distance` behind the one before.
template <class T, int distance, int count>
__device__ void read_pieces(const T* stage, unsigned place, unsigned difference, T (&values)[count]) {
  constexpr int length = piece_length<T>;
#pragma unroll
  for (int i = 0; i < count / length; ++i) {
    const T* from = stage + place_beside<T>(place, difference ^ (i * distance));
    const Piece<T> piece = *reinterpret_cast<const Piece<T>*>(from);
#pragma unroll
    for (int j = 0; j < length; ++j) values[i * length + j] = piece.element[j];
  }
}

// Add this thread's slice of a stage to its sums. The slices take pieces of the inner dimension in turn.
template <class T, int extent>
__device__ void accumulate(const T* stage_a, const T* stage_b, const Position<T, extent>& at,
                           T (&sums)[thread_rows][thread_columns]) {
  using Shape = Tile<T, extent>;
  constexpr unsigned length = piece_length<T>;
  const unsigned place_a = (at.slice * length * extent + at.row) ^ turn_of<T>(at.slice);
  const unsigned place_b = (at.slice * length * extent + at.column) ^ turn_of<T>(at.slice);
#pragma unroll
  for (unsigned step = 0; step < Shape::slice_depth; ++step) {
    const unsigned k_piece = step / length * Shape::slices;  // of slice 0
    const unsigned difference = ((k_piece * length + step % length) * extent) ^ turn_of<T>(k_piece);
    T a[thread_rows], b[thread_columns];
    read_pieces<T, piece_length<T>>(stage_a, place_a, difference, a);
    read_pieces<T, Shape::column_distance>(stage_b, place_b, difference, b);
#pragma unroll
    for (int i = 0; i < thread_rows; ++i) {
#pragma unroll
      for (int j = 0; j < thread_columns; ++j) sums[i][j] = fma(a[i], b[j], sums[i][j]);
    }
  }
}

// Write this thread's sums into its slice's extent x extent matrix of `partial`.
template <class T, int extent>
__device__ void write_partial(T* partial, const Position<T, extent>& at,
                              const T (&sums)[thread_rows][thread_columns]) {
  using Shape = Tile<T, extent>;
  constexpr int length = piece_length<T>;
  T* const corner = partial + (at.slice * extent + at.row) * extent + at.column;
#pragma unroll
  for (int i = 0; i < thread_rows; ++i) {
#pragma unroll
    for (int j = 0; j < thread_columns / length; ++j) {
      Piece<T> piece;
#pragma unroll
      for (int c = 0; c < length; ++c) piece.element[c] = sums[i][j * length + c];
      *reinterpret_cast<Piece<T>*>(corner + i * extent + j * Shape::column_distance) = piece;
    }
  }
}

// Add up the slices' sums and take the tile through the epilogue. Its operands are all requested before
// the first is waited for, then kept in shared memory, where the partial sums of the same elements were, so that the
// code of the epilogue is there once.
template <class T, int extent>
__device__ void finish(const EpilogueOf<T>& epilogue, int64_t rows, unsigned tile_row, unsigned tile_column,
                       T* partial) {
  const int64_t top = int64_t{tile_row} * extent, left = int64_t{tile_column} * extent;
  constexpr int elements = extent * extent;
  constexpr int elements_each = elements / multiply_threads;
  Terms<T> terms[elements_each];
#pragma unroll
  for (int n = 0; n < elements_each; ++n) {
    const int element = threadIdx.x + n * multiply_threads;  // neighbours in a row go to neighbouring threads
    terms[n] = epilogue.read(min(top + element / extent, rows - 1), min(left + element % extent, epilogue.columns - 1));
  }
  __syncthreads();  // the partial sums are written
#pragma unroll
  for (int n = 0; n < elements_each; ++n) {
    T* const own = partial + threadIdx.x + n * multiply_threads;  // no other thread reads or writes this element
    for (int slice = 0; slice < Tile<T, extent>::slices; ++slice) terms[n].sum += own[slice * elements];
    own[0] = terms[n].sum;
    own[elements] = terms[n].added;
    own[2 * elements] = terms[n].at;
  }
#pragma unroll 1
  for (int element = threadIdx.x; element < elements; element += multiply_threads) {
    const int64_t i = top + element / extent, j = left + element % extent;
    const T* const own = partial + element;
    if (i < rows && j < epilogue.columns) {
      epilogue.write(i * epilogue.columns + j, {own[0], own[elements], own[2 * elements]});
    }
  }
}

// The products of a launch, each with the number of its first tile among those of all.
template <class T>
struct Group {
  struct Member {
    Operand<T> a;
    Operand<T> b;
    EpilogueOf<T> epilogue;
    unsigned first_tile;
  };

  int count;
  Member members[max_products];
};

// On one multiprocessor: what the registers allow without spilling.
template <class T>
constexpr int most_blocks = sizeof(T) == 4 ? 2 : 1;

template <class T, int extent>
__global__ void __launch_bounds__(multiply_threads, blocks_at_once(most_blocks<T>, Tile<T, extent>::shared_bytes))
    multiply(const __grid_constant__ Group<T> group) {
  using Shape = Tile<T, extent>;
  T* const shared = shared_memory<T>();
  int own = group.count - 1;
  while (blockIdx.x < group.members[own].first_tile) --own;
  const Operand<T>& a = group.members[own].a;
  const Operand<T>& b = group.members[own].b;
  const unsigned tile = blockIdx.x - group.members[own].first_tile;
  const unsigned tiles_across = static_cast<unsigned>(divide_up(b.size, extent));
  const unsigned tile_row = tile / tiles_across, tile_column = tile % tiles_across;
  const Position<T, extent> at;

  T sums[thread_rows][thread_columns] = {};
  Carrier<T, extent> carry_a(a, tile_row), carry_b(b, tile_column);
  T* present = shared;
  T* next = shared + 2 * Shape::stage_elements;
  // `left` of the inner dimension is not yet multiplied, counted as if there were a stage before the first.
  for (int64_t left = a.inner + Shape::depth; left > 0; left -= Shape::depth) {
    carry_a.fetch(left - Shape::depth);
    carry_b.fetch(left - Shape::depth);
    if (left <= a.inner && at.slice * piece_length<T> < left) {
      accumulate<T, extent>(present, present + Shape::stage_elements, at, sums);
    }
    if (left > Shape::depth) {
      carry_a.store(next);
      carry_b.store(next + Shape::stage_elements);
    }
    __syncthreads();  // `next` is written, and `present` read by all
    T* const free = present;
    present = next;
    next = free;
  }

  write_partial<T, extent>(shared, at, sums);
  finish<T, extent>(group.members[own].epilogue, a.size, tile_row, tile_column, shared);
}

constexpr int64_t count_tiles(const Product& product, int extent) {
  return divide_up(product.rows, extent) * divide_up(product.columns, extent);
}

inline int64_t count_tiles(const Product* products, int count, int extent) {
  int64_t tiles = 0;
  for (int p = 0; p < count; ++p) tiles += count_tiles(products[p], extent);
  return tiles;
}

template <class T, int extent>
cudaError_t launch_multiply(const Product* products, int count, cudaStream_t stream) {
  Group<T> group{};
  int64_t tiles = 0;
  for (int p = 0; p < count; ++p) {
    const Product& product = products[p];
    const int64_t of_product = count_tiles(product, extent);
    if (of_product == 0) continue;
    group.members[group.count++] = {
        {product.a.data, product.rows, product.inner, product.a.row_stride, product.a.column_stride},
        {product.b.data, product.columns, product.inner, product.b.column_stride, product.b.row_stride},
        EpilogueOf<T>(product),
        static_cast<unsigned>(tiles)};
    tiles += of_product;
  }
  if (tiles == 0) return cudaSuccess;
  return launch(multiply<T, extent>, static_cast<unsigned>(tiles), multiply_threads, Tile<T, extent>::shared_bytes,
                stream, group);
}

// About three quarters of an H100's multiprocessors. A large tile reads less memory a product, but costs four times
// the time of one of half its extent: it pays where there are as many of them.
constexpr int64_t enough_tiles = 96;

template <class T>
cudaError_t launch_fused_of(const Product* products, int count, cudaStream_t stream) {
  if (count_tiles(products, count, 64) >= enough_tiles) return launch_multiply<T, 64>(products, count, stream);
  if (count_tiles(products, count, 32) >= enough_tiles) return launch_multiply<T, 32>(products, count, stream);
  return launch_multiply<T, 16>(products, count, stream);
}

cudaError_t launch_fused(const Product* products, int count, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  return products[0].dtype == Dtype::f32 ? launch_fused_of<float>(products, count, stream)
                                         : launch_fused_of<double>(products, count, stream);
}

cudaError_t launch_epilogue(const Product& product, cudaStream_t stream) {
  if (product.rows == 0 || product.columns == 0) return cudaSuccess;
  return product.dtype == Dtype::f32 ? launch_epilogue_of<float>(product, stream)
                                     : launch_epilogue_of<double>(product, stream);
}

}  // namespace symtele
