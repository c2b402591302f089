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

inline Sizes contiguous_strides(const Sizes& sizes) {
  Sizes strides(sizes.size());
  std::int64_t stride = 1;
  for (std::size_t i = sizes.size(); i-- > 0; stride *= std::max<std::int64_t>(sizes[i], 1)) strides[i] = stride;
  return strides;
}

// Uninitialized and contiguous, on the device of `like`.
inline Tensor new_tensor(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  std::int32_t device = 0, index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  // On the CPU the C interface does not fill new memory where torch is told to, as tests tell it.
  if (device == aoti_torch_device_type_cpu()) return torch::stable::new_empty(like, sizes, dtype);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  const Sizes strides = contiguous_strides(sizes);
  AtenTensorHandle handle = nullptr;
  const auto type = torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(dtype));
  const auto error = aoti_torch_empty_strided(static_cast<std::int64_t>(sizes.size()), sizes.data(), strides.data(),
                                              type, device, index, &handle);
  // The C interface keeps no exception's type; by these words others know this one, mamba_ssm/_backend.py too.
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "CUDA out of memory. Tried to make a tensor of ",
                  sizes.empty() ? 1 : sizes[0] * strides[0], " elements");
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

inline bool on_one_device(const Tensor& a, const Tensor& b) {
  std::int32_t types[2] = {}, indices[2] = {};
  const Tensor* tensors[] = {&a, &b};
  for (int i = 0; i < 2; ++i) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensors[i]->get(), &types[i]));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensors[i]->get(), &indices[i]));
  }
  return types[0] == types[1] && indices[0] == indices[1];
}

// Tensors that live no longer than an operator's call. Each takes microseconds to make, so small ones share the memory
// of one, for each dtype, and large ones are used again after release().
class Scratch {
 public:
  explicit Scratch(const Tensor& like) : like_(like) {}

  Tensor tensor(const Sizes& sizes, ScalarType dtype) { return tensor(sizes, contiguous_strides(sizes), dtype); }
  // (rows, columns), the columns one after the other.
  Tensor by_columns(std::int64_t rows, std::int64_t columns, ScalarType dtype) {
    return tensor({rows, columns}, {1, rows}, dtype);
  }
  Tensor floats(const Sizes& sizes) { return tensor(sizes, ScalarType::Float); }
  // So many floats, which need not be a tensor.
  float* float_memory(std::int64_t count) {
    if (count > kSmall) {
      return static_cast<float*>(large({count}, {1}, count, ScalarType::Float).data_ptr());
    }
    Pool& pool = pool_of(ScalarType::Float, count);
    return static_cast<float*>(pool.memory->data_ptr()) + take(pool, count);
  }
  // The large tensors made so far are not read any more by what is launched from now on.
  void release() {
    for (Kept& kept : kept_) kept.free = true;
  }

 private:
  struct Pool {
    OptionalTensor memory;
    std::int64_t used = 0;
  };
  struct Kept {
    Tensor memory;
    std::int64_t count;
    ScalarType dtype;
    bool free;
  };
  static constexpr std::int64_t kPool = 1 << 20, kSmall = kPool / 4, kAlignment = 128;

  Tensor tensor(const Sizes& sizes, const Sizes& strides, ScalarType dtype) {
    std::int64_t count = 1;
    for (std::int64_t n : sizes) count *= n;
    return count > kSmall ? large(sizes, strides, count, dtype) : small(sizes, strides, count, dtype);
  }
  Tensor small(const Sizes& sizes, const Sizes& strides, std::int64_t count, ScalarType dtype) {
    Pool& pool = pool_of(dtype, count);
    return view_of(*pool.memory, sizes, strides, take(pool, count));
  }
  // With room for `count` more.
  Pool& pool_of(ScalarType dtype, std::int64_t count) {
    Pool& pool = dtype == ScalarType::Float ? floats_ : halves_;
    if (!pool.memory.has_value() || pool.memory->scalar_type() != dtype || pool.used + count > kPool) {
      if (pool.memory.has_value()) full_.push_back(*pool.memory);
      pool = {new_tensor(like_, {kPool}, dtype), 0};
    }
    return pool;
  }
  static std::int64_t take(Pool& pool, std::int64_t count) {
    const std::int64_t first = pool.used;
    pool.used += (count + kAlignment - 1) / kAlignment * kAlignment;
    return first;
  }
  Tensor large(const Sizes& sizes, const Sizes& strides, std::int64_t count, ScalarType dtype) {
    for (Kept& kept : kept_) {
      if (!kept.free || kept.count != count || kept.dtype != dtype) continue;
      kept.free = false;
      return view_of(kept.memory, sizes, strides);
    }
    kept_.push_back({new_tensor(like_, sizes, dtype), count, dtype, false});
    const Tensor& memory = kept_.back().memory;
    return strides == contiguous_strides(sizes) ? memory : view_of(memory, sizes, strides);
  }

  Tensor like_;
  Pool floats_, halves_;
  std::vector<Tensor> full_;  // what is in pools is no tensor that would keep them
  std::vector<Kept> kept_;
};
// With a scratch, there.
inline Tensor new_tensor(const Tensor& like, const Sizes& sizes, ScalarType dtype, Scratch* scratch) {
  return scratch == nullptr ? new_tensor(like, sizes, dtype) : scratch->tensor(sizes, dtype);
}

}  // namespace mamba_ssm
