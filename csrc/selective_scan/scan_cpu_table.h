// What scan_cpu.cpp calls: for each instruction set, its number of lanes and its two tasks.
#pragma once

#include <cstdint>

#include "params.h"

namespace mamba_ssm {

// Working memory of one task. Rows of lanes: a row per step of a chunk, shared by the task's blocks, and a row per
// state, of which each block has its own.
struct ScanScratch {
  float* steps;
  std::int64_t steps_size;  // at least chunk * lanes and a few more
  float* B;                 // staged B of a chunk, chunk * states, where it varies
  float* C;
  float* delta_input;  // chunk * rank
  float* blocks;
  std::int64_t block_size, states_size;  // of one block; of the rows for its states, states * lanes
  int state_rows;                        // sets of such rows
  float* step_rows(int i) const { return steps + i * steps_size; }
  float* block_rows(std::int64_t block, int i) const { return blocks + block * block_size + i * states_size; }
  float* delta_weight(std::int64_t block) const { return block_rows(block, state_rows); }  // rank * lanes
};
constexpr int kForwardStepRows = 4, kForwardStateRows = 4;
constexpr int kBackwardStepRows = 22, kBackwardStateRows = 9;

// The blocks of each batch element and group are shared by `runs` tasks, a run of neighbours each.
struct ScanKernels {
  int lanes;
  void (*forward)(const ScanParams&, std::int64_t task, std::int64_t runs, const ScanScratch&);
  void (*backward)(const ScanParams&, const ScanGradients&, std::int64_t task, std::int64_t runs, const ScanScratch&);
};

extern const ScanKernels scan_kernels_avx512, scan_kernels_avx2, scan_kernels_generic;

}  // namespace mamba_ssm
