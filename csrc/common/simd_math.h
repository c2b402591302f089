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

// 2^z and 2^z − 1, the latter to full relative accuracy near z = 0.
struct Exp2 {
  vfloat value;
  vfloat minus_one;
};

// 2^z and 2^z − 1 − z ln 2, the latter to full relative accuracy near z = 0.
struct Exp2Second {
  vfloat value;
  vfloat second;
};

#if MAMBA_SSM_LANES == 16
// 2^z = 2^(k/16) 2^f with |f| <= 1/32: a table of 16 powers (and of their rounding errors), and a cubic for 2^f − 1.
// Half of the operations are shuffles, additions and scalings, which run beside the multiply-adds of the scan.
alignas(64) constexpr float kPowers[16] = {1.0f,        1.04427373f, 1.09050775f, 1.13878858f, 1.18920708f, 1.24185777f,
                                           1.29683959f, 1.35425556f, 1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f,
                                           1.68179286f, 1.75625217f, 1.8340081f,  1.91520655f};
alignas(64) constexpr float kPowerErrors[16] = {
    0.0f,       4.629e-08f,  -1.199e-08f, 4.73e-08f,  3.193e-08f,  3.621e-08f,  -3.099e-08f, -7.475e-09f,
    1.711e-08f, -3.048e-08f, 5.233e-09f,  6.108e-09f, -1.472e-08f, -5.259e-09f, -6.128e-09f, 5.141e-09f};

// The entry whose number is in the low four bits of each lane of `index`.
MAMBA_SSM_INLINE vfloat lookup(const float (&table)[16], vfloat index) {
  return (vfloat)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)index, _mm512_load_ps(table));
}

MAMBA_SSM_INLINE Exp2 exp2_and_minus_one(vfloat z) {
  constexpr float kRound = 786432.0f;  // 1.5 * 2^19: adding it rounds to 1/16 and leaves k in the low bits
  const vfloat shifted = z + kRound;
  const vfloat f = (vfloat)_mm512_maskz_reduce_ps(0xffff, (__m512)z, 4 << 4);  // z − k/16; 0 for an infinite z
  vfloat q = splat(0.0555041086f);
  q = q * f + 0.240233566f;
  q = q * f + 0.693147181f;
  const vfloat p = q * f + lookup(kPowerErrors, shifted);
  const vfloat power =
      (vfloat)_mm512_maskz_scalef_ps(0xffff, (__m512)lookup(kPowers, shifted), (__m512)(shifted - kRound));
  return {power * p + power, power * p + (power - 1.0f)};
}
// 2^z alone, which needs no correction of the table.
MAMBA_SSM_INLINE vfloat exp2(vfloat z) {
  constexpr float kRound = 786432.0f;
  const vfloat shifted = z + kRound;
  const vfloat f = (vfloat)_mm512_maskz_reduce_ps(0xffff, (__m512)z, 4 << 4);
  const vfloat p = ((0.0555041086f * f + 0.240233566f) * f + 0.693147181f) * f;
  const vfloat power =
      (vfloat)_mm512_maskz_scalef_ps(0xffff, (__m512)lookup(kPowers, shifted), (__m512)(shifted - kRound));
  return power * p + power;
}

// The rounding errors of 2^(k/16) for k = 0 … 7 and −8 … −1, the order of k's low four bits.
alignas(64) constexpr float kPowerErrorsNearOne[16] = {
    0.0f,      4.833e-08f, -1.308e-08f, 5.386e-08f, 3.798e-08f,  4.497e-08f,  -4.019e-08f, -1.012e-08f,
    1.21e-08f, -2.25e-08f, 4.035e-09f,  4.918e-09f, -1.238e-08f, -4.618e-09f, -5.62e-09f,  4.923e-09f};

// With 2^f = 1 + f (ln 2 + f R(f)):
//     2^z − 1 − z ln 2 = (2^(k/16) − 1 − k/16 ln 2) + f (ln 2 (2^(k/16) − 1) + 2^(k/16) f R(f)).
// Where the first part is small, 2^(k/16) is taken with its rounding error, so that nothing is lost.
MAMBA_SSM_INLINE Exp2Second exp2_and_second(vfloat z) {
  constexpr float kRound = 786432.0f, kLn2 = 0.693147181f;
  const vfloat shifted = z + kRound, k = shifted - kRound;
  const vfloat f = (vfloat)_mm512_maskz_reduce_ps(0xffff, (__m512)z, 4 << 4);
  const vfloat fR = ((0.00961816683f * f + 0.0555050857f) * f + 0.240226507f) * f;
  const vfloat power = (vfloat)_mm512_maskz_scalef_ps(0xffff, (__m512)lookup(kPowers, shifted), (__m512)k);
  const vfloat less = power - 1.0f;
  const vfloat first = (less + lookup(kPowerErrorsNearOne, shifted)) - k * kLn2;
  return {power * ((fR + kLn2) * f) + power, (power * fR + less * kLn2) * f + first};
}
#else
// 2^z = 2^k 2^f with |f| <= 1/2: a degree-6 minimax polynomial for 2^f − 1, and k into the exponent.
MAMBA_SSM_INLINE Exp2 exp2_and_minus_one(vfloat z) {
  constexpr float kRound = 12582912.0f;
  z = clamp(z, -126.0f, 127.9f);
  const vfloat shifted = z + kRound;
  const vfloat f = z - (shifted - kRound);
  vfloat q = splat(1.54035082e-4f);
  q = q * f + 1.33908498e-3f;
  q = q * f + 9.61823794e-3f;
  q = q * f + 5.55035722e-2f;
  q = q * f + 0.240226498f;
  q = q * f + 0.693147188f;
  const vfloat p = q * f;
  const vfloat power = bit_cast<vfloat>((bit_cast<vint>(shifted) << 23) + (127 << 23));
  return {power * p + power, power * p + (power - 1.0f)};
}
MAMBA_SSM_INLINE vfloat exp2(vfloat z) { return exp2_and_minus_one(z).value; }
// With 2^f = 1 + f (ln 2 + f R(f)): 2^z − 1 − z ln 2 = (2^k − 1 − k ln 2) + f (ln 2 (2^k − 1) + 2^k f R(f)).
MAMBA_SSM_INLINE Exp2Second exp2_and_second(vfloat z) {
  constexpr float kRound = 12582912.0f, kLn2 = 0.693147181f;
  const vfloat within = clamp(z, -126.0f, 127.9f);  // of the exponent; the linear term is z's own
  const vfloat shifted = within + kRound, k = shifted - kRound;
  const vfloat f = within - k;
  vfloat fR = splat(1.54531153e-4f);
  fR = fR * f + 1.33336021e-3f;
  fR = fR * f + 9.61808302e-3f;
  fR = fR * f + 5.55041097e-2f;
  fR = fR * f + 0.240226507f;
  fR = fR * f;
  const vfloat power = bit_cast<vfloat>((bit_cast<vint>(shifted) << 23) + (127 << 23));
  const vfloat less = power - 1.0f;
  return {power * ((fR + kLn2) * f) + power, (power * fR + less * kLn2) * f + (less - k * kLn2) + (within - z) * kLn2};
}
#endif

// Arguments below −87 are taken as −87, where e^-x is still finite and both functions are 0 to 1e-35.
// (A division costs no more than an approximate reciprocal and a Newton step here.)
MAMBA_SSM_INLINE vfloat sigmoid(vfloat x) { return 1.0f / (1.0f + exp(-at_least(x, -87.0f))); }
MAMBA_SSM_INLINE vfloat silu(vfloat x) {
  x = at_least(x, -87.0f);
  return x / (1.0f + exp(-x));
}
// d silu / dx, given s = sigmoid(x)
MAMBA_SSM_INLINE vfloat silu_slope(vfloat x, vfloat s) { return s * (1.0f + at_least(x, -87.0f) * (1.0f - s)); }

// log(1 + e^x) = max(x, 0) + log1p(w) with w = e^-|x| in (0, 1];  log1p(w) = 2 atanh(t), t = w/(2 + w) <= 1/3.
// The relative error stays small for very negative x too, where softplus(x) is about e^x. Its slope is sigmoid(x).
struct Softplus {
  vfloat value;
  vfloat slope;
};
MAMBA_SSM_INLINE Softplus softplus(vfloat x) {
  const vfloat w = exp(-abs(x));
  const vfloat t = w / (2.0f + w);
  const vfloat t2 = t * t;
  vfloat p = splat(0.140891630f);
  p = p * t2 + 0.139803024f;
  p = p * t2 + 0.200124550f;
  p = p * t2 + 0.333331573f;
  p = p * t2 + 1.0f;
  return {at_least(x, 0.0f) + (t + t) * p, (x < 0.0f ? w : splat(1.0f)) / (1.0f + w)};
}

}  // namespace MAMBA_SSM_ISA
}  // namespace mamba_ssm
