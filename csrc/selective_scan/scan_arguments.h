// The operators of every device: their arguments, checks, and the description that the kernels read.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "discretization.h"
#include "params.h"
#include "tensors.h"

namespace mamba_ssm {

inline Tensor contiguous_float(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " must be float32");
  return as_contiguous(tensor);
}
inline OptionalTensor contiguous_float(const OptionalTensor& tensor, const char* name) {
  if (!tensor.has_value()) return tensor;
  return contiguous_float(*tensor, name);
}

inline void check_shape(const OptionalTensor& t, std::initializer_list<std::int64_t> size, const char* name) {
  if (!t.has_value()) return;
  bool same = t->dim() == static_cast<std::int64_t>(size.size());
  for (std::int64_t i = 0; same && i < t->dim(); ++i) same = t->size(i) == size.begin()[i];
  if (same) return;
  std::string expected;
  for (std::int64_t n : size) expected.append(expected.empty() ? "" : ", ").append(std::to_string(n));
  STD_TORCH_CHECK(false, name, " must have shape (", expected, ")");
}

inline float* float_data(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }
inline float* float_data(const OptionalTensor& tensor) { return tensor.has_value() ? float_data(*tensor) : nullptr; }

inline Activation activation(const Tensor& t, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == like.size(0) && t.size(1) == like.size(1) && t.size(2) == like.size(2),
                  name, " must have the shape of u (batch, channels, length)");
  return {t.data_ptr(), kernel_dtype(t, name), t.stride(0), t.stride(1), t.stride(2)};
}
inline Activation activation(const OptionalTensor& t, const char* name, const Tensor& like) {
  return t.has_value() ? activation(*t, name, like) : Activation{};
}

inline InputMatrix input_matrix(const Tensor& t, const char* name, const ScanParams& p) {
  const Dtype dtype = kernel_dtype(t, name);
  if (t.dim() == 2) {
    check_shape(t, {p.channels, p.states}, name);
    return {t.data_ptr(), dtype, true, 0, t.stride(0), t.stride(1), 0};
  }
  if (t.dim() == 3) {
    check_shape(t, {p.batch, p.states, p.length}, name);
    return {t.data_ptr(), dtype, false, t.stride(0), 0, t.stride(1), t.stride(2)};
  }
  STD_TORCH_CHECK(t.dim() == 4, name, " must have 2, 3 or 4 dimensions");
  check_shape(t, {p.batch, t.size(1), p.states, p.length}, name);
  return {t.data_ptr(), dtype, false, t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// (batch, channels, length), laid out in memory as `like` is: channel-last or not. With a scratch, there.
inline Tensor new_activation(const Tensor& like, ScalarType dtype, Scratch* scratch = nullptr) {
  const std::int64_t b = like.size(0), d = like.size(1), l = like.size(2);
  if (like.stride(1) == 1 && d > 1) return transposed(new_tensor(like, {b, l, d}, dtype, scratch), 1, 2);
  return new_tensor(like, {b, d, l}, dtype, scratch);
}
// t, whose channels are innermost, as new_activation(like, …) would lie in memory.
inline Tensor like_memory_of(const Tensor& like, const Tensor& t) {
  return like.stride(1) == 1 && like.size(1) > 1 ? t : as_contiguous(t);
}

inline constexpr const char* kMethodNames[] = {
#define MAMBA_SSM_NAME(Method) Method::name,
    MAMBA_SSM_DISCRETIZATIONS(MAMBA_SSM_NAME)
#undef MAMBA_SSM_NAME
};

inline int find_method(const std::string& name) {
  std::string known;
  int index = 0;
  for (const char* candidate : kMethodNames) {
    if (name == candidate) return index;
    known.append(index++ ? ", " : "").append(candidate);
  }
  STD_TORCH_CHECK(false, "discretization_method: got '", name, "'; expected one of ", known);
}

// What both operators take; see mamba_ssm/ops/selective_scan.py.
struct ScanArguments {
  Tensor u, delta, A, B, C;
  OptionalTensor D, z, delta_bias, delta_weight;
  double scale;
  bool delta_softplus, reverse;
  std::string method;

  void make_contiguous() {
    A = contiguous_float(A, "A");
    D = contiguous_float(D, "D");
    delta_bias = contiguous_float(delta_bias, "delta_bias");
    delta_weight = contiguous_float(delta_weight, "delta_weight");
  }
};

// A, D, delta_bias and delta_weight must be contiguous and stay alive as long as the result is used.
inline ScanParams make_params(const ScanArguments& a) {
  const Tensor &u = a.u, &A = a.A, &B = a.B, &C = a.C, &delta = a.delta;
  STD_TORCH_CHECK(u.dim() == 3 && A.dim() == 2, "u must be (batch, channels, length) and A (channels, states)");
  ScanParams p{};
  p.method = find_method(a.method);
  p.batch = u.size(0);
  p.channels = u.size(1);
  p.length = u.size(2);
  p.states = A.size(1);
  check_shape(A, {p.channels, p.states}, "A");
  check_shape(a.D, {p.channels}, "D");
  check_shape(a.delta_bias, {p.channels}, "delta_bias");
  p.u = activation(u, "u", u);
  p.z = activation(a.z, "z", u);
  if (a.delta_weight.has_value()) {
    STD_TORCH_CHECK(delta.dim() == 3, "delta must be (batch, rank, length) where delta_weight is given");
    p.rank = delta.size(1);
    check_shape(delta, {p.batch, p.rank, p.length}, "delta");
    check_shape(a.delta_weight, {p.channels, p.rank}, "delta_weight");
    p.delta_input = {delta.data_ptr(), kernel_dtype(delta, "delta"), false, delta.stride(0), 0, delta.stride(1),
                     delta.stride(2)};
    p.delta_weight = float_data(a.delta_weight);
  } else {
    p.delta = activation(delta, "delta", u);
  }
  p.B = input_matrix(B, "B", p);
  p.C = input_matrix(C, "C", p);
  const std::int64_t B_groups = B.dim() == 4 ? B.size(1) : 1, C_groups = C.dim() == 4 ? C.size(1) : 1;
  p.groups = std::max(B_groups, C_groups);
  STD_TORCH_CHECK((B_groups == p.groups || p.B.group == 0 || p.B.constant) &&
                      (C_groups == p.groups || p.C.group == 0 || p.C.constant) && p.channels % p.groups == 0,
                  "B and C must have the same number of groups, and it must divide the channels");
  p.A = float_data(A);
  p.D = float_data(a.D);
  p.delta_bias = float_data(a.delta_bias);
  p.scale = static_cast<float>(a.scale);
  p.delta_softplus = a.delta_softplus;
  p.reverse = a.reverse;
  return p;
}

// The states before every `steps` steps are kept as checkpoints, the first of all only where it is not zeros. How many
// of `steps` there are for each batch element, p.first_checkpoint being set; none for steps = 0.
inline std::int64_t count_checkpoints(const ScanParams& p, std::int64_t steps) {
  if (steps == 0 || p.length == 0) return 0;
  return (p.length + steps - 1) / steps - p.first_checkpoint;
}
// For the backward pass: p.first_checkpoint and p.checkpoints from what the forward pass kept.
inline void use_checkpoints(ScanParams& p, const Tensor& checkpoints, std::int64_t steps) {
  STD_TORCH_CHECK(steps > 0, "checkpoint_steps: got ", steps, "; expected what the forward pass was called with");
  if (checkpoints.dim() == 4) p.first_checkpoint = checkpoints.size(1) < count_checkpoints(p, steps) ? 1 : 0;
  check_shape(checkpoints, {p.batch, count_checkpoints(p, steps), p.states, p.channels}, "checkpoints");
  p.checkpoints = float_data(checkpoints);
}

using ScanResults = std::tuple<Tensor, Tensor, Tensor>;
using ScanGradientResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The operators' implementations, each library's own. A last_state that is not wanted may be undefined. What lives no
// longer than the call may lie in `scratch`.
ScanResults scan_forward(ScanArguments a, OptionalTensor initial_state, OptionalTensor addend, bool float_out,
                         std::int64_t checkpoint_steps, bool want_last_state = true, Scratch* scratch = nullptr);
// Where gradients go, if not to tensors of their own: those of B and C to (batch, 1, states, length) in the dtype of u,
// that of z to dz unless it is in float32, those of parameters to `results`. That of delta, and what lives no longer
// than the call, go to `passing`. dinitial_state and what has no gradient may be undefined then.
struct GradientTargets {
  Tensor dB, dC, dz;
  Scratch &results, &passing;
};
ScanGradientResults scan_backward(ScanArguments a, Tensor dout, OptionalTensor dlast_state, OptionalTensor dz_addend,
                                  Tensor checkpoints, bool float_dz, std::int64_t checkpoint_steps,
                                  const GradientTargets* targets = nullptr);

// As the schemas have them.
inline ScanResults scan_forward_operator(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, OptionalTensor D,
                                         OptionalTensor z, OptionalTensor delta_bias, OptionalTensor delta_weight,
                                         OptionalTensor initial_state, OptionalTensor addend, double scale,
                                         bool delta_softplus, bool reverse, std::string method, bool float_out,
                                         std::int64_t checkpoint_steps) {
  return scan_forward({u, delta, A, B, C, D, z, delta_bias, delta_weight, scale, delta_softplus, reverse, method},
                      initial_state, addend, float_out, checkpoint_steps);
}
inline ScanGradientResults scan_backward_operator(Tensor dout, OptionalTensor dlast_state, Tensor u, Tensor delta,
                                                  Tensor A, Tensor B, Tensor C, OptionalTensor D, OptionalTensor z,
                                                  OptionalTensor delta_bias, OptionalTensor delta_weight,
                                                  OptionalTensor dz_addend, Tensor checkpoints, double scale,
                                                  bool delta_softplus, bool reverse, std::string method, bool float_dz,
                                                  std::int64_t checkpoint_steps) {
  return scan_backward({u, delta, A, B, C, D, z, delta_bias, delta_weight, scale, delta_softplus, reverse, method},
                       dout, dlast_state, dz_addend, checkpoints, float_dz, checkpoint_steps);
}

}  // namespace mamba_ssm
