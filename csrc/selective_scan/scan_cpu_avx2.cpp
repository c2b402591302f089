#if defined(__x86_64__)
#include "isa_avx2.h"
#include "scan_cpu_kernel.h"

namespace mamba_ssm {
const ScanKernels scan_kernels_avx2 = {avx2::kLanes, avx2::forward_task, avx2::backward_task};
}  // namespace mamba_ssm
#include "isa_end.h"
#endif
