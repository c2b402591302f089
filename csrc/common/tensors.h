// Making and viewing tensors without the dispatcher, of which an operator that makes dozens of them would take most of
// its time on the host.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "stable_abi.h"

namespace mamba_ssm {

using torch::headeronly::ScalarType;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<std::int64_t>;

// Uninitialized and contiguous, on the device of `like`.
inline Tensor new_tensor(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  std::int32_t device = 0, index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  // On the CPU the C interface does not fill new memory where torch is told to, as tests tell it.
  if (device == aoti_torch_device_type_cpu()) return torch::stable::new_empty(like, sizes, dtype);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  Sizes strides(sizes.size());
  std::int64_t stride = 1;
  for (std::size_t i = sizes.size(); i-- > 0; stride *= std::max<std::int64_t>(sizes[i], 1)) strides[i] = stride;
  AtenTensorHandle handle = nullptr;
  const auto type = torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<std::int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  type, device, index, &handle));
  return Tensor(handle);
}
inline Tensor new_tensor(const Tensor& like, const Sizes& sizes) { return new_tensor(like, sizes, like.scalar_type()); }
inline Tensor new_floats(const Tensor& like, const Sizes& sizes) { return new_tensor(like, sizes, ScalarType::Float); }

// The tensor's memory, from its element `offset` on, in another shape.
inline Tensor view_of(const Tensor& t, const Sizes& sizes, const Sizes& strides, std::int64_t offset = 0) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), static_cast<std::int64_t>(sizes.size()), sizes.data(),
                                                        strides.data(), offset, &handle));
  return Tensor(handle);
}
inline Sizes sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }
inline Sizes strides_of(const Tensor& t) { return {t.strides().begin(), t.strides().end()}; }
inline Tensor transposed(const Tensor& t, std::int64_t a, std::int64_t b) {
  Sizes sizes = sizes_of(t), strides = strides_of(t);
  std::swap(sizes[a], sizes[b]);
  std::swap(strides[a], strides[b]);
  return view_of(t, sizes, strides);
}
inline Tensor part_of(const Tensor& t, std::int64_t dimension, std::int64_t first, std::int64_t count) {
  Sizes sizes = sizes_of(t);
  sizes[dimension] = count;
  return view_of(t, sizes, strides_of(t), first * t.stride(dimension));
}
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Float tensors that live no longer than this; small ones share the memory of one.
class Scratch {
 public:
  explicit Scratch(const Tensor& like) : like_(like) {}

  Tensor floats(const Sizes& sizes) {
    std::int64_t count = 1;
    for (std::int64_t n : sizes) count *= n;
    if (count > kSmall) return new_floats(like_, sizes);
    if (!pool_.has_value() || used_ + count > kPool) pool_ = new_floats(like_, {kPool}), used_ = 0;
    Sizes strides(sizes.size());
    std::int64_t stride = 1;
    for (std::size_t i = sizes.size(); i-- > 0; stride *= sizes[i]) strides[i] = stride;
    Tensor result = view_of(*pool_, sizes, strides, used_);
    used_ += (count + kAlignment - 1) / kAlignment * kAlignment;
    return result;
  }

 private:
  static constexpr std::int64_t kPool = 1 << 20, kSmall = kPool / 4, kAlignment = 64;
  Tensor like_;
  OptionalTensor pool_;
  std::int64_t used_ = 0;
};

}  // namespace mamba_ssm
