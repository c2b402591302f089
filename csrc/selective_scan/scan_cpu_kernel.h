// The selective scan on SIMD lanes. One lane is one channel; a task walks neighbouring blocks of kLanes channels of one
// batch element and group through time together, chunk by chunk and in each chunk block by block, so that channel-last
// memory is read nearly in its order:
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

#include <initializer_list>
#include <type_traits>

#include "discretization.h"
#include "params.h"
#include "scan_cpu_table.h"
#include "simd.h"
#include "simd_math.h"

namespace mamba_ssm {
namespace MAMBA_SSM_ISA {

// The neighbouring channels that a task works on at one time.
struct Block {
  std::int64_t batch, group, channel;
  int count;  // channels in use; the lanes past them compute on zeros
};

// The blocks [first, last) of one batch element and group: what a task works on.
struct Run {
  std::int64_t batch, group, first, last;
  std::int64_t first_channel, group_end;  // of the group
  MAMBA_SSM_INLINE std::int64_t count() const { return last - first; }
  MAMBA_SSM_INLINE Block block(std::int64_t i) const {
    const std::int64_t channel = first_channel + (first + i) * kLanes, left = group_end - channel;
    return {batch, group, channel, static_cast<int>(left < kLanes ? left : kLanes)};
  }
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
      rows[t * kLanes + lane] =
          lane < block.count ? load_element(a.data, base + lane * a.channel + chunk.time(t) * a.time, a.dtype) : 0.0f;
    }
  }
}

// The rows of one activation that will be read or written next, asked for one by one while the scan computes.
// Channel-last rows lie a page apart, where no hardware prefetcher follows; the other layouts need no help.
struct NextRows {
  const char* first = nullptr;
  std::int64_t stride = 0;  // bytes
  MAMBA_SSM_INLINE void prefetch(int step) const { __builtin_prefetch(first + step * stride, 0, 2); }
};
MAMBA_SSM_INLINE NextRows next_rows(const Activation& a, const Block& block, const Chunk& chunk) {
  if (a.data == nullptr || a.channel != 1) return {};
  const int size = element_size(a.dtype);
  const std::int64_t start = block.batch * a.batch + block.channel + chunk.time(0) * a.time;
  return {static_cast<const char*>(a.data) + start * size, (chunk.reverse ? -a.time : a.time) * size};
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

// A chunk's rows of an activation: in place where they are fp32, channel-last and full, else in a buffer.
struct RowView {
  float* data = nullptr;
  std::int64_t stride = 0;
  MAMBA_SSM_INLINE vfloat read(int step) const { return load(data + step * stride); }
  MAMBA_SSM_INLINE void write(int step, vfloat v) const { store(data + step * stride, v); }
};
MAMBA_SSM_INLINE bool readable_in_place(const Activation& a, const Block& block) {
  return a.channel == 1 && a.dtype == Dtype::f32 && block.count == kLanes;
}
MAMBA_SSM_INLINE RowView in_place(const Activation& a, const Block& block, const Chunk& chunk) {
  const std::int64_t start = block.batch * a.batch + block.channel + chunk.time(0) * a.time;
  return {static_cast<float*>(a.data) + start, chunk.reverse ? -a.time : a.time};
}
MAMBA_SSM_INLINE RowView read_view(const Activation& a, const Block& block, const Chunk& chunk, float* buffer) {
  if (readable_in_place(a, block)) return in_place(a, block, chunk);
  load_rows(a, block, chunk, buffer);
  return {buffer, kLanes};
}
// Write all rows of the view, then finish_writing.
MAMBA_SSM_INLINE RowView write_view(const Activation& a, const Block& block, const Chunk& chunk, float* buffer) {
  return readable_in_place(a, block) ? in_place(a, block, chunk) : RowView{buffer, kLanes};
}
MAMBA_SSM_INLINE void finish_writing(const Activation& a, const Block& block, const Chunk& chunk, const RowView& view) {
  if (!readable_in_place(a, block)) store_rows(a, block, chunk, view.data);
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

// One row of lanes per state, from a matrix (channels, states) and back. `unused` fills the lanes past the block.
MAMBA_SSM_ONCE void load_states(const float* matrix, std::int64_t states, const Block& block, float* rows,
                                float unused = 0.0f) {
  for (std::int64_t n = 0; n < states; ++n) {
    vfloat v = splat(unused);
    if (matrix != nullptr) {
      for (int lane = 0; lane < block.count; ++lane) v[lane] = matrix[(block.channel + lane) * states + n];
    }
    store(rows + n * kLanes, v);
  }
}
MAMBA_SSM_ONCE void store_states(float* matrix, std::int64_t states, const Block& block, const float* rows) {
  for (std::int64_t n = 0; n < states; ++n) {
    for (int lane = 0; lane < block.count; ++lane)
      matrix[(block.channel + lane) * states + n] = rows[n * kLanes + lane];
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

MAMBA_SSM_INLINE vfloat load_parameter(const float* parameter, const Block& block) {
  return parameter == nullptr ? vfloat{} : load_elements(parameter, block.channel, Dtype::f32, block.count);
}

// Rows of delta_weight · delta_input over a chunk, a few steps at a time so that each row of weights is read once for
// all of them.
MAMBA_SSM_ONCE void project_delta(const StateRows& input, const float* weight, std::int64_t rank, int steps,
                                  float* rows) {
  constexpr int kSteps = 8;
  for (int t = 0; t < steps; t += kSteps) {
    const int count = steps - t < kSteps ? steps - t : kSteps;
    const float* row[kSteps];
    for (int i = 0; i < kSteps; ++i) row[i] = input.data + (t + (i < count ? i : 0)) * input.stride;
    vfloat sum[kSteps] = {};
    for (std::int64_t r = 0; r < rank; ++r) {
      const vfloat w = load(weight + r * kLanes);
      for (int i = 0; i < kSteps; ++i) sum[i] += w * row[i][r];
    }
    for (int i = 0; i < count; ++i) store(rows + (t + i) * kLanes, sum[i]);
  }
}

// delta of a chunk before bias and softplus: read where it lies, copied to `rows`, or projected into them.
MAMBA_SSM_INLINE RowView delta_view(const ScanParams& p, const Block& block, const Chunk& chunk,
                                    const ScanScratch& scratch, const float* weight, float* rows) {
  if (p.delta_weight == nullptr) return read_view(p.delta, block, chunk, rows);
  const StateRows input = stage_state_rows(p.delta_input, block.batch, 0, chunk, p.rank, scratch.delta_input);
  project_delta(input, weight, p.rank, chunk.steps, rows);
  return {rows, kLanes};
}

// Δ of a chunk, and dΔ/d delta for the backward pass (where `slope` is not null).
MAMBA_SSM_ONCE void apply_delta_rule(const ScanParams& p, vfloat bias, int steps, const RowView& raw, float* delta,
                                     float* slope) {
  if (!p.delta_softplus) {
    for (int t = 0; t < steps; ++t) store(delta + t * kLanes, raw.read(t) + bias);
    for (int t = 0; slope != nullptr && t < steps; ++t) store(slope + t * kLanes, splat(1.0f));
  } else if (slope == nullptr) {
    for (int t = 0; t < steps; ++t) store(delta + t * kLanes, softplus(raw.read(t) + bias).value);
  } else {
    for (int t = 0; t < steps; ++t) {
      const Softplus rule = softplus(raw.read(t) + bias);
      store(delta + t * kLanes, rule.value);
      store(slope + t * kLanes, rule.slope);
    }
  }
}

MAMBA_SSM_INLINE Chunk chunk_at(const ScanParams& p, std::int64_t first) {
  return {first, static_cast<int>(p.chunk < p.length - first ? p.chunk : p.length - first), p.length, p.reverse};
}
MAMBA_SSM_INLINE std::int64_t chunk_count(const ScanParams& p) { return (p.length + p.chunk - 1) / p.chunk; }
// The states of a block before a chunk lie together, in rows of its channels.
MAMBA_SSM_INLINE float* checkpoint(const ScanParams& p, const Block& block, std::int64_t chunk, std::int64_t n) {
  const std::int64_t chunks = chunk_count(p) - p.first_checkpoint;
  const std::int64_t row = (block.batch * chunks + chunk - p.first_checkpoint) * p.channels + block.channel;
  return p.checkpoints + row * p.states + n * block.count;
}

// The constant form, staged once per block, or the chunk of the varying form.
MAMBA_SSM_INLINE StateRows matrix_rows(const InputMatrix& m, const ScanParams& p, const Block& block,
                                       const Chunk& chunk, float* constant, float* buffer) {
  return m.constant ? StateRows{constant, 0} : stage_state_rows(m, block.batch, block.group, chunk, p.states, buffer);
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
  NextRows next[4];
};

MAMBA_SSM_INLINE bool all_at_least(const float* A, int rows, float smallest) {
  bool all = true;
  for (int i = 0; i < rows * kLanes; ++i) all &= A[i] >= smallest || A[i] <= -smallest;
  return all;
}

// The steps of `Unroll` neighbouring states, side by side so that their chains of dependent operations overlap.
template <class Method, int Unroll, bool ConstantB, bool ConstantC>
MAMBA_SSM_INLINE void scan_unrolled(const ForwardRows& rows, std::int64_t n, int steps) {
  const float* __restrict delta = rows.delta;
  const float* __restrict u = rows.u;
  float* __restrict y = rows.y;
  const NextRows next = rows.next[n / Unroll % 4];
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
    next.prefetch(t);
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
  for (; n + kUnroll <= states; n += kUnroll) {
    if constexpr (!std::is_same_v<Method, ForAnyA<Method>>) {
      if (!all_at_least(rows.A + n * kLanes, kUnroll, Method::kSmallestA)) {
        scan_unrolled<ForAnyA<Method>, kUnroll, ConstantB, ConstantC>(rows, n, steps);
        continue;
      }
    }
    scan_unrolled<Method, kUnroll, ConstantB, ConstantC>(rows, n, steps);
  }
  for (; n < states; ++n) scan_unrolled<ForAnyA<Method>, 1, ConstantB, ConstantC>(rows, n, steps);
}
using ScanStates = void (*)(const ForwardRows&, std::int64_t, int);

// The rows of one block that last from chunk to chunk.
struct ForwardBlock {
  float *A, *state, *B, *C, *delta_weight;
  MAMBA_SSM_INLINE ForwardBlock(const ScanScratch& scratch, std::int64_t i)
      : A(scratch.block_rows(i, 0)),
        state(scratch.block_rows(i, 1)),
        B(scratch.block_rows(i, 2)),
        C(scratch.block_rows(i, 3)),
        delta_weight(scratch.delta_weight(i)) {}
};

MAMBA_SSM_ONCE void begin_forward(const ScanParams& p, const Block& block, const ForwardBlock& rows) {
  const std::int64_t offset = block.batch * p.channels * p.states;
  load_states(p.A, p.states, block, rows.A, -1.0f);
  load_states(p.initial_state == nullptr ? nullptr : p.initial_state + offset, p.states, block, rows.state);
  if (p.B.constant) load_constant_matrix(p.B, p.states, block, rows.B);
  if (p.C.constant) load_constant_matrix(p.C, p.states, block, rows.C);
  if (p.delta_weight != nullptr) load_states(p.delta_weight, p.rank, block, rows.delta_weight);
}

// One chunk of one block; next_block at next is what the task does afterwards.
MAMBA_SSM_ONCE void forward_chunk(const ScanParams& p, ScanStates scan, const Block& block, const Chunk& chunk,
                                  const ForwardBlock& rows, const Block& next_block, const Chunk& next,
                                  const ScanScratch& scratch) {
  const vfloat bias = load_parameter(p.delta_bias, block);
  const vfloat skip = load_parameter(p.D, block);
  float *delta = scratch.step_rows(0), *u = scratch.step_rows(1), *y = scratch.step_rows(2);
  float* other = scratch.step_rows(3);  // addend, then z
  if (p.checkpoints != nullptr && chunk.first / p.chunk >= p.first_checkpoint) {
    for (std::int64_t n = 0; n < p.states; ++n) {
      store_elements(checkpoint(p, block, chunk.first / p.chunk, n), 0, Dtype::f32, block.count,
                     load(rows.state + n * kLanes));
    }
  }
  apply_delta_rule(p, bias, chunk.steps, delta_view(p, block, chunk, scratch, rows.delta_weight, delta), delta,
                   nullptr);
  const RowView u_view = read_view(p.u, block, chunk, u);
  if (p.addend.data == nullptr) {
    for (int t = 0; t < chunk.steps; ++t) {
      const vfloat u_t = u_view.read(t);
      store(u + t * kLanes, u_t);
      store(y + t * kLanes, skip * u_t);
    }
  } else {
    const RowView addend = read_view(p.addend, block, chunk, other);
    for (int t = 0; t < chunk.steps; ++t) {
      const vfloat u_t = u_view.read(t);
      store(u + t * kLanes, u_t);
      store(y + t * kLanes, skip * u_t + addend.read(t));
    }
  }
  scan({delta,
        u,
        y,
        rows.A,
        rows.state,
        matrix_rows(p.B, p, block, chunk, rows.B, scratch.B),
        matrix_rows(p.C, p, block, chunk, rows.C, scratch.C),
        {p.delta_weight == nullptr ? next_rows(p.delta, next_block, next) : next_rows(p.out, block, chunk),
         next_rows(p.u, next_block, next), next_rows(p.addend, next_block, next), next_rows(p.z, block, chunk)}},
       p.states, chunk.steps);
  const RowView out = write_view(p.out, block, chunk, y);
  if (p.z.data == nullptr) {
    for (int t = 0; t < chunk.steps; ++t) out.write(t, load(y + t * kLanes) * p.scale);
  } else {
    const RowView z = read_view(p.z, block, chunk, other);
    for (int t = 0; t < chunk.steps; ++t) out.write(t, load(y + t * kLanes) * (silu(z.read(t)) * p.scale));
  }
  finish_writing(p.out, block, chunk, out);
}

// ---- backward --------------------------------------------------------------------------------------------------

// The gradient of B or C at each step is a product of rows, summed over lanes: a·b, or a·b·c.
struct RowProduct {
  const float* a;
  const float* b;
  const float* c;  // or null
  MAMBA_SSM_INLINE vfloat operator()(std::int64_t step) const {
    const std::int64_t i = step * kLanes;
    return c == nullptr ? load(a + i) * load(b + i) : load(a + i) * load(b + i) * load(c + i);
  }
};

// Adds the lanes' sums of the chunk's products to `sums`, at their positions in time.
MAMBA_SSM_ONCE void add_lane_sums(const RowProduct& product, const Chunk& chunk, float* sums) {
  int t = 0;
  for (; t + kLanes <= chunk.steps; t += kLanes) {
    const int earliest = chunk.reverse ? t + kLanes - 1 : t;  // in time
    float* target = sums + chunk.time(earliest);
    store(target, load(target) + sum_lanes<kLanes>(product, earliest, chunk.reverse ? -1 : 1));
  }
  for (; t < chunk.steps; ++t) {
    const vfloat v = product(t);
    float sum = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) sum += v[lane];
    sums[chunk.time(t)] += sum;
  }
}

// Adds the products' sum over the chunk's steps to the row `sums`.
MAMBA_SSM_ONCE void add_step_sums(const RowProduct& product, const Chunk& chunk, float* sums) {
  vfloat sum{};
  for (int t = 0; t < chunk.steps; ++t) sum += product(t);
  store(sums, load(sums) + sum);
}

constexpr int kAdjointUnroll = 2;

struct BackwardRows {
  const float* delta;
  const float* u;
  const float* dy;
  float* y;       // null where no gate needs it
  float* du;      // summed over the states: g c B, or where c = Δ only g B, from which ddelta gets its share afterwards
  float* ddelta;  // summed over the states
  const float* A;
  float* adjoint;  // Ā_{t+1} g_{t+1}
  float* dA;
  StateRows B, C;
  struct State {
    float* h;  // after each step; one row more in front, the state before the chunk
    float* g;  // dL/dh
    float* a_bar;
    float* slope;
    float* c;
    float* c_delta;
    float* c_A;
  } state[kAdjointUnroll];
  NextRows next[8];
};

// `Unroll` neighbouring states over a chunk: their values again from the one before the chunk, then the adjoint from
// the last step to the first.
template <class Method, int Unroll, bool ConstantB, bool ConstantC>
void adjoint_states(const BackwardRows& rows, std::int64_t n, int steps) {
  const float* __restrict delta = rows.delta;
  const float* __restrict u = rows.u;
  const float* __restrict dy = rows.dy;
  float* __restrict y = rows.y;
  float* __restrict du = rows.du;
  float* __restrict ddelta = rows.ddelta;
  const NextRows next = rows.next[n / Unroll % 8];
  BackwardRows::State s[Unroll];
  decltype(gradient_coefficients<Method>(vfloat{})) k[Unroll];
  StateColumn<ConstantB> B[Unroll];
  StateColumn<ConstantC> C[Unroll];
  vfloat A[Unroll], h[Unroll], carried[Unroll], dA[Unroll];
  for (int j = 0; j < Unroll; ++j) {
    s[j] = rows.state[j];
    A[j] = load(rows.A + (n + j) * kLanes);
    k[j] = gradient_coefficients<Method>(A[j]);
    B[j] = StateColumn<ConstantB>(rows.B, n + j);
    C[j] = StateColumn<ConstantC>(rows.C, n + j);
    h[j] = load(s[j].h - kLanes);
    carried[j] = load(rows.adjoint + (n + j) * kLanes);
    dA[j] = vfloat{};  // summed chunk by chunk: the rounding error grows with the chunk, not with the sequence
  }

  for (int t = 0; t < steps; ++t) {
    const std::int64_t i = t * kLanes;
    const vfloat delta_t = load(delta + i), u_t = load(u + i);
    next.prefetch(t);
    vfloat sum{};
    for (int j = 0; j < Unroll; ++j) {
      const auto step = Method::gradient(delta_t, k[j]);
      h[j] = step.a_bar * h[j] + (step.c * u_t) * B[j][t];
      sum += C[j][t] * h[j];
      store(s[j].h + i, h[j]);
      store(s[j].a_bar + i, step.a_bar);
      if constexpr (!Method::kSlopeIsABar) store(s[j].slope + i, step.slope);
      if constexpr (!Method::kInputIsDelta) {
        store(s[j].c + i, step.c);
        store(s[j].c_delta + i, step.c_delta);
        store(s[j].c_A + i, step.c_A);
      }
    }
    if (y != nullptr) store(y + i, load(y + i) + sum);
  }

  for (int t = steps - 1; t >= 0; --t) {
    const std::int64_t i = t * kLanes;
    const vfloat delta_t = load(delta + i), dy_t = load(dy + i);
    [[maybe_unused]] const vfloat u_t = load(u + i);
    vfloat du_t = load(du + i), ddelta_t = load(ddelta + i);
    for (int j = 0; j < Unroll; ++j) {
      const vfloat a_bar = load(s[j].a_bar + i);
      const vfloat g = C[j][t] * dy_t + carried[j];
      carried[j] = g * a_bar;
      store(s[j].g + i, g);
      vfloat through_state = load(s[j].h + i - kLanes);
      if constexpr (Method::kSlopeIsABar) {
        through_state *= carried[j];
      } else {
        through_state *= g * load(s[j].slope + i);
      }
      ddelta_t += through_state * A[j];
      dA[j] += through_state * delta_t;
      if constexpr (Method::kInputIsDelta) {
        du_t += g * B[j][t];
      } else {
        const vfloat gB = g * B[j][t], gBu = gB * u_t;
        du_t += gB * load(s[j].c + i);
        ddelta_t += gBu * load(s[j].c_delta + i);
        dA[j] += gBu * load(s[j].c_A + i);
      }
    }
    store(du + i, du_t);
    store(ddelta + i, ddelta_t);
  }
  for (int j = 0; j < Unroll; ++j) {
    store(rows.adjoint + (n + j) * kLanes, carried[j]);
    store(rows.dA + (n + j) * kLanes, load(rows.dA + (n + j) * kLanes) + dA[j]);
  }
}
using AdjointStates = void (*)(const BackwardRows&, std::int64_t n, int steps);
// The loops for one state and for kAdjointUnroll of them; `fast` is for |A| >= smallest_A and |x| <= largest_x.
struct AdjointLoops {
  AdjointStates one, unrolled, fast;
  float smallest_A, largest_x;
  bool input_is_delta;
  // For `count` rows of A and the largest |Δ| of each lane.
  MAMBA_SSM_INLINE AdjointStates choose(const float* A, int count, const float* largest_delta) const {
    if (count == 1) return one;
    if (fast == unrolled || !all_at_least(A, count, smallest_A)) return unrolled;
    bool all = true;
    for (int i = 0; i < count * kLanes; ++i) {
      const float x = A[i] * largest_delta[i % kLanes];
      all &= x >= -largest_x && x <= largest_x;
    }
    return all ? fast : unrolled;
  }
};

// The rows of one block that last from chunk to chunk.
struct BackwardBlock {
  float *A, *carried, *dA, *dB, *dC, *B, *C, *dD, *dbias, *delta_weight;
  MAMBA_SSM_INLINE BackwardBlock(const ScanScratch& scratch, std::int64_t i)
      : A(scratch.block_rows(i, 0)),
        carried(scratch.block_rows(i, 1)),
        dA(scratch.block_rows(i, 2)),
        dB(scratch.block_rows(i, 3)),
        dC(scratch.block_rows(i, 4)),
        B(scratch.block_rows(i, 5)),
        C(scratch.block_rows(i, 6)),
        dD(scratch.block_rows(i, 7)),
        dbias(scratch.block_rows(i, 8)),
        delta_weight(scratch.delta_weight(i)) {}
};

MAMBA_SSM_ONCE void begin_backward(const ScanParams& p, const ScanGradients& g, const Block& block,
                                   const BackwardBlock& state) {
  const std::int64_t offset = block.batch * p.channels * p.states;
  load_states(p.A, p.states, block, state.A, -1.0f);
  load_states(g.dlast_state == nullptr ? nullptr : g.dlast_state + offset, p.states, block, state.carried);
  for (float* rows : {state.dA, state.dB, state.dC}) load_states(nullptr, p.states, block, rows);
  for (float* row : {state.dD, state.dbias}) store(row, vfloat{});
  if (p.B.constant) load_constant_matrix(p.B, p.states, block, state.B);
  if (p.C.constant) load_constant_matrix(p.C, p.states, block, state.C);
  if (p.delta_weight != nullptr) load_states(p.delta_weight, p.rank, block, state.delta_weight);
}

// One chunk of one block; next_block at next is what the task does afterwards.
MAMBA_SSM_ONCE void backward_chunk(const ScanParams& p, const ScanGradients& g, const AdjointLoops& loops,
                                   const Block& block, std::int64_t split, const Chunk& chunk,
                                   const BackwardBlock& state, const Block& next_block, const Chunk& next,
                                   const ScanScratch& scratch) {
  const vfloat bias = load_parameter(p.delta_bias, block);
  const vfloat skip = load_parameter(p.D, block);
  const bool gated = p.z.data != nullptr;
  int row = 0;
  float *delta = scratch.step_rows(row++), *u = scratch.step_rows(row++), *dy = scratch.step_rows(row++),
        *y = scratch.step_rows(row++), *du = scratch.step_rows(row++), *ddelta = scratch.step_rows(row++),
        *dz = scratch.step_rows(row++),  // z at first
            *softplus_slope = scratch.step_rows(row++);
  BackwardRows rows{delta, u, dy, gated ? y : nullptr, du, ddelta, state.A, state.carried, state.dA, {}, {}, {}, {}};
  for (BackwardRows::State& s : rows.state) {
    s.h = scratch.step_rows(row++) + kLanes;
    for (float** pointer : {&s.g, &s.a_bar, &s.slope, &s.c, &s.c_delta, &s.c_A}) *pointer = scratch.step_rows(row++);
    if (loops.input_is_delta) s.c = delta;
  }

  apply_delta_rule(p, bias, chunk.steps, delta_view(p, block, chunk, scratch, state.delta_weight, delta), delta,
                   softplus_slope);
  const RowView u_view = read_view(p.u, block, chunk, u), dout = read_view(g.dout, block, chunk, dy);
  const RowView z_view = gated ? read_view(p.z, block, chunk, dz) : RowView{};
  vfloat chunk_dD{}, chunk_dbias{}, largest{};
  for (int t = 0; t < chunk.steps; ++t) {
    const std::int64_t i = t * kLanes;
    const vfloat step = abs(load(delta + i));
    largest = step > largest ? step : largest;
    const vfloat u_t = u_view.read(t);
    vfloat gradient = dout.read(t) * p.scale;
    store(u + i, u_t);
    if (gated) {
      const vfloat z = at_least(z_view.read(t), -87.0f), s = sigmoid(z);  // below, silu is 0
      store(dz + i, gradient * silu_slope(z, s));                         // but for the factor y
      gradient *= z * s;
      store(y + i, skip * u_t);
    }
    store(dy + i, gradient);
    chunk_dD += gradient * u_t;
    store(du + i, vfloat{});
    store(ddelta + i, vfloat{});
  }

  float largest_delta[kLanes];
  store(largest_delta, largest);

  rows.B = matrix_rows(p.B, p, block, chunk, state.B, scratch.B);
  rows.C = matrix_rows(p.C, p, block, chunk, state.C, scratch.C);
  int i = 0;
  for (const Activation& a : {p.delta, p.u, g.dout, p.z}) rows.next[i++] = next_rows(a, next_block, next);
  for (const Activation& a : {g.du, g.ddelta, g.dz, g.dz_addend}) rows.next[i++] = next_rows(a, block, chunk);
  const std::int64_t sums = ((block.batch * p.groups + block.group) * g.splits + split) * p.states * p.length;
  const std::int64_t index = chunk.first / p.chunk;
  const bool kept = index >= p.first_checkpoint;
  for (std::int64_t n = 0; n < p.states;) {
    const int count = p.states - n >= kAdjointUnroll ? kAdjointUnroll : 1;
    for (int j = 0; j < count; ++j) {
      vfloat before{};
      if (kept) before = load_elements(checkpoint(p, block, index, n + j), 0, Dtype::f32, block.count);
      store(rows.state[j].h - kLanes, before);
    }
    loops.choose(state.A + n * kLanes, count, largest_delta)(rows, n, chunk.steps);
    for (int j = 0; j < count; ++j, ++n) {
      const RowProduct for_B{rows.state[j].g, rows.state[j].c, u}, for_C{rows.state[j].h, dy, nullptr};
      if (p.B.constant) {
        add_step_sums(for_B, chunk, state.dB + n * kLanes);
      } else {
        add_lane_sums(for_B, chunk, g.dB + sums + n * p.length);
      }
      if (p.C.constant) {
        add_step_sums(for_C, chunk, state.dC + n * kLanes);
      } else {
        add_lane_sums(for_C, chunk, g.dC + sums + n * p.length);
      }
    }
  }

  const RowView du_out = write_view(g.du, block, chunk, du), ddelta_out = write_view(g.ddelta, block, chunk, ddelta);
  for (int t = 0; t < chunk.steps; ++t) {
    const std::int64_t i = t * kLanes;
    vfloat from_states = load(du + i), gradient = load(ddelta + i);
    if (loops.input_is_delta) {
      gradient += from_states * load(u + i);
      from_states *= load(delta + i);
    }
    gradient *= load(softplus_slope + i);
    chunk_dbias += gradient;
    ddelta_out.write(t, gradient);
    du_out.write(t, from_states + skip * load(dy + i));
  }
  finish_writing(g.ddelta, block, chunk, ddelta_out);
  finish_writing(g.du, block, chunk, du_out);
  store(state.dD, load(state.dD) + chunk_dD);
  store(state.dbias, load(state.dbias) + chunk_dbias);
  if (gated) {
    const bool has_addend = g.dz_addend.data != nullptr;
    const RowView addend = has_addend ? read_view(g.dz_addend, block, chunk, dy) : RowView{};
    const RowView dz_out = write_view(g.dz, block, chunk, dz);
    for (int t = 0; t < chunk.steps; ++t) {
      const vfloat gradient = load(dz + t * kLanes) * load(y + t * kLanes);
      dz_out.write(t, has_addend ? gradient + addend.read(t) : gradient);
    }
    finish_writing(g.dz, block, chunk, dz_out);
  }
}

MAMBA_SSM_ONCE void end_backward(const ScanParams& p, const ScanGradients& g, const Block& block,
                                 const BackwardBlock& state) {
  const std::int64_t offset = block.batch * p.channels * p.states;
  store_states(g.dinitial_state + offset, p.states, block, state.carried);
  store_states(g.dA + offset, p.states, block, state.dA);
  if (p.B.constant) store_states(g.dB + offset, p.states, block, state.dB);
  if (p.C.constant) store_states(g.dC + offset, p.states, block, state.dC);
  const std::int64_t channel = block.batch * p.channels + block.channel;
  if (g.dD != nullptr) store_elements(g.dD, channel, Dtype::f32, block.count, load(state.dD));
  if (g.ddelta_bias != nullptr) store_elements(g.ddelta_bias, channel, Dtype::f32, block.count, load(state.dbias));
}

// ---- tasks -----------------------------------------------------------------------------------------------------

// The loops of one method, for B and C varying (0) or constant (1): [B][C].
struct MethodLoops {
  const char* name;
  ScanStates scan[2][2];
  AdjointLoops adjoint[2][2];
};
template <class Method, bool ConstantB, bool ConstantC>
constexpr AdjointLoops adjoint_loops() {
  using Any = ForAnyA<Method>;
  float smallest_A = 0.0f, largest_x = 0.0f;
  if constexpr (!std::is_same_v<Method, Any>) {
    smallest_A = Method::kSmallestA;
    largest_x = Method::kLargestX;
  }
  return {adjoint_states<Any, 1, ConstantB, ConstantC>,
          adjoint_states<Any, kAdjointUnroll, ConstantB, ConstantC>,
          adjoint_states<Method, kAdjointUnroll, ConstantB, ConstantC>,
          smallest_A,
          largest_x,
          Method::kInputIsDelta};
}
template <class Method>
constexpr MethodLoops method_loops() {
  return {Method::name,
          {{scan_states<Method, false, false>, scan_states<Method, false, true>},
           {scan_states<Method, true, false>, scan_states<Method, true, true>}},
          {{adjoint_loops<Method, false, false>(), adjoint_loops<Method, false, true>()},
           {adjoint_loops<Method, true, false>(), adjoint_loops<Method, true, true>()}}};
}
#define MAMBA_SSM_ENTRY(Method) method_loops<Method>(),
constexpr MethodLoops kMethods[] = {MAMBA_SSM_DISCRETIZATIONS(MAMBA_SSM_ENTRY)};
#undef MAMBA_SSM_ENTRY

// A task is one batch element, one group and one of `runs` runs of its blocks, in row-major order. The blocks of a
// group are cut into `splits` equal parts (forward: into single blocks), and a run is a number of those.
MAMBA_SSM_INLINE std::int64_t blocks_per_group(const ScanParams& p) {
  return (p.channels / p.groups + kLanes - 1) / kLanes;
}
MAMBA_SSM_INLINE Run run_of(const ScanParams& p, std::int64_t task, std::int64_t first, std::int64_t last,
                            std::int64_t runs) {
  const std::int64_t group = task / runs % p.groups, batch = task / runs / p.groups, per_group = p.channels / p.groups;
  return {batch, group, first, last, group * per_group, (group + 1) * per_group};
}

inline void forward_task(const ScanParams& p, std::int64_t task, std::int64_t runs, const ScanScratch& scratch) {
  const ScanStates scan = kMethods[p.method].scan[p.B.constant][p.C.constant];
  const std::int64_t blocks = blocks_per_group(p), part = task % runs, chunks = chunk_count(p);
  const Run run = run_of(p, task, blocks * part / runs, blocks * (part + 1) / runs, runs);
  for (std::int64_t i = 0; i < run.count(); ++i) begin_forward(p, run.block(i), ForwardBlock(scratch, i));
  for (std::int64_t c = 0; c < chunks; ++c) {
    for (std::int64_t i = 0; i < run.count(); ++i) {
      const bool last = i + 1 == run.count();
      const Chunk next = chunk_at(p, (last && c + 1 < chunks ? c + 1 : c) * p.chunk);
      forward_chunk(p, scan, run.block(i), chunk_at(p, c * p.chunk), ForwardBlock(scratch, i),
                    run.block(last ? 0 : i + 1), next, scratch);
    }
  }
  for (std::int64_t i = 0; i < run.count(); ++i) {
    const std::int64_t offset = run.batch * p.channels * p.states;
    store_states(p.last_state + offset, p.states, run.block(i), ForwardBlock(scratch, i).state);
  }
}

inline void backward_task(const ScanParams& p, const ScanGradients& g, std::int64_t task, std::int64_t runs,
                          const ScanScratch& scratch) {
  const AdjointLoops& adjoint = kMethods[p.method].adjoint[p.B.constant][p.C.constant];
  const std::int64_t blocks = blocks_per_group(p), part = task % runs;
  const std::int64_t first_split = g.splits * part / runs, last_split = g.splits * (part + 1) / runs;
  const Run run = run_of(p, task, blocks * first_split / g.splits, blocks * last_split / g.splits, runs);
  const std::int64_t size = p.states * p.length;  // of a split's sums
  const std::int64_t sums = ((run.batch * p.groups + run.group) * g.splits + first_split) * size;
  const std::size_t bytes = (last_split - first_split) * size * sizeof(float);
  if (!p.B.constant) std::memset(g.dB + sums, 0, bytes);
  if (!p.C.constant) std::memset(g.dC + sums, 0, bytes);
  for (std::int64_t i = 0; i < run.count(); ++i) begin_backward(p, g, run.block(i), BackwardBlock(scratch, i));
  for (std::int64_t c = chunk_count(p) - 1; c >= 0; --c) {
    std::int64_t split = first_split;
    for (std::int64_t i = 0; i < run.count(); ++i) {
      while (run.first + i >= blocks * (split + 1) / g.splits) ++split;
      const bool last = i + 1 == run.count();
      const Chunk next = chunk_at(p, (last && c > 0 ? c - 1 : c) * p.chunk);
      backward_chunk(p, g, adjoint, run.block(i), split, chunk_at(p, c * p.chunk), BackwardBlock(scratch, i),
                     run.block(last ? 0 : i + 1), next, scratch);
    }
  }
  for (std::int64_t i = 0; i < run.count(); ++i) end_backward(p, g, run.block(i), BackwardBlock(scratch, i));
}

}  // namespace MAMBA_SSM_ISA
}  // namespace mamba_ssm
