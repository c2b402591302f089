// Elementary functions on SIMD lanes, for the kernels compiled once per instruction set (see simd.h). NaN stays NaN.
#pragma once

#include "simd.h"

namespace mamba_ssm {
namespace MAMBA_SSM_ISA {

// e^x with a relative error of 2e-7; x < -87 gives 1.6e-38 and x > 88.8 infinity.
MAMBA_SSM_INLINE vfloat exp(vfloat x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  x = clamp(x, -87.0f, 88.8f);
  const vfloat shifted = x * 1.44269504f + kRound;
  const vfloat r = x - (shifted - kRound) * 0.693147181f;
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
MAMBA_SSM_INLINE vfloat silu(vfloat x) { return x * sigmoid(x); }
// d silu / dx, given s = sigmoid(x)
MAMBA_SSM_INLINE vfloat silu_slope(vfloat x, vfloat s) { return s * (1.0f + x * (1.0f - s)); }

// log(1 + e^x) = max(x, 0) + log1p(w) with w = e^-|x| in (0, 1];  log1p(w) = 2 atanh(t), t = w/(2 + w) <= 1/3.
// The relative error stays small for very negative x too, where softplus(x) is about e^x.
MAMBA_SSM_INLINE vfloat softplus(vfloat x) {
  const vfloat w = exp(-abs(x));
  const vfloat t = w / (2.0f + w);
  const vfloat t2 = t * t;
  vfloat p = splat(0.140891630f);
  p = p * t2 + 0.139803024f;
  p = p * t2 + 0.200124550f;
  p = p * t2 + 0.333331573f;
  p = p * t2 + 1.0f;
  const vfloat positive = x < 0.0f ? splat(0.0f) : x;
  return positive + (t + t) * p;
}

}  // namespace MAMBA_SSM_ISA
}  // namespace mamba_ssm
