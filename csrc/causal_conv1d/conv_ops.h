// The operators' implementations, each library's own; see causal_conv1d/ops.py.
#pragma once

#include <optional>
#include <tuple>

#include "stable_abi.h"

namespace mamba_ssm {

using OptionalTensor = std::optional<Tensor>;

Tensor conv_fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& seq_idx,
                const OptionalTensor& initial_states, bool silu, bool reverse);
// dx, dweight, dbias, dinitial_states
std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bwd(const Tensor& dout, const Tensor& x, const Tensor& weight,
                                                    const OptionalTensor& bias, const OptionalTensor& seq_idx,
                                                    const OptionalTensor& initial_states, bool silu, bool reverse,
                                                    const OptionalTensor& dx_addend);

}  // namespace mamba_ssm
