// What each segment of a split sequence makes of a state, and the states between the segments.
#include "scan_bwd.cuh"
#include "scan_fwd.cuh"

namespace mamba_ssm {
namespace {

constexpr int kStates = tile::kThreadStates;

// The thread's states, started from zero at one end of a segment, and the product of their Ā.
template <class Method>
struct SegmentWalk {
  decltype(Method::prepare(Real(0.0f))) k[kStates];
  float state[kStates], decay[kStates];

  MAMBA_SSM_DEVICE SegmentWalk(const GpuScan& scan, const Tile& t, const Thread& thread) {
    float A[kStates];
    load_states(scan, t, thread, scan.p.A, 0, -1.0f, A);
#pragma unroll
    for (int j = 0; j < kStates; ++j) {
      k[j] = Method::prepare(Real(A[j]));
      state[j] = 0.0f;
      decay[j] = 1.0f;
    }
  }
  MAMBA_SSM_DEVICE void store(const GpuScan& scan, const Tile& t, const Thread& thread, const SegmentSums& sums) const {
    store_states(scan, t, thread, sums.decay, segment_row(scan, t), decay);
    store_states(scan, t, thread, sums.local, segment_row(scan, t), state);
  }
};

template <class Method>
__global__ void __launch_bounds__(tile::kThreads)
    forward_sums_kernel(MAMBA_SSM_CONSTANT_PARAMETER GpuScan scan, MAMBA_SSM_CONSTANT_PARAMETER SegmentSums sums) {
  ForwardMemory& memory = shared_memory<ForwardMemory>();
  if (threadIdx.x == 0) memory.tile = this_tile(scan, blockIdx.y);
  __syncthreads();
  const Tile& t = memory.tile;
  const Thread thread = this_thread();
  SegmentWalk<Method> walk(scan, t, thread);
  DeltaProduct product(scan, &memory + 1);
  if (scan.p.delta_weight != nullptr) product.stage_weight(scan.p, t);
  start_forward_inputs<true>(scan, t, t.first_chunk, t.end_chunk, product, memory);
  for (int index = t.first_chunk; index < t.end_chunk; ++index) {
    const Chunk chunk = chunk_at(scan.p, index);
    wait_for_copies();
    __syncthreads();
    stage_forward<true>(scan, t, chunk, product, memory);
    __syncthreads();
    start_forward_inputs<true>(scan, t, index + 1, t.end_chunk, product, memory);
#pragma unroll 1
    for (int step = 0; step < chunk.steps; ++step) {
      const float2 in = memory.step[step][thread.channel];
      float B[kStates];
      read_states(memory.B[step], thread.first_state, B);
#pragma unroll
      for (int j = 0; j < kStates; ++j) {
        const Transition<Real> transition = Method::forward(Real(in.x), walk.k[j]);
        walk.state[j] = transition.a_bar.value * walk.state[j] + (transition.c * Real(in.y)).value * B[j];
        walk.decay[j] *= transition.a_bar.value;
      }
    }
  }
  walk.store(scan, t, thread, sums);
}

template <class Method>
__global__ void __launch_bounds__(tile::kThreads)
    backward_sums_kernel(MAMBA_SSM_CONSTANT_PARAMETER GpuScan scan, MAMBA_SSM_CONSTANT_PARAMETER Activation dout,
                         MAMBA_SSM_CONSTANT_PARAMETER SegmentSums sums) {
  BackwardMemory& memory = shared_memory<BackwardMemory>();
  if (threadIdx.x == 0) memory.tile = this_tile(scan, blockIdx.y + 1);
  __syncthreads();
  const Tile& t = memory.tile;
  const Thread thread = this_thread();
  SegmentWalk<Method> walk(scan, t, thread);
  DeltaProduct product(scan, &memory + 1);
  if (scan.p.delta_weight != nullptr) product.stage_weight(scan.p, t);
  start_backward_inputs<true>(scan, dout, t, t.end_chunk - 1, t.first_chunk, product, memory);
  for (int index = t.end_chunk - 1; index >= t.first_chunk; --index) {
    const Chunk chunk = chunk_at(scan.p, index);
    wait_for_copies();
    __syncthreads();
    stage_backward<true>(scan, dout, t, chunk, product, memory);
    __syncthreads();
    start_backward_inputs<true>(scan, dout, t, index - 1, t.first_chunk, product, memory);
#pragma unroll 1
    for (int step = chunk.steps - 1; step >= 0; --step) {
      const float delta = memory.step[step][thread.channel].x, dy = memory.dy[step][thread.channel];
      float C[kStates];
      read_states(memory.C[step], thread.first_state, C);
#pragma unroll
      for (int j = 0; j < kStates; ++j) {
        const float a_bar = Method::forward(Real(delta), walk.k[j]).a_bar.value;
        walk.state[j] = (C[j] * dy + walk.state[j]) * a_bar;
        walk.decay[j] *= a_bar;
      }
    }
  }
  walk.store(scan, t, thread, sums);
}

// One thread for each state of the launch.
__global__ void __launch_bounds__(tile::kThreads)
    join_segments_kernel(MAMBA_SSM_CONSTANT_PARAMETER GpuScan scan, bool backward,
                         MAMBA_SSM_CONSTANT_PARAMETER SegmentSums sums, const float* state, float* segment_states) {
  const ScanParams& p = scan.p;
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * tile::kThreads + threadIdx.x;
  const std::int64_t channel = index / scan.states % p.channels, batch = index / scan.states / p.channels;
  if (batch >= p.batch) return;
  const std::int64_t size = p.channels * p.states, place = channel * p.states + scan.first_state + index % scan.states;
  float h = state == nullptr ? 0.0f : state[batch * size + place];
  const std::int64_t first = batch * scan.segments * size + place;
#pragma unroll 8
  for (int i = 1; i < scan.segments; ++i) {
    const std::int64_t from = first + (backward ? scan.segments - i : i - 1) * size;
    h = sums.decay[from] * h + sums.local[from];
    segment_states[backward ? from - size : from + size] = h;
  }
}

}  // namespace

const char* launch_segment_sums(const GpuScan& scan, const Activation* dout, const SegmentSums& sums, void* stream) {
  using Forward = void (*)(GpuScan, SegmentSums);
  using Backward = void (*)(GpuScan, Activation, SegmentSums);
#define MAMBA_SSM_FORWARD(Method) forward_sums_kernel<ForAnyA<Method>>,
#define MAMBA_SSM_BACKWARD(Method) backward_sums_kernel<ForAnyA<Method>>,
  static constexpr Forward kForward[] = {MAMBA_SSM_DISCRETIZATIONS(MAMBA_SSM_FORWARD)};
  static constexpr Backward kBackward[] = {MAMBA_SSM_DISCRETIZATIONS(MAMBA_SSM_BACKWARD)};
#undef MAMBA_SSM_FORWARD
#undef MAMBA_SSM_BACKWARD
  const ScanParams& p = scan.p;
  const unsigned blocks = static_cast<unsigned>(p.batch * p.groups * scan.tiles), segments = scan.segments - 1;
  const std::size_t product = DeltaProduct::bytes(p.rank);
  if (dout == nullptr) {
    return launch<GpuScan, SegmentSums>(kForward[p.method], blocks, segments, tile::kThreads,
                                        sizeof(ForwardMemory) + product, stream, scan, sums);
  }
  return launch<GpuScan, Activation, SegmentSums>(kBackward[p.method], blocks, segments, tile::kThreads,
                                                  sizeof(BackwardMemory) + product, stream, scan, *dout, sums);
}

const char* launch_join_segments(const GpuScan& scan, bool backward, const SegmentSums& sums, const float* state,
                                 float* segment_states, void* stream) {
  const std::int64_t threads = scan.p.batch * scan.p.channels * scan.states;
  return launch<GpuScan, bool, SegmentSums, const float*, float*>(
      join_segments_kernel, static_cast<unsigned>((threads + tile::kThreads - 1) / tile::kThreads), 1, tile::kThreads,
      0, stream, scan, backward, sums, state, segment_states);
}

int multiprocessor_count() { return device_multiprocessors(); }

}  // namespace mamba_ssm
