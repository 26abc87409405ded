// Activations as tests/cpu_harness.py packs them.
#pragma once

#include "buffers.h"
#include "kernels.h"

namespace harness {

// Its kind and its five numbers.
inline symtele::Activation read_activation(Reader& in) {
  symtele::Activation activation{};
  activation.kind = static_cast<symtele::ActivationKind>(in.number());
  for (double* number : {&activation.parameter, &activation.rate, &activation.shift, &activation.gain,
                         &activation.offset}) {
    *number = in.number<double>();
  }
  return activation;
}

}  // namespace harness
