// Portable SIMD lanes for the CPU kernels: GCC/Clang vector extensions, so one kernel source compiles for AVX-512,
// AVX2, SSE2 and Arm. Each *_cpu_<isa>.cpp includes isa_<isa>.h, its kernel and isa_end.h;
// everything here lives in that namespace and is always inlined, so that no function compiled for one instruction
// set can be linked into another.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "dtype.h"

#ifndef MAMBA_SSM_ISA
#error "include isa_avx512.h, isa_avx2.h or isa_generic.h first"
#endif

#define MAMBA_SSM_INLINE inline __attribute__((always_inline))
// For larger functions of an instruction set's namespace: compiled once in each of its translation units.
#define MAMBA_SSM_ONCE static __attribute__((noinline))

namespace mamba_ssm {
namespace MAMBA_SSM_ISA {

constexpr int kLanes = MAMBA_SSM_LANES;

typedef float vfloat __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t vint __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t vuint __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t vhalf __attribute__((vector_size(2 * kLanes)));

MAMBA_SSM_INLINE vfloat splat(float value) { return value - vfloat{}; }

template <class To, class From>
MAMBA_SSM_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

MAMBA_SSM_INLINE vfloat load(const float* p) {
  vfloat v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
MAMBA_SSM_INLINE void store(float* p, vfloat v) { std::memcpy(p, &v, sizeof(v)); }

// The larger (smaller) of x and the bound. NaN in `x` stays NaN: the comparison is false and `x` is kept.
#if MAMBA_SSM_LANES == 16
MAMBA_SSM_INLINE vfloat at_least(vfloat x, float low) {
  return (vfloat)_mm512_maskz_max_ps(0xffff, (__m512)splat(low), (__m512)x);
}
MAMBA_SSM_INLINE vfloat at_most(vfloat x, float high) {
  return (vfloat)_mm512_maskz_min_ps(0xffff, (__m512)splat(high), (__m512)x);
}
#elif MAMBA_SSM_LANES == 8
MAMBA_SSM_INLINE vfloat at_least(vfloat x, float low) { return (vfloat)_mm256_max_ps((__m256)splat(low), (__m256)x); }
MAMBA_SSM_INLINE vfloat at_most(vfloat x, float high) { return (vfloat)_mm256_min_ps((__m256)splat(high), (__m256)x); }
#else
MAMBA_SSM_INLINE vfloat at_least(vfloat x, float low) { return x < low ? splat(low) : x; }
MAMBA_SSM_INLINE vfloat at_most(vfloat x, float high) { return x > high ? splat(high) : x; }
#endif
MAMBA_SSM_INLINE vfloat clamp(vfloat x, float low, float high) { return at_most(at_least(x, low), high); }
MAMBA_SSM_INLINE vfloat abs(vfloat x) { return bit_cast<vfloat>(bit_cast<vint>(x) & 0x7fffffff); }

// ---- 16-bit elements -------------------------------------------------------------------------------------------

MAMBA_SSM_INLINE vfloat from_bf16(vhalf bits) { return bit_cast<vfloat>(__builtin_convertvector(bits, vuint) << 16); }

// Round to nearest even; NaN stays a (quiet) NaN.
MAMBA_SSM_INLINE vhalf to_bf16(vfloat x) {
  const vuint bits = bit_cast<vuint>(x);
  const vuint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vuint quiet = (bits >> 16) | 0x40;
  return __builtin_convertvector(x == x ? rounded : quiet, vhalf);
}

#if MAMBA_SSM_LANES == 16
MAMBA_SSM_INLINE vfloat from_f16(vhalf bits) {
  return bit_cast<vfloat>(_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(bits)));
}
MAMBA_SSM_INLINE vhalf to_f16(vfloat x) {
  return bit_cast<vhalf>(_mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(x), 0));
}
#elif MAMBA_SSM_LANES == 8
MAMBA_SSM_INLINE vfloat from_f16(vhalf bits) { return bit_cast<vfloat>(_mm256_cvtph_ps(bit_cast<__m128i>(bits))); }
MAMBA_SSM_INLINE vhalf to_f16(vfloat x) { return bit_cast<vhalf>(_mm256_cvtps_ph(bit_cast<__m256>(x), 0)); }
#else
// Exponent and mantissa moved into place; the multiplication by 2^112 rebiases the exponent and normalizes subnormals.
MAMBA_SSM_INLINE vfloat from_f16(vhalf bits) {
  const vuint h = __builtin_convertvector(bits, vuint);
  const vuint magnitude = (h & 0x7fff) << 13;
  const vuint special = (h & 0x7c00) == 0x7c00 ? vuint{} + 0x70000000u : vuint{};  // Inf and NaN keep exponent 255
  const vfloat scaled = bit_cast<vfloat>(magnitude) * 0x1p112f;
  const vuint finite = bit_cast<vuint>(scaled);
  const vuint result = special != 0 ? (magnitude | 0x7f800000u) : finite;
  return bit_cast<vfloat>(result | ((h & 0x8000) << 16));
}
// Round to nearest even. Subnormal results are rounded by adding a constant whose unit in the last place is 2^-24.
MAMBA_SSM_INLINE vhalf to_f16(vfloat x) {
  const vuint sign = (bit_cast<vuint>(x) >> 16) & 0x8000;
  const vuint bits = bit_cast<vuint>(x) & 0x7fffffff;
  const vuint normal = (bits + 0xfff + ((bits >> 13) & 1) - (112u << 23)) >> 13;
  const vuint subnormal = bit_cast<vuint>(bit_cast<vfloat>(bits) + 0.5f) - 0x3f000000u;
  vuint half = bits < (113u << 23) ? subnormal : normal;
  half = bits >= (143u << 23) ? vuint{} + 0x7c00u : half;                        // overflow and infinity
  half = bits >= 0x477ff000u && bits < (143u << 23) ? vuint{} + 0x7c00u : half;  // rounds up past 65504
  half = bits > 0x7f800000u ? vuint{} + 0x7e00u : half;                          // NaN
  return __builtin_convertvector(half | sign, vhalf);
}
#endif

// `count` (1 … kLanes) neighbouring elements as fp32; the lanes past `count` are zero.
MAMBA_SSM_INLINE vfloat load_elements(const void* base, std::int64_t offset, Dtype dtype, int count) {
  if (dtype == Dtype::f32) {
    const float* p = static_cast<const float*>(base) + offset;
    if (count == kLanes) return load(p);
    vfloat v{};
    std::memcpy(&v, p, 4 * count);
    return v;
  }
  const std::uint16_t* p = static_cast<const std::uint16_t*>(base) + offset;
  vhalf h{};
  if (count == kLanes) {
    std::memcpy(&h, p, sizeof(h));
  } else {
    std::memcpy(&h, p, 2 * count);
  }
  return dtype == Dtype::bf16 ? from_bf16(h) : from_f16(h);
}

MAMBA_SSM_INLINE void store_elements(void* base, std::int64_t offset, Dtype dtype, int count, vfloat v) {
  if (dtype == Dtype::f32) {
    float* p = static_cast<float*>(base) + offset;
    if (count == kLanes) {
      store(p, v);
    } else {
      std::memcpy(p, &v, 4 * count);
    }
    return;
  }
  std::uint16_t* p = static_cast<std::uint16_t*>(base) + offset;
  const vhalf h = dtype == Dtype::bf16 ? to_bf16(v) : to_f16(v);
  if (count == kLanes) {
    std::memcpy(p, &h, sizeof(h));
  } else {
    std::memcpy(p, &h, 2 * count);
  }
}

// One element as fp32 (for strided gathers).
MAMBA_SSM_INLINE float load_element(const void* base, std::int64_t offset, Dtype dtype) {
  return load_elements(base, offset, dtype, 1)[0];
}
MAMBA_SSM_INLINE void store_element(void* base, std::int64_t offset, Dtype dtype, float value) {
  store_elements(base, offset, dtype, 1, splat(value));
}

// ---- transposition and sums over lanes -------------------------------------------------------------------------

namespace detail {
// A permutation of lanes known at compile time. Lane i of the result: from a where index(i) < kLanes, else from b.
template <class Index>
MAMBA_SSM_INLINE vfloat permute(vfloat a, vfloat b, Index index) {
  vint indices;
  for (int i = 0; i < kLanes; ++i) indices[i] = index(i);
#if defined(__clang__)
  vfloat r;
  for (int i = 0; i < kLanes; ++i) r[i] = indices[i] < kLanes ? a[indices[i]] : b[indices[i] - kLanes];
  return r;
#else
  return __builtin_shuffle(a, b, indices);
#endif
}
// Lanes with bit `Step` of their number set come from b, the others from a.
template <int Step>
MAMBA_SSM_INLINE vfloat blend(vfloat a, vfloat b) {
  return permute(a, b, [](int i) { return i & Step ? i + kLanes : i; });
}
// Every lane from its partner, whose number differs in bit `Step`.
template <int Step>
MAMBA_SSM_INLINE vfloat swap(vfloat a) {
  return permute(a, a, [](int i) { return i ^ Step; });
}
template <int Step>
MAMBA_SSM_INLINE void transpose_step(vfloat (&m)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    if (i & Step) continue;
    const vfloat low = blend<Step>(m[i], swap<Step>(m[i + Step]));
    m[i + Step] = blend<Step>(swap<Step>(m[i]), m[i + Step]);
    m[i] = low;
  }
  if constexpr (Step * 2 < kLanes) transpose_step<Step * 2>(m);
}
}  // namespace detail

// m[i][j] <-> m[j][i]
MAMBA_SSM_INLINE void transpose(vfloat (&m)[kLanes]) { detail::transpose_step<1>(m); }

// Lane i of the result is the sum of all lanes of vectors(first + i * step), for kLanes of them.
template <int Count, class Vectors>
MAMBA_SSM_INLINE vfloat sum_lanes(const Vectors& vectors, int first, int step) {
  if constexpr (Count == 1) {
    return vectors(first);
  } else {
    constexpr int kHalf = Count / 2;
    const vfloat a = sum_lanes<kHalf>(vectors, first, step);
    const vfloat b = sum_lanes<kHalf>(vectors, first + kHalf * step, step);
    return detail::blend<kHalf>(a, b) + detail::swap<kHalf>(detail::blend<kHalf>(b, a));
  }
}

}  // namespace MAMBA_SSM_ISA
}  // namespace mamba_ssm
