// The sum of the tiles' dB and dC, in a fixed order.
#include "cuda_device.h"
#include "scan_gpu.h"

namespace mamba_ssm {
namespace {

constexpr int kThreads = 128, kRow = 2 * tile::kStates, kQuads = kRow / 4;

// Thread i of a row of blocks: four states of dB or dC at a position, the states innermost. Without divisions of 64
// bits, which would take longer than all the rest.
__global__ void __launch_bounds__(kThreads) sum_tiles_kernel(MAMBA_SSM_CONSTANT_PARAMETER TileSums s) {
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t time = index / kQuads;
  const int column = static_cast<int>(index % kQuads) * 4, state = column % tile::kStates;
  const TileSums::Target& target = column < tile::kStates ? s.B : s.C;
  if (time >= s.length || state >= s.states || target.data == nullptr) return;
  const auto groups = static_cast<unsigned>(s.groups), all = static_cast<unsigned>(s.batch) * groups;
  const std::int64_t tile_size = s.length * kRow;
  for (unsigned i = blockIdx.y; i < all; i += gridDim.y) {
    const unsigned batch = i / groups, group = i % groups;
    const float* part = s.partial + i * s.tiles * tile_size + time * kRow + column;
    float sum[4] = {};
#pragma unroll 4
    for (std::int64_t j = 0; j < s.tiles; ++j) {
      const float4 v = *reinterpret_cast<const float4*>(part + j * tile_size);
      sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
    }
    const std::int64_t first = batch * target.batch + group * target.group + time * target.time;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (state + k < s.states) {
        store_element(target.data, first + (state + k) * target.state, target.dtype, sum[k]);
      }
    }
  }
}

}  // namespace

const char* launch_sum_tiles(const TileSums& sums, void* stream) {
  constexpr std::int64_t kMostRows = 65535;  // of blocks in a grid
  const std::int64_t threads = sums.length * kQuads, rows = sums.batch * sums.groups;
  return launch<TileSums>(sum_tiles_kernel, static_cast<unsigned>((threads + kThreads - 1) / kThreads),
                          static_cast<unsigned>(rows < kMostRows ? rows : kMostRows), kThreads, 0, stream, sums);
}

}  // namespace mamba_ssm
