// The CUDA implementation of mamba_ssm::add_norm_fwd and add_norm_bwd; schemas and checks of the arguments are in
// Python.
//
// Compiled with MAMBA_SSM_CUDA_ON_CPU the kernels are host code, and the operators take CPU tensors: a test does that.
#include <tuple>

#include "norm_arguments.h"
#include "norm_gpu.h"
#include "row_sums.h"
#include "stable_cuda.h"

namespace mamba_ssm {
namespace {

using i64 = std::int64_t;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

void check_launch(const char* error) {
  STD_TORCH_CHECK(error == nullptr, "add_norm: the kernel did not start: ", error);
}

NormParameter parameter(const Tensor& contiguous, const char* name) {
  return {contiguous.const_data_ptr(), kernel_dtype(contiguous, name)};
}

GpuNorm norm_of(const Tensor& x, const Tensor& weight, const OptionalTensor& scale, double eps, bool is_rms_norm) {
  GpuNorm norm{};
  NormProblem& p = norm.p;
  p.rows = row_count(x);
  p.dim = dim_of(x);
  STD_TORCH_CHECK(p.dim >= 1 && p.dim <= kNormMostColumns, "x has ", p.dim, " columns, but the CUDA kernel takes 1 to ",
                  kNormMostColumns, ": use the PyTorch reference, with VIM_USE_CUDA_KERNEL=0 or use_cuda_kernel=False");
  STD_TORCH_CHECK(p.rows <= kNormMostRows, "x has ", p.rows, " rows, but the CUDA kernel takes ", kNormMostRows,
                  " at most");
  p.dtype = kernel_dtype(x, "x");
  p.is_rms_norm = is_rms_norm;
  p.eps = static_cast<float>(eps);
  check_vector(weight, p.dim, "weight");
  norm.weight = parameter(weight, "weight");
  if (scale.has_value()) {
    p.rows_per_scale = rows_per_scale(*scale, x);
    norm.scale = parameter(*scale, "scale");
  }
  return norm;
}

OptionalTensor with_rows(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(mamba_ssm::with_rows(*tensor)) : std::nullopt;
}

// h is empty unless keep_sum; mean is empty for RMSNorm.
Four add_norm_fwd(const Tensor& x_in, const Tensor& weight_in, const OptionalTensor& bias_in,
                  const OptionalTensor& residual_in, const OptionalTensor& scale_in, double eps, bool residual_in_fp32,
                  bool is_rms_norm, bool keep_sum) {
  const DeviceOf device(x_in);
  const Tensor x = mamba_ssm::with_rows(x_in), weight = as_contiguous(weight_in);
  const OptionalTensor bias = with_rows(bias_in), residual = with_rows(residual_in);
  const OptionalTensor scale = with_rows(scale_in);
  GpuNorm norm = norm_of(x, weight, scale, eps, is_rms_norm);
  NormProblem& p = norm.p;
  p.x = input(x);
  if (bias.has_value()) {
    check_vector(*bias, p.dim, "bias");
    norm.bias = parameter(*bias, "bias");
  }
  if (residual.has_value()) {
    check_rows(*residual, x, "residual");
    p.residual = input(*residual);
  }
  const Tensor y = new_tensor(x, sizes_of(x));
  const Tensor h = new_tensor(x, keep_sum ? sizes_of(x) : Sizes{0}, stream_dtype(x, residual, residual_in_fp32));
  const Tensor mean = new_floats(x, {is_rms_norm ? 0 : p.rows}), rstd = new_floats(x, {p.rows});
  // Without residual and h, it is nothing's.
  p.stream_dtype = keep_sum || residual.has_value() ? kernel_dtype(h, "residual") : Dtype::f32;
  p.y = output(y);
  if (keep_sum) p.h = output(h);
  p.mean = mean.mutable_data_ptr<float>();
  p.rstd = rstd.mutable_data_ptr<float>();
  divide_norm(norm, false);
  if (p.rows > 0) check_launch(launch_norm(norm, false, device.stream()));
  return {y, h, mean, rstd};
}

// dweight and dbias are fp32, whatever the dtype of weight and bias. dresidual is empty unless separate_dresidual
// (where it would equal dx).
Four add_norm_bwd(const Tensor& dy_in, const OptionalTensor& dh_in, const Tensor& h_in, const Tensor& weight_in,
                  const OptionalTensor& scale_in, const Tensor& mean, const Tensor& rstd, bool is_rms_norm,
                  bool has_bias, bool separate_dresidual) {
  const DeviceOf device(dy_in);
  const Tensor dy = mamba_ssm::with_rows(dy_in), h = mamba_ssm::with_rows(h_in);
  const Tensor weight = as_contiguous(weight_in);
  const OptionalTensor dh = with_rows(dh_in), scale = with_rows(scale_in);
  GpuNorm norm = norm_of(dy, weight, scale, 0.0, is_rms_norm);
  NormProblem& p = norm.p;
  check_rows(h, dy, "h");
  p.stream_dtype = kernel_dtype(h, "h");
  p.dy = input(dy);
  p.h = input(h);
  if (dh.has_value()) {
    check_rows(*dh, dy, "dh");
    STD_TORCH_CHECK(kernel_dtype(*dh, "dh") == p.stream_dtype, "dh must have the dtype of h");
    p.dh = input(*dh);
  }
  check_statistics(mean, rstd, p.rows, is_rms_norm);
  p.mean = const_cast<float*>(mean.const_data_ptr<float>());
  p.rstd = const_cast<float*>(rstd.const_data_ptr<float>());
  const Tensor dx = new_tensor(dy, sizes_of(dy));
  const Tensor dresidual = new_tensor(h, separate_dresidual ? sizes_of(h) : Sizes{0});
  p.dx = output(dx);
  if (separate_dresidual) p.dresidual = output(dresidual);
  p.sum_dbias = has_bias;
  divide_norm(norm, true);
  const i64 sums = has_bias ? 2 : 1;
  const Tensor partial = new_floats(dy, {norm.blocks, sums, p.dim});
  p.partial = partial.mutable_data_ptr<float>();
  const Tensor dweight = new_floats(dy, {p.dim}), dbias = new_floats(dy, {has_bias ? p.dim : 0});
  if (p.rows > 0) check_launch(launch_norm(norm, true, device.stream()));
  const RowSums list[] = {{p.partial, norm.blocks, sums * p.dim, p.dim, dweight.mutable_data_ptr<float>()},
                          {p.partial + p.dim, norm.blocks, sums * p.dim, p.dim, dbias.mutable_data_ptr<float>()}};
  check_launch(launch_sum_rows(list, static_cast<int>(sums), device.stream()));
  return {dx, dresidual, dweight, dbias};
}

}  // namespace
}  // namespace mamba_ssm

MAMBA_SSM_CUDA_IMPL(mamba_ssm, m) {
  m.impl("add_norm_fwd", TORCH_BOX(&mamba_ssm::add_norm_fwd));
  m.impl("add_norm_bwd", TORCH_BOX(&mamba_ssm::add_norm_bwd));
}
