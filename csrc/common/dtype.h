// Element types of the activations that kernels read and write.
#pragma once

#include <cstdint>
#include <type_traits>

namespace mamba_ssm {

enum class Dtype : std::int32_t { f32, f16, bf16 };

inline constexpr int element_size(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Calls function(std::integral_constant<Dtype, dtype>()), on the host.
template <class Function>
auto with_static_dtype(Dtype dtype, const Function& function) {
  if (dtype == Dtype::bf16) return function(std::integral_constant<Dtype, Dtype::bf16>());
  if (dtype == Dtype::f16) return function(std::integral_constant<Dtype, Dtype::f16>());
  return function(std::integral_constant<Dtype, Dtype::f32>());
}

}  // namespace mamba_ssm
