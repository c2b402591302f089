// The convolution kernels, compiled once per instruction set by conv_cpu_<isa>.cpp.
//
// *_lanes: channels are adjacent in memory, one channel per lane. A tile of kTile time steps is swept over a block of
//          channels, so that memory is read in rows while the window of inputs stays in registers.
// *_rows:  anything else. One channel at a time is staged as fp32 in scan order, one time step per lane.
#pragma once

#include "conv.h"
#include "simd_math.h"

namespace mamba_ssm {
namespace MAMBA_SSM_ISA {

using i64 = std::int64_t;

constexpr int kTile = 8;
constexpr int kMaxWidth = 4;
constexpr int kBlock = 128;

MAMBA_SSM_INLINE i64 smaller(i64 a, i64 b) { return a < b ? a : b; }

struct Item {
  i64 batch, chunk, t0, t1, d0, d1;
};

MAMBA_SSM_INLINE Item conv_item(const ConvProblem& p, i64 index) {
  const i64 blocks = conv_blocks(p), chunks = conv_chunks(p), block = conv_block(p);
  Item it;
  it.batch = index / (blocks * chunks);
  it.chunk = index / blocks % chunks;
  it.t0 = it.chunk * kConvChunk;
  it.t1 = smaller(it.t0 + kConvChunk, p.seqlen);
  it.d0 = index % blocks * block;
  it.d1 = smaller(it.d0 + block, p.dim);
  return it;
}

MAMBA_SSM_INLINE i64 at(const ConvArray& a, i64 b, i64 d, i64 t) { return b * a.batch + d * a.dim + t * a.time; }

// A sequence index per position; before the first one there is none.
MAMBA_SSM_INLINE std::int32_t sequence_of(const ConvProblem& p, i64 b, i64 t) {
  return t < 0 ? -1 : p.seq_idx[b * p.seq_batch + t * p.seq_time];
}

// ---- lanes = channels ------------------------------------------------------------------------------------------

// The extent of a tile: known to the compiler where it is whole, which is nearly always; else at the edges of the
// problem, or with packed sequences, at run time.
template <Dtype T>
struct WholeTile {
  static constexpr Dtype dtype = T;
  static constexpr bool whole = true, packed = false;
  static constexpr int rows = kTile, lanes = kLanes;
};
struct EdgeTile {
  static constexpr bool whole = false;
  Dtype dtype;
  bool packed;
  int rows, lanes;
};

template <class Tile>
MAMBA_SSM_INLINE vfloat load_channels(const Tile& tile, const ConvArray& a, i64 b, i64 d, i64 t) {
  return load_elements(a.data, at(a, b, d, t), tile.dtype, tile.lanes);
}

// Fetches what the next tile of this column reads: its rows are too short and too far apart for the hardware to guess.
template <class Tile>
MAMBA_SSM_INLINE void prefetch_next(const Tile& tile, const ConvArray& a, i64 b, i64 d, i64 t) {
  if (tile.whole) {
    __builtin_prefetch(static_cast<const char*>(a.data) + at(a, b, d, t + kTile) * element_size(tile.dtype));
  }
}

// x[t], or for t < 0 an initial state, which may have any strides. Past the end, where the backward pass looks, zeros.
template <int W, class Tile>
MAMBA_SSM_INLINE vfloat load_input(const Tile& tile, const ConvProblem& p, i64 b, i64 d, i64 t) {
  if (!tile.whole && t >= p.seqlen) return vfloat{};
  if (t >= 0) return load_channels(tile, p.x, b, d, t);
  vfloat v{};
  if (p.initial.data != nullptr) {
    for (int i = 0; i < tile.lanes; ++i) {
      v[i] = load_element(p.initial.data, at(p.initial, b, d + i, t + W - 1), tile.dtype);
    }
  }
  return v;
}

template <int W, class Tile>
MAMBA_SSM_INLINE void load_filter(const Tile& tile, const ConvProblem& p, i64 d, vfloat (&weight)[W], vfloat& bias) {
  for (int k = 0; k < W; ++k) weight[k] = load_elements(p.weight, k * p.dim + d, Dtype::f32, tile.lanes);
  bias = load_elements(p.bias, d, Dtype::f32, tile.lanes);
}

template <class Tile>
MAMBA_SSM_INLINE bool same_sequence(const Tile& tile, const ConvProblem& p, i64 b, i64 s, i64 t) {
  return !tile.packed || sequence_of(p, b, s) == sequence_of(p, b, t);
}
template <class Tile>
MAMBA_SSM_INLINE bool is_padding(const Tile& tile, const ConvProblem& p, i64 b, i64 t) {
  return tile.packed && sequence_of(p, b, t) < 0;
}

// The pre-activation at time t from the window x[t - W + 1 .. t].
template <int W, class Tile>
MAMBA_SSM_INLINE vfloat convolve(const Tile& tile, const ConvProblem& p, i64 b, i64 t, const vfloat (&weight)[W],
                                 vfloat bias, const vfloat (&window)[W]) {
  vfloat y = bias;
  for (int k = 0; k < W; ++k) {
    if (same_sequence(tile, p, b, t - (W - 1) + k, t)) y += weight[k] * window[k];
  }
  return y;
}

template <int W, class Tile>
MAMBA_SSM_INLINE void forward_tile(const Tile& tile, const ConvProblem& p, i64 b, i64 t0, i64 d) {
  vfloat weight[W], bias, window[W] = {};
  load_filter<W>(tile, p, d, weight, bias);
  for (int k = 0; k < W - 1; ++k) window[k] = load_input<W>(tile, p, b, d, t0 - (W - 1) + k);
  for (int i = 0; i < tile.rows; ++i) {
    const i64 t = t0 + i;
    prefetch_next(tile, p.x, b, d, t);
    window[W - 1] = load_channels(tile, p.x, b, d, t);
    vfloat y = convolve<W>(tile, p, b, t, weight, bias, window);
    if (p.silu) y = silu(y);
    if (is_padding(tile, p, b, t)) y = vfloat{};
    store_elements(p.out.data, at(p.out, b, d, t), tile.dtype, tile.lanes, y);
    for (int k = 0; k < W - 1; ++k) window[k] = window[k + 1];
  }
}

template <int W>
void forward_edge(const EdgeTile& tile, const ConvProblem& p, i64 b, i64 t0, i64 d) {
  forward_tile<W>(tile, p, b, t0, d);
}

template <int W, Dtype T>
void forward_lanes(const ConvProblem& p, const Item& it) {
  const bool packed = p.seq_idx != nullptr;
  for (i64 t = it.t0; t < it.t1; t += kTile) {
    const int rows = static_cast<int>(smaller(kTile, it.t1 - t));
    for (i64 d = it.d0; d < it.d1; d += kLanes) {
      const int lanes = static_cast<int>(smaller(kLanes, it.d1 - d));
      if (!packed && rows == kTile && lanes == kLanes) {
        forward_tile<W>(WholeTile<T>{}, p, it.batch, t, d);
      } else {
        forward_edge<W>(EdgeTile{T, packed, rows, lanes}, p, it.batch, t, d);
      }
    }
  }
}

// Backward. With g[t] = dout[t] act'(y[t]):
//
//     dx[s] = sum_k weight[k] g[s + W - 1 - k]      dweight[k] = sum_t g[t] x[t - W + 1 + k]
//
// At time t, g[t] is computed from the window and dx[t - W + 1] becomes complete. A chunk looks W - 1 steps ahead.

struct BackwardScratch {
  float recent[(kMaxWidth - 1) * kBlock];  // g of the W - 1 latest steps
  float sums[(kMaxWidth + 1) * kBlock];    // dweight, dbias
};

MAMBA_SSM_INLINE vfloat activation_gradient(const ConvProblem& p, vfloat y, vfloat dout) {
  return p.silu ? dout * silu_slope(y, sigmoid(y)) : dout;
}

template <int W, class Tile>
MAMBA_SSM_INLINE void backward_tile(const Tile& tile, const ConvProblem& p, const Item& it, i64 t0, i64 d,
                                    BackwardScratch& scratch) {
  const i64 b = it.batch;
  const i64 column = d - it.d0;
  vfloat weight[W], bias, window[W] = {}, g[W], dweight[W] = {}, dbias{};
  load_filter<W>(tile, p, d, weight, bias);
  for (int k = 0; k < W - 1; ++k) {
    window[k] = load_input<W>(tile, p, b, d, t0 - (W - 1) + k);
    g[k] = load(scratch.recent + k * kBlock + column);
  }
  for (int i = 0; i < tile.rows; ++i) {
    const i64 t = t0 + i;
    const i64 s = t - (W - 1);
    prefetch_next(tile, p.x, b, d, t);
    prefetch_next(tile, p.dout, b, d, t);
    if (p.dx_addend.data != nullptr) prefetch_next(tile, p.dx_addend, b, d, t);
    g[W - 1] = vfloat{};
    if (tile.whole || (t < p.seqlen && !is_padding(tile, p, b, t))) {
      window[W - 1] = load_channels(tile, p.x, b, d, t);
      const vfloat y = convolve<W>(tile, p, b, t, weight, bias, window);
      g[W - 1] = activation_gradient(p, y, load_channels(tile, p.dout, b, d, t));
      if (tile.whole || t < it.t1) {
        for (int k = 0; k < W; ++k) {
          if (same_sequence(tile, p, b, s + k, t)) dweight[k] += g[W - 1] * window[k];
        }
        dbias += g[W - 1];
      }
    } else if (t < p.seqlen) {
      window[W - 1] = load_channels(tile, p.x, b, d, t);
    }
    vfloat dx{};
    for (int k = 0; k < W; ++k) {  // y[t - k] saw x[s] through weight[k]; past the end, g is 0
      if (t - k >= p.seqlen || same_sequence(tile, p, b, s, t - k)) dx += weight[k] * g[W - 1 - k];
    }
    if (s >= it.t0) {
      if (p.dx_addend.data != nullptr) dx += load_channels(tile, p.dx_addend, b, d, s);
      store_elements(p.dx.data, at(p.dx, b, d, s), tile.dtype, tile.lanes, dx);
    } else if (s < 0 && p.dinitial.data != nullptr) {
      for (int j = 0; j < tile.lanes; ++j) {
        store_element(p.dinitial.data, at(p.dinitial, b, d + j, s + W - 1), tile.dtype, dx[j]);
      }
    }
    for (int k = 0; k < W - 1; ++k) {
      window[k] = window[k + 1];
      g[k] = g[k + 1];
    }
  }
  for (int k = 0; k < W - 1; ++k) store(scratch.recent + k * kBlock + column, g[k]);
  for (int k = 0; k <= W; ++k) {
    float* sum = scratch.sums + k * kBlock + column;
    store(sum, load(sum) + (k < W ? dweight[k] : dbias));
  }
}

template <int W>
void backward_edge(const EdgeTile& tile, const ConvProblem& p, const Item& it, i64 t0, i64 d,
                   BackwardScratch& scratch) {
  backward_tile<W>(tile, p, it, t0, d, scratch);
}

template <int W, Dtype T>
void backward_lanes(const ConvProblem& p, const Item& it) {
  const bool packed = p.seq_idx != nullptr;
  BackwardScratch scratch;
  std::memset(&scratch, 0, sizeof(scratch));
  const i64 end = it.t1 + W - 1;
  for (i64 t = it.t0; t < end; t += kTile) {
    const int rows = static_cast<int>(smaller(kTile, end - t));
    for (i64 d = it.d0; d < it.d1; d += kLanes) {
      const int lanes = static_cast<int>(smaller(kLanes, it.d1 - d));
      if (!packed && t + kTile <= it.t1 && lanes == kLanes) {
        backward_tile<W>(WholeTile<T>{}, p, it, t, d, scratch);
      } else {
        backward_edge<W>(EdgeTile{T, packed, rows, lanes}, p, it, t, d, scratch);
      }
    }
  }
  float* partial = p.partial + (it.batch * conv_chunks(p) + it.chunk) * (W + 1) * p.dim;
  for (int k = 0; k <= W; ++k) {
    std::memcpy(partial + k * p.dim + it.d0, scratch.sums + k * kBlock, 4 * (it.d1 - it.d0));
  }
}

// ---- lanes = time ----------------------------------------------------------------------------------------------

MAMBA_SSM_INLINE vfloat reversed(vfloat v) {
  vfloat r;
  for (int i = 0; i < kLanes; ++i) r[i] = v[kLanes - 1 - i];
  return r;
}

// values[0 .. n) as fp32 from an array with any stride.
inline void stage(float* values, const void* data, i64 offset, i64 stride, i64 n, Dtype dtype) {
  i64 i = 0;
  if (stride == 1) {
    for (; i + kLanes <= n; i += kLanes) store(values + i, load_elements(data, offset + i, dtype, kLanes));
  } else if (stride == -1) {
    for (; i + kLanes <= n; i += kLanes) {
      store(values + i, reversed(load_elements(data, offset - i - (kLanes - 1), dtype, kLanes)));
    }
  }
  for (; i < n; ++i) values[i] = load_element(data, offset + i * stride, dtype);
}

inline void unstage(const float* values, void* data, i64 offset, i64 stride, i64 n, Dtype dtype) {
  i64 i = 0;
  if (stride == 1) {
    for (; i + kLanes <= n; i += kLanes) store_elements(data, offset + i, dtype, kLanes, load(values + i));
  } else if (stride == -1) {
    for (; i + kLanes <= n; i += kLanes) {
      store_elements(data, offset - i - (kLanes - 1), dtype, kLanes, reversed(load(values + i)));
    }
  }
  for (; i < n; ++i) store_element(data, offset + i * stride, dtype, values[i]);
}

// A chunk of one channel, with the W - 1 positions before it and after it, padded to whole vectors.
struct Row {
  static constexpr int kSize = static_cast<int>(kConvChunk) + 2 * (kMaxWidth - 1) + kLanes;
  float x[kSize];                // x[j] is the input at t0 - (W - 1) + j
  float g[kSize];                // likewise
  float y[kSize];                // y[j] is at t0 + j
  std::int32_t sequence[kSize];  // like x; -1 outside
};

MAMBA_SSM_INLINE vint load_int(const std::int32_t* p) {
  vint v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <int W>
MAMBA_SSM_INLINE void stage_inputs(const ConvProblem& p, i64 b, i64 d, i64 t0, i64 end, Row& row) {
  const i64 first = t0 == 0 ? 0 : t0 - (W - 1);
  if (t0 == 0 && p.initial.data != nullptr) {
    stage(row.x, p.initial.data, at(p.initial, b, d, 0), p.initial.time, W - 1, p.dtype);
  }
  stage(row.x + (first - (t0 - (W - 1))), p.x.data, at(p.x, b, d, first), p.x.time, end - first, p.dtype);
}

template <int W>
MAMBA_SSM_INLINE void stage_sequence(const ConvProblem& p, i64 b, i64 t0, Row& row) {
  for (int j = 0; j < Row::kSize; ++j) {
    const i64 t = t0 - (W - 1) + j;
    row.sequence[j] = t < p.seqlen ? sequence_of(p, b, t) : -1;
  }
}

// `v` where the sequence at `from` is the one at `to` (offsets into the staged row), else 0.
template <bool Packed>
MAMBA_SSM_INLINE vfloat kept(const Row& row, i64 from, i64 to, vfloat v) {
  if (!Packed) return v;
  return load_int(row.sequence + from) == load_int(row.sequence + to) ? v : vfloat{};
}

template <int W, bool Packed>
MAMBA_SSM_INLINE vfloat convolve_row(const Row& row, i64 j, const float (&weight)[W], float bias) {
  vfloat y = splat(bias);
  for (int k = 0; k < W; ++k) y += weight[k] * kept<Packed>(row, j + k, j + W - 1, load(row.x + j + k));
  return y;
}

template <int W, bool Packed>
void forward_rows(const ConvProblem& p, const Item& it) {
  const i64 b = it.batch, n = it.t1 - it.t0;
  Row row;
  std::memset(&row, 0, sizeof(row));
  if (Packed) stage_sequence<W>(p, b, it.t0, row);
  for (i64 d = it.d0; d < it.d1; ++d) {
    float weight[W];
    for (int k = 0; k < W; ++k) weight[k] = p.weight[k * p.dim + d];
    stage_inputs<W>(p, b, d, it.t0, it.t1, row);
    for (i64 j = 0; j < n; j += kLanes) {
      vfloat y = convolve_row<W, Packed>(row, j, weight, p.bias[d]);
      if (p.silu) y = silu(y);
      if (Packed) y = load_int(row.sequence + j + W - 1) >= 0 ? y : vfloat{};
      store(row.y + j, y);
    }
    unstage(row.y, p.out.data, at(p.out, b, d, it.t0), p.out.time, n, p.dtype);
  }
}

template <int W, bool Packed>
void backward_rows(const ConvProblem& p, const Item& it) {
  const i64 b = it.batch, n = it.t1 - it.t0;
  const i64 end = smaller(it.t1 + W - 1, p.seqlen), known = end - it.t0;
  vint lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  Row row;
  std::memset(&row, 0, sizeof(row));
  if (Packed) stage_sequence<W>(p, b, it.t0, row);
  float* partial = p.partial + (b * conv_chunks(p) + it.chunk) * (W + 1) * p.dim;
  for (i64 d = it.d0; d < it.d1; ++d) {
    float weight[W];
    for (int k = 0; k < W; ++k) weight[k] = p.weight[k * p.dim + d];
    stage_inputs<W>(p, b, d, it.t0, end, row);
    stage(row.y, p.dout.data, at(p.dout, b, d, it.t0), p.dout.time, known, p.dtype);
    vfloat sums[W + 1] = {};
    for (i64 j = 0; j < known; j += kLanes) {
      vfloat g = activation_gradient(p, convolve_row<W, Packed>(row, j, weight, p.bias[d]), load(row.y + j));
      if (Packed) g = load_int(row.sequence + j + W - 1) >= 0 ? g : vfloat{};
      g = lane + static_cast<int>(j) < static_cast<int>(known) ? g : vfloat{};
      store(row.g + j + W - 1, g);
      const vint own = lane + static_cast<int>(j) < static_cast<int>(n);
      for (int k = 0; k < W; ++k) {
        const vfloat product = kept<Packed>(row, j + k, j + W - 1, g * load(row.x + j + k));
        sums[k] += own ? product : vfloat{};
      }
      sums[W] += own ? g : vfloat{};
    }
    // dx at position t0 - (W - 1) + j; the first W - 1 positions are the initial states' where t0 is 0.
    float* dx = row.y;
    for (i64 j = 0; j < n + W - 1; j += kLanes) {
      vfloat v{};
      for (int k = 0; k < W; ++k) v += weight[k] * kept<Packed>(row, j + W - 1 - k, j, load(row.g + j + W - 1 - k));
      store(dx + j, v);
    }
    if (p.dx_addend.data != nullptr) {
      float* addend = row.g + W - 1;  // g is no longer needed, and the next channel's is written over it
      stage(addend, p.dx_addend.data, at(p.dx_addend, b, d, it.t0), p.dx_addend.time, n, p.dtype);
      for (i64 j = 0; j < n; ++j) dx[W - 1 + j] += addend[j];
    }
    unstage(dx + W - 1, p.dx.data, at(p.dx, b, d, it.t0), p.dx.time, n, p.dtype);
    if (it.t0 == 0 && p.dinitial.data != nullptr) {
      unstage(dx, p.dinitial.data, at(p.dinitial, b, d, 0), p.dinitial.time, W - 1, p.dtype);
    }
    for (int k = 0; k <= W; ++k) {
      float total = 0.0f;
      for (int i = 0; i < kLanes; ++i) total += sums[k][i];
      partial[k * p.dim + d] = total;
    }
  }
}

// ---- choice of the instance ------------------------------------------------------------------------------------

using ItemKernel = void (*)(const ConvProblem&, const Item&);

template <int W>
MAMBA_SSM_INLINE ItemKernel choose_kernel(const ConvProblem& p, bool backward) {
  if (!p.lanes_over_channels) {
    if (p.seq_idx != nullptr) return backward ? &backward_rows<W, true> : &forward_rows<W, true>;
    return backward ? &backward_rows<W, false> : &forward_rows<W, false>;
  }
  switch (p.dtype) {
    case Dtype::f16:
      return backward ? &backward_lanes<W, Dtype::f16> : &forward_lanes<W, Dtype::f16>;
    case Dtype::bf16:
      return backward ? &backward_lanes<W, Dtype::bf16> : &forward_lanes<W, Dtype::bf16>;
    default:
      return backward ? &backward_lanes<W, Dtype::f32> : &forward_lanes<W, Dtype::f32>;
  }
}

MAMBA_SSM_INLINE void run_items(const ConvProblem& p, bool backward, i64 begin, i64 end) {
  const ItemKernel kernel = p.width == 2   ? choose_kernel<2>(p, backward)
                            : p.width == 3 ? choose_kernel<3>(p, backward)
                                           : choose_kernel<4>(p, backward);
  for (i64 i = begin; i < end; ++i) kernel(p, conv_item(p, i));
}

inline void forward(const ConvProblem& p, i64 begin, i64 end) { run_items(p, false, begin, end); }
inline void backward(const ConvProblem& p, i64 begin, i64 end) { run_items(p, true, begin, end); }

// ---- update: a few tokens --------------------------------------------------------------------------------------

inline void update(const ConvUpdate& p, i64 begin, i64 end) {
  const int history = p.width - 1;
  for (i64 b = begin; b < end; ++b) {
    const i64 row = p.state_indices == nullptr ? b : p.state_indices[b];
    // Token t, counted from the first new one, lives in slot (next + t) mod state_len of a circular buffer; else in
    // slot state_len + t before the new tokens are shifted in.
    const bool circular = p.cache_seqlens != nullptr;
    const i64 next = circular ? p.cache_seqlens[b] % p.state_len : p.state_len;
    for (i64 d = 0; d < p.dim; ++d) {
      if (row < 0) {
        for (i64 t = 0; t < p.seqlen; ++t) store_element(p.out.data, at(p.out, b, d, t), p.dtype, 0.0f);
        continue;
      }
      float window[kMaxWidth];
      for (int k = 0; k < history; ++k) {
        const i64 slot = next - history + k;
        window[k] =
            load_element(p.state.data, at(p.state, row, d, slot < 0 ? slot + p.state_len : slot), p.state_dtype);
      }
      if (!circular) {
        for (i64 slot = 0; slot + p.seqlen < p.state_len; ++slot) {
          const float moved = load_element(p.state.data, at(p.state, row, d, slot + p.seqlen), p.state_dtype);
          store_element(p.state.data, at(p.state, row, d, slot), p.state_dtype, moved);
        }
      }
      for (i64 t = 0; t < p.seqlen; ++t) {
        window[history] = load_element(p.x.data, at(p.x, b, d, t), p.dtype);
        const i64 slot = circular ? (next + t) % p.state_len : p.state_len - p.seqlen + t;
        if (slot >= 0) store_element(p.state.data, at(p.state, row, d, slot), p.state_dtype, window[history]);
        float y = p.bias[d];
        for (int k = 0; k <= history; ++k) y += p.weight[k * p.dim + d] * window[k];
        if (p.silu) y = silu(splat(y))[0];
        store_element(p.out.data, at(p.out, b, d, t), p.dtype, y);
        for (int k = 0; k < history; ++k) window[k] = window[k + 1];
      }
    }
  }
}

}  // namespace MAMBA_SSM_ISA
}  // namespace mamba_ssm
