// The mixer's operators for the CPU.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <cmath>

#include "mixer.h"

namespace mamba_ssm {

const std::int64_t kColumnAlignment = 1;

void multiply_matrices(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  if (add) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  }
}

namespace {

float load(const void* data, std::int64_t index, Dtype dtype) {
  switch (dtype) {
    case Dtype::f16:
      return static_cast<const torch::headeronly::Half*>(data)[index];
    case Dtype::bf16:
      return static_cast<const torch::headeronly::BFloat16*>(data)[index];
    default:
      return static_cast<const float*>(data)[index];
  }
}
void store(void* data, std::int64_t index, Dtype dtype, float value) {
  switch (dtype) {
    case Dtype::f16:
      static_cast<torch::headeronly::Half*>(data)[index] = value;
      break;
    case Dtype::bf16:
      static_cast<torch::headeronly::BFloat16*>(data)[index] = value;
      break;
    default:
      static_cast<float*>(data)[index] = value;
  }
}

}  // namespace

void run_matrix_jobs(const std::vector<MatrixJob>& jobs, const Tensor&) {
  for (const MatrixJob& job : jobs) {
    for (std::int64_t row = 0; row < job.rows; ++row) {
      for (std::int64_t column = 0; column < job.columns; ++column) {
        float value =
            job.from == nullptr ? 0.0f : load(job.from, row * job.from_row + column * job.from_column, job.from_dtype);
        if (job.negative_exponential) value = -std::exp(value);
        if (job.factor != nullptr) value *= job.factor[row * job.columns + column];
        store(job.to, row * job.to_row + column, job.to_dtype, value);
      }
    }
  }
}

}  // namespace mamba_ssm

STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CPU, m) {
  m.impl("mixer_fwd", TORCH_BOX(&mamba_ssm::mixer_forward));
  m.impl("mixer_bwd", TORCH_BOX(&mamba_ssm::mixer_backward));
}
