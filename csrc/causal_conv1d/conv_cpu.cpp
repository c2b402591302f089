// The CPU implementation of the causal_conv1d operators; schemas and checks of the arguments are in Python.
#include <algorithm>
#include <tuple>
#include <vector>

#include "conv.h"
#include "conv_ops.h"
#include "cpu_isa.h"

namespace mamba_ssm {
namespace {

using i64 = std::int64_t;

// Work below this many elements stays in one thread.
constexpr i64 kSerialElements = 16384;

const ConvKernels& kernels() { return MAMBA_SSM_SELECT_ISA(conv_kernels); }

ConvArray array_of(const Tensor& tensor, const void* data) {
  return {const_cast<void*>(data), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}
ConvArray input(const Tensor& tensor) { return array_of(tensor, tensor.const_data_ptr()); }
ConvArray output(const Tensor& tensor) { return array_of(tensor, tensor.mutable_data_ptr()); }

// The same array with time running backwards.
ConvArray in_scan_order(ConvArray a, const Tensor& tensor, bool reverse) {
  if (!reverse) return a;
  a.data = static_cast<char*>(a.data) + (tensor.size(2) - 1) * a.time * static_cast<i64>(tensor.element_size());
  a.time = -a.time;
  return a;
}

bool is_channel_last(const Tensor& tensor) { return tensor.stride(1) == 1 && tensor.stride(2) != 1; }

Tensor empty_bdl(const Tensor& like, bool channel_last) {
  if (!channel_last) return torch::stable::new_empty(like, {like.size(0), like.size(1), like.size(2)});
  return torch::stable::transpose(torch::stable::new_empty(like, {like.size(0), like.size(2), like.size(1)}), 1, 2);
}

// weight (dim, width) as (width, dim) and bias in fp32, whatever their dtype and strides.
struct Filter {
  std::vector<float> weight, bias;

  Filter(const Tensor& weight_in, const OptionalTensor& bias_in)
      : weight(weight_in.numel()), bias(weight_in.size(0), 0.0f) {
    const i64 dim = weight_in.size(0), width = weight_in.size(1);
    const Tensor w = as_float(weight_in);
    const float* from = w.const_data_ptr<float>();
    for (i64 d = 0; d < dim; ++d) {
      for (i64 k = 0; k < width; ++k) weight[k * dim + d] = from[d * width + k];
    }
    if (bias_in.has_value()) {
      const Tensor b = as_float(*bias_in);
      std::copy_n(b.const_data_ptr<float>(), dim, bias.begin());
    }
  }

  static Tensor as_float(const Tensor& tensor) {
    return torch::stable::contiguous(torch::stable::to(tensor, torch::headeronly::ScalarType::Float));
  }
};

void check_dtype(const Tensor& tensor, Dtype dtype, const char* name) {
  STD_TORCH_CHECK(kernel_dtype(tensor, name) == dtype, name, " must have the dtype of x");
}

ConvProblem problem_of(const Tensor& x, const Filter& filter, i64 width, const OptionalTensor& seq_idx,
                       const OptionalTensor& initial_states, bool silu, bool reverse) {
  ConvProblem p{};
  p.batch = x.size(0);
  p.dim = x.size(1);
  p.seqlen = x.size(2);
  p.width = static_cast<int>(width);
  p.dtype = kernel_dtype(x, "x");
  p.silu = silu;
  p.lanes_over_channels = is_channel_last(x);
  p.weight = filter.weight.data();
  p.bias = filter.bias.data();
  p.x = in_scan_order(input(x), x, reverse);
  STD_TORCH_CHECK(width >= 2 && width <= 4 && filter.bias.size() == static_cast<std::size_t>(p.dim),
                  "weight must be (dim, width) with width 2, 3 or 4");
  if (initial_states.has_value()) {
    check_dtype(*initial_states, p.dtype, "initial_states");
    STD_TORCH_CHECK(
        initial_states->size(0) == p.batch && initial_states->size(1) == p.dim && initial_states->size(2) == width - 1,
        "initial_states must be (batch, dim, width - 1)");
    p.initial = input(*initial_states);
  }
  if (seq_idx.has_value()) {
    STD_TORCH_CHECK(seq_idx->scalar_type() == torch::headeronly::ScalarType::Int, "seq_idx must be int32");
    STD_TORCH_CHECK(seq_idx->size(0) == p.batch && seq_idx->size(1) == p.seqlen, "seq_idx must be (batch, seqlen)");
    p.seq_batch = seq_idx->stride(0);
    p.seq_time = reverse ? -seq_idx->stride(1) : seq_idx->stride(1);
    p.seq_idx = seq_idx->const_data_ptr<std::int32_t>() + (reverse ? (p.seqlen - 1) * seq_idx->stride(1) : 0);
  }
  return p;
}

void run(void (*kernel)(const ConvProblem&, i64, i64), const ConvProblem& p) {
  const i64 items = conv_items(p);
  if (items == 0) return;
  const i64 elements = std::min(p.seqlen, kConvChunk) * std::min(p.dim, conv_block(p));
  torch::stable::parallel_for(0, items, std::max<i64>(1, kSerialElements / elements),
                              [&](i64 begin, i64 end) { kernel(p, begin, end); });
}

}  // namespace

Tensor conv_fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& seq_idx,
                const OptionalTensor& initial_states, bool silu, bool reverse, Scratch*) {
  const Filter filter(weight, bias);
  ConvProblem p = problem_of(x, filter, weight.size(1), seq_idx, initial_states, silu, reverse);
  Tensor out = empty_bdl(x, p.lanes_over_channels);
  p.out = in_scan_order(output(out), out, reverse);
  run(kernels().forward, p);
  return out;
}

// Sums dweight and dbias over the chunks, in their order.
void sum_partials(const std::vector<float>& partial, i64 chunks, i64 dim, i64 width, float* dweight, float* dbias) {
  torch::stable::parallel_for(0, width + 1, 1, [&](i64 begin, i64 end) {
    for (i64 k = begin; k < end; ++k) {
      std::vector<double> sums(dim, 0.0);
      for (i64 chunk = 0; chunk < chunks; ++chunk) {
        const float* row = partial.data() + (chunk * (width + 1) + k) * dim;
        for (i64 d = 0; d < dim; ++d) sums[d] += row[d];
      }
      for (i64 d = 0; d < dim; ++d) {
        float& sum = k < width ? dweight[d * width + k] : dbias[d];
        sum = static_cast<float>(sums[d]);
      }
    }
  });
}

namespace {

// As channel-last as x is, for the kernel with lanes over channels.
Tensor in_layout(const Tensor& tensor, bool lanes_over_channels) {
  if (!lanes_over_channels || tensor.stride(1) == 1) return tensor;
  return torch::stable::transpose(torch::stable::contiguous(torch::stable::transpose(tensor, 1, 2)), 1, 2);
}

}  // namespace

ConvGradients conv_bwd(const Tensor& dout_in, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& seq_idx, const OptionalTensor& initial_states, bool silu, bool reverse,
                       const OptionalTensor& dx_addend, const OptionalTensor& dx_target, Scratch*) {
  const i64 dim = x.size(1), width = weight.size(1);
  const Filter filter(weight, bias);
  ConvProblem p = problem_of(x, filter, width, seq_idx, initial_states, silu, reverse);
  check_dtype(dout_in, p.dtype, "dout");
  const Tensor dout = in_layout(dout_in, p.lanes_over_channels);
  Tensor addend;
  if (dx_addend.has_value()) {
    check_dtype(*dx_addend, p.dtype, "dx_addend");
    STD_TORCH_CHECK(dx_addend->size(0) == p.batch && dx_addend->size(1) == dim && dx_addend->size(2) == p.seqlen,
                    "dx_addend must have the shape of x");
    addend = in_layout(*dx_addend, p.lanes_over_channels);
    p.dx_addend = in_scan_order(input(addend), addend, reverse);
  }
  const Tensor dx = dx_target.has_value() ? *dx_target : empty_bdl(x, p.lanes_over_channels);
  OptionalTensor dinitial;
  p.dout = in_scan_order(input(dout), dout, reverse);
  p.dx = in_scan_order(output(dx), dx, reverse);
  if (initial_states.has_value()) {
    dinitial = torch::stable::new_empty(x, {p.batch, dim, width - 1});
    p.dinitial = output(*dinitial);
  }
  const i64 chunks = p.batch * conv_chunks(p);
  std::vector<float> partial(chunks * (width + 1) * dim);
  p.partial = partial.data();
  run(kernels().backward, p);
  const auto fp32 = torch::headeronly::ScalarType::Float;
  Tensor dweight = torch::stable::new_empty(weight, {dim, width}, fp32);
  Tensor dbias = torch::stable::new_empty(weight, {dim}, fp32);
  sum_partials(partial, chunks, dim, width, dweight.mutable_data_ptr<float>(), dbias.mutable_data_ptr<float>());
  return {dx, dweight, dbias, dinitial};
}

ConvPairGradients conv_pair_bwd(const Tensor (&dout)[2], const Tensor& x, const ConvFilter (&filters)[2],
                                const Tensor& dx, Scratch& scratch) {
  return conv_each_bwd(dout, x, filters, dx, scratch);
}

namespace {

const std::int32_t* indices_of(const OptionalTensor& tensor, i64 batch, const char* name) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == torch::headeronly::ScalarType::Int && tensor->numel() == batch &&
                      tensor->is_contiguous(),
                  name, " must be int32, (batch,), contiguous");
  return tensor->const_data_ptr<std::int32_t>();
}

Tensor conv_update(const Tensor& x, const Tensor& conv_state, const Tensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& cache_seqlens, const OptionalTensor& conv_state_indices, bool silu) {
  const Filter filter(weight, bias);
  Tensor out = empty_bdl(x, is_channel_last(x));
  ConvUpdate p{};
  p.batch = x.size(0);
  p.dim = x.size(1);
  p.seqlen = x.size(2);
  p.state_len = conv_state.size(2);
  p.width = static_cast<int>(weight.size(1));
  p.dtype = kernel_dtype(x, "x");
  p.state_dtype = kernel_dtype(conv_state, "conv_state");
  p.silu = silu;
  p.weight = filter.weight.data();
  p.bias = filter.bias.data();
  p.x = input(x);
  p.out = output(out);
  p.state = output(conv_state);
  p.cache_seqlens = indices_of(cache_seqlens, p.batch, "cache_seqlens");
  p.state_indices = indices_of(conv_state_indices, p.batch, "conv_state_indices");
  const i64 rows = conv_state.size(0);
  STD_TORCH_CHECK(p.width >= 2 && p.width <= 4 && p.state_len >= p.width - 1 && weight.size(0) == p.dim &&
                      conv_state.size(1) == p.dim && (p.state_indices != nullptr || rows == p.batch),
                  "conv_state must be (batch, dim, state_len >= width - 1) and weight (dim, width)");
  for (i64 b = 0; b < p.batch; ++b) {
    STD_TORCH_CHECK(p.cache_seqlens == nullptr || p.cache_seqlens[b] >= 0, "cache_seqlens[", b, "] is ",
                    p.cache_seqlens[b], ", but must be >= 0: it counts the tokens seen");
    STD_TORCH_CHECK(p.state_indices == nullptr || p.state_indices[b] < rows, "conv_state_indices[", b, "] is ",
                    p.state_indices[b], ", but conv_state has ", rows, " rows: pass a row, or -1 for padding");
  }
  const i64 grain = std::max<i64>(1, kSerialElements / std::max<i64>(1, p.dim * p.seqlen));
  torch::stable::parallel_for(0, p.batch, grain, [&](i64 begin, i64 end) { kernels().update(p, begin, end); });
  return out;
}

}  // namespace
}  // namespace mamba_ssm

STABLE_TORCH_LIBRARY_IMPL(causal_conv1d, CPU, m) {
  m.impl("conv_fwd", TORCH_BOX(&mamba_ssm::conv_fwd_operator));
  m.impl("conv_bwd", TORCH_BOX(&mamba_ssm::conv_bwd_operator));
  m.impl("conv_update", TORCH_BOX(&mamba_ssm::conv_update));
}
