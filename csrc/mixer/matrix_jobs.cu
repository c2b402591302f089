#include "cuda_device.h"
#include "matrix_jobs.h"

namespace mamba_ssm {
namespace {

constexpr int kThreads = 256, kEach = 4;

struct MatrixJobList {
  MatrixJob jobs[kMostMatrixJobs];
};

__global__ void __launch_bounds__(kThreads) matrix_jobs_kernel(MAMBA_SSM_CONSTANT_PARAMETER MatrixJobList list) {
  const MatrixJob& job = list.jobs[blockIdx.y];
  const std::int64_t size = job.rows * job.columns;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const std::int64_t index = (static_cast<std::int64_t>(blockIdx.x) * kEach + i) * kThreads + threadIdx.x;
    if (index >= size) return;
    const std::int64_t row = index / job.columns, column = index % job.columns;
    float value = 0.0f;
    if (job.from != nullptr) {
      value = load_element(job.from, row * job.from_row + column * job.from_column, job.from_dtype);
    }
    if (job.negative_exponential) value = -expf(value);
    if (job.factor != nullptr) value *= job.factor[index];
    store_element(job.to, row * job.to_row + column, job.to_dtype, value);
  }
}

}  // namespace

const char* launch_matrix_jobs(const MatrixJob* list, int jobs, void* stream) {
  MatrixJobList copy{};
  std::int64_t largest = 1;
  for (int i = 0; i < jobs; ++i) {
    copy.jobs[i] = list[i];
    const std::int64_t size = list[i].rows * list[i].columns;
    if (size > largest) largest = size;
  }
  constexpr std::int64_t kBlock = kThreads * kEach;
  return launch<MatrixJobList>(matrix_jobs_kernel, static_cast<unsigned>((largest + kBlock - 1) / kBlock),
                               static_cast<unsigned>(jobs), kThreads, 0, stream, copy);
}

}  // namespace mamba_ssm
