// Products on the tensor cores with the accuracy of float32, and their epilogues (see kernels.h).
//
// A float is split into two TF32 numbers, big + small, and big*big + big*small + small*big is summed: what is left out
// is below 2^-20 of a term. The tensor cores cut off instead of rounding when they add, a bias that grows with the
// length of the sum: in a model of them 2e-5 of the result after 2048 terms. The main loop therefore sums one tile of
// `inner` on them and adds the tiles' sums in float32 with rounding, which leaves 4e-7, less than a plain sum in
// float32.
//
// The main loop is CUTLASS's for compute capability 8.0, which later devices run too. An infinite operand gives NaN.
#include <cuda_runtime.h>

#include <cutlass/cutlass.h>
#include <cutlass/gemm/gemm.h>
#include <cutlass/gemm/threadblock/default_mma.h>
#include <cutlass/gemm/threadblock/threadblock_swizzle.h>

#include "epilogue.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "matmul_tensor.h"

namespace symtele {

using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;

// How the work is divided: a block of threads and each warp of it do tiles of rows x columns x inner. Blocks is how
// many should fit onto a multiprocessor at a time, which bounds the registers.
template <class BlockShape, class WarpShape, int Stages, int Blocks>
struct Tiles {
  using Block = BlockShape;
  using Warp = WarpShape;
  static constexpr int stages = Stages;
  static constexpr int blocks = Blocks;
  static constexpr int threads = 32 * (Block::kM / Warp::kM) * (Block::kN / Warp::kN);
};

// A warp holds its sums twice (see above): a tile larger than 32 x 64 does not fit into its registers.
using LargeTiles = Tiles<cutlass::gemm::GemmShape<128, 128, 32>, cutlass::gemm::GemmShape<32, 64, 32>, 3, 1>;
using SmallTiles = Tiles<cutlass::gemm::GemmShape<64, 64, 32>, cutlass::gemm::GemmShape<32, 32, 32>, 3, 3>;

using TensorPiece = cutlass::AlignedArray<float, tensor_piece>;  // moved in one access of 16 bytes

// Take the sums of elements (i, j), (i, j + 1), ... of the product and write their results.
__device__ inline void apply_to_piece(const EpilogueOf<float>& epilogue, int64_t i, int64_t j,
                                      const TensorPiece& sums) {
  const int64_t element = i * epilogue.columns + j;
  const auto load = [element](const float* matrix) {
    return matrix ? *reinterpret_cast<const TensorPiece*>(matrix + element) : TensorPiece{};
  };
  const auto store = [element](float* matrix, const TensorPiece& piece) {
    if (matrix) *reinterpret_cast<TensorPiece*>(matrix + element) = piece;
  };
  const TensorPiece source = load(epilogue.source), at = load(epilogue.at);
  TensorPiece first{}, second{};
  EpilogueOf<float> here = epilogue;  // the same on copies of these elements, in registers; no source is one of zeros
  here.source = source.data();
  here.at = at.data();
  here.first = first.data();
  here.second = second.data();
  if (here.row) here.row += j * here.row_stride;
  if (here.column) here.column += i * here.column_stride;
#pragma unroll
  for (int e = 0; e < tensor_piece; ++e) here.apply(0, e, sums[e]);
  store(epilogue.first, first);
  store(epilogue.second, second);
}

// The kernel for operands of these layouts.
template <class LayoutA, class LayoutB, class Tiling>
struct TensorProduct {
  using Block = typename Tiling::Block;
  using Mma = typename cutlass::gemm::threadblock::DefaultMma<
      float, LayoutA, tensor_piece, float, LayoutB, tensor_piece, float, RowMajor, cutlass::arch::OpClassTensorOp,
      cutlass::arch::Sm80, Block, typename Tiling::Warp, cutlass::gemm::GemmShape<16, 8, 8>, Tiling::stages,
      cutlass::arch::OpMultiplyAddFastF32>::ThreadblockMma;
  static_assert(Mma::Detail::kStagedAccumulation, "long sums on the tensor cores lose the accuracy of float32");
  using Swizzle = cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>;  // neighbours share operands in L2

  static constexpr int pitch = Block::kN + 8;  // of the sums in shared memory; fewer bank conflicts than kN

  union Shared {
    typename Mma::SharedStorage operands;
    alignas(16) float sums[Block::kM * pitch];
  };
  static constexpr int blocks = blocks_at_once(Tiling::blocks, sizeof(Shared));
  static_assert(sizeof(Shared) <= size_t{99} << 10, "compute capabilities 8.6, 8.9 and 12.0 have no more for a block");

  struct Arguments {
    cutlass::gemm::GemmCoord size;
    cutlass::gemm::GemmCoord tiles;
    int log_swizzle;
    typename Mma::IteratorA::Params layout_a;
    typename Mma::IteratorB::Params layout_b;
    float* a;
    float* b;
    EpilogueOf<float> epilogue;
  };

  static __device__ void run(const Arguments& arguments) {
    const cutlass::gemm::GemmCoord tile = Swizzle::get_tile_offset(arguments.log_swizzle);
    if (tile.m() >= arguments.tiles.m() || tile.n() >= arguments.tiles.n()) return;
    Shared& shared = *shared_memory<Shared>();
    const int top = tile.m() * Block::kM, left = tile.n() * Block::kN;
    multiply(arguments, top, left, shared);
    __syncthreads();
    constexpr int pieces_across = Block::kN / tensor_piece;
    for (int piece = threadIdx.x; piece < Block::kM * pieces_across; piece += Tiling::threads) {
      const int i = piece / pieces_across, j = piece % pieces_across * tensor_piece;
      if (top + i >= arguments.size.m() || left + j >= arguments.size.n()) continue;
      apply_to_piece(arguments.epilogue, top + i, left + j, reinterpret_cast<TensorPiece&>(shared.sums[i * pitch + j]));
    }
  }

  // The sums of the tile at (top, left), into shared.sums.
  static __device__ void multiply(const Arguments& arguments, int top, int left, Shared& shared) {
    const cutlass::gemm::GemmCoord& size = arguments.size;
    const int thread = threadIdx.x, lane = thread % 32;
    const int warp = __shfl_sync(0xffffffff, thread / 32, 0);  // so that the compiler knows that a warp agrees on it
    typename Mma::IteratorA a(arguments.layout_a, arguments.a, size.mk(), thread, {top, 0});
    typename Mma::IteratorB b(arguments.layout_b, arguments.b, size.kn(), thread, {0, left});
    typename Mma::FragmentC sums;
    sums.clear();
    Mma mma(shared.operands, thread, warp, lane);
    mma((size.k() + Block::kK - 1) / Block::kK, sums, a, b, sums);

    // Mma ends with a barrier, so the operands are no longer needed; warps lie in it column by column.
    constexpr int warps_down = Block::kM / Tiling::Warp::kM;
    typename Mma::Operator::IteratorC tile({shared.sums, RowMajor(pitch)}, lane);
    tile.add_tile_offset({warp % warps_down, warp / warps_down});
    tile.store(sums);
  }
};

template <class Kernel, class Tiling>
__global__ void __launch_bounds__(Tiling::threads, Kernel::blocks)
    multiply_on_tensor_cores(const typename Kernel::Arguments arguments) {
  Kernel::run(arguments);
}

template <class LayoutA, class LayoutB, class Tiling>
cudaError_t launch_tensor_of(const Product& product, cudaStream_t stream) {
  using Kernel = TensorProduct<LayoutA, LayoutB, Tiling>;
  using Block = typename Tiling::Block;
  using Swizzle = typename Kernel::Swizzle;
  const auto leading = [](const Matrix& matrix) {
    return static_cast<int>(matrix.column_stride == 1 ? matrix.row_stride : matrix.column_stride);
  };
  const auto data = [](const Matrix& matrix) { return const_cast<float*>(static_cast<const float*>(matrix.data)); };
  const cutlass::gemm::GemmCoord size(static_cast<int>(product.rows), static_cast<int>(product.columns),
                                      static_cast<int>(product.inner));
  const cutlass::gemm::GemmCoord tiles = Swizzle::get_tiled_shape(size, {Block::kM, Block::kN, Block::kK}, 1);
  const typename Kernel::Arguments arguments{size,
                                             tiles,
                                             Swizzle::get_log_tile(tiles),
                                             LayoutA(leading(product.a)),
                                             LayoutB(leading(product.b)),
                                             data(product.a),
                                             data(product.b),
                                             EpilogueOf<float>(product)};
  return launch(multiply_on_tensor_cores<Kernel, Tiling>, Swizzle::get_grid_shape(tiles), Tiling::threads,
                sizeof(typename Kernel::Shared), stream, arguments);
}

// Large tiles need less of the memory and of the warps' time for a product, but only one of their blocks fits onto a
// multiprocessor: they pay where there are about two for each of an H100's 132. To be checked by measurement.
template <class LayoutA, class LayoutB>
cudaError_t launch_tensor_tiled(const Product& product, cudaStream_t stream) {
  using Large = LargeTiles::Block;
  const int64_t large_tiles = divide_up(product.rows, Large::kM) * divide_up(product.columns, Large::kN);
  return large_tiles >= 256 ? launch_tensor_of<LayoutA, LayoutB, LargeTiles>(product, stream)
                            : launch_tensor_of<LayoutA, LayoutB, SmallTiles>(product, stream);
}

template <class LayoutA>
cudaError_t launch_tensor_with(const Product& product, cudaStream_t stream) {
  return product.b.column_stride == 1 ? launch_tensor_tiled<LayoutA, RowMajor>(product, stream)
                                      : launch_tensor_tiled<LayoutA, ColumnMajor>(product, stream);
}

cudaError_t launch_tensor(const Product& product, cudaStream_t stream) {
  if (!tensor_route_accepts(product)) return cudaErrorInvalidValue;
  return product.a.column_stride == 1 ? launch_tensor_with<RowMajor>(product, stream)
                                      : launch_tensor_with<ColumnMajor>(product, stream);
}

}  // namespace symtele
