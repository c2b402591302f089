// The backward kernel of the scan. It walks the chunks from the last to the first; in each a block
//
//     stages    u and Δ, the gradient of the scan's sum (dy), and what turns that sum into dz,
//     advances  the state from the chunk's checkpoint, keeping it at the start of every part of kPart steps,
//     and then, part by part from the last to the first:
//     recomputes the part's states and Ā into registers, and with them dz,
//     returns   through the part's steps with g_t = C_t dy_t + Ā_{t+1} g_{t+1}, the gradient of h_t.
//
// The sums over the states of a channel go to its two threads by a shuffle, those over the channels (dB, dC) to the
// tensor cores: a product with a matrix of ones and zeros. Nothing is added in an order that could change.
#pragma once

#include <type_traits>

#include "scan_gpu.cuh"

namespace mamba_ssm {

struct BackwardMemory {
  Tile tile;
  alignas(16) float2 step[tile::kSteps][tile::kChannels];  // Δ and u; once a step is done, d delta and du
  float2 gate[tile::kSteps][tile::kChannels];              // a and b of dz = a C·h + b; once a step is done, dz
  float dy[tile::kSteps][tile::kChannels];
  float D[tile::kThreads];                                // of each thread's channel
  float dD[tile::kThreads], ddelta_bias[tile::kThreads];  // of the steps whose sums the thread gets
  alignas(16) float B[tile::kSteps][tile::kStates];
  alignas(16) float C[tile::kSteps][tile::kStates];
  float4 state[tile::kSteps / tile::kPart][tile::kThreadStates / 4][tile::kThreads];  // at the start of each part
  float partial[2][tile::kWarps][tile::kPart][2 * tile::kStates];  // dB and dC of each warp, for every other part
  RawRows u, delta, z, dout, dz_addend;
  RawMatrixRows raw_B, raw_C;
};

template <bool Packed>
MAMBA_SSM_DEVICE void start_backward_inputs(const GpuScan& scan, const Activation& dout, const Tile& t, int index,
                                            int first, DeltaProduct& product, BackwardMemory& memory) {
  if constexpr (!Packed) return;
  if (index < first) return;
  const ScanParams& p = scan.p;
  const Chunk chunk = chunk_at(p, index);
  switch (threadIdx.x / kWarp) {
    case 0:
      start_copy(p.u, t, chunk, memory.u);
      if (scan.aligned_B) start_copy(p.B, scan, t, chunk, memory.raw_B);
      break;
    case 1:
      start_copy(p.delta, t, chunk, memory.delta);
      if (scan.aligned_C) start_copy(p.C, scan, t, chunk, memory.raw_C);
      break;
    case 2:
      start_copy(p.z, t, chunk, memory.z);
      if (p.delta_weight != nullptr) product.start_rows(scan, t, chunk);
      break;
    default:
      start_copy(dout, t, chunk, memory.dout);
  }
}

// dy, and a and b of dz = a C·h + b, of one element.
struct OutputGradient {
  float dy;
  float2 gate;
};
MAMBA_SSM_DEVICE OutputGradient output_gradient(const ScanParams& p, float dout, float z, float u, float D) {
  const float gradient = dout * p.scale;
  if (p.z.data == nullptr) return {gradient, {0.0f, 0.0f}};
  const float s = sigmoid(z), slope = silu_slope(z, s);
  return {gradient * (z * s), {gradient * slope, gradient * slope * (D * u)}};
}

template <bool Packed>
MAMBA_SSM_DEVICE void stage_backward(const GpuScan& scan, const Activation& dout, const Tile& t, const Chunk& chunk,
                                     DeltaProduct& product, BackwardMemory& memory) {
  const ScanParams& p = scan.p;
  if (p.delta_weight != nullptr) {
    product.stage_rows<Packed>(scan, t, chunk);
    __syncthreads();
  }
  if constexpr (Packed) {
    const int channel = threadIdx.x % kWarp * 2;
    const float bias0 = load_parameter(p.delta_bias, t, channel), bias1 = load_parameter(p.delta_bias, t, channel + 1);
    const float D0 = load_parameter(p.D, t, channel), D1 = load_parameter(p.D, t, channel + 1);
    float2 products[tile::kSteps / tile::kWarps] = {};
    if (p.delta_weight != nullptr) product.of_pairs(products);
    with_dtype(p.u.dtype, [&](auto dtype) {
      for_each_pair([&](int step, int c, int i) {
        const int index = step * tile::kChannels + c;
        const float2 u = load_pair<dtype.value>(memory.u.bytes, index);
        const float2 delta =
            p.delta_weight != nullptr ? products[i] : load_pair<dtype.value>(memory.delta.bytes, index);
        const float2 z = raw_pair<dtype.value>(p.z, memory.z, step, c);
        const float2 gradient = raw_pair<dtype.value>(dout, memory.dout, step, c);
        const bool valid = step < chunk.steps;
        const float delta0 = valid ? step_size(p, delta.x, bias0) : 0.0f;
        const float delta1 = valid ? step_size(p, delta.y, bias1) : 0.0f;
        const OutputGradient first = output_gradient(p, gradient.x, z.x, u.x, D0);
        const OutputGradient second = output_gradient(p, gradient.y, z.y, u.y, D1);
        *reinterpret_cast<float4*>(&memory.step[step][c]) = {delta0, u.x, delta1, u.y};
        *reinterpret_cast<float4*>(&memory.gate[step][c]) = {first.gate.x, first.gate.y, second.gate.x, second.gate.y};
        *reinterpret_cast<float2*>(&memory.dy[step][c]) = {first.dy, second.dy};
      });
    });
  } else {
    for_each_element(p.u, [&](int step, int c) {
      float2 pair = {0.0f, 0.0f};
      OutputGradient output = {0.0f, {0.0f, 0.0f}};
      if (step < chunk.steps && c < t.channels) {
        const std::int64_t time = chunk.time(step);
        const float u = activation_at(p.u, t, c, time);
        const float delta =
            p.delta_weight != nullptr ? product.of_element(step, c) : activation_at(p.delta, t, c, time);
        pair = {step_size(p, delta, load_parameter(p.delta_bias, t, c)), u};
        output = output_gradient(p, activation_at(dout, t, c, time), activation_at(p.z, t, c, time), u,
                                 load_parameter(p.D, t, c));
      }
      memory.step[step][c] = pair;
      memory.gate[step][c] = output.gate;
      memory.dy[step][c] = output.dy;
    });
  }
  if (!p.B.constant) stage_matrix(p.B, Packed && scan.aligned_B, scan, t, chunk, memory.raw_B, memory.B);
  if (!p.C.constant) stage_matrix(p.C, Packed && scan.aligned_C, scan, t, chunk, memory.raw_C, memory.C);
}

template <bool Packed>
MAMBA_SSM_DEVICE void finish_backward(const GpuScan& scan, const GpuScanGradients& out, const Tile& t,
                                      const Chunk& chunk, const BackwardMemory& memory) {
  const ScanGradients& g = out.g;
  if constexpr (Packed) {
    with_dtype(scan.p.u.dtype, [&](auto dtype) {
      for_each_pair([&](int step, int c, int) {
        if (step >= chunk.steps || c >= t.channels) return;
        const std::int64_t time = chunk.time(step);
        const auto set = [&](const Activation& a, const Activation& sum, float2 v) {
          if (sum.data != nullptr) v = {v.x + activation_at(sum, t, c, time), v.y + activation_at(sum, t, c + 1, time)};
          set_pair<dtype.value>(a, t, c, time, v);
        };
        const float4 v = *reinterpret_cast<const float4*>(&memory.step[step][c]);
        set(g.ddelta, out.sum_ddelta, {v.x, v.z});
        set(g.du, out.sum_du, {v.y, v.w});
        if (g.dz.data != nullptr) {
          const float4 dz = *reinterpret_cast<const float4*>(&memory.gate[step][c]);
          const float2 addend = raw_pair<dtype.value>(g.dz_addend, memory.dz_addend, step, c);
          set_pair<dtype.value>(g.dz, t, c, time, {dz.x + addend.x, dz.z + addend.y});
        }
      });
    });
  } else {
    for_each_element(scan.p.u, [&](int step, int c) {
      if (step >= chunk.steps || c >= t.channels) return;
      const std::int64_t time = chunk.time(step);
      const float2 v = memory.step[step][c];
      const auto set = [&](const Activation& a, const Activation& sum, float value) {
        if (a.data != nullptr) set_activation(a, t, c, time, value + activation_at(sum, t, c, time));
      };
      set(g.ddelta, out.sum_ddelta, v.x);
      set(g.du, out.sum_du, v.y);
      set(g.dz, g.dz_addend, memory.gate[step][c].x);
    });
  }
}

// Sums over the 16 channels of a warp, at one step: `finish` gives each lane one of the 16 dB and 16 dC.
//
// The thread's terms of two states are a row of the left factor of a product on the tensor cores, see multiply_tiles;
// the right factor has ones in these states' columns. That sums over groups of four lanes; shuffles do the rest. Exact:
// each term is multiplied in two parts, as the products have only tf32's precision.
template <bool Exact>
class ChannelSums {
 public:
  // The place of the lane's sum in a row of 16 dB and 16 dC.
  static MAMBA_SSM_DEVICE int place() {
    const int lane = threadIdx.x % kWarp;
    return (lane & 8) * 2 + lane / 16 * tile::kThreadStates + lane % 4 * 2 + (lane & 4) / 4;
  }

  // The terms of states j and j + 1.
  MAMBA_SSM_DEVICE void add(int j, const float (&dB)[2], const float (&dC)[2]) {
    const int column = threadIdx.x % kWarp / 4;
    const float first = column == j ? 1.0f : 0.0f, second = column == j + 1 ? 1.0f : 0.0f;
    if constexpr (Exact) {
      const float B0 = tile_part(dB[0]), B1 = tile_part(dB[1]), C0 = tile_part(dC[0]), C1 = tile_part(dC[1]);
      multiply_tiles(sums_, B0, C0, B1, C1, first, second);
      multiply_tiles(sums_, dB[0] - B0, dC[0] - C0, dB[1] - B1, dC[1] - C1, first, second);
    } else {
      multiply_tiles(sums_, dB[0], dC[0], dB[1], dC[1], first, second);
    }
  }

  MAMBA_SSM_DEVICE float finish() const {
    const bool takes_C = threadIdx.x & 8, takes_second = threadIdx.x & 4;
    const float first = (takes_C ? sums_[2] : sums_[0]) + shuffle_xor(takes_C ? sums_[0] : sums_[2], 8);
    const float second = (takes_C ? sums_[3] : sums_[1]) + shuffle_xor(takes_C ? sums_[1] : sums_[3], 8);
    return (takes_second ? second : first) + shuffle_xor(takes_second ? first : second, 4);
  }

 private:
  float sums_[4] = {0.0f, 0.0f, 0.0f, 0.0f};
};

// What stays in a thread's registers through the walk. A method's coefficients do if there is one for each state, else
// they are computed where they are used, from A.
template <class Method>
struct Adjoint {
  using Coefficients = decltype(Method::prepare(Real(0.0f)));
  static constexpr bool kKeep = sizeof(Coefficients) == sizeof(float);
  std::conditional_t<kKeep, Coefficients, float> k[tile::kThreadStates];
  float A[tile::kThreadStates];        // not used by zoh, whose coefficient is A log2 e
  float carried[tile::kThreadStates];  // Ā_{t+1} g_{t+1}
  float dA[tile::kThreadStates];

  MAMBA_SSM_DEVICE Coefficients coefficients(int j) const {
    if constexpr (kKeep) {
      return k[j];
    } else {
      return Method::prepare(Real(A[j]));
    }
  }
};
// The constant forms of B and C and their gradients, which only the general kernel has.
struct ConstantMatrices {
  float B[tile::kThreadStates], C[tile::kThreadStates];
  float dB[tile::kThreadStates], dC[tile::kThreadStates];
};

// The thread's states are worked on four at a time.
constexpr int kQuad = 4;

// B or C of one step and four of the thread's states.
template <bool Packed>
MAMBA_SSM_DEVICE void read_quad(const InputMatrix& m, const float (&row)[tile::kStates], const Thread& thread,
                                const float (&constant)[tile::kThreadStates], int quad, float (&values)[kQuad]) {
  const float4 v = *reinterpret_cast<const float4*>(row + thread.first_state + quad);
  const float varying[kQuad] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int j = 0; j < kQuad; ++j) values[j] = !Packed && m.constant ? constant[quad + j] : varying[j];
}

// Advances the thread's states through the steps from `first` to `first` + kPart. function(i, j, a_bar, before) is told
// of state j before the i-th of them.
template <class Method, bool Packed, class Function>
MAMBA_SSM_DEVICE void advance_part(const ScanParams& p, const Thread& thread, int first, const Adjoint<Method>& a,
                                   const ConstantMatrices& constant, const BackwardMemory& memory,
                                   float (&h)[tile::kThreadStates], const Function& function) {
#pragma unroll
  for (int quad = 0; quad < tile::kThreadStates; quad += kQuad) {
    typename Adjoint<Method>::Coefficients k[kQuad];
#pragma unroll
    for (int j = 0; j < kQuad; ++j) k[j] = a.coefficients(quad + j);
#pragma unroll
    for (int i = 0; i < tile::kPart; ++i) {
      const float2 in = memory.step[first + i][thread.channel];
      const Real delta = in.x, u = in.y;
      float B[kQuad];
      read_quad<Packed>(p.B, memory.B[first + i], thread, constant.B, quad, B);
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        const Transition<Real> transition = Method::forward(delta, k[j]);
        const float before = h[quad + j];
        h[quad + j] = transition.a_bar.value * before + (transition.c * u).value * B[j];
        function(i, quad + j, transition.a_bar.value, before);
      }
    }
  }
}

// The steps from `first` to `first` + kPart of a chunk; h is the state before them.
template <class Method, bool Packed, bool Exact>
MAMBA_SSM_DEVICE void backward_part(const ScanParams& p, const Chunk& chunk, const Thread& thread, int first,
                                    float (&h)[tile::kThreadStates], Adjoint<Method>& a, ConstantMatrices& constant,
                                    float (&partial)[tile::kPart][2 * tile::kStates], BackwardMemory& memory) {
  constexpr int kPart = tile::kPart;
  float before[kPart][tile::kThreadStates], a_bar[kPart][tile::kThreadStates];
  float y[kPart] = {}, du[kPart] = {}, ddelta[kPart] = {};

  advance_part<Method, Packed>(p, thread, first, a, constant, memory, h,
                               [&](int i, int j, float transition, float old_state) {
                                 before[i][j] = old_state;
                                 a_bar[i][j] = transition;
                               });
  // Step i of four states; `coefficients` are those of their gradients, where there are any.
  ChannelSums<Exact> channel_sums[kPart];
  const auto return_step = [&](int i, int quad, const auto& coefficients) {
    const float2 in = memory.step[first + i][thread.channel];
    const float delta = in.x, u = in.y, dy = memory.dy[first + i][thread.channel];
    float B[kQuad], C[kQuad], dB[kQuad], dC[kQuad];
    read_quad<Packed>(p.B, memory.B[first + i], thread, constant.B, quad, B);
    read_quad<Packed>(p.C, memory.C[first + i], thread, constant.C, quad, C);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      const int state = quad + j;
      const float after = i == kPart - 1 ? h[state] : before[i + 1][state];
      const float g = C[j] * dy + a.carried[state], gB = g * B[j];
      a.carried[state] = g * a_bar[i][state];
      y[i] += C[j] * after;
      dC[j] = after * dy;
      if constexpr (Method::kInputIsDelta) {
        const float through = before[i][state] * a.carried[state];
        ddelta[i] += through * a.k[state].value;
        a.dA[state] += through * delta;
        du[i] += gB;
        dB[j] = g * (delta * u);
      } else {
        const TransitionGradient<Real> step = Method::gradient(Real(delta), coefficients[j]);
        const float slope = Method::kSlopeIsABar ? a.carried[state] : g * step.slope.value;
        const float through = before[i][state] * slope, gBu = gB * u;
        ddelta[i] += through * a.A[state] + gBu * step.c_delta.value;
        a.dA[state] += through * delta + gBu * step.c_A.value;
        du[i] += gB * step.c.value;
        dB[j] = g * (step.c.value * u);
      }
      if constexpr (!Packed) {
        constant.dB[state] += dB[j];
        constant.dC[state] += dC[j];
      }
    }
    channel_sums[i].add(quad, {dB[0], dB[1]}, {dC[0], dC[1]});
    channel_sums[i].add(quad + 2, {dB[2], dB[3]}, {dC[2], dC[3]});
  };
  const int place = ChannelSums<Exact>::place();
  if constexpr (Method::kInputIsDelta) {
#pragma unroll
    for (int i = kPart - 1; i >= 0; --i) {
#pragma unroll
      for (int quad = 0; quad < tile::kThreadStates; quad += kQuad) return_step(i, quad, nullptr);
      partial[i][place] = channel_sums[i].finish();
    }
  } else {  // the coefficients of four states are computed once for all steps
#pragma unroll
    for (int quad = 0; quad < tile::kThreadStates; quad += kQuad) {
      decltype(gradient_coefficients<Method>(Real(0.0f))) coefficients[kQuad];
#pragma unroll
      for (int j = 0; j < kQuad; ++j) coefficients[j] = gradient_coefficients<Method>(Real(a.A[quad + j]));
#pragma unroll
      for (int i = kPart - 1; i >= 0; --i) return_step(i, quad, coefficients);
    }
#pragma unroll
    for (int i = 0; i < kPart; ++i) partial[i][place] = channel_sums[i].finish();
  }

  float dD = 0.0f, ddelta_bias = 0.0f;
#pragma unroll
  for (int i = 0; i < kPart; i += 2) {
    const int step = first + i + thread.half;
    const float y_sum = pair_sum(y[i], y[i + 1], thread.half);
    float du_sum = pair_sum(du[i], du[i + 1], thread.half);
    float ddelta_sum = pair_sum(ddelta[i], ddelta[i + 1], thread.half);
    float2 &result = memory.step[step][thread.channel], &gate = memory.gate[step][thread.channel];
    const float delta = result.x, u = result.y, dy = memory.dy[step][thread.channel];
    if constexpr (Method::kInputIsDelta) {  // c = Δ comes out of the sum over the states
      ddelta_sum = ddelta_sum * kLn2 + du_sum * u;
      du_sum *= delta;
    }
    const float gradient = p.delta_softplus ? ddelta_sum * softplus_slope(delta) : ddelta_sum;
    gate.x = gate.x * y_sum + gate.y;
    __syncwarp();  // the other thread of the channel has read Δ and u
    result = {gradient, du_sum + memory.D[threadIdx.x] * dy};
    dD += dy * u;
    if (step < chunk.steps) ddelta_bias += gradient;
  }
  memory.dD[threadIdx.x] += dD;
  memory.ddelta_bias[threadIdx.x] += ddelta_bias;
}

// Adds the warps' sums of a part of the chunk and writes them to the tile's own row of each step.
MAMBA_SSM_DEVICE void write_partial(const GpuScan& scan, const GpuScanGradients& out, const Tile& t, const Chunk& chunk,
                                    int part, const BackwardMemory& memory) {
  if (out.partial == nullptr) return;
  __syncthreads();  // one for each part is enough, as the next part writes to the other rows
  const auto& rows = memory.partial[part % 2];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  static_assert(tile::kPart * 2 * tile::kStates == tile::kThreads);
  const int step = part * tile::kPart + warp;
  if (step >= chunk.steps) return;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < tile::kWarps; ++i) sum += rows[i][warp][lane];
  const std::int64_t tile_row = ((t.batch * scan.p.groups + t.group) * scan.tiles + t.split) * scan.p.length;
  out.partial[(tile_row + chunk.time(step)) * 2 * tile::kStates + lane] = sum;
}

// The whole walk of one block, under one form of the method.
template <class Method, bool Packed, bool Exact>
MAMBA_SSM_DEVICE void return_tile(const GpuScan& scan, const GpuScanGradients& out, const Tile& t, const Thread& thread,
                                  const float (&A)[tile::kThreadStates], BackwardMemory& memory) {
  constexpr int kStates = tile::kThreadStates, kPart = tile::kPart;
  const ScanParams& p = scan.p;
  const ScanGradients& g = out.g;
  memory.D[threadIdx.x] = load_parameter(p.D, t, thread.channel);
  memory.dD[threadIdx.x] = memory.ddelta_bias[threadIdx.x] = 0.0f;
  Adjoint<Method> a;
  ConstantMatrices constant;
  const bool earlier = t.segment < scan.segments - 1;
  load_states(scan, t, thread, earlier ? scan.segment_states : g.dlast_state, earlier ? segment_row(scan, t) : t.batch,
              0.0f, a.carried);
#pragma unroll
  for (int j = 0; j < kStates; ++j) {
    a.A[j] = A[j];
    if constexpr (Adjoint<Method>::kKeep) a.k[j] = Method::prepare(Real(A[j]));
    a.dA[j] = 0.0f;
    if constexpr (!Packed) constant.dB[j] = constant.dC[j] = 0.0f;
  }
  if constexpr (!Packed) {
    load_constant(p.B, scan, t, thread, constant.B);
    load_constant(p.C, scan, t, thread, constant.C);
  }

  DeltaProduct product(scan, &memory + 1);
  if (p.delta_weight != nullptr) product.stage_weight(p, t);
  start_backward_inputs<Packed>(scan, g.dout, t, t.end_chunk - 1, t.first_chunk, product, memory);
#pragma unroll 1
  for (int index = t.end_chunk - 1; index >= t.first_chunk; --index) {
    const Chunk chunk = chunk_at(p, index);
    float h[kStates];
    const int count = thread_states(scan, t, thread);
#pragma unroll
    for (int j = 0; j < kStates; ++j) {
      h[j] = j < count ? checkpoint(scan, t, index, thread.first_state + j)[thread.channel] : 0.0f;
    }
    wait_for_copies();
    __syncthreads();
    stage_backward<Packed>(scan, g.dout, t, chunk, product, memory);
    __syncthreads();
    if (Packed && threadIdx.x / kWarp == 3) start_copy(g.dz_addend, t, chunk, memory.dz_addend);
    start_backward_inputs<Packed>(scan, g.dout, t, index - 1, t.first_chunk, product, memory);

    const int parts = (chunk.steps + kPart - 1) / kPart;
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
      float4* kept = memory.state[part][0] + threadIdx.x;
#pragma unroll
      for (int i = 0; i < kStates / 4; ++i) {
        kept[i * tile::kThreads] = {h[4 * i], h[4 * i + 1], h[4 * i + 2], h[4 * i + 3]};
      }
      if (part == parts - 1) break;
      advance_part<Method, Packed>(p, thread, part * kPart, a, constant, memory, h, [](int, int, float, float) {});
    }
#pragma unroll 1
    for (int part = parts - 1; part >= 0; --part) {
      const float4* kept = memory.state[part][0] + threadIdx.x;
#pragma unroll
      for (int i = 0; i < kStates / 4; ++i) {
        const float4 v = kept[i * tile::kThreads];
        h[4 * i] = v.x;
        h[4 * i + 1] = v.y;
        h[4 * i + 2] = v.z;
        h[4 * i + 3] = v.w;
      }
      auto& partial = memory.partial[part % 2][threadIdx.x / kWarp];
      backward_part<Method, Packed, Exact>(p, chunk, thread, part * kPart, h, a, constant, partial, memory);
      write_partial(scan, out, t, chunk, part, memory);
    }
    wait_for_copies();
    __syncthreads();
    finish_backward<Packed>(scan, out, t, chunk, memory);
  }

  if (t.segment == 0) store_states(scan, t, thread, g.dinitial_state, t.batch, a.carried);
  store_states(scan, t, thread, g.dA, segment_row(scan, t), a.dA);
  if constexpr (!Packed) {
    if (p.B.constant) store_states(scan, t, thread, g.dB, t.batch, constant.dB);
    if (p.C.constant) store_states(scan, t, thread, g.dC, t.batch, constant.dC);
  }
  float dD = memory.dD[threadIdx.x], ddelta_bias = memory.ddelta_bias[threadIdx.x];
  dD += shuffle_xor(dD, 16);
  ddelta_bias += shuffle_xor(ddelta_bias, 16);
  if (thread.half == 0 && thread.channel < t.channels) {
    const std::int64_t index = segment_row(scan, t) * p.channels + t.channel + thread.channel;
    if (g.dD != nullptr) g.dD[index] = dD;
    if (g.ddelta_bias != nullptr) g.ddelta_bias[index] = ddelta_bias;
  }
}

template <class Method, bool Packed, bool Exact>
__global__ void __launch_bounds__(tile::kThreads, Packed ? tile::kBackwardBlocks : 1)
    scan_backward_kernel(MAMBA_SSM_CONSTANT_PARAMETER GpuScan scan, MAMBA_SSM_CONSTANT_PARAMETER GpuScanGradients out) {
  BackwardMemory& memory = shared_memory<BackwardMemory>();
  if (threadIdx.x == 0) memory.tile = this_tile(scan, blockIdx.y);
  __syncthreads();
  const Tile& t = memory.tile;
  const Thread thread = this_thread();
  float A[tile::kThreadStates];
  load_states(scan, t, thread, scan.p.A, 0, -1.0f, A);
  if constexpr (!std::is_same_v<Method, ForAnyA<Method>>) {
    if (block_all(all_at_least(A, Method::kSmallestA))) {
      return_tile<Method, Packed, Exact>(scan, out, t, thread, A, memory);
      return;
    }
  }
  return_tile<ForAnyA<Method>, Packed, Exact>(scan, out, t, thread, A, memory);
}

template <bool Packed>
const char* launch_scan_backward(const GpuScan& scan, const GpuScanGradients& gradients, void* stream) {
  using Kernel = void (*)(GpuScan, GpuScanGradients);
#define MAMBA_SSM_KERNEL(Method)                                   \
  {scan_backward_kernel<FormFor<Method, Packed>, Packed, !Packed>, \
   scan_backward_kernel<FormFor<Method, Packed>, Packed, true>},
  static constexpr Kernel kKernels[][2] = {MAMBA_SSM_DISCRETIZATIONS(MAMBA_SSM_KERNEL)};
#undef MAMBA_SSM_KERNEL
  const ScanParams& p = scan.p;
  return launch<GpuScan, GpuScanGradients>(
      kKernels[p.method][gradients.exact], p.batch * p.groups * scan.tiles, scan.segments, tile::kThreads,
      sizeof(BackwardMemory) + DeltaProduct::bytes(p.rank), stream, scan, gradients);
}

}  // namespace mamba_ssm
