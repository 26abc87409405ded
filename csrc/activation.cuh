// The activations elementwise: sigma, its derivatives and its inverse, by the formulas of symtele_cuda/activations.py.
#pragma once

#include <cmath>

#include "kernels.h"
#include "launch.cuh"

namespace symtele {

// sigma in the precision that it is computed in. The kind is the same for all threads, so that the switches
// below do not diverge, and one kernel serves all activations.
template <class T>
struct Sigma {
  ActivationKind kind;
  T parameter;
  T reciprocal;  // of the parameter, rounded once from float64 as torch does it

  Sigma() = default;
  explicit Sigma(const Activation& activation)
      : kind(activation.kind),
        parameter(static_cast<T>(activation.parameter)),
        reciprocal(static_cast<T>(1 / activation.parameter)) {}

  __device__ T forward(T z) const;            // sigma(z)
  __device__ T derivative(T z) const;         // sigma'(z); at the kink of leaky_relu the slope
  __device__ T second_derivative(T z) const;  // sigma''(z)
  __device__ T inverse(T b) const;            // sigma^-1(b); not finite outside of sigma's range
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

// softplus is the identity where beta z is above this, as in torch.
constexpr int softplus_threshold = 20;

template <class T>
__device__ T sigmoid(T z) {
  return T(1) / (T(1) + exp(-z));
}

template <class T>
__device__ T Sigma<T>::forward(T z) const {
  switch (kind) {
    case ActivationKind::leaky_relu:
      return z > 0 ? z : z * parameter;
    case ActivationKind::tanh:
      return tanh(z);
    case ActivationKind::sigmoid:
      return sigmoid(z);
    case ActivationKind::softplus:
      return z * parameter > softplus_threshold ? z : log1p(exp(z * parameter)) / parameter;
    case ActivationKind::elu:
      return z > 0 ? z : parameter * expm1(z);
    case ActivationKind::softsign:
      return z / (1 + fabs(z));
    case ActivationKind::log_sigmoid:
      return (z < 0 ? z : T(0)) - log1p(exp(-fabs(z)));
    default:
      return z;
  }
}

template <class T>
__device__ T Sigma<T>::derivative(T z) const {
  switch (kind) {
    case ActivationKind::leaky_relu:
      return z > 0 ? T(1) : parameter;
    case ActivationKind::tanh: {
      const T value = tanh(z);
      return 1 - value * value;
    }
    case ActivationKind::sigmoid:
      return sigmoid(z) * sigmoid(-z);
    case ActivationKind::softplus:
      return z * parameter > softplus_threshold ? T(1) : sigmoid(z * parameter);
    case ActivationKind::elu:
      return z > 0 ? T(1) : parameter * exp(z);
    case ActivationKind::softsign: {
      const T share = 1 / (1 + fabs(z));
      return share * share;
    }
    case ActivationKind::log_sigmoid:
      return sigmoid(-z);
    default:
      return T(1);
  }
}

template <class T>
__device__ T Sigma<T>::second_derivative(T z) const {
  switch (kind) {
    case ActivationKind::tanh: {
      const T value = tanh(z);
      return -2 * value * (1 - value * value);
    }
    case ActivationKind::sigmoid: {
      const T value = sigmoid(z), mirrored = sigmoid(-z);
      return value * mirrored * (mirrored - value);
    }
    case ActivationKind::softplus: {
      const T scaled = z * parameter;
      return scaled > softplus_threshold ? T(0) : parameter * sigmoid(scaled) * sigmoid(-scaled);
    }
    case ActivationKind::elu:
      return z > 0 ? T(0) : parameter * exp(z);
    case ActivationKind::softsign: {
      const T share = 1 / (1 + fabs(z));
      return (z > 0 ? T(-2) : z < 0 ? T(2) : T(0)) * (share * share * share);
    }
    case ActivationKind::log_sigmoid:
      return -(sigmoid(z) * sigmoid(-z));
    default:
      return T(0);
  }
}

template <class T>
__device__ T Sigma<T>::inverse(T b) const {
  switch (kind) {
    case ActivationKind::leaky_relu:
      return b > 0 ? b : b * reciprocal;
    case ActivationKind::tanh:
      return atanh(b);
    case ActivationKind::sigmoid:
      return log(b) - log1p(-b);
    case ActivationKind::softplus:
      return b * parameter > softplus_threshold ? b : b + log(-expm1(-(b * parameter))) / parameter;
    case ActivationKind::elu:
      return b > 0 ? b : log1p(b / parameter);
    case ActivationKind::softsign:
      return fabs(b) <= 1 ? b / (1 - fabs(b)) : T(NAN);
    case ActivationKind::log_sigmoid:
      return b - log(-expm1(b));
    default:
      return b;
  }
}

}  // namespace symtele
