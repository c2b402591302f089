// Plain descriptions of the selective scan's tensors, shared by the kernels of every device. Strides in elements.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace mamba_ssm {

// u, delta, z, out and their gradients: (batch, channel, time).
struct Activation {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
  std::int64_t batch = 0, channel = 0, time = 0;
};

// B, C: (batch, group, state, time); constant over time and batch: (channel, state), with channel stride `group`.
struct InputMatrix {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
  bool constant = false;
  std::int64_t batch = 0, group = 0, state = 0, time = 0;
};

struct ScanParams {
  int method;  // row of the table MAMBA_SSM_DISCRETIZATIONS
  std::int64_t batch, channels, length, states, groups;
  Activation u, delta, z, addend, out;
  InputMatrix B, C;
  // Where delta_weight is given, Δ before its bias is delta_weight · delta_input, and `delta` is not read.
  InputMatrix delta_input;     // (batch, rank, time)
  const float* delta_weight;   // (channels, rank) or null
  std::int64_t rank;           // 0 without delta_weight
  const float* A;              // (channels, states), contiguous
  const float* D;              // (channels) or null
  const float* delta_bias;     // (channels) or null
  const float* initial_state;  // (batch, channels, states) or null
  float* last_state;           // (batch, channels, states)
  float* checkpoints;          // (batch, chunks, states, channels) in an order of its own; null: none kept
  std::int64_t chunk;          // steps from one checkpoint to the next
  int first_checkpoint;        // 1: the state before the first step is zeros, and there is no checkpoint of it; else 0
  float scale;
  bool delta_softplus, reverse;
};

// Gradients. dB and dC are partial sums over the channels of one task (see scan_cpu_kernel.h).
struct ScanGradients {
  Activation dout, du, ddelta, dz;
  Activation dz_addend;      // added to dz
  const float* dlast_state;  // (batch, channels, states) or null
  float* dinitial_state;     // (batch, channels, states)
  float* dA;                 // (batch, channels, states), summed over the batch afterwards
  float* dD;                 // (batch, channels) or null
  float* ddelta_bias;        // (batch, channels) or null
  float* dB;                 // varying: (batch, groups, splits, states, length); constant: (batch, channels, states)
  float* dC;
  std::int64_t splits;  // the channels of a group are shared by this many tasks
};

}  // namespace mamba_ssm
