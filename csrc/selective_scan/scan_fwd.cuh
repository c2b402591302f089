// The forward kernel of the scan. Chunk by chunk, a warp
//
//     stages    Δ (softplus applied), the weight of the input, D u + addend and the gate, B and C as floats,
//     scans     the chunk's steps, each thread eight states of two channels, and adds C·h over the states.
//
// While it scans a chunk it stages the next one, and the rows of the one after that are copied. The same walk without
// outputs gives the sums of a segment.
#pragma once

#include <type_traits>

#include "scan_gpu.cuh"

namespace mamba_ssm {

template <Dtype T>
struct ForwardInputs {
  Rows<T> u, delta, z;
  Rows<Dtype::f32> addend;
  RawMatrices<T> matrices;
};
template <Dtype T>
struct ForwardWarp {
  ForwardInputs<T> inputs[2];
  // By slot: Δ; Δu, or u where the method's c is not Δ times a factor; what the output begins with, and what it is
  // multiplied by in the end.
  alignas(16) float4 step[2][tile::kSteps][kWarp];
  alignas(16) MatrixRows matrices[2];
  KeptStream u, delta, z, addend, out, B_and_C[2];
};
template <Dtype T>
struct ForwardMemory {
  ForwardWarp<T> warps[tile::kWarps];
};

template <Dtype T>
MAMBA_SSM_DEVICE void make_streams(const GpuScan& scan, const WarpTile& t, const Lane& lane, ForwardWarp<T>& memory) {
  if (lane.index == 0) {
    const ScanParams& p = scan.p;
    memory.u = make_stream(p, p.u, t);
    memory.delta = make_stream(p, p.delta, t);
    memory.z = make_stream(p, p.z, t);
    memory.addend = make_stream(p, p.addend, t);
    memory.out = make_stream(p, p.out, t);
    memory.B_and_C[0] = make_stream(scan, p.B, t);
    memory.B_and_C[1] = make_stream(scan, p.C, t);
  }
  __syncwarp();
}

template <Output Kind, Dtype T>
MAMBA_SSM_DEVICE void start_inputs(const GpuScan& scan, const WarpTile& t, const Lane& lane, int chunk,
                                   ForwardWarp<T>& memory) {
  ForwardInputs<T>& inputs = memory.inputs[chunk % 2];
  const int steps = chunk < t.end_chunk ? chunk_steps(scan.p, chunk) : 0;
  const Stream u = memory.u, delta = memory.delta, z = memory.z;
  const Stream matrix = memory.B_and_C[lane.index / 2 % 2];
  start_copy(u, t.channels, lane, chunk, steps, inputs.u);
  start_copy(delta, t.channels, lane, chunk, steps, inputs.delta);
  start_copy(scan, matrix, lane, chunk, steps, inputs.matrices);
  if constexpr (Kind == Output::gated) start_copy(z, t.channels, lane, chunk, steps, inputs.z);
  if (Kind != Output::none && scan.p.addend.data != nullptr) {
    start_copy(Stream(memory.addend), t.channels, lane, chunk, steps, inputs.addend);
  }
}

// What belongs to a pair of channels.
struct PairParameters {
  float2 bias, D;
};

// A pair of channels at one step, see ForwardWarp::step.
struct StagedPair {
  float4 first, second;
};
template <Output Kind, bool InputIsDelta, Dtype T>
MAMBA_SSM_DEVICE StagedPair stage_pair(const ScanParams& p, const ForwardInputs<T>& inputs, int step, int pair,
                                       int steps, const PairParameters& parameters, float2& total) {
  const float2 x = inputs.delta.pair(step, pair), u = inputs.u.pair(step, pair);
  const bool valid = step < steps;  // Δ = 0 leaves the state as it is
  const float2 raw = {x.x + parameters.bias.x, x.y + parameters.bias.y};
  const float2 smooth = {softplus(raw.x).value, softplus(raw.y).value};
  float2 d = {p.delta_softplus ? smooth.x : raw.x, p.delta_softplus ? smooth.y : raw.y};
  d = {valid ? d.x : 0.0f, valid ? d.y : 0.0f};
  if constexpr (Kind == Output::none) total = {total.x + d.x, total.y + d.y};
  float2 sum = {0.0f, 0.0f}, gate = {p.scale, p.scale};
  if constexpr (Kind != Output::none) {
    sum = inputs.addend.pair(step, pair);
    sum = {sum.x + parameters.D.x * u.x, sum.y + parameters.D.y * u.y};
  }
  if constexpr (Kind == Output::gated) {
    const float2 z = inputs.z.pair(step, pair);
    const float2 s = {sigmoid(z.x), sigmoid(z.y)};
    gate = {p.scale * z.x * s.x, p.scale * z.y * s.y};
  }
  return {{d.x, InputIsDelta ? d.x * u.x : u.x, sum.x, gate.x}, {d.y, InputIsDelta ? d.y * u.y : u.y, sum.y, gate.y}};
}

// One step of a channel's states, and the sum C·h.
template <class Form, Output Kind>
MAMBA_SSM_DEVICE float scan_step(float delta, float input, const typename Form::Coefficients (&k)[tile::kThreadStates],
                                 const float (&B)[tile::kThreadStates], const float (&C)[tile::kThreadStates],
                                 float (&h)[tile::kThreadStates], float (&decay)[tile::kThreadStates]) {
  float y = 0.0f;
#pragma unroll
  for (int j = 0; j < tile::kThreadStates; ++j) {
    h[j] = Form::advance(h[j], delta, input, B[j], k[j]);
    if constexpr (Kind != Output::none) {
      y += C[j] * h[j];
    } else if constexpr (!Form::kSlopeIsABar) {
      decay[j] *= Form::a_bar(delta, k[j]);
    }
  }
  return y;
}

// The whole walk of one warp. Without output: the states and the decay of a segment.
template <class Method, Dtype T, Output Kind>
MAMBA_SSM_DEVICE void scan_tile(const GpuScan& scan, const SegmentSums& sums, const WarpTile& t, const Lane& lane,
                                ForwardWarp<T>& memory) {
  using Quick = typename form::Forward<Method, T>::Quick;
  using General = typename form::Forward<Method, T>::General;
  constexpr int kStates = tile::kThreadStates, kSlots = tile::kSlots, kSteps = tile::kSteps;
  constexpr bool kOutput = Kind != Output::none;
  const ScanParams& p = scan.p;
  States A, h, decay;
  load_states(scan, t, lane, p.A, 0, -1.0f, A);
  const QuickLimits<Quick, General, false> limits(A);
  typename Quick::Coefficients k[kSlots][kStates];
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
#pragma unroll
    for (int j = 0; j < kStates; ++j) {
      k[s][j] = Quick::prepare(A[s][j]);
      decay[s][j] = 1.0f;
    }
  }
  if (!kOutput) {
    load_states(scan, t, lane, nullptr, 0, 0.0f, h);
  } else if (t.segment > 0) {
    load_states(scan, t, lane, scan.segment_states, segment_row(scan, t), 0.0f, h);
  } else {
    load_states(scan, t, lane, p.initial_state, t.batch, 0.0f, h);
  }
  const int c = 2 * lane.pair;
  const PairParameters parameters = {{load_parameter(p.delta_bias, t, c), load_parameter(p.delta_bias, t, c + 1)},
                                     {load_parameter(p.D, t, c), load_parameter(p.D, t, c + 1)}};
  float2 total = {0.0f, 0.0f};  // of Δ

  make_streams(scan, t, lane, memory);
  if (kOutput && p.addend.data == nullptr) {  // zeros, once
    for (ForwardInputs<T>& inputs : memory.inputs) start_copy(Stream(memory.addend), 0, lane, 0, 0, inputs.addend);
  }
  start_inputs<Kind>(scan, t, lane, t.first_chunk, memory);
  wait_for_copies();
  __syncwarp();
  start_inputs<Kind>(scan, t, lane, t.first_chunk + 1, memory);
  // Steps of a chunk staged at one time: what is stored to shared memory parts the instructions before from those
  // behind.
  constexpr int kStaged = 4;
  bool fits = limits.any;  // the quick form, what is staged
  const auto stage = [&](int chunk, int step) {
    const int steps = chunk < t.end_chunk ? chunk_steps(p, chunk) : 0;
    const StagedPair pair = stage_pair<Kind, Quick::kInputIsDelta>(p, memory.inputs[chunk % 2], step + lane.half,
                                                                   lane.pair, steps, parameters, total);
    const bool exists = step + lane.half < steps && 2 * lane.pair < t.channels;
    fits &= limits.allow(exists, pair.first.x, pair.second.x);
    return pair;
  };
  const auto keep = [&](int chunk, int first, const StagedPair(&staged)[kStaged / 2]) {
#pragma unroll
    for (int i = 0; i < kStaged / 2; ++i) {
      float4* target = memory.step[chunk % 2][first + 2 * i + lane.half] + lane.pair;
      target[0] = staged[i].first;
      target[16] = staged[i].second;
    }
  };
#pragma unroll
  for (int first = 0; first < kSteps; first += kStaged) {
    const StagedPair staged[kStaged / 2] = {stage(t.first_chunk, first), stage(t.first_chunk, first + 2)};
    keep(t.first_chunk, first, staged);
  }
  float part[8];
  read_part(lane, memory.inputs[t.first_chunk % 2].matrices, part);
  keep_part(lane, part, memory.matrices[t.first_chunk % 2]);

  const auto scan_chunk = [&]<class Form>(std::type_identity<Form>, const auto& coefficients, int chunk) {
    const int now = chunk % 2, next = 1 - now, steps = chunk_steps(p, chunk);
    constexpr bool kEarly = limits.kAlways;  // else that takes registers which two forms need
    wait_for_copies();
    __syncwarp();
    if constexpr (kEarly) start_inputs<Kind>(scan, t, lane, chunk + 2, memory);
    if (kOutput && p.checkpoints != nullptr && is_checkpoint(scan, chunk) && chunk >= p.first_checkpoint) {
      store_states(scan, t, lane, p.checkpoints, checkpoint_row(scan, t, chunk), h);
    }
    const Stream out = memory.out;
    char* elements = out.row(chunk * kSteps) + lane.channel(0) * out.size;
    const int written = lane.channel(0) < t.channels ? steps : 0;
    const int written_in_T = out.size == kSize<T> ? written : 0;
#pragma unroll
    for (int first = 0; first < kSteps; first += kStaged) {
      StagedPair staged[kStaged / 2];
      if (first == 0) read_part(lane, memory.inputs[next].matrices, part);
#pragma unroll
      for (int step = first; step < first + kStaged; ++step) {
        const float4 own = memory.step[now][step][lane.index];
        const float2 partner = *reinterpret_cast<const float2*>(&memory.step[now][step][lane.partner()]);
        const float* row = memory.matrices[now][step] + lane.first_state();
        float B[kStates], C[kStates];
        read_row(row, B);
        if constexpr (kOutput) read_row(row + tile::kStates, C);
        const float y = scan_step<Form, Kind>(own.x, own.y, coefficients[0], B, C, h[0], decay[0]);
        const float partner_y = scan_step<Form, Kind>(partner.x, partner.y, coefficients[1], B, C, h[1], decay[1]);
        if constexpr (kOutput) {
          const float result = (y + shuffle_xor(partner_y, 16) + own.z) * own.w;
          char* element = advance(elements, step, out.row_bytes);
          store_element_below<T>(step, written_in_T, element, result);
          if constexpr (Kind == Output::plain && T != Dtype::f32) {
            store_element_below<Dtype::f32>(step, written - written_in_T, element, result);
          }
        }
        if ((step - first) % 2 == 1) staged[(step - first) / 2] = stage(chunk + 1, step - 1);
      }
      keep(chunk + 1, first, staged);
      if (first == 0) {
        keep_part(lane, part, memory.matrices[next]);
        if constexpr (!kEarly) start_inputs<Kind>(scan, t, lane, chunk + 2, memory);
      }
    }
  };
#pragma unroll 1
  for (int chunk = t.first_chunk; chunk < t.end_chunk; ++chunk) {
    if constexpr (limits.kAlways) {
      scan_chunk(std::type_identity<Quick>(), k, chunk);
    } else {
      const bool quick = warp_all(fits);
      fits = limits.any;
      if (quick) {
        scan_chunk(std::type_identity<Quick>(), k, chunk);
      } else {
        load_states(scan, t, lane, p.A, 0, -1.0f, A);
        typename General::Coefficients general[kSlots][kStates];
#pragma unroll
        for (int i = 0; i < kSlots * kStates; ++i) {
          general[i / kStates][i % kStates] = General::prepare(A[i / kStates][i % kStates]);
        }
        scan_chunk(std::type_identity<General>(), general, chunk);
      }
    }
  }
  if constexpr (!kOutput) {
    if constexpr (Quick::kSlopeIsABar) {
      total = {total.x + shuffle_xor(total.x, 16), total.y + shuffle_xor(total.y, 16)};
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        const float x = (lane.half ^ s) == 0 ? total.x : total.y;
#pragma unroll
        for (int j = 0; j < kStates; ++j) decay[s][j] = Quick::a_bar(x, k[s][j]);
      }
    }
    store_states(scan, t, lane, sums.decay, segment_row(scan, t), decay);
    store_states(scan, t, lane, sums.local, segment_row(scan, t), h);
  } else if (t.segment == scan.segments - 1) {
    store_states(scan, t, lane, p.last_state, t.batch, h);
  }
}

template <class Method, Dtype T, Output Kind>
__global__ void __launch_bounds__(tile::kThreads, tile::kForwardBlocks)
    scan_forward_kernel(MAMBA_SSM_CONSTANT_PARAMETER GpuScan scan, MAMBA_SSM_CONSTANT_PARAMETER SegmentSums sums) {
  ForwardWarp<T>& memory = shared_memory<ForwardMemory<T>>().warps[threadIdx.x / kWarp];
  const WarpTile t = this_tile(scan, blockIdx.y);
  if (t.channels > 0) scan_tile<Method, T, Kind>(scan, sums, t, Lane(), memory);
}

template <Dtype T>
const char* launch_scan_forward(const GpuScan& scan, Output kind, const SegmentSums& sums, void* stream) {
  using Kernel = void (*)(GpuScan, SegmentSums);
#define MAMBA_SSM_KERNELS(Method)                                                               \
  {scan_forward_kernel<Method, T, Output::none>, scan_forward_kernel<Method, T, Output::plain>, \
   scan_forward_kernel<Method, T, Output::gated>},
  static constexpr Kernel kKernels[][3] = {MAMBA_SSM_DISCRETIZATIONS(MAMBA_SSM_KERNELS)};
#undef MAMBA_SSM_KERNELS
  const ScanParams& p = scan.p;
  return launch<GpuScan, SegmentSums>(kKernels[p.method][static_cast<int>(kind)],
                                      static_cast<unsigned>(p.batch * p.groups * scan.tiles),
                                      kind == Output::none ? scan.segments - 1 : scan.segments, tile::kThreads,
                                      sizeof(ForwardMemory<T>), stream, scan, sums);
}

}  // namespace mamba_ssm
