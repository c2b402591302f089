// The first pass of the backward scan over a divided sequence: what each segment but the first makes of the adjoint
// behind it, decay · adjoint + local. Walks as the forward kernel does, but from the last chunk to the first.
#pragma once

#include "scan_gpu.cuh"

namespace mamba_ssm {

template <Dtype T>
struct AdjointInputs {
  Rows<T> delta, z, dout;
  RawMatrices<T> matrices;
};
template <Dtype T>
struct AdjointWarp {
  AdjointInputs<T> inputs[2];
  alignas(16) float2 step[2][tile::kSteps][kWarp];  // by slot: Δ, and the gradient of the scan's sum
  alignas(16) MatrixRows matrices[2];
  KeptStream delta, z, dout, B_and_C[2];
};
template <Dtype T>
struct AdjointMemory {
  AdjointWarp<T> warps[tile::kWarps];
};
// A multiprocessor has 228 KiB, of which each block takes 1 KiB more than it asks for.
static_assert(tile::kBackwardBlocks * (sizeof(AdjointMemory<Dtype::f32>) + 1024) <= 228 * 1024);

template <Dtype T>
MAMBA_SSM_DEVICE void start_inputs(const GpuScan& scan, const WarpTile& t, const Lane& lane, int chunk,
                                   AdjointWarp<T>& memory) {
  AdjointInputs<T>& inputs = memory.inputs[chunk & 1];
  const int steps = chunk < t.first_chunk ? 0 : chunk_steps(scan.p, chunk);
  const Stream delta = memory.delta, z = memory.z, dout = memory.dout;
  const Stream matrix = memory.B_and_C[lane.index / 2 % 2];
  start_copy(delta, t.channels, lane, chunk, steps, inputs.delta);
  start_copy(z, t.channels, lane, chunk, steps, inputs.z);
  start_copy(dout, t.channels, lane, chunk, steps, inputs.dout);
  start_copy(scan, matrix, lane, chunk, steps, inputs.matrices);
}

template <class Method, Dtype T>
__global__ void __launch_bounds__(tile::kThreads, tile::kBackwardBlocks)
    scan_backward_sums_kernel(MAMBA_SSM_CONSTANT_PARAMETER GpuScan scan,
                              MAMBA_SSM_CONSTANT_PARAMETER GpuScanGradients out,
                              MAMBA_SSM_CONSTANT_PARAMETER SegmentSums sums) {
  using Quick = typename form::Backward<Method, T>::Quick;
  constexpr int kSteps = tile::kSteps, kStates = tile::kThreadStates, kSlots = tile::kSlots;
  AdjointWarp<T>& memory = shared_memory<AdjointMemory<T>>().warps[threadIdx.x / kWarp];
  const ScanParams& p = scan.p;
  const WarpTile t = this_tile(scan, blockIdx.y + 1);
  if (t.channels == 0) return;
  const Lane lane;
  States A, adjoint, decay;
  load_states(scan, t, lane, p.A, 0, -1.0f, A);
  FormCoefficients<Quick> k;
  prepare<Quick>(A, k);
  fill(adjoint, 0.0f);
  fill(decay, 1.0f);
  const int c = 2 * lane.pair;
  const float2 bias = {load_parameter(p.delta_bias, t, c), load_parameter(p.delta_bias, t, c + 1)};
  if (lane.index == 0) {
    memory.delta = make_stream(p, p.delta, t);
    memory.z = make_stream(p, p.z, t);
    memory.dout = make_stream(p, out.g.dout, t);
    memory.B_and_C[0] = make_stream(scan, p.B, t);
    memory.B_and_C[1] = make_stream(scan, p.C, t);
  }
  __syncwarp();

  // Of a pair of channels at a step: see AdjointWarp::step.
  const auto stage = [&](int chunk, int step) {
    const AdjointInputs<T>& inputs = memory.inputs[chunk & 1];
    const int own = step + lane.half, steps = chunk < t.first_chunk ? 0 : chunk_steps(p, chunk);
    const float2 x = inputs.delta.pair(own, lane.pair), z = inputs.z.pair(own, lane.pair);
    const float2 dout = inputs.dout.pair(own, lane.pair);
    const float2 raw = {x.x + bias.x, x.y + bias.y};
    const float2 smooth = {softplus(raw.x).value, softplus(raw.y).value};
    float2 delta = {p.delta_softplus ? smooth.x : raw.x, p.delta_softplus ? smooth.y : raw.y};
    if (own >= steps) delta = {0.0f, 0.0f};  // leaves the adjoint as it is
    const float2 gradient = {dout.x * p.scale, dout.y * p.scale};
    float2 dy = {gradient.x * (z.x * sigmoid(z.x)), gradient.y * (z.y * sigmoid(z.y))};
    if (p.z.data == nullptr) dy = gradient;
    return float4{delta.x, dy.x, delta.y, dy.y};
  };
  const auto keep = [&](int chunk, int step, const float4& pair) {
    float2* target = memory.step[chunk & 1][step + lane.half] + lane.pair;
    target[0] = {pair.x, pair.y};
    target[16] = {pair.z, pair.w};
  };
  const int last = t.end_chunk - 1;
  float part[8];
  start_inputs(scan, t, lane, last, memory);
  wait_for_copies();
  __syncwarp();
  start_inputs(scan, t, lane, last - 1, memory);
#pragma unroll
  for (int step = 0; step < kSteps; step += 2) keep(last, step, stage(last, step));
  read_part(lane, memory.inputs[last & 1].matrices, part);
  keep_part(lane, part, memory.matrices[last & 1]);

  float total[kSlots] = {0.0f, 0.0f};  // of Δ
#pragma unroll 1
  for (int chunk = last; chunk >= t.first_chunk; --chunk) {
    const int now = chunk & 1;
    wait_for_copies();
    __syncwarp();
    start_inputs(scan, t, lane, chunk - 2, memory);
    read_part(lane, memory.inputs[1 - now].matrices, part);
#pragma unroll
    for (int first = kSteps - 4; first >= 0; first -= 4) {
      float4 staged[2];
#pragma unroll
      for (int step = first + 3; step >= first; --step) {
        float C[kStates];
        read_row(memory.matrices[now][step] + tile::kStates + lane.first_state(), C);
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
          const float2 in = memory.step[now][step][s == 0 ? lane.index : lane.partner()];
          if constexpr (Quick::kSlopeIsABar) total[s] += in.x;
#pragma unroll
          for (int j = 0; j < kStates; ++j) {
            const float a_bar = Quick::a_bar(in.x, k[s][j]);
            adjoint[s][j] = (C[j] * in.y + adjoint[s][j]) * a_bar;
            if constexpr (!Quick::kSlopeIsABar) decay[s][j] *= a_bar;
          }
        }
        if (step % 2 == 0) staged[(step - first) / 2] = stage(chunk - 1, step);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) keep(chunk - 1, first + 2 * i, staged[i]);
    }
    keep_part(lane, part, memory.matrices[1 - now]);
  }
  if constexpr (Quick::kSlopeIsABar) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
#pragma unroll
      for (int j = 0; j < kStates; ++j) decay[s][j] = Quick::a_bar(total[s], k[s][j]);
    }
  }
  store_states(scan, t, lane, sums.decay, segment_row(scan, t), decay);
  store_states(scan, t, lane, sums.local, segment_row(scan, t), adjoint);
}

}  // namespace mamba_ssm
