// Sums of partial results on the GPU, in a fixed order. No torch and no CUDA here.
#pragma once

#include <cstdint>

namespace mamba_ssm {

// out[i] = the sum over r < count of rows[r * stride + i], for i < size; null, or what went wrong.
const char* launch_sum_rows(const float* rows, std::int64_t count, std::int64_t stride, std::int64_t size, float* out,
                            void* stream);

}  // namespace mamba_ssm
