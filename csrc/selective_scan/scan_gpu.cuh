// What the fast kernels of the scan share: where a warp is, how rows of tensors come into its shared memory, and the
// elements of a chunk as pairs of channels. See launch_config.h for the division of the work.
//
// A warp works on its own, chunk after chunk: the rows of the next chunk are copied asynchronously while it computes.
#pragma once

#include <type_traits>

#include "scan_forms.cuh"
#include "scan_gpu.h"

namespace mamba_ssm {

// The size of an element.
template <Dtype T>
constexpr int kSize = T == Dtype::f32 ? 4 : 2;

// ---- where a warp and its lanes are ------------------------------------------------------------------------------

// Lanes l and l + 16 share channels 2l and 2l + 1 of the warp. A channel's slot is the lane that owns it: that computes
// what there is once per channel. Slot 0 of a thread's arrays is its own channel, slot 1 its partner's.
struct Lane {
  int index, half, pair;
  MAMBA_SSM_DEVICE Lane() : index(static_cast<int>(threadIdx.x) % kWarp), half(index / 16), pair(index % 16) {}
  MAMBA_SSM_DEVICE int channel(int slot) const { return 2 * pair + (half ^ slot); }
  MAMBA_SSM_DEVICE int partner() const { return index ^ 16; }
  MAMBA_SSM_DEVICE int first_state() const { return half * tile::kThreadStates; }
};

// What a warp scans. `channels`: that there are, of kWarpChannels; 0 for a warp without work.
struct WarpTile {
  int batch, group, channel, channels;
  int segment, first_chunk, end_chunk;
};
MAMBA_SSM_DEVICE int chunk_count(const ScanParams& p) {
  return (static_cast<int>(p.length) + tile::kSteps - 1) / tile::kSteps;
}
MAMBA_SSM_DEVICE WarpTile this_tile(const GpuScan& scan, int segment) {
  const ScanParams& p = scan.p;
  const int groups = static_cast<int>(p.groups), block = static_cast<int>(blockIdx.x);
  const int split = block % scan.tiles, group = block / scan.tiles % groups;
  const int per_group = static_cast<int>(p.channels) / groups;
  const int first = split * tile::kChannels + static_cast<int>(threadIdx.x) / kWarp * tile::kWarpChannels;
  const int rest = per_group - first, chunks = chunk_count(p), end = (segment + 1) * scan.segment_chunks;
  return {block / scan.tiles / groups,
          group,
          group * per_group + first,
          rest < 0                     ? 0
          : rest < tile::kWarpChannels ? rest
                                       : tile::kWarpChannels,
          segment,
          segment * scan.segment_chunks,
          end < chunks ? end : chunks};
}

// How many steps of a chunk there are.
MAMBA_SSM_DEVICE int chunk_steps(const ScanParams& p, int chunk) {
  const int rest = static_cast<int>(p.length) - chunk * tile::kSteps;
  return rest < tile::kSteps ? rest : tile::kSteps;
}

// ---- matrices (rows, channels, states) ---------------------------------------------------------------------------

// The thread's states of both of its channels.
using States = float[tile::kSlots][tile::kThreadStates];

MAMBA_SSM_DEVICE void fill(States& values, float value) {
#pragma unroll
  for (int i = 0; i < tile::kSlots * tile::kThreadStates; ++i) {
    values[i / tile::kThreadStates][i % tile::kThreadStates] = value;
  }
}
MAMBA_SSM_DEVICE void copy(const States& from, States& to) {
#pragma unroll
  for (int i = 0; i < tile::kSlots * tile::kThreadStates; ++i) {
    to[i / tile::kThreadStates][i % tile::kThreadStates] = from[i / tile::kThreadStates][i % tile::kThreadStates];
  }
}

// Calls function(slot, state, index): where four of the thread's states of a slot begin in row `row`. Not for channels
// and states that do not exist.
template <class Function>
MAMBA_SSM_DEVICE void for_each_quad(const GpuScan& scan, const WarpTile& t, const Lane& lane, std::int64_t row,
                                    const Function& function) {
  const int states = static_cast<int>(scan.p.states), count = scan.states - lane.first_state();
  const std::int64_t first = row * scan.p.channels * states + scan.first_state + lane.first_state();
#pragma unroll
  for (int s = 0; s < tile::kSlots; ++s) {
    const std::int64_t index = first + static_cast<std::int64_t>(t.channel + lane.channel(s)) * states;
#pragma unroll
    for (int j = 0; j < tile::kThreadStates; j += 4) {
      if (lane.channel(s) < t.channels && j < count) function(s, j, index + j);
    }
  }
}
// values = a row of the matrix, or `missing` where there are no such channels, states or matrix. There are multiples of
// four states.
MAMBA_SSM_DEVICE void load_states(const GpuScan& scan, const WarpTile& t, const Lane& lane, const float* matrix,
                                  std::int64_t row, float missing, States& values) {
  fill(values, missing);
  if (matrix == nullptr) return;
  for_each_quad(scan, t, lane, row, [&](int s, int j, std::int64_t index) {
    const float4 v = *reinterpret_cast<const float4*>(matrix + index);
    values[s][j] = v.x, values[s][j + 1] = v.y, values[s][j + 2] = v.z, values[s][j + 3] = v.w;
  });
}
MAMBA_SSM_DEVICE void store_states(const GpuScan& scan, const WarpTile& t, const Lane& lane, float* matrix,
                                   std::int64_t row, const States& values) {
  if (matrix == nullptr) return;
  for_each_quad(scan, t, lane, row, [&](int s, int j, std::int64_t index) {
    *reinterpret_cast<float4*>(matrix + index) = {values[s][j], values[s][j + 1], values[s][j + 2], values[s][j + 3]};
  });
}
// The row of the tile's segment in (batch, segments, …).
MAMBA_SSM_DEVICE std::int64_t segment_row(const GpuScan& scan, const WarpTile& t) {
  return static_cast<std::int64_t>(t.batch) * scan.segments + t.segment;
}
MAMBA_SSM_DEVICE std::int64_t checkpoint_row(const GpuScan& scan, const WarpTile& t, int chunk) {
  const int index = (chunk >> scan.checkpoint_shift) - scan.p.first_checkpoint;
  return static_cast<std::int64_t>(t.batch) * scan.checkpoints + index;
}
// Whether there is a checkpoint before the chunk, or zeros that need none.
MAMBA_SSM_DEVICE bool is_checkpoint(const GpuScan& scan, int chunk) {
  return (chunk & ((1 << scan.checkpoint_shift) - 1)) == 0;
}
MAMBA_SSM_DEVICE float load_parameter(const float* parameter, const WarpTile& t, int channel) {
  return parameter != nullptr && channel < t.channels ? parameter[t.channel + channel] : 0.0f;
}

// ---- the forms of a method ---------------------------------------------------------------------------------------

// What a form needs of each of the thread's states.
template <class Form>
using FormCoefficients = typename Form::Coefficients[tile::kSlots][tile::kThreadStates];
template <class Form>
MAMBA_SSM_DEVICE void prepare(const States& A, FormCoefficients<Form>& k) {
#pragma unroll
  for (int i = 0; i < tile::kSlots * tile::kThreadStates; ++i) {
    const int s = i / tile::kThreadStates, j = i % tile::kThreadStates;
    k[s][j] = Form::prepare(A[s][j]);
  }
}

// When the quick form serves: between which sizes all Δ of a warp's chunk must be. Gradient: for its derivatives too.
template <class Quick, class General, bool Gradient>
struct QuickLimits {
  static constexpr bool kAlways = std::is_same_v<Quick, General>;
  static constexpr bool kNegativeA = requires { Quick::kNegativeA; };
  static constexpr bool kHasMost = Gradient || kNegativeA;
  float2 of_step = {0.0f, 0.0f};  // the least and the most, such that none is allowed where the A do not allow it

  // Of the least and the greatest size of A.
  MAMBA_SSM_DEVICE QuickLimits(float smallest, float largest) {
    if constexpr (!kAlways) {
      const float least = Quick::kSmallestX == 0.0f ? 0.0f : Quick::kSmallestX / smallest;  // A may be 0
      of_step.x = smallest >= Quick::kSmallestA ? least : INFINITY;
      if constexpr (kHasMost) of_step.y = Quick::kLargestX / largest;
    }
  }
  MAMBA_SSM_DEVICE explicit QuickLimits(const States& A) {
    if constexpr (!kAlways) {
      float smallest = size(A[0][0]), largest = smallest;
#pragma unroll
      for (int s = 0; s < tile::kSlots; ++s) {
#pragma unroll
        for (int j = 0; j < tile::kThreadStates; ++j) {
          smallest = fminf(smallest, size(A[s][j]));
          largest = fmaxf(largest, size(A[s][j]));
        }
      }
#pragma unroll
      for (int i = 1; i < kWarp; i *= 2) {
        smallest = fminf(smallest, shuffle_xor(smallest, i));
        largest = fmaxf(largest, shuffle_xor(largest, i));
      }
      *this = QuickLimits(smallest, largest);
    }
  }
  // |A|, beyond all limits where A has the wrong sign.
  static MAMBA_SSM_DEVICE float size(float A) { return kNegativeA && A > 0.0f ? 3e38f : fabsf(A); }

  // The sizes of steps of pairs of channels, without branches: those would part the instructions before from those
  // behind.
  struct Steps {
    float least = 3e38f, most = 0.0f;

    MAMBA_SSM_DEVICE void add(bool exists, float first, float second) {
      if constexpr (!kAlways) {
        const float a = kNegativeA ? first : fabsf(first), b = kNegativeA ? second : fabsf(second);
        least = exists ? fminf(least, fminf(a, b)) : least;
        if constexpr (kHasMost) most = exists ? fmaxf(most, fmaxf(a, b)) : most;
      }
    }
    // Whether they allow the quick form in the whole warp.
    MAMBA_SSM_DEVICE bool fit(float2 limits) const {
      return kAlways || warp_all((least >= limits.x) & (!kHasMost | (most <= limits.y)));
    }
  };
};

// ---- rows of tensors ---------------------------------------------------------------------------------------------

// Where a tensor's rows are: `base` is the tile's first channel, or the group's first state, at the scan's first step,
// and `row_bytes` leads to the next step's. Kept in shared memory, to save registers.
struct Stream {
  char* base;
  int row_bytes;
  int size;  // of an element; 0 where there is no tensor

  MAMBA_SSM_DEVICE char* row(int step) const { return advance(base, step, row_bytes); }
};
struct alignas(16) KeptStream {
  std::uint32_t words[4];

  MAMBA_SSM_DEVICE void operator=(const Stream& s) {
    const auto base = reinterpret_cast<std::uintptr_t>(s.base);
    *reinterpret_cast<uint4*>(words) = {static_cast<std::uint32_t>(base), static_cast<std::uint32_t>(base >> 32),
                                        static_cast<std::uint32_t>(s.row_bytes), static_cast<std::uint32_t>(s.size)};
  }
  MAMBA_SSM_DEVICE operator Stream() const {
    const uint4 w = *reinterpret_cast<const uint4*>(words);
    return {reinterpret_cast<char*>(static_cast<std::uintptr_t>(w.y) << 32 | w.x), static_cast<int>(w.z),
            static_cast<int>(w.w)};
  }
};
MAMBA_SSM_DEVICE Stream make_stream(const ScanParams& p, void* data, Dtype dtype, std::int64_t first,
                                    std::int64_t time) {
  const int size = data == nullptr ? 0 : bytes_of(dtype);
  const std::int64_t start = p.reverse ? (p.length - 1) * time : 0;
  return {static_cast<char*>(data) + (first + start) * size, static_cast<int>(time) * (p.reverse ? -size : size), size};
}
MAMBA_SSM_DEVICE Stream make_stream(const ScanParams& p, const Activation& a, const WarpTile& t) {
  return make_stream(p, a.data, a.dtype, t.batch * a.batch + t.channel, a.time);
}
MAMBA_SSM_DEVICE Stream make_stream(const GpuScan& scan, const InputMatrix& m, const WarpTile& t) {
  return make_stream(scan.p, m.data, m.dtype, t.batch * m.batch + t.group * m.group + scan.first_state * m.state,
                     m.time);
}

// A chunk's rows of a tensor.
template <Dtype T>
struct Rows {
  alignas(16) unsigned char bytes[tile::kSteps][tile::kWarpChannels * kSize<T>];

  // Channels 2 pair and 2 pair + 1 of a step.
  MAMBA_SSM_DEVICE float2 pair(int step, int pair) const { return load_pair<T>(bytes[step], 2 * pair); }
};
// Starts the copy of a chunk's rows; zeros from `steps` and from `channels` on, and where there is no tensor.
template <Dtype T>
MAMBA_SSM_DEVICE void start_copy(const Stream& s, int channels, const Lane& lane, int chunk, int steps, Rows<T>& rows) {
  constexpr int kPieces = tile::kWarpChannels * kSize<T> / 16, kRows = kWarp / kPieces;
  const int row = lane.index / kPieces, piece = lane.index % kPieces;
  const bool exists = piece * (16 / kSize<T>) < channels && s.size != 0;
#pragma unroll
  for (int i = 0; i < tile::kSteps; i += kRows) {
    copy_async<16>(rows.bytes[i + row] + piece * 16, s.row(chunk * tile::kSteps + i + row) + piece * 16,
                   exists && i + row < steps);
  }
}

// A chunk's rows of B and C side by side, as they are in memory, and as floats.
template <Dtype T>
struct RawMatrices {
  alignas(16) unsigned char bytes[tile::kSteps][2 * tile::kStates * kSize<T>];
};
using MatrixRows = float[tile::kSteps][2 * tile::kStates];

// A lane's part of both: eight states of one of them at one step.
struct MatrixPart {
  int step, place;
  MAMBA_SSM_DEVICE explicit MatrixPart(const Lane& lane) : step(lane.index / 4), place(lane.index % 4 * 8) {}
};
// Starts the copy of a chunk's B and C; zeros from `steps` on, and where there are no such states. s: the lane's.
template <Dtype T>
MAMBA_SSM_DEVICE void start_copy(const GpuScan& scan, const Stream& s, const Lane& lane, int chunk, int steps,
                                 RawMatrices<T>& raw) {
  const MatrixPart part(lane);
  const int state = part.place % tile::kStates, bytes = part.step < steps ? (scan.states - state) * kSize<T> : 0;
  const char* source = s.row(chunk * tile::kSteps + part.step) + state * kSize<T>;
#pragma unroll
  for (int i = 0; i < 8 * kSize<T>; i += 8) {
    copy_async<8>(raw.bytes[part.step] + part.place * kSize<T> + i, source + i, i < bytes);
  }
}
// The lane's part of B and C as floats.
template <Dtype T>
MAMBA_SSM_DEVICE void read_part(const Lane& lane, const RawMatrices<T>& raw, float (&values)[8]) {
  const MatrixPart part(lane);
  load_eight<T>(raw.bytes[part.step] + part.place * kSize<T>, values);
}
MAMBA_SSM_DEVICE void keep_part(const Lane& lane, const float (&values)[8], MatrixRows& rows) {
  const MatrixPart part(lane);
  float4* target = reinterpret_cast<float4*>(rows[part.step] + part.place);
  target[0] = {values[0], values[1], values[2], values[3]};
  target[1] = {values[4], values[5], values[6], values[7]};
}

// Eight, or four, neighbouring floats of a row.
template <int Count>
MAMBA_SSM_DEVICE void read_row(const float* row, float (&values)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; i += 4) {
    const float4 v = *reinterpret_cast<const float4*>(row + i);
    values[i] = v.x, values[i + 1] = v.y, values[i + 2] = v.z, values[i + 3] = v.w;
  }
}

}  // namespace mamba_ssm
