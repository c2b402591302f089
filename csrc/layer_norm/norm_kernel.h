// The add + norm kernels, compiled once per instruction set by norm_cpu_<isa>.cpp.
#pragma once

#include "norm.h"
#include "simd.h"

namespace mamba_ssm {
namespace MAMBA_SSM_ISA {

using i64 = std::int64_t;

// Element types, known to the compiler for the usual pairs, at run time for the others.
template <Dtype X, Dtype Stream>
struct FixedTypes {
  static constexpr Dtype x = X, stream = Stream;
};
struct AnyTypes {
  Dtype x, stream;
};

// The sum of all lanes, by halves.
template <int N>
MAMBA_SSM_INLINE float total_of(const float (&v)[N]) {
  float half[N / 2];
  for (int i = 0; i < N / 2; ++i) half[i] = v[i] + v[i + N / 2];
  if constexpr (N == 2) {
    return half[0];
  } else {
    return total_of(half);
  }
}
MAMBA_SSM_INLINE float total(vfloat v) {
  float lanes[kLanes];
  store(lanes, v);
  return total_of(lanes);
}

MAMBA_SSM_INLINE vfloat load_row(const NormRows& a, i64 row, i64 d, Dtype dtype, int count) {
  return load_elements(a.data, row * a.stride + d, dtype, count);
}
MAMBA_SSM_INLINE void store_row(const NormRows& a, i64 row, i64 d, Dtype dtype, int count, vfloat v) {
  store_elements(a.data, row * a.stride + d, dtype, count, v);
}
MAMBA_SSM_INLINE vfloat load_floats(const float* p, int count) { return load_elements(p, 0, Dtype::f32, count); }
MAMBA_SSM_INLINE void store_floats(float* p, int count, vfloat v) { store_elements(p, 0, Dtype::f32, count, v); }

// body(d, count) for every vector of a row; the last one may be partly filled.
template <class Body>
MAMBA_SSM_INLINE void for_each_vector(i64 dim, const Body& body) {
  i64 d = 0;
  for (; d + kLanes <= dim; d += kLanes) body(d, kLanes);
  if (d < dim) body(d, static_cast<int>(dim - d));
}

template <class Types>
MAMBA_SSM_INLINE void forward_row(const Types& types, const NormProblem& p, i64 row, float* h) {
  const float scale = p.scale == nullptr ? 1.0f : p.scale[row / p.rows_per_scale];
  vfloat sum{}, square_sum{};
  for_each_vector(p.dim, [&](i64 d, int count) __attribute__((always_inline)) {
    vfloat v = load_row(p.x, row, d, types.x, count);
    if (p.scale != nullptr) v *= scale;
    if (p.residual.data != nullptr) v += load_row(p.residual, row, d, types.stream, count);
    if (p.h.data != nullptr) store_row(p.h, row, d, types.stream, count, v);
    store_floats(h + d, count, v);
    if (p.is_rms_norm) {
      square_sum += v * v;
    } else {
      sum += v;
    }
  });
  float mean = 0.0f;
  if (!p.is_rms_norm) {
    mean = total(sum) / static_cast<float>(p.dim);
    p.mean[row] = mean;
    i64 d = 0;
    for (; d + kLanes <= p.dim; d += kLanes) {
      const vfloat centred = load(h + d) - mean;
      square_sum += centred * centred;
    }
    for (; d < p.dim; ++d) square_sum[0] += (h[d] - mean) * (h[d] - mean);
  }
  const float rstd = 1.0f / __builtin_sqrtf(total(square_sum) / static_cast<float>(p.dim) + p.eps);
  p.rstd[row] = rstd;
  for_each_vector(p.dim, [&](i64 d, int count) __attribute__((always_inline)) {
    vfloat y = (load_floats(h + d, count) - mean) * rstd * load_floats(p.weight + d, count);
    if (p.bias != nullptr) y += load_floats(p.bias + d, count);
    store_row(p.y, row, d, types.x, count, y);
  });
}

// With n = (h - mean) rstd and w = weight dy:   dh += rstd (w - mean(w n) n - mean(w)),  without mean(w) for RMSNorm.
template <class Types>
MAMBA_SSM_INLINE void backward_row(const Types& types, const NormProblem& p, i64 row, float* dweight, float* dbias) {
  const float mean = p.is_rms_norm ? 0.0f : p.mean[row];
  const float rstd = p.rstd[row];
  const float scale = p.scale == nullptr ? 1.0f : p.scale[row / p.rows_per_scale];
  const float inverse_dim = 1.0f / static_cast<float>(p.dim);
  vfloat w_sum{}, wn_sum{};
  for_each_vector(p.dim, [&](i64 d, int count) __attribute__((always_inline)) {
    const vfloat dy = load_row(p.dy, row, d, types.x, count);
    const vfloat n = (load_row(p.h, row, d, types.stream, count) - mean) * rstd;
    const vfloat w = dy * load_floats(p.weight + d, count);
    w_sum += w;
    wn_sum += w * n;
    store_floats(dweight + d, count, load_floats(dweight + d, count) + dy * n);
    if (p.sum_dbias) store_floats(dbias + d, count, load_floats(dbias + d, count) + dy);
  });
  const float wn_mean = total(wn_sum) * inverse_dim;
  const float w_mean = p.is_rms_norm ? 0.0f : total(w_sum) * inverse_dim;
  for_each_vector(p.dim, [&](i64 d, int count) __attribute__((always_inline)) {
    const vfloat w = load_row(p.dy, row, d, types.x, count) * load_floats(p.weight + d, count);
    const vfloat n = (load_row(p.h, row, d, types.stream, count) - mean) * rstd;
    vfloat dh = (w - n * wn_mean - w_mean) * rstd;
    if (p.dh.data != nullptr) dh += load_row(p.dh, row, d, types.stream, count);
    if (p.dresidual.data != nullptr) store_row(p.dresidual, row, d, types.stream, count, dh);
    store_row(p.dx, row, d, types.x, count, p.scale == nullptr ? dh : dh * scale);
  });
}

template <class Types>
void forward_blocks(const Types& types, const NormProblem& p, i64 begin, i64 end, float* scratch) {
  const i64 last = end * kNormBlock < p.rows ? end * kNormBlock : p.rows;
  for (i64 row = begin * kNormBlock; row < last; ++row) forward_row(types, p, row, scratch);
}

template <class Types>
void backward_blocks(const Types& types, const NormProblem& p, i64 begin, i64 end) {
  for (i64 block = begin; block < end; ++block) {
    float* dweight = p.partial + block * 2 * p.dim;
    std::memset(dweight, 0, 2 * p.dim * sizeof(float));
    const i64 last = (block + 1) * kNormBlock < p.rows ? (block + 1) * kNormBlock : p.rows;
    for (i64 row = block * kNormBlock; row < last; ++row) backward_row(types, p, row, dweight, dweight + p.dim);
  }
}

// body(types) with the types of the problem.
template <class Body>
MAMBA_SSM_INLINE void with_types(const NormProblem& p, const Body& body) {
  if (p.stream_dtype != Dtype::f32) return body(AnyTypes{p.dtype, p.stream_dtype});
  switch (p.dtype) {
    case Dtype::f16:
      return body(FixedTypes<Dtype::f16, Dtype::f32>{});
    case Dtype::bf16:
      return body(FixedTypes<Dtype::bf16, Dtype::f32>{});
    default:
      return body(FixedTypes<Dtype::f32, Dtype::f32>{});
  }
}

inline void norm_forward(const NormProblem& p, i64 begin, i64 end, float* scratch) {
  with_types(p, [&](auto types) { forward_blocks(types, p, begin, end, scratch); });
}
inline void norm_backward(const NormProblem& p, i64 begin, i64 end) {
  with_types(p, [&](auto types) { backward_blocks(types, p, begin, end); });
}

}  // namespace MAMBA_SSM_ISA
}  // namespace mamba_ssm
