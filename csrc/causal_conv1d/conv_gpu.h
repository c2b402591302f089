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

// As ConvProblem, whose `weight` and `bias` are not read. A thread walks through a chunk of time of one channel, or of
// a pair of neighbouring ones.
struct GpuConv {
  ConvProblem p;
  ConvParameter weight;  // (dim, width)
  ConvParameter bias;    // (dim, 1), or no data
  std::int64_t chunk, chunks;
  bool pairs;         // channels lie in pairs, each aligned to its size, in every array that has data
  bool time_fastest;  // neighbouring threads take neighbouring chunks of time, not of channels
};
constexpr std::int64_t kForwardConvChunk = 16, kBackwardConvChunk = 64;

struct GpuConvUpdate {
  ConvUpdate p;  // but for weight and bias
  ConvParameter weight, bias;
  std::int64_t rows;  // of the state
};

// Each starts on the given stream and returns null, or what went wrong. The backward pass leaves its sums in
// p.partial (batch * chunks, dim * width + dim): dweight, then dbias.
const char* launch_conv_forward(const GpuConv& conv, void* stream);
const char* launch_conv_backward(const GpuConv& conv, void* stream);
const char* launch_conv_update(const GpuConvUpdate& update, void* stream);

}  // namespace mamba_ssm
