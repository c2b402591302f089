// The CPU implementation of the operators mamba_ssm::selective_scan_fwd and _bwd: checks, allocation, tasks on threads.
// The schemas and what the arguments mean are in mamba_ssm/ops/selective_scan.py.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "cpu_isa.h"
#include "scan_arguments.h"
#include "scan_cpu_table.h"

namespace mamba_ssm {
namespace {

// A chunk of the backward pass, and the working memory of a thread, is as long as this.
void check_checkpoint_steps(std::int64_t steps, std::int64_t least) {
  STD_TORCH_CHECK(least <= steps && steps <= 4096, "checkpoint_steps: got ", steps, "; expected ", least, " to 4096");
}
constexpr std::int64_t kForwardChunk = 64;
// The backward pass has about this many partial sums, whatever the machine, so that its results do not depend on it.
constexpr std::int64_t kBackwardSums = 64;

// The working memory of one thread, aligned to cache lines.
class ScratchMemory {
 public:
  ScratchMemory(const ScanParams& p, int lanes, int step_rows, int state_rows, std::int64_t blocks) {
    const auto aligned = [](std::int64_t floats) { return (floats + 15) / 16 * 16; };
    // Three rows more than a chunk: one for the state before it, and so that the starts do not all share a cache set.
    const std::int64_t steps = aligned((p.chunk + 3) * lanes), states = aligned(p.states * lanes);
    const std::int64_t matrix = aligned(p.chunk * p.states), delta_input = aligned(p.chunk * p.rank);
    const std::int64_t block = state_rows * states + aligned(p.rank * lanes);
    const std::size_t bytes = 4 * (step_rows * steps + 2 * matrix + delta_input + blocks * block);
    memory_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    STD_TORCH_CHECK(memory_ != nullptr, "selective_scan: out of memory for ", bytes, " bytes of working memory");
    float* B = memory_.get() + step_rows * steps;
    float* C = B + matrix;
    scratch_ = {memory_.get(), steps, B, C, C + matrix, C + matrix + delta_input, block, states, state_rows};
  }
  const ScanScratch& get() const { return scratch_; }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory_;
  ScanScratch scratch_;
};

// How many tasks share the `parts` (blocks, or splits of them) of a batch element and group: as few as keep all threads
// equally busy, so that a task walks through as much neighbouring memory as it can.
std::int64_t choose_runs(const ScanParams& p, std::int64_t parts) {
  const std::int64_t threads = torch::stable::get_num_threads(), each = p.batch * p.groups;
  std::int64_t runs = 1;
  while (runs < parts && each * runs < 4 * threads && each * runs % threads != 0) ++runs;
  return runs;
}

std::int64_t blocks_per_group(const ScanParams& p, int lanes) { return (p.channels / p.groups + lanes - 1) / lanes; }

}  // namespace

ScanResults scan_forward(ScanArguments a, OptionalTensor initial_state, OptionalTensor addend, bool float_out,
                         std::int64_t checkpoint_steps, bool, Scratch*) {
  const ScanKernels& kernels = MAMBA_SSM_SELECT_ISA(scan_kernels);
  a.make_contiguous();
  initial_state = contiguous_float(initial_state, "initial_state");
  const Tensor& u = a.u;
  ScanParams p = make_params(a);
  p.addend = activation(addend, "addend", u);
  check_shape(initial_state, {p.batch, p.channels, p.states}, "initial_state");
  p.initial_state = float_data(initial_state);
  check_checkpoint_steps(checkpoint_steps, 0);
  p.chunk = checkpoint_steps > 0 ? checkpoint_steps : kForwardChunk;
  Tensor out = new_activation(u, float_out ? ScalarType::Float : u.scalar_type());
  Tensor last_state = new_floats(u, {p.batch, p.channels, p.states});
  p.first_checkpoint = initial_state.has_value() ? 0 : 1;
  Tensor checkpoints = new_floats(u, {p.batch, count_checkpoints(p, checkpoint_steps), p.states, p.channels});
  p.out = activation(out, "out", u);
  p.last_state = float_data(last_state);
  p.checkpoints = checkpoint_steps > 0 ? float_data(checkpoints) : nullptr;

  const std::int64_t blocks = blocks_per_group(p, kernels.lanes), runs = choose_runs(p, blocks);
  torch::stable::parallel_for(0, p.batch * p.groups * runs, 1, [&](std::int64_t begin, std::int64_t end) {
    const ScratchMemory scratch(p, kernels.lanes, kForwardStepRows, kForwardStateRows, (blocks + runs - 1) / runs);
    for (std::int64_t i = begin; i < end; ++i) kernels.forward(p, i, runs, scratch.get());
  });
  return {out, last_state, checkpoints};
}

namespace {

// Sum over the batch of (batch, …) floats, in order.
Tensor sum_batch(const Tensor& parts, std::vector<std::int64_t> size, const Tensor& like) {
  std::int64_t count = 1;
  for (std::int64_t s : size) count *= s;
  Tensor total = new_floats(like, size);
  float* target = float_data(total);
  const float* source = static_cast<const float*>(parts.data_ptr());
  std::memcpy(target, source, 4 * count);
  for (std::int64_t b = 1; b < parts.size(0); ++b) {
    for (std::int64_t i = 0; i < count; ++i) target[i] += source[b * count + i];
  }
  return total;
}

// The gradient of B or C: the tasks' partial sums (batch, groups, splits, states, length), added in order. The result
// is (batch, groups, states, length) with the states innermost in memory where the input has them so.
Tensor sum_splits(const Tensor& parts, bool states_innermost) {
  const std::int64_t batch = parts.size(0), groups = parts.size(1), splits = parts.size(2), states = parts.size(3),
                     length = parts.size(4), size = states * length;
  Tensor total = states_innermost ? new_floats(parts, {batch, groups, length, states})
                                  : new_floats(parts, {batch, groups, states, length});
  const float* source = static_cast<const float*>(parts.data_ptr());
  float* target = float_data(total);
  torch::stable::parallel_for(0, batch * groups, 1, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> sums(size);
    for (std::int64_t i = begin; i < end; ++i) {
      std::copy_n(source + i * splits * size, size, sums.begin());
      for (std::int64_t s = 1; s < splits; ++s) {
        const float* part = source + (i * splits + s) * size;
        for (std::int64_t j = 0; j < size; ++j) sums[j] += part[j];
      }
      if (!states_innermost) {
        std::copy_n(sums.begin(), size, target + i * size);
        continue;
      }
      for (std::int64_t t = 0; t < length; ++t) {
        for (std::int64_t n = 0; n < states; ++n) target[i * size + t * states + n] = sums[n * length + t];
      }
    }
  });
  return states_innermost ? torch::stable::transpose(total, 2, 3) : total;
}

}  // namespace

ScanGradientResults scan_backward(ScanArguments a, Tensor dout, OptionalTensor dlast_state, OptionalTensor dz_addend,
                                  Tensor checkpoints, bool float_dz, std::int64_t checkpoint_steps,
                                  const GradientTargets* targets) {
  const ScanKernels& kernels = MAMBA_SSM_SELECT_ISA(scan_kernels);
  a.make_contiguous();
  dlast_state = contiguous_float(dlast_state, "dlast_state");
  const auto& [u, delta, A, B, C, D, z, delta_bias, delta_weight, scale, delta_softplus, reverse, method] = a;
  ScanParams p = make_params(a);
  STD_TORCH_CHECK(z.has_value() || !dz_addend.has_value(), "dz_addend without z");
  check_checkpoint_steps(checkpoint_steps, 1);
  p.chunk = checkpoint_steps;
  check_shape(dlast_state, {p.batch, p.channels, p.states}, "dlast_state");
  use_checkpoints(p, checkpoints, checkpoint_steps);

  const auto empty = [&](bool wanted, std::vector<std::int64_t> size) {
    return wanted ? new_floats(u, size) : new_floats(u, {0});
  };
  Tensor du = new_activation(u, u.scalar_type());
  Tensor ddelta = new_activation(delta_weight.has_value() ? u : delta, delta.scalar_type());
  Tensor dz = !z.has_value()                    ? new_floats(u, {0})
              : targets != nullptr && !float_dz ? targets->dz
                                                : new_activation(*z, float_dz ? ScalarType::Float : z->scalar_type());
  Tensor dA = new_floats(u, {p.batch, p.channels, p.states});
  Tensor dD = empty(D.has_value(), {p.batch, p.channels});
  Tensor ddelta_bias = empty(delta_bias.has_value(), {p.batch, p.channels});
  Tensor dinitial_state = new_floats(u, {p.batch, p.channels, p.states});

  ScanGradients g{};
  // Each split has sums of its own for dB and dC; the second bound keeps all of them within the size of u (for large N:
  // within 8 N per step and batch element).
  const std::int64_t per_group = p.channels / p.groups, blocks = blocks_per_group(p, kernels.lanes);
  const std::int64_t most = std::min(blocks, std::max<std::int64_t>(4, per_group / p.states / 2));
  g.splits = std::clamp<std::int64_t>((kBackwardSums + p.batch * p.groups - 1) / (p.batch * p.groups), 1, most);
  const auto new_sums = [&](const InputMatrix& m) {
    return m.constant ? new_floats(u, {p.batch, p.channels, p.states})
                      : new_floats(u, {p.batch, p.groups, g.splits, p.states, p.length});
  };
  Tensor dB = new_sums(p.B), dC = new_sums(p.C);
  g.dout = activation(dout, "dout", u);
  g.du = activation(du, "du", u);
  g.ddelta = activation(ddelta, "ddelta", u);
  if (z.has_value()) g.dz = activation(dz, "dz", u);
  g.dz_addend = activation(dz_addend, "dz_addend", u);
  g.dlast_state = float_data(dlast_state);
  g.dinitial_state = float_data(dinitial_state);
  g.dA = float_data(dA);
  g.dD = D.has_value() ? float_data(dD) : nullptr;
  g.ddelta_bias = delta_bias.has_value() ? float_data(ddelta_bias) : nullptr;
  g.dB = float_data(dB);
  g.dC = float_data(dC);

  // Threads share the splits, which do not depend on their number.
  const std::int64_t runs = choose_runs(p, g.splits), splits_per_run = (g.splits + runs - 1) / runs;
  const std::int64_t most_blocks = splits_per_run * ((blocks + g.splits - 1) / g.splits);
  torch::stable::parallel_for(0, p.batch * p.groups * runs, 1, [&](std::int64_t begin, std::int64_t end) {
    const ScratchMemory scratch(p, kernels.lanes, kBackwardStepRows, kBackwardStateRows, most_blocks);
    for (std::int64_t i = begin; i < end; ++i) kernels.backward(p, g, i, runs, scratch.get());
  });

  const auto finish = [&](const Tensor& sums, const InputMatrix& m) {
    return m.constant ? sum_batch(sums, {p.channels, p.states}, u) : sum_splits(sums, m.state == 1);
  };
  dB = finish(dB, p.B);
  dC = finish(dC, p.C);
  if (targets != nullptr) {
    Tensor to_dB = targets->dB, to_dC = targets->dC;
    torch::stable::copy_(to_dB, dB);
    torch::stable::copy_(to_dC, dC);
  }
  return {du,
          ddelta,
          sum_batch(dA, {p.channels, p.states}, u),
          dB,
          dC,
          D.has_value() ? sum_batch(dD, {p.channels}, u) : dD,
          dz,
          delta_bias.has_value() ? sum_batch(ddelta_bias, {p.channels}, u) : ddelta_bias,
          dinitial_state};
}

namespace {

// Comma-separated, in the table's order.
std::string discretization_names() {
  std::string names;
  for (const char* name : kMethodNames) names.append(names.empty() ? "" : ",").append(name);
  return names;
}

}  // namespace
}  // namespace mamba_ssm

STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CPU, m) {
  m.impl("selective_scan_fwd", TORCH_BOX(&mamba_ssm::scan_forward_operator));
  m.impl("selective_scan_bwd", TORCH_BOX(&mamba_ssm::scan_backward_operator));
}
STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CompositeExplicitAutograd, m) {
  m.impl("discretization_names", TORCH_BOX(&mamba_ssm::discretization_names));
}
