// The part of libtorch that our libraries use: its stable C ABI only, so that one binary serves every
// Python and every torch >= 2.11. Included by the files that register operators, never by kernels.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>

#include "dtype.h"

namespace mamba_ssm {

using torch::stable::Tensor;

// Throws for a dtype that the kernels do not have. `name` is the argument's.
inline Dtype kernel_dtype(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return Dtype::f32;
    case torch::headeronly::ScalarType::Half:
      return Dtype::f16;
    case torch::headeronly::ScalarType::BFloat16:
      return Dtype::bf16;
    default:
      break;
  }
  STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16 for the compiled kernels");
}

}  // namespace mamba_ssm
