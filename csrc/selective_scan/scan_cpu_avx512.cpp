#if defined(__x86_64__)
#include "isa_avx512.h"
#include "scan_cpu_kernel.h"

namespace mamba_ssm {
extern const ScanKernels scan_kernels_avx512 = scan_kernels(avx512::kLanes, avx512::kMethods);
}  // namespace mamba_ssm
#include "isa_end.h"
#endif
