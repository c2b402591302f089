// The forward kernel of the scan for few channels and batch elements: a channel's states are spread over the lanes of a
// warp, so that there are more warps than in scan_fwd.cuh, each with less to do at a step. See launch_config.h.
//
// Chunk by chunk, a block stages Δ, the weight of the input, B and C, one pair of channels at one step a thread, and
// scans the chunk's steps. The threads that staged the pairs add up the lanes' parts of C·h and write the output. Rows
// of the chunk after next are on their way to registers meanwhile.
#pragma once

#include <type_traits>

#include "scan_gpu.cuh"

namespace mamba_ssm {

// Lanes: of a channel.
template <int Lanes>
struct Spread {
  static constexpr int kStates = tile::kStates / Lanes;  // of a thread
  static constexpr int kThreads = spread_tile::threads(Lanes), kWarps = kThreads / kWarp;
  static constexpr int kWarpChannels = kWarp / Lanes, kChannels = kThreads / Lanes, kPairs = kChannels / 2;
  static constexpr int kSteps = kThreads / kPairs;       // of a chunk: a pair of channels at a step is a thread's
  static constexpr int kRounds = kSteps * 8 / kThreads;  // quads of B and C that a thread stages
  static_assert((kStates == 2 || kStates == 4) && kStates * Lanes == tile::kStates);
  static_assert(kPairs == 8);  // see add_up
};

template <int Lanes>
struct SpreadMemory {
  using Tile = Spread<Lanes>;
  struct Chunk {
    alignas(16) float2 inputs[Tile::kSteps / 2][Tile::kChannels][2];  // Δ, and what Form::advance calls input
    // What a lane reads at one time: B and C of its two states at a step, or B, then C, of its four states.
    alignas(16) float matrices[Tile::kSteps * Tile::kStates / 2][Lanes][4];
    alignas(16) float parts[Tile::kSteps][Tile::kChannels][Lanes];  // of C·h
    int quick[Tile::kWarps];  // whether the quick form serves what each warp has staged
  };
  Chunk chunks[2];
  float2 sizes[Tile::kWarps];  // the least and the greatest |A| of each warp
};
// Most multiprocessors have 164 KiB or more, of which each block takes 1 KiB more than it asks for: enough for the
// blocks that bound the registers. Those with 100 KiB hold three of the four with eight lanes.
static_assert(spread_tile::kWarps / Spread<8>::kWarps * (sizeof(SpreadMemory<8>) + 1024) <= 164 * 1024);
static_assert(spread_tile::kWarps / Spread<4>::kWarps * (sizeof(SpreadMemory<4>) + 1024) <= 164 * 1024);

// A thread's share of a chunk, as it is in memory.
template <Dtype T, int Lanes>
struct SpreadRows {
  using Pair = std::conditional_t<T == Dtype::f32, float2, std::uint32_t>;
  Pair u, delta, z;
  float2 addend;
  RawFour<T> matrices[Spread<Lanes>::kRounds];
};
template <Dtype T>
MAMBA_SSM_DEVICE RawFour<T> load_raw_four(const void* address) {  // aligned to 8 bytes
  if constexpr (T == Dtype::f32) {
    const float2 low = load_vector<float2>(address),
                 high = load_vector<float2>(static_cast<const float2*>(address) + 1);
    return {low.x, low.y, high.x, high.y};
  } else {
    return load_vector<uint2>(address);
  }
}

template <class Method, Dtype T, Output Kind, int Lanes>
class SpreadScan {
  using Tile = Spread<Lanes>;
  using Quick = typename form::Forward<Method, T>::Quick;
  using General = typename form::Forward<Method, T>::General;
  using Limits = QuickLimits<Quick, General, false>;
  using Memory = SpreadMemory<Lanes>;
  using Row = float[Spread<Lanes>::kStates];
  static constexpr int kStates = Tile::kStates, kSteps = Tile::kSteps;

  // Where the thread's elements of a tensor are, chunk after chunk.
  struct Walk {
    char* at = nullptr;
    int chunk_bytes = 0;  // the host sees to it that rows are near enough
    MAMBA_SSM_DEVICE Walk(const Stream& s, int step, int element)
        : at(s.row(step) + element * s.size), chunk_bytes(s.row_bytes * kSteps) {}
    MAMBA_SSM_DEVICE void next() { at += chunk_bytes; }
  };

  const GpuScan& scan_;
  const ScanParams& p_;
  const WarpTile& t_;  // of the block
  Memory& memory_;
  int length_;
  int channel_, slot_;  // the thread's channel, and its place among the lanes of that
  // Of the pair of channels and the step that the thread stages.
  int pair_, step_;
  bool pair_exists_;
  float2 bias_, D_;
  Walk u_, delta_, z_, addend_, out_, matrix_;
  int matrix_row_bytes_;
  bool matrix_exists_, float_out_;
  int checkpoint_mask_, first_checkpoint_;

  static MAMBA_SSM_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
  static MAMBA_SSM_DEVICE int matrix_step(int round) { return thread() / 8 + round * (Tile::kThreads / 8); }
  static MAMBA_SSM_DEVICE int matrix_state() { return thread() % 4 * 4; }
  static MAMBA_SSM_DEVICE bool is_C() { return thread() % 8 >= 4; }

 public:
  MAMBA_SSM_DEVICE SpreadScan(const GpuScan& scan, const WarpTile& t, Memory& memory)
      : scan_(scan),
        p_(scan.p),
        t_(t),
        memory_(memory),
        length_(static_cast<int>(scan.p.length)),
        channel_(thread() / kWarp * Tile::kWarpChannels + thread() % Tile::kWarpChannels),
        slot_(thread() % kWarp / Tile::kWarpChannels),
        pair_(thread() % Tile::kPairs),
        step_(thread() / Tile::kPairs),
        pair_exists_(2 * pair_ < t.channels),
        bias_{load_parameter(p_.delta_bias, t, 2 * pair_), load_parameter(p_.delta_bias, t, 2 * pair_ + 1)},
        D_{load_parameter(p_.D, t, 2 * pair_), load_parameter(p_.D, t, 2 * pair_ + 1)},
        u_(make_stream(p_, p_.u, t), step_, 2 * pair_),
        delta_(make_stream(p_, p_.delta, t), step_, 2 * pair_),
        z_(make_stream(p_, p_.z, t), step_, 2 * pair_),
        addend_(make_stream(p_, p_.addend, t), step_, 2 * pair_),
        out_(make_stream(p_, p_.out, t), step_, 2 * pair_),
        matrix_(make_stream(scan, is_C() ? p_.C : p_.B, t), matrix_step(0), matrix_state()),
        matrix_row_bytes_(matrix_.chunk_bytes / kSteps),
        matrix_exists_(matrix_state() < scan.states),
        float_out_(T == Dtype::f32 || (Kind == Output::plain && p_.out.dtype == Dtype::f32)),
        // Without checkpoints none but the first place is one.
        checkpoint_mask_(p_.checkpoints == nullptr ? 0x7fffffff : (1 << scan.checkpoint_shift) - 1),
        first_checkpoint_(p_.checkpoints == nullptr ? 1 : static_cast<int>(p_.first_checkpoint)) {}

  MAMBA_SSM_DEVICE void run() {
    const int chunks = (length_ + kSteps - 1) / kSteps;
    Row A, h;
    load_row(p_.A, 0, -1.0f, A);
    load_row(p_.initial_state, t_.batch, 0.0f, h);
    const Limits limits = block_limits(A);
    typename Quick::Coefficients k[kStates];
#pragma unroll
    for (int j = 0; j < kStates; ++j) k[j] = Quick::prepare(A[j]);

    SpreadRows<T, Lanes> rows;
    float2 sum = {}, gate = {}, next_sum = {}, next_gate = {};
    load_rows(0, rows);
    stage(0, rows, limits, sum, gate);
    load_rows(1, rows);
    __syncthreads();
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      stage(chunk + 1, rows, limits, next_sum, next_gate);
      load_rows(chunk + 2, rows);
      bool quick = true;
      if constexpr (!Limits::kAlways) {
        for (int w = 0; w < Tile::kWarps; ++w) quick &= memory_.chunks[chunk % 2].quick[w] != 0;
      }
      if (quick) {
        scan_chunk(std::type_identity<Quick>(), k, chunk, h);
      } else if constexpr (!Limits::kAlways) {
        load_row(p_.A, 0, -1.0f, A);
        typename General::Coefficients general[kStates];
#pragma unroll
        for (int j = 0; j < kStates; ++j) general[j] = General::prepare(A[j]);
        scan_chunk(std::type_identity<General>(), general, chunk, h);
      }
      __syncthreads();
      write(chunk, sum, gate);
      sum = next_sum, gate = next_gate;
    }
    store_row(p_.last_state, t_.batch, h);
  }

 private:
  // The thread's states in a row of a matrix (rows, channels, states).
  MAMBA_SSM_DEVICE std::int64_t row_index(std::int64_t row) const {
    return (row * p_.channels + t_.channel + channel_) * p_.states + scan_.first_state + slot_ * kStates;
  }
  MAMBA_SSM_DEVICE bool has_row() const { return channel_ < t_.channels && slot_ * kStates < scan_.states; }
  MAMBA_SSM_DEVICE void load_row(const float* matrix, std::int64_t row, float missing, Row& values) const {
    const bool exists = matrix != nullptr && has_row();
#pragma unroll
    for (int j = 0; j < kStates; ++j) values[j] = exists ? matrix[row_index(row) + j] : missing;
  }
  MAMBA_SSM_DEVICE void store_row(float* matrix, std::int64_t row, const Row& values) const {
    if (matrix == nullptr || !has_row()) return;
#pragma unroll
    for (int j = 0; j < kStates; ++j) matrix[row_index(row) + j] = values[j];
  }
  MAMBA_SSM_DEVICE Limits block_limits(const Row& A) {
    float smallest = Limits::size(A[0]), largest = smallest;
    if constexpr (!Limits::kAlways) {
#pragma unroll
      for (int j = 1; j < kStates; ++j) {
        smallest = fminf(smallest, Limits::size(A[j]));
        largest = fmaxf(largest, Limits::size(A[j]));
      }
#pragma unroll
      for (int i = 1; i < kWarp; i *= 2) {
        smallest = fminf(smallest, shuffle_xor(smallest, i));
        largest = fmaxf(largest, shuffle_xor(largest, i));
      }
      if (threadIdx.x % kWarp == 0) memory_.sizes[threadIdx.x / kWarp] = {smallest, largest};
      __syncthreads();
      for (int w = 0; w < Tile::kWarps; ++w) {
        smallest = fminf(smallest, memory_.sizes[w].x);
        largest = fmaxf(largest, memory_.sizes[w].y);
      }
    }
    return Limits(smallest, largest);
  }

  MAMBA_SSM_DEVICE void load_rows(int chunk, SpreadRows<T, Lanes>& rows) {
    using Pair = typename SpreadRows<T, Lanes>::Pair;
    const bool exists = chunk * kSteps + step_ < length_ && pair_exists_;
    rows.u = exists ? load_vector<Pair>(u_.at) : Pair{};
    rows.delta = exists ? load_vector<Pair>(delta_.at) : Pair{};
    if constexpr (Kind == Output::gated) rows.z = exists ? load_vector<Pair>(z_.at) : Pair{};
    rows.addend = exists && p_.addend.data != nullptr ? load_vector<float2>(addend_.at) : float2{};
#pragma unroll
    for (int r = 0; r < Tile::kRounds; ++r) {
      rows.matrices[r] = {};
      if (chunk * kSteps + matrix_step(r) < length_ && matrix_exists_) {
        rows.matrices[r] = load_raw_four<T>(matrix_.at + r * (Tile::kThreads / 8) * matrix_row_bytes_);
      }
    }
    for (Walk* walk : {&u_, &delta_, &z_, &addend_, &matrix_}) walk->next();
  }

  // sum: what the output begins with; gate: what it is multiplied by in the end.
  MAMBA_SSM_DEVICE void stage(int chunk, const SpreadRows<T, Lanes>& rows, const Limits& limits, float2& sum,
                              float2& gate) {
    auto& target = memory_.chunks[chunk % 2];
    const bool exists = chunk * kSteps + step_ < length_ && pair_exists_;
    const float2 x = load_pair<T>(&rows.delta, 0), u = load_pair<T>(&rows.u, 0);
    const float2 raw = {x.x + bias_.x, x.y + bias_.y};
    float2 d = raw;
    if (p_.delta_softplus) d = {softplus(raw.x).value, softplus(raw.y).value};
    d = {exists ? d.x : 0.0f, exists ? d.y : 0.0f};  // Δ = 0 leaves the state as it is
    constexpr bool kInputIsDelta = Quick::kInputIsDelta;
    float2(*inputs)[2] = &target.inputs[step_ / 2][2 * pair_];
    inputs[0][step_ % 2] = {d.x, kInputIsDelta ? d.x * u.x : u.x};
    inputs[1][step_ % 2] = {d.y, kInputIsDelta ? d.y * u.y : u.y};
    sum = {rows.addend.x + D_.x * u.x, rows.addend.y + D_.y * u.y};
    gate = {p_.scale, p_.scale};
    if constexpr (Kind == Output::gated) {
      const float2 z = load_pair<T>(&rows.z, 0);
      gate = {p_.scale * z.x * sigmoid(z.x), p_.scale * z.y * sigmoid(z.y)};
    }
    if constexpr (!Limits::kAlways) {
      typename Limits::Steps steps;
      steps.add(exists, d.x, d.y);
      const bool fits = steps.fit(limits.of_step);
      if (threadIdx.x % kWarp == 0) target.quick[threadIdx.x / kWarp] = fits;
    }
#pragma unroll
    for (int r = 0; r < Tile::kRounds; ++r) {
      float values[4];
      to_floats<T>(rows.matrices[r], values);
      const int s = matrix_step(r);
      if constexpr (kStates == 4) {
        store_vector(target.matrices[2 * s + is_C()][matrix_state() / 4], from_floats<Dtype::f32>(values));
      } else {
        float (*two)[4] = &target.matrices[s][matrix_state() / 2];
        store_vector(two[0] + 2 * is_C(), float2{values[0], values[1]});
        store_vector(two[1] + 2 * is_C(), float2{values[2], values[3]});
      }
    }
  }

  // Two steps of the thread's channel and states.
  struct TwoSteps {
    float delta[2], input[2];
    Row B[2], C[2];
  };
  MAMBA_SSM_DEVICE TwoSteps read_steps(const typename Memory::Chunk& source, int first) const {
    const float4 inputs = load_vector<float4>(source.inputs[first / 2][channel_]);
    TwoSteps steps{{inputs.x, inputs.z}, {inputs.y, inputs.w}};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (kStates == 4) {
        mamba_ssm::read_row(source.matrices[2 * (first + i)][slot_], steps.B[i]);
        mamba_ssm::read_row(source.matrices[2 * (first + i) + 1][slot_], steps.C[i]);
      } else {
        const float4 m = load_vector<float4>(source.matrices[first + i][slot_]);
        steps.B[i][0] = m.x, steps.B[i][1] = m.y, steps.C[i][0] = m.z, steps.C[i][1] = m.w;
      }
    }
    return steps;
  }

  template <class Form>
  MAMBA_SSM_DEVICE void scan_chunk(std::type_identity<Form>, const typename Form::Coefficients (&k)[kStates], int chunk,
                                   Row& h) {
    auto& target = memory_.chunks[chunk % 2];
    TwoSteps next = read_steps(target, 0);
#pragma unroll
    for (int first = 0; first < kSteps; first += 2) {
      if (first % tile::kSteps == 0) keep_checkpoint((chunk * kSteps + first) / tile::kSteps, h);
      const TwoSteps in = next;
      next = read_steps(target, (first + 2) % kSteps);  // before what is stored below, which would be waited for
      float y[2] = {};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < kStates; ++j) {
          h[j] = Form::advance(h[j], in.delta[i], in.input[i], in.B[i][j], k[j]);
          y[i] += in.C[i][j] * h[j];
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) target.parts[first + i][channel_][slot_] = y[i];
    }
  }
  // C·h of the pair of channels that the thread staged. Eight neighbouring threads read from different banks.
  MAMBA_SSM_DEVICE float2 add_up(int chunk) const {
    constexpr int kQuads = Lanes / 4;
    const auto* quads = reinterpret_cast<const float4*>(memory_.chunks[chunk % 2].parts[step_][2 * pair_]);
    const int first = pair_ * 2 * kQuads / Tile::kPairs;
    float sums[2] = {};
#pragma unroll
    for (int i = 0; i < 2 * kQuads; ++i) {
      const float4 v = quads[i ^ first];
      sums[i / kQuads] += (v.x + v.y) + (v.z + v.w);
    }
    const bool swapped = first >= kQuads;
    return {swapped ? sums[1] : sums[0], swapped ? sums[0] : sums[1]};
  }
  MAMBA_SSM_DEVICE void keep_checkpoint(int chunk, const Row& h) const {  // chunk: of tile::kSteps
    if ((chunk & checkpoint_mask_) != 0 || chunk < first_checkpoint_ || chunk * tile::kSteps >= length_) return;
    store_row(p_.checkpoints, checkpoint_row(scan_, t_, chunk), h);
  }

  MAMBA_SSM_DEVICE void write(int chunk, float2 sum, float2 gate) {
    const float2 y = add_up(chunk);
    const float2 result = {(y.x + sum.x) * gate.x, (y.y + sum.y) * gate.y};
    const int count = pair_exists_ ? length_ : 0, step = chunk * kSteps + step_;
    store_pair_below<T>(step, float_out_ && T != Dtype::f32 ? 0 : count, out_.at, result);
    if constexpr (Kind == Output::plain && T != Dtype::f32) {
      store_pair_below<Dtype::f32>(step, float_out_ ? count : 0, out_.at, result);
    }
    out_.next();
  }
};

template <class Method, Dtype T, Output Kind, int Lanes>
__global__ void __launch_bounds__(Spread<Lanes>::kThreads, spread_tile::kWarps* kWarp / Spread<Lanes>::kThreads)
    scan_spread_kernel(MAMBA_SSM_CONSTANT_PARAMETER GpuScan scan) {
  const ScanParams& p = scan.p;
  const int groups = static_cast<int>(p.groups), block = static_cast<int>(blockIdx.x);
  constexpr int kChannels = Spread<Lanes>::kChannels;
  const int per_group = static_cast<int>(p.channels) / groups, first = block % scan.tiles * kChannels;
  const int group = block / scan.tiles % groups, rest = per_group - first;
  const WarpTile t{
      block / scan.tiles / groups, group, group * per_group + first, rest < kChannels ? rest : kChannels, 0, 0, 0};
  SpreadScan<Method, T, Kind, Lanes>(scan, t, shared_memory<SpreadMemory<Lanes>>()).run();
}

template <Dtype T, int Lanes>
const char* launch_spread(const GpuScan& scan, Output kind, void* stream) {
  using Kernel = void (*)(GpuScan);
#define MAMBA_SSM_KERNELS(Method) \
  {scan_spread_kernel<Method, T, Output::plain, Lanes>, scan_spread_kernel<Method, T, Output::gated, Lanes>},
  static constexpr Kernel kKernels[][2] = {MAMBA_SSM_DISCRETIZATIONS(MAMBA_SSM_KERNELS)};
#undef MAMBA_SSM_KERNELS
  const ScanParams& p = scan.p;
  GpuScan spread = scan;
  spread.tiles = static_cast<int>(spread_tile::tiles(p.channels / p.groups, Lanes));
  return launch<GpuScan>(kKernels[p.method][kind == Output::gated],
                         static_cast<unsigned>(p.batch * p.groups * spread.tiles), 1, spread_tile::threads(Lanes),
                         sizeof(SpreadMemory<Lanes>), stream, spread);
}
template <Dtype T>
const char* launch_scan_spread(const GpuScan& scan, int lanes, Output kind, void* stream) {
  return lanes == 4 ? launch_spread<T, 4>(scan, kind, stream) : launch_spread<T, 8>(scan, kind, stream);
}

}  // namespace mamba_ssm
