// What the forward and the backward kernel of the scan share: a float for the device, tiles and chunks, and how they
// come into shared memory. See launch_config.h for the division of the work.
#pragma once

#include <type_traits>

#include "cuda_device.h"
#include "discretization.h"
#include "launch_config.h"
#include "scan_gpu.h"

namespace mamba_ssm {

// The packed kernels take a method's fast form where all A of a block allow it; the general ones never do.
template <class Method, bool Packed>
using FormFor = std::conditional_t<Packed, Method, ForAnyA<Method>>;

// ---- arithmetic --------------------------------------------------------------------------------------------------

// A float whose functions are the device's approximate ones: what discretization.h runs on in the kernels.
struct Real {
  float value;
  Real() = default;
  MAMBA_SSM_HD Real(float v) : value(v) {}
  friend MAMBA_SSM_HD Real operator+(Real a, Real b) { return a.value + b.value; }
  friend MAMBA_SSM_HD Real operator-(Real a, Real b) { return a.value - b.value; }
  friend MAMBA_SSM_HD Real operator*(Real a, Real b) { return a.value * b.value; }
  friend MAMBA_SSM_DEVICE Real operator/(Real a, Real b) { return a.value * fast_reciprocal(b.value); }
  friend MAMBA_SSM_HD Real& operator+=(Real& a, Real b) { return a = a + b; }
  friend MAMBA_SSM_HD Real& operator-=(Real& a, Real b) { return a = a - b; }
  friend MAMBA_SSM_HD bool operator<(Real a, Real b) { return a.value < b.value; }
  friend MAMBA_SSM_HD bool operator>(Real a, Real b) { return a.value > b.value; }
  friend MAMBA_SSM_HD bool operator>=(Real a, Real b) { return a.value >= b.value; }
};

MAMBA_SSM_DEVICE Real exponential2(Real z) { return fast_exp2(z.value); }

// Near 0 by a polynomial for (2^z − 1)/z, good to 1.3e-8.
MAMBA_SSM_DEVICE Exponential<Real> exponential2_and_minus_one(Real z) {
  const float power = fast_exp2(z.value), x = z.value;
  float q = 1.54531629e-4f;
  q = q * x + 1.33908634e-3f;
  q = q * x + 9.61808256e-3f;
  q = q * x + 5.55035711e-2f;
  q = q * x + 0.240226508f;
  q = q * x + 0.693147188f;
  return {power, fabsf(x) < 0.5f ? q * x : power - 1.0f};
}

// Near 0 by a polynomial for (2^z − 1 − z ln 2)/z², good to 8e-9.
MAMBA_SSM_DEVICE ExponentialSecond<Real> exponential2_and_second(Real z) {
  const float power = fast_exp2(z.value), x = z.value;
  float q = 1.33395111e-6f;
  q = q * x + 1.54318261e-5f;
  q = q * x + 1.54029094e-4f;
  q = q * x + 1.33326612e-3f;
  q = q * x + 9.61812988e-3f;
  q = q * x + 5.55041199e-2f;
  q = q * x + 0.240226507f;
  return {power, fabsf(x) < 1.0f ? q * (x * x) : (power - 1.0f) - x * kLn2};
}

// softplus(x) = max(x, 0) + log(1 + e^−|x|), with log(1 + e) = 2 atanh(s), s = e/(2 + e). NaN stays NaN.
MAMBA_SSM_DEVICE float softplus(float x) {
  const float e = fast_exp2(-fabsf(x) * kLog2e);
  const float s = e * fast_reciprocal(2.0f + e), s2 = s * s;
  float q = 0.28157778f;
  q = q * s2 + 0.27965158f;
  q = q * s2 + 0.40024595f;
  q = q * s2 + 0.66666322f;
  q = q * s2 + 2.0f;
  return fmaxf(x, 0.0f) + s * q;
}
// softplus'(x) where softplus(x) = y.
MAMBA_SSM_DEVICE float softplus_slope(float y) {
  return -exponential2_and_minus_one(Real(-y * kLog2e)).minus_one.value;
}

// Δ from the tensor delta.
MAMBA_SSM_DEVICE float step_size(const ScanParams& p, float delta, float bias) {
  return p.delta_softplus ? softplus(delta + bias) : delta + bias;
}

// The sum of the values of the two threads of a channel: of `a` in the first, of `b` in the second.
MAMBA_SSM_DEVICE float pair_sum(float a, float b, int half) { return (half ? b : a) + shuffle_xor(half ? a : b, 16); }

// ---- where a thread and its block are ----------------------------------------------------------------------------

struct Thread {
  int half, channel;  // of the tile
  int first_state;    // of the tile's states
};
MAMBA_SSM_DEVICE Thread this_thread() {
  const int lane = threadIdx.x % kWarp, half = lane / tile::kWarpChannels;
  return {half, static_cast<int>(threadIdx.x) / kWarp * tile::kWarpChannels + lane % tile::kWarpChannels,
          half * tile::kThreadStates};
}

struct Tile {
  int batch, group, split;
  int channel, channels;  // the first, and how many
  int segment;
  int first_chunk, end_chunk;  // of the segment
};
MAMBA_SSM_DEVICE int chunk_count(const ScanParams& p) {
  return (static_cast<int>(p.length) + tile::kSteps - 1) / tile::kSteps;
}
// Computed once, by the first thread, and kept in shared memory, to save registers.
MAMBA_SSM_DEVICE Tile this_tile(const GpuScan& scan, int segment) {
  const ScanParams& p = scan.p;
  const int tiles = scan.tiles, groups = static_cast<int>(p.groups), block = static_cast<int>(blockIdx.x);
  const int per_group = static_cast<int>(p.channels) / groups, split = block % tiles, group = block / tiles % groups;
  const int rest = per_group - split * tile::kChannels;
  const int chunks = chunk_count(p), end = (segment + 1) * scan.segment_chunks;
  return {block / tiles / groups,
          group,
          split,
          group * per_group + split * tile::kChannels,
          rest < tile::kChannels ? rest : tile::kChannels,
          segment,
          segment * scan.segment_chunks,
          end < chunks ? end : chunks};
}

// Steps [first, first + steps) in the scan's order; `time` maps them to positions.
struct Chunk {
  int first, steps, length;
  bool reverse;
  MAMBA_SSM_HD std::int64_t time(int step) const { return reverse ? length - 1 - first - step : first + step; }
};
MAMBA_SSM_DEVICE Chunk chunk_at(const ScanParams& p, int index) {
  const int length = static_cast<int>(p.length), first = index * tile::kSteps, rest = length - first;
  return {first, rest < tile::kSteps ? rest : tile::kSteps, length, p.reverse};
}
// The row of the block's segment in (batch, segments, …).
MAMBA_SSM_DEVICE std::int64_t segment_row(const GpuScan& scan, const Tile& t) {
  return static_cast<std::int64_t>(t.batch) * scan.segments + t.segment;
}

// Where the thread's states of a matrix (…, channels, states) begin.
MAMBA_SSM_DEVICE std::int64_t state_index(const GpuScan& scan, const Tile& t, const Thread& thread, std::int64_t row) {
  return (row * scan.p.channels + t.channel + thread.channel) * scan.p.states + scan.first_state + thread.first_state;
}
// How many of the thread's states there are.
MAMBA_SSM_DEVICE int thread_states(const GpuScan& scan, const Tile& t, const Thread& thread) {
  return thread.channel < t.channels ? scan.states - thread.first_state : 0;
}

// values = a row of the matrix, or `missing` where there are no such channels, states or matrix.
MAMBA_SSM_DEVICE void load_states(const GpuScan& scan, const Tile& t, const Thread& thread, const float* matrix,
                                  std::int64_t row, float missing, float (&values)[tile::kThreadStates]) {
  const int count = matrix == nullptr ? 0 : thread_states(scan, t, thread);
  const std::int64_t index = state_index(scan, t, thread, row);
#pragma unroll
  for (int j = 0; j < tile::kThreadStates; ++j) values[j] = j < count ? matrix[index + j] : missing;
}
MAMBA_SSM_DEVICE void store_states(const GpuScan& scan, const Tile& t, const Thread& thread, float* matrix,
                                   std::int64_t row, const float (&values)[tile::kThreadStates]) {
  const int count = thread_states(scan, t, thread);
  const std::int64_t index = state_index(scan, t, thread, row);
#pragma unroll
  for (int j = 0; j < tile::kThreadStates; ++j) {
    if (j < count) matrix[index + j] = values[j];
  }
}
MAMBA_SSM_DEVICE bool all_at_least(const float (&A)[tile::kThreadStates], float smallest) {
  bool all = true;
#pragma unroll
  for (int j = 0; j < tile::kThreadStates; ++j) all &= fabsf(A[j]) >= smallest;
  return all;
}
MAMBA_SSM_DEVICE float load_parameter(const float* parameter, const Tile& t, int channel) {
  return parameter != nullptr && channel < t.channels ? parameter[t.channel + channel] : 0.0f;
}

// The address of a state's checkpoint before a chunk, for the first channel of the tile.
MAMBA_SSM_DEVICE float* checkpoint(const GpuScan& scan, const Tile& t, int chunk, int state) {
  const ScanParams& p = scan.p;
  return p.checkpoints +
         ((static_cast<std::int64_t>(t.batch) * chunk_count(p) + chunk) * p.states + scan.first_state + state) *
             p.channels +
         t.channel;
}

// ---- rows of activations in shared memory ------------------------------------------------------------------------
// The fast way ("packed", where `is_packed` of scan_cuda.cpp allows it): rows are copied asynchronously as they are,
// each tensor by one warp, 16 bytes at a time, and pairs of channels are read from there. The general way reads element
// by element from global memory, in any dtype and strides.

// A chunk's rows of a tile in their own dtype, packed densely.
struct RawRows {
  alignas(16) unsigned char bytes[tile::kSteps * tile::kChannels * 4];
};
struct RawMatrixRows {
  alignas(16) unsigned char bytes[tile::kSteps * tile::kStates * 4];
};

// Starts the copy of a chunk's rows by one warp: each row has 16 or 8 pieces of Bytes, the first `bytes` of them valid.
template <int Bytes>
MAMBA_SSM_DEVICE void start_copy(const char* base, std::int64_t stride, int row_shift, int bytes, const Chunk& chunk,
                                 unsigned char* rows) {
  const int lane = threadIdx.x % kWarp, piece = lane & ((1 << row_shift) - 1), rows_at_once = kWarp >> row_shift;
  const bool valid = piece * Bytes < bytes;
  int step = lane >> row_shift;
  const char* source = base + chunk.time(step) * stride + piece * Bytes;
  const std::int64_t advance = (chunk.reverse ? -stride : stride) * rows_at_once;
  unsigned char* target = rows + lane * Bytes;
#pragma unroll 1
  for (; step < tile::kSteps; step += rows_at_once) {
    const bool exists = valid && step < chunk.steps;
    copy_async<Bytes>(target, exists ? source : base, exists);
    source += advance;
    target += kWarp * Bytes;
  }
}
MAMBA_SSM_DEVICE void start_copy(const Activation& a, const Tile& t, const Chunk& chunk, RawRows& rows) {
  if (a.data == nullptr) return;
  static_assert(tile::kChannels * 2 == 8 * 16);
  const int size = bytes_of(a.dtype);
  const char* base = static_cast<const char*>(a.data) + (t.batch * a.batch + t.channel) * size;
  start_copy<16>(base, a.time * size, size == 4 ? 4 : 3, t.channels * size, chunk, rows.bytes);
}

MAMBA_SSM_DEVICE void start_copy(const InputMatrix& m, const GpuScan& scan, const Tile& t, const Chunk& chunk,
                                 RawMatrixRows& rows) {
  static_assert(tile::kStates * 2 == 8 * 4);
  const int size = bytes_of(m.dtype);
  const char* base =
      static_cast<const char*>(m.data) + (t.batch * m.batch + t.group * m.group + scan.first_state) * size;
  start_copy<4>(base, m.time * size, size == 4 ? 4 : 3, scan.states * size, chunk, rows.bytes);
}

// B or C of a chunk as floats: zeros where there are no such steps or states.
MAMBA_SSM_DEVICE void stage_matrix(const InputMatrix& m, bool copied, const GpuScan& scan, const Tile& t,
                                   const Chunk& chunk, const RawMatrixRows& raw,
                                   float (&rows)[tile::kSteps][tile::kStates]) {
  constexpr int kPairs = tile::kStates / 2;
  static_assert(tile::kSteps * kPairs == tile::kThreads);
  const int step = threadIdx.x / kPairs, state = threadIdx.x % kPairs * 2;
  float2 pair = {0.0f, 0.0f};
  if (copied) {
    const int i = step * tile::kStates + state;
    pair = {load_element(raw.bytes, i, m.dtype), load_element(raw.bytes, i + 1, m.dtype)};
  } else if (step < chunk.steps) {
    const std::int64_t row = t.batch * m.batch + t.group * m.group + chunk.time(step) * m.time;
    const std::int64_t first = row + (scan.first_state + state) * m.state;
    if (state < scan.states) pair.x = load_element(m.data, first, m.dtype);
    if (state + 1 < scan.states) pair.y = load_element(m.data, first + m.state, m.dtype);
  }
  *reinterpret_cast<float2*>(&rows[step][state]) = pair;
}

// The thread's states of a constant matrix (channels, states).
MAMBA_SSM_DEVICE void load_constant(const InputMatrix& m, const GpuScan& scan, const Tile& t, const Thread& thread,
                                    float (&values)[tile::kThreadStates]) {
  const int count = m.constant ? thread_states(scan, t, thread) : 0;
  const std::int64_t first = (t.channel + thread.channel) * m.group + (scan.first_state + thread.first_state) * m.state;
#pragma unroll
  for (int j = 0; j < tile::kThreadStates; ++j) {
    values[j] = j < count ? load_element(m.data, first + j * m.state, m.dtype) : 0.0f;
  }
}

// The thread's states of B or C at one step.
MAMBA_SSM_DEVICE void read_states(const float (&row)[tile::kStates], int first, float (&values)[tile::kThreadStates]) {
  const float4* source = reinterpret_cast<const float4*>(row + first);
#pragma unroll
  for (int i = 0; i < tile::kThreadStates / 4; ++i) {
    const float4 v = source[i];
    values[4 * i] = v.x;
    values[4 * i + 1] = v.y;
    values[4 * i + 2] = v.z;
    values[4 * i + 3] = v.w;
  }
}

// Where delta_weight is given: what Δ is made of, behind the kernel's own shared memory.
class DeltaProduct {
 public:
  static MAMBA_SSM_HD std::int64_t bytes(std::int64_t rank) { return rank * 4 * (tile::kChannels + 2 * tile::kSteps); }

  MAMBA_SSM_DEVICE DeltaProduct(const GpuScan& scan, void* memory)
      : rank_(static_cast<int>(scan.p.rank)),
        weight_(static_cast<float*>(memory)),
        rows_(weight_ + rank_ * tile::kChannels),
        raw_(reinterpret_cast<unsigned char*>(rows_ + rank_ * tile::kSteps)) {}

  // Once, before the first chunk. There is a barrier before `rows` and `of_pairs` or `of_element`.
  MAMBA_SSM_DEVICE void stage_weight(const ScanParams& p, const Tile& t) {
#pragma unroll 1
    for (int i = threadIdx.x; i < rank_ * tile::kChannels; i += tile::kThreads) {
      const int channel = i % tile::kChannels, r = i / tile::kChannels;
      weight_[i] =
          channel < t.channels ? p.delta_weight[static_cast<std::int64_t>(t.channel + channel) * rank_ + r] : 0.0f;
    }
  }
  MAMBA_SSM_DEVICE void start_rows(const GpuScan& scan, const Tile& t, const Chunk& chunk) {
    if (!scan.aligned_delta) return;
    const InputMatrix& m = scan.p.delta_input;
    const int size = bytes_of(m.dtype), words = rank_ * size / 4;  // in a row
    const char* base = static_cast<const char*>(m.data) + t.batch * m.batch * size;
#pragma unroll 1
    for (int i = threadIdx.x % kWarp; i < tile::kSteps * words; i += kWarp) {
      const int step = i / words, word = i % words;
      const bool valid = step < chunk.steps;
      copy_async<4>(raw_ + i * 4, valid ? base + chunk.time(step) * m.time * size + word * 4 : base, valid);
    }
  }
  template <bool Packed>
  MAMBA_SSM_DEVICE void stage_rows(const GpuScan& scan, const Tile& t, const Chunk& chunk) {
    const InputMatrix& m = scan.p.delta_input;
#pragma unroll 1
    for (int i = threadIdx.x; i < tile::kSteps * rank_; i += tile::kThreads) {
      const int step = i / rank_, r = i % rank_;
      if (Packed && scan.aligned_delta) {
        rows_[i] = load_element(raw_, i, m.dtype);
      } else {
        const std::int64_t index = t.batch * m.batch + chunk.time(step) * m.time + r * m.state;
        rows_[i] = step < chunk.steps ? load_element(m.data, index, m.dtype) : 0.0f;
      }
    }
  }
  // delta of the thread's pairs, see for_each_pair.
  MAMBA_SSM_DEVICE void of_pairs(float2 (&delta)[tile::kSteps / tile::kWarps]) const {
    const int channel = threadIdx.x % kWarp * 2, warp = threadIdx.x / kWarp;
#pragma unroll 1
    for (int r = 0; r < rank_; ++r) {
      const float2 weight = *reinterpret_cast<const float2*>(weight_ + r * tile::kChannels + channel);
#pragma unroll
      for (int i = 0; i < tile::kSteps / tile::kWarps; ++i) {
        const float x = rows_[(i * tile::kWarps + warp) * rank_ + r];
        delta[i] = {delta[i].x + weight.x * x, delta[i].y + weight.y * x};
      }
    }
  }
  MAMBA_SSM_DEVICE float of_element(int step, int channel) const {
    float sum = 0.0f;
    for (int r = 0; r < rank_; ++r) sum += weight_[r * tile::kChannels + channel] * rows_[step * rank_ + r];
    return sum;
  }

 private:
  int rank_;
  float* weight_;       // [rank][channel]
  float* rows_;         // [step][rank]
  unsigned char* raw_;  // the next chunk's rows in their own dtype
};

MAMBA_SSM_DEVICE float activation_at(const Activation& a, const Tile& t, int channel, std::int64_t time) {
  if (a.data == nullptr) return 0.0f;
  return load_element(a.data, t.batch * a.batch + (t.channel + channel) * a.channel + time * a.time, a.dtype);
}
MAMBA_SSM_DEVICE void set_activation(const Activation& a, const Tile& t, int channel, std::int64_t time, float value) {
  store_element(a.data, t.batch * a.batch + (t.channel + channel) * a.channel + time * a.time, a.dtype, value);
}
// The same for the pair of channels that begins at `channel`, where the tensor is packed: of dtype T or float32.
template <Dtype T>
MAMBA_SSM_DEVICE void set_pair(const Activation& a, const Tile& t, int channel, std::int64_t time, float2 values) {
  const std::int64_t index = t.batch * a.batch + t.channel + channel + time * a.time;
  if (a.dtype == Dtype::f32) {
    store_pair<Dtype::f32>(a.data, index, values);
  } else {
    store_pair<T>(a.data, index, values);
  }
}
template <Dtype T>
MAMBA_SSM_DEVICE float2 raw_pair(const Activation& a, const RawRows& rows, int step, int channel) {
  if (a.data == nullptr) return {0.0f, 0.0f};
  const int index = step * tile::kChannels + channel;
  return a.dtype == Dtype::f32 ? load_pair<Dtype::f32>(rows.bytes, index) : load_pair<T>(rows.bytes, index);
}

// Calls function(step, channel) for the elements of the tile's chunk that this thread handles in the general way:
// neighbouring threads take neighbours in memory, as `like` lies there.
template <class Function>
MAMBA_SSM_DEVICE void for_each_element(const Activation& like, const Function& function) {
  const bool by_time = like.time < like.channel;
  for (int i = threadIdx.x; i < tile::kSteps * tile::kChannels; i += tile::kThreads) {
    if (by_time) {
      function(i % tile::kSteps, i / tile::kSteps);
    } else {
      function(i / tile::kChannels, i % tile::kChannels);
    }
  }
}
// Calls function(step, channel, i) for this thread's pairs of channels, the i-th pair being that of step
// i kWarps + warp: always the same channels, so that what belongs to them stays in registers.
template <class Function>
MAMBA_SSM_DEVICE void for_each_pair(const Function& function) {
  const int channel = threadIdx.x % kWarp * 2;
  static_assert(kWarp * 2 == tile::kChannels);
#pragma unroll
  for (int i = 0; i < tile::kSteps / tile::kWarps; ++i) {
    function(i * tile::kWarps + static_cast<int>(threadIdx.x) / kWarp, channel, i);
  }
}

}  // namespace mamba_ssm
