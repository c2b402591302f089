// What the operators of residual add + norm ask of their arguments, on every device.
#pragma once

#include <algorithm>
#include <optional>

#include "norm.h"
#include "tensors.h"

namespace mamba_ssm {

// x, residual, y, h and their gradients are (..., dim): rows of dim elements.
inline std::int64_t dim_of(const Tensor& tensor) { return tensor.size(tensor.dim() - 1); }
inline std::int64_t row_count(const Tensor& tensor) {
  return tensor.numel() / std::max<std::int64_t>(1, dim_of(tensor));
}

// The distance of a tensor's rows, which are in order of memory; or nothing where they are not at equal distances.
inline std::optional<std::int64_t> row_distance(const Tensor& tensor) {
  if (tensor.numel() == 0) return dim_of(tensor);
  std::optional<std::int64_t> distance;
  std::int64_t next = 0;  // from one index of the dimension before to the next
  for (std::int64_t i = tensor.dim() - 2; i >= 0; --i) {
    if (tensor.size(i) == 1) continue;
    if (distance.has_value() && tensor.stride(i) != next) return std::nullopt;
    if (!distance.has_value()) distance = tensor.stride(i);
    next = tensor.size(i) * tensor.stride(i);
  }
  return distance.has_value() ? distance : dim_of(tensor);
}
// The same, copied where its elements are not adjacent or its rows not at equal distances.
inline Tensor with_rows(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() > 0, "got a tensor without dimensions");
  const bool fits = tensor.stride(tensor.dim() - 1) == 1 && row_distance(tensor).has_value();
  return fits ? tensor : torch::stable::contiguous(tensor);
}

inline NormRows input(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), *row_distance(tensor)};
}
inline NormRows output(const Tensor& tensor) { return {tensor.mutable_data_ptr(), dim_of(tensor)}; }

inline void check_rows(const Tensor& tensor, const Tensor& x, const char* name) {
  bool same = tensor.dim() == x.dim();
  for (std::int64_t i = 0; same && i < x.dim(); ++i) same = tensor.size(i) == x.size(i);
  STD_TORCH_CHECK(same, name, " must have the shape of x");
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
  const std::int64_t rows = row_count(x);
  STD_TORCH_CHECK(scale.dim() == 1 && (rows == 0 || (count > 0 && rows % count == 0)), "scale has ", count,
                  " elements, which does not divide the ", rows, " rows of x");
  return rows / std::max<std::int64_t>(1, count);
}

// The dtype of h and its gradients.
inline ScalarType stream_dtype(const Tensor& x, const OptionalTensor& residual, bool residual_in_fp32) {
  return residual.has_value() ? residual->scalar_type() : residual_in_fp32 ? ScalarType::Float : x.scalar_type();
}

}  // namespace mamba_ssm
