#include "cuda_device.h"
#include "matrix_jobs.h"

namespace mamba_ssm {
namespace {

constexpr int kThreads = 256;

struct MatrixJobList {
  MatrixJob jobs[kMostMatrixJobs];
  unsigned first_block[kMostMatrixJobs + 1];  // of each job; then how many blocks there are
};

__global__ void __launch_bounds__(kThreads) matrix_jobs_kernel(MAMBA_SSM_CONSTANT_PARAMETER MatrixJobList list) {
  int index = 0;
  while (blockIdx.x >= list.first_block[index + 1]) ++index;
  const MatrixJob& job = list.jobs[index];
  const auto columns = static_cast<unsigned>(job.columns), size = static_cast<unsigned>(job.rows) * columns;
  const unsigned element = (blockIdx.x - list.first_block[index]) * kThreads + threadIdx.x;
  if (element >= size) return;
  const std::int64_t row = element / columns, column = element % columns;
  float value = 0.0f;
  if (job.from != nullptr) {
    value = load_element(job.from, row * job.from_row + column * job.from_column, job.from_dtype);
  }
  if (job.negative_exponential) value = -expf(value);
  if (job.factor != nullptr) value *= job.factor[element];
  store_element(job.to, row * job.to_row + column, job.to_dtype, value);
}

}  // namespace

const char* launch_matrix_jobs(const MatrixJob* jobs, int count, void* stream) {
  MatrixJobList list{};
  unsigned blocks = 0;
  for (int i = 0; i < kMostMatrixJobs; ++i) {
    list.first_block[i] = blocks;
    if (i >= count) continue;
    const std::int64_t size = jobs[i].rows * jobs[i].columns;
    if (size >= std::int64_t{1} << 31) return "a parameter has 2^31 elements or more";
    list.jobs[i] = jobs[i];
    blocks += static_cast<unsigned>((size + kThreads - 1) / kThreads);
  }
  list.first_block[kMostMatrixJobs] = blocks;
  if (blocks == 0) return nullptr;
  return launch<MatrixJobList>(matrix_jobs_kernel, blocks, 1, kThreads, 0, stream, list);
}

}  // namespace mamba_ssm
