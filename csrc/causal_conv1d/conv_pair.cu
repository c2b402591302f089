// The backward pass of two convolutions of the same input, along and against time, at once: the input is read once, and
// its gradient written once. A walk goes along time. Against time, at t,
//
//     y_b[t] = act(bias_b + sum_k weight_b[k] x[t + (W - 1) - k])
#include "conv_rows.cuh"

namespace mamba_ssm {
namespace {

using namespace conv_rows;

// Of the inputs from `window` on, the last of which goes with the first weight.
template <int W>
MAMBA_SSM_DEVICE void convolve_back(const Parameters<W>& parameters, const Four* window, Four& y) {
#pragma unroll
  for (int v = 0; v < kChannels; ++v) {
    y[v] = parameters.bias[v];
#pragma unroll
    for (int k = 0; k < W; ++k) y[v] += parameters.weight[k][v] * window[W - 1 - k][v];
  }
}

// Steps that are worked on together, while those behind them are loaded, and blocks of a multiprocessor.
constexpr int kSteps = 2, kBlocks = 3;

template <int W>
struct PairParameters {
  ParameterRows<W> directions[2];

  MAMBA_SSM_DEVICE void load(const GpuConvPair& pair, int first_channel) {
#pragma unroll
    for (int i = 0; i < 2; ++i) directions[i].load(pair.weight[i], pair.bias[i], pair.p.dim, first_channel);
  }
};

template <int W>
struct PairMemory {
  PairParameters<W> parameters;
  float4 sums[kRowConvWarps][2][W + 1][kWarp];  // of dweight, then of dbias
};

// At the head t, dx[t - (W - 1)] becomes complete: it needs the gradients of y from there to t, and those of y_b from
// t - 2 (W - 1) to there.
template <int W, Dtype T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    conv_pair_backward_kernel(MAMBA_SSM_CONSTANT_PARAMETER GpuConvPair pair) {
  constexpr int kSize = T == Dtype::f32 ? 4 : 2, kLag = W - 1;
  const ConvProblem& p = pair.p;
  const Walk walk(p, pair.chunk, pair.chunks);
  PairMemory<W>& memory = shared_memory<PairMemory<W>>();
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int first_channel = walk.channel - lane * kChannels;
  memory.parameters.load(pair, first_channel);
  __syncthreads();
  float dweight[2][W][kChannels] = {}, dbias[2][kChannels] = {};
  if (walk.exists) {
    const Row x(p.x, walk.batch, walk.channel, kSize), dx(p.dx, walk.batch, walk.channel, kSize);
    const Row dout(pair.dout[0], walk.batch, walk.channel, kSize);
    const Row dout_b(pair.dout[1], walk.batch, walk.channel, kSize);
    const int length = static_cast<int>(p.seqlen), end = walk.end + kLag;
    RawFour<T> next_x[kSteps], next_dout[kSteps], next_dout_b[kSteps];
    const auto load = [&](int first) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const int t = first + i, s = t - kLag;
        next_x[i] = x.load_if<T>(t < end && t < length, t);
        next_dout[i] = dout.load_if<T>(t < end && t < length, t);
        next_dout_b[i] = dout_b.load_if<T>(s >= 0 && s < walk.end, s);
      }
    };
    load(walk.first);
    Four window[kLag + kSteps], g[kLag + kSteps] = {}, g_b[kLag + kSteps] = {};
    const Parameters<W> along(memory.parameters.directions[0]), against(memory.parameters.directions[1]);
#pragma unroll
    for (int k = 0; k < kLag; ++k) {
      const int t = walk.first - kLag + k;
      to_floats<T>(x.load_if<T>(t >= 0, t), window[k]);
    }
#pragma unroll 1
    for (int first = walk.first; first < end; first += kSteps) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        to_floats<T>(next_x[i], window[kLag + i]);
        to_floats<T>(next_dout[i], g[kLag + i]);
        to_floats<T>(next_dout_b[i], g_b[kLag + i]);
      }
      load(first + kSteps);
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        Four y, y_b;
        convolve(along, window + i, y);
        convolve_back(against, window + i, y_b);
        const int t = first + i, s = t - kLag;
        Four result = {};
#pragma unroll
        for (int v = 0; v < kChannels; ++v) {
          g[kLag + i][v] *= silu_slope(y[v], sigmoid(y[v]));
          g_b[kLag + i][v] *= silu_slope(y_b[v], sigmoid(y_b[v]));
          const float gradient = t < walk.end ? g[kLag + i][v] : 0.0f;
          const float gradient_b = s >= walk.first ? g_b[kLag + i][v] : 0.0f;
          dbias[0][v] += gradient;
          dbias[1][v] += gradient_b;
#pragma unroll
          for (int k = 0; k < W; ++k) {
            dweight[0][k][v] += gradient * window[i + k][v];
            dweight[1][k][v] += gradient_b * window[i + kLag - k][v];
            result[v] += along.weight[k][v] * g[i + kLag - k][v] + against.weight[k][v] * g_b[i + k][v];
          }
        }
        if (s >= walk.first && s < walk.end) {
          *reinterpret_cast<RawFour<T>*>(advance(dx.base, s, dx.step)) = from_floats<T>(result);
        }
      }
#pragma unroll
      for (int k = 0; k < kLag; ++k) {
#pragma unroll
        for (int v = 0; v < kChannels; ++v) {
          window[k][v] = window[kSteps + k][v];
          g[k][v] = g[kSteps + k][v];
          g_b[k][v] = g_b[kSteps + k][v];
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int k = 0; k < W; ++k) memory.sums[warp][i][k][lane] = from_floats<Dtype::f32>(dweight[i][k]);
    memory.sums[warp][i][W][lane] = from_floats<Dtype::f32>(dbias[i]);
  }
  __syncthreads();
  const int rest = static_cast<int>(p.dim) - first_channel,
            channels = rest < kRowConvChannels ? rest : kRowConvChannels;
  for (int direction = 0; direction < 2; ++direction) {
    const auto sum_warps = [&](int k, int i) {
      float sum = 0.0f;
      for (int w = 0; w < kRowConvWarps; ++w) sum += reinterpret_cast<const float*>(memory.sums[w][direction][k])[i];
      return sum;
    };
    const i64 row = (walk.batch * pair.chunks + walk.group) * 2 + direction;
    float* partial = p.partial + row * p.dim * (W + 1);
    for (int i = threadIdx.x; i < channels * W; i += kThreads) {
      partial[static_cast<i64>(first_channel) * W + i] = sum_warps(i % W, i / W);
    }
    for (int i = threadIdx.x; i < channels; i += kThreads) partial[p.dim * W + first_channel + i] = sum_warps(W, i);
  }
}

template <int W>
const char* launch_width(const GpuConvPair& pair, void* stream) {
  return with_static_dtype(pair.p.dtype, [&](auto dtype) {
    return launch<GpuConvPair>(conv_pair_backward_kernel<W, dtype.value>, conv_rows_blocks(pair.p, pair.chunks), 1,
                               kThreads, sizeof(PairMemory<W>), stream, pair);
  });
}

}  // namespace

i64 conv_pair_resident_blocks() { return static_cast<i64>(device_multiprocessors()) * kBlocks; }

const char* launch_conv_pair(const GpuConvPair& pair, void* stream) {
  switch (pair.p.width) {
    case 2:
      return launch_width<2>(pair, stream);
    case 3:
      return launch_width<3>(pair, stream);
    default:
      return launch_width<4>(pair, stream);
  }
}

}  // namespace mamba_ssm
