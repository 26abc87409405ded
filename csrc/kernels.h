// What the CUDA launchers offer to the bindings: raw pointers, sizes and a stream, nothing of torch.
//
// Every function launches on `stream` of the current device, does not synchronise, and returns the first CUDA error of
// its launches (cudaSuccess = 0). Empty problems launch nothing. Sizes are those of the operands' matrices; offsets are
// computed in 64 bits.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include <cuda_runtime_api.h>

namespace symtele {

enum class Dtype { f32, f64, i32 };  // i32 for squared_norms alone

enum class ActivationKind : int;

// Of the activation that the operators call `name`; none of an unknown one.
std::optional<ActivationKind> find_activation(std::string_view name);
// All of these names, for errors.
std::string activation_names();

// gain sigma(rate z + shift) + offset, with sigma of this kind and its one parameter: the slope of leaky_relu, beta of
// softplus, alpha of elu. Of sigma itself rate and gain are 1, shift and offset 0.
struct Activation {
  ActivationKind kind;
  double parameter;
  double rate;
  double shift;
  double gain;
  double offset;
};

// Element (i, j) lies at data[i * row_stride + j * column_stride]; at least one of the strides is 1.
struct Matrix {
  const void* data;
  int64_t row_stride;
  int64_t column_stride;
};

// What happens to acc = (A B)_ij. With t = alpha * (acc + column_i * row_j) + beta * source_ij,
// where `column` is 1 if null, and the terms of a null `row` or `source` are absent:
//
//   linear              first = t
//   activation          first = t;                                          second = sigma(t)
//   inverse_activation  first = sigma^-1(acc);                              second = first + beta * at
//   over_slope          first = t;                                          second = t / sigma'(at)
//   times_slope         first = acc * sigma'(at) + beta * source
//   masked              first = t;                                          second = t * at
enum class EpilogueKind { linear, activation, inverse_activation, over_slope, times_slope, masked };

struct Epilogue {
  EpilogueKind kind;
  Activation activation;
  double alpha;
  double beta;
  const void* source;  // rows x columns, row-major and contiguous, like at, first and second
  const void* at;
  const void* column;  // `rows` elements, column_stride apart
  int64_t column_stride;
  const void* row;  // `columns` elements, row_stride apart
  int64_t row_stride;
  void* first;
  void* second;
};

// A is rows x inner, B is inner x columns.
struct Product {
  Dtype dtype;
  int64_t rows;
  int64_t columns;
  int64_t inner;
  Matrix a;
  Matrix b;
  Epilogue epilogue;
};

// How a product is computed: by the fused kernel of matmul.cu; on the tensor cores in three TF32 products that keep
// float32's accuracy (matmul_tensor.cu); or by the library's matrix product and an elementwise pass.
enum class Route { fused, tensor, library };

Route choose_route(const Product& product, bool allow_tf32, int compute_capability);

// Products of one dtype that do not read each other's results, in one launch.
constexpr int max_products = 8;
cudaError_t launch_fused(const Product* products, int count, cudaStream_t stream);
cudaError_t launch_tensor(const Product& product, cudaStream_t stream);
// The elementwise pass alone: `first` holds A B when it starts.
cudaError_t launch_epilogue(const Product& product, cudaStream_t stream);

// exact = H H^T (+ 1 with bias) in float64 and rounded = the same in `dtype` (may be null; for f64 pass null), both
// rows x rows and contiguous. H is rows x columns in `dtype`, with as many rows in all of a launch.
struct GramProduct {
  Matrix h;
  int64_t columns;
  bool bias;
  double* exact;
  void* rounded;
};
constexpr int max_grams = 16;
cudaError_t launch_grams(Dtype dtype, int64_t rows, const GramProduct* grams, int count, cudaStream_t stream);

// to[i] = from[i]^-1 for symmetric positive definite matrices (size x size, contiguous), rounded[i] = the same unless
// it is null, and infos[i] = 0; where a pivot is not positive infos[i] is its number, counted from 1, and the results
// hold no meaning. No result may alias a matrix.
// `workspace` has invert_grams_workspace(count, size) bytes.
constexpr int max_tensors = 64;
struct SquareMatrices {
  int count;
  const double* from[max_tensors];
  double* to[max_tensors];
  float* rounded[max_tensors];
};
int64_t invert_grams_workspace(int count, int64_t size);
cudaError_t launch_invert_grams(int64_t size, const SquareMatrices& grams, int32_t* infos, double* workspace,
                                cudaStream_t stream);

// A layer's step, over `elements` elements: moved = base + *size * change and targets = sigma^-1(moved), or along the
// targets targets = base + *size * change and moved = sigma(targets); and slopes = sigma'(targets).
struct LayerStep {
  bool along_targets;
  Activation activation;
  int64_t elements;
  const void* base;
  const void* change;
  void* moved;
  void* targets;
  void* slopes;
};
constexpr int max_steps = 16;
cudaError_t launch_steps(Dtype dtype, const LayerStep* steps, int count, const double* size, cudaStream_t stream);

// result = left * right * sigma''(at) + source, over `count` elements; without the last if `source` is null.
cudaError_t launch_times_curvature(Dtype dtype, int64_t count, Activation activation, const void* left,
                                   const void* right, const void* at, const void* source, void* result,
                                   cudaStream_t stream);

// *result = scale * the sum of the pairs' dot products, or its square root; accumulated in float64, in the same order in
// every run.
// `partial` has dot_sum_workspace() bytes.
struct TensorPairs {
  int count;
  const void* left[max_tensors];
  const void* right[max_tensors];
  int64_t elements[max_tensors];
};
int64_t dot_sum_workspace();
cudaError_t launch_dot_sum(Dtype dtype, const TensorPairs& pairs, double scale, bool root, double* partial,
                           double* result, cudaStream_t stream);

// result[i] = the sum of the squares of tensor i, accumulated in float64, in the same order in every run.
// `partial` has squared_norms_workspace() bytes.
struct MixedTensors {
  int count;
  Dtype dtype[max_tensors];
  const void* data[max_tensors];
  int64_t elements[max_tensors];
};
int64_t squared_norms_workspace();
cudaError_t launch_squared_norms(const MixedTensors& tensors, double* partial, double* result, cudaStream_t stream);

// Copy `bytes[i]` bytes from source[i] to target[i] for every i if *accept is true.
struct ByteCopies {
  int count;
  void* target[max_tensors];
  const void* source[max_tensors];
  int64_t bytes[max_tensors];
};
cudaError_t launch_commit(const bool* accept, const ByteCopies& copies, cudaStream_t stream);

// The state of a search on the device, as `control` holds it: the objective's value, the trust region's radius, whether
// a step has failed and whether the search has ended (as numbers), and the first radius.
struct SearchControl {
  double value;
  double radius;
  double failed;
  double ended;
  double first_radius;
};

struct JudgeRules {
  double growth;
  double later_growth;
  double shrinkage;
  double smallest_radius;
  double cap_share;
  double cap_aim;
  double least_share;
  double largest_share;
  double shortened_below;
};

// What is known of a step: scalars and flags on the device.
struct StepFacts {
  const double* size;
  const double* norm;
  const double* value;
  const double* cap;
  const bool* hindered;
  int64_t hindered_count;
  const bool* broken;
  int64_t broken_count;
  bool maximise;
};

// Decide on a step as kernels/judgement.py says it, write *accepted and the row of judge_figures figures, update *control.
constexpr int judge_figures = 6;
cudaError_t launch_judge(SearchControl* control, const JudgeRules& rules, const StepFacts& facts, bool* accepted,
                         double* row, cudaStream_t stream);

// *beyond = whether for any of the matrices *info is not 0 or |gram|_F^2 |inverse|_F^2 > largest^4 (or NaN).
// `partial` has near_dependence_workspace() bytes.
struct GramList {
  int count;
  const double* gram[max_tensors];
  const double* inverse[max_tensors];
  const int32_t* info[max_tensors];
  int64_t elements[max_tensors];
};
int64_t near_dependence_workspace();
cudaError_t launch_near_dependence(const GramList& grams, double largest, double* partial, bool* beyond,
                                   cudaStream_t stream);

}  // namespace symtele
