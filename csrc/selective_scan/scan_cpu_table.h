// What scan_cpu.cpp calls: for each instruction set, its number of lanes and its two tasks.
#pragma once

#include <cstdint>

#include "params.h"

namespace mamba_ssm {

// Working memory of one task, in rows of lanes: a row per step of a chunk, or a row per state.
struct ScanScratch {
  float* data;
  std::int64_t steps_size;  // at least chunk * lanes and a few more
  float* states;
  std::int64_t states_size;  // states * lanes
  float* B;                  // staged B: chunk * states, or states * lanes where it is constant
  float* C;
  float* delta_input;   // chunk * rank
  float* delta_weight;  // rank * lanes
  float* step_rows(int i) const { return data + i * steps_size; }
  float* state_rows(int i) const { return states + i * states_size; }
};
constexpr int kForwardStepRows = 4, kForwardStateRows = 2;
constexpr int kBackwardStepRows = 22, kBackwardStateRows = 5;

struct ScanKernels {
  int lanes;
  void (*forward)(const ScanParams&, std::int64_t task, std::int64_t splits, const ScanScratch&);
  void (*backward)(const ScanParams&, const ScanGradients&, std::int64_t task, const ScanScratch&);
};

extern const ScanKernels scan_kernels_avx512, scan_kernels_avx2, scan_kernels_generic;

}  // namespace mamba_ssm
