// The CUDA implementation of the operators mamba_ssm::selective_scan_fwd and _bwd: checks, allocation, launches.
// The schemas and what the arguments mean are in mamba_ssm/ops/selective_scan.py.
//
// Compiled with MAMBA_SSM_CUDA_ON_CPU the kernels are host code, and the operators take CPU tensors: a test does that.
#include <tuple>

#include "row_sums.h"
#include "scan_arguments.h"
#include "scan_gpu.h"
#include "stable_cuda.h"

namespace mamba_ssm {
namespace {

using i64 = std::int64_t;

void check_launch(const char* error) {
  STD_TORCH_CHECK(error == nullptr, "selective_scan: the kernel did not start: ", error);
}

// See launch_scan_forward in scan_gpu.h.
bool is_packed(const Activation& a, const ScanParams& p) {
  if (a.data == nullptr) return true;
  const i64 vector = 16 / element_size(a.dtype);
  return (a.dtype == p.u.dtype || a.dtype == Dtype::f32) && a.channel == 1 && a.batch % vector == 0 &&
         a.time % vector == 0 && p.channels / p.groups % vector == 0 &&
         reinterpret_cast<std::uintptr_t>(a.data) % 16 == 0;
}
template <class... Activations>
bool all_packed(const ScanParams& p, const Activations&... a) {
  const bool same_dtype = p.delta.data == nullptr || p.delta.dtype == p.u.dtype;
  return same_dtype && !p.B.constant && !p.C.constant && (is_packed(a, p) && ...);
}

// Whether words of 4 bytes hold whole states of one position each.
bool is_aligned(const InputMatrix& m, i64 states) {
  const i64 word = 4 / element_size(m.dtype);
  return !m.constant && m.state == 1 && m.batch % word == 0 && m.group % word == 0 && m.time % word == 0 &&
         states % word == 0 && reinterpret_cast<std::uintptr_t>(m.data) % 4 == 0;
}

// Of delta_weight: its tile must fit into shared memory.
constexpr i64 kLargestRank = 256;

GpuScan make_launch(const ScanParams& p) {
  const i64 tiles = (p.channels / p.groups + tile::kChannels - 1) / tile::kChannels;
  constexpr i64 kMost = (1ll << 31) - tile::kSteps;
  STD_TORCH_CHECK(p.length < kMost && p.channels < kMost && p.batch * p.groups * tiles < kMost,
                  "selective_scan: length, or batch times channels, is too large for one launch");
  STD_TORCH_CHECK(p.rank <= kLargestRank, "delta_weight: got rank ", p.rank, "; expected at most ", kLargestRank);
  GpuScan scan{};
  scan.p = p;
  scan.tiles = static_cast<int>(tiles);
  scan.aligned_B = is_aligned(p.B, p.states);
  scan.aligned_C = is_aligned(p.C, p.states);
  scan.aligned_delta = p.rank > 0 && is_aligned(p.delta_input, p.rank);
  return scan;
}

i64 chunk_count(const ScanParams& p) { return (p.length + tile::kSteps - 1) / tile::kSteps; }

// What a split sequence needs: the segments' sums and the states between them.
class Segments {
 public:
  // `packed`: only packed launches are split. `blocks_each`: that fit on a multiprocessor.
  Segments(const Tensor& like, GpuScan& scan, bool packed, int blocks_each) {
    const ScanParams& p = scan.p;
    const int chunks = static_cast<int>(chunk_count(p));
    const i64 blocks = p.batch * p.groups * scan.tiles, slots = i64{blocks_each} * multiprocessor_count();
    const int wanted = packed ? tile::segment_count(blocks, chunks, slots) : 1;
    scan.segment_chunks = (chunks + wanted - 1) / wanted;
    scan.segments = (chunks + scan.segment_chunks - 1) / scan.segment_chunks;
    if (scan.segments == 1) return;
    for (Tensor* t : {&decay_, &local_, &states_})
      *t = new_floats(like, {p.batch, scan.segments, p.channels, p.states});
    scan.segment_states = float_data(states_);
  }
  // Fills scan.segment_states, for its states.
  void join(const GpuScan& scan, const Activation* dout, const float* state, void* stream) const {
    if (scan.segments == 1) return;
    const SegmentSums sums{float_data(decay_), float_data(local_)};
    check_launch(launch_segment_sums(scan, dout, sums, stream));
    check_launch(launch_join_segments(scan, dout != nullptr, sums, state, float_data(states_), stream));
  }

 private:
  Tensor decay_, local_, states_;
};

std::tuple<Tensor, Tensor, Tensor> scan_forward(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, OptionalTensor D,
                                                OptionalTensor z, OptionalTensor delta_bias,
                                                OptionalTensor delta_weight, OptionalTensor initial_state,
                                                OptionalTensor addend, double scale, bool delta_softplus, bool reverse,
                                                std::string method, bool float_out, bool save_checkpoints) {
  const DeviceOf device(u);
  A = contiguous_float(A, "A");
  D = contiguous_float(D, "D");
  delta_bias = contiguous_float(delta_bias, "delta_bias");
  delta_weight = contiguous_float(delta_weight, "delta_weight");
  initial_state = contiguous_float(initial_state, "initial_state");

  ScanParams p = make_params(u, delta, A, B, C, D, z, delta_bias, delta_weight, scale, delta_softplus, reverse, method);
  p.addend = activation(addend, "addend", u);
  check_shape(initial_state, {p.batch, p.channels, p.states}, "initial_state");
  p.initial_state = float_data(initial_state);
  p.chunk = tile::kSteps;
  Tensor out = new_activation(u, float_out ? ScalarType::Float : u.scalar_type());
  Tensor last_state = new_floats(u, {p.batch, p.channels, p.states});
  Tensor checkpoints = new_floats(u, {p.batch, save_checkpoints ? chunk_count(p) : 0, p.states, p.channels});
  p.out = activation(out, "out", u);
  p.last_state = float_data(last_state);
  p.checkpoints = save_checkpoints ? float_data(checkpoints) : nullptr;

  // The launches for the first states leave their sums to the next one, which adds them as an addend. The last one
  // applies scale and gate.
  Tensor sum;
  Activation sum_rows;
  if (p.states > tile::kStates) {
    sum = new_activation(u, ScalarType::Float);
    sum_rows = activation(sum, "sum", u);
  }
  GpuScan scan = make_launch(p);
  const bool packed = all_packed(p, p.u, p.delta, p.z, p.addend, p.out, sum_rows);
  const Segments segments(u, scan, packed, tile::kForwardBlocks);
  for (; scan.first_state < p.states; scan.first_state += tile::kStates) {
    const bool first = scan.first_state == 0, last = scan.first_state + tile::kStates >= p.states;
    scan.states = static_cast<int>(std::min<i64>(tile::kStates, p.states - scan.first_state));
    scan.p.D = first ? p.D : nullptr;
    scan.p.addend = first ? p.addend : sum_rows;
    scan.p.z = last ? p.z : Activation{};
    scan.p.scale = last ? p.scale : 1.0f;
    scan.p.out = last ? p.out : sum_rows;
    segments.join(scan, nullptr, p.initial_state, device.stream());
    check_launch((packed ? launch_scan_forward<true> : launch_scan_forward<false>)(scan, device.stream()));
  }
  return {out, last_state, checkpoints};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_backward(
    Tensor dout, OptionalTensor dlast_state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, OptionalTensor D,
    OptionalTensor z, OptionalTensor delta_bias, OptionalTensor delta_weight, OptionalTensor dz_addend,
    Tensor checkpoints, double scale, bool delta_softplus, bool reverse, std::string method, bool float_dz) {
  const DeviceOf device(u);
  A = contiguous_float(A, "A");
  D = contiguous_float(D, "D");
  delta_bias = contiguous_float(delta_bias, "delta_bias");
  delta_weight = contiguous_float(delta_weight, "delta_weight");
  dlast_state = contiguous_float(dlast_state, "dlast_state");

  ScanParams p = make_params(u, delta, A, B, C, D, z, delta_bias, delta_weight, scale, delta_softplus, reverse, method);
  STD_TORCH_CHECK(z.has_value() || !dz_addend.has_value(), "dz_addend without z");
  p.chunk = tile::kSteps;
  check_shape(dlast_state, {p.batch, p.channels, p.states}, "dlast_state");
  // empty where the forward ran with save_checkpoints=False
  check_shape(checkpoints, {p.batch, chunk_count(p), p.states, p.channels}, "checkpoints");
  p.checkpoints = float_data(checkpoints);
  GpuScan scan = make_launch(p);

  const auto floats = [&](bool wanted, std::vector<i64> size) {
    return wanted ? new_floats(u, size) : new_floats(u, {0});
  };
  Tensor du = new_activation(u, u.scalar_type());
  Tensor ddelta = new_activation(delta_weight.has_value() ? u : delta, delta.scalar_type());
  Tensor dz = z.has_value() ? new_activation(*z, float_dz ? ScalarType::Float : z->scalar_type()) : new_floats(u, {0});
  Tensor dinitial_state = new_floats(u, {p.batch, p.channels, p.states});
  const auto matrix = [&](const InputMatrix& m) {  // the states innermost in memory where the input has them so
    if (m.constant) return new_floats(u, {p.batch, p.channels, p.states});
    if (m.state != 1) return new_floats(u, {p.batch, p.groups, p.states, p.length});
    return torch::stable::transpose(new_floats(u, {p.batch, p.groups, p.length, p.states}), 2, 3);
  };
  Tensor dB = matrix(p.B), dC = matrix(p.C);
  // Partial sums, to be added in order: of every batch element, and of every launch.
  const i64 launches = (p.states + tile::kStates - 1) / tile::kStates;
  const auto sum_for = [&](bool wanted) {
    return wanted && launches > 1 ? new_activation(u, ScalarType::Float) : new_floats(u, {0});
  };
  Tensor sum_du = sum_for(true), sum_ddelta = sum_for(true), sum_dz = sum_for(z.has_value());
  const auto sum_rows = [&](const Tensor& sum) { return sum.dim() == 3 ? activation(sum, "sum", u) : Activation{}; };
  const Activation du_rows = activation(du, "du", u), ddelta_rows = activation(ddelta, "ddelta", u),
                   dout_rows = activation(dout, "dout", u), addend_rows = activation(dz_addend, "dz_addend", u),
                   dz_rows = z.has_value() ? activation(dz, "dz", u) : Activation{};
  const bool packed =
      all_packed(p, p.u, p.delta, p.z, dout_rows, du_rows, ddelta_rows, dz_rows, addend_rows, sum_rows(sum_du));
  const Segments segments(u, scan, packed, tile::kBackwardBlocks);
  const i64 rows = p.batch * scan.segments;
  Tensor dA = new_floats(u, {rows, p.channels, p.states});
  Tensor dD = floats(D.has_value(), {rows, p.channels});
  Tensor ddelta_bias = floats(delta_bias.has_value(), {launches * rows, p.channels});
  const bool any_matrix = !p.B.constant || !p.C.constant;
  Tensor partial = floats(any_matrix, {p.batch, p.groups, scan.tiles, p.length, 2 * tile::kStates});

  GpuScanGradients out{};
  out.partial = any_matrix ? float_data(partial) : nullptr;
  // The gradients are rounded to the dtype of B and C in the end: tf32 has four times the precision of bfloat16.
  out.exact = p.B.dtype != Dtype::bf16 || p.C.dtype != Dtype::bf16;
  ScanGradients& g = out.g;
  g.dout = dout_rows;
  g.dlast_state = float_data(dlast_state);
  g.dinitial_state = float_data(dinitial_state);
  g.dA = float_data(dA);
  g.dB = p.B.constant ? float_data(dB) : nullptr;
  g.dC = p.C.constant ? float_data(dC) : nullptr;

  // Each launch adds what the launches before it found for their states; the last one also has the terms of D, and
  // writes the results.
  for (i64 index = 0; index < launches; ++index) {
    const bool first = index == 0, last = index + 1 == launches;
    scan.first_state = static_cast<int>(index * tile::kStates);
    scan.states = static_cast<int>(std::min<i64>(tile::kStates, p.states - scan.first_state));
    scan.p.D = last ? p.D : nullptr;
    g.du = last ? du_rows : sum_rows(sum_du);
    g.ddelta = last ? ddelta_rows : sum_rows(sum_ddelta);
    g.dz = last ? dz_rows : sum_rows(sum_dz);
    g.dz_addend = first ? addend_rows : sum_rows(sum_dz);
    g.dD = last && D.has_value() ? float_data(dD) : nullptr;
    g.ddelta_bias = delta_bias.has_value() ? float_data(ddelta_bias) + index * rows * p.channels : nullptr;
    if (!first) {
      out.sum_du = sum_rows(sum_du);
      out.sum_ddelta = sum_rows(sum_ddelta);
    }
    segments.join(scan, &g.dout, g.dlast_state, device.stream());
    check_launch((packed ? launch_scan_backward<true> : launch_scan_backward<false>)(scan, out, device.stream()));
    const auto sum_tiles = [&](const InputMatrix& m, const Tensor& total, int column) {
      if (m.constant) return;
      const TileSums sums{
          out.partial,     p.batch,         p.groups,        scan.tiles,
          p.length,        column,          scan.states,     float_data(total) + scan.first_state * total.stride(2),
          total.stride(0), total.stride(1), total.stride(2), total.stride(3)};
      check_launch(launch_sum_tiles(sums, device.stream()));
    };
    sum_tiles(p.B, dB, 0);
    sum_tiles(p.C, dC, tile::kStates);
  }

  const auto sum = [&](const Tensor& rows, std::vector<i64> size) {
    Tensor total = new_floats(u, size);
    check_launch(launch_sum_rows(float_data(rows), rows.size(0), total.numel(), total.numel(), float_data(total),
                                 device.stream()));
    return total;
  };
  return {du,
          ddelta,
          sum(dA, {p.channels, p.states}),
          p.B.constant ? sum(dB, {p.channels, p.states}) : dB,
          p.C.constant ? sum(dC, {p.channels, p.states}) : dC,
          D.has_value() ? sum(dD, {p.channels}) : dD,
          dz,
          delta_bias.has_value() ? sum(ddelta_bias, {p.channels}) : ddelta_bias,
          dinitial_state};
}

}  // namespace
}  // namespace mamba_ssm

MAMBA_SSM_CUDA_IMPL(mamba_ssm, m) {
  m.impl("selective_scan_fwd", TORCH_BOX(&mamba_ssm::scan_forward));
  m.impl("selective_scan_bwd", TORCH_BOX(&mamba_ssm::scan_backward));
}
