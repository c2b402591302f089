// The forms in which the fast CUDA kernels evaluate the methods of discretization.h. A thread there has one Δ for eight
// states, and registers for few coefficients of each.
//
// A form has
//     prepare(A)                         what `advance` needs of A
//     advance(h, Δ, input, B, k)         h after a step; `input` is Δu if kInputIsDelta, else u
//     a_bar(Δ, k)                        Ā
//     gradient(Δ, A)                     a TransitionGradient<float>; or, if kFactored, gradient(Δ, k), a Factors
// and, if it does not serve all A and Δ, kSmallestA and kSmallestX, and kLargestX for the gradient: the |A| and |x| for
// which it does; with kNegativeA, it serves A <= 0 and Δ >= 0 only, and kLargestX is for `advance` too. Of the form for
// what is left no a_bar is wanted.
#pragma once

#include <type_traits>
#include <utility>

#include "scan_math.cuh"

namespace mamba_ssm {
namespace form {

// c = Δ p(Δ, x): p, ∂p/∂x, and Δ ∂p/∂Δ where it is not 0. In these terms dc/dA = Δ² p_x and dc/dΔ = p + x p_x + rest.
struct Factors {
  float a_bar, slope, p, p_x, rest;
};

template <class Method>
struct Plain {
  static constexpr bool kInputIsDelta = Method::kInputIsDelta, kSlopeIsABar = Method::kSlopeIsABar, kFactored = false;
  static constexpr float kSmallestA = [] {
    if constexpr (requires { Method::kSmallestA; }) return Method::kSmallestA;
    return 0.0f;
  }();
  static constexpr float kSmallestX = 0.0f;
  static constexpr float kLargestX = [] {
    if constexpr (requires { Method::kLargestX; }) return Method::kLargestX;
    return 0.0f;
  }();
  using Coefficients = decltype(Method::prepare(Real(0.0f)));
  static MAMBA_SSM_DEVICE Coefficients prepare(float A) { return Method::prepare(Real(A)); }
  static MAMBA_SSM_DEVICE float a_bar(float delta, const Coefficients& k) {
    return Method::forward(Real(delta), k).a_bar.value;
  }
  static MAMBA_SSM_DEVICE float advance(float h, float delta, float input, float B, const Coefficients& k) {
    const Transition<Real> t = Method::forward(Real(delta), k);
    const float weight = kInputIsDelta ? input : t.c.value * input;
    return t.a_bar.value * h + weight * B;
  }
  static MAMBA_SSM_DEVICE TransitionGradient<float> gradient(float delta, float A) {
    const TransitionGradient<Real> t = Method::gradient(Real(delta), gradient_coefficients<Method>(Real(A)));
    return {t.a_bar.value, t.slope.value, t.c.value, t.c_delta.value, t.c_A.value};
  }
};

// The holds for results of half precision, from e^x − 1 as the difference leaves it: the exponential's error, 2⁻²² at
// most, becomes 2⁻²²/|x| of c, which kSmallestX bounds. With w_k in sixths and a = w1/A + w2/A² + w3/A³,
// c = a (e^x − 1) − Δ/A (w2 + w3/A + w3 Δ/2), so that h' = e^x (h + a B u) − (a + Δ/A (…)) B u.
template <int W1, int W2, int W3>
struct RoundedHold {
  static constexpr bool kInputIsDelta = false, kSlopeIsABar = true, kFactored = false;
  static constexpr float kSmallestA = 0.5f, kSmallestX = 1.0f / 2048;
  static constexpr float w1 = W1 / 6.0f, w2 = W2 / 6.0f, w3 = W3 / 6.0f;
  struct Coefficients {
    float rate, a, inverse;
  };
  static MAMBA_SSM_DEVICE Coefficients prepare(float A) {
    const float i = fast_reciprocal(A), higher = W3 != 0 ? i * w3 + w2 : w2;
    return {A * kLog2e, (i * higher + w1) * i, i};
  }
  static MAMBA_SSM_DEVICE float a_bar(float delta, const Coefficients& k) { return fast_exp2(delta * k.rate); }
  static MAMBA_SSM_DEVICE float advance(float h, float delta, float input, float B, const Coefficients& k) {
    const float v = input * B, e = a_bar(delta, k);
    if constexpr (W2 == 0 && W3 == 0) {
      const float av = k.a * v;
      return e * (h + av) - av;
    } else if constexpr (W3 == 0) {
      return e * (k.a * v + h) - ((delta * w2) * k.inverse + k.a) * v;
    } else {
      const float higher = k.inverse * w3 + (delta * (0.5f * w3) + w2);
      return e * (k.a * v + h) - ((delta * k.inverse) * higher + k.a) * v;
    }
  }
};
// The same where no more coefficients than A and 1/A fit into registers: p_k = Δ^k φ_k(x) one from the other, as
// HoldSeries has them far from 0. ∂c/∂A loses 2⁻²¹/x²; where x is small it is little beside what A does through e^x.
template <int W1, int W2, int W3>
struct RoundedHoldGradient {
  static constexpr bool kInputIsDelta = false, kSlopeIsABar = true, kFactored = false;
  using Forward = RoundedHold<W1, W2, W3>;
  static constexpr float kSmallestA = Forward::kSmallestA, kSmallestX = Forward::kSmallestX, kLargestX = 3e38f;
  static constexpr float w1 = Forward::w1, w2 = Forward::w2, w3 = Forward::w3;
  struct Coefficients {
    float A, inverse;
  };
  struct Inputs {
    float p1, p2, p3, c;
  };
  static MAMBA_SSM_DEVICE Coefficients prepare(float A) { return {A, fast_reciprocal(A)}; }
  static MAMBA_SSM_DEVICE float a_bar(float delta, const Coefficients& k) { return fast_exp2((delta * kLog2e) * k.A); }
  static MAMBA_SSM_DEVICE Inputs inputs(float delta, float e, float i) {
    Inputs p{e * i - i, 0.0f, 0.0f, 0.0f};
    if constexpr (W3 != 0) {
      const float step = delta * i;
      p.p2 = p.p1 * i - step;
      p.p3 = p.p2 * i - step * (0.5f * delta);
      p.c = p.p3 * w3 + (p.p2 * w2 + p.p1 * w1);
    } else if constexpr (W2 != 0) {
      const float part = i * w2;
      p.c = p.p1 * (part + w1) - delta * part;  // p1 w1 + p2 w2
    } else {
      p.c = p.p1 * w1;
    }
    return p;
  }
  static MAMBA_SSM_DEVICE float advance(float h, float delta, float input, float B, const Coefficients& k) {
    const float e = a_bar(delta, k);
    return e * h + inputs(delta, e, k.inverse).c * (input * B);
  }
  static MAMBA_SSM_DEVICE TransitionGradient<float> gradient(float delta, float A) {
    const Coefficients k = prepare(A);
    const float e = a_bar(delta, k);
    const Inputs p = inputs(delta, e, k.inverse);
    float c_delta = e * w1, degrees = p.c;  // Σ w_k p_(k-1), Σ k w_k p_k
    if constexpr (W3 != 0) {
      c_delta += p.p1 * w2;
      c_delta += p.p2 * w3;
      degrees = fmaf(3.0f, p.c, fmaf(-2.0f * w1, p.p1, -w2 * p.p2));
    } else if constexpr (W2 != 0) {
      c_delta += p.p1 * w2;
      degrees = fmaf(2.0f, p.c, -w1 * p.p1);
    }
    return {e, e, p.c, c_delta, (delta * c_delta - degrees) * k.inverse};
  }
};

// The first-order hold for results of half precision, for all A and Δ: near 0 by four terms of φ2 and of
// ∂c/∂A = Δ³ Σ_j x^j (j + 1)/(j + 3)!, elsewhere by (e^x − 1 − x) / A². `z` is x log2 e.
struct RoundedFoh {
  static constexpr bool kInputIsDelta = false, kSlopeIsABar = true, kFactored = false;
  struct Coefficients {
    float rate, squared;  // A log2 e, 1/A²
  };
  static MAMBA_SSM_DEVICE Coefficients prepare(float A) {
    const float i = fast_reciprocal(A);
    return {A * kLog2e, i * i};
  }
  static MAMBA_SSM_DEVICE float phi2(float z) {
    float q = z * (kLn2 * kLn2 * kLn2 / 120) + kLn2 * kLn2 / 24;
    q = q * z + kLn2 / 6;
    return q * z + 0.5f;
  }
  static MAMBA_SSM_DEVICE float slope(float z) {  // ∂c/∂A / Δ³
    float q = z * (kLn2 * kLn2 * kLn2 / 180) + kLn2 * kLn2 / 40;
    q = q * z + kLn2 / 12;
    return q * z + 1.0f / 6;
  }
  static MAMBA_SSM_DEVICE bool is_near(float z) { return fabsf(z) < 0.35f; }
  static MAMBA_SSM_DEVICE float second(float z, float e) { return (e - 1.0f) - z * kLn2; }

  static MAMBA_SSM_DEVICE float advance(float h, float delta, float input, float B, const Coefficients& k) {
    const float z = delta * k.rate, e = fast_exp2(z);
    const float near = (delta * delta * input) * phi2(z), far = (k.squared * input) * second(z, e);
    return e * h + (is_near(z) ? near : far) * B;
  }
  static MAMBA_SSM_DEVICE TransitionGradient<float> gradient(float delta, float A) {
    const float i = fast_reciprocal(A), z = (delta * kLog2e) * A, e = fast_exp2(z), delta2 = delta * delta;
    const bool near = is_near(z);
    const float p2 = near ? delta2 * phi2(z) : second(z, e) * (i * i);
    const float p1 = near ? p2 * A + delta : (e - 1.0f) * i;
    return {e, e, p2, p1, near ? (delta2 * delta) * slope(z) : fmaf(-2.0f, p2, delta * p1) * i};
  }
};
// The same where −3 <= x <= 0: one polynomial for φ2, good to 9e-6, and one for ∂c/∂A, good to 2.5e-5.
struct RoundedFohInRange {
  static constexpr bool kInputIsDelta = false, kSlopeIsABar = true, kFactored = false, kNegativeA = true;
  static constexpr float kSmallestA = 0.0f, kSmallestX = 0.0f, kLargestX = 3.0f;
  static constexpr bool kKeepsA = true;
  using Coefficients = float;
  static MAMBA_SSM_DEVICE float prepare(float A) { return A; }
  static MAMBA_SSM_DEVICE float exponent(float delta, float A) { return (delta * kLog2e) * A; }
  static MAMBA_SSM_DEVICE float a_bar(float delta, float A) { return fast_exp2(exponent(delta, A)); }
  static MAMBA_SSM_DEVICE float phi2(float z) {
    float q = 1.08013248e-5f;
    q = q * z + 2.36272341e-4f;
    q = q * z + 2.59941566e-3f;
    q = q * z + 0.0198432856f;
    q = q * z + 0.115457565f;
    return q * z + 0.499995653f;
  }
  static MAMBA_SSM_DEVICE float slope(float z) {
    float q = 7.58431965e-6f;
    q = q * z + 1.62863543e-4f;
    q = q * z + 1.70897364e-3f;
    q = q * z + 0.0118652895f;
    q = q * z + 0.0577036631f;
    return q * z + 0.166662552f;
  }

  static MAMBA_SSM_DEVICE float advance(float h, float delta, float input, float B, float A) {
    const float z = exponent(delta, A);
    return fast_exp2(z) * h + (phi2(z) * (delta * delta * input)) * B;
  }
  static MAMBA_SSM_DEVICE TransitionGradient<float> gradient(float delta, float A) {
    const float z = exponent(delta, A), e = fast_exp2(z), delta2 = delta * delta, p2 = delta2 * phi2(z);
    return {e, e, p2, p2 * A + delta, (delta2 * delta) * slope(z)};
  }
};

// Factored: c = Δ p(Δ, x), so that Δ comes out of the sums over the states. kPerA: what A is, of the coefficient.
// kMakesAnew: what the way back makes of the later Δ of two is made anew for every four states, as kept it is spilled.
//
// c = Δ w, Ā = w (1 + x/2) with w = 1 / (1 − x/2).
struct FactoredBilinear {
  static constexpr bool kInputIsDelta = true, kSlopeIsABar = false, kFactored = true, kHasRest = false;
  static constexpr bool kMakesAnew = false;
  static constexpr float kPerA = 2.0f;
  using Coefficients = float;
  static MAMBA_SSM_DEVICE float prepare(float A) { return 0.5f * A; }
  static MAMBA_SSM_DEVICE float a_bar(float delta, float half_A) { return gradient(delta, half_A).a_bar; }
  static MAMBA_SSM_DEVICE float advance(float h, float delta, float input, float B, float half_A) {
    const float half = delta * half_A;
    return fast_reciprocal(1.0f - half) * (input * B + (half * h + h));
  }
  static MAMBA_SSM_DEVICE Factors gradient(float delta, float half_A) {
    const float half = delta * half_A, w = fast_reciprocal(1.0f - half), w2 = w * w;
    return {w * half + w, w2, w, 0.5f * w2, 0.0f};
  }
};

// A polynomial c as a cubic in z = x log2 e, whose coefficients are made of Δ.
template <class Table>
struct FactoredPolynomial {
  static constexpr PolynomialTable m = Table::table;
  static constexpr bool kInputIsDelta = true, kSlopeIsABar = true, kFactored = true;
  static constexpr int kLowest = m.lowest();
  static constexpr bool kHasRest = kLowest == 1 || m.m[0][1] != 0.0f;
  static constexpr float kPerA = kLn2;
  static constexpr bool kMakesAnew = kLowest == 0 && m.m[0][1] != 0.0f && m.m[0][2] == 0.0f;
  static_assert([] {  // what `advance` and `gradient` leave out
    if (kLowest == 0) return m.m[3][1] == 0.0f && m.m[3][2] == 0.0f;
    bool only = true;
    for (const auto& row : m.m) only &= row[0] == 0.0f && row[2] == 0.0f;
    return only;
  }());
  using Coefficients = float;
  static MAMBA_SSM_DEVICE float prepare(float A) { return A * kLog2e; }
  static MAMBA_SSM_DEVICE float a_bar(float delta, float rate) { return fast_exp2(delta * rate); }
  static MAMBA_SSM_DEVICE float advance(float h, float delta, float input, float B, float rate) {
    const float z = delta * rate;
    if constexpr (kLowest == 1) {  // every coefficient is Δ times a number
      constexpr Cubic<float> k{m.m[0][1], m.m[1][1] * kUnit[1], m.m[2][1] * kUnit[2], m.m[3][1] * kUnit[3]};
      return fast_exp2(z) * h + (k.at(z) * (delta * input)) * B;
    } else {
      return fast_exp2(z) * h + (of_delta(delta).at(z) * input) * B;
    }
  }
  static MAMBA_SSM_DEVICE Factors gradient(float delta, float rate) {
    const float z = delta * rate, e = fast_exp2(z);
    const Cubic<float> k = of_delta(delta);
    const float p = k.at(z), p_x = ((3.0f * kLog2e * k.m3) * z + 2.0f * kLog2e * k.m2) * z + kLog2e * k.m1;
    if constexpr (!kHasRest) return {e, e, p, p_x, 0.0f};
    if constexpr (kLowest == 1) return {e, e, p, p_x, p};
    return {e, e, p, p_x, (slope<2>(delta) * z + slope<1>(delta)) * z + slope<0>(delta)};
  }

 private:
  static constexpr float kUnit[4] = {1.0f, kLn2, kLn2 * kLn2, kLn2 * kLn2 * kLn2};  // x^K of z^K
  // The coefficient of z^K, and Δ times its derivative.
  template <int K>
  static MAMBA_SSM_DEVICE float coefficient(float delta) {
    constexpr float m0 = m.m[K][0] * kUnit[K], m1 = m.m[K][1] * kUnit[K], m2 = m.m[K][2] * kUnit[K];
    if constexpr (m2 != 0.0f) return (delta * m2 + m1) * delta + m0;
    if constexpr (m1 != 0.0f) return delta * m1 + m0;
    return m0;
  }
  template <int K>
  static MAMBA_SSM_DEVICE float slope(float delta) {
    constexpr float m1 = m.m[K][1] * kUnit[K], m2 = m.m[K][2] * kUnit[K];
    if constexpr (m2 != 0.0f) return (delta * (2.0f * m2) + m1) * delta;
    return delta * m1;
  }
  static MAMBA_SSM_DEVICE Cubic<float> of_delta(float delta) {
    return {coefficient<0>(delta), coefficient<1>(delta), coefficient<2>(delta), coefficient<3>(delta)};
  }
};

template <int W1, int W2, int W3>
RoundedHold<W1, W2, W3> rounded(const Hold<W1, W2, W3>&);
template <int W1, int W2, int W3>
RoundedHoldGradient<W1, W2, W3> rounded_gradient(const Hold<W1, W2, W3>&);
template <class Table>
FactoredPolynomial<Table> factored(const ExponentialWithPolynomialInput<Table>&);
FactoredBilinear factored(const Bilinear&);

template <class Method, Dtype T>
concept HasRounded = T != Dtype::f32 && requires(Method method) { rounded(method); };
template <class Method>
concept HasFactored = requires(Method method) { factored(method); };

// `Quick` is what a chunk is scanned with if all its A and Δ allow it, `General` what it is scanned with otherwise.
template <class Method, Dtype T>
struct Forward {
  using Quick = Plain<Method>;
  using General = Plain<ForAnyA<Method>>;
};
template <class Method, Dtype T>
  requires HasRounded<Method, T>
struct Forward<Method, T> {
  using Quick = decltype(rounded(std::declval<Method>()));
  using General = Plain<ForAnyA<Method>>;
};
template <Dtype T>
  requires(T != Dtype::f32)
struct Forward<Foh, T> {
  using Quick = RoundedFohInRange;
  using General = RoundedFoh;
};
template <class Method, Dtype T>
  requires HasFactored<Method>
struct Forward<Method, T> {
  using Quick = decltype(factored(std::declval<Method>()));
  using General = Quick;
};
template <class Method, Dtype T>
struct Backward : Forward<Method, T> {};
template <class Method, Dtype T>
  requires HasRounded<Method, T>
struct Backward<Method, T> {
  using Quick = decltype(rounded_gradient(std::declval<Method>()));
  using General = Plain<ForAnyA<Method>>;
};

}  // namespace form
}  // namespace mamba_ssm
