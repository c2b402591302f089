#include "isa_generic.h"
#include "scan_cpu_kernel.h"

namespace mamba_ssm {
const ScanKernels scan_kernels_generic = {generic::kLanes, generic::forward_task, generic::backward_task};
}  // namespace mamba_ssm
#include "isa_end.h"
