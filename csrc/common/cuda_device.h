// What our CUDA kernels use of the device beyond plain C++. Compiled without nvcc, each function has a twin on
// csrc/tests/cuda_on_cpu.h, so that the tests can run the kernels where there is no GPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <type_traits>
#include <utility>

#include "dtype.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define MAMBA_SSM_DEVICE __device__ __forceinline__
#define MAMBA_SSM_DEVICE_CALL __device__ __noinline__  // for what is seldom run, and large
#define MAMBA_SSM_CONSTANT_PARAMETER const __grid_constant__
#else
#include "../tests/cuda_on_cpu.h"
#define MAMBA_SSM_DEVICE inline __attribute__((always_inline))
#define MAMBA_SSM_DEVICE_CALL inline __attribute__((noinline))
#define MAMBA_SSM_CONSTANT_PARAMETER const
#endif

namespace mamba_ssm {

constexpr int kWarp = 32;

// ---- arithmetic --------------------------------------------------------------------------------------------------

// 2^x with a relative error of 2^-22; results below 2^-126 are 0.
MAMBA_SSM_DEVICE float fast_exp2(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = cuda_on_cpu::with_error(exp2f(x), 0x1p-22f);
  return y < 0x1p-126f ? 0.0f : y;
#endif
}

// 1/x, good to one unit in the last place.
MAMBA_SSM_DEVICE float fast_reciprocal(float x) {
#if defined(__CUDACC__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return cuda_on_cpu::with_error(1.0f / x, 0x1p-24f);
#endif
}

MAMBA_SSM_DEVICE float sigmoid(float x) { return fast_reciprocal(1.0f + fast_exp2(-x * 1.44269504f)); }
// The derivative of silu(x) = x s, where s = sigmoid(x).
MAMBA_SSM_DEVICE float silu_slope(float x, float s) { return s * (1.0f + x * (1.0f - s)); }

// The value, of which the compiler knows nothing more: what is made of it inside a loop is not kept from turn to turn.
MAMBA_SSM_DEVICE float opaque(float value) {
#if defined(__CUDACC__)
  asm volatile("" : "+f"(value));
#endif
  return value;
}

// ---- memory ------------------------------------------------------------------------------------------------------

// The dynamic shared memory of the block.
template <class T>
MAMBA_SSM_DEVICE T& shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char memory[];
  return *reinterpret_cast<T*>(memory);
#else
  return *reinterpret_cast<T*>(cuda_on_cpu::block.shared());
#endif
}

// base + count · bytes, in global memory, by one instruction.
MAMBA_SSM_DEVICE char* advance(char* base, int count, int bytes) {
#if defined(__CUDACC__)
  long long result;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(result) : "r"(count), "r"(bytes), "l"(base));
  return static_cast<char*>(__cvta_global_to_generic(result));
#else
  return base + static_cast<std::int64_t>(count) * bytes;
#endif
}

// Starts a copy of Bytes (4, 8 or 16) from global to shared memory, or zeros there if not `valid`.
template <int Bytes>
MAMBA_SSM_DEVICE void copy_async(void* shared, const void* global, bool valid) {
#if defined(__CUDACC__)
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int size = valid ? Bytes : 0;
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(size) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(global), "n"(Bytes), "r"(size)
                 : "memory");
  }
#else
  // The device faults on such addresses even where nothing is read.
  cuda_on_cpu::check(reinterpret_cast<std::uintptr_t>(shared) % Bytes == 0);
  cuda_on_cpu::check(reinterpret_cast<std::uintptr_t>(global) % Bytes == 0);
  cuda_on_cpu::block.copy_async([=] { valid ? memcpy(shared, global, Bytes) : memset(shared, 0, Bytes); });
#endif
}
// Waits for the copies that this thread has started; the block sees them after __syncthreads.
MAMBA_SSM_DEVICE void wait_for_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#else
  cuda_on_cpu::block.wait_for_copies();
#endif
}

MAMBA_SSM_DEVICE int bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Half types as their bits.
MAMBA_SSM_DEVICE float from_bfloat16(std::uint32_t bits) {
  const std::uint32_t wide = bits << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}
MAMBA_SSM_DEVICE std::uint16_t to_bfloat16(float value) {
#if defined(__CUDACC__)
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  std::uint32_t bits;
  memcpy(&bits, &value, 4);
  if (value != value) return 0x7fff;
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#endif
}
MAMBA_SSM_DEVICE float from_float16(std::uint16_t bits) {
#if defined(__CUDACC__)
  return __half2float(__ushort_as_half(bits));
#else
  _Float16 half;
  memcpy(&half, &bits, 2);
  return static_cast<float>(half);
#endif
}
MAMBA_SSM_DEVICE std::uint16_t to_float16(float value) {
#if defined(__CUDACC__)
  return __half_as_ushort(__float2half_rn(value));
#else
  const _Float16 half = static_cast<_Float16>(value);
  std::uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
#endif
}

MAMBA_SSM_DEVICE float load_element(const void* data, std::int64_t index, Dtype dtype) {
  if (dtype == Dtype::f32) return static_cast<const float*>(data)[index];
  const std::uint16_t bits = static_cast<const std::uint16_t*>(data)[index];
  return dtype == Dtype::f16 ? from_float16(bits) : from_bfloat16(bits);
}
MAMBA_SSM_DEVICE void store_element(void* data, std::int64_t index, Dtype dtype, float value) {
  if (dtype == Dtype::f32) {
    static_cast<float*>(data)[index] = value;
  } else {
    static_cast<std::uint16_t*>(data)[index] = dtype == Dtype::f16 ? to_float16(value) : to_bfloat16(value);
  }
}

// Two neighbours at an even index of memory aligned to both.
template <Dtype T>
MAMBA_SSM_DEVICE float2 load_pair(const void* data, std::int64_t index) {
  if constexpr (T == Dtype::f32) {
    return static_cast<const float2*>(data)[index / 2];
  } else {
    const std::uint32_t bits = static_cast<const std::uint32_t*>(data)[index / 2];
    if constexpr (T == Dtype::f16) return {from_float16(bits & 0xffff), from_float16(bits >> 16)};
    const std::uint32_t high = bits & 0xffff0000u;
    float second;
    memcpy(&second, &high, 4);
    return {from_bfloat16(bits), second};
  }
}
// Eight neighbours, aligned to 16 bytes.
template <Dtype T>
MAMBA_SSM_DEVICE void load_eight(const void* data, float (&values)[8]) {
  if constexpr (T == Dtype::f32) {
    for (int i = 0; i < 2; ++i) {
      const float4 v = static_cast<const float4*>(data)[i];
      values[4 * i] = v.x, values[4 * i + 1] = v.y, values[4 * i + 2] = v.z, values[4 * i + 3] = v.w;
    }
  } else {
    const uint4 words = *static_cast<const uint4*>(data);
    const std::uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 v = load_pair<T>(&pairs[i], 0);
      values[2 * i] = v.x, values[2 * i + 1] = v.y;
    }
  }
}
template <Dtype T>
MAMBA_SSM_DEVICE void store_pair(void* data, std::int64_t index, float2 value) {
  if constexpr (T == Dtype::f32) {
    static_cast<float2*>(data)[index / 2] = value;
  } else {
    const std::uint32_t low = T == Dtype::f16 ? to_float16(value.x) : to_bfloat16(value.x);
    const std::uint32_t high = T == Dtype::f16 ? to_float16(value.y) : to_bfloat16(value.y);
    static_cast<std::uint32_t*>(data)[index / 2] = low | (high << 16);
  }
}

// The same for stores.
template <Dtype T>
MAMBA_SSM_DEVICE void store_eight(void* data, const float (&values)[8]) {
  if constexpr (T == Dtype::f32) {
    static_cast<float4*>(data)[0] = {values[0], values[1], values[2], values[3]};
    static_cast<float4*>(data)[1] = {values[4], values[5], values[6], values[7]};
  } else {
    std::uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) store_pair<T>(&words[i], 0, {values[2 * i], values[2 * i + 1]});
    *static_cast<uint4*>(data) = {words[0], words[1], words[2], words[3]};
  }
}

// A vector of 8 or 16 bytes, which the device takes only from where its size divides the address.
template <class Vector>
MAMBA_SSM_DEVICE Vector load_vector(const void* address) {
#if !defined(__CUDACC__)
  cuda_on_cpu::check(reinterpret_cast<std::uintptr_t>(address) % sizeof(Vector) == 0);
#endif
  return *static_cast<const Vector*>(address);
}
template <class Vector>
MAMBA_SSM_DEVICE void store_vector(void* address, const Vector& vector) {
#if !defined(__CUDACC__)
  cuda_on_cpu::check(reinterpret_cast<std::uintptr_t>(address) % sizeof(Vector) == 0);
#endif
  *static_cast<Vector*>(address) = vector;
}

// Four neighbours as they are in memory, aligned to them all.
template <Dtype T>
using RawFour = std::conditional_t<T == Dtype::f32, float4, uint2>;
template <Dtype T>
MAMBA_SSM_DEVICE void to_floats(const RawFour<T>& raw, float (&values)[4]) {
  if constexpr (T == Dtype::f32) {
    values[0] = raw.x, values[1] = raw.y, values[2] = raw.z, values[3] = raw.w;
  } else {
    const std::uint32_t words[2] = {raw.x, raw.y};
    const float2 low = load_pair<T>(&words[0], 0), high = load_pair<T>(&words[1], 0);
    values[0] = low.x, values[1] = low.y, values[2] = high.x, values[3] = high.y;
  }
}
template <Dtype T>
MAMBA_SSM_DEVICE RawFour<T> from_floats(const float (&values)[4]) {
  if constexpr (T == Dtype::f32) {
    return {values[0], values[1], values[2], values[3]};
  } else {
    std::uint32_t words[2];
    store_pair<T>(&words[0], 0, {values[0], values[1]});
    store_pair<T>(&words[1], 0, {values[2], values[3]});
    return {words[0], words[1]};
  }
}

// Stores to global memory that this kernel does not read, if index < count: without a branch, which would keep the
// compiler from mixing the instructions before and behind it.
template <Dtype T>
MAMBA_SSM_DEVICE void store_element_below(int index, int count, void* element, float value) {
#if defined(__CUDACC__)
  if constexpr (T == Dtype::f32) {
    asm volatile("{.reg .pred p; setp.lt.s32 p, %0, %1; @p st.global.f32 [%2], %3;}" ::"r"(index), "r"(count),
                 "l"(element), "f"(value));
  } else {
    const std::uint16_t bits = T == Dtype::f16 ? to_float16(value) : to_bfloat16(value);
    asm volatile("{.reg .pred p; setp.lt.s32 p, %0, %1; @p st.global.u16 [%2], %3;}" ::"r"(index), "r"(count),
                 "l"(element), "h"(bits));
  }
#else
  if (index < count) store_element(element, 0, T, value);
#endif
}

// The same for two neighbours, aligned to both.
template <Dtype T>
MAMBA_SSM_DEVICE void store_pair_below(int index, int count, void* elements, float2 values) {
#if defined(__CUDACC__)
  if constexpr (T == Dtype::f32) {
    asm volatile("{.reg .pred p; setp.lt.s32 p, %0, %1; @p st.global.v2.f32 [%2], {%3, %4};}" ::"r"(index), "r"(count),
                 "l"(elements), "f"(values.x), "f"(values.y));
  } else {
    const std::uint32_t low = T == Dtype::f16 ? to_float16(values.x) : to_bfloat16(values.x);
    const std::uint32_t high = T == Dtype::f16 ? to_float16(values.y) : to_bfloat16(values.y);
    asm volatile("{.reg .pred p; setp.lt.s32 p, %0, %1; @p st.global.u32 [%2], %3;}" ::"r"(index), "r"(count),
                 "l"(elements), "r"(low | (high << 16)));
  }
#else
  if (index < count) store_pair<T>(elements, 0, values);
#endif
}

// Calls function(std::integral_constant<Dtype, dtype>()): a loop in there knows the dtype.
template <class Function>
MAMBA_SSM_DEVICE void with_dtype(Dtype dtype, const Function& function) {
  if (dtype == Dtype::bf16) {
    function(std::integral_constant<Dtype, Dtype::bf16>());
  } else if (dtype == Dtype::f16) {
    function(std::integral_constant<Dtype, Dtype::f16>());
  } else {
    function(std::integral_constant<Dtype, Dtype::f32>());
  }
}

// Stops the program if `condition` does not hold, as torch does for an index out of range.
MAMBA_SSM_DEVICE void check_on_device(bool condition) {
#if defined(__CUDACC__)
  if (!condition) __trap();
#else
  cuda_on_cpu::check(condition);
#endif
}

// ---- warps -------------------------------------------------------------------------------------------------------

// The value of the lane whose index differs in the bits of `mask`.
MAMBA_SSM_DEVICE float shuffle_xor(float value, int mask) {
#if defined(__CUDACC__)
  return __shfl_xor_sync(0xffffffffu, value, mask);
#else
  const auto* lanes = cuda_on_cpu::block.exchange(&value, sizeof(value), "shuffle_xor");
  memcpy(&value, lanes[cuda_on_cpu::block.lane() ^ mask], sizeof(value));
  return value;
#endif
}

// Whether `value` holds in all lanes.
MAMBA_SSM_DEVICE bool warp_all(bool value) {
#if defined(__CUDACC__)
  return __all_sync(0xffffffffu, value);
#else
  const auto* lanes = cuda_on_cpu::block.exchange(&value, sizeof(value), "warp_all");
  for (int i = 0; i < kWarp; ++i) value &= lanes[i][0] != 0;
  return value;
#endif
}

// sum += a · b on the tensor cores, a 16 × 8, b 8 × 8, their elements read as tf32: the lowest 13 bits are ignored.
// With row = lane / 4 and k = lane % 4, a lane holds a(row, k), a(row + 8, k), a(row, k + 4), a(row + 8, k + 4);
// b(k, row), b(k + 4, row); and sum(row, 2k), sum(row, 2k + 1), sum(row + 8, 2k), sum(row + 8, 2k + 1).
MAMBA_SSM_DEVICE void multiply_tiles(float (&sum)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
#if defined(__CUDACC__)
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
#else
  const float own[6] = {a0, a1, a2, a3, b0, b1};
  const auto* lanes = cuda_on_cpu::block.exchange(own, sizeof(own), "multiply_tiles");
  const auto element = [&](int lane, int i) {
    std::uint32_t bits;
    memcpy(&bits, lanes[lane] + 4 * i, 4);
    bits &= 0xffffe000u;
    float value;
    memcpy(&value, &bits, 4);
    return value;
  };
  const int lane = cuda_on_cpu::block.lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, upper = i / 2, column = 2 * (lane % 4) + i % 2;
    float total = 0.0f;
    for (int k = 0; k < 8; ++k) {
      total += element(4 * row + k % 4, 2 * (k / 4) + upper) * element(4 * column + k % 4, 4 + k / 4);
    }
    sum[i] += total;
  }
#endif
}
// What multiply_tiles sees of a value for certain; the rest, value - tile_part(value), is exact.
MAMBA_SSM_DEVICE float tile_part(float value) {
  std::uint32_t bits;
  memcpy(&bits, &value, 4);
  bits &= 0xffffe000u;
  memcpy(&value, &bits, 4);
  return value;
}

// The nearest value that multiply_tiles sees wholly.
MAMBA_SSM_DEVICE float round_to_tile(float value) {
  std::uint32_t bits;
  memcpy(&bits, &value, 4);
  const std::uint32_t rounded = (bits + 0x1000u) & 0xffffe000u;
  if ((bits & 0x7f800000u) != 0x7f800000u) bits = rounded;  // infinities and NaN stay
  memcpy(&value, &bits, 4);
  return value;
}

// ---- launch ------------------------------------------------------------------------------------------------------

#if defined(__CUDACC__)
// What the driver has been asked once is kept, for each device: it takes microseconds to answer.
class KeptPerDevice {
 public:
  // The value of `key` on the current device, made by find(device, value) unless that was done; an error is not kept.
  template <class Find>
  cudaError_t get(const void* key, std::size_t& value, const Find& find) {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto kept = values_.find({key, device});
    if (kept != values_.end()) {
      value = kept->second;
      return cudaSuccess;
    }
    error = find(device, value);
    if (error == cudaSuccess) values_[{key, device}] = value;
    return error;
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<const void*, int>, std::size_t> values_;
};
#endif

// Of the current device; the emulation is one that is filled soon, yet not by one block.
inline int device_multiprocessors() {
#if defined(__CUDACC__)
  static KeptPerDevice kept;
  std::size_t count = 1;
  kept.get(nullptr, count, [](int device, std::size_t& value) {
    int found = 1;
    const cudaError_t error = cudaDeviceGetAttribute(&found, cudaDevAttrMultiProcessorCount, device);
    value = static_cast<std::size_t>(found);
    return error;
  });
  return static_cast<int>(count);
#else
  return 2;
#endif
}

// Starts a kernel; null, or what went wrong.
template <class... Parameters>
const char* launch(void (*kernel)(Parameters...), unsigned grid_x, unsigned grid_y, unsigned threads,
                   std::size_t shared_bytes, void* stream, const Parameters&... parameters) {
#if defined(__CUDACC__)
  if (shared_bytes > 16 * 1024) {  // many such blocks on a multiprocessor want all of its memory to be shared memory
    static KeptPerDevice kept;
    const void* function = reinterpret_cast<const void*>(kernel);
    std::size_t allowed = 0;
    const cudaError_t error = kept.get(function, allowed, [&](int, std::size_t& value) {
      value = shared_bytes;  // which is always the same for a kernel
      const cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                                     cudaSharedmemCarveoutMaxShared);
      if (error != cudaSuccess) return error;
      return cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    });
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  kernel<<<dim3(grid_x, grid_y), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(parameters...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#else
  cuda_on_cpu::launch<Parameters...>(kernel, {grid_x, grid_y, 1}, threads, shared_bytes, parameters...);
  return nullptr;
#endif
}

}  // namespace mamba_ssm
