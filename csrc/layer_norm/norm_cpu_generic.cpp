// clang-format off: the order matters
#include "isa_generic.h"
#include "norm_kernel.h"
// clang-format on

namespace mamba_ssm {
const NormKernels norm_kernels_generic = {generic::norm_forward, generic::norm_backward};
}  // namespace mamba_ssm
#include "isa_end.h"
