// The CUDA implementation of the operators mamba_ssm::selective_scan_fwd and _bwd: checks, allocation, launches.
// The schemas and what the arguments mean are in mamba_ssm/ops/selective_scan.py.
//
// Compiled with MAMBA_SSM_CUDA_ON_CPU the kernels are host code, and the operators take CPU tensors: a test does that.
#include <cstdlib>
#include <string>

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

// ---- the fast kernels' tensors -------------------------------------------------------------------------------------

constexpr i64 kMostRowBytes = 1ll << 31;
constexpr i64 kMostSteps = (1ll << 31) - 64;  // so that a step of the chunk after next is an int too

bool is_aligned(const Tensor& t, i64 bytes) { return reinterpret_cast<std::uintptr_t>(t.data_ptr()) % bytes == 0; }

// Whether rows of `inner`, the tensor's dimension that lies side by side, begin at multiples of `bytes`, and a row's
// distance fits into an int.
bool has_rows(const Tensor& t, i64 inner, i64 time, i64 bytes) {
  const i64 size = element_size(kernel_dtype(t, "tensor"));
  bool aligned = t.stride(inner) == 1 && std::abs(t.stride(time)) * size < kMostRowBytes && is_aligned(t, bytes);
  for (i64 i = 0; i < t.dim(); ++i) aligned &= i == inner || t.stride(i) * size % bytes == 0;
  return aligned;
}
// In memory of its own, which begins at a multiple of 16 bytes; what is contiguous need not.
Tensor contiguous_copy(const Tensor& t) {
  Tensor copy = new_tensor(t, sizes_of(t));
  torch::stable::copy_(copy, t);
  return copy;
}
// (batch, channels, length) with the channels side by side, copied if need be.
Tensor channel_rows(const Tensor& t) {
  if (has_rows(t, 1, 2, 16)) return t;
  return transposed(contiguous_copy(transposed(t, 1, 2)), 1, 2);
}
// (batch, [groups,] states, length) with the states side by side, copied if need be.
Tensor state_rows(const Tensor& t) {
  const i64 state = t.dim() - 2, time = t.dim() - 1;
  if (has_rows(t, state, time, 8)) return t;
  return transposed(contiguous_copy(transposed(t, state, time)), state, time);
}
void to_channel_rows(OptionalTensor& t) {
  if (t.has_value()) t = channel_rows(*t);
}

// Whether the fast kernels take a problem with these tensors, after such copies.
bool is_fast(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
             std::initializer_list<const OptionalTensor*> like_u, std::initializer_list<const OptionalTensor*> floats,
             std::initializer_list<const Tensor*> states) {
  const i64 groups = std::max(B.dim() == 4 ? B.size(1) : 1, C.dim() == 4 ? C.size(1) : 1);
  const i64 vector = 16 / element_size(kernel_dtype(u, "u"));
  bool fast = u.numel() > 0 && B.dim() > 2 && C.dim() > 2 && A.size(1) % 4 == 0 && u.size(1) / groups % vector == 0;
  const auto same_dtype = [&](const Tensor& t) { return t.scalar_type() == u.scalar_type(); };
  fast &= same_dtype(delta) && same_dtype(B) && same_dtype(C);
  for (const OptionalTensor* t : like_u) fast &= !t->has_value() || same_dtype(**t);
  for (const OptionalTensor* t : floats) fast &= !t->has_value() || (*t)->scalar_type() == ScalarType::Float;
  for (const Tensor* t : states) fast &= is_aligned(*t, 16);
  const i64 largest = std::max(u.size(1), A.size(1));
  return fast && u.size(2) < kMostSteps && largest * 8 < kMostRowBytes && u.size(1) * A.size(1) * 4 < kMostRowBytes;
}

Tensor projected_delta(const Tensor& weight, const Tensor& input, const ScanParams& p, const Tensor& u, void* stream,
                       Scratch* scratch) {
  Tensor rows = new_tensor(u, {p.batch, p.length, p.channels}, u.scalar_type(), scratch);
  const DeltaProjection projection{p.delta_input, float_data(weight), p.batch,         p.channels,
                                   p.rank,        p.length,           rows.data_ptr(), p.u.dtype};
  check_launch(launch_project_delta(projection, stream));
  return transposed(rows, 1, 2);
}

GpuScan make_launch(const ScanParams& p, bool fast, i64 checkpoint_steps) {
  const i64 width = fast ? tile::kChannels : general_tile::kChannels;
  const i64 tiles = (p.channels / p.groups + width - 1) / width;
  STD_TORCH_CHECK(p.length < kMostSteps && p.channels < kMostSteps && p.batch * p.groups * tiles < kMostSteps,
                  "selective_scan: length, or batch times channels, is too large for one launch");
  GpuScan scan{};
  scan.p = p;
  scan.tiles = static_cast<int>(tiles);
  while (tile::kSteps << scan.checkpoint_shift < checkpoint_steps) ++scan.checkpoint_shift;
  STD_TORCH_CHECK(checkpoint_steps == 0 || tile::kSteps << scan.checkpoint_shift == checkpoint_steps,
                  "checkpoint_steps: got ", checkpoint_steps, "; expected 0 or a power of two from ", tile::kSteps,
                  " on");
  scan.checkpoints = static_cast<int>(count_checkpoints(p, checkpoint_steps));
  return scan;
}

// Whether the rows of a chunk of spread_tile, 16 steps at most, lie so near that an int leads to the next chunk's.
bool has_near_rows(const ScanParams& p) {
  const auto is_near = [](i64 time, Dtype dtype) { return std::abs(time) * element_size(dtype) < kMostRowBytes / 16; };
  bool near = is_near(p.channels, Dtype::f32) && is_near(p.B.time, p.B.dtype) && is_near(p.C.time, p.C.dtype);
  for (const Activation* a : {&p.u, &p.delta, &p.z, &p.addend, &p.out}) near &= is_near(a->time, a->dtype);
  return near;
}

// Lanes of a channel in the forward kernels for few channels, or 0 for the others. MAMBA_SSM_SCAN_LANES in the
// environment decides instead, for tests and measurements.
int spread_lanes(const ScanParams& p) {
  const char* wish = std::getenv("MAMBA_SSM_SCAN_LANES");
  if (wish == nullptr || *wish == 0) {
    return forward_lanes(p.batch * p.groups, p.channels / p.groups, p.length, multiprocessor_count());
  }
  for (int lanes : {0, 4, 8}) {
    if (wish == std::to_string(lanes)) return lanes;
  }
  STD_TORCH_CHECK(false, "MAMBA_SSM_SCAN_LANES: got '", wish, "'; expected 0, 4, 8 or nothing");
}

// What a split sequence needs: the segments' sums and the states between them.
class Segments {
 public:
  // `fast`: only fast launches are split.
  Segments(const Tensor& like, GpuScan& scan, bool fast) {
    const ScanParams& p = scan.p;
    const i64 chunks = (p.length + tile::kSteps - 1) / tile::kSteps, each = i64{1} << scan.checkpoint_shift;
    const i64 wanted = fast ? tile::segment_count(p.batch * p.groups * scan.tiles, chunks, multiprocessor_count()) : 1;
    const i64 segment_chunks = ((chunks + wanted - 1) / wanted + each - 1) / each * each;
    scan.segment_chunks = static_cast<int>(segment_chunks);
    scan.segments = static_cast<int>((chunks + segment_chunks - 1) / segment_chunks);
    if (scan.segments <= 1) {
      scan.segments = 1;
      return;
    }
    for (Tensor* t : {&decay_, &local_, &states_})
      *t = new_floats(like, {p.batch, scan.segments, p.channels, p.states});
    scan.segment_states = float_data(states_);
  }
  SegmentSums sums() const { return {float_data(decay_), float_data(local_)}; }
  float* states() const { return float_data(states_); }

 private:
  Tensor decay_, local_, states_;
};

}  // namespace

ScanResults scan_forward(ScanArguments a, OptionalTensor initial_state, OptionalTensor addend, bool float_out,
                         i64 checkpoint_steps, bool want_last_state, Scratch* scratch) {
  auto& [u, delta, A, B, C, D, z, delta_bias, delta_weight, scale, delta_softplus, reverse, method] = a;
  const DeviceOf device(u);
  a.make_contiguous();
  initial_state = contiguous_float(initial_state, "initial_state");
  ScanParams p = make_params(a);
  activation(addend, "addend", u);
  check_shape(initial_state, {p.batch, p.channels, p.states}, "initial_state");
  const Tensor original_u = u;
  if (delta_weight.has_value()) delta = projected_delta(*delta_weight, delta, p, u, device.stream(), scratch);
  const ScalarType out_dtype = float_out ? ScalarType::Float : u.scalar_type();
  const bool fast =
      is_fast(u, delta, A, B, C, {&z}, {&addend}, {&A, initial_state.has_value() ? &*initial_state : &A}) &&
      !(float_out && z.has_value());
  if (fast) {
    u = channel_rows(u), delta = channel_rows(delta), B = state_rows(B), C = state_rows(C);
    to_channel_rows(z);
    to_channel_rows(addend);
  }
  delta_weight.reset();
  p = make_params(a);
  p.addend = activation(addend, "addend", u);
  p.initial_state = float_data(initial_state);
  p.first_checkpoint = initial_state.has_value() ? 0 : 1;
  GpuScan scan = make_launch(p, fast, checkpoint_steps);
  Tensor out = new_activation(u, out_dtype);
  const Tensor last_state = want_last_state ? new_floats(u, {p.batch, p.channels, p.states}) : Tensor();
  Tensor checkpoints = new_floats(u, {p.batch, scan.checkpoints, p.states, p.channels});
  scan.p.out = p.out = activation(out, "out", u);
  scan.p.last_state = want_last_state ? float_data(last_state) : nullptr;
  scan.p.checkpoints = float_data(checkpoints);

  // The launches for the first states leave their sums to the next one, which adds them as an addend. The last one
  // applies scale and gate.
  Tensor sum;
  Activation sum_rows;
  if (p.states > tile::kStates) {
    sum = new_activation(u, ScalarType::Float);
    sum_rows = activation(sum, "sum", u);
  }
  const int lanes = fast && has_near_rows(scan.p) ? spread_lanes(p) : 0;
  const Segments segments(u, scan, fast && lanes == 0);
  for (; scan.first_state < p.states; scan.first_state += tile::kStates) {
    const bool first = scan.first_state == 0, last = scan.first_state + tile::kStates >= p.states;
    scan.states = static_cast<int>(std::min<i64>(tile::kStates, p.states - scan.first_state));
    scan.p.D = first ? p.D : nullptr;
    scan.p.addend = first ? p.addend : sum_rows;
    scan.p.z = last ? p.z : Activation{};
    scan.p.scale = last ? p.scale : 1.0f;
    scan.p.out = last ? p.out : sum_rows;
    if (!fast) {
      check_launch(launch_general_forward(scan, device.stream()));
      continue;
    }
    with_static_dtype(p.u.dtype, [&](auto dtype) {
      const auto run = [&](Output kind, const SegmentSums& sums) {
        check_launch(launch_scan_forward<dtype.value>(scan, kind, sums, device.stream()));
      };
      if (lanes > 0) {
        const Output kind = scan.p.z.data == nullptr ? Output::plain : Output::gated;
        return check_launch(launch_scan_spread<dtype.value>(scan, lanes, kind, device.stream()));
      }
      if (scan.segments > 1) {
        run(Output::none, segments.sums());
        check_launch(
            launch_join_segments(scan, false, segments.sums(), p.initial_state, segments.states(), device.stream()));
      }
      run(scan.p.z.data == nullptr ? Output::plain : Output::gated, {});
    });
  }
  return {like_memory_of(original_u, out), last_state, checkpoints};
}

ScanGradientResults scan_backward(ScanArguments a, Tensor dout, OptionalTensor dlast_state, OptionalTensor dz_addend,
                                  Tensor checkpoints, bool float_dz, i64 checkpoint_steps,
                                  const GradientTargets* targets) {
  auto& [u, delta, A, B, C, D, z, delta_bias, delta_weight, scale, delta_softplus, reverse, method] = a;
  const DeviceOf device(u);
  a.make_contiguous();
  dlast_state = contiguous_float(dlast_state, "dlast_state");
  ScanParams p = make_params(a);
  activation(dout, "dout", u);
  activation(dz_addend, "dz_addend", u);
  STD_TORCH_CHECK(z.has_value() || !dz_addend.has_value(), "dz_addend without z");
  check_shape(dlast_state, {p.batch, p.channels, p.states}, "dlast_state");
  const Tensor original_u = u, original_delta = delta_weight.has_value() ? u : delta, original_B = B, original_C = C;
  const OptionalTensor original_z = z;
  const ScalarType ddelta_dtype = delta.scalar_type();
  Scratch own_scratch(u);
  Scratch& scratch = targets == nullptr ? own_scratch : targets->passing;
  if (delta_weight.has_value()) delta = projected_delta(*delta_weight, delta, p, u, device.stream(), &scratch);
  const OptionalTensor given_dout = dout;
  const bool fast = is_fast(u, delta, A, B, C, {&z, &given_dout}, {&dz_addend},
                            {&A, &checkpoints, dlast_state.has_value() ? &*dlast_state : &A}) &&
                    ddelta_dtype == u.scalar_type();
  if (fast) {
    u = channel_rows(u), delta = channel_rows(delta), dout = channel_rows(dout), B = state_rows(B), C = state_rows(C);
    to_channel_rows(z);
    to_channel_rows(dz_addend);
  }
  delta_weight.reset();
  p = make_params(a);
  use_checkpoints(p, checkpoints, checkpoint_steps);
  GpuScan scan = make_launch(p, fast, checkpoint_steps);

  const auto result = [&](bool wanted, const Sizes& sizes) {
    if (targets != nullptr) return wanted ? targets->results.floats(sizes) : Tensor();
    return new_floats(u, wanted ? sizes : Sizes{0});
  };
  const auto floats = [&](bool wanted, i64 count) { return wanted ? scratch.float_memory(count) : nullptr; };
  Tensor du = new_activation(u, u.scalar_type());
  Tensor ddelta = new_activation(fast ? u : original_delta, ddelta_dtype, targets == nullptr ? nullptr : &scratch);
  const bool own_dz = targets == nullptr || float_dz;
  Tensor dz = !z.has_value() ? new_floats(u, {0})
              : !own_dz      ? targets->dz
                             : new_activation(*z, float_dz ? ScalarType::Float : z->scalar_type());
  Tensor dinitial_state = targets == nullptr ? new_floats(u, {p.batch, p.channels, p.states}) : Tensor();
  const auto matrix = [&](const Tensor& m) {  // the states innermost in memory where the input has them so
    if (m.dim() == 2) return new_floats(u, {p.batch, p.channels, p.states});
    if (m.stride(m.dim() - 2) != 1) return new_floats(u, {p.batch, p.groups, p.states, p.length});
    return transposed(new_floats(u, {p.batch, p.groups, p.length, p.states}), 2, 3);
  };
  Tensor dB = targets != nullptr ? targets->dB : matrix(original_B);
  Tensor dC = targets != nullptr ? targets->dC : matrix(original_C);
  // Partial sums, to be added in order: of every batch element, and of every launch.
  const i64 launches = (p.states + tile::kStates - 1) / tile::kStates;
  OptionalTensor sum_du, sum_ddelta, sum_dz;
  if (launches > 1) {
    for (OptionalTensor* sum : {&sum_du, &sum_ddelta, &sum_dz}) *sum = new_activation(u, ScalarType::Float);
  }
  const auto sum_rows = [&](const OptionalTensor& sum) { return activation(sum, "sum", u); };
  const Activation addend_rows = activation(dz_addend, "dz_addend", u),
                   dz_rows = z.has_value() ? activation(dz, "dz", u) : Activation{};
  const Segments segments(u, scan, fast);
  const i64 rows = p.batch * scan.segments;
  float* const dD = floats(D.has_value(), rows * p.channels);
  float* const ddelta_bias = floats(delta_bias.has_value(), launches * rows * p.channels);
  const bool any_matrix = !p.B.constant || !p.C.constant;
  const i64 warps = p.batch * p.groups * scan.tiles * scan.segments * tile::kWarps;
  constexpr i64 kWarpStates = tile::kWarpChannels * tile::kStates;

  GpuScanGradients out{};
  out.partial = floats(any_matrix, p.batch * p.groups * scan.tiles * p.length * 2 * tile::kStates);
  out.kept_states =
      floats(fast && scan.checkpoint_shift > 0, warps * ((i64{1} << scan.checkpoint_shift) - 1) * kWarpStates);
  ScanGradients& g = out.g;
  g.dout = activation(dout, "dout", u);
  g.dlast_state = float_data(dlast_state);
  g.dinitial_state = targets == nullptr ? float_data(dinitial_state) : nullptr;
  g.dA = floats(true, rows * p.channels * p.states);
  g.dB = p.B.constant ? float_data(dB) : nullptr;
  g.dC = p.C.constant ? float_data(dC) : nullptr;

  // Each launch adds what the launches before it found for their states; the last one also has the terms of D, and
  // writes the results.
  for (i64 index = 0; index < launches; ++index) {
    const bool first = index == 0, last = index + 1 == launches;
    scan.first_state = static_cast<int>(index * tile::kStates);
    scan.states = static_cast<int>(std::min<i64>(tile::kStates, p.states - scan.first_state));
    scan.p.D = last ? p.D : nullptr;
    g.du = last ? activation(du, "du", u) : sum_rows(sum_du);
    g.ddelta = last ? activation(ddelta, "ddelta", u) : sum_rows(sum_ddelta);
    g.dz = last || !z.has_value() ? dz_rows : sum_rows(sum_dz);
    g.dz_addend = first || !z.has_value() ? addend_rows : sum_rows(sum_dz);
    g.dD = last ? dD : nullptr;
    g.ddelta_bias = ddelta_bias != nullptr ? ddelta_bias + index * rows * p.channels : nullptr;
    if (!first) {
      out.sum_du = sum_rows(sum_du);
      out.sum_ddelta = sum_rows(sum_ddelta);
    }
    if (fast) {
      with_static_dtype(p.u.dtype, [&](auto dtype) {
        const auto run = [&](const SegmentSums* sums) {
          check_launch(launch_scan_backward<dtype.value>(scan, out, sums, device.stream()));
        };
        if (scan.segments > 1) {
          const SegmentSums sums = segments.sums();
          run(&sums);
          check_launch(launch_join_segments(scan, true, sums, g.dlast_state, segments.states(), device.stream()));
        }
        run(nullptr);
      });
    } else {
      check_launch(launch_general_backward(scan, out, device.stream()));
    }
    if (!any_matrix) continue;
    const auto target = [&](const InputMatrix& m, const Tensor& total) {
      if (m.constant) return TileSums::Target{};
      const Dtype dtype = kernel_dtype(total, "total");
      char* data = static_cast<char*>(total.data_ptr()) + scan.first_state * total.stride(2) * element_size(dtype);
      return TileSums::Target{data, dtype, total.stride(0), total.stride(1), total.stride(2), total.stride(3)};
    };
    const TileSums sums{out.partial, p.batch,     p.groups,        scan.tiles,
                        p.length,    scan.states, target(p.B, dB), target(p.C, dC)};
    check_launch(launch_sum_tiles(sums, device.stream()));
  }

  RowSums sums[kMostRowSums];
  int count = 0;
  const auto sum = [&](bool wanted, const float* parts, i64 row_count, const Sizes& sizes) {
    Tensor total = result(wanted, sizes);
    if (wanted && total.numel() > 0)
      sums[count++] = {parts, row_count, total.numel(), total.numel(), float_data(total)};
    return total;
  };
  const Tensor total_dA = sum(true, g.dA, rows, {p.channels, p.states});
  const Tensor total_dB = p.B.constant ? sum(true, g.dB, p.batch, {p.channels, p.states}) : dB;
  const Tensor total_dC = p.C.constant ? sum(true, g.dC, p.batch, {p.channels, p.states}) : dC;
  const Tensor total_dD = sum(D.has_value(), dD, rows, {p.channels});
  const Tensor total_ddelta_bias = sum(delta_bias.has_value(), ddelta_bias, launches * rows, {p.channels});
  if (count > 0) check_launch(launch_sum_rows(sums, count, device.stream()));
  return {like_memory_of(original_u, du),
          like_memory_of(original_delta, ddelta),
          total_dA,
          total_dB,
          total_dC,
          total_dD,
          z.has_value() && own_dz ? like_memory_of(*original_z, dz) : dz,
          total_ddelta_bias,
          dinitial_state};
}

}  // namespace mamba_ssm

MAMBA_SSM_CUDA_IMPL(mamba_ssm, m) {
  m.impl("selective_scan_fwd", TORCH_BOX(&mamba_ssm::scan_forward_operator));
  m.impl("selective_scan_bwd", TORCH_BOX(&mamba_ssm::scan_backward_operator));
}
