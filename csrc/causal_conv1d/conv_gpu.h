// The launches of the CUDA convolution, as conv_cuda.cpp calls them. No torch and no CUDA here.
#pragma once

#include "conv.h"

namespace mamba_ssm {

// (rows, columns) of parameters in their own dtype.
struct ConvParameter {
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;
  std::int64_t row = 0, column = 0;
};

// As ConvProblem, whose `weight` and `bias` are not read.
struct GpuConv {
  ConvProblem p;
  ConvParameter weight;  // (dim, width)
  ConvParameter bias;    // (dim, 1), or no data
  // The kernels for rows: a warp walks through `chunk` steps of a row, and `chunks` blocks of kRowConvWarps warps
  // through all. Else: a thread walks through `chunk` steps of a channel, and `chunks` threads through all.
  std::int64_t chunk, chunks;
  bool time_fastest;  // not for rows: neighbouring threads take neighbouring chunks of time, not of channels
};
constexpr std::int64_t kForwardConvChunk = 16, kBackwardConvChunk = 64;
constexpr int kRowConvWarps = 4, kRowConvChannels = 128;
inline std::int64_t conv_rows_columns(const ConvProblem& p) {
  return (p.dim + kRowConvChannels - 1) / kRowConvChannels;
}
inline unsigned conv_rows_blocks(const ConvProblem& p, std::int64_t chunks) {
  return static_cast<unsigned>(p.batch * chunks * conv_rows_columns(p));
}

// The backward pass of two convolutions of the same x, along and against time, with SiLU: channel-last as the kernels
// for rows want it. Arrays are in order of time; of p's, x and dx are read.
struct GpuConvPair {
  ConvProblem p;
  ConvParameter weight[2], bias[2];
  ConvArray dout[2];
  std::int64_t chunk, chunks;
};

struct GpuConvUpdate {
  ConvUpdate p;  // but for weight and bias
  ConvParameter weight, bias;
  std::int64_t rows;  // of the state
};

// Each starts on the given stream and returns null, or what went wrong. The backward pass leaves its sums in
// p.partial (batch * chunks, dim * width + dim): dweight, then dbias.
//
// The kernels for rows are for channel-last arrays with four neighbouring channels aligned to them all, without
// seq_idx.
const char* launch_conv(const GpuConv& conv, bool backward, void* stream);
const char* launch_conv_rows(const GpuConv& conv, bool backward, void* stream);
// Leaves (batch * chunks, 2, dim * width + dim).
const char* launch_conv_pair(const GpuConvPair& pair, void* stream);
// How many blocks of those kernels the current device holds at one time.
std::int64_t conv_rows_resident_blocks(bool backward);
std::int64_t conv_pair_resident_blocks();
const char* launch_conv_update(const GpuConvUpdate& update, void* stream);

}  // namespace mamba_ssm
