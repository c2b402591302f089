// The general backward kernels, one for each discretization. A block walks the chunks from the last to the first; in
// each it advances the state from the last checkpoint, keeps it before every step of the chunk, and returns through the
// steps with g_t = C_t dy_t + Ā_{t+1} g_{t+1}, the gradient of h_t.
#include "scan_general.cuh"

namespace mamba_ssm {
namespace general {
namespace {

struct BackwardMemory {
  float2 step[tile::kSteps][tile::kChannels];    // Δ and u; once a step is done, d(delta) and du
  float4 output[tile::kSteps][tile::kChannels];  // dy, what C·h + D u is multiplied by for dz, dΔ/d(delta); then dz
  MatrixRows B, C;
  float partial[tile::kSteps][tile::kWarps][2 * tile::kStates];  // dB and dC of each warp
};

// Sums over the lanes of a thread's half, its 16 channels.
MAMBA_SSM_DEVICE float channel_sum(float value) {
  for (int mask = 1; mask < tile::kWarpChannels; mask *= 2) value += shuffle_xor(value, mask);
  return value;
}

template <class Method>
__global__ void __launch_bounds__(tile::kThreads)
    backward_kernel(MAMBA_SSM_CONSTANT_PARAMETER GpuScan scan, MAMBA_SSM_CONSTANT_PARAMETER GpuScanGradients out) {
  constexpr int kStates = tile::kThreadStates, kSteps = tile::kSteps;
  BackwardMemory& memory = shared_memory<BackwardMemory>();
  const ScanParams& p = scan.p;
  const ScanGradients& g = out.g;
  const Tile t(scan);
  const Thread thread;
  States A, carried, h, constant_B, constant_C, constant_dB, constant_dC, dA;
  load_states(scan, t, thread, p.A, 0, -1.0f, A);
  load_states(scan, t, thread, g.dlast_state, t.batch, 0.0f, carried);
  load_constant(p.B, scan, t, thread, constant_B);
  load_constant(p.C, scan, t, thread, constant_C);
#pragma unroll
  for (int j = 0; j < kStates; ++j) constant_dB[j] = constant_dC[j] = dA[j] = 0.0f;
  const float D = load_parameter(p.D, t, thread.channel);
  float dD = 0.0f, ddelta_bias = 0.0f;
  const int warp = threadIdx.x / kWarp;

  const auto stage = [&](const Chunk& chunk) {
    __syncthreads();
    for_each_element(p.u, [&](int step, int c) {
      float2 pair = {0.0f, 0.0f};
      float4 output = {0.0f, 0.0f, 0.0f, 0.0f};
      if (step < chunk.steps && c < t.channels) {
        const std::int64_t time = chunk.time(step);
        const float x = activation_at(p.delta, t, c, time) + load_parameter(p.delta_bias, t, c);
        const Softplus s = softplus(x);
        pair = {p.delta_softplus ? s.value : x, activation_at(p.u, t, c, time)};
        const float gradient = activation_at(g.dout, t, c, time) * p.scale;
        output = {gradient, 0.0f, p.delta_softplus ? softplus_slope(x, s) : 1.0f, 0.0f};
        if (p.z.data != nullptr) {
          const float z = activation_at(p.z, t, c, time), sigma = sigmoid(z);
          output.x = gradient * (z * sigma);
          output.y = gradient * silu_slope(z, sigma);
        }
      }
      memory.step[step][c] = pair;
      memory.output[step][c] = output;
    });
    stage_matrix(p.B, scan, t, chunk, memory.B);
    stage_matrix(p.C, scan, t, chunk, memory.C);
    __syncthreads();
  };
  const auto read_states = [&](const InputMatrix& m, const MatrixRows& rows, const States& constant, int step,
                               States& values) {
#pragma unroll
    for (int j = 0; j < kStates; ++j) values[j] = m.constant ? constant[j] : rows[step][thread.first_state + j];
  };

  const int chunks = chunk_count(p);
#pragma unroll 1
  for (int index = chunks - 1; index >= 0; --index) {
    const int base = index >> scan.checkpoint_shift << scan.checkpoint_shift;
    const float* checkpoints = base < p.first_checkpoint ? nullptr : p.checkpoints;
    load_states(scan, t, thread, checkpoints, checkpoint_row(scan, t, base), 0.0f, h);
#pragma unroll 1
    for (int i = base; i < index; ++i) {
      stage(Chunk(p, i));
#pragma unroll 1
      for (int step = 0; step < kSteps; ++step) {
        States B;
        read_states(p.B, memory.B, constant_B, step, B);
        advance<Method>(memory.step[step][thread.channel], A, B, h);
      }
    }
    const Chunk chunk(p, index);
    stage(chunk);
    States before[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      States B, C;
      read_states(p.B, memory.B, constant_B, step, B);
      read_states(p.C, memory.C, constant_C, step, C);
      float y = 0.0f;
#pragma unroll
      for (int j = 0; j < kStates; ++j) before[step][j] = h[j];
      advance<Method>(memory.step[step][thread.channel], A, B, h);
#pragma unroll
      for (int j = 0; j < kStates; ++j) y += C[j] * h[j];
      y += shuffle_xor(y, 16);
      if (thread.half == 0) {
        memory.output[step][thread.channel].w =
            memory.output[step][thread.channel].y * (y + D * memory.step[step][thread.channel].y);
      }
    }
#pragma unroll
    for (int step = kSteps - 1; step >= 0; --step) {
      const float delta = memory.step[step][thread.channel].x, u = memory.step[step][thread.channel].y;
      const float dy = memory.output[step][thread.channel].x, slope = memory.output[step][thread.channel].z;
      float du = 0.0f, ddelta = 0.0f;
      States B, C;
      read_states(p.B, memory.B, constant_B, step, B);
      read_states(p.C, memory.C, constant_C, step, C);
#pragma unroll
      for (int j = 0; j < kStates; ++j) {
        const float after = step == kSteps - 1 ? h[j] : before[step + 1][j];
        const auto k = gradient_coefficients<Method>(Real(A[j]));
        const TransitionGradient<Real> transition = Method::gradient(Real(delta), k);
        const float gradient = C[j] * dy + carried[j], gB = gradient * B[j], gBu = gB * u;
        carried[j] = gradient * transition.a_bar.value;
        const float through = before[step][j] * gradient * transition.slope.value;
        ddelta += through * A[j] + gBu * transition.c_delta.value;
        dA[j] += through * delta + gBu * transition.c_A.value;
        du += gB * transition.c.value;
        const float dB = gradient * (transition.c.value * u), dC = after * dy;
        constant_dB[j] += dB;
        constant_dC[j] += dC;
        const float sum_dB = channel_sum(dB), sum_dC = channel_sum(dC);
        if (thread.channel % tile::kWarpChannels == 0) {
          memory.partial[step][warp][thread.first_state + j] = sum_dB;
          memory.partial[step][warp][tile::kStates + thread.first_state + j] = sum_dC;
        }
      }
      du += shuffle_xor(du, 16);
      ddelta = (ddelta + shuffle_xor(ddelta, 16)) * slope;
      dD += dy * u;
      ddelta_bias += ddelta;
      __syncwarp();  // the other thread of the channel has read the step
      if (thread.half == 0) memory.step[step][thread.channel] = {ddelta, du + D * dy};
    }
    __syncthreads();
    for_each_element(p.u, [&](int step, int c) {
      if (step >= chunk.steps || c >= t.channels) return;
      const std::int64_t time = chunk.time(step);
      const float2 result = memory.step[step][c];
      set_activation(g.ddelta, t, c, time, result.x + activation_at(out.sum_ddelta, t, c, time));
      set_activation(g.du, t, c, time, result.y + activation_at(out.sum_du, t, c, time));
      set_activation(g.dz, t, c, time, memory.output[step][c].w + activation_at(g.dz_addend, t, c, time));
    });
    if (out.partial != nullptr) {
      const std::int64_t tile_row =
          ((static_cast<std::int64_t>(t.batch) * p.groups + t.group) * scan.tiles + t.split) * p.length;
      for (int i = threadIdx.x; i < chunk.steps * 2 * tile::kStates; i += tile::kThreads) {
        const int step = i / (2 * tile::kStates), column = i % (2 * tile::kStates);
        float sum = 0.0f;
        for (int w = 0; w < tile::kWarps; ++w) sum += memory.partial[step][w][column];
        out.partial[(tile_row + chunk.time(step)) * 2 * tile::kStates + column] = sum;
      }
    }
  }

  store_states(scan, t, thread, g.dinitial_state, t.batch, carried);
  store_states(scan, t, thread, g.dA, t.batch, dA);
  if (p.B.constant) store_states(scan, t, thread, g.dB, t.batch, constant_dB);
  if (p.C.constant) store_states(scan, t, thread, g.dC, t.batch, constant_dC);
  if (thread.half == 0 && thread.channel < t.channels) {
    const std::int64_t index = t.batch * p.channels + t.channel + thread.channel;
    if (g.dD != nullptr) g.dD[index] = dD;
    if (g.ddelta_bias != nullptr) g.ddelta_bias[index] = ddelta_bias;
  }
}

}  // namespace
}  // namespace general

const char* launch_general_backward(const GpuScan& scan, const GpuScanGradients& gradients, void* stream) {
  using Kernel = void (*)(GpuScan, GpuScanGradients);
#define MAMBA_SSM_KERNEL(Method) general::backward_kernel<ForAnyA<Method>>,
  static constexpr Kernel kKernels[] = {MAMBA_SSM_DISCRETIZATIONS(MAMBA_SSM_KERNEL)};
#undef MAMBA_SSM_KERNEL
  const ScanParams& p = scan.p;
  return launch<GpuScan, GpuScanGradients>(kKernels[p.method], p.batch * p.groups * scan.tiles, 1,
                                           general_tile::kThreads, sizeof(general::BackwardMemory), stream, scan,
                                           gradients);
}

}  // namespace mamba_ssm
