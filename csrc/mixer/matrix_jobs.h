// Small operations on the mixer's parameters and their gradients, many of them by one launch. No torch and no CUDA
// here.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace mamba_ssm {

// to(r, c) = from(r, c) · factor(r, c), or −exp(from(r, c)), in the dtype of `to`.
struct MatrixJob {
  const void* from;  // null: zeros
  Dtype from_dtype;
  std::int64_t from_row, from_column;
  const float* factor;  // (rows, columns), row by row; or null
  bool negative_exponential;
  void* to;  // its columns lie side by side
  Dtype to_dtype;
  std::int64_t to_row;
  std::int64_t rows, columns;
};
constexpr int kMostMatrixJobs = 24;

// At most kMostMatrixJobs. Starts on the given stream and returns null, or what went wrong.
const char* launch_matrix_jobs(const MatrixJob* jobs, int count, void* stream);

}  // namespace mamba_ssm
