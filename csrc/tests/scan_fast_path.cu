// The scan's kernels for the fast path (channel-last, B and C varying, zoh, not exact), compiled by
// tests/test_build.py for their use of registers; never linked.
#include "../selective_scan/scan_bwd.cuh"
#include "../selective_scan/scan_fwd.cuh"

namespace mamba_ssm {

template __global__ void scan_forward_kernel<Zoh, true>(const __grid_constant__ GpuScan);
template __global__ void scan_backward_kernel<Zoh, true, false>(const __grid_constant__ GpuScan,
                                                                const __grid_constant__ GpuScanGradients);

}  // namespace mamba_ssm
