// The discretizations of the diagonal state space model  h' = A h + B u  under a step Δ:
//
//     h_t = Ā_t h_{t-1} + c(Δ_t, A) B_t u_t          x = Δ_t A
//
// One struct per method: its name, its equation, its value and its derivatives. The kernels are templates over these
// structs and run them on one float (CUDA) or on a vector of lanes (CPU): `V` below is either. Nothing here needs torch.
//
// With e_k(x) = e^x − Σ_{j<k} x^j / j!  (so that φ_k(x) = e_k / x^k) the held inputs of the paper are sums
// Σ_k w_k Δ^k φ_k(x) = Σ_k (w_k / A^k) e_k(x). They are evaluated without cancellation for every x ≤ 0: near 0 as a
// series, elsewhere in closed form.
//
// To add a method: write its struct, list it in MAMBA_SSM_DISCRETIZATIONS, and write its function in
// mamba_ssm/ops/discretization_ref.py. A test holds the two tables equal.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define MAMBA_SSM_HD __host__ __device__ __forceinline__
#else
#define MAMBA_SSM_HD inline __attribute__((always_inline))
#endif

namespace mamba_ssm {

// ---- what the structs are written in ---------------------------------------------------------------------------

template <class V>
using MaskOf = decltype(V{} < V{});
template <class V>
using IntOf = std::conditional_t<std::is_same_v<V, float>, std::int32_t, MaskOf<V>>;

template <class To, class From>
MAMBA_SSM_HD To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <class V>
MAMBA_SSM_HD V constant(float value) {
  return V{} + value;
}

// Stands for a coefficient that is zero at compile time; sums and products with it vanish.
struct Zero {};
MAMBA_SSM_HD Zero operator+(Zero, Zero) { return {}; }
template <class V>
MAMBA_SSM_HD V operator+(V a, Zero) {
  return a;
}
template <class V>
MAMBA_SSM_HD V operator+(Zero, V b) {
  return b;
}
template <class V>
MAMBA_SSM_HD Zero operator*(V, Zero) {
  return {};
}
MAMBA_SSM_HD Zero operator*(Zero, Zero) { return {}; }

// e^x = 2^k (1 + p(x − k ln 2)); relative error 2e-7. NaN stays NaN; x < −87 gives 1.6e-38 and x > 88.8 infinity.
template <class V>
MAMBA_SSM_HD V power_of_two(V k_plus_magic) {
  using I = IntOf<V>;
  return bits_as<V>((bits_as<I>(k_plus_magic) << 23) + (127 << 23));
}
constexpr float kMagic = 12582912.0f;  // 1.5·2^23: adding it rounds to the nearest integer, kept in the low bits
constexpr float kLog2e = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

template <class V>
MAMBA_SSM_HD V clamp_exponent(V x) {
  x = x < -87.0f ? constant<V>(-87.0f) : x;
  return x > 88.8f ? constant<V>(88.8f) : x;
}

template <class V>
MAMBA_SSM_HD V exponential(V x) {
#if defined(__CUDA_ARCH__)
  return exp2f(x * kLog2e);
#else
  x = clamp_exponent(x);
  const V k_magic = x * kLog2e + kMagic;
  const V r = x - (k_magic - kMagic) * kLn2;
  V q = constant<V>(0.00138141909f);
  q = q * r + 0.00836891382f;
  q = q * r + 0.0416684072f;
  q = q * r + 0.166665190f;
  q = q * r + 0.499999933f;
  const V p = (r * r) * q + r;
  const V scale = power_of_two(k_magic);
  return scale * p + scale;
#endif
}

// e^x together with its remainder after the cubic term: e^r = 1 + r + r²/2 + r³/6 + r⁴ v.
// Where `near` holds (x in [−0.62, 0.07]) r is x itself.
template <class V>
struct Exponential {
  V value;
  V r;
  V v;
  MaskOf<V> near;
};

template <class V>
MAMBA_SSM_HD Exponential<V> exponential_with_remainder(V x) {
  Exponential<V> e;
#if defined(__CUDA_ARCH__)
  e.value = exp2f(x * kLog2e);
  e.r = x;
  e.near = x > -0.62f && x < 0.07f;
#else
  const V clamped = clamp_exponent(x);
  // The bias of 0.4 moves the interval of k = 0 to where x lies, below zero.
  const V k_magic = (clamped * kLog2e + 0.4f) + kMagic;
  e.r = clamped - (k_magic - kMagic) * kLn2;
  e.near = k_magic == kMagic;
#endif
  V v = constant<V>(0.00017308813f);
  v = v * e.r + 0.00138127306f;
  v = v * e.r + 0.00833292029f;
  e.v = v * e.r + 0.0416667012f;
#if !defined(__CUDA_ARCH__)
  const V s = e.r * e.v + 0.166666667f;
  const V p = (e.r * e.r) * (e.r * s + 0.5f) + e.r;
  const V scale = power_of_two(k_magic);
  e.value = scale * p + scale;
#endif
  return e;
}

// Σ_k d_k e_k(x) for k = 1 … 4.
template <class V, class D1, class D2, class D3, class D4>
MAMBA_SSM_HD V remainder_sum(const Exponential<V>& e, V x, D1 d1, D2 d2, D3 d3, D4 d4) {
  const auto from2 = d2 + (d3 + d4);
  const auto from3 = d3 + d4;
  const auto all = d1 + from2;
  const V near = e.r * (d1 + e.r * (constant<V>(0.5f) * (d1 + d2) +
                                    e.r * (constant<V>(0.166666667f) * (d1 + d2 + d3) + (e.r * e.v) * all)));
  const V tail = all + x * (from2 + x * (constant<V>(0.5f) * from3 + x * (constant<V>(0.166666667f) * d4)));
  const V far = e.value * all - tail;
  return e.near ? near : far;
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
// that c = Δ, so that a kernel need not keep c and its derivatives 1 and 0.

// Zero-order hold with Mamba's simplified input rule:  Ā = e^x,  c = Δ.
struct Zoh {
  static constexpr const char* name = "zoh";
  static constexpr bool kInputIsDelta = true;
  template <class V>
  static MAMBA_SSM_HD V prepare(V A) {
    return A;
  }
  template <class V>
  static MAMBA_SSM_HD Transition<V> forward(V delta, V A) {
    return {exponential(delta * A), delta};
  }
  template <class V>
  static MAMBA_SSM_HD TransitionGradient<V> gradient(V delta, V A) {
    const V a_bar = exponential(delta * A);
    return {a_bar, a_bar, delta, constant<V>(1.0f), V{}};
  }
};

// Bilinear (Tustin):  Ā = (1 + x/2)/(1 − x/2),  c = Δ/(1 − x/2).  With w = 1/(1 − x/2): dĀ/dx = ∂c/∂Δ = w².
// At the pole x = 2 (A > 0) the result is infinite, as the rule is.
struct Bilinear {
  static constexpr const char* name = "bilinear";
  static constexpr bool kInputIsDelta = false;
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

// Σ_k w_k Δ^k φ_k(x) with weights in sixths (so that they are integers at compile time). Derivatives by
// ∂(Δ^k φ_k)/∂Δ = Δ^{k-1} φ_{k-1} and φ_k' = φ_k − k φ_{k+1}.
template <int W1, int W2, int W3>
struct Hold {
  static constexpr bool kInputIsDelta = false;
  template <int W, class V>
  static MAMBA_SSM_HD auto weighted(V value) {
    if constexpr (W == 0) {
      return Zero{};
    } else if constexpr (W == 6) {
      return value;
    } else {
      return value * (static_cast<float>(W) / 6.0f);
    }
  }
  template <class V>
  struct Coefficients {
    V A;
    V inverse;  // 1/A
  };
  // |A| < 1e-9 is taken as 1e-9: x is then so small that only the series' first terms count, and no power overflows.
  template <class V>
  static MAMBA_SSM_HD Coefficients<V> prepare(V A) {
    A = (A >= 0.0f) & (A < 1e-9f) ? constant<V>(1e-9f) : A;
    A = (A < 0.0f) & (A > -1e-9f) ? constant<V>(-1e-9f) : A;
    return {A, constant<V>(1.0f) / A};
  }
  template <class V>
  static MAMBA_SSM_HD V input_gain(const Exponential<V>& e, V x, V inverse) {
    const V inverse2 = inverse * inverse;
    return remainder_sum(e, x, weighted<W1>(inverse), weighted<W2>(inverse2), weighted<W3>(inverse2 * inverse), Zero{});
  }
  template <class V>
  static MAMBA_SSM_HD Transition<V> forward(V delta, const Coefficients<V>& k) {
    const V x = delta * k.A;
    const Exponential<V> e = exponential_with_remainder(x);
    return {e.value, input_gain(e, x, k.inverse)};
  }
  template <class V>
  static MAMBA_SSM_HD TransitionGradient<V> gradient(V delta, const Coefficients<V>& k) {
    const V x = delta * k.A;
    const Exponential<V> e = exponential_with_remainder(x);
    const V i1 = k.inverse, i2 = i1 * i1, i3 = i2 * i1, i4 = i2 * i2;
    V c_delta = weighted<W1>(e.value) + V{};
    if constexpr (W2 != 0 || W3 != 0) {
      c_delta = weighted<W1>(e.value) + remainder_sum(e, x, weighted<W2>(i1), weighted<W3>(i2), Zero{}, Zero{});
    }
    const V c_A = remainder_sum(e, x, delta * weighted<W1>(i1), delta * weighted<W2>(i2) + weighted<-W1>(i2),
                                delta * weighted<W3>(i3) + weighted<-2 * W2>(i3), weighted<-3 * W3>(i4));
    return {e.value, e.value, input_gain(e, x, i1), c_delta, c_A};
  }
};

// First-order hold as the paper defines it:  c = Δ² φ2(x) = A⁻²(e^x − 1 − x).
struct Foh : Hold<0, 6, 0> {
  static constexpr const char* name = "foh";
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

// Rows whose c is a polynomial in Δ and x; Ā = e^x. `Series` gives c, ∂c/∂Δ and ∂c/∂A.
template <class Series>
struct ExponentialWithPolynomialInput {
  static constexpr bool kInputIsDelta = false;
  template <class V>
  static MAMBA_SSM_HD V prepare(V A) {
    return A;
  }
  template <class V>
  static MAMBA_SSM_HD Transition<V> forward(V delta, V A) {
    const V x = delta * A;
    return {exponential(x), Series::c(delta, x)};
  }
  template <class V>
  static MAMBA_SSM_HD TransitionGradient<V> gradient(V delta, V A) {
    const V x = delta * A;
    const V a_bar = exponential(x);
    return {a_bar, a_bar, Series::c(delta, x), Series::c_delta(delta, x), Series::c_A(delta, x)};
  }
};

// Runge–Kutta 4 for the input:  c = Δ(1 + x/2 + x²/6 + x³/24).
struct Rk4 : ExponentialWithPolynomialInput<Rk4> {
  static constexpr const char* name = "rk4";
  template <class V>
  static MAMBA_SSM_HD V c(V delta, V x) {
    return delta * (x * (x * (x * (1.0f / 24) + 1.0f / 6) + 0.5f) + 1.0f);
  }
  template <class V>
  static MAMBA_SSM_HD V c_delta(V, V x) {
    return x * (x * (x * (1.0f / 6) + 0.5f) + 1.0f) + 1.0f;
  }
  template <class V>
  static MAMBA_SSM_HD V c_A(V delta, V x) {
    return (delta * delta) * (x * (x * 0.125f + 1.0f / 3) + 0.5f);
  }
};

// The truncated coefficients of the published code, kept to reproduce it. They follow the rows above only for small |x|.
// foh_taylor:  c = Δ²/2 + AΔ³/6 + A²Δ⁴/24 + A³Δ⁵/120.
struct FohTaylor : ExponentialWithPolynomialInput<FohTaylor> {
  static constexpr const char* name = "foh_taylor";
  template <class V>
  static MAMBA_SSM_HD V c(V delta, V x) {
    return (delta * delta) * (x * (x * (x * (1.0f / 120) + 1.0f / 24) + 1.0f / 6) + 0.5f);
  }
  template <class V>
  static MAMBA_SSM_HD V c_delta(V delta, V x) {
    return delta * (x * (x * (x * (1.0f / 24) + 1.0f / 6) + 0.5f) + 1.0f);
  }
  template <class V>
  static MAMBA_SSM_HD V c_A(V delta, V x) {
    return (delta * delta * delta) * (x * (x * (1.0f / 40) + 1.0f / 12) + 1.0f / 6);
  }
};

// poly_taylor:  c = Δ + (A/2 + 1/4)Δ² + (A²/6 + A/12)Δ³ + (A³/24 + A²/48)Δ⁴.
struct PolyTaylor : ExponentialWithPolynomialInput<PolyTaylor> {
  static constexpr const char* name = "poly_taylor";
  template <class V>
  static MAMBA_SSM_HD V c(V delta, V x) {
    const V first = x * (x * (x * (1.0f / 24) + 1.0f / 6) + 0.5f) + 1.0f;
    const V second = x * (x * (1.0f / 48) + 1.0f / 12) + 0.25f;
    return delta * (delta * second + first);
  }
  template <class V>
  static MAMBA_SSM_HD V c_delta(V delta, V x) {
    const V first = x * (x * (x * (1.0f / 6) + 0.5f) + 1.0f) + 1.0f;
    const V second = x * (x * (1.0f / 12) + 0.25f) + 0.5f;
    return delta * second + first;
  }
  template <class V>
  static MAMBA_SSM_HD V c_A(V delta, V x) {
    const V first = x * (x * 0.125f + 1.0f / 3) + 0.5f;
    const V second = x * (1.0f / 24) + 1.0f / 12;
    return (delta * delta) * (delta * second + first);
  }
};

// highorder_taylor:  c = Δ + (A/2 + 1/2)Δ² + (A²/6 + A/6 + 1/12)Δ³ + (A³/24 + A²/24 + A/48)Δ⁴.
struct HighOrderTaylor : ExponentialWithPolynomialInput<HighOrderTaylor> {
  static constexpr const char* name = "highorder_taylor";
  template <class V>
  static MAMBA_SSM_HD V c(V delta, V x) {
    const V first = x * (x * (x * (1.0f / 24) + 1.0f / 6) + 0.5f) + 1.0f;
    const V second = x * (x * (1.0f / 24) + 1.0f / 6) + 0.5f;
    const V third = x * (1.0f / 48) + 1.0f / 12;
    return delta * (delta * (delta * third + second) + first);
  }
  template <class V>
  static MAMBA_SSM_HD V c_delta(V delta, V x) {
    const V first = x * (x * (x * (1.0f / 6) + 0.5f) + 1.0f) + 1.0f;
    const V second = x * (x * (1.0f / 6) + 0.5f) + 1.0f;
    const V third = x * (1.0f / 12) + 0.25f;
    return delta * (delta * third + second) + first;
  }
  template <class V>
  static MAMBA_SSM_HD V c_A(V delta, V x) {
    const V first = x * (x * 0.125f + 1.0f / 3) + 0.5f;
    const V second = x * (1.0f / 12) + 1.0f / 6;
    return (delta * delta) * (delta * (delta * (1.0f / 48) + second) + first);
  }
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
