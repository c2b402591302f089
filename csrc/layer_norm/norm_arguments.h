// What the operators of residual add + norm ask of their arguments, on every device.
#pragma once

#include <algorithm>

#include "norm.h"
#include "tensors.h"

namespace mamba_ssm {

inline Tensor with_adjacent_elements(const Tensor& tensor) {
  return tensor.stride(tensor.dim() - 1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

inline NormRows input(const Tensor& tensor) { return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0)}; }
inline NormRows output(const Tensor& tensor) { return {tensor.mutable_data_ptr(), tensor.stride(0)}; }

inline void check_rows(const Tensor& tensor, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == x.size(0) && tensor.size(1) == x.size(1), name,
                  " must be (rows, dim) like x");
}
inline void check_vector(const Tensor& tensor, std::int64_t size, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size, name, " must have ", size, " elements");
}
inline void check_statistics(const Tensor& mean, const Tensor& rstd, std::int64_t rows, bool is_rms_norm) {
  STD_TORCH_CHECK(
      rstd.numel() == rows && (is_rms_norm || mean.numel() == rows) && mean.is_contiguous() && rstd.is_contiguous(),
      "one mean and rstd per row");
}

// The number of x's rows that share one element of `scale`.
inline std::int64_t rows_per_scale(const Tensor& scale, const Tensor& x) {
  const std::int64_t count = scale.size(0);
  STD_TORCH_CHECK(scale.dim() == 1 && (x.size(0) == 0 || (count > 0 && x.size(0) % count == 0)), "scale has ", count,
                  " elements, which does not divide the ", x.size(0), " rows of x");
  return x.size(0) / std::max<std::int64_t>(1, count);
}

// The dtype of h and its gradients.
inline ScalarType stream_dtype(const Tensor& x, const OptionalTensor& residual, bool residual_in_fp32) {
  return residual.has_value() ? residual->scalar_type() : residual_in_fp32 ? ScalarType::Float : x.scalar_type();
}

}  // namespace mamba_ssm
