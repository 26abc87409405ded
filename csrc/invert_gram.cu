// The inverses of symmetric positive definite matrices, by sweeps of their pivots, 32 pivots of every matrix a launch.
//
// Sweeping pivot c of a symmetric A, with d = a_cc and u = the column a_:c but u_c = 1, takes, for i >= j,
//
//     a_ij <- (a_ij or, where i = c or j = c, 0) -+ u_i u_j / d        + where i <= c, - elsewhere
//
// and after all pivots A is the inverse. It is Cholesky's factorization K = L D L^T, the inversion of L row by row and
// the product of the triangles in one pass: the one-sweep algorithm of Bientinesi, Gunter, van de Geijn (2008). Only
// the lower triangle is kept on the way.
//
// A launch sweeps the 32 pivots of one block column k of every A. A block of threads has one tile of one of them, and
// sweeps the pivot block (k, k) and the two panels that its tile needs, (i, k) and (j, k), for itself, one pivot after
// the other, adding each pivot's term to its tile as it goes. So nothing but the matrices passes from launch to launch.
//
// ||K X - I|| is a few u kappa(K) times the norm of K_21 K_11^-1, the largest for all leading blocks K_11 of K. That is
// about u kappa^(3/2) at worst, which the float32 factor of symtele_cuda/kernels/pinv.py bears to its largest condition number,
// and a few u kappa for graded spectra. To multiply with the inverse of the pivot block, as blocked Gauss-Jordan does,
// would lose u kappa^(3/2) for any two clusters of eigenvalues.
#include <cfloat>

#include "kernels.h"
#include "launch.cuh"

namespace symtele {

constexpr int sweep_width = 32;  // the pivots of a launch and the side of a tile: a lane for every column
constexpr int strip_height = 4;  // a thread holds this many rows of its lane's column
constexpr int sweep_threads = sweep_width * sweep_width / strip_height;
// On a multiprocessor: the 272 tiles of two matrices of 512 rows are all at work at once on the 132 of an H100 or H200.
// That leaves 80 registers a thread, so that what the pivots' columns hold is read again rather than kept.
constexpr int sweeps_at_once = 3;

struct alignas(16) Strip {
  double row[strip_height];
};

struct TileColumn {
  Strip strips[sweep_width / strip_height];

  __device__ double at(int row) const { return strips[row / strip_height].row[row % strip_height]; }
};

// The columns u of the pivot block and of the panels (i, k) and (j, k) at one pivot.
struct PivotColumn {
  TileColumn pivots, panel_i, panel_j;
};

struct SweepMemory {
  PivotColumn columns[2][2];                    // at a pair of pivots, and at the next pair
  double turned[sweep_width][sweep_width + 1];  // one more than the width, so that columns do not share a bank
};

// This thread's place in a tile.
__device__ inline int lane_of_tile() { return threadIdx.x % sweep_width; }
__device__ inline int strip_of_tile() { return threadIdx.x / sweep_width; }

// Tile (i, j), i >= j, of the lower triangle; beyond the matrix and above its diagonal that of the identity.
__device__ inline Strip load_tile(const double* matrix, int64_t size, int64_t i, int64_t j) {
  Strip strip;
  const int64_t column = j * sweep_width + lane_of_tile();
  for (int q = 0; q < strip_height; ++q) {
    const int64_t row = i * sweep_width + strip_of_tile() * strip_height + q;
    strip.row[q] = row < size && column <= row ? matrix[row * size + column] : double(row == column);
  }
  return strip;
}

__device__ inline Strip constant_tile(double diagonal) {
  Strip strip;
  for (int q = 0; q < strip_height; ++q) {
    strip.row[q] = strip_of_tile() * strip_height + q == lane_of_tile() ? diagonal : 0;
  }
  return strip;
}

__device__ inline void negate(Strip& strip) {
  for (int q = 0; q < strip_height; ++q) strip.row[q] = -strip.row[q];
}

// The transposed tile. All threads of the block come here together.
__device__ inline Strip transpose_tile(const Strip& strip, SweepMemory& memory) {
  Strip turned;
  for (int q = 0; q < strip_height; ++q) {
    memory.turned[strip_of_tile() * strip_height + q][lane_of_tile()] = strip.row[q];
  }
  __syncthreads();
  for (int q = 0; q < strip_height; ++q) {
    turned.row[q] = memory.turned[lane_of_tile()][strip_of_tile() * strip_height + q];
  }
  __syncthreads();
  return turned;
}

// Panel (i, k) of the symmetric matrix, as the pivots of block k sweep it: u_c = 1 makes it the identity for i = k.
__device__ inline Strip load_panel(const double* matrix, int64_t size, int64_t i, int64_t k, SweepMemory& memory) {
  if (i == k) return constant_tile(1);
  if (i > k) return load_tile(matrix, size, i, k);
  return transpose_tile(load_tile(matrix, size, k, i), memory);
}

// Write the elements (row, column) of tile (i, j) for which kept(row, column) holds.
template <class T, class Kept>
__device__ void store_tile(const Strip& strip, T* matrix, int64_t size, int64_t i, int64_t j, Kept kept) {
  const int64_t column = j * sweep_width + lane_of_tile();
  for (int q = 0; q < strip_height; ++q) {
    const int64_t row = i * sweep_width + strip_of_tile() * strip_height + q;
    if (row < size && column < size && kept(row, column)) {
      matrix[row * size + column] = static_cast<T>(strip.row[q]);
    }
  }
}

// Whether d and 1 / d are positive and normal numbers.
__device__ inline bool is_pivot(double d) { return d >= DBL_MIN && d <= 1 / DBL_MIN; }

// 1 / d to about an ulp for what is a pivot. The exact division has a branch for other numbers and a last correction,
// and every pivot waits for the reciprocal of the one before.
__device__ inline double reciprocal(double d) {
#ifdef __CUDA_ARCH__
  double r;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(r) : "d"(d));  // 20 bits, doubled twice
  r = fma(r, fma(-d, r, 1.0), r);
  return fma(r, fma(-d, r, 1.0), r);
#else
  return 1 / d;
#endif
}

// Take from a strip what sweeping two pivots takes, so many times each one's column. `u` and `next` are the columns
// before both; the first pivot leaves next - in_next u of the second's.
__device__ inline void sweep(Strip& strip, const Strip& u, const Strip& next, double in_next,
                             const double (&factors)[2]) {
  for (int q = 0; q < strip_height; ++q) {
    strip.row[q] -= u.row[q] * factors[0];
    strip.row[q] -= (next.row[q] - u.row[q] * in_next) * factors[1];
  }
}

// Sweep the pivots of block k of matrix blockIdx.z into tile (blockIdx.y, blockIdx.x) of its result; its info takes
// the number of the first pivot that is none, counted from 1. The last launch also writes the upper triangle, and the
// result in float32.
__global__ void __launch_bounds__(sweep_threads, sweeps_at_once)
    sweep_pivots(int64_t size, int64_t k, SquareMatrices matrices, int32_t* infos) {
  const int64_t i = blockIdx.y, j = blockIdx.x;
  if (j > i) return;
  const double* __restrict__ from = matrices.from[blockIdx.z];
  SweepMemory& memory = *shared_memory<SweepMemory>();
  const int lane = lane_of_tile(), strip = strip_of_tile();

  Strip tile = i == k || j == k ? constant_tile(0) : load_tile(from, size, i, j);
  Strip pivots = load_tile(from, size, k, k);
  Strip panel_i = load_panel(from, size, i, k, memory);
  Strip panel_j = load_panel(from, size, j, k, memory);
  // The sign of the tile's terms. They are linear in the panel, so that it need not be set at every pivot.
  if (i > k) negate(panel_j);

  const auto publish = [&](PivotColumn& column) {
    column.pivots.strips[strip] = pivots;
    column.panel_i.strips[strip] = panel_i;
    column.panel_j.strips[strip] = panel_j;
  };

  const int count = static_cast<int>(min(int64_t{sweep_width}, size - k * sweep_width));
  int failed = 0;  // the first in this block that is no pivot, counted from 1
  if (lane < 2) publish(memory.columns[0][lane]);
  // Two pivots from one barrier to the next: every thread sweeps the second's column for itself. Behind an odd number of
  // pivots comes one of the identity, which changes nothing.
  for (int c = 0; c < count; c += 2) {
    __syncthreads();
    const PivotColumn &first = memory.columns[c / 2 % 2][0], &second = memory.columns[c / 2 % 2][1];
    const double d = first.pivots.at(c), u_next = first.pivots.at(c + 1), r = reciprocal(d);
    const double in_next = r * u_next;
    const double d_next = second.pivots.at(c + 1) - u_next * in_next, r_next = reciprocal(d_next);

    // Columns and rows up to the pivots' are done with; what happens to them here does not matter.
    const double u = first.pivots.at(lane);
    const double in_panels[2] = {r * u, r_next * (second.pivots.at(lane) - u * in_next)};
    sweep(pivots, first.pivots.strips[strip], second.pivots.strips[strip], in_next, in_panels);
    sweep(panel_j, first.panel_j.strips[strip], second.panel_j.strips[strip], in_next, in_panels);
    sweep(panel_i, first.panel_i.strips[strip], second.panel_i.strips[strip], in_next, in_panels);
    if ((lane & ~1) == c + 2) publish(memory.columns[(c / 2 + 1) % 2][lane % 2]);

    const double u_j = first.panel_j.at(lane);
    const double in_tile[2] = {-r * u_j, -r_next * (second.panel_j.at(lane) - u_j * in_next)};
    sweep(tile, first.panel_i.strips[strip], second.panel_i.strips[strip], in_next, in_tile);
    if (failed == 0 && !is_pivot(d)) failed = c + 1;
    if (failed == 0 && !is_pivot(d_next)) failed = c + 2;
  }

  double* __restrict__ to = matrices.to[blockIdx.z];
  int32_t* const info = infos + blockIdx.z;
  const bool reports = i == 0 && j == 0 && threadIdx.x == 0;
  if (reports && (k == 0 || *info == 0)) *info = failed == 0 ? 0 : static_cast<int>(k) * sweep_width + failed;
  const auto in_lower = [](int64_t row, int64_t column) { return row >= column; };
  const auto in_upper = [](int64_t row, int64_t column) { return row < column; };
  store_tile(tile, to, size, i, j, in_lower);
  if (k + 1 < gridDim.x) return;
  const Strip turned = transpose_tile(tile, memory);
  store_tile(turned, to, size, j, i, in_upper);
  if (float* const rounded = matrices.rounded[blockIdx.z]) {
    store_tile(tile, rounded, size, i, j, in_lower);
    store_tile(turned, rounded, size, j, i, in_upper);
  }
}

int64_t invert_grams_workspace(int count, int64_t size) {
  return size > sweep_width ? count * size * size * int64_t{sizeof(double)} : 0;
}

cudaError_t launch_invert_grams(int64_t size, const SquareMatrices& grams, int32_t* infos, double* workspace,
                                cudaStream_t stream) {
  const int count = grams.count;
  if (count == 0) return cudaSuccess;
  if (size == 0) return cudaMemsetAsync(infos, 0, count * sizeof(*infos), stream);
  const int64_t blocks = divide_up(size, sweep_width);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(blocks), static_cast<unsigned>(count));
  SquareMatrices sweep = grams;
  for (int64_t k = 0; k < blocks; ++k) {
    // No launch writes what it reads, and the last one writes the inverses.
    const bool to_inverses = (blocks - 1 - k) % 2 == 0;
    for (int m = 0; m < count; ++m) sweep.to[m] = to_inverses ? grams.to[m] : workspace + m * size * size;
    const cudaError_t error =
        launch(sweep_pivots, grid, sweep_threads, sizeof(SweepMemory), stream, size, k, sweep, infos);
    if (error != cudaSuccess) return error;
    for (int m = 0; m < count; ++m) sweep.from[m] = sweep.to[m];
  }
  return cudaSuccess;
}

}  // namespace symtele
