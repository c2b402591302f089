// What the general kernels of the scan share: they take every form, dtype and stride, element by element, and are for
// what the fast kernels do not (see scan_gpu.h). See launch_config.h for the division of the work.
#pragma once

#include "scan_gpu.h"
#include "scan_math.cuh"

namespace mamba_ssm {
namespace general {

namespace tile = general_tile;

// ---- where a thread and its block are ----------------------------------------------------------------------------

// Lanes l and l + 16 of a warp share a channel, each with one half of the states.
struct Thread {
  int half, channel, first_state;  // of the tile
  MAMBA_SSM_DEVICE Thread() {
    const int lane = threadIdx.x % kWarp;
    half = lane / tile::kWarpChannels;
    channel = static_cast<int>(threadIdx.x) / kWarp * tile::kWarpChannels + lane % tile::kWarpChannels;
    first_state = half * tile::kThreadStates;
  }
};
struct Tile {
  int batch, group, split, channel, channels;
  MAMBA_SSM_DEVICE explicit Tile(const GpuScan& scan) {
    const int block = static_cast<int>(blockIdx.x), groups = static_cast<int>(scan.p.groups);
    const int per_group = static_cast<int>(scan.p.channels) / groups;
    split = block % scan.tiles, group = block / scan.tiles % groups, batch = block / scan.tiles / groups;
    const int rest = per_group - split * tile::kChannels;
    channel = group * per_group + split * tile::kChannels;
    channels = rest < tile::kChannels ? rest : tile::kChannels;
  }
};
MAMBA_SSM_DEVICE int chunk_count(const ScanParams& p) {
  return (static_cast<int>(p.length) + tile::kSteps - 1) / tile::kSteps;
}
// Steps [first, first + steps) in the scan's order; `time` maps them to positions.
struct Chunk {
  int first, steps, length;
  bool reverse;
  MAMBA_SSM_DEVICE Chunk(const ScanParams& p, int index)
      : first(index * tile::kSteps), length(static_cast<int>(p.length)), reverse(p.reverse) {
    steps = length - first < tile::kSteps ? length - first : tile::kSteps;
  }
  MAMBA_SSM_DEVICE std::int64_t time(int step) const { return reverse ? length - 1 - first - step : first + step; }
};

// ---- tensors -----------------------------------------------------------------------------------------------------

using States = float[tile::kThreadStates];

// Calls function(j, index) for the thread's states of a matrix (rows, channels, states) that exist.
template <class Function>
MAMBA_SSM_DEVICE void for_each_state(const GpuScan& scan, const Tile& t, const Thread& thread, std::int64_t row,
                                     const Function& function) {
  const int count = thread.channel < t.channels ? scan.states - thread.first_state : 0;
  const std::int64_t first =
      (row * scan.p.channels + t.channel + thread.channel) * scan.p.states + scan.first_state + thread.first_state;
#pragma unroll
  for (int j = 0; j < tile::kThreadStates; ++j) {
    if (j < count) function(j, first + j);
  }
}
MAMBA_SSM_DEVICE void load_states(const GpuScan& scan, const Tile& t, const Thread& thread, const float* matrix,
                                  std::int64_t row, float missing, States& values) {
#pragma unroll
  for (int j = 0; j < tile::kThreadStates; ++j) values[j] = missing;
  if (matrix == nullptr) return;
  for_each_state(scan, t, thread, row, [&](int j, std::int64_t index) { values[j] = matrix[index]; });
}
MAMBA_SSM_DEVICE void store_states(const GpuScan& scan, const Tile& t, const Thread& thread, float* matrix,
                                   std::int64_t row, const States& values) {
  if (matrix == nullptr) return;
  for_each_state(scan, t, thread, row, [&](int j, std::int64_t index) { matrix[index] = values[j]; });
}
MAMBA_SSM_DEVICE std::int64_t checkpoint_row(const GpuScan& scan, const Tile& t, int chunk) {
  const int index = (chunk >> scan.checkpoint_shift) - scan.p.first_checkpoint;
  return static_cast<std::int64_t>(t.batch) * scan.checkpoints + index;
}
MAMBA_SSM_DEVICE float load_parameter(const float* parameter, const Tile& t, int channel) {
  return parameter != nullptr && channel < t.channels ? parameter[t.channel + channel] : 0.0f;
}

MAMBA_SSM_DEVICE float activation_at(const Activation& a, const Tile& t, int channel, std::int64_t time) {
  if (a.data == nullptr) return 0.0f;
  return load_element(a.data, t.batch * a.batch + (t.channel + channel) * a.channel + time * a.time, a.dtype);
}
MAMBA_SSM_DEVICE void set_activation(const Activation& a, const Tile& t, int channel, std::int64_t time, float value) {
  if (a.data == nullptr) return;
  store_element(a.data, t.batch * a.batch + (t.channel + channel) * a.channel + time * a.time, a.dtype, value);
}
// Calls function(step, channel) for the elements of the tile's chunk that this thread handles: neighbouring threads
// take neighbours in memory, as `like` lies there.
template <class Function>
MAMBA_SSM_DEVICE void for_each_element(const Activation& like, const Function& function) {
  const bool by_time = like.time < like.channel;
  for (int i = threadIdx.x; i < tile::kSteps * tile::kChannels; i += tile::kThreads) {
    if (by_time) {
      function(i % tile::kSteps, i / tile::kSteps);
    } else {
      function(i / tile::kChannels, i % tile::kChannels);
    }
  }
}

// ---- B and C -----------------------------------------------------------------------------------------------------

using MatrixRows = float[tile::kSteps][tile::kStates];

// A chunk's B or C: zeros where there are no such steps or states.
MAMBA_SSM_DEVICE void stage_matrix(const InputMatrix& m, const GpuScan& scan, const Tile& t, const Chunk& chunk,
                                   MatrixRows& rows) {
  static_assert(tile::kSteps * tile::kStates == tile::kThreads);
  if (m.constant) return;
  const int step = threadIdx.x / tile::kStates, state = threadIdx.x % tile::kStates;
  const bool exists = step < chunk.steps && state < scan.states;
  const std::int64_t index = t.batch * m.batch + t.group * m.group + (scan.first_state + state) * m.state;
  rows[step][state] = exists ? load_element(m.data, index + chunk.time(step) * m.time, m.dtype) : 0.0f;
}
// The thread's states of a constant matrix (channels, states).
MAMBA_SSM_DEVICE void load_constant(const InputMatrix& m, const GpuScan& scan, const Tile& t, const Thread& thread,
                                    States& values) {
  const int count = m.constant && thread.channel < t.channels ? scan.states - thread.first_state : 0;
  const std::int64_t first = (t.channel + thread.channel) * m.group + (scan.first_state + thread.first_state) * m.state;
#pragma unroll
  for (int j = 0; j < tile::kThreadStates; ++j) {
    values[j] = j < count ? load_element(m.data, first + j * m.state, m.dtype) : 0.0f;
  }
}

// ---- a step ------------------------------------------------------------------------------------------------------

// h = Ā h + c B u.
template <class Method>
MAMBA_SSM_DEVICE void advance(float2 in, const States& A, const States& B, States& h) {
#pragma unroll
  for (int j = 0; j < tile::kThreadStates; ++j) {
    const Transition<Real> transition = Method::forward(Real(in.x), Method::prepare(Real(A[j])));
    h[j] = transition.a_bar.value * h[j] + (transition.c * Real(in.y)).value * B[j];
  }
}

}  // namespace general
}  // namespace mamba_ssm
