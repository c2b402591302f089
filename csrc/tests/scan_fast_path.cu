// The scan's kernels for the fast path (zoh, bfloat16), compiled by tests/test_build.py for their use of registers;
// never linked.
#include "../selective_scan/scan_bwd.cuh"
#include "../selective_scan/scan_fwd.cuh"
#include "../selective_scan/scan_spread.cuh"

namespace mamba_ssm {

template __global__ void scan_forward_kernel<Zoh, Dtype::bf16, Output::gated>(const __grid_constant__ GpuScan,
                                                                              const __grid_constant__ SegmentSums);
template __global__ void scan_backward_kernel<Zoh, Dtype::bf16>(const __grid_constant__ GpuScan,
                                                                const __grid_constant__ GpuScanGradients);
template __global__ void scan_backward_sums_kernel<Zoh, Dtype::bf16>(const __grid_constant__ GpuScan,
                                                                     const __grid_constant__ GpuScanGradients,
                                                                     const __grid_constant__ SegmentSums);
template __global__ void scan_spread_kernel<Zoh, Dtype::bf16, Output::gated, 4>(const __grid_constant__ GpuScan);
template __global__ void scan_spread_kernel<Zoh, Dtype::bf16, Output::gated, 8>(const __grid_constant__ GpuScan);

}  // namespace mamba_ssm
