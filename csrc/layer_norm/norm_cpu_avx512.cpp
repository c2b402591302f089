#if defined(__x86_64__)
// clang-format off: the order matters
#include "isa_avx512.h"
#include "norm_kernel.h"
// clang-format on

namespace mamba_ssm {
const NormKernels norm_kernels_avx512 = {avx512::norm_forward, avx512::norm_backward};
}  // namespace mamba_ssm
#include "isa_end.h"
#endif
