// The operators of symtele_cuda/kernels/torch_kernels.py on CUDA tensors: schemas, checks, memory and the choice of the kernel.
//
// There is no Python in here: torch.ops.load_library loads the library, whatever the version of Python. Every operator
// runs on the device and the current stream of its first tensor, takes memory from torch alone and never waits for the
// device, so that CUDA graphs can capture it. Only what a kernel cannot read as it lies is copied.
#include <algorithm>
#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "kernels.h"

namespace symtele {
namespace {

using at::Tensor;
using at::TensorList;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t max_elements = int64_t{1} << 31;

// Beyond this size the Gram matrix and its inverse fill a GPU with the library's kernels; below it they are made of
// launches, of which our own kernels need fewer.
constexpr int64_t largest_own_gram = 512;

// ---------------------------------------------------------------------------------------------------------------------
// checks: every error names the argument, what was expected and what came
// ---------------------------------------------------------------------------------------------------------------------

std::string name_of(at::ScalarType dtype) { return std::string(c10::getDtypeNames(dtype).first); }

void check_size(const char* name, const Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.numel() <= max_elements, name, " must have at most 2^31 elements, got ", tensor.numel(),
                    " in shape ", tensor.sizes());
}

void check_device(const char* name, const Tensor& tensor, c10::Device device) {
  TORCH_CHECK_VALUE(tensor.device() == device, name, " must be on the device of the first tensor, ", device, ", got ",
                    tensor.device());
}

void check_on_cuda(const char* name, const Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.is_cuda(), name, " must be on a CUDA device, got ", tensor.device());
}

void check_dtype(const char* name, const Tensor& tensor, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, " must be of dtype ", name_of(dtype), ", got ",
                   name_of(tensor.scalar_type()));
}

void check_shape(const char* name, const Tensor& tensor, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " must have shape ", shape, ", got ", tensor.sizes());
  check_size(name, tensor);
}

void check_is_matrix(const char* name, const Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.dim() == 2, name, " must be a matrix, got shape ", tensor.sizes());
  check_size(name, tensor);
}

// The tensor that the others of a call follow in device and dtype.
void check_first(const char* name, const Tensor& tensor) {
  check_on_cuda(name, tensor);
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble, name,
                   " must be of dtype float32 or float64, got ", name_of(tensor.scalar_type()));
  check_size(name, tensor);
}

void check_follows(const char* name, const Tensor& tensor, const Tensor& first) {
  check_device(name, tensor, first.device());
  check_dtype(name, tensor, first.scalar_type());
}

void check_scalar(const char* name, const Tensor& tensor, at::ScalarType dtype, c10::Device device) {
  check_device(name, tensor, device);
  check_dtype(name, tensor, dtype);
  TORCH_CHECK_VALUE(tensor.numel() == 1, name, " must have one element, got shape ", tensor.sizes());
}

void check_length(const char* name, size_t length, const char* other_name, size_t expected) {
  TORCH_CHECK_VALUE(length == expected, name, " must have as many elements as ", other_name, ", ", expected, ", got ",
                    length);
}

// Raise the CUDA error that `function` returned.
void check_cuda(cudaError_t error, const char* function) {
  const char* advice = error == cudaErrorNoKernelImageForDevice
                           ? "; `python -m symtele_cuda info` names the architectures that were built"
                           : "";
  TORCH_CHECK(error == cudaSuccess, "symtele_cuda: ", function, " failed with ", cudaGetErrorName(error), " (",
              cudaGetErrorString(error), ")", advice);
}

// ---------------------------------------------------------------------------------------------------------------------
// tensors as the launchers take them
// ---------------------------------------------------------------------------------------------------------------------

Dtype dtype_of(const Tensor& tensor) { return tensor.scalar_type() == at::kFloat ? Dtype::f32 : Dtype::f64; }

constexpr size_t numbers_of_activation = 5;

Activation make_activation(std::string_view name, at::ArrayRef<double> numbers) {
  TORCH_CHECK_VALUE(numbers.size() == numbers_of_activation, "numbers must be ", numbers_of_activation,
                    " of an activation, got ", numbers.size());
  const std::optional<ActivationKind> kind = find_activation(name);
  TORCH_CHECK_VALUE(kind, "activation must be one of ", activation_names(), ", got ", name);
  return {*kind, numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]};
}

// The strides of a matrix whose elements follow each other along rows or along columns, without overlap. A dimension of
// one element has any stride; it gets the one that the layout would have.
std::optional<std::pair<int64_t, int64_t>> matrix_strides(const Tensor& tensor) {
  const int64_t rows = tensor.size(0), columns = tensor.size(1);
  const int64_t down = tensor.stride(0), across = tensor.stride(1);
  if ((across == 1 || columns <= 1) && (down >= columns || rows <= 1)) {
    return std::pair{rows <= 1 ? std::max<int64_t>(columns, 1) : down, int64_t{1}};
  }
  if ((down == 1 || rows <= 1) && (across >= rows || columns <= 1)) {
    return std::pair{int64_t{1}, columns <= 1 ? std::max<int64_t>(rows, 1) : across};
  }
  return std::nullopt;
}

// `tensor`, or a copy where it lies in a way that no kernel reads.
Tensor readable_matrix(const Tensor& tensor) { return matrix_strides(tensor) ? tensor : tensor.contiguous(); }

Matrix matrix_of(const Tensor& tensor) {
  const auto [down, across] = *matrix_strides(tensor);
  return {tensor.const_data_ptr(), down, across};
}

// An operand of this shape, for a pass over elements that lie one behind the other.
Tensor elements_of(const char* name, const Tensor& tensor, const Tensor& first, at::IntArrayRef shape) {
  check_follows(name, tensor, first);
  check_shape(name, tensor, shape);
  return tensor.contiguous();
}

cudaStream_t stream_of(const Tensor& tensor) { return c10::cuda::getCurrentCUDAStream(tensor.device().index()); }

// Whether matrix products of float32 may use TF32: what torch itself asks before it calls the library. allowTF32CuBLAS
// throws where the precision was set through torch.backends.cuda.matmul.fp32_precision.
bool allows_tf32() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

// The compute capability of a device, 80 for 8.0.
int compute_capability(c10::Device device) {
  int major = 0, minor = 0;
  const char* function = "cudaDeviceGetAttribute";
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.index()), function);
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device.index()), function);
  return 10 * major + minor;
}

// ---------------------------------------------------------------------------------------------------------------------
// products with an epilogue
// ---------------------------------------------------------------------------------------------------------------------

// One product and its epilogue: the setters check the operands and hold them until the launch.
class FusedProduct {
 public:
  FusedProduct(EpilogueKind kind, const Tensor& a, const Tensor& b) {
    check_first("a", a);
    check_is_matrix("a", a);
    check_follows("b", b, a);
    check_is_matrix("b", b);
    TORCH_CHECK_VALUE(b.size(0) == a.size(1), "b must have as many rows as a has columns, ", a.size(1), ", got shape ",
                      b.sizes());
    guard_.set_device(a.device());
    a_ = readable_matrix(a);
    b_ = readable_matrix(b);
    product_.dtype = dtype_of(a);
    product_.rows = a.size(0);
    product_.columns = b.size(1);
    product_.inner = a.size(1);
    product_.a = matrix_of(a_);
    product_.b = matrix_of(b_);
    product_.epilogue.kind = kind;
    product_.epilogue.alpha = 1;
    product_.epilogue.beta = 1;
    TORCH_CHECK_VALUE(product_.rows == 0 || product_.columns <= max_elements / product_.rows,
                      "a and b must have a product of at most 2^31 elements, got ", product_.rows, " x ",
                      product_.columns);
  }

  FusedProduct& scale(double alpha, double beta) {
    product_.epilogue.alpha = alpha;
    product_.epilogue.beta = beta;
    return *this;
  }

  FusedProduct& activation(std::string_view name, at::ArrayRef<double> numbers) {
    product_.epilogue.activation = make_activation(name, numbers);
    return *this;
  }

  FusedProduct& source(const OptionalTensor& source) {
    if (source) product_.epilogue.source = elements("source", *source, source_);
    return *this;
  }

  FusedProduct& at(const char* name, const Tensor& at) {
    product_.epilogue.at = elements(name, at, at_);
    return *this;
  }

  // The term u v^T: without v there is none, without u it is a vector of ones.
  FusedProduct& rank_one(const OptionalTensor& column, const OptionalTensor& row) {
    if (!row) return *this;
    product_.epilogue.row = vector("row", *row, product_.columns);
    product_.epilogue.row_stride = row->stride(0);
    if (!column) return *this;
    product_.epilogue.column = vector("column", *column, product_.rows);
    product_.epilogue.column_stride = column->stride(0);
    return *this;
  }

  // Memory for the results, the second one only where the epilogue has it.
  Tensor allocate_first() {
    first_ = at::empty({product_.rows, product_.columns}, a_.options());
    product_.epilogue.first = first_.mutable_data_ptr();
    return first_;
  }

  Tensor allocate_second() {
    Tensor second = at::empty({product_.rows, product_.columns}, a_.options());
    product_.epilogue.second = second.mutable_data_ptr();
    return second;
  }

  Tensor compute() {
    Tensor first = allocate_first();
    run(route());
    return first;
  }

  std::tuple<Tensor, Tensor> compute_both() {
    Tensor second = allocate_second();
    return {compute(), second};
  }

  const Product& product() const { return product_; }

  Route route() const { return choose_route(product_, allows_tf32(), compute_capability(a_.device())); }

  // Into the memory of the results.
  void run(Route route) {
    if (product_.rows == 0 || product_.columns == 0) return;
    switch (route) {
      case Route::fused:
        return check_cuda(launch_fused(&product_, 1, stream_of(a_)), "launch_fused");
      case Route::tensor:
        return check_cuda(launch_tensor(product_, stream_of(a_)), "launch_tensor");
      case Route::library:
        return run_library();
    }
  }

 private:
  // An operand of the result's shape, contiguous in `held`.
  const void* elements(const char* name, const Tensor& tensor, Tensor& held) {
    held = elements_of(name, tensor, a_, {product_.rows, product_.columns});
    return held.const_data_ptr();
  }

  const void* vector(const char* name, const Tensor& tensor, int64_t size) {
    check_follows(name, tensor, a_);
    check_shape(name, tensor, {size});
    return tensor.const_data_ptr();
  }

  void run_library() {
    const Epilogue& epilogue = product_.epilogue;
    if (epilogue.kind == EpilogueKind::linear && epilogue.row == nullptr) {
      // With beta = 0 what stands in the result before is not read.
      at::addmm_out(first_, source_.defined() ? source_ : first_, a_, b_, source_.defined() ? epilogue.beta : 0.0,
                    epilogue.alpha);
      return;
    }
    at::mm_out(first_, a_, b_);
    check_cuda(launch_epilogue(product_, stream_of(a_)), "launch_epilogue");
  }

  c10::cuda::OptionalCUDAGuard guard_;
  Product product_{};
  Tensor a_, b_, source_, at_, first_;
};

Tensor linear(const Tensor& a, const Tensor& b, const OptionalTensor& source, const OptionalTensor& column,
              const OptionalTensor& row, double alpha, double beta) {
  return FusedProduct(EpilogueKind::linear, a, b).scale(alpha, beta).source(source).rank_one(column, row).compute();
}

std::tuple<Tensor, Tensor> linear_activation(const Tensor& a, const Tensor& b, const OptionalTensor& row,
                                             std::string_view activation, at::ArrayRef<double> numbers) {
  return FusedProduct(EpilogueKind::activation, a, b)
      .rank_one(std::nullopt, row)
      .activation(activation, numbers)
      .compute_both();
}

std::tuple<Tensor, Tensor> inverse_activation(const Tensor& a, const Tensor& b, const Tensor& origin, double rho,
                                              std::string_view activation, at::ArrayRef<double> numbers) {
  return FusedProduct(EpilogueKind::inverse_activation, a, b)
      .scale(1, -rho)
      .at("origin", origin)
      .activation(activation, numbers)
      .compute_both();
}

std::tuple<Tensor, Tensor> over_slope(const Tensor& a, const Tensor& b, const OptionalTensor& column,
                                      const OptionalTensor& row, const Tensor& at, std::string_view activation,
                                      at::ArrayRef<double> numbers) {
  return FusedProduct(EpilogueKind::over_slope, a, b)
      .rank_one(column, row)
      .at("at", at)
      .activation(activation, numbers)
      .compute_both();
}

Tensor times_slope(const Tensor& a, const Tensor& b, const Tensor& at, const Tensor& source, double beta,
                   std::string_view activation, at::ArrayRef<double> numbers) {
  return FusedProduct(EpilogueKind::times_slope, a, b)
      .scale(1, beta)
      .source(source)
      .at("at", at)
      .activation(activation, numbers)
      .compute();
}

// The products for the fused kernel, as many in a launch as its arguments hold, and then the others.
void run_group(std::deque<FusedProduct>& group, cudaStream_t stream) {
  std::vector<Product> fused;
  for (FusedProduct& one : group) {
    const Route route = one.route();
    if (route == Route::fused) {
      fused.push_back(one.product());
    } else {
      one.run(route);
    }
  }
  for (size_t start = 0; start < fused.size(); start += max_products) {
    const auto some = static_cast<int>(std::min<size_t>(max_products, fused.size() - start));
    check_cuda(launch_fused(&fused[start], some, stream), "launch_fused");
  }
}

using OptionalTensors = c10::List<OptionalTensor>;

std::vector<Tensor> grouped_linear(TensorList a, TensorList b, const OptionalTensors& sources,
                                   const OptionalTensors& rows, const OptionalTensors& masks,
                                   at::ArrayRef<double> alphas, at::ArrayRef<double> betas) {
  TORCH_CHECK_VALUE(!a.empty(), "a must have at least one tensor, got none");
  check_length("b", b.size(), "a", a.size());
  check_length("sources", sources.size(), "a", a.size());
  check_length("rows", rows.size(), "a", a.size());
  check_length("masks", masks.size(), "a", a.size());
  check_length("alphas", alphas.size(), "a", a.size());
  check_length("betas", betas.size(), "a", a.size());
  check_first("a", a[0]);
  const c10::cuda::CUDAGuard guard(a[0].device());
  std::deque<FusedProduct> group;
  std::vector<Tensor> results;
  for (size_t i = 0; i < a.size(); ++i) {
    check_follows("a", a[i], a[0]);
    const OptionalTensor mask = masks.get(i);
    FusedProduct& one = group.emplace_back(mask ? EpilogueKind::masked : EpilogueKind::linear, a[i], b[i]);
    one.scale(alphas[i], betas[i]).source(sources.get(i)).rank_one(std::nullopt, rows.get(i));
    results.push_back(one.allocate_first());
    if (!mask) continue;
    one.at("mask", *mask);
    results.push_back(one.allocate_second());
  }
  run_group(group, stream_of(a[0]));
  return results;
}

// ---------------------------------------------------------------------------------------------------------------------
// Gram matrices
// ---------------------------------------------------------------------------------------------------------------------

void gram_by_library(const Tensor& rows, bool bias, Tensor exact) {
  const Tensor wide = rows.to(at::kDouble);
  at::mm_out(exact, wide, wide.t());
  if (bias) exact.add_(1);
}

// As many from `start` on as a launch takes.
void some_grams(TensorList rows, const c10::List<bool>& biases, size_t start, TensorList exact, TensorList rounded) {
  std::vector<Tensor> held;
  std::vector<GramProduct> products;
  for (size_t i = start; i < std::min<size_t>(rows.size(), start + max_grams); ++i) {
    const Matrix matrix = matrix_of(held.emplace_back(readable_matrix(rows[i])));
    products.push_back({matrix, rows[i].size(1), biases.get(i), exact[i].mutable_data_ptr<double>(),
                        rounded.empty() ? nullptr : rounded[i].mutable_data_ptr()});
  }
  check_cuda(launch_grams(dtype_of(rows[0]), rows[0].size(0), products.data(), static_cast<int>(products.size()),
                          stream_of(rows[0])),
             "launch_grams");
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> grams(TensorList rows, const c10::List<bool>& biases,
                                                           bool rounds) {
  TORCH_CHECK_VALUE(!rows.empty(), "rows must have at least one tensor, got none");
  check_length("biases", biases.size(), "rows", rows.size());
  check_first("rows", rows[0]);
  check_is_matrix("rows", rows[0]);
  const int64_t size = rows[0].size(0);
  TORCH_CHECK_VALUE(size == 0 || size <= max_elements / size,
                    "rows must have a Gram matrix of at most 2^31 elements, got ", size, " rows");
  for (const Tensor& one : rows) {
    check_follows("rows", one, rows[0]);
    check_is_matrix("rows", one);
    TORCH_CHECK_VALUE(one.size(0) == size, "rows must have as many rows each as the first, ", size, ", got shape ",
                      one.sizes());
  }
  const c10::cuda::CUDAGuard guard(rows[0].device());
  std::vector<Tensor> exact, rounded;
  for (const Tensor& one : rows) {
    exact.push_back(at::empty({size, size}, one.options().dtype(at::kDouble)));
    if (rounds) rounded.push_back(at::empty({size, size}, one.options()));
  }
  const bool by_library = size > largest_own_gram, is_double = rows[0].scalar_type() == at::kDouble;
  if (by_library) {
    for (size_t i = 0; i < rows.size(); ++i) gram_by_library(rows[i], biases.get(i), exact[i]);
  } else {
    const TensorList also = is_double ? TensorList() : TensorList(rounded);
    for (size_t start = 0; start < rows.size(); start += max_grams) some_grams(rows, biases, start, exact, also);
  }
  if (by_library || is_double) {
    for (size_t i = 0; i < rounded.size(); ++i) rounded[i].copy_(exact[i]);
  }
  return {exact, rounded};
}

// By the triangular factor's inverse: cholesky_inverse would read back whether it succeeded.
void invert_by_library(const Tensor& gram, Tensor inverse, Tensor info) {
  const auto [triangle, found] = at::linalg_cholesky_ex(gram);
  const Tensor identity = at::eye(gram.size(0), gram.options());
  const Tensor solution = at::linalg_solve_triangular(triangle, identity, /*upper=*/false);
  at::mm_out(inverse, solution.t(), solution);
  info.copy_(found);
}

void invert_some_grams(TensorList grams, TensorList inverses, TensorList rounded, int32_t* infos) {
  const int64_t size = grams[0].size(0);
  std::vector<Tensor> held;
  SquareMatrices list{};
  list.count = static_cast<int>(grams.size());
  for (size_t i = 0; i < grams.size(); ++i) {
    list.from[i] = held.emplace_back(grams[i].contiguous()).const_data_ptr<double>();
    list.to[i] = inverses[i].mutable_data_ptr<double>();
    if (!rounded.empty()) list.rounded[i] = rounded[i].mutable_data_ptr<float>();
  }
  const Tensor workspace =
      at::empty({invert_grams_workspace(list.count, size)}, grams[0].options().dtype(at::kByte));
  check_cuda(launch_invert_grams(size, list, infos, static_cast<double*>(workspace.mutable_data_ptr()),
                                 stream_of(grams[0])),
             "launch_invert_grams");
}

std::tuple<std::vector<Tensor>, Tensor, std::vector<Tensor>> invert_grams(TensorList grams, bool rounds) {
  TORCH_CHECK_VALUE(!grams.empty(), "grams must have at least one tensor, got none");
  check_on_cuda("grams", grams[0]);
  check_is_matrix("grams", grams[0]);
  const int64_t size = grams[0].size(0), count = static_cast<int64_t>(grams.size());
  for (const Tensor& gram : grams) {
    check_device("grams", gram, grams[0].device());
    check_dtype("grams", gram, at::kDouble);
    check_shape("grams", gram, {size, size});
  }
  const c10::cuda::CUDAGuard guard(grams[0].device());
  std::vector<Tensor> inverses, rounded;
  for (int64_t i = 0; i < count; ++i) {
    inverses.push_back(at::empty({size, size}, grams[0].options()));
    if (rounds) rounded.push_back(at::empty({size, size}, grams[0].options().dtype(at::kFloat)));
  }
  Tensor infos = at::empty({count}, grams[0].options().dtype(at::kInt));
  if (size > largest_own_gram) {
    for (int64_t i = 0; i < count; ++i) {
      invert_by_library(grams[i], inverses[i], infos.select(0, i));
      if (rounds) rounded[i].copy_(inverses[i]);
    }
    return {inverses, infos, rounded};
  }
  for (int64_t start = 0; start < count; start += max_tensors) {
    const int64_t some = std::min<int64_t>(max_tensors, count - start);
    invert_some_grams(grams.slice(start, some), TensorList(inverses).slice(start, some),
                      rounds ? TensorList(rounded).slice(start, some) : TensorList(),
                      infos.mutable_data_ptr<int32_t>() + start);
  }
  return {inverses, infos, rounded};
}

// Memory for a matrix in the dtype of `like`, with rows that begin at multiples of 16 bytes.
Tensor padded_memory(const Tensor& like, int64_t rows, int64_t columns) {
  const int64_t piece = 16 / like.element_size();
  return at::empty_strided({rows, columns}, {(columns + piece - 1) / piece * piece, 1}, like.options());
}

// [H, 1] in float64, H without bias.
Tensor extended_in_double(const Tensor& rows, bool bias) {
  if (!bias) return rows.to(at::kDouble);
  Tensor extended = at::empty({rows.size(0), rows.size(1) + 1}, rows.options().dtype(at::kDouble));
  extended.narrow(1, 0, rows.size(1)).copy_(rows);
  extended.select(1, rows.size(1)).fill_(1);
  return extended;
}

Tensor pseudo_inverse(const Tensor& inverse, const Tensor& rows, bool bias) {
  check_first("rows", rows);
  check_is_matrix("rows", rows);
  check_device("inverse", inverse, rows.device());
  check_dtype("inverse", inverse, at::kDouble);
  check_shape("inverse", inverse, {rows.size(0), rows.size(0)});
  const c10::cuda::CUDAGuard guard(rows.device());
  const Tensor extended = extended_in_double(rows, bias);
  Tensor result = padded_memory(rows, rows.size(0), extended.size(1));
  result.copy_(linear(inverse, extended, std::nullopt, std::nullopt, std::nullopt, 1, 1));
  return result;
}

// ---------------------------------------------------------------------------------------------------------------------
// steps of the search
// ---------------------------------------------------------------------------------------------------------------------

std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>> take_steps(
    TensorList bases, TensorList changes, const Tensor& size, const c10::List<bool>& along_targets,
    const c10::List<std::string>& activations, at::ArrayRef<double> numbers) {
  TORCH_CHECK_VALUE(!bases.empty(), "bases must have at least one tensor, got none");
  check_length("changes", changes.size(), "bases", bases.size());
  check_length("along_targets", along_targets.size(), "bases", bases.size());
  check_length("activations", activations.size(), "bases", bases.size());
  TORCH_CHECK_VALUE(numbers.size() == numbers_of_activation * bases.size(), "numbers must be ", numbers_of_activation,
                    " for each of bases, got ", numbers.size(), " for ", bases.size());
  check_first("bases", bases[0]);
  check_scalar("size", size, at::kDouble, bases[0].device());
  const c10::cuda::CUDAGuard guard(bases[0].device());
  std::vector<Tensor> moved, targets, slopes, held;
  std::vector<LayerStep> steps;
  for (size_t i = 0; i < bases.size(); ++i) {
    const Tensor base = held.emplace_back(elements_of("bases", bases[i], bases[0], bases[i].sizes()));
    const Tensor change = held.emplace_back(elements_of("changes", changes[i], bases[0], base.sizes()));
    for (std::vector<Tensor>* results : {&moved, &targets, &slopes}) results->push_back(at::empty_like(base));
    const at::ArrayRef<double> own = numbers.slice(i * numbers_of_activation, numbers_of_activation);
    steps.push_back({along_targets.get(i), make_activation(activations.get(i), own), base.numel(),
                     base.const_data_ptr(), change.const_data_ptr(), moved[i].mutable_data_ptr(),
                     targets[i].mutable_data_ptr(), slopes[i].mutable_data_ptr()});
  }
  for (size_t start = 0; start < steps.size(); start += max_steps) {
    const auto some = static_cast<int>(std::min<size_t>(max_steps, steps.size() - start));
    check_cuda(launch_steps(dtype_of(bases[0]), &steps[start], some, size.const_data_ptr<double>(),
                            stream_of(bases[0])),
               "launch_steps");
  }
  return {moved, targets, slopes};
}

Tensor times_curvature(const Tensor& left, const Tensor& right, const Tensor& at, const OptionalTensor& source,
                       std::string_view activation, at::ArrayRef<double> numbers) {
  check_first("left", left);
  const c10::cuda::CUDAGuard guard(left.device());
  const auto operand = [&](const char* name, const Tensor& tensor) {
    return elements_of(name, tensor, left, left.sizes());
  };
  const Tensor one = left.contiguous(), other = operand("right", right), where = operand("at", at);
  const OptionalTensor sum = source ? OptionalTensor(operand("source", *source)) : std::nullopt;
  Tensor result = at::empty_like(one);
  check_cuda(launch_times_curvature(dtype_of(left), left.numel(), make_activation(activation, numbers),
                                    one.const_data_ptr(), other.const_data_ptr(), where.const_data_ptr(),
                                    sum ? sum->const_data_ptr() : nullptr, result.mutable_data_ptr(), stream_of(left)),
             "launch_times_curvature");
  return result;
}

// ---------------------------------------------------------------------------------------------------------------------
// lists of tensors, as many in a launch as its arguments hold
// ---------------------------------------------------------------------------------------------------------------------

Tensor dot_of_some(TensorList left, TensorList right, double scale, bool root) {
  const Tensor& first = left[0];
  std::vector<Tensor> held;
  TensorPairs pairs{};
  pairs.count = static_cast<int>(left.size());
  for (size_t i = 0; i < left.size(); ++i) {
    const Tensor& one = held.emplace_back(left[i].contiguous());
    pairs.left[i] = one.const_data_ptr();
    pairs.elements[i] = one.numel();
    pairs.right[i] = held.emplace_back(right[i].contiguous()).const_data_ptr();
  }
  const auto options = first.options();
  Tensor partial = at::empty({dot_sum_workspace()}, options.dtype(at::kByte));
  Tensor result = at::empty({}, options.dtype(at::kDouble));
  check_cuda(launch_dot_sum(dtype_of(first), pairs, scale, root, static_cast<double*>(partial.mutable_data_ptr()),
                            result.mutable_data_ptr<double>(), stream_of(first)),
             "launch_dot_sum");
  return result;
}

Tensor dot_sum(TensorList left, TensorList right, double scale, bool root) {
  TORCH_CHECK_VALUE(!left.empty(), "left must have at least one tensor, got none");
  check_length("right", right.size(), "left", left.size());
  check_first("left", left[0]);
  for (size_t i = 0; i < left.size(); ++i) {
    check_follows("left", left[i], left[0]);
    check_size("left", left[i]);
    check_follows("right", right[i], left[0]);
    check_shape("right", right[i], left[i].sizes());
  }
  const c10::cuda::CUDAGuard guard(left[0].device());
  if (left.size() <= max_tensors) return dot_of_some(left, right, scale, root);
  Tensor total = at::zeros({}, left[0].options().dtype(at::kDouble));
  for (size_t start = 0; start < left.size(); start += max_tensors) {
    const size_t count = std::min<size_t>(max_tensors, left.size() - start);
    total.add_(dot_of_some(left.slice(start, count), right.slice(start, count), scale, false));
  }
  return root ? total.sqrt_() : total;
}

Dtype number_of(const Tensor& tensor) { return tensor.scalar_type() == at::kInt ? Dtype::i32 : dtype_of(tensor); }

void squared_norms_of_some(TensorList tensors, double* result) {
  std::vector<Tensor> held;
  MixedTensors list{};
  list.count = static_cast<int>(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const bool dense = tensors[i].is_non_overlapping_and_dense();  // in whatever order
    list.data[i] = held.emplace_back(dense ? tensors[i] : tensors[i].contiguous()).const_data_ptr();
    list.dtype[i] = number_of(tensors[i]);
    list.elements[i] = tensors[i].numel();
  }
  const Tensor partial = at::empty({squared_norms_workspace()}, tensors[0].options().dtype(at::kByte));
  check_cuda(launch_squared_norms(list, static_cast<double*>(partial.mutable_data_ptr()), result,
                                  stream_of(tensors[0])),
             "launch_squared_norms");
}

Tensor squared_norms(TensorList tensors) {
  TORCH_CHECK_VALUE(!tensors.empty(), "tensors must have at least one tensor, got none");
  check_on_cuda("tensors", tensors[0]);
  for (const Tensor& tensor : tensors) {
    check_device("tensors", tensor, tensors[0].device());
    const at::ScalarType dtype = tensor.scalar_type();
    TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kInt,
                     "tensors must be of dtype float32, float64 or int32, got ", name_of(dtype));
    check_size("tensors", tensor);
  }
  const c10::cuda::CUDAGuard guard(tensors[0].device());
  const auto all = static_cast<int64_t>(tensors.size());
  Tensor result = at::empty({all}, tensors[0].options().dtype(at::kDouble));
  for (size_t start = 0; start < tensors.size(); start += max_tensors) {
    const size_t count = std::min<size_t>(max_tensors, tensors.size() - start);
    squared_norms_of_some(tensors.slice(start, count), result.mutable_data_ptr<double>() + start);
  }
  return result;
}

void commit_some(const Tensor& accept, TensorList current, TensorList trial) {
  std::vector<Tensor> held;
  ByteCopies copies{};
  copies.count = static_cast<int>(current.size());
  for (size_t i = 0; i < current.size(); ++i) {
    copies.target[i] = current[i].mutable_data_ptr();
    copies.source[i] = held.emplace_back(trial[i].contiguous()).const_data_ptr();
    copies.bytes[i] = static_cast<int64_t>(current[i].nbytes());
  }
  check_cuda(launch_commit(accept.const_data_ptr<bool>(), copies, stream_of(accept)), "launch_commit");
}

void commit(const Tensor& accept, TensorList current, TensorList trial) {
  check_on_cuda("accept", accept);
  check_scalar("accept", accept, at::kBool, accept.device());
  check_length("trial", trial.size(), "current", current.size());
  for (size_t i = 0; i < current.size(); ++i) {
    check_device("current", current[i], accept.device());
    check_size("current", current[i]);
    TORCH_CHECK_VALUE(current[i].is_contiguous(), "current must have contiguous tensors, got strides ",
                      current[i].strides(), " of shape ", current[i].sizes());
    check_follows("trial", trial[i], current[i]);
    check_shape("trial", trial[i], current[i].sizes());
  }
  const c10::cuda::CUDAGuard guard(accept.device());
  for (size_t start = 0; start < current.size(); start += max_tensors) {
    const size_t count = std::min<size_t>(max_tensors, current.size() - start);
    commit_some(accept, current.slice(start, count), trial.slice(start, count));
  }
}

Tensor near_dependence_of_some(TensorList grams, TensorList inverses, TensorList infos, double largest) {
  const auto options = grams[0].options();
  std::vector<Tensor> held;
  GramList list{};
  list.count = static_cast<int>(grams.size());
  for (size_t i = 0; i < grams.size(); ++i) {
    list.gram[i] = held.emplace_back(grams[i].contiguous()).const_data_ptr<double>();
    list.inverse[i] = held.emplace_back(inverses[i].contiguous()).const_data_ptr<double>();
    list.info[i] = infos[i].const_data_ptr<int32_t>();
    list.elements[i] = grams[i].numel();
  }
  Tensor partial = at::empty({near_dependence_workspace()}, options.dtype(at::kByte));
  Tensor beyond = at::empty({}, options.dtype(at::kBool));
  check_cuda(launch_near_dependence(list, largest, static_cast<double*>(partial.mutable_data_ptr()),
                                    beyond.mutable_data_ptr<bool>(), stream_of(grams[0])),
             "launch_near_dependence");
  return beyond;
}

Tensor near_dependence(TensorList grams, TensorList inverses, TensorList infos, double largest) {
  TORCH_CHECK_VALUE(!grams.empty(), "grams must have at least one tensor, got none");
  check_length("inverses", inverses.size(), "grams", grams.size());
  check_length("infos", infos.size(), "grams", grams.size());
  check_on_cuda("grams", grams[0]);
  for (size_t i = 0; i < grams.size(); ++i) {
    check_device("grams", grams[i], grams[0].device());
    check_dtype("grams", grams[i], at::kDouble);
    check_size("grams", grams[i]);
    check_follows("inverses", inverses[i], grams[i]);
    check_shape("inverses", inverses[i], grams[i].sizes());
    check_scalar("infos", infos[i], at::kInt, grams[i].device());
  }
  const c10::cuda::CUDAGuard guard(grams[0].device());
  Tensor beyond;
  for (size_t start = 0; start < grams.size(); start += max_tensors) {
    const size_t count = std::min<size_t>(max_tensors, grams.size() - start);
    Tensor part = near_dependence_of_some(grams.slice(start, count), inverses.slice(start, count),
                                          infos.slice(start, count), largest);
    beyond = beyond.defined() ? beyond.logical_or_(part) : part;
  }
  return beyond;
}

// ---------------------------------------------------------------------------------------------------------------------
// the decision on a step
// ---------------------------------------------------------------------------------------------------------------------

JudgeRules make_rules(at::ArrayRef<double> rules) {
  constexpr size_t count = sizeof(JudgeRules) / sizeof(double);
  TORCH_CHECK_VALUE(rules.size() == count, "rules must have ", count, " numbers, got ", rules.size());
  return {rules[0], rules[1], rules[2], rules[3], rules[4], rules[5], rules[6], rules[7], rules[8]};
}

void check_flags(const char* name, const Tensor& flags, c10::Device device) {
  check_device(name, flags, device);
  check_dtype(name, flags, at::kBool);
  TORCH_CHECK_VALUE(flags.dim() == 1, name, " must be a vector, got shape ", flags.sizes());
}

std::tuple<Tensor, Tensor> judge(const Tensor& control, const Tensor& size, const Tensor& norm, const Tensor& value,
                                 const Tensor& hindered, const Tensor& broken, const Tensor& cap, bool maximise,
                                 at::ArrayRef<double> rules) {
  check_on_cuda("control", control);
  check_dtype("control", control, at::kDouble);
  check_shape("control", control, {sizeof(SearchControl) / sizeof(double)});
  TORCH_CHECK_VALUE(control.is_contiguous(), "control must be contiguous, got strides ", control.strides());
  const c10::Device device = control.device();
  check_scalar("size", size, at::kDouble, device);
  check_scalar("norm", norm, at::kDouble, device);
  check_scalar("value", value, at::kDouble, device);
  check_scalar("cap", cap, at::kDouble, device);
  check_flags("hindered", hindered, device);
  check_flags("broken", broken, device);
  const c10::cuda::CUDAGuard guard(device);
  const Tensor hindered_flags = hindered.contiguous(), broken_flags = broken.contiguous();
  const StepFacts facts{size.const_data_ptr<double>(),
                        norm.const_data_ptr<double>(),
                        value.const_data_ptr<double>(),
                        cap.const_data_ptr<double>(),
                        hindered_flags.const_data_ptr<bool>(),
                        hindered.numel(),
                        broken_flags.const_data_ptr<bool>(),
                        broken.numel(),
                        maximise};
  Tensor accepted = at::empty({}, control.options().dtype(at::kBool));
  Tensor row = at::empty({judge_figures}, control.options());
  auto* const state = reinterpret_cast<SearchControl*>(control.mutable_data_ptr<double>());
  check_cuda(launch_judge(state, make_rules(rules), facts, accepted.mutable_data_ptr<bool>(),
                          row.mutable_data_ptr<double>(), stream_of(control)),
             "launch_judge");
  return {accepted, row};
}

}  // namespace
}  // namespace symtele

// Operators on CUDA tensors: the schema, and what computes it.
TORCH_LIBRARY_FRAGMENT(symtele_cuda, library) {
  const auto define = [&](const char* schema, auto* function) {
    library.def(schema, torch::dispatch(c10::DispatchKey::CUDA, function), {at::Tag::pt2_compliant_tag});
  };
  define("linear(Tensor a, Tensor b, Tensor? source=None, Tensor? column=None, Tensor? row=None, float alpha=1.0, "
         "float beta=1.0) -> Tensor",
         symtele::linear);
  define("linear_activation(Tensor a, Tensor b, Tensor? row, str activation, float[] numbers) -> (Tensor, Tensor)",
         symtele::linear_activation);
  define("inverse_activation(Tensor a, Tensor b, Tensor origin, float rho, str activation, float[] numbers) "
         "-> (Tensor, Tensor)",
         symtele::inverse_activation);
  define("over_slope(Tensor a, Tensor b, Tensor? column, Tensor? row, Tensor at, str activation, float[] numbers) "
         "-> (Tensor, Tensor)",
         symtele::over_slope);
  define("times_slope(Tensor a, Tensor b, Tensor at, Tensor source, float beta, str activation, float[] numbers) "
         "-> Tensor",
         symtele::times_slope);
  define("grouped_linear(Tensor[] a, Tensor[] b, Tensor?[] sources, Tensor?[] rows, Tensor?[] masks, float[] alphas, "
         "float[] betas) -> Tensor[]",
         symtele::grouped_linear);
  define("grams(Tensor[] rows, bool[] biases, bool rounds=False) -> (Tensor[], Tensor[])", symtele::grams);
  define("invert_grams(Tensor[] grams, bool rounds=False) -> (Tensor[], Tensor, Tensor[])", symtele::invert_grams);
  define("pseudo_inverse(Tensor inverse, Tensor rows, bool bias) -> Tensor", symtele::pseudo_inverse);
  define("take_steps(Tensor[] bases, Tensor[] changes, Tensor size, bool[] along_targets, str[] activations, "
         "float[] numbers) -> (Tensor[], Tensor[], Tensor[])",
         symtele::take_steps);
  define("times_curvature(Tensor left, Tensor right, Tensor at, Tensor? source, str activation, float[] numbers) "
         "-> Tensor",
         symtele::times_curvature);
  define("dot_sum(Tensor[] left, Tensor[] right, float scale=1.0, bool root=False) -> Tensor", symtele::dot_sum);
  define("squared_norms(Tensor[] tensors) -> Tensor", symtele::squared_norms);
  define("commit(Tensor accept, Tensor(a!)[] current, Tensor[] trial) -> ()", symtele::commit);
  define("near_dependence(Tensor[] grams, Tensor[] inverses, Tensor[] infos, float largest) -> Tensor",
         symtele::near_dependence);
  define("judge(Tensor(a!) control, Tensor size, Tensor norm, Tensor value, Tensor hindered, Tensor broken, "
         "Tensor cap, bool maximise, float[] rules) -> (Tensor, Tensor)",
         symtele::judge);
}
