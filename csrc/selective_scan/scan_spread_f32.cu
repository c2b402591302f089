#include "scan_spread.cuh"

namespace mamba_ssm {

template const char* launch_scan_spread<Dtype::f32>(const GpuScan&, int, Output, void*);

}  // namespace mamba_ssm
