#if defined(__x86_64__)
// clang-format off: the order matters
#include "isa_avx512.h"
#include "conv_kernel.h"
// clang-format on

namespace mamba_ssm {
const ConvKernels conv_kernels_avx512 = {avx512::forward, avx512::backward, avx512::update};
}  // namespace mamba_ssm
#include "isa_end.h"
#endif
