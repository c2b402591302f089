// Residual add + RMSNorm or LayerNorm: what the operator hands to the kernels. No torch here.
//
//     h = scale x + residual        y = (h - mean) rstd weight + bias        (RMSNorm: mean = 0)
//
// All arrays are rows of `dim` adjacent elements; row strides in elements. Statistics and sums are fp32.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace mamba_ssm {

struct NormRows {
  void* data = nullptr;
  std::int64_t stride = 0;
};

struct NormProblem {
  std::int64_t rows, dim;
  std::int64_t rows_per_scale;  // rows that share one element of `scale`
  Dtype dtype;                  // of x, y and their gradients
  Dtype stream_dtype;           // of residual, h and their gradients
  bool is_rms_norm;
  float eps;
  const float* weight;
  const float* bias = nullptr;   // (dim,)
  const float* scale = nullptr;  // (rows / rows_per_scale,)
  float* mean;                   // (rows,); not touched by RMSNorm
  float* rstd;                   // (rows,)

  NormRows x, residual, y, h;  // forward; residual and h may have no data

  NormRows dy, dh, dx, dresidual;  // backward, which reads h; dy, dh and dresidual may have no data
  bool sum_dbias = false;
  float* partial = nullptr;  // (blocks, 2, dim): dweight and dbias of each block of rows
};

// One work item is a block of rows, whatever the number of threads, so that the sums do not depend on it.
constexpr std::int64_t kNormBlock = 32;
inline std::int64_t norm_blocks(const NormProblem& p) { return (p.rows + kNormBlock - 1) / kNormBlock; }

struct NormKernels {
  // Blocks of rows; `scratch` holds dim floats.
  void (*forward)(const NormProblem&, std::int64_t begin, std::int64_t end, float* scratch);
  void (*backward)(const NormProblem&, std::int64_t begin, std::int64_t end);
};

#if defined(__x86_64__)
extern const NormKernels norm_kernels_avx512;
extern const NormKernels norm_kernels_avx2;
#endif
extern const NormKernels norm_kernels_generic;

}  // namespace mamba_ssm
