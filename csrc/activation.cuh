// The activations elementwise: sigma, its derivatives and its inverse, by the formulas of symtele_cuda/activations.py.
#pragma once

#include "kernels.h"
#include "launch.cuh"

namespace symtele {

// An activation in the precision that it is computed in. The kind is the same for all threads, so that the switches
// below do not diverge, and one kernel serves all activations.
template <class T>
struct ActivationOf {
  ActivationKind kind;
  T parameter;
  T reciprocal;  // of the parameter, rounded once from float64 as torch does it

  ActivationOf() = default;
  explicit ActivationOf(const Activation& activation)
      : kind(activation.kind),
        parameter(static_cast<T>(activation.parameter)),
        reciprocal(static_cast<T>(1 / activation.parameter)) {}

  __device__ T forward(T z) const;            // sigma(z)
  __device__ T derivative(T z) const;         // sigma'(z); at the kink of leaky_relu the slope
  __device__ T second_derivative(T z) const;  // sigma''(z)
  __device__ T inverse(T b) const;            // sigma^-1(b); not finite outside of sigma's range
};

// softplus is the identity where beta z is above this, as in torch.
constexpr int softplus_threshold = 20;

template <class T>
__device__ T sigmoid(T z) {
  return T(1) / (T(1) + exp(-z));
}

template <class T>
__device__ T ActivationOf<T>::forward(T z) const {
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
    default:
      return z;
  }
}

template <class T>
__device__ T ActivationOf<T>::derivative(T z) const {
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
    default:
      return T(1);
  }
}

template <class T>
__device__ T ActivationOf<T>::second_derivative(T z) const {
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
    default:
      return T(0);
  }
}

template <class T>
__device__ T ActivationOf<T>::inverse(T b) const {
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
    default:
      return b;
  }
}

}  // namespace symtele
