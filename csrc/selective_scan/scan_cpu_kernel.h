// The selective scan on SIMD lanes. One lane is one channel; a task walks a few neighbouring blocks of kLanes channels
// of one batch element and group through time, chunk by chunk:
//
//     stage     a chunk of u, Δ (softplus applied), z as fp32 rows of kLanes channels
//     scan      for each state n: A, the state and the method's coefficients stay in registers over the chunk's steps
//     finish    D, addend, gate and scale, once per element
//
// Memory besides the outputs: a few rows per task, and in training one state per chunk. The backward pass walks the
// chunks from the last to the first, recomputes a chunk's states from its checkpoint and then runs the adjoint
// g_t = C_t dy_t + Ā_{t+1} g_{t+1} down the chunk. Sums over channels (dB, dC) are formed in a fixed order whatever
// the number of threads.
#pragma once

#include "discretization.h"
#include "params.h"
#include "scan_cpu_table.h"
#include "simd.h"
#include "simd_math.h"

namespace mamba_ssm {
namespace MAMBA_SSM_ISA {

constexpr int kMaxChunk = 256;

// The neighbouring channels that a task works on at one time.
struct Block {
  std::int64_t batch, channel;
  int count;  // channels in use; the lanes past them compute on zeros
};

// The steps [first, first + steps) of the scan's own order; `time` maps them to positions, backwards under `reverse`.
struct Chunk {
  std::int64_t first;
  int steps;
  std::int64_t length;
  bool reverse;
  MAMBA_SSM_INLINE std::int64_t time(int step) const { return reverse ? length - 1 - first - step : first + step; }
};

// rows[step][lane] = activation(block.batch, block.channel + lane, chunk.time(step))
MAMBA_SSM_INLINE void load_rows(const Activation& a, const Block& block, const Chunk& chunk, float* rows) {
  const std::int64_t base = block.batch * a.batch + block.channel * a.channel;
  if (a.channel == 1 || block.count == 1) {
    for (int t = 0; t < chunk.steps; ++t) {
      store(rows + t * kLanes, load_elements(a.data, base + chunk.time(t) * a.time, a.dtype, block.count));
    }
    return;
  }
  int t = 0;
  if (a.time == 1) {
    for (; t + kLanes <= chunk.steps; t += kLanes) {
      vfloat tile[kLanes] = {};
      const std::int64_t start = chunk.reverse ? chunk.time(t + kLanes - 1) : chunk.time(t);
      for (int lane = 0; lane < block.count; ++lane) {
        tile[lane] = load_elements(a.data, base + lane * a.channel + start, a.dtype, kLanes);
      }
      transpose(tile);
      for (int i = 0; i < kLanes; ++i) store(rows + (t + (chunk.reverse ? kLanes - 1 - i : i)) * kLanes, tile[i]);
    }
  }
  for (; t < chunk.steps; ++t) {
    for (int lane = 0; lane < kLanes; ++lane) {
      rows[t * kLanes + lane] = lane < block.count ? load_element(a.data, base + lane * a.channel + chunk.time(t) * a.time, a.dtype) : 0.0f;
    }
  }
}

MAMBA_SSM_INLINE void store_rows(const Activation& a, const Block& block, const Chunk& chunk, const float* rows) {
  const std::int64_t base = block.batch * a.batch + block.channel * a.channel;
  if (a.channel == 1 || block.count == 1) {
    for (int t = 0; t < chunk.steps; ++t) {
      store_elements(a.data, base + chunk.time(t) * a.time, a.dtype, block.count, load(rows + t * kLanes));
    }
    return;
  }
  int t = 0;
  if (a.time == 1) {
    for (; t + kLanes <= chunk.steps; t += kLanes) {
      vfloat tile[kLanes];
      for (int i = 0; i < kLanes; ++i) tile[i] = load(rows + (t + (chunk.reverse ? kLanes - 1 - i : i)) * kLanes);
      transpose(tile);
      const std::int64_t start = chunk.reverse ? chunk.time(t + kLanes - 1) : chunk.time(t);
      for (int lane = 0; lane < block.count; ++lane) {
        store_elements(a.data, base + lane * a.channel + start, a.dtype, kLanes, tile[lane]);
      }
    }
  }
  for (; t < chunk.steps; ++t) {
    for (int lane = 0; lane < block.count; ++lane) {
      store_element(a.data, base + lane * a.channel + chunk.time(t) * a.time, a.dtype, rows[t * kLanes + lane]);
    }
  }
}

// Rows of B or C over a chunk, [step][state] in fp32. Points into the tensor itself where that is already so.
struct StateRows {
  const float* data;
  std::int64_t stride;
};

MAMBA_SSM_INLINE StateRows stage_state_rows(const InputMatrix& m, std::int64_t batch, std::int64_t group,
                                            const Chunk& chunk, std::int64_t states, float* buffer) {
  const std::int64_t base = batch * m.batch + group * m.group;
  if (m.dtype == Dtype::f32 && m.state == 1) {
    return {static_cast<const float*>(m.data) + base + chunk.time(0) * m.time, chunk.reverse ? -m.time : m.time};
  }
  for (int t = 0; t < chunk.steps; ++t) {
    const std::int64_t row = base + chunk.time(t) * m.time;
    std::int64_t n = 0;
    if (m.state == 1) {
      for (; n + kLanes <= states; n += kLanes) {
        store(buffer + t * states + n, load_elements(m.data, row + n, m.dtype, kLanes));
      }
    }
    for (; n < states; ++n) buffer[t * states + n] = load_element(m.data, row + n * m.state, m.dtype);
  }
  return {buffer, states};
}

// B and C of one state over a chunk, in either form: a scalar per step that all lanes share, or a constant per lane.
// (The choice is invariant in the loop over steps, and the compiler takes it out.)
template <bool Constant>
struct StateColumn {
  const float* data;
  std::int64_t stride;
  vfloat value;
  MAMBA_SSM_INLINE vfloat operator[](int step) const {
    if constexpr (Constant) {
      return value;
    } else {
      return splat(data[step * stride]);
    }
  }
};

// A (channels, states) and the constant forms of B and C: one state of the block's channels.
MAMBA_SSM_INLINE vfloat load_channels(const float* matrix, std::int64_t states, const Block& block, std::int64_t n) {
  vfloat v{};
  for (int lane = 0; lane < block.count; ++lane) v[lane] = matrix[(block.channel + lane) * states + n];
  return v;
}
MAMBA_SSM_INLINE void store_channels(float* matrix, std::int64_t states, const Block& block, std::int64_t n, vfloat v) {
  for (int lane = 0; lane < block.count; ++lane) matrix[(block.channel + lane) * states + n] = v[lane];
}
MAMBA_SSM_INLINE vfloat load_constant(const InputMatrix& m, const Block& block, std::int64_t n) {
  vfloat v{};
  for (int lane = 0; lane < block.count; ++lane) {
    v[lane] = load_element(m.data, (block.channel + lane) * m.group + n * m.state, m.dtype);
  }
  return v;
}

template <bool Constant>
MAMBA_SSM_INLINE StateColumn<Constant> column(const InputMatrix& m, const StateRows& rows, const Block& block, std::int64_t n) {
  if constexpr (Constant) {
    return {nullptr, 0, load_constant(m, block, n)};
  } else {
    return {rows.data + n, rows.stride, vfloat{}};
  }
}

// Δ of a chunk from the staged delta, in place.
MAMBA_SSM_INLINE void apply_delta_rule(const ScanParams& p, vfloat bias, int steps, float* delta) {
  for (int t = 0; t < steps; ++t) {
    const vfloat raw = load(delta + t * kLanes) + bias;
    store(delta + t * kLanes, p.delta_softplus ? softplus(raw) : raw);
  }
}

MAMBA_SSM_INLINE vfloat load_parameter(const float* parameter, const Block& block) {
  return parameter == nullptr ? vfloat{} : load_elements(parameter, block.channel, Dtype::f32, block.count);
}

// ---- forward ---------------------------------------------------------------------------------------------------

// The steps of `Unroll` neighbouring states, side by side so that their chains of dependent operations overlap.
template <class Method, int Unroll, bool ConstantB, bool ConstantC>
MAMBA_SSM_INLINE void scan_states(const ScanParams& p, const Block& block, const StateRows& B_rows, const StateRows& C_rows,
                                  std::int64_t n, int steps, const float* __restrict delta, const float* __restrict u,
                                  float* __restrict state, float* __restrict y) {
  decltype(Method::prepare(vfloat{})) k[Unroll];
  StateColumn<ConstantB> B[Unroll];
  StateColumn<ConstantC> C[Unroll];
  vfloat h[Unroll];
  for (int j = 0; j < Unroll; ++j) {
    k[j] = Method::prepare(load_channels(p.A, p.states, block, n + j));
    B[j] = column<ConstantB>(p.B, B_rows, block, n + j);
    C[j] = column<ConstantC>(p.C, C_rows, block, n + j);
    h[j] = load(state + (n + j) * kLanes);
  }
  for (int t = 0; t < steps; ++t) {
    const vfloat delta_t = load(delta + t * kLanes);
    const vfloat u_t = load(u + t * kLanes);
    vfloat sum = load(y + t * kLanes);
    for (int j = 0; j < Unroll; ++j) {
      const auto step = Method::forward(delta_t, k[j]);
      h[j] = step.a_bar * h[j] + (step.c * u_t) * B[j][t];
      sum += C[j][t] * h[j];
    }
    store(y + t * kLanes, sum);
  }
  for (int j = 0; j < Unroll; ++j) store(state + (n + j) * kLanes, h[j]);
}

template <class Method, bool ConstantB, bool ConstantC>
void forward_block(const ScanParams& p, const Block& block, std::int64_t group, ScanScratch scratch) {
  constexpr int kUnroll = kLanes == 16 ? 4 : 2;
  const vfloat bias = load_parameter(p.delta_bias, block);
  const vfloat skip = load_parameter(p.D, block);
  float* delta = scratch.rows(0);
  float* u = scratch.rows(1);
  float* y = scratch.rows(2);
  float* other = scratch.rows(3);  // addend, then z
  float* state = scratch.state;

  const std::int64_t state_offset = block.batch * p.channels * p.states;
  for (std::int64_t n = 0; n < p.states; ++n) {
    store(state + n * kLanes,
          p.initial_state == nullptr ? vfloat{} : load_channels(p.initial_state + state_offset, p.states, block, n));
  }
  for (std::int64_t first = 0; first < p.length; first += p.chunk) {
    const Chunk chunk{first, static_cast<int>(p.chunk < p.length - first ? p.chunk : p.length - first), p.length, p.reverse};
    if (p.checkpoints != nullptr) {
      const std::int64_t chunks = (p.length + p.chunk - 1) / p.chunk;
      const std::int64_t base = (block.batch * chunks + first / p.chunk) * p.states * p.channels + block.channel;
      for (std::int64_t n = 0; n < p.states; ++n) {
        store_elements(p.checkpoints, base + n * p.channels, Dtype::f32, block.count, load(state + n * kLanes));
      }
    }
    load_rows(p.delta, block, chunk, delta);
    apply_delta_rule(p, bias, chunk.steps, delta);
    load_rows(p.u, block, chunk, u);
    if (p.addend.data != nullptr) load_rows(p.addend, block, chunk, other);
    for (int t = 0; t < chunk.steps; ++t) {
      const vfloat start = skip * load(u + t * kLanes);
      store(y + t * kLanes, p.addend.data == nullptr ? start : start + load(other + t * kLanes));
    }
    StateRows B_rows{}, C_rows{};
    if constexpr (!ConstantB) B_rows = stage_state_rows(p.B, block.batch, group, chunk, p.states, scratch.B);
    if constexpr (!ConstantC) C_rows = stage_state_rows(p.C, block.batch, group, chunk, p.states, scratch.C);
    std::int64_t n = 0;
    for (; n + kUnroll <= p.states; n += kUnroll) {
      scan_states<Method, kUnroll, ConstantB, ConstantC>(p, block, B_rows, C_rows, n, chunk.steps, delta, u, state, y);
    }
    for (; n < p.states; ++n) {
      scan_states<Method, 1, ConstantB, ConstantC>(p, block, B_rows, C_rows, n, chunk.steps, delta, u, state, y);
    }
    if (p.z.data != nullptr) load_rows(p.z, block, chunk, other);
    for (int t = 0; t < chunk.steps; ++t) {
      const vfloat gate = p.z.data == nullptr ? splat(p.scale) : silu(load(other + t * kLanes)) * p.scale;
      store(y + t * kLanes, load(y + t * kLanes) * gate);
    }
    store_rows(p.out, block, chunk, y);
  }
  for (std::int64_t n = 0; n < p.states; ++n) {
    store_channels(p.last_state + state_offset, p.states, block, n, load(state + n * kLanes));
  }
}

// ---- backward --------------------------------------------------------------------------------------------------

// Sum over lanes of a chunk's worth of vectors, one per step, added to `sums` at their positions in time.
MAMBA_SSM_INLINE void add_lane_sums(const float* __restrict vectors, const Chunk& chunk, float* __restrict sums) {
  int t = 0;
  for (; t + kLanes <= chunk.steps; t += kLanes) {
    vfloat tile[kLanes];
    for (int i = 0; i < kLanes; ++i) tile[i] = load(vectors + (t + (chunk.reverse ? kLanes - 1 - i : i)) * kLanes);
    float* target = sums + (chunk.reverse ? chunk.time(t + kLanes - 1) : chunk.time(t));
    store(target, load(target) + sum_lanes(tile));
  }
  if (t < chunk.steps) {
    vfloat tile[kLanes] = {};
    for (int i = 0; t + i < chunk.steps; ++i) tile[i] = load(vectors + (t + i) * kLanes);
    const vfloat rest = sum_lanes(tile);
    for (int i = 0; t + i < chunk.steps; ++i) sums[chunk.time(t + i)] += rest[i];
  }
}

MAMBA_SSM_INLINE vfloat sum_steps(const float* vectors, int steps) {
  vfloat sum{};
  for (int t = 0; t < steps; ++t) sum += load(vectors + t * kLanes);
  return sum;
}

template <class Method, bool ConstantB, bool ConstantC>
void backward_block(const ScanParams& p, const ScanGradients& g, const Block& block, std::int64_t group, std::int64_t split,
                    ScanScratch scratch) {
  const vfloat bias = load_parameter(p.delta_bias, block);
  const vfloat skip = load_parameter(p.D, block);
  float* delta = scratch.rows(0);
  float* u = scratch.rows(1);
  float* y = scratch.rows(2);
  float* other = scratch.rows(3);  // addend, then z
  float* dy = scratch.rows(4);
  float* dinput = scratch.rows(5);  // dL/du through the scan
  float* ddelta = scratch.rows(6);
  float* h = scratch.rows(7);        // the state before each step
  float* a_bar = scratch.rows(8);
  float* dB = scratch.rows(9);
  float* dC = scratch.rows(10);
  float* slope = scratch.rows(11);
  float* c = scratch.rows(12);
  float* c_delta = scratch.rows(13);
  float* c_A = scratch.rows(14);
  float* adjoint = scratch.state;    // Ā_{t+1} g_{t+1} for each state

  const std::int64_t state_offset = block.batch * p.channels * p.states;
  float* dA = g.dA + state_offset;
  for (std::int64_t n = 0; n < p.states; ++n) {
    store(adjoint + n * kLanes,
          g.dlast_state == nullptr ? vfloat{} : load_channels(g.dlast_state + state_offset, p.states, block, n));
    store_channels(dA, p.states, block, n, vfloat{});
    if constexpr (ConstantB) store_channels(g.dB + state_offset, p.states, block, n, vfloat{});
    if constexpr (ConstantC) store_channels(g.dC + state_offset, p.states, block, n, vfloat{});
  }
  vfloat dD{}, dbias{};
  const std::int64_t chunks = (p.length + p.chunk - 1) / p.chunk;
  for (std::int64_t index = chunks - 1; index >= 0; --index) {
    const std::int64_t first = index * p.chunk;
    const Chunk chunk{first, static_cast<int>(p.chunk < p.length - first ? p.chunk : p.length - first), p.length, p.reverse};
    const int steps = chunk.steps;
    load_rows(p.delta, block, chunk, delta);
    apply_delta_rule(p, bias, steps, delta);
    load_rows(p.u, block, chunk, u);
    load_rows(g.dout, block, chunk, dy);
    if (p.z.data != nullptr) {
      if (p.addend.data != nullptr) load_rows(p.addend, block, chunk, y);
      load_rows(p.z, block, chunk, other);
    }
    for (int t = 0; t < steps; ++t) {
      const std::int64_t i = t * kLanes;
      vfloat gradient = load(dy + i) * p.scale;
      if (p.z.data != nullptr) {
        gradient *= silu(load(other + i));
        const vfloat start = skip * load(u + i);
        store(y + i, p.addend.data == nullptr ? start : start + load(y + i));
      }
      store(dy + i, gradient);
      dD += gradient * load(u + i);
      store(dinput + i, gradient * skip);
      store(ddelta + i, vfloat{});
    }
    StateRows B_rows{}, C_rows{};
    if constexpr (!ConstantB) B_rows = stage_state_rows(p.B, block.batch, group, chunk, p.states, scratch.B);
    if constexpr (!ConstantC) C_rows = stage_state_rows(p.C, block.batch, group, chunk, p.states, scratch.C);

    for (std::int64_t n = 0; n < p.states; ++n) {
      const vfloat A = load_channels(p.A, p.states, block, n);
      const auto k = Method::prepare(A);
      const auto B = column<ConstantB>(p.B, B_rows, block, n);
      const auto C = column<ConstantC>(p.C, C_rows, block, n);

      vfloat state = load_elements(p.checkpoints, ((block.batch * chunks + index) * p.states + n) * p.channels + block.channel,
                                   Dtype::f32, block.count);
      for (int t = 0; t < steps; ++t) {
        const std::int64_t i = t * kLanes;
        const auto step = Method::gradient(load(delta + i), k);
        store(h + i, state);
        store(a_bar + i, step.a_bar);
        store(slope + i, step.slope);
        store(c + i, step.c);
        store(c_delta + i, step.c_delta);
        store(c_A + i, step.c_A);
        state = step.a_bar * state + (step.c * load(u + i)) * B[t];
        const vfloat dy_t = load(dy + i);
        store(dC + i, dy_t * state);
        if (p.z.data != nullptr) store(y + i, load(y + i) + C[t] * state);
      }
      vfloat carried = load(adjoint + n * kLanes);
      vfloat dA_n{};
      for (int t = steps - 1; t >= 0; --t) {
        const std::int64_t i = t * kLanes;
        const vfloat delta_t = load(delta + i);
        const vfloat u_t = load(u + i);
        const vfloat gradient = C[t] * load(dy + i) + carried;  // dL/dh_t
        const vfloat through_state = gradient * load(h + i) * load(slope + i);
        const vfloat gB = gradient * B[t];
        const vfloat gBu = gB * u_t;
        const vfloat gain = load(c + i);
        store(dB + i, gradient * (gain * u_t));
        store(dinput + i, load(dinput + i) + gB * gain);
        store(ddelta + i, load(ddelta + i) + (through_state * A + gBu * load(c_delta + i)));
        dA_n += through_state * delta_t + gBu * load(c_A + i);
        carried = gradient * load(a_bar + i);
      }
      store(adjoint + n * kLanes, carried);
      store_channels(dA, p.states, block, n, load_channels(dA, p.states, block, n) + dA_n);
      const std::int64_t sums = (((block.batch * p.groups + group) * g.splits + split) * p.states + n) * p.length;
      if constexpr (ConstantB) {
        float* target = g.dB + state_offset;
        store_channels(target, p.states, block, n, load_channels(target, p.states, block, n) + sum_steps(dB, steps));
      } else {
        add_lane_sums(dB, chunk, g.dB + sums);
      }
      if constexpr (ConstantC) {
        float* target = g.dC + state_offset;
        store_channels(target, p.states, block, n, load_channels(target, p.states, block, n) + sum_steps(dC, steps));
      } else {
        add_lane_sums(dC, chunk, g.dC + sums);
      }
    }

    if (p.z.data != nullptr) {
      // `h` and `a_bar` are free again: the rows of dout and of dz.
      load_rows(g.dout, block, chunk, h);
      for (int t = 0; t < steps; ++t) {
        const std::int64_t i = t * kLanes;
        const vfloat z = load(other + i);
        store(a_bar + i, load(h + i) * p.scale * load(y + i) * silu_slope(z, sigmoid(z)));
      }
      store_rows(g.dz, block, chunk, a_bar);
    }
    if (g.daddend.data != nullptr) store_rows(g.daddend, block, chunk, dy);
    store_rows(g.du, block, chunk, dinput);
    if (p.delta_softplus) {
      load_rows(p.delta, block, chunk, h);
      for (int t = 0; t < steps; ++t) {
        const std::int64_t i = t * kLanes;
        store(ddelta + i, load(ddelta + i) * sigmoid(load(h + i) + bias));
      }
    }
    dbias += sum_steps(ddelta, steps);
    store_rows(g.ddelta, block, chunk, ddelta);
  }
  for (std::int64_t n = 0; n < p.states; ++n) {
    store_channels(g.dinitial_state + state_offset, p.states, block, n, load(adjoint + n * kLanes));
  }
  const std::int64_t channel = block.batch * p.channels + block.channel;
  if (g.dD != nullptr) store_elements(g.dD, channel, Dtype::f32, block.count, dD);
  if (g.ddelta_bias != nullptr) store_elements(g.ddelta_bias, channel, Dtype::f32, block.count, dbias);
}

// ---- tasks -----------------------------------------------------------------------------------------------------

// Task number -> batch element, group and the range of channels: (batch, group, split) in row-major order.
template <class Function>
MAMBA_SSM_INLINE void for_each_block(const ScanParams& p, std::int64_t task, std::int64_t splits, Function function) {
  const std::int64_t split = task % splits, group = task / splits % p.groups, batch = task / splits / p.groups;
  const std::int64_t per_group = p.channels / p.groups;
  const std::int64_t blocks = (per_group + kLanes - 1) / kLanes;
  for (std::int64_t i = blocks * split / splits; i < blocks * (split + 1) / splits; ++i) {
    const std::int64_t offset = i * kLanes;
    const int count = static_cast<int>(per_group - offset < kLanes ? per_group - offset : kLanes);
    function(Block{batch, group * per_group + offset, count}, group, split);
  }
}

template <class Method, bool ConstantB, bool ConstantC>
struct ForwardFunction {
  const ScanParams& p;
  ScanScratch scratch;
  MAMBA_SSM_INLINE void operator()(const Block& block, std::int64_t group, std::int64_t) const {
    forward_block<Method, ConstantB, ConstantC>(p, block, group, scratch);
  }
};
template <class Method, bool ConstantB, bool ConstantC>
struct BackwardFunction {
  const ScanParams& p;
  const ScanGradients& g;
  ScanScratch scratch;
  MAMBA_SSM_INLINE void operator()(const Block& block, std::int64_t group, std::int64_t split) const {
    backward_block<Method, ConstantB, ConstantC>(p, g, block, group, split, scratch);
  }
};

template <class Method, bool ConstantB, bool ConstantC>
void forward_task(const ScanParams& p, std::int64_t task, std::int64_t splits, const ScanScratch& scratch) {
  for_each_block(p, task, splits, ForwardFunction<Method, ConstantB, ConstantC>{p, scratch});
}
template <class Method, bool ConstantB, bool ConstantC>
void backward_task(const ScanParams& p, const ScanGradients& g, std::int64_t task, const ScanScratch& scratch) {
  for_each_block(p, task, g.splits, BackwardFunction<Method, ConstantB, ConstantC>{p, g, scratch});
}

template <class Method>
constexpr ScanMethodKernels method_kernels() {
  return {Method::name,
          {{forward_task<Method, false, false>, forward_task<Method, false, true>},
           {forward_task<Method, true, false>, forward_task<Method, true, true>}},
          {{backward_task<Method, false, false>, backward_task<Method, false, true>},
           {backward_task<Method, true, false>, backward_task<Method, true, true>}}};
}

#define MAMBA_SSM_ENTRY(Method) method_kernels<Method>(),
constexpr ScanMethodKernels kMethods[] = {MAMBA_SSM_DISCRETIZATIONS(MAMBA_SSM_ENTRY)};
#undef MAMBA_SSM_ENTRY

}  // namespace MAMBA_SSM_ISA
}  // namespace mamba_ssm
