// The forward kernel of the scan. Chunk by chunk, a block
//
//     stages    u and Δ (softplus applied) as pairs of floats, B and C as floats, in shared memory,
//     scans     the chunk's steps, each thread its eight states of one channel, and adds C·h over the states,
//     finishes  each output once: addend, scale, gate; D u is where the sum over the states begins.
//
// While it scans, the copies of the chunk's z and of the next chunk's inputs are under way.
#pragma once

#include <type_traits>

#include "scan_gpu.cuh"

namespace mamba_ssm {

struct ForwardMemory {
  Tile tile;
  alignas(16) float2 step[tile::kSteps][tile::kChannels];  // Δ and u; once a step is done, its output instead of Δ
  alignas(16) float B[tile::kSteps][tile::kStates];
  alignas(16) float C[tile::kSteps][tile::kStates];
  RawRows u, delta, z, addend;
  RawMatrixRows raw_B, raw_C;
};

template <bool Packed>
MAMBA_SSM_DEVICE void start_forward_inputs(const GpuScan& scan, const Tile& t, int index, int end,
                                           DeltaProduct& product, ForwardMemory& memory) {
  if constexpr (!Packed) return;
  const ScanParams& p = scan.p;
  if (index >= end) return;
  const Chunk chunk = chunk_at(p, index);
  switch (threadIdx.x / kWarp) {
    case 0:
      start_copy(p.u, t, chunk, memory.u);
      break;
    case 1:
      start_copy(p.delta, t, chunk, memory.delta);
      if (p.delta_weight != nullptr) product.start_rows(scan, t, chunk);
      break;
    case 2:
      if (scan.aligned_B) start_copy(p.B, scan, t, chunk, memory.raw_B);
      break;
    default:
      if (scan.aligned_C) start_copy(p.C, scan, t, chunk, memory.raw_C);
  }
}

template <bool Packed>
MAMBA_SSM_DEVICE void stage_forward(const GpuScan& scan, const Tile& t, const Chunk& chunk, DeltaProduct& product,
                                    ForwardMemory& memory) {
  const ScanParams& p = scan.p;
  if (p.delta_weight != nullptr) {
    product.stage_rows<Packed>(scan, t, chunk);
    __syncthreads();
  }
  if constexpr (Packed) {
    const int channel = threadIdx.x % kWarp * 2;
    const float bias0 = load_parameter(p.delta_bias, t, channel), bias1 = load_parameter(p.delta_bias, t, channel + 1);
    float2 products[tile::kSteps / tile::kWarps] = {};
    if (p.delta_weight != nullptr) product.of_pairs(products);
    with_dtype(p.u.dtype, [&](auto dtype) {
      for_each_pair([&](int step, int c, int i) {
        const int index = step * tile::kChannels + c;
        const float2 u = load_pair<dtype.value>(memory.u.bytes, index);
        const float2 delta =
            p.delta_weight != nullptr ? products[i] : load_pair<dtype.value>(memory.delta.bytes, index);
        const bool valid = step < chunk.steps;  // Δ = 0 leaves the state as it is
        const float delta0 = valid ? step_size(p, delta.x, bias0) : 0.0f;
        const float delta1 = valid ? step_size(p, delta.y, bias1) : 0.0f;
        *reinterpret_cast<float4*>(&memory.step[step][c]) = {delta0, u.x, delta1, u.y};
      });
    });
  } else {
    for_each_element(p.u, [&](int step, int c) {
      float2 pair = {0.0f, 0.0f};
      if (step < chunk.steps && c < t.channels) {
        const float delta =
            p.delta_weight != nullptr ? product.of_element(step, c) : activation_at(p.delta, t, c, chunk.time(step));
        pair = {step_size(p, delta, load_parameter(p.delta_bias, t, c)), activation_at(p.u, t, c, chunk.time(step))};
      }
      memory.step[step][c] = pair;
    });
  }
  if (!p.B.constant) stage_matrix(p.B, Packed && scan.aligned_B, scan, t, chunk, memory.raw_B, memory.B);
  if (!p.C.constant) stage_matrix(p.C, Packed && scan.aligned_C, scan, t, chunk, memory.raw_C, memory.C);
}

MAMBA_SSM_DEVICE float forward_output(const ScanParams& p, float y, float addend, float z) {
  const float sum = (y + addend) * p.scale;
  return p.z.data == nullptr ? sum : sum * (z * sigmoid(z));
}

template <bool Packed>
MAMBA_SSM_DEVICE void finish_forward(const GpuScan& scan, const Tile& t, const Chunk& chunk,
                                     const ForwardMemory& memory) {
  const ScanParams& p = scan.p;
  if constexpr (Packed) {
    with_dtype(p.u.dtype, [&](auto dtype) {
      for_each_pair([&](int step, int c, int) {
        if (step >= chunk.steps || c >= t.channels) return;
        const float4 y = *reinterpret_cast<const float4*>(&memory.step[step][c]);
        const float2 addend = raw_pair<dtype.value>(p.addend, memory.addend, step, c);
        const float2 z = raw_pair<dtype.value>(p.z, memory.z, step, c);
        set_pair<dtype.value>(p.out, t, c, chunk.time(step),
                              {forward_output(p, y.x, addend.x, z.x), forward_output(p, y.z, addend.y, z.y)});
      });
    });
  } else {
    for_each_element(p.u, [&](int step, int c) {
      if (step >= chunk.steps || c >= t.channels) return;
      const std::int64_t time = chunk.time(step);
      const float y = memory.step[step][c].x, addend = activation_at(p.addend, t, c, time);
      set_activation(p.out, t, c, time, forward_output(p, y, addend, activation_at(p.z, t, c, time)));
    });
  }
}

// The whole walk of one block, under one form of the method.
template <class Method, bool Packed>
MAMBA_SSM_DEVICE void scan_tile(const GpuScan& scan, const Tile& t, const Thread& thread,
                                const float (&A)[tile::kThreadStates], ForwardMemory& memory) {
  constexpr int kStates = tile::kThreadStates;
  const ScanParams& p = scan.p;
  decltype(Method::prepare(Real(0.0f))) k[kStates];
  float h[kStates], constant_B[kStates], constant_C[kStates];
#pragma unroll
  for (int j = 0; j < kStates; ++j) k[j] = Method::prepare(Real(A[j]));
  const bool later = t.segment > 0;
  load_states(scan, t, thread, later ? scan.segment_states : p.initial_state, later ? segment_row(scan, t) : t.batch,
              0.0f, h);
  if constexpr (!Packed) {
    load_constant(p.B, scan, t, thread, constant_B);
    load_constant(p.C, scan, t, thread, constant_C);
  }
  const float D = thread.half == 0 ? load_parameter(p.D, t, thread.channel) : 0.0f;

  DeltaProduct product(scan, &memory + 1);
  if (p.delta_weight != nullptr) product.stage_weight(p, t);
  start_forward_inputs<Packed>(scan, t, t.first_chunk, t.end_chunk, product, memory);
  for (int index = t.first_chunk; index < t.end_chunk; ++index) {
    const Chunk chunk = chunk_at(p, index);
    wait_for_copies();
    __syncthreads();
    stage_forward<Packed>(scan, t, chunk, product, memory);
    if (p.checkpoints != nullptr) {
      const int count = thread_states(scan, t, thread);
#pragma unroll
      for (int j = 0; j < kStates; ++j) {
        if (j < count) checkpoint(scan, t, index, thread.first_state + j)[thread.channel] = h[j];
      }
    }
    __syncthreads();
    if constexpr (Packed) {
      if (threadIdx.x / kWarp == 2) start_copy(p.z, t, chunk, memory.z);
      if (threadIdx.x / kWarp == 3) start_copy(p.addend, t, chunk, memory.addend);
    }
    start_forward_inputs<Packed>(scan, t, index + 1, t.end_chunk, product, memory);

#pragma unroll 1
    for (int step = 0; step < chunk.steps; step += 2) {  // an odd last step is followed by one with Δ = 0
      float y[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 in = memory.step[step + i][thread.channel];
        const Real delta = in.x, u = in.y;
        float B[kStates], C[kStates], sum = D * in.y;
        read_states(memory.B[step + i], thread.first_state, B);
        read_states(memory.C[step + i], thread.first_state, C);
#pragma unroll
        for (int j = 0; j < kStates; ++j) {
          const float b = !Packed && p.B.constant ? constant_B[j] : B[j];
          const float c = !Packed && p.C.constant ? constant_C[j] : C[j];
          const Transition<Real> transition = Method::forward(delta, k[j]);
          h[j] = transition.a_bar.value * h[j] + (transition.c * u).value * b;
          sum += c * h[j];
        }
        y[i] = sum;
      }
      const float own = pair_sum(y[0], y[1], thread.half);
      __syncwarp();  // the other thread of the channel has read Δ
      memory.step[step + thread.half][thread.channel].x = own;
    }
    wait_for_copies();
    __syncthreads();
    finish_forward<Packed>(scan, t, chunk, memory);
  }
  if (t.segment == scan.segments - 1) store_states(scan, t, thread, p.last_state, t.batch, h);
}

template <class Method, bool Packed>
__global__ void __launch_bounds__(tile::kThreads, Packed ? tile::kForwardBlocks : 1)
    scan_forward_kernel(MAMBA_SSM_CONSTANT_PARAMETER GpuScan scan) {
  ForwardMemory& memory = shared_memory<ForwardMemory>();
  if (threadIdx.x == 0) memory.tile = this_tile(scan, blockIdx.y);
  __syncthreads();
  const Tile& t = memory.tile;
  const Thread thread = this_thread();
  float A[tile::kThreadStates];
  load_states(scan, t, thread, scan.p.A, 0, -1.0f, A);
  if constexpr (!std::is_same_v<Method, ForAnyA<Method>>) {
    if (block_all(all_at_least(A, Method::kSmallestA))) {
      scan_tile<Method, Packed>(scan, t, thread, A, memory);
      return;
    }
  }
  scan_tile<ForAnyA<Method>, Packed>(scan, t, thread, A, memory);
}

template <bool Packed>
const char* launch_scan_forward(const GpuScan& scan, void* stream) {
  using Kernel = void (*)(GpuScan);
#define MAMBA_SSM_KERNEL(Method) scan_forward_kernel<FormFor<Method, Packed>, Packed>,
  static constexpr Kernel kKernels[] = {MAMBA_SSM_DISCRETIZATIONS(MAMBA_SSM_KERNEL)};
#undef MAMBA_SSM_KERNEL
  const ScanParams& p = scan.p;
  return launch<GpuScan>(kKernels[p.method], p.batch * p.groups * scan.tiles, scan.segments, tile::kThreads,
                         sizeof(ForwardMemory) + DeltaProduct::bytes(p.rank), stream, scan);
}

}  // namespace mamba_ssm
