// What scan_cpu.cpp calls: for each instruction set a table of the methods' kernels.
#pragma once

#include <cstdint>

#include "params.h"

namespace mamba_ssm {

// Working memory of one task: `row_count` chunks of fp32 rows, one state, and staged B and C.
struct ScanScratch {
  float* data;
  std::int64_t row_size;  // chunk * lanes
  float* state;           // states * lanes
  float* B;               // chunk * states
  float* C;
  float* rows(int i) const { return data + i * row_size; }
};
constexpr int kForwardRows = 4;
constexpr int kBackwardRows = 15;

using ForwardTask = void (*)(const ScanParams&, std::int64_t task, std::int64_t splits, const ScanScratch&);
using BackwardTask = void (*)(const ScanParams&, const ScanGradients&, std::int64_t task, const ScanScratch&);

struct ScanMethodKernels {
  const char* name;
  ForwardTask forward[2][2];  // [B constant][C constant]
  BackwardTask backward[2][2];
};

struct ScanKernels {
  int lanes;
  int count;
  const ScanMethodKernels* methods;
};

template <int Count>
constexpr ScanKernels scan_kernels(int lanes, const ScanMethodKernels (&methods)[Count]) {
  return {lanes, Count, methods};
}

extern const ScanKernels scan_kernels_avx512, scan_kernels_avx2, scan_kernels_generic;

}  // namespace mamba_ssm
