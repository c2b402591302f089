// The CUDA kernels of residual add + norm. A row is shared by 16 or 32 lanes of a warp or by several warps, each thread
// with V vectors of four neighbouring elements, which stay in its registers from the statistics to the output.
#include <algorithm>

#include "cuda_device.h"
#include "norm_gpu.h"

namespace mamba_ssm {
namespace {

using i64 = std::int64_t;
constexpr int kFour = 4;
using Four = float[kFour];

// Threads of a block, unless a row takes more. Forward, blocks come and go; backward, one has a multiprocessor and its
// registers to itself, so that there are few partial sums.
constexpr int kForwardThreads = 256, kBackwardThreads = 512;
constexpr int kForwardBlocks = 3;  // at least, of a multiprocessor: they bound the registers
// Vectors of a thread: no lane is idle at 192, 384 or 768 columns. More where too many threads would share a row.
constexpr int kVectors = 3, kMostThreads = 512;
constexpr int kWideVectors = 8, kMostWideThreads = 1024;
static_assert(kMostWideThreads * kWideVectors * kFour == kNormMostColumns);

// ---- four neighbouring elements ----------------------------------------------------------------------------------

// Of any dtype. Aligned to all four, which exist together or not at all; or anywhere in memory, where the first `count`
// of them exist. No vector that is loaded is looked at before `convert`, so that they do not wait for each other.
template <bool Aligned>
struct AtRunTime {
  using Raw = uint4;  // of half types, the first two words
  using Parameter = AtRunTime;
  Dtype dtype;

  MAMBA_SSM_DEVICE explicit AtRunTime(Dtype dtype) : dtype(dtype) {}
  MAMBA_SSM_DEVICE static bool exists(int i, int count) { return i < count; }
  MAMBA_SSM_DEVICE bool is_vector(const void* address, int count) const {
    if (Aligned) return true;
    return count >= kFour && reinterpret_cast<std::uintptr_t>(address) % (kFour * bytes_of(dtype)) == 0;
  }
  MAMBA_SSM_DEVICE Raw load(const void* data, i64 index, int count) const {
    const void* address = static_cast<const char*>(data) + index * bytes_of(dtype);
    const bool vector = is_vector(address, count);
    if (dtype == Dtype::f32) {
      if (vector) return load_vector<uint4>(address);
      const auto word = [&](int i) { return i < count ? static_cast<const std::uint32_t*>(address)[i] : 0; };
      return {word(0), word(1), word(2), word(3)};
    }
    if (vector) {
      const uint2 words = load_vector<uint2>(address);
      return {words.x, words.y, 0, 0};
    }
    const auto half = [&](int i) -> std::uint32_t {
      return i < count ? static_cast<const std::uint16_t*>(address)[i] : 0;
    };
    return {half(0) | (half(1) << 16), half(2) | (half(3) << 16), 0, 0};
  }
  MAMBA_SSM_DEVICE void convert(const Raw& raw, Four& values) const {
    if (dtype == Dtype::f32) {
      memcpy(values, &raw, sizeof(values));
    } else if (dtype == Dtype::f16) {
      to_floats<Dtype::f16>({raw.x, raw.y}, values);
    } else {
      to_floats<Dtype::bf16>({raw.x, raw.y}, values);
    }
  }
  MAMBA_SSM_DEVICE void store(void* data, i64 index, int count, const Four& values) const {
    void* address = static_cast<char*>(data) + index * bytes_of(dtype);
    if (!is_vector(address, count)) {
#pragma unroll
      for (int i = 0; i < kFour; ++i) {
        if (i < count) store_element(address, i, dtype, values[i]);
      }
    } else if (dtype == Dtype::f32) {
      store_vector(address, from_floats<Dtype::f32>(values));
    } else {
      store_vector(address, dtype == Dtype::f16 ? from_floats<Dtype::f16>(values) : from_floats<Dtype::bf16>(values));
    }
  }
};

// Of a dtype that the compiler knows, aligned.
template <Dtype T>
struct Known {
  using Raw = RawFour<T>;
  using Parameter = AtRunTime<true>;  // how weight and bias are beside it
  static constexpr int kSize = T == Dtype::f32 ? 4 : 2;

  MAMBA_SSM_DEVICE explicit Known(Dtype) {}
  MAMBA_SSM_DEVICE static bool exists(int, int count) { return count > 0; }
  MAMBA_SSM_DEVICE static Raw load(const void* data, i64 index, int) {
    return load_vector<Raw>(static_cast<const char*>(data) + index * kSize);
  }
  MAMBA_SSM_DEVICE static void convert(const Raw& raw, Four& values) { to_floats<T>(raw, values); }
  MAMBA_SSM_DEVICE static void store(void* data, i64 index, int, const Four& values) {
    store_vector(static_cast<char*>(data) + index * kSize, from_floats<T>(values));
  }
};

// ---- rows --------------------------------------------------------------------------------------------------------

// Where the thread is among those of its block. Lanes: threads that share a row, or 0: whole warps, as norm has it.
template <int Lanes>
struct Place {
  int lanes, lane;
  int row, rows;  // of the block

  MAMBA_SSM_DEVICE explicit Place(const GpuNorm& norm) {
    const int thread = static_cast<int>(threadIdx.x);
    lanes = Lanes == 0 ? norm.row_threads : Lanes;
    lane = thread % lanes;
    row = thread / lanes;
    rows = static_cast<int>(blockDim.x) / lanes;
  }
  MAMBA_SSM_DEVICE int column(int v) const { return (v * lanes + lane) * kFour; }
};

// Zeros where there is no array, and from `dim` on.
template <class Type, int Lanes, int V>
MAMBA_SSM_DEVICE void load_row(const Type& type, const NormRows& a, const Place<Lanes>& place, int row, int dim,
                               typename Type::Raw (&raw)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    raw[v] = {};
    const int column = place.column(v);
    if (a.data == nullptr || column >= dim) continue;
    raw[v] = type.load(a.data, static_cast<i64>(row) * a.stride + column, dim - column);
  }
}
template <class Type, int Lanes, int V>
MAMBA_SSM_DEVICE void store_row(const Type& type, const NormRows& a, const Place<Lanes>& place, int row, int dim,
                                const Four (&values)[V]) {
  if (a.data == nullptr) return;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int column = place.column(v);
    if (column < dim) type.store(a.data, static_cast<i64>(row) * a.stride + column, dim - column, values[v]);
  }
}
// The same of a parameter.
template <class Type, int Lanes, int V>
MAMBA_SSM_DEVICE void load_row(const Type& type, const NormParameter& a, const Place<Lanes>& place, int dim,
                               uint4 (&raw)[V]) {
  load_row(type, NormRows{const_cast<void*>(a.data), 0}, place, 0, dim, raw);
}
template <class Type, int V>
MAMBA_SSM_DEVICE void convert_row(const Type& type, const typename Type::Raw (&raw)[V], Four (&values)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) type.convert(raw[v], values[v]);
}

// The factor of a row, as it is in memory.
MAMBA_SSM_DEVICE std::uint32_t load_scale(const GpuNorm& norm, int row) {
  if (norm.scale.data == nullptr || row >= norm.p.rows) return 0;
  const unsigned i = static_cast<unsigned>(row) / static_cast<unsigned>(norm.p.rows_per_scale);
  if (norm.scale.dtype == Dtype::f32) return static_cast<const std::uint32_t*>(norm.scale.data)[i];
  return static_cast<const std::uint16_t*>(norm.scale.data)[i];
}
MAMBA_SSM_DEVICE float scale_of(const GpuNorm& norm, std::uint32_t bits) {
  if (norm.scale.data == nullptr) return 1.0f;
  Four values;
  AtRunTime<true>(norm.scale.dtype).convert({bits, 0, 0, 0}, values);
  return values[0];
}

// In shared memory: a sum of each warp for each of two values, twice, because a warp may be a row ahead of another.
constexpr int kSumFloats = 2 * 2 * kWarp;

// Each value's sum over the threads of a row, the same bits in all of them.
template <int Lanes, int N>
MAMBA_SSM_DEVICE void sum_over_row(const Place<Lanes>& place, float (&values)[N], int turn) {
#pragma unroll
  for (int mask = Lanes == 16 ? 8 : 16; mask > 0; mask /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] += shuffle_xor(values[i], mask);
  }
  if (Lanes != 0 || place.lanes == kWarp) return;
  float* memory = &shared_memory<float>() + turn % 2 * (kSumFloats / 2);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) memory[i * kWarp + warp] = values[i];
  }
  __syncthreads();
  const int warps = place.lanes / kWarp, first = place.row * warps;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    values[i] = 0.0f;
    for (int w = first; w < first + warps; ++w) values[i] += memory[i * kWarp + w];
  }
}

// ---- forward -----------------------------------------------------------------------------------------------------

template <int Lanes, int V>
constexpr int most_threads(int usual) {
  return Lanes != 0 ? usual : V == kVectors ? kMostThreads : kMostWideThreads;
}

template <class X, class Stream, int Lanes, int V>
__global__ void __launch_bounds__(most_threads<Lanes, V>(kForwardThreads), Lanes == 0 ? 1 : kForwardBlocks)
    norm_forward_kernel(MAMBA_SSM_CONSTANT_PARAMETER GpuNorm norm) {
  const NormProblem& p = norm.p;
  const X x_type(p.dtype);
  const Stream stream_type(p.stream_dtype);
  const typename X::Parameter weight_type(norm.weight.dtype), bias_type(norm.bias.dtype);
  const Place<Lanes> place(norm);
  const int row = static_cast<int>(blockIdx.x) * place.rows + place.row;
  const bool exists = row < p.rows;
  const int dim = exists ? static_cast<int>(p.dim) : 0;
  typename X::Raw x[V];
  typename Stream::Raw residual[V];
  uint4 weight[V], bias[V];
  load_row(x_type, p.x, place, row, dim, x);
  load_row(stream_type, p.residual, place, row, dim, residual);
  load_row(weight_type, norm.weight, place, dim, weight);
  load_row(bias_type, norm.bias, place, dim, bias);
  const float scale = scale_of(norm, load_scale(norm, row));

  Four h[V];
  float sum[1] = {0.0f}, square_sum[1] = {0.0f}, mean = 0.0f;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    Four branch, stream;
    x_type.convert(x[v], branch);
    stream_type.convert(residual[v], stream);
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      h[v][i] = branch[i] * scale + stream[i];
      sum[0] += h[v][i];
    }
  }
  store_row(stream_type, p.h, place, row, dim, h);
  if (!p.is_rms_norm) {
    sum_over_row(place, sum, 0);
    mean = sum[0] * norm.inverse_dim;
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int i = 0; i < kFour; ++i) h[v][i] = X::exists(i, dim - place.column(v)) ? h[v][i] - mean : 0.0f;
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
#pragma unroll
    for (int i = 0; i < kFour; ++i) square_sum[0] += h[v][i] * h[v][i];
  }
  sum_over_row(place, square_sum, 1);
  const float rstd = 1.0f / sqrtf(square_sum[0] * norm.inverse_dim + p.eps);
  if (exists && place.lane == 0) {
    p.rstd[row] = rstd;
    if (!p.is_rms_norm) p.mean[row] = mean;
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    Four factor, addend;
    weight_type.convert(weight[v], factor);
    bias_type.convert(bias[v], addend);
#pragma unroll
    for (int i = 0; i < kFour; ++i) h[v][i] = h[v][i] * rstd * factor[i] + addend[i];
  }
  store_row(x_type, p.y, place, row, dim, h);
}

// ---- backward ----------------------------------------------------------------------------------------------------

// Floats of shared memory that sum_over_block takes, for half of the block's rows. Of 16 lanes each, two share a warp.
constexpr int block_sum_floats(int row_threads, int block_rows, int vectors) {
  const int lanes = row_threads == 16 ? kWarp / 2 : row_threads, rows = row_threads == 16 ? block_rows / 2 : block_rows;
  return rows == 1 ? 0 : (rows + 1) / 2 * lanes * vectors * kFour;
}

// out[column] = the sum over the rows of the block, in a fixed order. `out` has dim elements.
template <int Lanes, int V>
MAMBA_SSM_DEVICE void sum_over_block(const Place<Lanes>& place, Four (&values)[V], int dim, float* out) {
  const int rows = Lanes == 16 ? place.rows / 2 : place.rows, row = Lanes == 16 ? place.row / 2 : place.row;
  if (Lanes == 16) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int i = 0; i < kFour; ++i) values[v][i] += shuffle_xor(values[v][i], 16);
    }
  }
  if (rows == 1) {
    store_row(AtRunTime<false>(Dtype::f32), {out, 0}, place, 0, dim, values);
    return;
  }
  float* memory = &shared_memory<float>() + kSumFloats;
  const int width = V * place.lanes * kFour, half = (rows + 1) / 2;
  const bool writes = Lanes != 16 || place.row % 2 == 0;
  const auto store = [&](int slot) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      store_vector(memory + slot * width + place.column(v), from_floats<Dtype::f32>(values[v]));
    }
  };
  __syncthreads();  // after the sums of another call
  if (writes && row >= half) store(row - half);
  __syncthreads();
  if (writes && row < half) {
    if (row + half < rows) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        Four other;
        to_floats<Dtype::f32>(load_vector<float4>(memory + row * width + place.column(v)), other);
#pragma unroll
        for (int i = 0; i < kFour; ++i) values[v][i] += other[i];
      }
    }
    store(row);
  }
  __syncthreads();
  for (int column = threadIdx.x; column < dim; column += blockDim.x) {
    float sum = 0.0f;
    for (int r = 0; r < half; ++r) sum += memory[r * width + column];
    out[column] = sum;
  }
}

// With n = (h - mean) rstd and w = weight dy:   dh += rstd (w - mean(w n) n - mean(w)),  without mean(w) for RMSNorm.
// What the next row needs is loaded as soon as there are registers for it, before this row's sums are known.
template <class X, class Stream, int Lanes, int V>
__global__ void __launch_bounds__(most_threads<Lanes, V>(kBackwardThreads), 1)
    norm_backward_kernel(MAMBA_SSM_CONSTANT_PARAMETER GpuNorm norm) {
  const NormProblem& p = norm.p;
  const X x_type(p.dtype);
  const Stream stream_type(p.stream_dtype);
  const Place<Lanes> place(norm);
  const int rows = static_cast<int>(p.rows);
  const auto columns_of = [&](int row) { return row < rows ? static_cast<int>(p.dim) : 0; };
  typename X::Raw next_dy[V];
  typename Stream::Raw next_h[V], next_dh[V];
  float next_mean = 0.0f, next_rstd = 0.0f;
  std::uint32_t next_scale = 0;
  const auto load_next = [&](int row) {
    load_row(x_type, p.dy, place, row, columns_of(row), next_dy);
    load_row(stream_type, p.h, place, row, columns_of(row), next_h);
    next_rstd = row < rows ? p.rstd[row] : 0.0f;
    if (!p.is_rms_norm) next_mean = row < rows ? p.mean[row] : 0.0f;
    next_scale = load_scale(norm, row);
  };

  int row = static_cast<int>(blockIdx.x) * place.rows + place.row;
  const int step = static_cast<int>(gridDim.x) * place.rows, end = rows + place.row;  // the same turns for a block
  load_next(row);
  load_row(stream_type, p.dh, place, row, columns_of(row), next_dh);
  Four weight[V], dweight[V] = {}, dbias[V] = {};
  uint4 raw_weight[V];
  const typename X::Parameter weight_type(norm.weight.dtype);
  load_row(weight_type, norm.weight, place, static_cast<int>(p.dim), raw_weight);
  convert_row(weight_type, raw_weight, weight);

#pragma unroll 1
  for (int turn = 0; row < end; row += step, ++turn) {
    const int dim = columns_of(row);
    const float mean = next_mean, rstd = next_rstd, scale = scale_of(norm, next_scale);
    Four dy[V], n[V];
    convert_row(x_type, next_dy, dy);
    convert_row(stream_type, next_h, n);
    load_next(row + step);
    float sums[2] = {0.0f, 0.0f};  // of w n and of w
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int i = 0; i < kFour; ++i) {
        n[v][i] = (n[v][i] - mean) * rstd;
        dweight[v][i] += dy[v][i] * n[v][i];
        dbias[v][i] += dy[v][i];
        const float w = weight[v][i] * dy[v][i];
        sums[0] += w * n[v][i];
        sums[1] += w;
      }
    }
    sum_over_row(place, sums, turn);
    const float wn_mean = sums[0] * norm.inverse_dim, w_mean = p.is_rms_norm ? 0.0f : sums[1] * norm.inverse_dim;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      Four dh;
      stream_type.convert(next_dh[v], dh);
#pragma unroll
      for (int i = 0; i < kFour; ++i) {
        n[v][i] = (weight[v][i] * dy[v][i] - n[v][i] * wn_mean - w_mean) * rstd + dh[i];
      }
    }
    load_row(stream_type, p.dh, place, row + step, columns_of(row + step), next_dh);
    store_row(stream_type, p.dresidual, place, row, dim, n);
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int i = 0; i < kFour; ++i) n[v][i] *= scale;
    }
    store_row(x_type, p.dx, place, row, dim, n);
  }
  const int dim = static_cast<int>(p.dim);
  float* partial = p.partial + static_cast<i64>(blockIdx.x) * (p.sum_dbias ? 2 : 1) * dim;
  sum_over_block(place, dweight, dim, partial);
  if (p.sum_dbias) sum_over_block(place, dbias, dim, partial + dim);
}

// ---- launch ------------------------------------------------------------------------------------------------------

template <class X, class Stream, int Lanes, int V>
const char* launch_with(const GpuNorm& norm, bool backward, void* stream) {
  const auto kernel = backward ? norm_backward_kernel<X, Stream, Lanes, V> : norm_forward_kernel<X, Stream, Lanes, V>;
  const int threads = norm.row_threads * norm.block_rows;
  const int floats = kSumFloats + (backward ? block_sum_floats(norm.row_threads, norm.block_rows, V) : 0);
  return launch<GpuNorm>(kernel, norm.blocks, 1, static_cast<unsigned>(threads), floats * sizeof(float), stream, norm);
}

// To four elements; null is.
bool is_aligned(const void* data, Dtype dtype) {
  return reinterpret_cast<std::uintptr_t>(data) % (kFour * element_size(dtype)) == 0;
}
bool has_vectors(const NormRows& a, i64 rows, Dtype dtype) {
  return is_aligned(a.data, dtype) && (a.stride % kFour == 0 || rows <= 1);
}

}  // namespace

void divide_norm(GpuNorm& norm, bool backward) {
  const NormProblem& p = norm.p;
  const int dim = static_cast<int>(p.dim), vectors = (dim + kFour - 1) / kFour;
  const bool wide = vectors > kMostThreads * kVectors;
  norm.fast = !wide && dim % kFour == 0 && p.stream_dtype == Dtype::f32;
  norm.fast &= is_aligned(norm.weight.data, norm.weight.dtype) && is_aligned(norm.bias.data, norm.bias.dtype);
  for (const NormRows* a : {&p.x, &p.y, &p.dy, &p.dx}) norm.fast &= has_vectors(*a, p.rows, p.dtype);
  for (const NormRows* a : {&p.residual, &p.h, &p.dh, &p.dresidual}) norm.fast &= has_vectors(*a, p.rows, Dtype::f32);
  norm.inverse_dim = 1.0f / static_cast<float>(dim);
  const int each = wide ? kWideVectors : kVectors, threads = (vectors + each - 1) / each;
  norm.row_threads = norm.fast && threads <= 16 ? 16 : (threads + kWarp - 1) / kWarp * kWarp;
  const int usual = backward ? kBackwardThreads : kForwardThreads;
  norm.block_rows = wide || norm.row_threads > usual ? 1 : usual / norm.row_threads;
  const i64 blocks = (p.rows + norm.block_rows - 1) / norm.block_rows;
  norm.blocks = static_cast<unsigned>(backward ? std::min<i64>(blocks, device_multiprocessors()) : blocks);
}

const char* launch_norm(const GpuNorm& norm, bool backward, void* stream) {
  if (!norm.fast) {
    if (norm.p.dim > kMostThreads * kVectors * kFour) {
      return launch_with<AtRunTime<false>, AtRunTime<false>, 0, kWideVectors>(norm, backward, stream);
    }
    return launch_with<AtRunTime<false>, AtRunTime<false>, 0, kVectors>(norm, backward, stream);
  }
  return with_static_dtype(norm.p.dtype, [&](auto dtype) {
    using X = Known<dtype.value>;
    using Stream = Known<Dtype::f32>;
    if (norm.row_threads == 16) return launch_with<X, Stream, 16, kVectors>(norm, backward, stream);
    if (norm.row_threads == kWarp) return launch_with<X, Stream, kWarp, kVectors>(norm, backward, stream);
    return launch_with<X, Stream, 0, kVectors>(norm, backward, stream);
  });
}

}  // namespace mamba_ssm
