// The forward kernel of the scan. Chunk by chunk, a warp
//
//     stages    Δ (softplus applied), the weight of the input, D u + addend and the gate, B and C as floats,
//     scans     the chunk's steps, each thread eight states of two channels, and adds C·h over the states.
//
// While it scans a chunk it stages the next one, and the rows of the one after that are copied. The same walk without
// outputs gives the sums of a segment.
#pragma once

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
  float2 limits;  // QuickLimits::of_step
};
template <Dtype T>
struct ForwardMemory {
  ForwardWarp<T> warps[tile::kWarps];
};
// A multiprocessor has 228 KiB, of which each block takes 1 KiB more than it asks for.
static_assert(tile::kForwardBlocks * (sizeof(ForwardMemory<Dtype::bf16>) + 1024) <= 228 * 1024);

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
class ForwardWalk {
  using Quick = typename form::Forward<Method, T>::Quick;
  using General = typename form::Forward<Method, T>::General;
  using Limits = QuickLimits<Quick, General, false>;
  static constexpr int kStates = tile::kThreadStates, kSlots = tile::kSlots, kSteps = tile::kSteps;
  // Steps of a chunk staged at one time: what is stored to shared memory parts the instructions before from those
  // behind.
  static constexpr int kStaged = 4;
  static constexpr bool kOutput = Kind != Output::none;

  const GpuScan& scan_;
  ForwardWarp<T>& memory_;
  const WarpTile t_;
  const Lane lane_;
  PairParameters parameters_;
  States h_, decay_;
  float2 total_ = {0.0f, 0.0f};   // of Δ
  typename Limits::Steps steps_;  // of the chunk that is staged

 public:
  MAMBA_SSM_DEVICE ForwardWalk(const GpuScan& scan, const WarpTile& t, const States& A, ForwardWarp<T>& memory)
      : scan_(scan), memory_(memory), t_(t) {
    const ScanParams& p = scan.p;
    const Limits limits(A);
    if (!Limits::kAlways && lane_.index == 0) memory.limits = limits.of_step;
    fill(decay_, 1.0f);
    if (!kOutput) {
      fill(h_, 0.0f);
    } else if (t.segment > 0) {
      load_states(scan, t, lane_, scan.segment_states, segment_row(scan, t), 0.0f, h_);
    } else {
      load_states(scan, t, lane_, p.initial_state, t.batch, 0.0f, h_);
    }
    const int c = 2 * lane_.pair;
    parameters_ = {{load_parameter(p.delta_bias, t, c), load_parameter(p.delta_bias, t, c + 1)},
                   {load_parameter(p.D, t, c), load_parameter(p.D, t, c + 1)}};
  }

  MAMBA_SSM_DEVICE void run(const States& A, const SegmentSums& sums) {
    FormCoefficients<Quick> k;
    prepare<Quick>(A, k);
    make_streams(scan_, t_, lane_, memory_);
    if (kOutput && scan_.p.addend.data == nullptr) {  // zeros, once
      const Stream none = memory_.addend;
      for (ForwardInputs<T>& inputs : memory_.inputs) start_copy(none, 0, lane_, 0, 0, inputs.addend);
    }
    start_inputs<Kind>(scan_, t_, lane_, t_.first_chunk, memory_);
    wait_for_copies();
    __syncwarp();
    start_inputs<Kind>(scan_, t_, lane_, t_.first_chunk + 1, memory_);
#pragma unroll
    for (int first = 0; first < kSteps; first += kStaged) {
      const StagedPair staged[kStaged / 2] = {stage(t_.first_chunk, first), stage(t_.first_chunk, first + 2)};
      keep(t_.first_chunk, first, staged);
    }
    float part[8];
    read_part(lane_, memory_.inputs[t_.first_chunk % 2].matrices, part);
    keep_part(lane_, part, memory_.matrices[t_.first_chunk % 2]);

#pragma unroll 1
    for (int chunk = t_.first_chunk; chunk < t_.end_chunk; ++chunk) {
      if constexpr (Limits::kAlways) {
        scan_chunk<Quick>(k, chunk);
      } else {
        const bool quick = steps_.fit(memory_.limits);
        steps_ = {};
        if (quick) {
          scan_chunk<Quick>(k, chunk);
        } else {
          ForwardWalk walk = *this;
          scan_generally(walk, chunk);
          take(walk);
        }
      }
    }
    finish(k, sums);
  }

 private:
  // Not inlined: there it would take registers of the quick form's, and their place in the instruction cache.
  static MAMBA_SSM_DEVICE_CALL void scan_generally(ForwardWalk& walk, int chunk) {
    States A;
    load_states(walk.scan_, walk.t_, walk.lane_, walk.scan_.p.A, 0, -1.0f, A);
    FormCoefficients<General> k;
    prepare<General>(A, k);
    walk.template scan_chunk<General>(k, chunk);
  }
  MAMBA_SSM_DEVICE void take(const ForwardWalk& other) {
    copy(other.h_, h_);
    copy(other.decay_, decay_);
    total_ = other.total_;
    steps_ = other.steps_;
  }

  MAMBA_SSM_DEVICE StagedPair stage(int chunk, int step) {
    const int steps = chunk < t_.end_chunk ? chunk_steps(scan_.p, chunk) : 0;
    const StagedPair pair = stage_pair<Kind, Quick::kInputIsDelta>(
        scan_.p, memory_.inputs[chunk % 2], step + lane_.half, lane_.pair, steps, parameters_, total_);
    const bool exists = step + lane_.half < steps && 2 * lane_.pair < t_.channels;
    steps_.add(exists, pair.first.x, pair.second.x);
    return pair;
  }
  MAMBA_SSM_DEVICE void keep(int chunk, int first, const StagedPair (&staged)[kStaged / 2]) {
#pragma unroll
    for (int i = 0; i < kStaged / 2; ++i) {
      float4* target = memory_.step[chunk % 2][first + 2 * i + lane_.half] + lane_.pair;
      target[0] = staged[i].first;
      target[16] = staged[i].second;
    }
  }

  template <class Form>
  MAMBA_SSM_DEVICE void scan_chunk(const FormCoefficients<Form>& k, int chunk) {
    const int now = chunk % 2, next = 1 - now;
    wait_for_copies();
    __syncwarp();
    start_inputs<Kind>(scan_, t_, lane_, chunk + 2, memory_);
    const ScanParams& p = scan_.p;
    if (kOutput && p.checkpoints != nullptr && is_checkpoint(scan_, chunk) && chunk >= p.first_checkpoint) {
      store_states(scan_, t_, lane_, p.checkpoints, checkpoint_row(scan_, t_, chunk), h_);
    }
    const Stream out = memory_.out;
    char* elements = out.row(chunk * kSteps) + lane_.channel(0) * out.size;
    const int written = lane_.channel(0) < t_.channels ? chunk_steps(p, chunk) : 0;
    const int written_in_T = out.size == kSize<T> ? written : 0;
    float part[8];
#pragma unroll
    for (int first = 0; first < kSteps; first += kStaged) {
      StagedPair staged[kStaged / 2];
      if (first == 0) read_part(lane_, memory_.inputs[next].matrices, part);
#pragma unroll
      for (int i = 0; i < kStaged; ++i) {
        const int step = first + i;
        const float4 own = memory_.step[now][step][lane_.index];
        const float2 partner = *reinterpret_cast<const float2*>(&memory_.step[now][step][lane_.partner()]);
        const float* row = memory_.matrices[now][step] + lane_.first_state();
        float B[kStates], C[kStates];
        read_row(row, B);
        if constexpr (kOutput) read_row(row + tile::kStates, C);
        const float y = scan_step<Form, Kind>(own.x, own.y, k[0], B, C, h_[0], decay_[0]);
        const float partner_y = scan_step<Form, Kind>(partner.x, partner.y, k[1], B, C, h_[1], decay_[1]);
        if constexpr (kOutput) {
          const float result = (y + shuffle_xor(partner_y, 16) + own.z) * own.w;
          char* element = advance(elements, step, out.row_bytes);
          store_element_below<T>(step, written_in_T, element, result);
          if constexpr (Kind == Output::plain && T != Dtype::f32) {
            store_element_below<Dtype::f32>(step, written - written_in_T, element, result);
          }
        }
        if (i % 2 == 1) staged[i / 2] = stage(chunk + 1, step - 1);
      }
      keep(chunk + 1, first, staged);
      if (first == 0) keep_part(lane_, part, memory_.matrices[next]);
    }
  }

  MAMBA_SSM_DEVICE void finish(const FormCoefficients<Quick>& k, const SegmentSums& sums) {
    if constexpr (!kOutput) {
      if constexpr (Quick::kSlopeIsABar) {
        const float2 total = {total_.x + shuffle_xor(total_.x, 16), total_.y + shuffle_xor(total_.y, 16)};
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
          const float x = (lane_.half ^ s) == 0 ? total.x : total.y;
#pragma unroll
          for (int j = 0; j < kStates; ++j) decay_[s][j] = Quick::a_bar(x, k[s][j]);
        }
      }
      store_states(scan_, t_, lane_, sums.decay, segment_row(scan_, t_), decay_);
      store_states(scan_, t_, lane_, sums.local, segment_row(scan_, t_), h_);
    } else if (t_.segment == scan_.segments - 1) {
      store_states(scan_, t_, lane_, scan_.p.last_state, t_.batch, h_);
    }
  }
};

template <class Method, Dtype T, Output Kind>
__global__ void __launch_bounds__(tile::kThreads, tile::kForwardBlocks)
    scan_forward_kernel(MAMBA_SSM_CONSTANT_PARAMETER GpuScan scan, MAMBA_SSM_CONSTANT_PARAMETER SegmentSums sums) {
  ForwardWarp<T>& memory = shared_memory<ForwardMemory<T>>().warps[threadIdx.x / kWarp];
  const WarpTile t = this_tile(scan, blockIdx.y);
  if (t.channels == 0) return;
  States A;
  load_states(scan, t, Lane(), scan.p.A, 0, -1.0f, A);
  ForwardWalk<Method, T, Kind>(scan, t, A, memory).run(A, sums);
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
