// The CUDA kernels of the causal convolution for channel-last memory without sequences.
#include "conv_rows.cuh"

namespace mamba_ssm {
namespace {

using namespace conv_rows;

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
// Steps that are worked on together, while those behind them are loaded.
constexpr int kForwardSteps = 4, kBackwardSteps = 4;
// Blocks that a multiprocessor holds at one time; in the backward kernel they bound the registers.
constexpr int kForwardBlocks = 6, kBackwardBlocks = 3;

template <int W, Dtype T>
__global__ void __launch_bounds__(kThreads) conv_rows_forward_kernel(MAMBA_SSM_CONSTANT_PARAMETER GpuConv conv) {
  constexpr int kSteps = kForwardSteps, kSize = T == Dtype::f32 ? 4 : 2;
  const ConvProblem& p = conv.p;
  const Walk walk(p, conv.chunk, conv.chunks);
  ParameterRows<W>& rows = shared_memory<ParameterRows<W>>();
  rows.load(conv.weight, conv.bias, p.dim, walk.channel - static_cast<int>(threadIdx.x) % kWarp * kChannels);
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
  const Walk walk(p, conv.chunk, conv.chunks);
  BackwardMemory<W>& memory = shared_memory<BackwardMemory<W>>();
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int first_channel = walk.channel - lane * kChannels;
  memory.parameters.load(conv.weight, conv.bias, p.dim, first_channel);
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
  const unsigned blocks = conv_rows_blocks(conv.p, conv.chunks);
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
