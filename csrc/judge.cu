#include "judge.cuh"

namespace symtele {

cudaError_t launch_judge(SearchControl* control, const JudgeRules& rules, const StepFacts& facts, bool* accepted,
                         double* row, cudaStream_t stream) {
  return launch(judge_step, 1, 1, 0, stream, control, rules, facts, accepted, row);
}

}  // namespace symtele
