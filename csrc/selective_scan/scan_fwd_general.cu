// The forward kernels for every layout and form, one for each discretization.
#include "scan_fwd.cuh"

namespace mamba_ssm {

template const char* launch_scan_forward<false>(const GpuScan&, void*);

}  // namespace mamba_ssm
