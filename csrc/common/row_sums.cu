#include "cuda_device.h"
#include "row_sums.h"

namespace mamba_ssm {
namespace {

// A block has 32 columns; each of its warps sums every kWarps-th row, and the first warp the warps' sums.
constexpr int kWarps = 16;

struct RowSumsMemory {
  float sums[kWarps][kWarp];
};
struct RowSumsList {
  RowSums sums[kMostRowSums];
};

__global__ void __launch_bounds__(kWarps* kWarp) sum_rows_kernel(MAMBA_SSM_CONSTANT_PARAMETER RowSumsList list) {
  RowSumsMemory& memory = shared_memory<RowSumsMemory>();
  const RowSums& s = list.sums[blockIdx.y];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kWarp + lane;
  float sum = 0.0f;
  if (i < s.size) {
#pragma unroll 8
    for (std::int64_t r = warp; r < s.count; r += kWarps) sum += s.rows[r * s.stride + i];
  }
  memory.sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || i >= s.size) return;
  for (int w = 1; w < kWarps; ++w) sum += memory.sums[w][lane];
  s.out[i] = sum;
}

}  // namespace

const char* launch_sum_rows(const RowSums* list, int sums, void* stream) {
  RowSumsList copy{};
  std::int64_t largest = 1;
  for (int i = 0; i < sums; ++i) {
    copy.sums[i] = list[i];
    if (list[i].size > largest) largest = list[i].size;
  }
  return launch<RowSumsList>(sum_rows_kernel, static_cast<unsigned>((largest + kWarp - 1) / kWarp),
                             static_cast<unsigned>(sums), kWarps * kWarp, sizeof(RowSumsMemory), stream, copy);
}

}  // namespace mamba_ssm
