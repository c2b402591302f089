// Causal depthwise convolution: what the operator hands to the kernels. No torch here.
//
//     y[b, d, t] = act(bias[d] + sum_k weight[k, d] x[b, d, t - (W - 1) + k]),   k = 0 .. W - 1
//
// Times are in scan order: a reverse convolution has data pointers at the last position and negative time strides.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace mamba_ssm {

// A (batch, dim, time) array; strides in elements.
struct ConvArray {
  void* data = nullptr;
  std::int64_t batch = 0, dim = 0, time = 0;
};

struct ConvProblem {
  std::int64_t batch, dim, seqlen;
  int width;
  Dtype dtype;  // of every ConvArray
  bool silu;
  bool lanes_over_channels;  // neighbouring channels are adjacent in x, and in out or dout and dx
  const float* weight;       // (width, dim)
  const float* bias;         // (dim,)

  ConvArray x;
  ConvArray initial;  // the width - 1 inputs before x; without data: zeros
  const std::int32_t* seq_idx = nullptr;
  std::int64_t seq_batch = 0, seq_time = 0;

  ConvArray out;  // forward

  ConvArray dout, dx, dinitial;  // backward; dinitial has data if initial has
  ConvArray dx_addend;           // added to dx where it has data; its strides are those of the lanes too
  float* partial = nullptr;      // (batch * chunks, width + 1, dim): dweight, then dbias, of every chunk
};

// One work item is a chunk of time of a block of channels. The decomposition depends on the problem alone, never on
// the number of threads, and so do the sums over it.
constexpr std::int64_t kConvChunk = 256;
inline std::int64_t conv_chunks(const ConvProblem& p) { return (p.seqlen + kConvChunk - 1) / kConvChunk; }
inline std::int64_t conv_block(const ConvProblem& p) { return p.lanes_over_channels ? 128 : 8; }
inline std::int64_t conv_blocks(const ConvProblem& p) { return (p.dim + conv_block(p) - 1) / conv_block(p); }
inline std::int64_t conv_items(const ConvProblem& p) { return p.batch * conv_chunks(p) * conv_blocks(p); }

// New tokens against a state that is updated in place.
struct ConvUpdate {
  std::int64_t batch, dim, seqlen, state_len;
  int width;
  Dtype dtype, state_dtype;
  bool silu;
  const float* weight;  // (width, dim)
  const float* bias;    // (dim,)
  ConvArray x, out, state;
  const std::int32_t* cache_seqlens = nullptr;  // tokens seen so far: the state is a circular buffer
  const std::int32_t* state_indices = nullptr;  // row of the state of each batch entry; negative: none
};

struct ConvKernels {
  void (*forward)(const ConvProblem&, std::int64_t begin, std::int64_t end);   // items
  void (*backward)(const ConvProblem&, std::int64_t begin, std::int64_t end);  // items
  void (*update)(const ConvUpdate&, std::int64_t begin, std::int64_t end);     // batch entries
};

#if defined(__x86_64__)
extern const ConvKernels conv_kernels_avx512;
extern const ConvKernels conv_kernels_avx2;
#endif
extern const ConvKernels conv_kernels_generic;

}  // namespace mamba_ssm
