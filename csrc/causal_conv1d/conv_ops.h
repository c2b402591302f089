// The operators' implementations, each library's own; see causal_conv1d/ops.py.
#pragma once

#include <array>
#include <tuple>

#include "tensors.h"

namespace mamba_ssm {

// With a scratch, the result lies there.
Tensor conv_fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& seq_idx,
                const OptionalTensor& initial_states, bool silu, bool reverse, Scratch* scratch = nullptr);
// As the schema has it.
inline Tensor conv_fwd_operator(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                const OptionalTensor& seq_idx, const OptionalTensor& initial_states, bool silu,
                                bool reverse) {
  return conv_fwd(x, weight, bias, seq_idx, initial_states, silu, reverse);
}

// dweight and dbias are float32, whatever the dtype of weight and bias.
struct ConvGradients {
  Tensor dx, dweight, dbias;
  OptionalTensor dinitial_states;
};
// dx goes to dx_target if there is one, which has the layout of x; with `scratch`, dweight and dbias lie there.
ConvGradients conv_bwd(const Tensor& dout, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& seq_idx, const OptionalTensor& initial_states, bool silu, bool reverse,
                       const OptionalTensor& dx_addend, const OptionalTensor& dx_target = std::nullopt,
                       Scratch* scratch = nullptr);

// As the schema has it: dinitial_states is empty without initial states.
inline std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bwd_operator(const Tensor& dout, const Tensor& x,
                                                                    const Tensor& weight, const OptionalTensor& bias,
                                                                    const OptionalTensor& seq_idx,
                                                                    const OptionalTensor& initial_states, bool silu,
                                                                    bool reverse, const OptionalTensor& dx_addend) {
  ConvGradients g = conv_bwd(dout, x, weight, bias, seq_idx, initial_states, silu, reverse, dx_addend);
  return {g.dx, g.dweight, g.dbias, g.dinitial_states.has_value() ? *g.dinitial_states : new_tensor(x, {0})};
}

// ---- two convolutions of the same x, along and against time, with SiLU and from zeros -------------------------------

struct ConvFilter {
  Tensor weight;  // (dim, width)
  OptionalTensor bias;
};
struct ConvPairGradients {
  std::array<Tensor, 2> dweight, dbias;  // float32, in scratch memory
};
// Sets dx, which has the layout of x.
ConvPairGradients conv_pair_bwd(const Tensor (&dout)[2], const Tensor& x, const ConvFilter (&filters)[2],
                                const Tensor& dx, Scratch& scratch);

// One after the other: what it is where there is no kernel for both.
inline ConvPairGradients conv_each_bwd(const Tensor (&dout)[2], const Tensor& x, const ConvFilter (&filters)[2],
                                       const Tensor& dx, Scratch& scratch) {
  const auto one = [&](int i, const OptionalTensor& addend, const OptionalTensor& target) {
    return conv_bwd(dout[i], x, filters[i].weight, filters[i].bias, std::nullopt, std::nullopt, true, i == 1, addend,
                    target, &scratch);
  };
  const ConvGradients along = one(0, std::nullopt, std::nullopt), both = one(1, along.dx, dx);
  return {{along.dweight, both.dweight}, {along.dbias, both.dbias}};
}

}  // namespace mamba_ssm
