// The backward kernels for channel-last memory in whole vectors, one for each discretization.
#include "scan_bwd.cuh"

namespace mamba_ssm {

template const char* launch_scan_backward<true>(const GpuScan&, const GpuScanGradients&, void*);

}  // namespace mamba_ssm
