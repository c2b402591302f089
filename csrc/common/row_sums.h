// Sums of partial results on the GPU, in a fixed order. No torch and no CUDA here.
#pragma once

#include <cstdint>

namespace mamba_ssm {

// out[i] = the sum over r < count of rows[r * stride + i], for i < size.
struct RowSums {
  const float* rows;
  std::int64_t count, stride, size;
  float* out;
};
constexpr int kMostRowSums = 5;

// `sums` of them, at most kMostRowSums, by one launch; null, or what went wrong.
const char* launch_sum_rows(const RowSums* list, int sums, void* stream);

}  // namespace mamba_ssm
