// The CUDA kernels of the causal convolution for channel-last memory without sequences: a thread has four neighbouring
// channels, a warp a row of 128, and each warp of a block a chunk of time, next to the other warps'.
#include "conv_gpu.h"
#include "cuda_device.h"

namespace mamba_ssm {
namespace {

using i64 = std::int64_t;

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

  MAMBA_SSM_DEVICE explicit Walk(const GpuConv& conv) {
    const int columns = static_cast<int>((conv.p.dim + kRowConvChannels - 1) / kRowConvChannels);
    const int column = static_cast<int>(blockIdx.x) % columns, rest = static_cast<int>(blockIdx.x) / columns;
    group = rest % static_cast<int>(conv.chunks);
    batch = rest / static_cast<int>(conv.chunks);
    channel = column * kRowConvChannels + static_cast<int>(threadIdx.x) % kWarp * kChannels;
    const int chunk = static_cast<int>(conv.chunk), length = static_cast<int>(conv.p.seqlen);
    first = (group * kRowConvWarps + static_cast<int>(threadIdx.x) / kWarp) * chunk;
    end = first + chunk < length ? first + chunk : length;
    exists = first < end && channel < conv.p.dim;
  }
};

// The parameters of the block's channels; 0 where there is no channel.
template <int W>
struct ParameterRows {
  float4 weight[W][kWarp], bias[kWarp];

  // Each thread loads those of a channel: a warp's loads lie side by side.
  MAMBA_SSM_DEVICE void load(const GpuConv& conv, int first_channel) {
    static_assert(kThreads == kRowConvChannels);
    const ConvParameter &w = conv.weight, &b = conv.bias;
    const int i = static_cast<int>(threadIdx.x), channel = first_channel + i;
    const bool exists = channel < conv.p.dim;
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

// The W - 1 inputs before the walk; before time 0 the initial states, or zeros.
template <int W, Dtype T>
MAMBA_SSM_DEVICE void load_past(const ConvProblem& p, const Walk& walk, const Row& x, Four* past) {
#pragma unroll
  for (int k = 0; k < W - 1; ++k) {
    const int t = walk.first - (W - 1) + k;
    to_floats<T>(x.load_if<T>(walk.exists && t >= 0, t), past[k]);
    if (!walk.exists || t >= 0 || p.initial.data == nullptr) continue;
#pragma unroll
    for (int v = 0; v < kChannels; ++v) {
      const i64 index =
          walk.batch * p.initial.batch + (walk.channel + v) * p.initial.dim + (t + W - 1) * p.initial.time;
      past[k][v] = load_element(p.initial.data, index, T);
    }
  }
}
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

// Steps that are worked on together, while those behind them are loaded.
constexpr int kForwardSteps = 4, kBackwardSteps = 4;
// Blocks that a multiprocessor holds at one time; in the backward kernel they bound the registers.
constexpr int kForwardBlocks = 6, kBackwardBlocks = 3;

template <int W, Dtype T>
__global__ void __launch_bounds__(kThreads) conv_rows_forward_kernel(MAMBA_SSM_CONSTANT_PARAMETER GpuConv conv) {
  constexpr int kSteps = kForwardSteps, kSize = T == Dtype::f32 ? 4 : 2;
  const ConvProblem& p = conv.p;
  const Walk walk(conv);
  ParameterRows<W>& rows = shared_memory<ParameterRows<W>>();
  rows.load(conv, walk.channel - static_cast<int>(threadIdx.x) % kWarp * kChannels);
  const Row x(p.x, walk.batch, walk.channel, kSize), out(p.out, walk.batch, walk.channel, kSize);
  RawFour<T> ahead[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) ahead[i] = x.load_if<T>(walk.exists && walk.first + i < walk.end, walk.first + i);
  Four window[W - 1 + kSteps];
  load_past<W, T>(p, walk, x, window);
  __syncthreads();
  if (!walk.exists) return;
  const Parameters<W> parameters(rows);
#pragma unroll 1
  for (int first = walk.first; first < walk.end; first += kSteps) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      to_floats<T>(ahead[i], window[W - 1 + i]);
      const int t = first + kSteps + i;
      ahead[i] = x.load_if<T>(t < walk.end, t);
    }
    Four y[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) convolve(parameters, window + i, y[i]);
    if (p.silu) {
#pragma unroll
      for (int i = 0; i < kSteps * kChannels; ++i)
        y[i / kChannels][i % kChannels] *= sigmoid(y[i / kChannels][i % kChannels]);
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int t = first + i;
      if (t < walk.end) *reinterpret_cast<RawFour<T>*>(advance(out.base, t, out.step)) = from_floats<T>(y[i]);
    }
#pragma unroll
    for (int k = 0; k < W - 1; ++k) {
#pragma unroll
      for (int v = 0; v < kChannels; ++v) window[k][v] = window[kSteps + k][v];
    }
  }
}

template <int W>
struct BackwardMemory {
  ParameterRows<W> parameters;
  float4 sums[kRowConvWarps][W + 1][kWarp];  // of dweight, then of dbias
};

// As conv_backward_kernel. At time t, dx[t - W + 1] becomes complete; a walk looks W - 1 steps ahead.
template <int W, Dtype T>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks)
    conv_rows_backward_kernel(MAMBA_SSM_CONSTANT_PARAMETER GpuConv conv) {
  constexpr int kSteps = kBackwardSteps, kSize = T == Dtype::f32 ? 4 : 2;
  const ConvProblem& p = conv.p;
  const Walk walk(conv);
  BackwardMemory<W>& memory = shared_memory<BackwardMemory<W>>();
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int first_channel = walk.channel - lane * kChannels;
  memory.parameters.load(conv, first_channel);
  __syncthreads();
  float dweight[W][kChannels] = {}, dbias[kChannels] = {};
  if (walk.exists) {
    const Row x(p.x, walk.batch, walk.channel, kSize), dout(p.dout, walk.batch, walk.channel, kSize);
    const Row dx(p.dx, walk.batch, walk.channel, kSize), addend(p.dx_addend, walk.batch, walk.channel, kSize);
    const int end = walk.end + W - 1, length = static_cast<int>(p.seqlen), inputs = end < length ? end : length;
    RawFour<T> next_x[kSteps], next_dout[kSteps], next_addend[kSteps];
    const auto load = [&](int first) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const int t = first + i, s = t - (W - 1);
        next_x[i] = x.load_if<T>(t < inputs, t);
        next_dout[i] = dout.load_if<T>(t < inputs, t);
        next_addend[i] = addend.load_if<T>(addend.base != nullptr && s >= walk.first && s < walk.end, s);
      }
    };
    load(walk.first);
    Four window[W - 1 + kSteps], g[W - 1 + kSteps] = {};
    load_past<W, T>(p, walk, x, window);
    const Parameters<W> parameters(memory.parameters);
#pragma unroll 1
    for (int first = walk.first; first < end; first += kSteps) {
      Four result[kSteps];
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        to_floats<T>(next_x[i], window[W - 1 + i]);
        to_floats<T>(next_dout[i], g[W - 1 + i]);
        to_floats<T>(next_addend[i], result[i]);
      }
      load(first + kSteps);
      if (p.silu) {
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          Four y;
          convolve(parameters, window + i, y);
#pragma unroll
          for (int v = 0; v < kChannels; ++v) g[W - 1 + i][v] *= silu_slope(y[v], sigmoid(y[v]));
        }
      }
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const bool counts = first + i < walk.end;
#pragma unroll
        for (int v = 0; v < kChannels; ++v) {
          const float gradient = counts ? g[W - 1 + i][v] : 0.0f;
          dbias[v] += gradient;
#pragma unroll
          for (int k = 0; k < W; ++k) {
            dweight[k][v] += gradient * window[i + k][v];
            result[i][v] += parameters.weight[k][v] * g[i + W - 1 - k][v];  // y[t - k] saw x[s] through weight[k]
          }
        }
        const int s = first + i - (W - 1);
        if (s >= walk.first && s < walk.end) {
          *reinterpret_cast<RawFour<T>*>(advance(dx.base, s, dx.step)) = from_floats<T>(result[i]);
        }
      }
      if (first == 0 && p.dinitial.data != nullptr) {
        const ConvArray& a = p.dinitial;
#pragma unroll
        for (int i = 0; i < W - 1; ++i) {
#pragma unroll
          for (int v = 0; v < kChannels; ++v) {
            store_element(a.data, walk.batch * a.batch + (walk.channel + v) * a.dim + i * a.time, T, result[i][v]);
          }
        }
      }
#pragma unroll
      for (int k = 0; k < W - 1; ++k) {
#pragma unroll
        for (int v = 0; v < kChannels; ++v) {
          window[k][v] = window[kSteps + k][v];
          g[k][v] = g[kSteps + k][v];
        }
      }
    }
  }
#pragma unroll
  for (int k = 0; k < W; ++k) memory.sums[warp][k][lane] = from_floats<Dtype::f32>(dweight[k]);
  memory.sums[warp][W][lane] = from_floats<Dtype::f32>(dbias);
  __syncthreads();
  const auto sum_warps = [&](int k, int i) {
    float sum = 0.0f;
    for (int w = 0; w < kRowConvWarps; ++w) sum += reinterpret_cast<const float*>(memory.sums[w][k])[i];
    return sum;
  };
  float* partial = p.partial + (walk.batch * conv.chunks + walk.group) * p.dim * (W + 1);
  const int rest = static_cast<int>(p.dim) - first_channel,
            channels = rest < kRowConvChannels ? rest : kRowConvChannels;
  for (int i = threadIdx.x; i < channels * W; i += kThreads) {
    partial[static_cast<i64>(first_channel) * W + i] = sum_warps(i % W, i / W);
  }
  for (int i = threadIdx.x; i < channels; i += kThreads) partial[p.dim * W + first_channel + i] = sum_warps(W, i);
}

using Kernel = void (*)(GpuConv);
template <int W, Dtype T>
const char* launch_rows(const GpuConv& conv, bool backward, void* stream) {
  const i64 columns = (conv.p.dim + kRowConvChannels - 1) / kRowConvChannels;
  const auto blocks = static_cast<unsigned>(conv.p.batch * conv.chunks * columns);
  const Kernel kernel = backward ? conv_rows_backward_kernel<W, T> : conv_rows_forward_kernel<W, T>;
  return launch<GpuConv>(kernel, blocks, 1, kThreads, backward ? sizeof(BackwardMemory<W>) : sizeof(ParameterRows<W>),
                         stream, conv);
}
template <int W>
const char* launch_rows(const GpuConv& conv, bool backward, void* stream) {
  return with_static_dtype(conv.p.dtype,
                           [&](auto dtype) { return launch_rows<W, dtype.value>(conv, backward, stream); });
}

}  // namespace

i64 conv_rows_resident_blocks(bool backward) {
  return static_cast<i64>(device_multiprocessors()) * (backward ? kBackwardBlocks : kForwardBlocks);
}

const char* launch_conv_rows(const GpuConv& conv, bool backward, void* stream) {
  switch (conv.p.width) {
    case 2:
      return launch_rows<2>(conv, backward, stream);
    case 3:
      return launch_rows<3>(conv, backward, stream);
    default:
      return launch_rows<4>(conv, backward, stream);
  }
}

}  // namespace mamba_ssm
