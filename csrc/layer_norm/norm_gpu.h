// The launches of the CUDA kernels of residual add + norm, as norm_cuda.cpp calls them. No torch and no CUDA here.
#pragma once

#include "norm.h"

namespace mamba_ssm {

// (size,) parameters in their own dtype.
struct NormParameter {
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;
};

constexpr std::int64_t kNormMostColumns = 32768;                 // a row has to fit into the registers of one block
constexpr std::int64_t kNormMostRows = (1ll << 31) - (1 << 16);  // their index takes 32 bits

// As NormProblem, whose `weight`, `bias` and `scale` are not read, and whose `partial` is (blocks, 1 or 2, dim).
struct GpuNorm {
  NormProblem p;
  NormParameter weight, bias, scale;  // bias and scale may have no data

  // How the work is divided: `row_threads` threads share a row, 16 or a multiple of a warp; a block takes `block_rows`
  // rows at once.
  bool fast;  // x in any dtype and the residual in fp32, each four elements of a row aligned to their size
  int row_threads, block_rows;
  unsigned blocks;
  float inverse_dim;
};

// Sets how the work is divided, by all that stands before it.
void divide_norm(GpuNorm& norm, bool backward);

// Starts on the given stream and returns null, or what went wrong.
const char* launch_norm(const GpuNorm& norm, bool backward, void* stream);

}  // namespace mamba_ssm
