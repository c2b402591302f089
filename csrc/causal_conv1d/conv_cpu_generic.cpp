#include "conv_kernel.h"
#include "isa_generic.h"

namespace mamba_ssm {
const ConvKernels conv_kernels_generic = {generic::forward, generic::backward, generic::update};
}  // namespace mamba_ssm
#include "isa_end.h"
