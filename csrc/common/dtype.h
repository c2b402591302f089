// Element types of the activations that kernels read and write.
#pragma once

#include <cstdint>

namespace mamba_ssm {

enum class Dtype : std::int32_t { f32, f16, bf16 };

inline constexpr int element_size(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

}  // namespace mamba_ssm
