// The CUDA kernels of the causal convolution for any memory, sequences included, and of its update.
#include "conv_gpu.h"
#include "cuda_device.h"

namespace mamba_ssm {
namespace {

using i64 = std::int64_t;

constexpr int kThreads = 128;
constexpr int kMaxWidth = 4;

MAMBA_SSM_DEVICE i64 at(const ConvArray& a, i64 b, i64 d, i64 t) { return b * a.batch + d * a.dim + t * a.time; }

template <Dtype T>
MAMBA_SSM_DEVICE float load(const ConvArray& a, i64 b, i64 d, i64 t) {
  return load_element(a.data, at(a, b, d, t), T);
}
template <Dtype T>
MAMBA_SSM_DEVICE void store(const ConvArray& a, i64 b, i64 d, i64 t, float value) {
  store_element(a.data, at(a, b, d, t), T, value);
}

// What a thread walks through: steps [first, end) of a channel.
struct Walk {
  i64 batch, channel, chunk, first, end;
};
MAMBA_SSM_DEVICE bool this_walk(const GpuConv& conv, Walk& walk) {
  const ConvProblem& p = conv.p;
  const i64 index = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x;
  const i64 channel = conv.time_fastest ? index / conv.chunks % p.dim : index % p.dim;
  const i64 chunk = conv.time_fastest ? index % conv.chunks : index / p.dim % conv.chunks;
  const i64 first = chunk * conv.chunk, rest = p.seqlen - first;
  walk = {index / p.dim / conv.chunks, channel, chunk, first, first + (rest < conv.chunk ? rest : conv.chunk)};
  return walk.batch < p.batch;
}

// The parameters of the thread's channel, and the last W inputs it has seen with their sequences.
template <int W, Dtype T>
class Window {
 public:
  MAMBA_SSM_DEVICE Window(const GpuConv& conv, const Walk& walk) : p_(conv.p), walk_(walk) {
    const i64 d = walk.channel;
    bias_ = conv.bias.data == nullptr ? 0.0f : load_element(conv.bias.data, d * conv.bias.row, conv.bias.dtype);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      weight[k] = load_element(conv.weight.data, d * conv.weight.row + k * conv.weight.column, conv.weight.dtype);
    }
#pragma unroll
    for (int k = 0; k < W - 1; ++k) {
      const i64 t = walk.first - (W - 1) + k;
      x[k + 1] = input_before(t);
      sequence[k + 1] = sequence_of(t);
    }
  }

  // Moves on to the input of time t.
  MAMBA_SSM_DEVICE void push(i64 t, float input) {
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

  MAMBA_SSM_DEVICE float convolve() const {
    float y = bias_;
#pragma unroll
    for (int k = 0; k < W; ++k) {
      if (sees(k)) y += weight[k] * x[k];
    }
    return y;
  }

  float weight[W], x[W];
  int sequence[W];

 private:
  // x[t]; for t < 0 an initial state.
  MAMBA_SSM_DEVICE float input_before(i64 t) const {
    if (t >= 0) return load<T>(p_.x, walk_.batch, walk_.channel, t);
    return p_.initial.data == nullptr ? 0.0f : load<T>(p_.initial, walk_.batch, walk_.channel, t + W - 1);
  }
  // Before the first position there is none.
  MAMBA_SSM_DEVICE int sequence_of(i64 t) const {
    if (p_.seq_idx == nullptr || t < 0 || t >= p_.seqlen) return -1;
    return p_.seq_idx[walk_.batch * p_.seq_batch + t * p_.seq_time];
  }

  const ConvProblem& p_;
  const Walk& walk_;
  float bias_;
};

// Loads that are under way at one time.
constexpr int kAhead = 8;

template <int W, Dtype T>
__global__ void __launch_bounds__(kThreads) conv_forward_kernel(MAMBA_SSM_CONSTANT_PARAMETER GpuConv conv) {
  const ConvProblem& p = conv.p;
  Walk walk;
  if (!this_walk(conv, walk)) return;
  Window<W, T> window(conv, walk);
  for (i64 first = walk.first; first < walk.end; first += kAhead) {
    float inputs[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i < walk.end) inputs[i] = load<T>(p.x, walk.batch, walk.channel, first + i);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const i64 t = first + i;
      if (t >= walk.end) break;
      window.push(t, inputs[i]);
      float y = window.convolve();
      if (p.silu) y *= sigmoid(y);
      if (window.padding()) y = 0.0f;
      store<T>(p.out, walk.batch, walk.channel, t, y);
    }
  }
}

// With g[t] = dout[t] act'(y[t]):
//
//     dx[s] = sum_k weight[k] g[s + W - 1 - k]      dweight[k] = sum_t g[t] x[t - W + 1 + k]
//
// At time t, g[t] is computed from the window and dx[t - W + 1] becomes complete. A chunk looks W - 1 steps ahead.
template <int W, Dtype T>
__global__ void __launch_bounds__(kThreads) conv_backward_kernel(MAMBA_SSM_CONSTANT_PARAMETER GpuConv conv) {
  const ConvProblem& p = conv.p;
  Walk walk;
  if (!this_walk(conv, walk)) return;
  Window<W, T> window(conv, walk);
  float g[W] = {}, dweight[W] = {}, dbias = 0.0f;
  constexpr int kLoads = kAhead / 2;
  const i64 end = walk.end + W - 1;
  for (i64 first = walk.first; first < end; first += kLoads) {
    float inputs[kLoads] = {}, gradients[kLoads] = {}, addends[kLoads] = {};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const i64 t = first + i, s = t - (W - 1);
      if (t < p.seqlen && t < end) {
        inputs[i] = load<T>(p.x, walk.batch, walk.channel, t);
        gradients[i] = load<T>(p.dout, walk.batch, walk.channel, t);
      }
      if (p.dx_addend.data != nullptr && s >= walk.first && s < walk.end) {
        addends[i] = load<T>(p.dx_addend, walk.batch, walk.channel, s);
      }
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const i64 t = first + i, s = t - (W - 1);
      if (t >= end) break;
      window.push(t, inputs[i]);
#pragma unroll
      for (int k = 0; k < W - 1; ++k) g[k] = g[k + 1];
      const float y = window.convolve();
      const bool counts = t < p.seqlen && !window.padding();
      const float slope = p.silu ? silu_slope(y, sigmoid(y)) : 1.0f;
      g[W - 1] = counts ? gradients[i] * slope : 0.0f;
      if (counts && t < walk.end) {
        dbias += g[W - 1];
#pragma unroll
        for (int k = 0; k < W; ++k) {
          if (window.sees(k)) dweight[k] += g[W - 1] * window.x[k];
        }
      }
      float dx = addends[i];
#pragma unroll
      for (int k = 0; k < W; ++k) {  // y[t - k] saw x[s] through weight[k]; past the end, g is 0
        if (p.seq_idx != nullptr && window.sequence[0] != window.sequence[W - 1 - k]) continue;
        dx += window.weight[k] * g[W - 1 - k];
      }
      if (s >= walk.first) {
        store<T>(p.dx, walk.batch, walk.channel, s, dx);
      } else if (s < 0 && p.dinitial.data != nullptr) {
        store<T>(p.dinitial, walk.batch, walk.channel, s + W - 1, dx);
      }
    }
  }
  float* partial = p.partial + (walk.batch * conv.chunks + walk.chunk) * p.dim * (W + 1);
#pragma unroll
  for (int k = 0; k < W; ++k) partial[walk.channel * W + k] = dweight[k];
  partial[p.dim * W + walk.channel] = dbias;
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
template <int W>
Kernel choose(Dtype dtype, bool backward) {
  return with_static_dtype(dtype, [&](auto dtype) -> Kernel {
    return backward ? conv_backward_kernel<W, dtype.value> : conv_forward_kernel<W, dtype.value>;
  });
}

}  // namespace

const char* launch_conv(const GpuConv& conv, bool backward, void* stream) {
  const ConvProblem& p = conv.p;
  const Kernel kernel = p.width == 2   ? choose<2>(p.dtype, backward)
                        : p.width == 3 ? choose<3>(p.dtype, backward)
                                       : choose<4>(p.dtype, backward);
  const i64 threads = p.batch * conv.chunks * p.dim;
  return launch<GpuConv>(kernel, static_cast<unsigned>((threads + kThreads - 1) / kThreads), 1, kThreads, 0, stream,
                         conv);
}
const char* launch_conv_update(const GpuConvUpdate& update, void* stream) {
  const i64 threads = update.p.batch * update.p.dim;
  return launch<GpuConvUpdate>(conv_update_kernel, static_cast<unsigned>((threads + kThreads - 1) / kThreads), 1,
                               kThreads, 0, stream, update);
}

}  // namespace mamba_ssm
