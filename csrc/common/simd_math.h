// Elementary functions on SIMD lanes, for the kernels compiled once per instruction set (see simd.h).
#pragma once

#include "simd.h"

namespace mamba_ssm {
namespace MAMBA_SSM_ISA {

// e^x with a relative error below 2e-7 for |x| <= 88; beyond, the value at the bound. NaN stays NaN.
MAMBA_SSM_INLINE vfloat exp(vfloat x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  x = clamp(x, -87.0f, 88.0f);
  const vfloat shifted = x * 1.44269504f + kRound;
  const vfloat k = shifted - kRound;
  const vfloat r = (x - k * 0.693359375f) + k * 2.12194440e-4f;  // ln 2 in two parts
  vfloat q = splat(1.38141909e-3f);
  q = q * r + 8.36891382e-3f;
  q = q * r + 4.16684072e-2f;
  q = q * r + 1.66665190e-1f;
  q = q * r + 4.99999933e-1f;
  const vfloat p = (r * r) * q + r;
  const vfloat scale = bit_cast<vfloat>((bit_cast<vint>(shifted) << 23) + (127 << 23));  // 2^k
  return scale * p + scale;
}

MAMBA_SSM_INLINE vfloat sigmoid(vfloat x) { return 1.0f / (1.0f + exp(-x)); }

}  // namespace MAMBA_SSM_ISA
}  // namespace mamba_ssm
