#include "isa_generic.h"
#include "scan_cpu_kernel.h"

namespace mamba_ssm {
extern const ScanKernels scan_kernels_generic = scan_kernels(generic::kLanes, generic::kMethods);
}  // namespace mamba_ssm
#include "isa_end.h"
