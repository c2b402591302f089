// The backward kernel of the scan. A block walks the chunks from the last to the first; in each a warp
//
//     stages    Δ, u, the gradient dy of the scan's sum, and what turns that sum into dz, in its shared memory,
//     advances  the state through the chunk: C·h for dz, dC = h dy; the state before every pair of steps is kept,
//     returns   through the pairs with g_t = C_t dy_t + Ā_{t+1} g_{t+1}, the gradient of h_t.
//
// The sums over the states of a channel go to its two threads by a shuffle, those over the channels (dB, dC) through
// shared memory, see ChannelSums. Nothing is added in an order that could change.
#pragma once

#include <cstddef>

#include "scan_adjoint.cuh"

namespace mamba_ssm {

// The thread's states are worked on four of each channel at a time.
constexpr int kQuad = 4;

// Sums over the channels of a warp, for two steps: each lane keeps its terms of four states at a time in shared memory,
// and `sum` gives it the sum for one state of one step.
//
// A lane adds up four of the sixteen lanes' terms of four states at one step, and shuffles do the rest; eight
// neighbouring lanes read from different banks at each of the four reads. Not on the tensor cores, whose products with
// a matrix of ones would take half the instructions: an H200 runs a kernel with such products at 1.77 GHz, and others
// at 1.95.
class ChannelSums {
 public:
  using Terms = float4[4][kWarp];

  static MAMBA_SSM_DEVICE int step(const Lane& lane) { return lane.index / 2 % 2; }
  static MAMBA_SSM_DEVICE int state(const Lane& lane) {
    return lane.first_state() + lane.index % 2 * kQuad + lane.index / 8 % 2 * 2 + lane.index / 4 % 2;
  }

  // The terms of the thread's states from `quad` on at both steps.
  static MAMBA_SSM_DEVICE void keep(const Lane& lane, int quad, const float (&first)[kQuad],
                                    const float (&second)[kQuad], Terms& terms) {
    terms[quad / kQuad][lane.index] = {first[0], first[1], first[2], first[3]};
    terms[2 + quad / kQuad][lane.index] = {second[0], second[1], second[2], second[3]};
  }
  static MAMBA_SSM_DEVICE float sum(const Lane& lane, const Terms& terms) {
    const int group = lane.index % 4, low = lane.index / 4 % 2, high = lane.index / 8 % 2;
    const float4* row = terms[group] + lane.half * 16 + low + 2 * (high ^ group % 2);
    const float4 *near = row + 4 * (group / 2), *far = row + 4 * (1 - group / 2);
    const float4 a = near[0], b = near[8], c = far[0], d = far[8];
    const float sums[kQuad] = {(a.x + b.x) + (c.x + d.x), (a.y + b.y) + (c.y + d.y), (a.z + b.z) + (c.z + d.z),
                               (a.w + b.w) + (c.w + d.w)};
    const float first = exchange(high, sums[0], sums[2], 8), second = exchange(high, sums[1], sums[3], 8);
    return exchange(low, first, second, 4);
  }

 private:
  // The sum of the lane's own one of two values and that of the lane so far away, which has the other one.
  static MAMBA_SSM_DEVICE float exchange(int has_second, float first, float second, int distance) {
    return (has_second ? second : first) + shuffle_xor(has_second ? first : second, distance);
  }
};

template <Dtype T>
struct BackwardWarp {
  Rows<T> u, delta, z, dout;
  Rows<Dtype::f32> dz_addend;
  RawMatrices<T> raw_matrices;
  alignas(16) float4 step[tile::kSteps][kWarp];  // by slot: Δ, u, dy, dΔ/d(delta); once a step is done, ddelta and du
  alignas(16) float gate[tile::kSteps][tile::kWarpChannels];  // what C·h + D u is multiplied by for dz; then dz
  alignas(16) MatrixRows matrices;
  float4 state[tile::kSteps / 2][tile::kSlots * 2][kWarp];  // before every pair of steps; on the way back, dB's terms
  MatrixRows partial;                                       // dB and dC of the warp's channels
  struct {
    KeptStream u, delta, z, dout, dz_addend, du, ddelta, dz, partial, B_and_C[2], checkpoints, kept_states;
  } streams;
  WarpTile tile;
  float2 limits;  // QuickLimits::of_step

  // The rows of u to dout once they are staged, until those of the next chunk are copied.
  MAMBA_SSM_DEVICE ChannelSums::Terms& terms() { return *reinterpret_cast<ChannelSums::Terms*>(&u); }
};
template <Dtype T>
struct BackwardMemory {
  BackwardWarp<T> warps[tile::kWarps];
};
// A multiprocessor has 228 KiB, of which each block takes 1 KiB more than it asks for.
static_assert(tile::kBackwardBlocks * (sizeof(BackwardMemory<Dtype::bf16>) + 1024) <= 228 * 1024);
static_assert(offsetof(BackwardWarp<Dtype::bf16>, dz_addend) == sizeof(ChannelSums::Terms));  // see terms()
static_assert(tile::kSteps > 2);  // the last pair's terms are added up before the next state is copied there

template <Dtype T>
MAMBA_SSM_DEVICE void make_streams(const GpuScan& scan, const GpuScanGradients& out, const WarpTile& t,
                                   const Lane& lane, BackwardWarp<T>& memory) {
  if (lane.index == 0) {
    const ScanParams& p = scan.p;
    const ScanGradients& g = out.g;
    const std::int64_t group = static_cast<std::int64_t>(t.batch) * p.groups + t.group;
    const std::int64_t tile_row = (group * scan.tiles + static_cast<int>(blockIdx.x) % scan.tiles) * p.length;
    constexpr int kRow = 2 * tile::kStates;
    auto& streams = memory.streams;
    streams.u = make_stream(p, p.u, t);
    streams.delta = make_stream(p, p.delta, t);
    streams.z = make_stream(p, p.z, t);
    streams.dout = make_stream(p, g.dout, t);
    streams.dz_addend = make_stream(p, g.dz_addend, t);
    streams.du = make_stream(p, g.du, t);
    streams.ddelta = make_stream(p, g.ddelta, t);
    streams.dz = make_stream(p, g.dz, t);
    streams.partial = make_stream(p, out.partial, Dtype::f32, tile_row * kRow, kRow);
    streams.B_and_C[0] = make_stream(scan, p.B, t);
    streams.B_and_C[1] = make_stream(scan, p.C, t);
    const int states = static_cast<int>(p.states);
    const std::int64_t first = (checkpoint_row(scan, t, 0) * p.channels + t.channel) * states + scan.first_state;
    streams.checkpoints =
        Stream{reinterpret_cast<char*>(p.checkpoints + first), static_cast<int>(p.channels) * states * 4, 4};
    const int between = (1 << scan.checkpoint_shift) - 1;  // chunks from one checkpoint to the next, without the first
    const std::int64_t warp =
        (static_cast<std::int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * tile::kWarps + threadIdx.x / kWarp;
    constexpr int kStateBytes = sizeof(memory.state[0]);
    streams.kept_states =
        Stream{reinterpret_cast<char*>(out.kept_states) + warp * between * kStateBytes, kStateBytes, 4};
    memory.tile = t;
  }
  __syncwarp();
}

// A place in the walk. From one checkpoint to the next, `last` chunk before it included, the walk first advances the
// state chunk by chunk, keeping it before each, and then returns through the chunks from the last.
struct WalkItem {
  int chunk, last;
  bool returns;
};
MAMBA_SSM_DEVICE WalkItem walk_from_checkpoint(const GpuScan& scan, int last) {
  const int base = last >> scan.checkpoint_shift << scan.checkpoint_shift;
  return {base, last, base == last};
}
MAMBA_SSM_DEVICE WalkItem next_item(const GpuScan& scan, const WalkItem& item) {
  if (!item.returns) return {item.chunk + 1, item.last, item.chunk + 1 == item.last};
  if (is_checkpoint(scan, item.chunk)) return walk_from_checkpoint(scan, item.chunk - 1);
  return {item.chunk - 1, item.last, true};
}
// Whether the state before the chunk comes from memory: from a checkpoint, or from where it was kept; else it is the
// state after the chunk that came before.
MAMBA_SSM_DEVICE bool reads_state(const GpuScan& scan, const WalkItem& item) {
  return is_checkpoint(scan, item.chunk) || (item.returns && item.chunk != item.last);
}

// Starts the copies of what an item needs; of nothing behind the last one.
template <Dtype T>
MAMBA_SSM_DEVICE void start_inputs(const GpuScan& scan, const Lane& lane, const WalkItem& item,
                                   BackwardWarp<T>& memory) {
  const auto& streams = memory.streams;
  const int channels = memory.tile.channels, chunk = item.chunk;
  const int steps = chunk < memory.tile.first_chunk ? 0 : chunk_steps(scan.p, chunk);
  const Stream u = streams.u, delta = streams.delta, dout = streams.dout, z = streams.z;
  const Stream matrix = streams.B_and_C[lane.index / 2 % 2];
  start_copy(u, channels, lane, chunk, steps, memory.u);
  start_copy(delta, channels, lane, chunk, steps, memory.delta);
  start_copy(scan, matrix, lane, chunk, steps, memory.raw_matrices);
  if (!item.returns) return;
  start_copy(dout, channels, lane, chunk, steps, memory.dout);
  start_copy(z, channels, lane, chunk, steps, memory.z);
}

// A pair of channels at one step: see BackwardWarp::step and ::gate.
struct GradientPair {
  float4 first, second;
  float2 gate;
};
template <Dtype T>
MAMBA_SSM_DEVICE GradientPair stage_gradient_pair(const ScanParams& p, int step, int pair, float2 bias,
                                                  const BackwardWarp<T>& memory) {
  const float2 x = memory.delta.pair(step, pair), u = memory.u.pair(step, pair);
  const float2 dout = memory.dout.pair(step, pair), z = memory.z.pair(step, pair);
  const float2 raw = {x.x + bias.x, x.y + bias.y};
  const Softplus s0 = softplus(raw.x), s1 = softplus(raw.y);
  float2 delta = {s0.value, s1.value}, slope = {softplus_slope(raw.x, s0), softplus_slope(raw.y, s1)};
  if (!p.delta_softplus) delta = raw, slope = {1.0f, 1.0f};
  const float2 s = {sigmoid(z.x), sigmoid(z.y)}, silu = {z.x * s.x, z.y * s.y},
               gradient = {dout.x * p.scale, dout.y * p.scale};
  float2 dy = {gradient.x * silu.x, gradient.y * silu.y};
  if (p.z.data == nullptr) dy = gradient;
  const float2 gate = {gradient.x * (s.x + silu.x * (1.0f - s.x)), gradient.y * (s.y + silu.y * (1.0f - s.y))};
  return {{delta.x, u.x, dy.x, slope.x}, {delta.y, u.y, dy.y, slope.y}, gate};
}
// Steps that do not exist: Δ = 0 leaves the state and its gradient as they are; their slope is 0, so that they add
// nothing to the bias's gradient.
template <Dtype T>
MAMBA_SSM_DEVICE void clear_missing(const Lane& lane, int steps, BackwardWarp<T>& memory) {
  if (steps == tile::kSteps) return;
#pragma unroll
  for (int i = 0; i < tile::kSteps; i += 2) {
    float4* target = memory.step[i + lane.half] + lane.pair;
    if (i + lane.half >= steps) target[0] = target[16] = {0.0f, 0.0f, 0.0f, 0.0f};
  }
}
// What the steps of a chunk need to be advanced through: Δ and u. Returns whether the quick form fits.
template <class Limits, Dtype T>
MAMBA_SSM_DEVICE bool stage_quietly(const ScanParams& p, const Lane& lane, int steps, float2 bias,
                                    BackwardWarp<T>& memory) {
  typename Limits::Steps sizes;
  float part[8];
  read_part(lane, memory.raw_matrices, part);
  float4 staged[tile::kSteps / 2];
#pragma unroll
  for (int i = 0; i < tile::kSteps / 2; ++i) {
    const int step = 2 * i + lane.half;
    const float2 x = memory.delta.pair(step, lane.pair), u = memory.u.pair(step, lane.pair);
    const float2 raw = {x.x + bias.x, x.y + bias.y};
    float2 delta = {softplus(raw.x).value, softplus(raw.y).value};
    if (!p.delta_softplus) delta = raw;
    staged[i] = {delta.x, u.x, delta.y, u.y};
    sizes.add(step < steps && 2 * lane.pair < memory.tile.channels, delta.x, delta.y);
  }
  keep_part(lane, part, memory.matrices);
#pragma unroll
  for (int i = 0; i < tile::kSteps / 2; ++i) {
    float4* target = memory.step[2 * i + lane.half] + lane.pair;
    target[0] = {staged[i].x, staged[i].y, 0.0f, 0.0f};
    target[16] = {staged[i].z, staged[i].w, 0.0f, 0.0f};
  }
  clear_missing(lane, steps, memory);
  return sizes.fit(memory.limits);
}
// What they need to be returned through, likewise.
template <class Limits, Dtype T>
MAMBA_SSM_DEVICE bool stage_chunk(const ScanParams& p, const Lane& lane, int steps, float2 bias,
                                  BackwardWarp<T>& memory) {
  typename Limits::Steps sizes;
  float part[8];
  read_part(lane, memory.raw_matrices, part);
  GradientPair staged[tile::kSteps / 2];
#pragma unroll
  for (int i = 0; i < tile::kSteps / 2; ++i) {
    const int step = 2 * i + lane.half;
    staged[i] = stage_gradient_pair(p, step, lane.pair, bias, memory);
    const bool exists = step < steps && 2 * lane.pair < memory.tile.channels;
    sizes.add(exists, staged[i].first.x, staged[i].second.x);
  }
  keep_part(lane, part, memory.matrices);
#pragma unroll
  for (int i = 0; i < tile::kSteps / 2; ++i) {
    const int step = 2 * i + lane.half;
    memory.step[step][lane.pair] = staged[i].first;
    memory.step[step][lane.pair + 16] = staged[i].second;
    *reinterpret_cast<float2*>(memory.gate[step] + 2 * lane.pair) = staged[i].gate;
  }
  clear_missing(lane, steps, memory);
  return sizes.fit(memory.limits);
}

MAMBA_SSM_DEVICE float as_float(float value) { return value; }
MAMBA_SSM_DEVICE float as_float(Real value) { return value.value; }
// What a thread keeps of the method, of the walk back and of what it sums. The coefficients of the quick form are kept
// if there is one for each state, else made of A where they are used. (Beside a general form that one is A itself.)
template <class Quick>
struct Adjoint {
  static constexpr bool kKeep = sizeof(typename Quick::Coefficients) == sizeof(float);
  States k;        // A, or its coefficients
  States carried;  // Ā_{t+1} g_{t+1}
  States dA;

  MAMBA_SSM_DEVICE void prepare(const States& A) {
#pragma unroll
    for (int s = 0; s < tile::kSlots; ++s) {
#pragma unroll
      for (int j = 0; j < tile::kThreadStates; ++j) {
        if constexpr (kKeep) {
          k[s][j] = as_float(Quick::prepare(A[s][j]));
        } else {
          k[s][j] = A[s][j];
        }
        dA[s][j] = 0.0f;
      }
    }
  }
  template <class Form>
  MAMBA_SSM_DEVICE typename Form::Coefficients coefficients(int s, int j) const {
    if constexpr (kKeep && std::is_same_v<Form, Quick>) {
      return k[s][j];
    } else {
      return Form::prepare(opaque(k[s][j]));
    }
  }
};

// h through one step, without anything else.
template <class Form, int Count>
MAMBA_SSM_DEVICE void advance_step(const float4& in, const typename Form::Coefficients (&k)[Count],
                                   const float (&B)[Count], float* h) {
  const float input = Form::kInputIsDelta ? in.x * in.y : in.y;
#pragma unroll
  for (int j = 0; j < Count; ++j) h[j] = Form::advance(h[j], in.x, input, B[j], k[j]);
}

template <class Form, class Quick, Dtype T>
MAMBA_SSM_DEVICE void advance_quietly(const Lane& lane, const Adjoint<Quick>& a, States& h,
                                      const BackwardWarp<T>& memory) {
#pragma unroll 1
  for (int first = 0; first < tile::kSteps; first += 2) {
    float B[2][tile::kThreadStates];
    read_row(memory.matrices[first] + lane.first_state(), B[0]);
    read_row(memory.matrices[first + 1] + lane.first_state(), B[1]);
#pragma unroll
    for (int s = 0; s < tile::kSlots; ++s) {
      typename Form::Coefficients k[tile::kThreadStates];
#pragma unroll
      for (int j = 0; j < tile::kThreadStates; ++j) k[j] = a.template coefficients<Form>(s, j);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        advance_step<Form>(memory.step[first + i][s == 0 ? lane.index : lane.partner()], k, B[i], h[s]);
      }
    }
  }
}

// Two steps of both of the thread's channels, see BackwardWarp::step.
struct TwoSteps {
  float4 at[2][tile::kSlots];

  template <Dtype T>
  MAMBA_SSM_DEVICE void read(const Lane& lane, int first, const BackwardWarp<T>& memory) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      at[i][0] = memory.step[first + i][lane.index];
      at[i][1] = memory.step[first + i][lane.partner()];
    }
  }
};

// h through the chunk: keeps it before every pair of steps, and finds dC and dz.
template <class Form, class Quick, Dtype T>
MAMBA_SSM_DEVICE void advance_chunk(const Lane& lane, const Adjoint<Quick>& a, float D, States& h,
                                    BackwardWarp<T>& memory) {
  constexpr int kStates = tile::kThreadStates, kSlots = tile::kSlots;
  ChannelSums::Terms& terms = memory.terms();
  TwoSteps in, next;
  next.read(lane, 0, memory);
#pragma unroll 2
  for (int first = 0; first < tile::kSteps; first += 2) {
    in = next;
    next.read(lane, (first + 2) % tile::kSteps, memory);  // before what is stored below, which would be waited for
    float y[2][kSlots] = {};
#pragma unroll
    for (int quad = 0; quad < kStates; quad += kQuad) {
      float dC[2][kQuad];
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        const float* state = h[s] + quad;
        memory.state[first / 2][s * 2 + quad / kQuad][lane.index] = {state[0], state[1], state[2], state[3]};
      }
      float B[2][kQuad], C[2][kQuad];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        read_row(memory.matrices[first + i] + lane.first_state() + quad, B[i]);
        read_row(memory.matrices[first + i] + tile::kStates + lane.first_state() + quad, C[i]);
      }
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        typename Form::Coefficients k[kQuad];
#pragma unroll
        for (int j = 0; j < kQuad; ++j) k[j] = a.template coefficients<Form>(s, quad + j);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          advance_step<Form>(in.at[i][s], k, B[i], h[s] + quad);
#pragma unroll
          for (int j = 0; j < kQuad; ++j) {
            const float state = h[s][quad + j], dy = in.at[i][s].z;
            y[i][s] += C[i][j] * state;
            dC[i][j] = s == 0 ? state * dy : dC[i][j] + state * dy;
          }
        }
      }
      ChannelSums::keep(lane, quad, dC[0], dC[1], terms);
    }
    __syncwarp();
    memory.partial[first + ChannelSums::step(lane)][tile::kStates + ChannelSums::state(lane)] =
        ChannelSums::sum(lane, terms);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = y[i][0] + shuffle_xor(y[i][1], 16) + D * in.at[i][0].y;
      memory.gate[first + i][lane.channel(0)] *= sum;
    }
  }
}

// What is summed over time for the lane's own channel.
struct ChannelGradients {
  float dD, ddelta_bias;
};

// Back through the chunk's pairs of steps.
template <class Form, class Quick, Dtype T>
MAMBA_SSM_DEVICE void return_chunk(const Lane& lane, Adjoint<Quick>& a, float D, ChannelGradients& channel,
                                   BackwardWarp<T>& memory) {
  constexpr int kStates = tile::kThreadStates, kSlots = tile::kSlots;
#pragma unroll 1
  for (int first = tile::kSteps - 2; first >= 0; first -= 2) {
    float4 in[2][kSlots];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      in[i][0] = memory.step[first + i][lane.index];
      in[i][1] = memory.step[first + i][lane.partner()];
    }
    float du_sum[2][kSlots] = {}, ddelta_sum[2][kSlots] = {}, rest_sum[2][kSlots] = {};
    ChannelSums::Terms& terms = memory.state[first / 2];  // each lane has read its own states when it keeps terms there
#pragma unroll
    for (int quad = 0; quad < kStates; quad += kQuad) {
      float dB[2][kQuad], B[2][kQuad], C[2][kQuad];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        read_row(memory.matrices[first + i] + lane.first_state() + quad, B[i]);
        read_row(memory.matrices[first + i] + tile::kStates + lane.first_state() + quad, C[i]);
      }
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        const float4 kept = memory.state[first / 2][s * 2 + quad / kQuad][lane.index];
        const float before[kQuad] = {kept.x, kept.y, kept.z, kept.w};
        const float w0 = in[0][s].x * in[0][s].y, w1 = in[1][s].x * in[1][s].y;
        if constexpr (Form::kFactored) {
          if constexpr (Form::kMakesAnew) in[1][s].x = opaque(in[1][s].x);
        }
#pragma unroll
        for (int j = 0; j < kQuad; ++j) {
          float& carried = a.carried[s][quad + j];
          float& dA = a.dA[s][quad + j];
          const auto add_dB = [&](int i, float term) { dB[i][j] = s == 0 ? term : dB[i][j] + term; };
          if constexpr (Form::kFactored) {
            const float k = opaque(a.k[s][quad + j]);
            const form::Factors early = Form::gradient(in[0][s].x, k), late = Form::gradient(in[1][s].x, k);
            const float early_input = early.p * w0, late_input = late.p * w1;  // c u
            const auto step_back = [&](int i, const form::Factors& f, float w, float input, float state) {
              const float g = C[i][j] * in[i][s].z + carried, gB = g * B[i][j];
              carried = g * f.a_bar;
              float dx;
              if constexpr (Form::kSlopeIsABar) {
                dx = state * carried + w * (gB * f.p_x);
              } else {  // p_x is half the slope
                dx = f.slope * (state * g + (0.5f * w) * gB);
              }
              ddelta_sum[i][s] += dx * k;
              dA += dx * in[i][s].x;
              du_sum[i][s] += gB * f.p;
              if constexpr (Form::kHasRest) rest_sum[i][s] += gB * f.rest;
              add_dB(i, g * input);
            };
            step_back(1, late, w1, late_input, early.a_bar * before[j] + early_input * B[0][j]);
            step_back(0, early, w0, early_input, before[j]);
          } else if constexpr (Form::kInputIsDelta) {
            const float k = a.k[s][quad + j];
            const float a0 = Form::a_bar(in[0][s].x, k), a1 = Form::a_bar(in[1][s].x, k);
            const auto step_back = [&](int i, float a_bar, float w, float state) {
              const float g = C[i][j] * in[i][s].z + carried;
              carried = g * a_bar;
              du_sum[i][s] += g * B[i][j];
              add_dB(i, g * w);
              const float through = state * carried;
              ddelta_sum[i][s] += through * k;
              dA += through * in[i][s].x;
            };
            step_back(1, a1, w1, a0 * before[j] + w0 * B[0][j]);
            step_back(0, a0, w0, before[j]);
          } else {
            const float A = opaque(a.k[s][quad + j]);
            const TransitionGradient<float> early = Form::gradient(in[0][s].x, A);
            const TransitionGradient<float> late = Form::gradient(in[1][s].x, A);
            const float early_input = early.c * in[0][s].y, late_input = late.c * in[1][s].y;
            const auto step_back = [&](int i, const TransitionGradient<float>& step, float input, float state) {
              const float g = C[i][j] * in[i][s].z + carried, gB = g * B[i][j], gBu = gB * in[i][s].y;
              carried = g * step.a_bar;
              const float through = state * (Form::kSlopeIsABar ? carried : g * step.slope);
              ddelta_sum[i][s] += through * A;
              ddelta_sum[i][s] += gBu * step.c_delta;
              dA += through * in[i][s].x;
              dA += gBu * step.c_A;
              du_sum[i][s] += gB * step.c;
              add_dB(i, g * input);
            };
            step_back(1, late, late_input, early.a_bar * before[j] + early_input * B[0][j]);
            step_back(0, early, early_input, before[j]);
          }
        }
      }
      ChannelSums::keep(lane, quad, dB[0], dB[1], terms);
    }
    __syncwarp();  // and the partner has read this lane's step
    memory.partial[first + ChannelSums::step(lane)][ChannelSums::state(lane)] = ChannelSums::sum(lane, terms);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float du = du_sum[i][0] + shuffle_xor(du_sum[i][1], 16);
      float ddelta = ddelta_sum[i][0] + shuffle_xor(ddelta_sum[i][1], 16);
      const float delta = in[i][0].x, u = in[i][0].y, dy = in[i][0].z, slope = in[i][0].w;
      if constexpr (Form::kFactored) {  // the Δ of c = Δ p comes out of the sum over the states
        float sum = du;
        if constexpr (Form::kHasRest) sum += rest_sum[i][0] + shuffle_xor(rest_sum[i][1], 16);
        ddelta = ddelta * Form::kPerA + sum * u;
        du *= delta;
      } else if constexpr (Form::kInputIsDelta) {  // and so does c = Δ
        ddelta = ddelta * kLn2 + du * u;
        du *= delta;
      }
      ddelta *= slope;
      channel.ddelta_bias += ddelta;
      channel.dD += dy * u;
      *reinterpret_cast<float2*>(&memory.step[first + i][lane.index]) = {ddelta, du + D * dy};
    }
  }
}

// Writes pairs of channels of a chunk's steps: value(step) for the lane's own pair, in T or in float32.
template <Dtype T, class Function>
MAMBA_SSM_DEVICE void write_pairs(const Stream& s, int channels, const Lane& lane, int chunk, int steps,
                                  const Function& value) {
  char* elements = s.row(chunk * tile::kSteps + lane.half) + 2 * lane.pair * s.size;
  const int written = 2 * lane.pair < channels ? steps - lane.half : 0;
  const auto write = [&](auto dtype) {
#pragma unroll
    for (int i = 0; i < tile::kSteps; i += 2) {
      store_pair_below<dtype.value>(i, written, advance(elements, i, s.row_bytes), value(i + lane.half));
    }
  };
  if (s.size == kSize<T>) {
    write(std::integral_constant<Dtype, T>());
  } else if constexpr (T != Dtype::f32) {
    write(std::integral_constant<Dtype, Dtype::f32>());
  }
}

template <Dtype T>
MAMBA_SSM_DEVICE void write_dz(const ScanGradients& g, const Lane& lane, int chunk, int steps,
                               const BackwardWarp<T>& memory) {
  const int channels = memory.tile.channels;
  const auto gate = [&](int step) { return *reinterpret_cast<const float2*>(memory.gate[step] + 2 * lane.pair); };
  const Stream dz = memory.streams.dz;
  if (g.dz_addend.data == nullptr) {
    write_pairs<T>(dz, channels, lane, chunk, steps, gate);
  } else {
    write_pairs<T>(dz, channels, lane, chunk, steps, [&](int step) {
      const float2 value = gate(step), more = memory.dz_addend.pair(step, lane.pair);
      return float2{value.x + more.x, value.y + more.y};
    });
  }
}

template <Dtype T>
MAMBA_SSM_DEVICE void write_results(const ScanParams& p, const GpuScanGradients& out, const Lane& lane, int chunk,
                                    int steps, const BackwardWarp<T>& memory) {
  const int channels = memory.tile.channels;
  const auto& streams = memory.streams;
  float2 ddelta[tile::kSteps], du[tile::kSteps];
#pragma unroll
  for (int i = 0; i < tile::kSteps; i += 2) {
    const int step = i + lane.half;
    const float2 first = *reinterpret_cast<const float2*>(&memory.step[step][lane.pair]);
    const float2 second = *reinterpret_cast<const float2*>(&memory.step[step][lane.pair + 16]);
    ddelta[i] = {first.x, second.x};
    du[i] = {first.y, second.y};
  }
  if (out.sum_du.data != nullptr && 2 * lane.pair < channels) {  // what launches for other states found
    const auto add = [&](const Stream& sum, float2(&values)[tile::kSteps]) {
      for (int i = 0; i < tile::kSteps && steps > i + lane.half; i += 2) {
        const float2 more = load_pair<Dtype::f32>(sum.row(chunk * tile::kSteps + i + lane.half), 2 * lane.pair);
        values[i] = {values[i].x + more.x, values[i].y + more.y};
      }
    };
    add(make_stream(p, out.sum_ddelta, memory.tile), ddelta);
    add(make_stream(p, out.sum_du, memory.tile), du);
  }
  write_pairs<T>(streams.ddelta, channels, lane, chunk, steps, [&](int step) { return ddelta[step - lane.half]; });
  write_pairs<T>(streams.du, channels, lane, chunk, steps, [&](int step) { return du[step - lane.half]; });
}

// The sums of dB and dC of the block's warps, in the tile's own row of each step.
template <Dtype T>
MAMBA_SSM_DEVICE void write_partial(const Lane& lane, int chunk, int steps, const BackwardMemory<T>& memory) {
  const int warp = threadIdx.x / kWarp;
  const Stream partial = memory.warps[0].streams.partial;
  char* elements = partial.row(chunk * tile::kSteps + warp) + lane.index * 4;
#pragma unroll
  for (int i = 0; i < tile::kSteps; i += tile::kWarps) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < tile::kWarps; ++w) sum += memory.warps[w].partial[i + warp][lane.index];
    store_element_below<Dtype::f32>(i, steps - warp, advance(elements, i, partial.row_bytes), sum);
  }
}

// The state before a chunk other than the one behind a checkpoint is kept in global memory, each lane's own states.
template <Dtype T>
MAMBA_SSM_DEVICE char* kept_state(const GpuScan& scan, const Lane& lane, int chunk, const BackwardWarp<T>& memory) {
  const Stream kept = memory.streams.kept_states;
  return kept.row((chunk & ((1 << scan.checkpoint_shift) - 1)) - 1) + lane.index * 16;
}
template <Dtype T>
MAMBA_SSM_DEVICE void keep_state(const GpuScan& scan, const Lane& lane, int chunk, const States& h,
                                 const BackwardWarp<T>& memory) {
  char* target = kept_state(scan, lane, chunk, memory);
#pragma unroll
  for (int i = 0; i < tile::kSlots * 2; ++i) {
    const float* v = h[i / 2] + i % 2 * 4;
    *reinterpret_cast<float4*>(target + i * sizeof(float4) * kWarp) = {v[0], v[1], v[2], v[3]};
  }
}
// Starts the copy of the state before an item's chunk to where the states before the last pair of steps are kept.
template <Dtype T>
MAMBA_SSM_DEVICE void start_state(const GpuScan& scan, const Lane& lane, const WalkItem& item,
                                  BackwardWarp<T>& memory) {
  float4(&target)[tile::kSlots * 2][kWarp] = memory.state[tile::kSteps / 2 - 1];
  if (!is_checkpoint(scan, item.chunk)) {
    const char* source = kept_state(scan, lane, item.chunk, memory);
#pragma unroll
    for (int i = 0; i < tile::kSlots * 2; ++i) {
      copy_async<16>(&target[i][lane.index], source + i * sizeof(float4) * kWarp, true);
    }
    return;
  }
  const int count = scan.states - lane.first_state(), states = static_cast<int>(scan.p.states);
  const Stream checkpoints = memory.streams.checkpoints;
  char* row = checkpoints.row(item.chunk >> scan.checkpoint_shift) + lane.first_state() * 4;
#pragma unroll
  for (int s = 0; s < tile::kSlots; ++s) {
    const char* source = advance(row, lane.channel(s), states * 4);
    const bool exists = lane.channel(s) < memory.tile.channels && item.chunk >= scan.p.first_checkpoint;
    copy_async<16>(&target[s * 2][lane.index], source, exists && count > 0);
    copy_async<16>(&target[s * 2 + 1][lane.index], source + 16, exists && count > 4);
  }
}
template <Dtype T>
MAMBA_SSM_DEVICE void read_state(const Lane& lane, const BackwardWarp<T>& memory, States& h) {
#pragma unroll
  for (int s = 0; s < tile::kSlots; ++s) {
#pragma unroll
    for (int j = 0; j < tile::kThreadStates; j += 4) {
      const float4 v = memory.state[tile::kSteps / 2 - 1][s * 2 + j / 4][lane.index];
      h[s][j] = v.x, h[s][j + 1] = v.y, h[s][j + 2] = v.z, h[s][j + 3] = v.w;
    }
  }
}

// What a thread has in registers, and a chunk with the general form: that is not inlined, as it would take registers of
// the quick form's, and their place in the instruction cache.
template <class Method, Dtype T>
struct BackwardThread {
  using General = typename form::Backward<Method, T>::General;
  using Quick = typename form::Backward<Method, T>::Quick;
  static_assert(!Adjoint<Quick>::kKeep || std::is_same_v<Quick, General> || requires { Quick::kKeepsA; });
  Adjoint<Quick> a;
  States h;
  ChannelGradients channel;
  float D;

  static MAMBA_SSM_DEVICE_CALL void advance_quietly_generally(BackwardThread& thread, BackwardWarp<T>& memory) {
    advance_quietly<General>(Lane(), thread.a, thread.h, memory);
  }
  static MAMBA_SSM_DEVICE_CALL void advance_generally(BackwardThread& thread, BackwardWarp<T>& memory) {
    advance_chunk<General>(Lane(), thread.a, thread.D, thread.h, memory);
  }
  static MAMBA_SSM_DEVICE_CALL void return_generally(BackwardThread& thread, BackwardWarp<T>& memory) {
    return_chunk<General>(Lane(), thread.a, thread.D, thread.channel, memory);
  }
};

// The whole walk of one warp.
template <class Method, Dtype T>
MAMBA_SSM_DEVICE void return_tile(const GpuScan& scan, const GpuScanGradients& out, const WarpTile& t, const Lane& lane,
                                  BackwardMemory<T>& block_memory) {
  using Quick = typename form::Backward<Method, T>::Quick;
  using General = typename form::Backward<Method, T>::General;
  using Thread = BackwardThread<Method, T>;
  BackwardWarp<T>& memory = block_memory.warps[threadIdx.x / kWarp];
  const ScanParams& p = scan.p;
  const ScanGradients& g = out.g;
  States A;
  load_states(scan, t, lane, p.A, 0, -1.0f, A);
  using Limits = QuickLimits<Quick, General, true>;
  const Limits limits(A);
  if (!Limits::kAlways && lane.index == 0) memory.limits = limits.of_step;
  Adjoint<Quick> a;
  a.prepare(A);
  const bool earlier = t.segment < scan.segments - 1;
  load_states(scan, t, lane, earlier ? scan.segment_states : g.dlast_state, earlier ? segment_row(scan, t) : t.batch,
              0.0f, a.carried);
  const int c = 2 * lane.pair;
  const float2 bias = {load_parameter(p.delta_bias, t, c), load_parameter(p.delta_bias, t, c + 1)};
  const float D = load_parameter(p.D, t, lane.channel(0));
  ChannelGradients channel = {0.0f, 0.0f};

  make_streams(scan, out, t, lane, memory);
  WalkItem item = walk_from_checkpoint(scan, t.end_chunk - 1);
  States h;
  start_inputs(scan, lane, item, memory);
  start_state(scan, lane, item, memory);
#pragma unroll 1
  while (item.chunk >= memory.tile.first_chunk) {
    const int chunk = item.chunk, steps = chunk_steps(p, chunk);
    const WalkItem next = next_item(scan, item);
    wait_for_copies();
    __syncwarp();
    if (reads_state(scan, item)) read_state(lane, memory, h);
    if (item.returns) {
      const bool quick = stage_chunk<Limits>(p, lane, steps, bias, memory);
      __syncthreads();  // the block has added up the last sums
      if (g.dz_addend.data != nullptr) {
        start_copy(Stream(memory.streams.dz_addend), memory.tile.channels, lane, chunk, steps, memory.dz_addend);
      }
      if (quick) {
        advance_chunk<Quick>(lane, a, D, h, memory);
      } else if constexpr (!Limits::kAlways) {
        Thread thread{a, {}, channel, D};
        copy(h, thread.h);
        Thread::advance_generally(thread, memory);
        copy(thread.h, h);
      }
      if (g.dz_addend.data != nullptr) wait_for_copies();
      __syncwarp();
      start_inputs(scan, lane, next, memory);
      if (g.dz.data != nullptr) write_dz(g, lane, chunk, steps, memory);
      if (quick) {
        return_chunk<Quick>(lane, a, D, channel, memory);
      } else if constexpr (!Limits::kAlways) {
        Thread thread{a, {}, channel, D};
        Thread::return_generally(thread, memory);
        copy(thread.a.carried, a.carried);
        copy(thread.a.dA, a.dA);
        channel = thread.channel;
      }
      if (next.chunk >= memory.tile.first_chunk) start_state(scan, lane, next, memory);
      __syncthreads();
      write_results(p, out, lane, chunk, steps, memory);
      write_partial(lane, chunk, steps, block_memory);
      fill(h, 0.0f);  // it is read anew; so it takes no registers on the way back
    } else {
      const bool quick = stage_quietly<Limits>(p, lane, steps, bias, memory);
      __syncwarp();
      start_inputs(scan, lane, next, memory);
      if (quick) {
        advance_quietly<Quick>(lane, a, h, memory);
      } else if constexpr (!Limits::kAlways) {
        Thread thread{a, {}, channel, D};
        copy(h, thread.h);
        Thread::advance_quietly_generally(thread, memory);
        copy(thread.h, h);
      }
      if (!next.returns) keep_state(scan, lane, next.chunk, h, memory);
    }
    __syncwarp();
    item = next;
  }

  const WarpTile end = memory.tile;
  if (end.segment == 0) store_states(scan, end, lane, g.dinitial_state, end.batch, a.carried);
  store_states(scan, end, lane, g.dA, segment_row(scan, end), a.dA);
  if (lane.channel(0) < end.channels) {
    const std::int64_t index = segment_row(scan, end) * p.channels + end.channel + lane.channel(0);
    if (g.dD != nullptr) g.dD[index] = channel.dD;
    if (g.ddelta_bias != nullptr) g.ddelta_bias[index] = channel.ddelta_bias;
  }
}

template <class Method, Dtype T>
__global__ void __launch_bounds__(tile::kThreads, tile::kBackwardBlocks)
    scan_backward_kernel(MAMBA_SSM_CONSTANT_PARAMETER GpuScan scan, MAMBA_SSM_CONSTANT_PARAMETER GpuScanGradients out) {
  return_tile<Method, T>(scan, out, this_tile(scan, blockIdx.y), Lane(), shared_memory<BackwardMemory<T>>());
}

template <Dtype T>
const char* launch_scan_backward(const GpuScan& scan, const GpuScanGradients& gradients, const SegmentSums* sums,
                                 void* stream) {
  using Kernel = void (*)(GpuScan, GpuScanGradients);
  using SumsKernel = void (*)(GpuScan, GpuScanGradients, SegmentSums);
#define MAMBA_SSM_KERNEL(Method) scan_backward_kernel<Method, T>,
#define MAMBA_SSM_SUMS_KERNEL(Method) scan_backward_sums_kernel<Method, T>,
  static constexpr Kernel kKernels[] = {MAMBA_SSM_DISCRETIZATIONS(MAMBA_SSM_KERNEL)};
  static constexpr SumsKernel kSumsKernels[] = {MAMBA_SSM_DISCRETIZATIONS(MAMBA_SSM_SUMS_KERNEL)};
#undef MAMBA_SSM_KERNEL
#undef MAMBA_SSM_SUMS_KERNEL
  const ScanParams& p = scan.p;
  const unsigned blocks = static_cast<unsigned>(p.batch * p.groups * scan.tiles);
  if (sums == nullptr) {
    return launch<GpuScan, GpuScanGradients>(kKernels[p.method], blocks, scan.segments, tile::kThreads,
                                             sizeof(BackwardMemory<T>), stream, scan, gradients);
  }
  return launch<GpuScan, GpuScanGradients, SegmentSums>(kSumsKernels[p.method], blocks, scan.segments - 1,
                                                        tile::kThreads, sizeof(AdjointMemory<T>), stream, scan,
                                                        gradients, *sums);
}

}  // namespace mamba_ssm
