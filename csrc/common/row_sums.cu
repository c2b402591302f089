#include "cuda_device.h"
#include "row_sums.h"

namespace mamba_ssm {
namespace {

// A block has 32 columns; each of its warps sums every kWarps-th row, and the first warp the warps' sums.
constexpr int kWarps = 16;

struct RowSumsMemory {
  float sums[kWarps][kWarp];
};

__global__ void __launch_bounds__(kWarps* kWarp)
    sum_rows_kernel(const float* rows, std::int64_t count, std::int64_t stride, std::int64_t size, float* out) {
  RowSumsMemory& memory = shared_memory<RowSumsMemory>();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kWarp + lane;
  float sum = 0.0f;
  if (i < size) {
#pragma unroll 8
    for (std::int64_t r = warp; r < count; r += kWarps) sum += rows[r * stride + i];
  }
  memory.sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || i >= size) return;
  for (int w = 1; w < kWarps; ++w) sum += memory.sums[w][lane];
  out[i] = sum;
}

}  // namespace

const char* launch_sum_rows(const float* rows, std::int64_t count, std::int64_t stride, std::int64_t size, float* out,
                            void* stream) {
  return launch<const float*, std::int64_t, std::int64_t, std::int64_t, float*>(
      sum_rows_kernel, static_cast<unsigned>((size + kWarp - 1) / kWarp), 1, kWarps * kWarp, sizeof(RowSumsMemory),
      stream, rows, count, stride, size, out);
}

}  // namespace mamba_ssm
