// The mixer's operators for CUDA.
//
// Compiled with MAMBA_SSM_CUDA_ON_CPU the kernels are host code, and the operators take CPU tensors: a test does that.
#if defined(MAMBA_SSM_CUDA_ON_CPU)
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#define MAMBA_SSM_SHIM(name) aoti_torch_cpu_##name
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#define MAMBA_SSM_SHIM(name) aoti_torch_cuda_##name
#endif

#include "mixer.h"
#include "stable_cuda.h"

namespace mamba_ssm {

const std::int64_t kColumnAlignment = 8;

// These operators make the tensors' device the current one themselves.
void multiply_matrices(const Tensor& out, const Tensor& a, const Tensor& b, const OptionalTensor& addend) {
  if (addend.has_value()) {
    TORCH_ERROR_CODE_CHECK(MAMBA_SSM_SHIM(addmm_out)(out.get(), addend->get(), a.get(), b.get(), 1.0, 1.0));
  } else {
    TORCH_ERROR_CODE_CHECK(MAMBA_SSM_SHIM(mm_out)(out.get(), a.get(), b.get()));
  }
}

void run_matrix_jobs(const std::vector<MatrixJob>& jobs, const Tensor& like) {
  const DeviceOf device(like);
  for (std::size_t first = 0; first < jobs.size(); first += kMostMatrixJobs) {
    const auto count = static_cast<int>(std::min<std::size_t>(kMostMatrixJobs, jobs.size() - first));
    const char* error = launch_matrix_jobs(jobs.data() + first, count, device.stream());
    STD_TORCH_CHECK(error == nullptr, "mixer: the kernel did not start: ", error);
  }
}

}  // namespace mamba_ssm

MAMBA_SSM_CUDA_IMPL(mamba_ssm, m) {
  m.impl("mixer_fwd", TORCH_BOX(&mamba_ssm::mixer_forward));
  m.impl("mixer_bwd", TORCH_BOX(&mamba_ssm::mixer_backward));
}
