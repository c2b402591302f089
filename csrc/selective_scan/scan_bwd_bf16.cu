#include "scan_bwd.cuh"

namespace mamba_ssm {

template const char* launch_scan_backward<Dtype::bf16>(const GpuScan&, const GpuScanGradients&, const SegmentSums*,
                                                       void*);

}  // namespace mamba_ssm
