// The sum of the tiles' dB and dC, in a fixed order.
#include "cuda_device.h"
#include "scan_gpu.h"

namespace mamba_ssm {
namespace {

constexpr int kThreads = 128;

// Thread i of the launch: a state of a position, the states innermost.
__global__ void __launch_bounds__(kThreads) sum_tiles_kernel(MAMBA_SSM_CONSTANT_PARAMETER TileSums s) {
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t state = index % tile::kStates, row = index / tile::kStates;
  const std::int64_t time = row % s.length, group = row / s.length % s.groups, batch = row / s.length / s.groups;
  if (batch >= s.batch || state >= s.states) return;
  const std::int64_t tile_size = s.length * 2 * tile::kStates;
  const float* part =
      s.partial + (batch * s.groups + group) * s.tiles * tile_size + time * 2 * tile::kStates + s.first + state;
  float sum = 0.0f;
  for (std::int64_t i = 0; i < s.tiles; ++i) sum += part[i * tile_size];
  s.out[batch * s.out_batch + group * s.out_group + state * s.out_state + time * s.out_time] = sum;
}

unsigned blocks(std::int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

}  // namespace

const char* launch_sum_tiles(const TileSums& sums, void* stream) {
  return launch<TileSums>(sum_tiles_kernel, blocks(sums.batch * sums.groups * sums.length * tile::kStates), 1, kThreads,
                          0, stream, sums);
}

}  // namespace mamba_ssm
