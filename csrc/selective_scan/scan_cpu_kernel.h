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
MAMBA_SSM_ONCE void load_rows(const Activation& a, const Block& block, const Chunk& chunk, float* rows) {
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

MAMBA_SSM_ONCE void store_rows(const Activation& a, const Block& block, const Chunk& chunk, const float* rows) {
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

MAMBA_SSM_ONCE StateRows stage_state_rows(const InputMatrix& m, std::int64_t batch, std::int64_t group,
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

// One row of lanes per state, from a matrix (channels, states) and back.
MAMBA_SSM_ONCE void load_states(const float* matrix, std::int64_t states, const Block& block, float* rows) {
  for (std::int64_t n = 0; n < states; ++n) {
    vfloat v{};
    if (matrix != nullptr) {
      for (int lane = 0; lane < block.count; ++lane) v[lane] = matrix[(block.channel + lane) * states + n];
    }
    store(rows + n * kLanes, v);
  }
}
MAMBA_SSM_ONCE void store_states(float* matrix, std::int64_t states, const Block& block, const float* rows) {
  for (std::int64_t n = 0; n < states; ++n) {
    for (int lane = 0; lane < block.count; ++lane) matrix[(block.channel + lane) * states + n] = rows[n * kLanes + lane];
  }
}
MAMBA_SSM_ONCE void load_constant_matrix(const InputMatrix& m, std::int64_t states, const Block& block, float* rows) {
  for (std::int64_t n = 0; n < states; ++n) {
    vfloat v{};
    for (int lane = 0; lane < block.count; ++lane) {
      v[lane] = load_element(m.data, (block.channel + lane) * m.group + n * m.state, m.dtype);
    }
    store(rows + n * kLanes, v);
  }
}

// B or C of one state over a chunk: a scalar per step that all lanes share, or a constant per lane.
template <bool Constant>
struct StateColumn {
  const float* data;
  std::int64_t stride;
  vfloat value;
  MAMBA_SSM_INLINE StateColumn() = default;
  MAMBA_SSM_INLINE StateColumn(const StateRows& rows, std::int64_t n) {
    if constexpr (Constant) {
      value = load(rows.data + n * kLanes);
    } else {
      data = rows.data + n;
      stride = rows.stride;
    }
  }
  MAMBA_SSM_INLINE vfloat operator[](int step) const {
    if constexpr (Constant) {
      return value;
    } else {
      return splat(data[step * stride]);
    }
  }
};

// Δ of a chunk from the staged delta, in place.
MAMBA_SSM_ONCE void apply_delta_rule(const ScanParams& p, vfloat bias, int steps, float* delta) {
  for (int t = 0; t < steps; ++t) {
    const vfloat raw = load(delta + t * kLanes) + bias;
    store(delta + t * kLanes, p.delta_softplus ? softplus(raw) : raw);
  }
}

MAMBA_SSM_INLINE vfloat load_parameter(const float* parameter, const Block& block) {
  return parameter == nullptr ? vfloat{} : load_elements(parameter, block.channel, Dtype::f32, block.count);
}

MAMBA_SSM_INLINE Chunk chunk_at(const ScanParams& p, std::int64_t first) {
  return {first, static_cast<int>(p.chunk < p.length - first ? p.chunk : p.length - first), p.length, p.reverse};
}
MAMBA_SSM_INLINE std::int64_t chunk_count(const ScanParams& p) { return (p.length + p.chunk - 1) / p.chunk; }
MAMBA_SSM_INLINE float* checkpoint(const ScanParams& p, const Block& block, std::int64_t chunk, std::int64_t n) {
  return p.checkpoints + ((block.batch * chunk_count(p) + chunk) * p.states + n) * p.channels + block.channel;
}

// Points `rows` at the constant form, staged once per block, or stages the chunk of the varying form.
MAMBA_SSM_INLINE StateRows matrix_rows(const InputMatrix& m, const ScanParams& p, const Block& block, std::int64_t group,
                                       const Chunk& chunk, float* buffer) {
  return m.constant ? StateRows{buffer, 0} : stage_state_rows(m, block.batch, group, chunk, p.states, buffer);
}

// ---- forward ---------------------------------------------------------------------------------------------------

// What the loops over a chunk's steps read and write; rows of kLanes floats, per step or per state.
struct ForwardRows {
  const float* __restrict delta;
  const float* __restrict u;
  float* __restrict y;
  const float* A;
  float* state;
  StateRows B, C;
};

// The steps of `Unroll` neighbouring states, side by side so that their chains of dependent operations overlap.
template <class Method, int Unroll, bool ConstantB, bool ConstantC>
MAMBA_SSM_INLINE void scan_unrolled(const ForwardRows& rows, std::int64_t n, int steps) {
  const float* __restrict delta = rows.delta;
  const float* __restrict u = rows.u;
  float* __restrict y = rows.y;
  decltype(Method::prepare(vfloat{})) k[Unroll];
  StateColumn<ConstantB> B[Unroll];
  StateColumn<ConstantC> C[Unroll];
  vfloat h[Unroll];
  for (int j = 0; j < Unroll; ++j) {
    k[j] = Method::prepare(load(rows.A + (n + j) * kLanes));
    B[j] = StateColumn<ConstantB>(rows.B, n + j);
    C[j] = StateColumn<ConstantC>(rows.C, n + j);
    h[j] = load(rows.state + (n + j) * kLanes);
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
  for (int j = 0; j < Unroll; ++j) store(rows.state + (n + j) * kLanes, h[j]);
}

template <class Method, bool ConstantB, bool ConstantC>
void scan_states(const ForwardRows& rows, std::int64_t states, int steps) {
  constexpr int kUnroll = kLanes == 16 ? 4 : 2;
  std::int64_t n = 0;
  for (; n + kUnroll <= states; n += kUnroll) scan_unrolled<Method, kUnroll, ConstantB, ConstantC>(rows, n, steps);
  for (; n < states; ++n) scan_unrolled<Method, 1, ConstantB, ConstantC>(rows, n, steps);
}
using ScanStates = void (*)(const ForwardRows&, std::int64_t, int);

MAMBA_SSM_ONCE void forward_block(const ScanParams& p, ScanStates scan, const Block& block, std::int64_t group,
                                  const ScanScratch& scratch) {
  const vfloat bias = load_parameter(p.delta_bias, block);
  const vfloat skip = load_parameter(p.D, block);
  float* delta = scratch.step_rows(0);
  float* u = scratch.step_rows(1);
  float* y = scratch.step_rows(2);
  float* other = scratch.step_rows(3);  // addend, then z
  float* A = scratch.state_rows(0);
  float* state = scratch.state_rows(1);

  const std::int64_t batch_offset = block.batch * p.channels * p.states;
  load_states(p.A, p.states, block, A);
  load_states(p.initial_state == nullptr ? nullptr : p.initial_state + batch_offset, p.states, block, state);
  if (p.B.constant) load_constant_matrix(p.B, p.states, block, scratch.B);
  if (p.C.constant) load_constant_matrix(p.C, p.states, block, scratch.C);

  for (std::int64_t first = 0; first < p.length; first += p.chunk) {
    const Chunk chunk = chunk_at(p, first);
    if (p.checkpoints != nullptr) {
      for (std::int64_t n = 0; n < p.states; ++n) {
        store_elements(checkpoint(p, block, first / p.chunk, n), 0, Dtype::f32, block.count, load(state + n * kLanes));
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
    scan({delta, u, y, A, state, matrix_rows(p.B, p, block, group, chunk, scratch.B),
          matrix_rows(p.C, p, block, group, chunk, scratch.C)},
         p.states, chunk.steps);
    if (p.z.data != nullptr) load_rows(p.z, block, chunk, other);
    for (int t = 0; t < chunk.steps; ++t) {
      const vfloat gate = p.z.data == nullptr ? splat(p.scale) : silu(load(other + t * kLanes)) * p.scale;
      store(y + t * kLanes, load(y + t * kLanes) * gate);
    }
    store_rows(p.out, block, chunk, y);
  }
  store_states(p.last_state + batch_offset, p.states, block, state);
}

// ---- backward --------------------------------------------------------------------------------------------------

// Sum over lanes of a chunk's worth of vectors, one per step, added to `sums` at their positions in time.
MAMBA_SSM_ONCE void add_lane_sums(const float* __restrict vectors, const Chunk& chunk, float* __restrict sums) {
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

struct BackwardRows {
  const float* __restrict delta;
  const float* __restrict u;
  const float* __restrict dy;
  float* __restrict y;       // null where no gate needs it
  float* __restrict du;      // summed over the states
  float* __restrict ddelta;  // summed over the states
  float* __restrict dB;      // of one state
  float* __restrict dC;
  float* __restrict h;  // the state before each step, and the discretization at it
  float* __restrict a_bar;
  float* __restrict slope;
  float* __restrict c;
  float* __restrict c_delta;
  float* __restrict c_A;
  const float* A;
  float* adjoint;  // Ā_{t+1} g_{t+1}
  float* dA;
  StateRows B, C;
};

// One state over a chunk: its states again from `h` before the chunk, then the adjoint from the last step to the first.
template <class Method, bool ConstantB, bool ConstantC>
void adjoint_states(const BackwardRows& rows, std::int64_t n, vfloat h, int steps) {
  const float* __restrict delta = rows.delta;
  const float* __restrict u = rows.u;
  const float* __restrict dy = rows.dy;
  const vfloat A = load(rows.A + n * kLanes);
  const auto k = Method::prepare(A);
  const StateColumn<ConstantB> B(rows.B, n);
  const StateColumn<ConstantC> C(rows.C, n);

  for (int t = 0; t < steps; ++t) {
    const std::int64_t i = t * kLanes;
    const auto step = Method::gradient(load(delta + i), k);
    store(rows.h + i, h);
    store(rows.a_bar + i, step.a_bar);
    if constexpr (!Method::kInputIsDelta) {
      store(rows.slope + i, step.slope);
      store(rows.c + i, step.c);
      store(rows.c_delta + i, step.c_delta);
      store(rows.c_A + i, step.c_A);
    }
    h = step.a_bar * h + (step.c * load(u + i)) * B[t];
    store(rows.dC + i, load(dy + i) * h);
    if (rows.y != nullptr) store(rows.y + i, load(rows.y + i) + C[t] * h);
  }

  vfloat carried = load(rows.adjoint + n * kLanes);
  vfloat dA{};
  for (int t = steps - 1; t >= 0; --t) {
    const std::int64_t i = t * kLanes;
    const vfloat delta_t = load(delta + i);
    const vfloat u_t = load(u + i);
    const vfloat a_bar = load(rows.a_bar + i);
    const vfloat g = C[t] * load(dy + i) + carried;
    const vfloat gB = g * B[t];
    carried = g * a_bar;
    if constexpr (Method::kInputIsDelta) {
      const vfloat through_state = carried * load(rows.h + i);
      store(rows.dB + i, g * (delta_t * u_t));
      store(rows.du + i, load(rows.du + i) + gB * delta_t);
      store(rows.ddelta + i, load(rows.ddelta + i) + (through_state * A + gB * u_t));
      dA += through_state * delta_t;
    } else {
      const vfloat through_state = g * load(rows.h + i) * load(rows.slope + i);
      const vfloat gBu = gB * u_t;
      const vfloat c = load(rows.c + i);
      store(rows.dB + i, g * (c * u_t));
      store(rows.du + i, load(rows.du + i) + gB * c);
      store(rows.ddelta + i, load(rows.ddelta + i) + (through_state * A + gBu * load(rows.c_delta + i)));
      dA += through_state * delta_t + gBu * load(rows.c_A + i);
    }
  }
  store(rows.adjoint + n * kLanes, carried);
  store(rows.dA + n * kLanes, load(rows.dA + n * kLanes) + dA);
}
using AdjointStates = void (*)(const BackwardRows&, std::int64_t, vfloat, int);

MAMBA_SSM_ONCE void backward_block(const ScanParams& p, const ScanGradients& g, AdjointStates adjoint, const Block& block,
                                   std::int64_t group, std::int64_t split, const ScanScratch& scratch) {
  const vfloat bias = load_parameter(p.delta_bias, block);
  const vfloat skip = load_parameter(p.D, block);
  const bool gated = p.z.data != nullptr;
  float* z = scratch.step_rows(14);
  float* raw = scratch.step_rows(15);  // dout, or delta before bias and softplus
  float *delta = scratch.step_rows(0), *u = scratch.step_rows(1), *dy = scratch.step_rows(2), *y = scratch.step_rows(3),
        *du = scratch.step_rows(4), *ddelta = scratch.step_rows(5), *dB = scratch.step_rows(6), *dC = scratch.step_rows(7);
  float *A = scratch.state_rows(0), *carried = scratch.state_rows(1), *dA = scratch.state_rows(2),
        *dB_constant = scratch.state_rows(3), *dC_constant = scratch.state_rows(4);
  BackwardRows rows{delta, u, dy, gated ? y : nullptr, du, ddelta, dB, dC, scratch.step_rows(8), scratch.step_rows(9),
                    scratch.step_rows(10), scratch.step_rows(11), scratch.step_rows(12), scratch.step_rows(13), A, carried,
                    dA, {}, {}};

  const std::int64_t batch_offset = block.batch * p.channels * p.states;
  load_states(p.A, p.states, block, A);
  load_states(g.dlast_state == nullptr ? nullptr : g.dlast_state + batch_offset, p.states, block, carried);
  load_states(nullptr, p.states, block, dA);
  load_states(nullptr, p.states, block, dB_constant);
  load_states(nullptr, p.states, block, dC_constant);
  if (p.B.constant) load_constant_matrix(p.B, p.states, block, scratch.B);
  if (p.C.constant) load_constant_matrix(p.C, p.states, block, scratch.C);

  vfloat dD{}, dbias{};
  for (std::int64_t index = chunk_count(p) - 1; index >= 0; --index) {
    const Chunk chunk = chunk_at(p, index * p.chunk);
    load_rows(p.delta, block, chunk, raw);
    for (int t = 0; t < chunk.steps; ++t) store(delta + t * kLanes, load(raw + t * kLanes));
    apply_delta_rule(p, bias, chunk.steps, delta);
    load_rows(p.u, block, chunk, u);
    load_rows(g.dout, block, chunk, dy);
    if (gated) load_rows(p.z, block, chunk, z);
    if (gated && p.addend.data != nullptr) load_rows(p.addend, block, chunk, y);
    for (int t = 0; t < chunk.steps; ++t) {
      const std::int64_t i = t * kLanes;
      vfloat gradient = load(dy + i) * p.scale;
      if (gated) {
        const vfloat z_t = load(z + i), s = sigmoid(z_t);
        store(z + i, gradient * silu_slope(z_t, s));  // dL/dz, but for the factor y
        gradient *= z_t * s;
        const vfloat start = skip * load(u + i);
        store(y + i, p.addend.data == nullptr ? start : start + load(y + i));
      }
      store(dy + i, gradient);
      dD += gradient * load(u + i);
      store(du + i, gradient * skip);
      store(ddelta + i, vfloat{});
    }

    rows.B = matrix_rows(p.B, p, block, group, chunk, scratch.B);
    rows.C = matrix_rows(p.C, p, block, group, chunk, scratch.C);
    const std::int64_t sums = ((block.batch * p.groups + group) * g.splits + split) * p.states * p.length;
    for (std::int64_t n = 0; n < p.states; ++n) {
      adjoint(rows, n, load_elements(checkpoint(p, block, index, n), 0, Dtype::f32, block.count), chunk.steps);
      float* constant = dB_constant + n * kLanes;
      if (p.B.constant) {
        store(constant, load(constant) + sum_steps(dB, chunk.steps));
      } else {
        add_lane_sums(dB, chunk, g.dB + sums + n * p.length);
      }
      constant = dC_constant + n * kLanes;
      if (p.C.constant) {
        store(constant, load(constant) + sum_steps(dC, chunk.steps));
      } else {
        add_lane_sums(dC, chunk, g.dC + sums + n * p.length);
      }
    }

    for (int t = 0; t < chunk.steps; ++t) {
      const std::int64_t i = t * kLanes;
      if (gated) store(z + i, load(z + i) * load(y + i));
      const vfloat gradient = p.delta_softplus ? load(ddelta + i) * sigmoid(load(raw + i) + bias) : load(ddelta + i);
      dbias += gradient;
      store(ddelta + i, gradient);
    }
    if (gated) store_rows(g.dz, block, chunk, z);
    if (p.addend.data != nullptr) store_rows(g.daddend, block, chunk, dy);
    store_rows(g.du, block, chunk, du);
    store_rows(g.ddelta, block, chunk, ddelta);
  }
  store_states(g.dinitial_state + batch_offset, p.states, block, carried);
  store_states(g.dA + batch_offset, p.states, block, dA);
  if (p.B.constant) store_states(g.dB + batch_offset, p.states, block, dB_constant);
  if (p.C.constant) store_states(g.dC + batch_offset, p.states, block, dC_constant);
  const std::int64_t channel = block.batch * p.channels + block.channel;
  if (g.dD != nullptr) store_elements(g.dD, channel, Dtype::f32, block.count, dD);
  if (g.ddelta_bias != nullptr) store_elements(g.ddelta_bias, channel, Dtype::f32, block.count, dbias);
}

// ---- tasks -----------------------------------------------------------------------------------------------------

// The loops of one method, for B and C varying (0) or constant (1): [B][C].
struct MethodLoops {
  const char* name;
  ScanStates scan[2][2];
  AdjointStates adjoint[2][2];
};
template <class Method>
constexpr MethodLoops method_loops() {
  return {Method::name,
          {{scan_states<Method, false, false>, scan_states<Method, false, true>},
           {scan_states<Method, true, false>, scan_states<Method, true, true>}},
          {{adjoint_states<Method, false, false>, adjoint_states<Method, false, true>},
           {adjoint_states<Method, true, false>, adjoint_states<Method, true, true>}}};
}
#define MAMBA_SSM_ENTRY(Method) method_loops<Method>(),
constexpr MethodLoops kMethods[] = {MAMBA_SSM_DISCRETIZATIONS(MAMBA_SSM_ENTRY)};
#undef MAMBA_SSM_ENTRY

// A task is one batch element, one group and one of `splits` runs of its blocks, in row-major order.
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

inline void forward_task(const ScanParams& p, std::int64_t task, std::int64_t splits, const ScanScratch& scratch) {
  const ScanStates scan = kMethods[p.method].scan[p.B.constant][p.C.constant];
  for_each_block(p, task, splits, [&](const Block& block, std::int64_t group, std::int64_t) {
    forward_block(p, scan, block, group, scratch);
  });
}
inline void backward_task(const ScanParams& p, const ScanGradients& g, std::int64_t task, const ScanScratch& scratch) {
  const AdjointStates adjoint = kMethods[p.method].adjoint[p.B.constant][p.C.constant];
  for_each_block(p, task, g.splits, [&](const Block& block, std::int64_t group, std::int64_t split) {
    backward_block(p, g, adjoint, block, group, split, scratch);
  });
}

}  // namespace MAMBA_SSM_ISA
}  // namespace mamba_ssm
