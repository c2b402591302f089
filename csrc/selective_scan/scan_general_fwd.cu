// The general forward kernels, one for each discretization.
#include "scan_general.cuh"

namespace mamba_ssm {
namespace general {
namespace {

struct ForwardMemory {
  float2 step[tile::kSteps][tile::kChannels];  // Δ and u; once a step is done, its output instead of Δ
  MatrixRows B, C;
};

template <class Method>
__global__ void __launch_bounds__(tile::kThreads) forward_kernel(MAMBA_SSM_CONSTANT_PARAMETER GpuScan scan) {
  ForwardMemory& memory = shared_memory<ForwardMemory>();
  const ScanParams& p = scan.p;
  const Tile t(scan);
  const Thread thread;
  States A, h, constant_B, constant_C;
  load_states(scan, t, thread, p.A, 0, -1.0f, A);
  load_states(scan, t, thread, p.initial_state, t.batch, 0.0f, h);
  load_constant(p.B, scan, t, thread, constant_B);
  load_constant(p.C, scan, t, thread, constant_C);

  const int chunks = chunk_count(p);
#pragma unroll 1
  for (int index = 0; index < chunks; ++index) {
    const Chunk chunk(p, index);
    for_each_element(p.u, [&](int step, int c) {
      float2 pair = {0.0f, 0.0f};  // Δ = 0 leaves the state as it is
      if (step < chunk.steps && c < t.channels) {
        const std::int64_t time = chunk.time(step);
        const float delta = activation_at(p.delta, t, c, time) + load_parameter(p.delta_bias, t, c);
        pair = {step_size(p, delta), activation_at(p.u, t, c, time)};
      }
      memory.step[step][c] = pair;
    });
    stage_matrix(p.B, scan, t, chunk, memory.B);
    stage_matrix(p.C, scan, t, chunk, memory.C);
    if (p.checkpoints != nullptr && index % (1 << scan.checkpoint_shift) == 0 && index >= p.first_checkpoint) {
      store_states(scan, t, thread, p.checkpoints, checkpoint_row(scan, t, index), h);
    }
    __syncthreads();

#pragma unroll 1
    for (int step = 0; step < tile::kSteps; ++step) {
      States B, C;
#pragma unroll
      for (int j = 0; j < tile::kThreadStates; ++j) {
        B[j] = p.B.constant ? constant_B[j] : memory.B[step][thread.first_state + j];
        C[j] = p.C.constant ? constant_C[j] : memory.C[step][thread.first_state + j];
      }
      advance<Method>(memory.step[step][thread.channel], A, B, h);
      float y = 0.0f;
#pragma unroll
      for (int j = 0; j < tile::kThreadStates; ++j) y += C[j] * h[j];
      y += shuffle_xor(y, 16);
      __syncwarp();  // the other thread of the channel has read Δ
      if (thread.half == 0) memory.step[step][thread.channel].x = y;
    }
    __syncthreads();
    for_each_element(p.u, [&](int step, int c) {
      if (step >= chunk.steps || c >= t.channels) return;
      const std::int64_t time = chunk.time(step);
      const float2 step_value = memory.step[step][c];
      const float D = load_parameter(p.D, t, c);
      float sum = (step_value.x + D * step_value.y + activation_at(p.addend, t, c, time)) * p.scale;
      if (p.z.data != nullptr) {
        const float z = activation_at(p.z, t, c, time);
        sum *= z * sigmoid(z);
      }
      set_activation(p.out, t, c, time, sum);
    });
    __syncthreads();
  }
  store_states(scan, t, thread, p.last_state, t.batch, h);
}

}  // namespace
}  // namespace general

const char* launch_general_forward(const GpuScan& scan, void* stream) {
  using Kernel = void (*)(GpuScan);
#define MAMBA_SSM_KERNEL(Method) general::forward_kernel<ForAnyA<Method>>,
  static constexpr Kernel kKernels[] = {MAMBA_SSM_DISCRETIZATIONS(MAMBA_SSM_KERNEL)};
#undef MAMBA_SSM_KERNEL
  const ScanParams& p = scan.p;
  return launch<GpuScan>(kKernels[p.method], p.batch * p.groups * scan.tiles, 1, general_tile::kThreads,
                         sizeof(general::ForwardMemory), stream, scan);
}

}  // namespace mamba_ssm
