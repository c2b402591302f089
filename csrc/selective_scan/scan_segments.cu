// The states between the segments of a split sequence.
#include "cuda_device.h"
#include "scan_gpu.h"

namespace mamba_ssm {
namespace {

// One thread for each state of the launch.
__global__ void __launch_bounds__(tile::kThreads)
    join_segments_kernel(MAMBA_SSM_CONSTANT_PARAMETER GpuScan scan, bool backward,
                         MAMBA_SSM_CONSTANT_PARAMETER SegmentSums sums, const float* state, float* segment_states) {
  const ScanParams& p = scan.p;
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * tile::kThreads + threadIdx.x;
  const std::int64_t channel = index / scan.states % p.channels, batch = index / scan.states / p.channels;
  if (batch >= p.batch) return;
  const std::int64_t size = p.channels * p.states, place = channel * p.states + scan.first_state + index % scan.states;
  float h = state == nullptr ? 0.0f : state[batch * size + place];
  const std::int64_t first = batch * scan.segments * size + place;
  // Many segments' sums are read at one time: it is their latency that this takes.
  constexpr int kRead = 16;
  for (int begin = 1; begin < scan.segments; begin += kRead) {
    float decay[kRead], local[kRead];
    const auto from = [&](int i) { return first + (backward ? scan.segments - i : i - 1) * size; };
#pragma unroll
    for (int i = 0; i < kRead; ++i) {
      if (begin + i < scan.segments) decay[i] = sums.decay[from(begin + i)], local[i] = sums.local[from(begin + i)];
    }
#pragma unroll
    for (int i = 0; i < kRead; ++i) {
      if (begin + i >= scan.segments) break;
      h = decay[i] * h + local[i];
      segment_states[from(begin + i) + (backward ? -size : size)] = h;
    }
  }
}

}  // namespace

const char* launch_join_segments(const GpuScan& scan, bool backward, const SegmentSums& sums, const float* state,
                                 float* segment_states, void* stream) {
  const std::int64_t threads = scan.p.batch * scan.p.channels * scan.states;
  return launch<GpuScan, bool, SegmentSums, const float*, float*>(
      join_segments_kernel, static_cast<unsigned>((threads + tile::kThreads - 1) / tile::kThreads), 1, tile::kThreads,
      0, stream, scan, backward, sums, state, segment_states);
}

int multiprocessor_count() { return device_multiprocessors(); }

}  // namespace mamba_ssm
