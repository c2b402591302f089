#if defined(__x86_64__)
// clang-format off: the order matters
#include "isa_avx2.h"
#include "norm_kernel.h"
// clang-format on

namespace mamba_ssm {
const NormKernels norm_kernels_avx2 = {avx2::norm_forward, avx2::norm_backward};
}  // namespace mamba_ssm
#include "isa_end.h"
#endif
