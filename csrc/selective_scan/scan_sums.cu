// The sum of the tiles' dB and dC, in a fixed order.
#include "cuda_device.h"
#include "scan_gpu.h"

namespace mamba_ssm {
namespace {

constexpr int kThreads = 128, kRow = 2 * tile::kStates;

// Thread i of the launch: dB or dC of a state at a position, the states innermost.
__global__ void __launch_bounds__(kThreads) sum_tiles_kernel(MAMBA_SSM_CONSTANT_PARAMETER TileSums s) {
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t row = index / kRow, time = row % s.length, group = row / s.length % s.groups;
  const std::int64_t batch = row / s.length / s.groups;
  const int column = static_cast<int>(index % kRow), state = column % tile::kStates;
  const TileSums::Target& target = column < tile::kStates ? s.B : s.C;
  if (batch >= s.batch || state >= s.states || target.data == nullptr) return;
  const std::int64_t tile_size = s.length * kRow;
  const float* part = s.partial + (batch * s.groups + group) * s.tiles * tile_size + time * kRow + column;
  float sum = 0.0f;
#pragma unroll 4
  for (std::int64_t i = 0; i < s.tiles; ++i) sum += part[i * tile_size];
  store_element(target.data, batch * target.batch + group * target.group + state * target.state + time * target.time,
                target.dtype, sum);
}

}  // namespace

const char* launch_sum_tiles(const TileSums& sums, void* stream) {
  const std::int64_t threads = sums.batch * sums.groups * sums.length * kRow;
  return launch<TileSums>(sum_tiles_kernel, static_cast<unsigned>((threads + kThreads - 1) / kThreads), 1, kThreads, 0,
                          stream, sums);
}

}  // namespace mamba_ssm
