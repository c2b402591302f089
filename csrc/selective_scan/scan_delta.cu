// delta = delta_weight · delta_input: the projection of a few inputs to every channel, on the tensor cores.
#include <algorithm>

#include "cuda_device.h"
#include "scan_gpu.h"

namespace mamba_ssm {
namespace {

// A warp makes 16 positions of 64 channels at a time by products of 16 × 8 inputs with 8 × 8 weights, see
// multiply_tiles. So that each lane reads and writes neighbours, two products take input 4 k + i of sixteen as their
// k-th, and channel_of says which channel a column is.
//
// The products have tf32's precision. For an output in float32 each weight is taken in two parts, and a float32 input
// too; for the half types it is rounded once, to an eighth of what the output is rounded to, or less.
constexpr int kWarps = 8, kThreads = kWarps * kWarp, kRows = 16, kChannels = 64, kTiles = kChannels / 8;
constexpr int kPiece = 32, kBlocks = kPiece / 16;  // inputs whose weights are in shared memory at one time
constexpr int kResident = 2;                       // blocks that a multiprocessor is to hold at one time

MAMBA_SSM_DEVICE int channel_of(int tile, int column) {
  return tile / 4 * 32 + column / 2 * 8 + tile % 4 * 2 + column % 2;
}

template <Dtype T>
constexpr bool kExact = T == Dtype::f32;
// The blocks that bound the registers: no more than one where the bound would have them spilled.
template <Dtype T, bool Vectors>
constexpr int kLeastResident = Vectors && !kExact<T> ? kResident : 1;

// Of two inputs: the weights, or their first parts and then the rests.
template <Dtype T>
struct Memory {
  std::conditional_t<kExact<T>, float4, float2> weight[2 * kBlocks][kTiles][kWarp];
};

template <Dtype T>
MAMBA_SSM_DEVICE void load_weights(const DeltaProjection& p, int first_channel, int piece, Memory<T>& memory) {
  const int blocks = p.rank - piece <= 16 ? 1 : kBlocks;
  for (int i = threadIdx.x; i < 2 * blocks * kTiles * kWarp; i += kThreads) {
    const int lane = i % kWarp, tile = i / kWarp % kTiles, product = i / kWarp / kTiles;
    const int channel = first_channel + channel_of(tile, lane / 4);
    const int input = piece + product / 2 * 16 + lane % 4 * 4 + product % 2 * 2;
    const float* row = p.weight + static_cast<std::int64_t>(channel) * p.rank;
    const float w0 = channel < p.channels && input < p.rank ? row[input] : 0.0f;
    const float w1 = channel < p.channels && input + 1 < p.rank ? row[input + 1] : 0.0f;
    if constexpr (kExact<T>) {
      memory.weight[product][tile][lane] = {tile_part(w0), tile_part(w1), w0 - tile_part(w0), w1 - tile_part(w1)};
    } else {
      memory.weight[product][tile][lane] = {round_to_tile(w0), round_to_tile(w1)};
    }
  }
}

// Where the inputs of a row of the output are; null behind the last row.
MAMBA_SSM_DEVICE const char* find_position(const DeltaProjection& p, std::int64_t row) {
  if (row >= p.batch * p.length) return nullptr;
  if (p.batch == 1) return static_cast<const char*>(p.input.data) + row * p.input.time * bytes_of(p.input.dtype);
  // a division of 32 bits where that does
  const std::int64_t batch =
      row >> 32 == 0 ? static_cast<std::uint32_t>(row) / static_cast<std::uint32_t>(p.length) : row / p.length;
  const std::int64_t index = batch * p.input.batch + (row - batch * p.length) * p.input.time;
  return static_cast<const char*>(p.input.data) + index * bytes_of(p.input.dtype);
}

// Four inputs of a position from `input` on; 0 where there is none. Vectors: they lie side by side, aligned, by fours.
template <Dtype In, bool Vectors>
MAMBA_SSM_DEVICE RawFour<In> load_inputs(const DeltaProjection& p, const char* position, int input) {
  RawFour<In> raw{};
  if constexpr (Vectors) {
    if (position != nullptr && input < p.rank) {
      raw = *reinterpret_cast<const RawFour<In>*>(position + input * bytes_of(In));
    }
  } else {
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool exists = position != nullptr && input + i < p.rank;
      values[i] = exists ? load_element(position, (input + i) * p.input.state, In) : 0.0f;
    }
    raw = from_floats<In>(values);
  }
  return raw;
}

// Sixteen channels of a row, two times eight neighbours: `channel`, and 32 behind it.
template <Dtype T>
MAMBA_SSM_DEVICE void store_channels(const DeltaProjection& p, bool all, std::int64_t row, int channel, int half,
                                     const float (&sums)[kTiles][4]) {
  constexpr int kSize = T == Dtype::f32 ? 4 : 2;
  char* out = static_cast<char*>(p.out) + (row * p.channels + channel) * kSize;
  if (all) {
#pragma unroll
    for (int j = 0; j < kTiles; j += 4) {
      float values[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = sums[j + i / 2][2 * half + i % 2];
      store_eight<T>(out + j * 8 * kSize, values);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int offset = channel_of(j, i);
        if (channel + offset < p.channels) store_element(out, offset, T, sums[j][2 * half + i]);
      }
    }
  }
}

template <Dtype In, Dtype T, bool Vectors>
__global__ void __launch_bounds__(kThreads, kLeastResident<T, Vectors>)
    project_delta_kernel(MAMBA_SSM_CONSTANT_PARAMETER DeltaProjection p) {
  Memory<T>& memory = shared_memory<Memory<T>>();
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int first_channel = static_cast<int>(blockIdx.y) * kChannels;
  const std::int64_t rows = p.batch * p.length, step = static_cast<std::int64_t>(gridDim.x) * kWarps * kRows;
  const std::int64_t start = static_cast<std::int64_t>(blockIdx.x) * kWarps * kRows;
  const bool one_piece = p.rank <= kPiece, all = first_channel + kChannels <= p.channels && p.channels % 8 == 0;
  RawFour<In> ahead[kBlocks][2];  // inputs of the lane's two positions
  const auto load = [&](std::int64_t first, int piece) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const std::int64_t row = first + warp * kRows + lane / 4 + 8 * i;
      const char* position = find_position(p, row);
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        ahead[block][i] = load_inputs<In, Vectors>(p, position, piece + 16 * block + lane % 4 * 4);
      }
    }
  };
  load(start, 0);
  if (one_piece) {
    load_weights(p, first_channel, 0, memory);
    __syncthreads();
  }
#pragma unroll 1
  for (std::int64_t first = start; first < rows; first += step) {
    float sums[kTiles][4] = {};
#pragma unroll 1
    for (int piece = 0; piece < p.rank; piece += kPiece) {
      if (!one_piece) {
        __syncthreads();
        load_weights(p, first_channel, piece, memory);
        __syncthreads();
      }
      float a[kBlocks][2][4];
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (int i = 0; i < 2; ++i) to_floats<In>(ahead[block][i], a[block][i]);
      }
      piece + kPiece < p.rank ? load(first, piece + kPiece) : load(first + step, 0);
#pragma unroll
      for (int product = 0; product < 2 * kBlocks; ++product) {
        const int block = product / 2, k = product % 2 * 2;
        if (piece + 16 * block >= p.rank) break;
        const float x[4] = {a[block][0][k], a[block][1][k], a[block][0][k + 1], a[block][1][k + 1]};
        float part[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) part[i] = kExact<T> ? tile_part(x[i]) : round_to_tile(x[i]);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const auto w = memory.weight[product][j][lane];
          multiply_tiles(sums[j], part[0], part[1], part[2], part[3], w.x, w.y);
          if constexpr (kExact<T>) {
            multiply_tiles(sums[j], part[0], part[1], part[2], part[3], w.z, w.w);
            if constexpr (In == Dtype::f32) {
              multiply_tiles(sums[j], x[0] - part[0], x[1] - part[1], x[2] - part[2], x[3] - part[3], w.x, w.y);
            }
          }
        }
      }
    }
    const std::int64_t row = first + warp * kRows + lane / 4;
    const int channel = first_channel + channel_of(0, lane % 4 * 2);
    if (row < rows) store_channels<T>(p, all, row, channel, 0, sums);
    if (row + 8 < rows) store_channels<T>(p, all, row + 8, channel, 1, sums);
  }
}

}  // namespace

const char* launch_project_delta(const DeltaProjection& projection, void* stream) {
  DeltaProjection p = projection;
  if (p.input.batch == p.length * p.input.time) p.length *= p.batch, p.batch = 1;  // one row after the other
  using Kernel = void (*)(DeltaProjection);
  const int size = element_size(p.input.dtype);
  const bool vectors = p.rank % 4 == 0 && p.input.state == 1 && p.input.time % 4 == 0 && p.input.batch % 4 == 0 &&
                       reinterpret_cast<std::uintptr_t>(p.input.data) % (4 * size) == 0;
  const Kernel kernel = with_static_dtype(p.input.dtype, [&](auto in) {
    return with_static_dtype(p.dtype, [&](auto out) -> Kernel {
      return vectors ? project_delta_kernel<in.value, out.value, true>
                     : project_delta_kernel<in.value, out.value, false>;
    });
  });
  const std::size_t shared_bytes = p.dtype == Dtype::f32 ? sizeof(Memory<Dtype::f32>) : sizeof(Memory<Dtype::bf16>);
  const std::int64_t groups = (p.channels + kChannels - 1) / kChannels;
  const std::int64_t tiles = (p.batch * p.length + kWarps * kRows - 1) / (kWarps * kRows);
  // No more than kResident for each multiprocessor: every block fetches the weights, once if they fit into one piece.
  const std::int64_t most = std::max<std::int64_t>(1, kResident * device_multiprocessors() / groups);
  return launch<DeltaProjection>(kernel, static_cast<unsigned>(std::min(tiles, most)), static_cast<unsigned>(groups),
                                 kThreads, shared_bytes, stream, p);
}

}  // namespace mamba_ssm
