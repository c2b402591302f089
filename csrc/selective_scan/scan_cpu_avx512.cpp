#if defined(__x86_64__)
#include "isa_avx512.h"
#include "scan_cpu_kernel.h"

namespace mamba_ssm {
const ScanKernels scan_kernels_avx512 = {avx512::kLanes, avx512::forward_task, avx512::backward_task};
}  // namespace mamba_ssm
#include "isa_end.h"
#endif
