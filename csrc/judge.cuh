// The decision of the trust region on one step: scalars, by one thread, so that the host need not read them.
#pragma once

#include "kernels.h"
#include "launch.cuh"

namespace symtele {

// The first flag that holds, counted from 1; 0 if none does.
__device__ inline int64_t first_of(const bool* flags, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (flags[i]) return i + 1;
  }
  return 0;
}

// What the row says of the end of a search.
enum End { goes_on, after_the_end, zero_direction, direction_not_finite, cap_reached, radius_too_small };

__device__ inline End end_after(const SearchControl& control, const JudgeRules& rules, double norm, double cap,
                                double value, bool accept, double next_radius) {
  if (control.ended > 0) return after_the_end;
  if (norm == 0) return zero_direction;
  if (!isfinite(norm)) return direction_not_finite;
  if (accept && value >= rules.cap_share * cap) return cap_reached;
  return next_radius < rules.smallest_radius * control.first_radius ? radius_too_small : goes_on;
}

// The share of the step that is left after a refusal: to just below the cap if the value went above it and its
// logarithm grows evenly.
__device__ inline double shrinkage_of(const SearchControl& control, const JudgeRules& rules, double cap, double value,
                                      bool above_cap) {
  if (!above_cap || !(control.value > 0 && control.value < cap)) return rules.shrinkage;
  const double share = rules.cap_aim * log(cap / control.value) / log(value / control.value);
  return fmin(fmax(share, rules.least_share), rules.largest_share);
}

__global__ void judge_step(SearchControl* control, JudgeRules rules, StepFacts facts, bool* accepted, double* row) {
  SearchControl now = *control;
  const double size = *facts.size, norm = *facts.norm, value = *facts.value, cap = *facts.cap;
  const double sign = facts.maximise ? 1 : -1;

  const int64_t hindrance = first_of(facts.hindered, facts.hindered_count);
  const int64_t flaw = !isfinite(value) ? 1 : sign * value <= sign * now.value ? 2 : value > cap ? 3 : 0;
  const int64_t breach = first_of(facts.broken, facts.broken_count);
  const int64_t note = hindrance ? hindrance
                       : flaw    ? facts.hindered_count + flaw
                       : breach  ? facts.hindered_count + 3 + breach
                                 : 0;
  const bool running = now.ended == 0 && norm != 0 && isfinite(norm);
  const bool accept = running && note == 0;

  const double length = fabs(size) * norm;
  const double growth = now.failed > 0 ? rules.later_growth : rules.growth;
  const bool above_cap = note == facts.hindered_count + 3;
  const double next_radius = length * (accept ? growth : shrinkage_of(now, rules, cap, value, above_cap));
  const End end = end_after(now, rules, norm, cap, value, accept, next_radius);

  *accepted = accept;
  static_assert(judge_figures == 6);
  row[0] = value;
  row[1] = size;
  row[2] = double(accept);
  row[3] = double(length < rules.shortened_below * now.radius);
  row[4] = double(note);
  row[5] = double(end);
  control->value = accept ? value : now.value;
  control->radius = next_radius;
  control->failed = accept ? now.failed : 1;
  control->ended = double(end);
}

}  // namespace symtele
