#if defined(__x86_64__)
#include "isa_avx2.h"
#include "scan_cpu_kernel.h"

namespace mamba_ssm {
extern const ScanKernels scan_kernels_avx2 = scan_kernels(avx2::kLanes, avx2::kMethods);
}  // namespace mamba_ssm
#include "isa_end.h"
#endif
