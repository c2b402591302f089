// clang-format off: the order matters
#include "isa_generic.h"
#include "conv_kernel.h"
// clang-format on

namespace mamba_ssm {
const ConvKernels conv_kernels_generic = {generic::forward, generic::backward, generic::update};
}  // namespace mamba_ssm
#include "isa_end.h"
