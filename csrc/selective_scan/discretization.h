// The discretizations of the diagonal state space model  h' = A h + B u  under a step Δ:
//
//     h_t = Ā_t h_{t-1} + c(Δ_t, A) B_t u_t          x = Δ_t A
//
// One struct per method: its name, its equation, its value and its derivatives. The kernels are templates over these
// structs and run them on one float (CUDA) or on a vector of lanes (CPU): `V` below is either. Nothing here needs
// torch.
//
// φ_k(x) = (e^x − Σ_{j<k} x^j/j!) / x^k. The held inputs of the paper are sums of Δ^k φ_k(x), evaluated without
// cancellation for every x ≤ 0: near 0 as a series, elsewhere in closed form.
//
// To add a method: write its struct, list it in MAMBA_SSM_DISCRETIZATIONS, and write its function in
// mamba_ssm/ops/discretization_ref.py, where the operations it costs stand too. A test holds the two tables equal.
#pragma once

#if defined(MAMBA_SSM_ISA)
#include "simd_math.h"
#else
#include <cmath>
#endif

#if defined(__CUDACC__)
#define MAMBA_SSM_HD __host__ __device__ __forceinline__
#else
#define MAMBA_SSM_HD inline __attribute__((always_inline))
#endif

namespace mamba_ssm {

// ---- what the structs are written in ---------------------------------------------------------------------------

template <class V>
MAMBA_SSM_HD V constant(float value) {
  return V{} + value;
}

constexpr float kLog2e = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// 2^z, and 2^z − 1 to full relative accuracy near z = 0. NaN stays NaN.
template <class V>
struct Exponential {
  V value;
  V minus_one;
};

template <class V>
MAMBA_SSM_HD V exponential2(V z) {
#if defined(MAMBA_SSM_ISA)
  return MAMBA_SSM_ISA::exp2(z);
#else
  return exp2f(z);
#endif
}

template <class V>
MAMBA_SSM_HD Exponential<V> exponential2_and_minus_one(V z) {
#if defined(MAMBA_SSM_ISA)
  const auto e = MAMBA_SSM_ISA::exp2_and_minus_one(z);
  return {e.value, e.minus_one};
#else
  const V k = rintf(z);
  const V f = z - k;
  V q = 1.54035082e-4f;
  q = q * f + 1.33908498e-3f;
  q = q * f + 9.61823794e-3f;
  q = q * f + 5.55035722e-2f;
  q = q * f + 0.240226498f;
  q = q * f + 0.693147188f;
  const V power = exp2f(k);
  return {exp2f(z), power * (q * f) + (power - 1.0f)};
#endif
}

// 2^z and 2^z − 1 − z ln 2, the latter to full relative accuracy near z = 0.
template <class V>
struct ExponentialSecond {
  V value;
  V second;
};
template <class V>
MAMBA_SSM_HD ExponentialSecond<V> exponential2_and_second(V z) {
#if defined(MAMBA_SSM_ISA)
  const auto e = MAMBA_SSM_ISA::exp2_and_second(z);
  return {e.value, e.second};
#else
  const V k = rintf(z);
  const V f = z - k;
  V fR = 1.54531153e-4f;
  fR = fR * f + 1.33336021e-3f;
  fR = fR * f + 9.61808302e-3f;
  fR = fR * f + 5.55041097e-2f;
  fR = fR * f + 0.240226507f;
  fR = fR * f;
  const V power = exp2f(k), less = power - 1.0f;
  return {exp2f(z), (power * fR + less * kLn2) * f + (less - k * kLn2)};
#endif
}

// p_k = Δ^k φ_k(x) for k = 1 … Count, for every A and x <= 0: near 0 by the series of φ_k, elsewhere by
// p_{k+1} = (p_k − Δ^k/k!) / A, which is stable there. e1 is e^x − 1.
template <class V>
struct HeldInputs {
  V p1, p2, p3;
  V next;  // p_{Count+1}, where x is near 0
  decltype(V{} < 0.0f) near;
};
template <int Count, class V>
MAMBA_SSM_HD HeldInputs<V> held_inputs(V delta, V A, V inverse, V e1) {
  HeldInputs<V> held{};
  const V x = delta * A;
  held.near = (x > -0.62f) & (x < 0.07f);
  V phi4 = constant<V>(1.73088130e-4f);
  phi4 = phi4 * x + 1.38127306e-3f;
  phi4 = phi4 * x + 8.33292029e-3f;
  phi4 = phi4 * x + 4.16667012e-2f;
  const V phi3 = phi4 * x + 0.166666667f;
  const V phi2 = phi3 * x + 0.5f;
  const V delta2 = delta * delta, delta3 = delta2 * delta;
  held.p1 = e1 * inverse;
  held.next = delta2 * phi2;
  if constexpr (Count >= 2) {
    held.p2 = held.near ? held.next : (held.p1 - delta) * inverse;
    held.next = delta3 * phi3;
  }
  if constexpr (Count >= 3) {
    held.p3 = held.near ? held.next : (held.p2 - delta2 * 0.5f) * inverse;
    held.next = delta2 * delta2 * phi4;
  }
  return held;
}

// What the forward pass needs: h_t = a_bar h_{t-1} + c B_t u_t.
template <class V>
struct Transition {
  V a_bar;
  V c;
};

// What the backward pass needs besides: Ā depends on x alone, so ∂Ā/∂Δ = A slope and ∂Ā/∂A = Δ slope.
template <class V>
struct TransitionGradient {
  V a_bar;
  V slope;
  V c;
  V c_delta;
  V c_A;
};

// ---- the methods -----------------------------------------------------------------------------------------------
// prepare(A) turns the continuous parameter, constant over time, into what the step needs of it (computed once per
// channel and state). forward(Δ, coefficients) and gradient(Δ, coefficients) are the discretization. kInputIsDelta says
// that c = Δ, so that a kernel need not keep c and its derivatives 1 and 0; kSlopeIsABar that dĀ/dx = Ā.

// Zero-order hold with Mamba's simplified input rule:  Ā = e^x,  c = Δ.
struct Zoh {
  static constexpr const char* name = "zoh";
  static constexpr bool kInputIsDelta = true;
  static constexpr bool kSlopeIsABar = true;
  template <class V>
  static MAMBA_SSM_HD V prepare(V A) {
    return A * kLog2e;
  }
  template <class V>
  static MAMBA_SSM_HD Transition<V> forward(V delta, V rate) {
    return {exponential2(delta * rate), delta};
  }
  template <class V>
  static MAMBA_SSM_HD TransitionGradient<V> gradient(V delta, V rate) {
    const V a_bar = exponential2(delta * rate);
    return {a_bar, a_bar, delta, constant<V>(1.0f), V{}};
  }
};

// Bilinear (Tustin):  Ā = (1 + x/2)/(1 − x/2),  c = Δ/(1 − x/2).  With w = 1/(1 − x/2): dĀ/dx = ∂c/∂Δ = w².
// At the pole x = 2 (A > 0) the result is infinite, as the rule is.
struct Bilinear {
  static constexpr const char* name = "bilinear";
  static constexpr bool kInputIsDelta = false;
  static constexpr bool kSlopeIsABar = false;
  template <class V>
  static MAMBA_SSM_HD V prepare(V A) {
    return A;
  }
  template <class V>
  static MAMBA_SSM_HD Transition<V> forward(V delta, V A) {
    const V half = (delta * A) * 0.5f;
    const V w = constant<V>(1.0f) / (constant<V>(1.0f) - half);
    return {w * half + w, delta * w};
  }
  template <class V>
  static MAMBA_SSM_HD TransitionGradient<V> gradient(V delta, V A) {
    const V half = (delta * A) * 0.5f;
    const V w = constant<V>(1.0f) / (constant<V>(1.0f) - half);
    const V w2 = w * w;
    return {w * half + w, w2, delta * w, w2, (delta * delta) * (w2 * 0.5f)};
  }
};

// c = Σ_k w_k p_k with p_k = Δ^k φ_k(x), the weights w_k in sixths so that they are integers at compile time; any A.
// ∂p_k/∂Δ = p_{k-1} (p_0 = e^x) and ∂p_k/∂A = Δ p_k − k p_{k+1} = (Δ p_{k-1} − k p_k) / A: the one is accurate near 0,
// the other far from it.
template <int W1, int W2, int W3>
struct HoldSeries {
  static constexpr bool kInputIsDelta = false;
  static constexpr bool kSlopeIsABar = true;
  static constexpr int kTerms = W3 != 0 ? 3 : W2 != 0 ? 2 : 1;
  static constexpr float w1 = W1 / 6.0f, w2 = W2 / 6.0f, w3 = W3 / 6.0f;
  template <class V>
  struct Coefficients {
    V A;
    V rate;     // A log2 e
    V inverse;  // 1/A
  };
  // |A| < 1e-9 is taken as 1e-9: x is then so small that the difference does not show.
  template <class V>
  static MAMBA_SSM_HD Coefficients<V> prepare(V A) {
    A = (A >= 0.0f) & (A < 1e-9f) ? constant<V>(1e-9f) : A;
    A = (A < 0.0f) & (A > -1e-9f) ? constant<V>(-1e-9f) : A;
    return {A, A * kLog2e, constant<V>(1.0f) / A};
  }
  // w1 a + w2 b + w3 c without the terms whose weight is zero.
  template <class V>
  static MAMBA_SSM_HD V weighted(V a, V b, V c) {
    if constexpr (W1 == 0 && W3 == 0) {
      return b * w2;
    } else if constexpr (W2 == 0 && W3 == 0) {
      return a * w1;
    } else if constexpr (W3 == 0) {
      return a * w1 + b * w2;
    } else {
      return a * w1 + b * w2 + c * w3;
    }
  }
  template <class V>
  static MAMBA_SSM_HD Transition<V> forward(V delta, const Coefficients<V>& k) {
    const Exponential<V> e = exponential2_and_minus_one(delta * k.rate);
    const HeldInputs<V> p = held_inputs<kTerms>(delta, k.A, k.inverse, e.minus_one);
    return {e.value, weighted(p.p1, p.p2, p.p3)};
  }
  template <class V>
  static MAMBA_SSM_HD TransitionGradient<V> gradient(V delta, const Coefficients<V>& k) {
    const Exponential<V> e = exponential2_and_minus_one(delta * k.rate);
    const HeldInputs<V> p = held_inputs<kTerms>(delta, k.A, k.inverse, e.minus_one);
    const V p2 = kTerms == 1 ? p.next : p.p2, p3 = kTerms == 2 ? p.next : p.p3;
    const V c = weighted(p.p1, p.p2, p.p3), c_delta = weighted(e.value, p.p1, p.p2);
    const V near = weighted(delta * p.p1 - p2, delta * p2 - 2.0f * p3, delta * p3 - 3.0f * p.next);
    const V far = (delta * c_delta - weighted(p.p1, 2.0f * p.p2, 3.0f * p.p3)) * k.inverse;
    return {e.value, e.value, c, c_delta, p.near ? near : far};
  }
};

// The same for |A| >= 0.5, where no series is needed: then 1/A, 1/A² and 1/A³ are of one size. With a_k = w_k / A^k and
// e_k = e^x − Σ_{j<k} x^j/j!, that is p_k = e_k / A^k, all of it is made of one remainder, and what cancels is small
// beside the result:
//     c     = (a1 + a2 + a3) e1 − x (a2 + a3 + x a3 / 2)
//     ∂c/∂Δ = w1 + x (w1 + w2/A) + e2 (w1 + w2/A + w3/A²)
//     ∂c/∂A = e2 (x (q1 + q2 + q3) − (q1 + 2 q2 + 3 q3)) + x² (q1 + q2 + 3/2 q3),    q_k = w_k / A^(k+1)
// The derivatives are for |x| <= 4: far out, e2 is as large as x, and they are not.
// Kernels use this where all their A, and for derivatives all their x, allow it, and `AnyA` elsewhere.
template <int W1, int W2, int W3>
struct Hold : HoldSeries<W1, W2, W3> {
  using AnyA = HoldSeries<W1, W2, W3>;
  static_assert(W1 != 0, "without a1 the parts of c cancel for small x");
  static constexpr float kSmallestA = 0.5f, kLargestX = 4.0f;
  template <class V>
  struct Coefficients {
    V rate;     // A log2 e
    V all;      // a1 + a2 + a3
    V linear;   // of z = x log2 e: (a2 + a3) ln 2
    V squared;  // a3 / 2 (ln 2)²
  };
  template <class V>
  static MAMBA_SSM_HD Coefficients<V> prepare(V A) {
    const V i = constant<V>(1.0f) / A;
    const V a3 = (i * i * i) * (W3 / 6.0f), a2 = (i * i) * (W2 / 6.0f);
    return {A * kLog2e, i * (W1 / 6.0f) + a2 + a3, (a2 + a3) * kLn2, a3 * (0.5f * kLn2 * kLn2)};
  }
  template <class V>
  static MAMBA_SSM_HD Transition<V> forward(V delta, const Coefficients<V>& k) {
    const V z = delta * k.rate;
    const Exponential<V> e = exponential2_and_minus_one(z);
    V c = e.minus_one * k.all;
    if constexpr (W3 != 0) {
      c -= z * (z * k.squared + k.linear);
    } else if constexpr (W2 != 0) {
      c -= z * k.linear;
    }
    return {e.value, c};
  }
  // c = e2 c_second + z (c_linear − z c_squared), and so on; in z = x log2 e, which takes up the powers of ln 2.
  template <class V>
  struct GradientCoefficients {
    V rate;
    V c_second, c_linear, c_squared;
    V delta_second, delta_linear;
    V A_second, A_mixed, A_squared;
  };
  template <class V>
  static MAMBA_SSM_HD GradientCoefficients<V> prepare_gradient(V A) {
    const V i = constant<V>(1.0f) / A;
    const V a1 = i * (W1 / 6.0f), a2 = (i * i) * (W2 / 6.0f), a3 = (i * i * i) * (W3 / 6.0f);
    const V q1 = a1 * i, q2 = a2 * i, q3 = a3 * i;
    return {A * kLog2e,
            a1 + a2 + a3,
            a1 * kLn2,
            a3 * (0.5f * kLn2 * kLn2),
            (a1 + a2 + a3) * A,
            (a1 + a2) * A * kLn2,
            q1 + q2 * 2.0f + q3 * 3.0f,
            (q1 + q2 + q3) * kLn2,
            (q1 + q2 + q3 * 1.5f) * (kLn2 * kLn2)};
  }
  template <class V>
  static MAMBA_SSM_HD TransitionGradient<V> gradient(V delta, const GradientCoefficients<V>& k) {
    const V z = delta * k.rate;
    const ExponentialSecond<V> e = exponential2_and_second(z);
    const V linear = W3 != 0 ? k.c_linear - z * k.c_squared : k.c_linear;
    const V c_delta =
        W2 == 0 && W3 == 0 ? e.value * (W1 / 6.0f) : e.second * k.delta_second + (z * k.delta_linear + W1 / 6.0f);
    return {e.value, e.value, e.second * k.c_second + z * linear, c_delta,
            e.second * (z * k.A_mixed - k.A_second) + (z * z) * k.A_squared};
  }
};

// The form of a method that holds for every A: the method itself, or its AnyA.
template <class Method>
struct AnyAOf {
  using type = Method;
};
template <class Method>
  requires requires { typename Method::AnyA; }
struct AnyAOf<Method> {
  using type = typename Method::AnyA;
};
template <class Method>
using ForAnyA = typename AnyAOf<Method>::type;

// What `gradient` takes besides Δ: the method's coefficients, unless its gradient wants some of its own.
template <class Method, class V>
MAMBA_SSM_HD auto gradient_coefficients(V A) {
  if constexpr (requires { Method::prepare_gradient(A); }) {
    return Method::prepare_gradient(A);
  } else {
    return Method::prepare(A);
  }
}

// First-order hold as the paper defines it:  c = Δ² φ2(x) = A⁻²(e^x − 1 − x) = A⁻² e2.
// Its form for |A| >= 0.5 has ∂c/∂Δ = (e2 + x)/A and ∂c/∂A = A⁻³ (e2 (x − 2) + x²) = Δ³ Σ_j x^j (j + 1)/(j + 3)!, the
// sum where |x| < 0.4.
struct Foh : HoldSeries<0, 6, 0> {
  static constexpr const char* name = "foh";
  using AnyA = HoldSeries<0, 6, 0>;
  static constexpr float kSmallestA = 0.5f, kLargestX = 4.0f;
  template <class V>
  struct Coefficients {
    V rate;     // A log2 e
    V squared;  // 1/A²
  };
  template <class V>
  static MAMBA_SSM_HD Coefficients<V> prepare(V A) {
    const V inverse = constant<V>(1.0f) / A;
    return {A * kLog2e, inverse * inverse};
  }
  template <class V>
  static MAMBA_SSM_HD Transition<V> forward(V delta, const Coefficients<V>& k) {
    const ExponentialSecond<V> e = exponential2_and_second(delta * k.rate);
    return {e.value, e.second * k.squared};
  }
  template <class V>
  struct GradientCoefficients {
    V A, rate;
    V inverse, squared, cubed;  // powers of 1/A
  };
  template <class V>
  static MAMBA_SSM_HD GradientCoefficients<V> prepare_gradient(V A) {
    const V inverse = constant<V>(1.0f) / A;
    return {A, A * kLog2e, inverse, inverse * inverse, inverse * inverse * inverse};
  }
  template <class V>
  static MAMBA_SSM_HD TransitionGradient<V> gradient(V delta, const GradientCoefficients<V>& k) {
    const V x = delta * k.A;
    const ExponentialSecond<V> e = exponential2_and_second(delta * k.rate);
    V sum = constant<V>(1.48809524e-4f);
    sum = sum * x + 9.92063492e-4f;
    sum = sum * x + 5.55555556e-3f;
    sum = sum * x + 0.025f;
    sum = sum * x + 0.0833333333f;
    sum = sum * x + 0.166666667f;
    const V x2 = x * x;
    const V scaled = (x < 0.4f) & (x > -0.4f) ? (x2 * x) * sum : e.second * (x - 2.0f) + x2;
    return {e.value, e.value, e.second * k.squared, (e.second + x) * k.inverse, scaled * k.cubed};
  }
};
// Polynomial interpolation:  c = Δ φ1 + ½ Δ² φ2.
struct Poly : Hold<6, 3, 0> {
  static constexpr const char* name = "poly";
};
// Higher-order (quadratic) hold:  c = Δ φ1 + Δ² φ2 + ½ Δ³ φ3.
struct HighOrder : Hold<6, 6, 3> {
  static constexpr const char* name = "highorder";
};
// The zero-order hold of the textbooks:  c = Δ φ1 = A⁻¹(e^x − 1).
struct ZohExact : Hold<6, 0, 0> {
  static constexpr const char* name = "zoh_exact";
};

// Rows whose c is a polynomial and Ā = e^x:  c = Δ Σ_k x^k (m_k0 + m_k1 Δ + m_k2 Δ²), k <= 3, with Table::m.
//
// Under one A over time this is a cubic in Δ, whose coefficients are made of A.
template <class V>
struct Cubic {
  V m0, m1, m2, m3;
  MAMBA_SSM_HD V at(V x) const { return ((m3 * x + m2) * x + m1) * x + m0; }
};
struct PolynomialTable {
  float m[4][3];
  // The lowest power of Δ in c / Δ, 0 or 1.
  MAMBA_SSM_HD constexpr int lowest() const { return m[0][0] == 0.0f ? 1 : 0; }
  // What A^k is multiplied by in the coefficient of Δ^(power + 1).
  MAMBA_SSM_HD constexpr float of_A(int power, int k) const {
    return power < k || power - k > 2 ? 0.0f : m[k][power - k];
  }
};
template <class Table>
struct ExponentialWithPolynomialInput {
  static constexpr bool kInputIsDelta = false;
  static constexpr bool kSlopeIsABar = true;
  static constexpr int kLowest = Table::table.lowest();
  template <class V>
  struct Coefficients {
    V rate;  // A log2 e
    Cubic<V> m, slope;
  };
  // Σ_k m_k A^k without the terms that are not there.
  template <class V>
  static MAMBA_SSM_HD V sum(V A, float m0, float m1, float m2, float m3) {
    V value = constant<V>(m0);
    if (m1 != 0.0f) value += A * m1;
    if (m2 != 0.0f) value += (A * A) * m2;
    if (m3 != 0.0f) value += (A * A * A) * m3;
    return value;
  }
  // The coefficient of Δ^(Power + 1), and its derivative.
  template <int Power, class V>
  static MAMBA_SSM_HD V coefficient(V A) {
    constexpr PolynomialTable t = Table::table;
    constexpr float m0 = t.of_A(Power, 0), m1 = t.of_A(Power, 1), m2 = t.of_A(Power, 2), m3 = t.of_A(Power, 3);
    return sum(A, m0, m1, m2, m3);
  }
  template <int Power, class V>
  static MAMBA_SSM_HD V slope(V A) {
    constexpr PolynomialTable t = Table::table;
    constexpr float m1 = t.of_A(Power, 1), m2 = t.of_A(Power, 2), m3 = t.of_A(Power, 3);
    return sum(A, m1, 2.0f * m2, 3.0f * m3, 0.0f);
  }
  template <class V>
  static MAMBA_SSM_HD Coefficients<V> prepare(V A) {
    constexpr int p = kLowest;
    return {A * kLog2e,
            {coefficient<p>(A), coefficient<p + 1>(A), coefficient<p + 2>(A), coefficient<p + 3>(A)},
            {slope<p>(A), slope<p + 1>(A), slope<p + 2>(A), slope<p + 3>(A)}};
  }
  template <class V>
  static MAMBA_SSM_HD V power(V delta) {
    if constexpr (kLowest == 0) {
      return delta;
    } else {
      return delta * delta;
    }
  }
  template <class V>
  static MAMBA_SSM_HD Transition<V> forward(V delta, const Coefficients<V>& k) {
    return {exponential2(delta * k.rate), power(delta) * k.m.at(delta)};
  }
  template <class V>
  static MAMBA_SSM_HD TransitionGradient<V> gradient(V delta, const Coefficients<V>& k) {
    constexpr float p = kLowest + 1;
    const V a_bar = exponential2(delta * k.rate);
    const Cubic<V> derivative{k.m.m0 * p, k.m.m1 * (p + 1), k.m.m2 * (p + 2), k.m.m3 * (p + 3)};
    const V c_delta = kLowest == 0 ? derivative.at(delta) : delta * derivative.at(delta);
    return {a_bar, a_bar, power(delta) * k.m.at(delta), c_delta, power(delta) * k.slope.at(delta)};
  }
};

// Runge–Kutta 4 for the input:  c = Δ(1 + x/2 + x²/6 + x³/24).
struct Rk4Table {
  static constexpr PolynomialTable table{{{1.0f}, {1.0f / 2}, {1.0f / 6}, {1.0f / 24}}};
};
struct Rk4 : ExponentialWithPolynomialInput<Rk4Table> {
  static constexpr const char* name = "rk4";
};

// The truncated coefficients of the published code, kept to reproduce it. They follow the rows above only for small
// |x|. foh_taylor:  c = Δ²/2 + AΔ³/6 + A²Δ⁴/24 + A³Δ⁵/120.
struct FohTaylorTable {
  static constexpr PolynomialTable table{{{0.0f, 1.0f / 2}, {0.0f, 1.0f / 6}, {0.0f, 1.0f / 24}, {0.0f, 1.0f / 120}}};
};
struct FohTaylor : ExponentialWithPolynomialInput<FohTaylorTable> {
  static constexpr const char* name = "foh_taylor";
};

// poly_taylor:  c = Δ + (A/2 + 1/4)Δ² + (A²/6 + A/12)Δ³ + (A³/24 + A²/48)Δ⁴.
struct PolyTaylorTable {
  static constexpr PolynomialTable table{{{1.0f, 1.0f / 4}, {1.0f / 2, 1.0f / 12}, {1.0f / 6, 1.0f / 48}, {1.0f / 24}}};
};
struct PolyTaylor : ExponentialWithPolynomialInput<PolyTaylorTable> {
  static constexpr const char* name = "poly_taylor";
};

// highorder_taylor:  c = Δ + (A/2 + 1/2)Δ² + (A²/6 + A/6 + 1/12)Δ³ + (A³/24 + A²/24 + A/48)Δ⁴.
struct HighOrderTaylorTable {
  static constexpr PolynomialTable table{
      {{1.0f, 1.0f / 2, 1.0f / 12}, {1.0f / 2, 1.0f / 6, 1.0f / 48}, {1.0f / 6, 1.0f / 24}, {1.0f / 24}}};
};
struct HighOrderTaylor : ExponentialWithPolynomialInput<HighOrderTaylorTable> {
  static constexpr const char* name = "highorder_taylor";
};

}  // namespace mamba_ssm

// The table, in the order users see it.
#define MAMBA_SSM_DISCRETIZATIONS(X) \
  X(Zoh)                             \
  X(Foh)                             \
  X(Bilinear)                        \
  X(Poly)                            \
  X(HighOrder)                       \
  X(Rk4)                             \
  X(FohTaylor)                       \
  X(PolyTaylor)                      \
  X(HighOrderTaylor)                 \
  X(ZohExact)
