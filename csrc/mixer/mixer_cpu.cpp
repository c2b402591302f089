// The mixer's operators for the CPU.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <cmath>

#include "mixer.h"

namespace mamba_ssm {

const std::int64_t kColumnAlignment = 1;

void multiply_matrices(const Tensor& out, const Tensor& a, const Tensor& b, const OptionalTensor& addend) {
  if (addend.has_value()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), addend->get(), a.get(), b.get(), 1.0, 1.0));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  }
}

namespace {

template <class From, class To>
void run(const MatrixJob& job) {
  for (std::int64_t row = 0; row < job.rows; ++row) {
    To* to = static_cast<To*>(job.to) + row * job.to_row;
    if (job.from == nullptr) {
      std::fill_n(to, job.columns, static_cast<To>(0.0f));
      continue;
    }
    const From* from = static_cast<const From*>(job.from) + row * job.from_row;
    const float* factor = job.factor == nullptr ? nullptr : job.factor + row * job.columns;
    if (factor == nullptr && !job.negative_exponential && job.from_column == 1) {
      for (std::int64_t i = 0; i < job.columns; ++i) to[i] = static_cast<To>(static_cast<float>(from[i]));
    } else {
      for (std::int64_t i = 0; i < job.columns; ++i) {
        float value = static_cast<float>(from[i * job.from_column]);
        if (job.negative_exponential) value = -std::exp(value);
        to[i] = static_cast<To>(factor == nullptr ? value : value * factor[i]);
      }
    }
  }
}

template <class Run>
void with_type(Dtype dtype, const Run& run) {
  if (dtype == Dtype::f32) return run(float{});
  if (dtype == Dtype::f16) return run(torch::headeronly::Half{});
  run(torch::headeronly::BFloat16{});
}

}  // namespace

void run_matrix_jobs(const std::vector<MatrixJob>& jobs, const Tensor&) {
  for (const MatrixJob& job : jobs) {
    with_type(job.from_dtype,
              [&](auto from) { with_type(job.to_dtype, [&](auto to) { run<decltype(from), decltype(to)>(job); }); });
  }
}

}  // namespace mamba_ssm

STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CPU, m) {
  m.impl("mixer_fwd", TORCH_BOX(&mamba_ssm::mixer_forward));
  m.impl("mixer_bwd", TORCH_BOX(&mamba_ssm::mixer_backward));
}
