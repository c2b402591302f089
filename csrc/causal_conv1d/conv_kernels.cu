// The CUDA kernels of the causal convolution.
#include "conv_gpu.h"
#include "cuda_device.h"

namespace mamba_ssm {
namespace {

using i64 = std::int64_t;

constexpr int kThreads = 128;
constexpr int kMaxWidth = 4;

// One channel, or two neighbours.
template <int V>
struct Lanes {
  float value[V];
};

MAMBA_SSM_DEVICE i64 at(const ConvArray& a, i64 b, i64 d, i64 t) { return b * a.batch + d * a.dim + t * a.time; }

template <Dtype T, int V>
MAMBA_SSM_DEVICE Lanes<V> load(const ConvArray& a, i64 b, i64 d, i64 t) {
  if constexpr (V == 2) {
    const float2 pair = load_pair<T>(a.data, at(a, b, d, t));
    return {{pair.x, pair.y}};
  } else {
    return {{load_element(a.data, at(a, b, d, t), T)}};
  }
}
template <Dtype T, int V>
MAMBA_SSM_DEVICE void store(const ConvArray& a, i64 b, i64 d, i64 t, const Lanes<V>& v) {
  if constexpr (V == 2) {
    store_pair<T>(a.data, at(a, b, d, t), {v.value[0], v.value[1]});
  } else {
    store_element(a.data, at(a, b, d, t), T, v.value[0]);
  }
}

// What a thread walks through: steps [first, end) of V channels.
struct Walk {
  i64 batch, channel, chunk, first, end;
};
template <int V>
MAMBA_SSM_DEVICE bool this_walk(const GpuConv& conv, Walk& walk) {
  const ConvProblem& p = conv.p;
  const i64 columns = p.dim / V, index = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x;
  const i64 column = conv.time_fastest ? index / conv.chunks % columns : index % columns;
  const i64 chunk = conv.time_fastest ? index % conv.chunks : index / columns % conv.chunks;
  const i64 first = chunk * conv.chunk, rest = p.seqlen - first;
  walk = {index / columns / conv.chunks, column * V, chunk, first, first + (rest < conv.chunk ? rest : conv.chunk)};
  return walk.batch < p.batch;
}

// The parameters of the thread's channels, and the last W inputs it has seen with their sequences.
template <int W, Dtype T, int V>
class Window {
 public:
  MAMBA_SSM_DEVICE Window(const GpuConv& conv, const Walk& walk) : p_(conv.p), walk_(walk) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const i64 d = walk.channel + v;
      bias_.value[v] =
          conv.bias.data == nullptr ? 0.0f : load_element(conv.bias.data, d * conv.bias.row, conv.bias.dtype);
#pragma unroll
      for (int k = 0; k < W; ++k) {
        weight[k].value[v] =
            load_element(conv.weight.data, d * conv.weight.row + k * conv.weight.column, conv.weight.dtype);
      }
    }
#pragma unroll
    for (int k = 0; k < W - 1; ++k) {
      const i64 t = walk.first - (W - 1) + k;
      x[k + 1] = input_before(t);
      sequence[k + 1] = sequence_of(t);
    }
  }

  // Moves on to the input of time t.
  MAMBA_SSM_DEVICE void push(i64 t, const Lanes<V>& input) {
#pragma unroll
    for (int k = 0; k < W - 1; ++k) {
      x[k] = x[k + 1];
      sequence[k] = sequence[k + 1];
    }
    x[W - 1] = input;
    sequence[W - 1] = sequence_of(t);
  }
  // Whether the output at the present time sees input k of the window.
  MAMBA_SSM_DEVICE bool sees(int k) const { return p_.seq_idx == nullptr || sequence[k] == sequence[W - 1]; }
  MAMBA_SSM_DEVICE bool padding() const { return p_.seq_idx != nullptr && sequence[W - 1] < 0; }

  MAMBA_SSM_DEVICE Lanes<V> convolve() const {
    Lanes<V> y = bias_;
#pragma unroll
    for (int k = 0; k < W; ++k) {
      if (!sees(k)) continue;
#pragma unroll
      for (int v = 0; v < V; ++v) y.value[v] += weight[k].value[v] * x[k].value[v];
    }
    return y;
  }

  Lanes<V> weight[W], x[W];
  int sequence[W];

 private:
  // x[t]; for t < 0 an initial state.
  MAMBA_SSM_DEVICE Lanes<V> input_before(i64 t) const {
    Lanes<V> input{};
    if (t >= 0) return load<T, V>(p_.x, walk_.batch, walk_.channel, t);
    if (p_.initial.data == nullptr) return input;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      input.value[v] = load_element(p_.initial.data, at(p_.initial, walk_.batch, walk_.channel + v, t + W - 1), T);
    }
    return input;
  }
  // Before the first position there is none.
  MAMBA_SSM_DEVICE int sequence_of(i64 t) const {
    if (p_.seq_idx == nullptr || t < 0 || t >= p_.seqlen) return -1;
    return p_.seq_idx[walk_.batch * p_.seq_batch + t * p_.seq_time];
  }

  const ConvProblem& p_;
  const Walk& walk_;
  Lanes<V> bias_;
};

// Loads that are under way at one time.
constexpr int kAhead = 8;

template <int W, Dtype T, int V>
__global__ void __launch_bounds__(kThreads) conv_forward_kernel(MAMBA_SSM_CONSTANT_PARAMETER GpuConv conv) {
  const ConvProblem& p = conv.p;
  Walk walk;
  if (!this_walk<V>(conv, walk)) return;
  Window<W, T, V> window(conv, walk);
  for (i64 first = walk.first; first < walk.end; first += kAhead) {
    Lanes<V> inputs[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i < walk.end) inputs[i] = load<T, V>(p.x, walk.batch, walk.channel, first + i);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const i64 t = first + i;
      if (t >= walk.end) break;
      window.push(t, inputs[i]);
      Lanes<V> y = window.convolve();
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (p.silu) y.value[v] *= sigmoid(y.value[v]);
        if (window.padding()) y.value[v] = 0.0f;
      }
      store<T, V>(p.out, walk.batch, walk.channel, t, y);
    }
  }
}

// With g[t] = dout[t] act'(y[t]):
//
//     dx[s] = sum_k weight[k] g[s + W - 1 - k]      dweight[k] = sum_t g[t] x[t - W + 1 + k]
//
// At time t, g[t] is computed from the window and dx[t - W + 1] becomes complete. A chunk looks W - 1 steps ahead.
template <int W, Dtype T, int V>
__global__ void __launch_bounds__(kThreads) conv_backward_kernel(MAMBA_SSM_CONSTANT_PARAMETER GpuConv conv) {
  const ConvProblem& p = conv.p;
  Walk walk;
  if (!this_walk<V>(conv, walk)) return;
  Window<W, T, V> window(conv, walk);
  Lanes<V> g[W] = {}, dweight[W] = {}, dbias{};
  constexpr int kLoads = kAhead / 2;
  const i64 end = walk.end + W - 1;
  for (i64 first = walk.first; first < end; first += kLoads) {
    Lanes<V> inputs[kLoads] = {}, gradients[kLoads] = {}, addends[kLoads] = {};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const i64 t = first + i, s = t - (W - 1);
      if (t < p.seqlen && t < end) {
        inputs[i] = load<T, V>(p.x, walk.batch, walk.channel, t);
        gradients[i] = load<T, V>(p.dout, walk.batch, walk.channel, t);
      }
      if (p.dx_addend.data != nullptr && s >= walk.first && s < walk.end) {
        addends[i] = load<T, V>(p.dx_addend, walk.batch, walk.channel, s);
      }
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const i64 t = first + i, s = t - (W - 1);
      if (t >= end) break;
      window.push(t, inputs[i]);
#pragma unroll
      for (int k = 0; k < W - 1; ++k) g[k] = g[k + 1];
      const Lanes<V> y = window.convolve();
      const bool counts = t < p.seqlen && !window.padding();
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float slope = p.silu ? silu_slope(y.value[v], sigmoid(y.value[v])) : 1.0f;
        g[W - 1].value[v] = counts ? gradients[i].value[v] * slope : 0.0f;
      }
      if (counts && t < walk.end) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          dbias.value[v] += g[W - 1].value[v];
#pragma unroll
          for (int k = 0; k < W; ++k) {
            if (window.sees(k)) dweight[k].value[v] += g[W - 1].value[v] * window.x[k].value[v];
          }
        }
      }
      Lanes<V> dx = addends[i];
#pragma unroll
      for (int k = 0; k < W; ++k) {  // y[t - k] saw x[s] through weight[k]; past the end, g is 0
        if (p.seq_idx != nullptr && window.sequence[0] != window.sequence[W - 1 - k]) continue;
#pragma unroll
        for (int v = 0; v < V; ++v) dx.value[v] += window.weight[k].value[v] * g[W - 1 - k].value[v];
      }
      if (s >= walk.first) {
        store<T, V>(p.dx, walk.batch, walk.channel, s, dx);
      } else if (s < 0 && p.dinitial.data != nullptr) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          store_element(p.dinitial.data, at(p.dinitial, walk.batch, walk.channel + v, s + W - 1), T, dx.value[v]);
        }
      }
    }
  }
  float* partial = p.partial + (walk.batch * conv.chunks + walk.chunk) * p.dim * (W + 1);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const i64 d = walk.channel + v;
#pragma unroll
    for (int k = 0; k < W; ++k) partial[d * W + k] = dweight[k].value[v];
    partial[p.dim * W + d] = dbias.value[v];
  }
}

// One thread for each channel of each batch entry. Token t, counted from the first new one, lives in slot
// (next + t) mod state_len of a circular buffer; else in slot state_len + t before the new tokens are shifted in.
__global__ void __launch_bounds__(kThreads) conv_update_kernel(MAMBA_SSM_CONSTANT_PARAMETER GpuConvUpdate update) {
  const ConvUpdate& p = update.p;
  const i64 index = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x, b = index / p.dim, d = index % p.dim;
  if (b >= p.batch) return;
  const i64 row = p.state_indices == nullptr ? b : p.state_indices[b];
  if (row < 0) {
    for (i64 t = 0; t < p.seqlen; ++t) store_element(p.out.data, at(p.out, b, d, t), p.dtype, 0.0f);
    return;
  }
  const bool circular = p.cache_seqlens != nullptr;
  check_on_device(row < update.rows && (!circular || p.cache_seqlens[b] >= 0));
  const i64 next = circular ? p.cache_seqlens[b] % p.state_len : p.state_len;
  float window[kMaxWidth] = {}, weight[kMaxWidth] = {};  // aligned to their ends, so that the width may vary
  const int unused = kMaxWidth - p.width;
#pragma unroll
  for (int k = 0; k < kMaxWidth; ++k) {
    if (k < unused) continue;
    weight[k] = load_element(update.weight.data, d * update.weight.row + (k - unused) * update.weight.column,
                             update.weight.dtype);
    const i64 slot = next - (kMaxWidth - 1) + k;
    if (k == kMaxWidth - 1) continue;
    window[k] = load_element(p.state.data, at(p.state, row, d, slot < 0 ? slot + p.state_len : slot), p.state_dtype);
  }
  if (!circular) {
    for (i64 slot = 0; slot + p.seqlen < p.state_len; ++slot) {
      const float moved = load_element(p.state.data, at(p.state, row, d, slot + p.seqlen), p.state_dtype);
      store_element(p.state.data, at(p.state, row, d, slot), p.state_dtype, moved);
    }
  }
  const float bias =
      update.bias.data == nullptr ? 0.0f : load_element(update.bias.data, d * update.bias.row, update.bias.dtype);
  for (i64 t = 0; t < p.seqlen; ++t) {
    window[kMaxWidth - 1] = load_element(p.x.data, at(p.x, b, d, t), p.dtype);
    const i64 slot = circular ? (next + t) % p.state_len : p.state_len - p.seqlen + t;
    if (slot >= 0) store_element(p.state.data, at(p.state, row, d, slot), p.state_dtype, window[kMaxWidth - 1]);
    float y = bias;
#pragma unroll
    for (int k = 0; k < kMaxWidth; ++k) {
      if (k >= unused) y += weight[k] * window[k];
    }
    if (p.silu) y *= sigmoid(y);
    store_element(p.out.data, at(p.out, b, d, t), p.dtype, y);
#pragma unroll
    for (int k = 0; k < kMaxWidth - 1; ++k) window[k] = window[k + 1];
  }
}

using Kernel = void (*)(GpuConv);
template <int W, int V>
Kernel choose_by_dtype(Dtype dtype, bool backward) {
  switch (dtype) {
    case Dtype::f16:
      return backward ? conv_backward_kernel<W, Dtype::f16, V> : conv_forward_kernel<W, Dtype::f16, V>;
    case Dtype::bf16:
      return backward ? conv_backward_kernel<W, Dtype::bf16, V> : conv_forward_kernel<W, Dtype::bf16, V>;
    default:
      return backward ? conv_backward_kernel<W, Dtype::f32, V> : conv_forward_kernel<W, Dtype::f32, V>;
  }
}
template <int W>
Kernel choose(const GpuConv& conv, bool backward) {
  return conv.pairs ? choose_by_dtype<W, 2>(conv.p.dtype, backward) : choose_by_dtype<W, 1>(conv.p.dtype, backward);
}

const char* launch_conv(const GpuConv& conv, bool backward, void* stream) {
  const ConvProblem& p = conv.p;
  const Kernel kernel = p.width == 2   ? choose<2>(conv, backward)
                        : p.width == 3 ? choose<3>(conv, backward)
                                       : choose<4>(conv, backward);
  const i64 threads = p.batch * conv.chunks * p.dim / (conv.pairs ? 2 : 1);
  return launch<GpuConv>(kernel, static_cast<unsigned>((threads + kThreads - 1) / kThreads), 1, kThreads, 0, stream,
                         conv);
}

}  // namespace

const char* launch_conv_forward(const GpuConv& conv, void* stream) { return launch_conv(conv, false, stream); }
const char* launch_conv_backward(const GpuConv& conv, void* stream) { return launch_conv(conv, true, stream); }
const char* launch_conv_update(const GpuConvUpdate& update, void* stream) {
  const i64 threads = update.p.batch * update.p.dim;
  return launch<GpuConvUpdate>(conv_update_kernel, static_cast<unsigned>((threads + kThreads - 1) / kThreads), 1,
                               kThreads, 0, stream, update);
}

}  // namespace mamba_ssm
