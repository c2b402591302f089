// The CUDA part of libtorch's stable C ABI that our libraries use. With MAMBA_SSM_CUDA_ON_CPU, for a test, the same
// operators are registered for CPU tensors, in a namespace with the suffix _on_cpu.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "stable_abi.h"

#if defined(MAMBA_SSM_CUDA_ON_CPU)
#define MAMBA_SSM_CUDA_IMPL(name, m) STABLE_TORCH_LIBRARY_IMPL(name##_on_cpu, CPU, m)
#else
#define MAMBA_SSM_CUDA_IMPL(name, m) STABLE_TORCH_LIBRARY_IMPL(name, CUDA, m)
#endif

namespace mamba_ssm {

// Makes the tensor's device the current one as long as this lives; `stream` is that device's current stream.
class DeviceOf {
 public:
#if defined(MAMBA_SSM_CUDA_ON_CPU)
  explicit DeviceOf(const Tensor&) {}
  void* stream() const { return nullptr; }
#else
  explicit DeviceOf(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {}
  void* stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return stream;
  }

 private:
  int index_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

}  // namespace mamba_ssm
