// The launches of the CUDA scan, as scan_cuda.cpp calls them. No torch and no CUDA here.
//
// The fast kernels are for u, delta, z and dout of one dtype T, B and C of T and varying, all of them with their
// channels or states side by side in whole vectors: of 16 bytes for channels, of 8 bytes for states, states by fours.
// The general ones are for everything.
#pragma once

#include "launch_config.h"
#include "params.h"

namespace mamba_ssm {

// One launch of either kernel: the problem, and the states that are this launch's. Δ comes from the tensor delta.
struct GpuScan {
  ScanParams p;
  int first_state, states;  // at most tile::kStates of them
  int tiles;                // of a block's channels, in a group
  int checkpoint_shift;     // from one checkpoint to the next: 1 << that chunks
  int checkpoints;          // of a batch element
  // Each segment of `segment_chunks` chunks has blocks of its own. Of the segments but the first (backward: the last),
  // (batch, segments, channels, states): the state before the segment (backward: the adjoint behind it).
  int segments, segment_chunks;
  const float* segment_states;
};

struct GpuScanGradients {
  // dA, dD and ddelta_bias have a row for each segment: (batch, segments, channels, …); dB and dC are set in their
  // constant forms only: (batch, channels, states)
  ScanGradients g;
  Activation sum_du, sum_ddelta;  // of the launches for other states, in float32, to be added; or none
  float* partial;      // (batch, groups, tiles, length, 2 kStates): dB and dC of each tile, where not constant; or null
  float* kept_states;  // for each warp, of the chunks between two checkpoints (fast kernels); or null
};

// dB and dC, (batch, groups, states, time), from the partial sums of the tiles.
struct TileSums {
  const float* partial;
  std::int64_t batch, groups, tiles, length;
  int states;
  struct Target {
    void* data;  // of the launch's first state; or null
    Dtype dtype;
    std::int64_t batch, group, state, time;
  } B, C;
};

// What the segments make of a state h (backward: of an adjoint): decay h + local. Both (batch, segments, channels,
// states).
struct SegmentSums {
  float* decay;
  float* local;
};

// What the forward kernel writes: nothing but a segment's sums; the output in T or in float32; or, with z, in T.
enum class Output { none, plain, gated };

// delta = delta_weight · delta_input in T, channel-last.
struct DeltaProjection {
  InputMatrix input;    // (batch, rank, time)
  const float* weight;  // (channels, rank)
  std::int64_t batch, channels, rank, length;
  void* out;  // (batch, length, channels)
  Dtype dtype;
};

// Each starts on the given stream and returns null, or what went wrong.
template <Dtype T>
const char* launch_scan_forward(const GpuScan& scan, Output kind, const SegmentSums& sums, void* stream);
// The same of an undivided sequence, the states of a channel spread over so many lanes: 4 or 8.
template <Dtype T>
const char* launch_scan_spread(const GpuScan& scan, int lanes, Output kind, void* stream);
// With `sums`: those of each segment's adjoints, and nothing else.
template <Dtype T>
const char* launch_scan_backward(const GpuScan& scan, const GpuScanGradients& gradients, const SegmentSums* sums,
                                 void* stream);
// scan.segment_states, from the sums and from the state before the first segment (backward: the adjoint behind the
// last), (batch, channels, states) or null for zeros.
const char* launch_join_segments(const GpuScan& scan, bool backward, const SegmentSums& sums, const float* state,
                                 float* segment_states, void* stream);
const char* launch_general_forward(const GpuScan& scan, void* stream);
const char* launch_general_backward(const GpuScan& scan, const GpuScanGradients& gradients, void* stream);
const char* launch_sum_tiles(const TileSums& sums, void* stream);
const char* launch_project_delta(const DeltaProjection& projection, void* stream);
// Of the current device.
int multiprocessor_count();

}  // namespace mamba_ssm
