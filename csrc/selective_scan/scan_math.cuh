// Arithmetic of the CUDA scan: the float that discretization.h runs on in the kernels, softplus, and the gate.
#pragma once

#include "cuda_device.h"
#include "discretization.h"
#include "params.h"

namespace mamba_ssm {

// A float whose functions are the device's approximate ones.
struct Real {
  float value;
  Real() = default;
  MAMBA_SSM_HD Real(float v) : value(v) {}
  friend MAMBA_SSM_HD Real operator+(Real a, Real b) { return a.value + b.value; }
  friend MAMBA_SSM_HD Real operator-(Real a, Real b) { return a.value - b.value; }
  friend MAMBA_SSM_HD Real operator*(Real a, Real b) { return a.value * b.value; }
  friend MAMBA_SSM_DEVICE Real operator/(Real a, Real b) { return a.value * fast_reciprocal(b.value); }
  friend MAMBA_SSM_HD Real& operator+=(Real& a, Real b) { return a = a + b; }
  friend MAMBA_SSM_HD Real& operator-=(Real& a, Real b) { return a = a - b; }
  friend MAMBA_SSM_HD bool operator<(Real a, Real b) { return a.value < b.value; }
  friend MAMBA_SSM_HD bool operator>(Real a, Real b) { return a.value > b.value; }
  friend MAMBA_SSM_HD bool operator>=(Real a, Real b) { return a.value >= b.value; }
};

MAMBA_SSM_DEVICE Real exponential2(Real z) { return fast_exp2(z.value); }

// Near 0 by a polynomial for (2^z − 1)/z, good to 1.3e-8.
MAMBA_SSM_DEVICE Exponential<Real> exponential2_and_minus_one(Real z) {
  const float power = fast_exp2(z.value), x = z.value;
  float q = 1.54531629e-4f;
  q = q * x + 1.33908634e-3f;
  q = q * x + 9.61808256e-3f;
  q = q * x + 5.55035711e-2f;
  q = q * x + 0.240226508f;
  q = q * x + 0.693147188f;
  return {power, fabsf(x) < 0.5f ? q * x : power - 1.0f};
}

// Near 0 by a polynomial for (2^z − 1 − z ln 2)/z², good to 8e-9.
MAMBA_SSM_DEVICE ExponentialSecond<Real> exponential2_and_second(Real z) {
  const float power = fast_exp2(z.value), x = z.value;
  float q = 1.33395111e-6f;
  q = q * x + 1.54318261e-5f;
  q = q * x + 1.54029094e-4f;
  q = q * x + 1.33326612e-3f;
  q = q * x + 9.61812988e-3f;
  q = q * x + 5.55041199e-2f;
  q = q * x + 0.240226507f;
  return {power, fabsf(x) < 1.0f ? q * (x * x) : (power - 1.0f) - x * kLn2};
}

// softplus(x) = max(x, 0) + log(1 + e^−|x|), the logarithm by a polynomial good to 3e-8. `exponential` is e^−|x|.
// NaN stays NaN.
struct Softplus {
  float value, exponential;
};
MAMBA_SSM_DEVICE Softplus softplus(float x) {
  const float e = fast_exp2(-fabsf(x) * kLog2e);
  float q = 5.23269934e-3f;
  q = q * e - 0.0295052552f;
  q = q * e + 0.0782259711f;
  q = q * e - 0.136632467f;
  q = q * e + 0.191060068f;
  q = q * e - 0.248429821f;
  q = q * e + 0.333190968f;
  q = q * e - 0.499994931f;
  q = q * e + 0.99999997f;
  return {fmaxf(x, 0.0f) + e * q, e};
}
// softplus'(x) = 1/(1 + e^−x).
MAMBA_SSM_DEVICE float softplus_slope(float x, const Softplus& s) {
  const float inverse = fast_reciprocal(1.0f + s.exponential);
  return x < 0.0f ? s.exponential * inverse : inverse;
}

// Δ from its raw value with bias, and dΔ/d(that).
MAMBA_SSM_DEVICE float step_size(const ScanParams& p, float x) { return p.delta_softplus ? softplus(x).value : x; }

}  // namespace mamba_ssm
