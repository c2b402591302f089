// The launches of the CUDA scan, as scan_cuda.cpp calls them. No torch and no CUDA here.
#pragma once

#include "launch_config.h"
#include "params.h"

namespace mamba_ssm {

// One launch of either kernel: the problem, and the states that are this launch's.
struct GpuScan {
  ScanParams p;
  int first_state, states;  // at most tile::kStates of them
  int tiles;                // of tile::kChannels channels, in a group
  // Whether pairs of states (in float32: states) lie side by side, aligned to 4 bytes; delta: with delta_weight.
  bool aligned_B, aligned_C, aligned_delta;
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
  float* partial;  // (batch, groups, tiles, length, 2 kStates): dB and dC of each tile, where not constant; or null
  bool exact;      // sum dB and dC over the channels in float32; else their terms are rounded to tf32
};

// dB or dC, (batch, groups, states, time), from the partial sums of the tiles.
struct TileSums {
  const float* partial;
  std::int64_t batch, groups, tiles, length;
  int first;  // in a row of the partial sums: 0 for dB, kStates for dC
  int states;
  float* out;  // of the launch's first state
  std::int64_t out_batch, out_group, out_state, out_time;
};

// What the segments make of a state h (backward: of an adjoint): decay h + local. Both (batch, segments, channels,
// states).
struct SegmentSums {
  float* decay;
  float* local;
};

// Each starts on the given stream and returns null, or what went wrong. Packed: every activation has its channels side
// by side, its other strides and its address in multiples of 16 bytes, and whole vectors of 16 bytes in each group; its
// dtype is u's or float32, for u and delta u's.
template <bool Packed>
const char* launch_scan_forward(const GpuScan& scan, void* stream);
template <bool Packed>
const char* launch_scan_backward(const GpuScan& scan, const GpuScanGradients& gradients, void* stream);
// The segments' sums, packed only; backward with the gradient `dout`, forward without.
const char* launch_segment_sums(const GpuScan& scan, const Activation* dout, const SegmentSums& sums, void* stream);
// scan.segment_states, from the sums and from the state before the first segment (backward: the adjoint behind the
// last), (batch, channels, states) or null for zeros.
const char* launch_join_segments(const GpuScan& scan, bool backward, const SegmentSums& sums, const float* state,
                                 float* segment_states, void* stream);
// Of the current device.
int multiprocessor_count();
const char* launch_sum_tiles(const TileSums& sums, void* stream);

}  // namespace mamba_ssm
