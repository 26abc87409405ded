#include "activation.cuh"

namespace symtele {

std::optional<ActivationKind> find_activation(std::string_view name) {
#define FIND(known, Struct) \
  if (name == known) return ActivationKind::Struct;
  FOR_EACH_ACTIVATION(FIND)
#undef FIND
  return std::nullopt;
}

std::string activation_names() {
  std::string names;
#define APPEND(known, Struct) names += names.empty() ? known : ", " known;
  FOR_EACH_ACTIVATION(APPEND)
#undef APPEND
  return names;
}

}  // namespace symtele
