// The backward kernels for every layout and form, one for each discretization.
#include "scan_bwd.cuh"

namespace mamba_ssm {

template const char* launch_scan_backward<false>(const GpuScan&, const GpuScanGradients&, void*);

}  // namespace mamba_ssm
