#if defined(__x86_64__)
// clang-format off: the order matters
#include "isa_avx2.h"
#include "conv_kernel.h"
// clang-format on

namespace mamba_ssm {
const ConvKernels conv_kernels_avx2 = {avx2::forward, avx2::backward, avx2::update};
}  // namespace mamba_ssm
#include "isa_end.h"
#endif
