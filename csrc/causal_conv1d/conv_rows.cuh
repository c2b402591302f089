// What the CUDA kernels of the causal convolution for channel-last memory without sequences share: a thread has four
// neighbouring channels, a warp a row of 128, and each warp of a block a chunk of time, next to the other warps'.
#pragma once

#include "conv_gpu.h"
#include "cuda_device.h"

namespace mamba_ssm {

using i64 = std::int64_t;

namespace conv_rows {

constexpr int kThreads = kRowConvWarps * kWarp, kChannels = 4;
static_assert(kRowConvChannels == kWarp * kChannels);

using Four = float[kChannels];

// One row of an array: the thread's channels at every time, in scan order.
struct Row {
  char* base;  // null where there is no array
  int step;    // bytes from one time to the next

  MAMBA_SSM_DEVICE Row(const ConvArray& a, i64 batch, i64 channel, int size)
      : base(a.data == nullptr ? nullptr : static_cast<char*>(a.data) + (batch * a.batch + channel) * size),
        step(static_cast<int>(a.time) * size) {}

  template <Dtype T>
  MAMBA_SSM_DEVICE RawFour<T> load_if(bool exists, int t) const {
    RawFour<T> raw{};
    if (exists) raw = *reinterpret_cast<const RawFour<T>*>(advance(base, t, step));
    return raw;
  }
};

// Steps [first, end) of the channels from `channel` on.
struct Walk {
  i64 batch;
  int channel, first, end, group;
  bool exists;

  MAMBA_SSM_DEVICE Walk(const ConvProblem& p, i64 chunk_steps, i64 chunks) {
    const int columns = (static_cast<int>(p.dim) + kRowConvChannels - 1) / kRowConvChannels;
    const int column = static_cast<int>(blockIdx.x) % columns, rest = static_cast<int>(blockIdx.x) / columns;
    group = rest % static_cast<int>(chunks);
    batch = rest / static_cast<int>(chunks);
    channel = column * kRowConvChannels + static_cast<int>(threadIdx.x) % kWarp * kChannels;
    const int chunk = static_cast<int>(chunk_steps), length = static_cast<int>(p.seqlen);
    first = (group * kRowConvWarps + static_cast<int>(threadIdx.x) / kWarp) * chunk;
    end = first + chunk < length ? first + chunk : length;
    exists = first < end && channel < p.dim;
  }
};

// The parameters of the block's channels; 0 where there is no channel.
template <int W>
struct ParameterRows {
  float4 weight[W][kWarp], bias[kWarp];

  // Each thread loads those of a channel: a warp's loads lie side by side.
  MAMBA_SSM_DEVICE void load(const ConvParameter& w, const ConvParameter& b, i64 dim, int first_channel) {
    static_assert(kThreads == kRowConvChannels);
    const int i = static_cast<int>(threadIdx.x), channel = first_channel + i;
    const bool exists = channel < dim;
    float values[W];
    with_dtype(w.dtype, [&](auto dtype) {
#pragma unroll
      for (int k = 0; k < W; ++k) {
        values[k] = exists ? load_element(w.data, channel * w.row + k * w.column, dtype.value) : 0.0f;
      }
    });
#pragma unroll
    for (int k = 0; k < W; ++k) reinterpret_cast<float*>(weight[k])[i] = values[k];
    reinterpret_cast<float*>(bias)[i] =
        exists && b.data != nullptr ? load_element(b.data, channel * b.row, b.dtype) : 0.0f;
  }
};
template <int W>
struct Parameters {
  float weight[W][kChannels], bias[kChannels];

  MAMBA_SSM_DEVICE explicit Parameters(const ParameterRows<W>& rows) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
    for (int k = 0; k < W; ++k) to_floats<Dtype::f32>(rows.weight[k][lane], weight[k]);
    to_floats<Dtype::f32>(rows.bias[lane], bias);
  }
};

// Of the inputs to the one at `window` + W - 1.
template <int W>
MAMBA_SSM_DEVICE void convolve(const Parameters<W>& parameters, const Four* window, Four& y) {
#pragma unroll
  for (int v = 0; v < kChannels; ++v) {
    y[v] = parameters.bias[v];
#pragma unroll
    for (int k = 0; k < W; ++k) y[v] += parameters.weight[k][v] * window[k][v];
  }
}

}  // namespace conv_rows
}  // namespace mamba_ssm
