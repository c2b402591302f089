// The forward kernels for channel-last memory in whole vectors, one for each discretization.
#include "scan_fwd.cuh"

namespace mamba_ssm {

template const char* launch_scan_forward<true>(const GpuScan&, void*);

}  // namespace mamba_ssm
