// The activations elementwise: sigma, its derivatives and its inverse, by the formulas of symtele_cuda/activations.py.
// A new one is a struct here and a line in FOR_EACH_ACTIVATION.
#pragma once

#include <cmath>

#include "kernels.h"
#include "launch.cuh"

namespace symtele {

// The parameter of an activation, in the precision that sigma is computed in.
template <class T>
struct Parameter {
  T value;
  T reciprocal;  // rounded once from float64 as torch does it
};

template <class T>
__device__ T sigmoid(T z) {
  return T(1) / (T(1) + exp(-z));
}

// Every struct has sigma(z), sigma'(z), sigma''(z) and sigma^-1(b), which is not finite outside of sigma's range.
namespace activations {

struct Identity {
  template <class T>
  static __device__ T forward(T z, Parameter<T>) {
    return z;
  }
  template <class T>
  static __device__ T derivative(T, Parameter<T>) {
    return T(1);
  }
  template <class T>
  static __device__ T second_derivative(T, Parameter<T>) {
    return T(0);
  }
  template <class T>
  static __device__ T inverse(T b, Parameter<T>) {
    return b;
  }
};

struct LeakyReLU {
  template <class T>
  static __device__ T forward(T z, Parameter<T> slope) {
    return z > 0 ? z : z * slope.value;
  }
  template <class T>
  static __device__ T derivative(T z, Parameter<T> slope) {  // at the kink the slope
    return z > 0 ? T(1) : slope.value;
  }
  template <class T>
  static __device__ T second_derivative(T, Parameter<T>) {
    return T(0);
  }
  template <class T>
  static __device__ T inverse(T b, Parameter<T> slope) {
    return b > 0 ? b : b * slope.reciprocal;
  }
};

struct Tanh {
  template <class T>
  static __device__ T forward(T z, Parameter<T>) {
    return tanh(z);
  }
  template <class T>
  static __device__ T derivative(T z, Parameter<T>) {
    const T value = tanh(z);
    return 1 - value * value;
  }
  template <class T>
  static __device__ T second_derivative(T z, Parameter<T>) {
    const T value = tanh(z);
    return -2 * value * (1 - value * value);
  }
  template <class T>
  static __device__ T inverse(T b, Parameter<T>) {
    return atanh(b);
  }
};

struct Sigmoid {
  template <class T>
  static __device__ T forward(T z, Parameter<T>) {
    return sigmoid(z);
  }
  template <class T>
  static __device__ T derivative(T z, Parameter<T>) {
    return sigmoid(z) * sigmoid(-z);
  }
  template <class T>
  static __device__ T second_derivative(T z, Parameter<T>) {
    const T value = sigmoid(z), mirrored = sigmoid(-z);
    return value * mirrored * (mirrored - value);
  }
  template <class T>
  static __device__ T inverse(T b, Parameter<T>) {
    return log(b) - log1p(-b);
  }
};

// The identity where beta z is above the threshold, as in torch.
struct Softplus {
  static constexpr int threshold = 20;

  template <class T>
  static __device__ T forward(T z, Parameter<T> beta) {
    return z * beta.value > threshold ? z : log1p(exp(z * beta.value)) / beta.value;
  }
  template <class T>
  static __device__ T derivative(T z, Parameter<T> beta) {
    return z * beta.value > threshold ? T(1) : sigmoid(z * beta.value);
  }
  template <class T>
  static __device__ T second_derivative(T z, Parameter<T> beta) {
    const T scaled = z * beta.value;
    return scaled > threshold ? T(0) : beta.value * sigmoid(scaled) * sigmoid(-scaled);
  }
  template <class T>
  static __device__ T inverse(T b, Parameter<T> beta) {
    return b * beta.value > threshold ? b : b + log(-expm1(-(b * beta.value))) / beta.value;
  }
};

struct ELU {
  template <class T>
  static __device__ T forward(T z, Parameter<T> alpha) {
    return z > 0 ? z : alpha.value * expm1(z);
  }
  template <class T>
  static __device__ T derivative(T z, Parameter<T> alpha) {
    return z > 0 ? T(1) : alpha.value * exp(z);
  }
  template <class T>
  static __device__ T second_derivative(T z, Parameter<T> alpha) {
    return z > 0 ? T(0) : alpha.value * exp(z);
  }
  template <class T>
  static __device__ T inverse(T b, Parameter<T> alpha) {
    return b > 0 ? b : log1p(b / alpha.value);
  }
};

struct Softsign {
  template <class T>
  static __device__ T forward(T z, Parameter<T>) {
    return z / (1 + fabs(z));
  }
  template <class T>
  static __device__ T derivative(T z, Parameter<T>) {
    const T share = 1 / (1 + fabs(z));
    return share * share;
  }
  template <class T>
  static __device__ T second_derivative(T z, Parameter<T>) {
    const T share = 1 / (1 + fabs(z));
    return (z > 0 ? T(-2) : z < 0 ? T(2) : T(0)) * (share * share * share);
  }
  template <class T>
  static __device__ T inverse(T b, Parameter<T>) {
    return fabs(b) <= 1 ? b / (1 - fabs(b)) : T(NAN);
  }
};

struct LogSigmoid {
  template <class T>
  static __device__ T forward(T z, Parameter<T>) {
    return (z < 0 ? z : T(0)) - log1p(exp(-fabs(z)));
  }
  template <class T>
  static __device__ T derivative(T z, Parameter<T>) {
    return sigmoid(-z);
  }
  template <class T>
  static __device__ T second_derivative(T z, Parameter<T>) {
    return -(sigmoid(z) * sigmoid(-z));
  }
  template <class T>
  static __device__ T inverse(T b, Parameter<T>) {
    return b - log(-expm1(b));
  }
};

}  // namespace activations

// What the operators call each struct.
#define FOR_EACH_ACTIVATION(ACT)    \
  ACT("identity", Identity)         \
  ACT("leaky_relu", LeakyReLU)      \
  ACT("tanh", Tanh)                 \
  ACT("sigmoid", Sigmoid)           \
  ACT("softplus", Softplus)         \
  ACT("elu", ELU)                   \
  ACT("softsign", Softsign)         \
  ACT("log_sigmoid", LogSigmoid)

enum class ActivationKind : int {
#define KIND_OF(name, Struct) Struct,
  FOR_EACH_ACTIVATION(KIND_OF)
#undef KIND_OF
};

// sigma. The kind is the same for all threads, so that the switches below do not diverge, and one kernel serves all
// activations.
template <class T>
struct Sigma {
  ActivationKind kind;
  Parameter<T> parameter;

  Sigma() = default;
  explicit Sigma(const Activation& activation)
      : kind(activation.kind),
        parameter{static_cast<T>(activation.parameter), static_cast<T>(1 / activation.parameter)} {}

#define CASE_OF(Struct, function, argument) \
  case ActivationKind::Struct:              \
    return activations::Struct::function(argument, parameter);
#define FORWARD_OF(name, Struct) CASE_OF(Struct, forward, z)
#define DERIVATIVE_OF(name, Struct) CASE_OF(Struct, derivative, z)
#define SECOND_DERIVATIVE_OF(name, Struct) CASE_OF(Struct, second_derivative, z)
#define INVERSE_OF(name, Struct) CASE_OF(Struct, inverse, b)

  __device__ T forward(T z) const {
    switch (kind) { FOR_EACH_ACTIVATION(FORWARD_OF) }
    return z;
  }
  __device__ T derivative(T z) const {
    switch (kind) { FOR_EACH_ACTIVATION(DERIVATIVE_OF) }
    return T(1);
  }
  __device__ T second_derivative(T z) const {
    switch (kind) { FOR_EACH_ACTIVATION(SECOND_DERIVATIVE_OF) }
    return T(0);
  }
  __device__ T inverse(T b) const {
    switch (kind) { FOR_EACH_ACTIVATION(INVERSE_OF) }
    return b;
  }

#undef CASE_OF
#undef FORWARD_OF
#undef DERIVATIVE_OF
#undef SECOND_DERIVATIVE_OF
#undef INVERSE_OF
};

// gain sigma(rate z + shift) + offset, its derivatives and its inverse. The products of its numbers are rounded once from
// float64; for sigma itself they are 1 and 0, and every result is sigma's own.
template <class T>
struct ActivationOf {
  Sigma<T> sigma;
  T rate, shift, gain, offset;
  T per_rate, per_gain;
  T slope;      // gain rate
  T curvature;  // gain rate^2

  ActivationOf() = default;
  explicit ActivationOf(const Activation& activation)
      : sigma(activation),
        rate(static_cast<T>(activation.rate)),
        shift(static_cast<T>(activation.shift)),
        gain(static_cast<T>(activation.gain)),
        offset(static_cast<T>(activation.offset)),
        per_rate(static_cast<T>(1 / activation.rate)),
        per_gain(static_cast<T>(1 / activation.gain)),
        slope(static_cast<T>(activation.gain * activation.rate)),
        curvature(static_cast<T>(activation.gain * activation.rate * activation.rate)) {}

  __device__ T forward(T z) const { return gain * sigma.forward(inner(z)) + offset; }
  __device__ T derivative(T z) const { return slope * sigma.derivative(inner(z)); }
  __device__ T second_derivative(T z) const { return curvature * sigma.second_derivative(inner(z)); }
  __device__ T inverse(T b) const { return (sigma.inverse((b - offset) * per_gain) - shift) * per_rate; }

  __device__ T inner(T z) const { return rate * z + shift; }
};

}  // namespace symtele
