// The CPU implementation of mamba_ssm::add_norm_fwd and add_norm_bwd; schemas and checks of the arguments are in
// Python.
#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu_isa.h"
#include "norm_arguments.h"

namespace mamba_ssm {
namespace {

using i64 = std::int64_t;
constexpr auto kFloat = ScalarType::Float;

// Work below this many elements stays in one thread.
constexpr i64 kSerialElements = 16384;

const NormKernels& kernels() { return MAMBA_SSM_SELECT_ISA(norm_kernels); }

// A vector in fp32, whatever its dtype and stride.
Tensor as_float(const Tensor& tensor, i64 size, const char* name) {
  check_vector(tensor, size, name);
  return torch::stable::contiguous(torch::stable::to(tensor, kFloat));
}

NormProblem problem_of(const Tensor& x, const Tensor& weight, const OptionalTensor& scale, double eps,
                       bool is_rms_norm) {
  NormProblem p{};
  p.rows = row_count(x);
  p.dim = dim_of(x);
  p.dtype = kernel_dtype(x, "x");
  p.is_rms_norm = is_rms_norm;
  p.eps = static_cast<float>(eps);
  p.weight = weight.const_data_ptr<float>();
  if (scale.has_value()) {
    p.scale = scale->const_data_ptr<float>();
    p.rows_per_scale = rows_per_scale(*scale, x);
  }
  return p;
}

OptionalTensor scale_of(const OptionalTensor& scale) {
  return scale.has_value() ? OptionalTensor(as_float(*scale, scale->size(0), "scale")) : std::nullopt;
}

i64 grain_of(const NormProblem& p) { return std::max<i64>(1, kSerialElements / (kNormBlock * p.dim)); }

// h is empty unless keep_sum; mean is empty for RMSNorm.
std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_fwd(const Tensor& x_in, const Tensor& weight_in,
                                                        const OptionalTensor& bias_in,
                                                        const OptionalTensor& residual_in,
                                                        const OptionalTensor& scale_in, double eps,
                                                        bool residual_in_fp32, bool is_rms_norm, bool keep_sum) {
  const Tensor x = with_rows(x_in);
  const Tensor weight = as_float(weight_in, dim_of(x), "weight");
  const OptionalTensor scale = scale_of(scale_in);
  OptionalTensor bias, residual;
  NormProblem p = problem_of(x, weight, scale, eps, is_rms_norm);
  if (bias_in.has_value()) {
    bias = as_float(*bias_in, p.dim, "bias");
    p.bias = bias->const_data_ptr<float>();
  }
  if (residual_in.has_value()) {
    check_rows(*residual_in, x, "residual");
    residual = with_rows(*residual_in);
    p.residual = input(*residual);
  }
  p.x = input(x);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  p.y = output(y);
  Tensor h =
      torch::stable::new_empty(x, keep_sum ? sizes_of(x) : Sizes{0}, stream_dtype(x, residual, residual_in_fp32));
  p.stream_dtype = kernel_dtype(h, "residual");
  if (keep_sum) p.h = output(h);
  Tensor mean = torch::stable::new_empty(x, {is_rms_norm ? 0 : p.rows}, kFloat);
  Tensor rstd = torch::stable::new_empty(x, {p.rows}, kFloat);
  p.mean = mean.mutable_data_ptr<float>();
  p.rstd = rstd.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, norm_blocks(p), grain_of(p), [&](i64 begin, i64 end) {
    std::vector<float> scratch(p.dim);
    kernels().forward(p, begin, end, scratch.data());
  });
  return {y, h, mean, rstd};
}

// dweight and dbias are fp32, whatever the dtype of weight and bias. dresidual is empty unless separate_dresidual
// (where it would equal dx).
std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_bwd(const Tensor& dy_in, const OptionalTensor& dh_in,
                                                        const Tensor& h_in, const Tensor& weight_in,
                                                        const OptionalTensor& scale_in, const Tensor& mean,
                                                        const Tensor& rstd, bool is_rms_norm, bool has_bias,
                                                        bool separate_dresidual) {
  const Tensor dy = with_rows(dy_in), h = with_rows(h_in);
  check_rows(h, dy, "h");
  const Tensor weight = as_float(weight_in, dim_of(dy), "weight");
  const OptionalTensor scale = scale_of(scale_in);
  OptionalTensor dh;
  NormProblem p = problem_of(dy, weight, scale, 0.0, is_rms_norm);
  p.stream_dtype = kernel_dtype(h, "h");
  p.dy = input(dy);
  p.h = input(h);
  check_statistics(mean, rstd, p.rows, is_rms_norm);
  p.mean = const_cast<float*>(mean.const_data_ptr<float>());
  p.rstd = const_cast<float*>(rstd.const_data_ptr<float>());
  if (dh_in.has_value()) {
    check_rows(*dh_in, dy, "dh");
    STD_TORCH_CHECK(kernel_dtype(*dh_in, "dh") == p.stream_dtype, "dh must have the dtype of h");
    dh = with_rows(*dh_in);
    p.dh = input(*dh);
  }
  Tensor dx = torch::stable::new_empty(dy, dy.sizes());
  p.dx = output(dx);
  Tensor dresidual = torch::stable::new_empty(h, separate_dresidual ? sizes_of(h) : Sizes{0});
  if (separate_dresidual) p.dresidual = output(dresidual);
  p.sum_dbias = has_bias;
  const i64 blocks = norm_blocks(p);
  std::vector<float> partial(blocks * 2 * p.dim);
  p.partial = partial.data();
  torch::stable::parallel_for(0, blocks, grain_of(p), [&](i64 begin, i64 end) { kernels().backward(p, begin, end); });

  Tensor dweight = torch::stable::new_empty(weight, {p.dim});
  Tensor dbias = torch::stable::new_empty(weight, {has_bias ? p.dim : 0});
  for (int which = 0; which < (has_bias ? 2 : 1); ++which) {
    std::vector<double> sums(p.dim, 0.0);
    for (i64 block = 0; block < blocks; ++block) {
      const float* row = partial.data() + (block * 2 + which) * p.dim;
      for (i64 d = 0; d < p.dim; ++d) sums[d] += row[d];
    }
    std::copy(sums.begin(), sums.end(), (which == 0 ? dweight : dbias).mutable_data_ptr<float>());
  }
  return {dx, dresidual, dweight, dbias};
}

}  // namespace
}  // namespace mamba_ssm

STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CPU, m) {
  m.impl("add_norm_fwd", TORCH_BOX(&mamba_ssm::add_norm_fwd));
  m.impl("add_norm_bwd", TORCH_BOX(&mamba_ssm::add_norm_bwd));
}
