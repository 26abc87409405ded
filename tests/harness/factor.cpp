// factor ORDER INPUT OUTPUT: runs the cases that INPUT describes (tests/test_factor_kernels_on_cpu.py writes it) with
// the kernels of csrc/gram.cu, invert_gram.cu, step.cu, curvature.cu, reduce.cu, commit.cu and
// judge.cu on the CPU, the threads in ORDER (cuda_on_cpu::set_order), and writes for each the launcher's error code and the results.
#include <vector>

#include "activations.h"
#include "buffers.h"
#include "kernels.h"

namespace {

using namespace symtele;
using harness::Buffer;
using harness::Reader;
using harness::Writer;

Dtype read_dtype(Reader& in) { return static_cast<Dtype>(in.number()); }
int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 8; }

void run_grams(Reader& in, Writer& out) {
  const Dtype dtype = read_dtype(in);
  const int64_t rows = in.number(), count = in.number();
  const bool rounds = in.number() != 0;
  std::vector<GramProduct> grams;
  std::vector<Buffer> operands, exact, rounded;
  for (int64_t i = 0; i < count; ++i) {
    GramProduct gram{};
    gram.columns = in.number();
    gram.h.row_stride = in.number();
    gram.h.column_stride = in.number();
    gram.bias = in.number() != 0;
    gram.h.data = operands.emplace_back(in.buffer()).get();
    gram.exact = exact.emplace_back(rows * rows * sizeof(double)).get<double>();
    gram.rounded = rounded.emplace_back(rounds ? rows * rows * bytes_of(dtype) : 0).get();
    grams.push_back(gram);
  }
  out.number(launch_grams(dtype, rows, grams.data(), static_cast<int>(count), nullptr));
  for (int64_t i = 0; i < count; ++i) {
    out.buffer(exact[i]);
    out.buffer(rounded[i]);
  }
}

void run_invert_grams(Reader& in, Writer& out) {
  const int64_t size = in.number();
  SquareMatrices matrices{};
  matrices.count = static_cast<int>(in.number());
  const bool rounds = in.number() != 0;
  std::vector<Buffer> grams, inverses, rounded;
  for (int i = 0; i < matrices.count; ++i) {
    matrices.from[i] = grams.emplace_back(in.buffer()).get<double>();
    matrices.to[i] = inverses.emplace_back(size * size * sizeof(double)).get<double>();
    matrices.rounded[i] = rounded.emplace_back(rounds ? size * size * sizeof(float) : 0).get<float>();
  }
  const Buffer infos(matrices.count * sizeof(int32_t)), workspace(invert_grams_workspace(matrices.count, size));
  out.number(launch_invert_grams(size, matrices, infos.get<int32_t>(), workspace.get<double>(), nullptr));
  for (const Buffer& inverse : inverses) out.buffer(inverse);
  for (const Buffer& inverse : rounded) out.buffer(inverse);
  out.buffer(infos);
}

// What an elementwise pass with an activation works on: arrays of `count` elements, each `offset` bytes into its buffer.
struct Elementwise {
  explicit Elementwise(Reader& in)
      : dtype(read_dtype(in)),
        count(in.number()),
        offset(in.number() * bytes_of(dtype)),
        activation(harness::read_activation(in)) {}

  unsigned char* start(const Buffer& buffer) const { return buffer.get<unsigned char>() + offset; }

  Dtype dtype;
  int64_t count;
  int64_t offset;
  Activation activation;
};

void run_steps(Reader& in, Writer& out) {
  const Buffer size = in.buffer();
  const Dtype dtype = read_dtype(in);
  const int64_t count = in.number();
  std::vector<LayerStep> steps;
  std::vector<Buffer> operands, results;
  for (int64_t i = 0; i < count; ++i) {
    const bool along_targets = in.number() != 0;
    const int64_t elements = in.number(), offset = in.number() * bytes_of(dtype);
    LayerStep step{along_targets, harness::read_activation(in), elements, nullptr, nullptr, nullptr, nullptr, nullptr};
    for (const void** operand : {&step.base, &step.change}) {
      *operand = operands.emplace_back(in.buffer()).get<unsigned char>() + offset;
    }
    for (void** result : {&step.moved, &step.targets, &step.slopes}) {
      *result = results.emplace_back(operands.back().bytes()).get<unsigned char>() + offset;
    }
    steps.push_back(step);
  }
  out.number(launch_steps(dtype, steps.data(), static_cast<int>(count), size.get<double>(), nullptr));
  for (const Buffer& result : results) out.buffer(result);
}

void run_times_curvature(Reader& in, Writer& out) {
  const Elementwise on(in);
  const bool has_source = in.number() != 0;
  const Buffer left = in.buffer(), right = in.buffer(), at = in.buffer(), source = in.buffer();
  const Buffer result(left.bytes());
  out.number(launch_times_curvature(on.dtype, on.count, on.activation, on.start(left), on.start(right), on.start(at),
                                    has_source ? on.start(source) : nullptr, on.start(result), nullptr));
  out.buffer(result);
}

void run_dot_sum(Reader& in, Writer& out) {
  const Dtype dtype = read_dtype(in);
  TensorPairs pairs{};
  pairs.count = static_cast<int>(in.number());
  const double scale = in.number<double>();
  const bool root = in.number() != 0;
  std::vector<Buffer> buffers;
  for (int i = 0; i < pairs.count; ++i) {
    const int64_t offset = in.number() * bytes_of(dtype);
    pairs.elements[i] = in.number();
    for (const void** operand : {&pairs.left[i], &pairs.right[i]}) {
      buffers.push_back(in.buffer());
      *operand = buffers.back().get<unsigned char>() + offset;
    }
  }
  const Buffer partial(dot_sum_workspace()), result(sizeof(double));
  out.number(launch_dot_sum(dtype, pairs, scale, root, partial.get<double>(), result.get<double>(), nullptr));
  out.buffer(result);
}

void run_commit(Reader& in, Writer& out) {
  const Buffer accept = in.buffer();
  ByteCopies copies{};
  copies.count = static_cast<int>(in.number());
  std::vector<Buffer> targets, sources;
  for (int i = 0; i < copies.count; ++i) {
    const int64_t offset = in.number();
    copies.bytes[i] = in.number();
    targets.push_back(in.buffer());
    sources.push_back(in.buffer());
    copies.target[i] = targets.back().get<unsigned char>() + offset;
    copies.source[i] = sources.back().get<unsigned char>() + offset;
  }
  out.number(launch_commit(accept.get<bool>(), copies, nullptr));
  for (const Buffer& target : targets) out.buffer(target);
}

void run_near_dependence(Reader& in, Writer& out) {
  GramList grams{};
  const double largest = in.number<double>();
  grams.count = static_cast<int>(in.number());
  std::vector<Buffer> buffers;
  for (int i = 0; i < grams.count; ++i) {
    grams.elements[i] = in.number();
    for (const double** matrix : {&grams.gram[i], &grams.inverse[i]}) {
      *matrix = buffers.emplace_back(in.buffer()).get<double>();
    }
    grams.info[i] = buffers.emplace_back(in.buffer()).get<int32_t>();
  }
  const Buffer partial(near_dependence_workspace()), beyond(sizeof(bool));
  out.number(launch_near_dependence(grams, largest, partial.get<double>(), beyond.get<bool>(), nullptr));
  out.buffer(beyond);
}

void run_squared_norms(Reader& in, Writer& out) {
  MixedTensors tensors{};
  tensors.count = static_cast<int>(in.number());
  std::vector<Buffer> buffers;
  for (int i = 0; i < tensors.count; ++i) {
    tensors.dtype[i] = read_dtype(in);
    const int64_t offset = in.number();  // in bytes
    tensors.elements[i] = in.number();
    tensors.data[i] = buffers.emplace_back(in.buffer()).get<unsigned char>() + offset;
  }
  const Buffer partial(squared_norms_workspace()), result(tensors.count * sizeof(double));
  out.number(launch_squared_norms(tensors, partial.get<double>(), result.get<double>(), nullptr));
  out.buffer(result);
}

void run_judge(Reader& in, Writer& out) {
  const Buffer control = in.buffer(), rules = in.buffer();
  const Buffer size = in.buffer(), norm = in.buffer(), value = in.buffer(), cap = in.buffer();
  const Buffer hindered = in.buffer(), broken = in.buffer();
  const bool maximise = in.number() != 0;
  const StepFacts facts{size.get<double>(),
                        norm.get<double>(),
                        value.get<double>(),
                        cap.get<double>(),
                        hindered.get<bool>(),
                        static_cast<int64_t>(hindered.bytes()),
                        broken.get<bool>(),
                        static_cast<int64_t>(broken.bytes()),
                        maximise};
  const Buffer accepted(sizeof(bool)), row(judge_figures * sizeof(double));
  out.number(launch_judge(control.get<SearchControl>(), *rules.get<JudgeRules>(), facts, accepted.get<bool>(),
                          row.get<double>(), nullptr));
  out.buffer(accepted);
  out.buffer(row);
  out.buffer(control);
}

void (*const operations[])(Reader&, Writer&) = {run_grams,  run_invert_grams,    run_steps, run_dot_sum,
                                                run_commit, run_near_dependence, run_judge, run_squared_norms,
                                                run_times_curvature};

}  // namespace

int main(int, char** arguments) {
  cuda_on_cpu::set_order(arguments[1]);
  Reader in(arguments[2]);
  Writer out(arguments[3]);
  for (int64_t left = in.number(); left > 0; --left) operations[in.number()](in, out);
}
