#include "scan_fwd.cuh"

namespace mamba_ssm {

template const char* launch_scan_forward<Dtype::f32>(const GpuScan&, Output, const SegmentSums&, void*);

}  // namespace mamba_ssm
