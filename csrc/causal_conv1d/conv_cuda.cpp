// The CUDA implementation of the causal_conv1d operators; schemas and checks of the arguments are in Python.
//
// Compiled with MAMBA_SSM_CUDA_ON_CPU the kernels are host code, and the operators take CPU tensors: a test does that.
#include <algorithm>
#include <tuple>

#include "conv_gpu.h"
#include "conv_ops.h"
#include "row_sums.h"
#include "stable_cuda.h"

namespace mamba_ssm {
namespace {

using i64 = std::int64_t;

void check_launch(const char* error) {
  STD_TORCH_CHECK(error == nullptr, "causal_conv1d: the kernel did not start: ", error);
}

ConvArray array_of(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// A tensor of x's shape and dtype, with time running backwards under `reverse`.
ConvArray in_scan_order(const Tensor& tensor, const Tensor& x, bool reverse, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 3 && tensor.size(0) == x.size(0) && tensor.size(1) == x.size(1) &&
                      tensor.size(2) == x.size(2) && tensor.scalar_type() == x.scalar_type(),
                  name, " must have the shape and the dtype of x");
  ConvArray a = array_of(tensor);
  if (!reverse) return a;
  a.data = static_cast<char*>(a.data) + (tensor.size(2) - 1) * a.time * static_cast<i64>(tensor.element_size());
  a.time = -a.time;
  return a;
}

Tensor empty_in_layout_of(const Tensor& x, Scratch* scratch = nullptr) {
  const i64 batch = x.size(0), dim = x.size(1), seqlen = x.size(2);
  if (x.stride(1) != 1 || x.stride(2) == 1) return new_tensor(x, {batch, dim, seqlen}, x.scalar_type(), scratch);
  return transposed(new_tensor(x, {batch, seqlen, dim}, x.scalar_type(), scratch), 1, 2);
}

ConvParameter parameter(const Tensor& tensor, const char* name) {
  return {tensor.const_data_ptr(), kernel_dtype(tensor, name), tensor.stride(0),
          tensor.dim() > 1 ? tensor.stride(1) : 0};
}
ConvParameter parameter(const OptionalTensor& tensor, i64 dim, const char* name) {
  if (!tensor.has_value()) return {};
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == dim, name, " must have shape (dim,)");
  return parameter(*tensor, name);
}

GpuConv conv_of(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& seq_idx,
                const OptionalTensor& initial_states, bool silu, bool reverse) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be (batch, dim, seqlen)");
  GpuConv conv{};
  ConvProblem& p = conv.p;
  p.batch = x.size(0);
  p.dim = x.size(1);
  p.seqlen = x.size(2);
  p.dtype = kernel_dtype(x, "x");
  p.silu = silu;
  p.x = in_scan_order(x, x, reverse, "x");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == p.dim && weight.size(1) >= 2 && weight.size(1) <= 4,
                  "weight must be (dim, width) with width 2, 3 or 4");
  p.width = static_cast<int>(weight.size(1));
  conv.weight = parameter(weight, "weight");
  conv.bias = parameter(bias, p.dim, "bias");
  if (initial_states.has_value()) {
    STD_TORCH_CHECK(initial_states->scalar_type() == x.scalar_type() && initial_states->dim() == 3 &&
                        initial_states->size(0) == p.batch && initial_states->size(1) == p.dim &&
                        initial_states->size(2) == p.width - 1,
                    "initial_states must be (batch, dim, width - 1), in the dtype of x");
    p.initial = array_of(*initial_states);
  }
  if (seq_idx.has_value()) {
    STD_TORCH_CHECK(seq_idx->scalar_type() == ScalarType::Int && seq_idx->dim() == 2 && seq_idx->size(0) == p.batch &&
                        seq_idx->size(1) == p.seqlen,
                    "seq_idx must be (batch, seqlen), in int32");
    p.seq_batch = seq_idx->stride(0);
    p.seq_time = reverse ? -seq_idx->stride(1) : seq_idx->stride(1);
    p.seq_idx = seq_idx->const_data_ptr<std::int32_t>() + (reverse ? (p.seqlen - 1) * seq_idx->stride(1) : 0);
  }
  conv.time_fastest = p.dim > 1 && x.stride(1) != 1;
  return conv;
}

// Whether every four neighbouring channels of an array lie side by side, aligned to them all.
bool has_rows(const ConvArray& a, const ConvProblem& p) {
  const i64 size = element_size(p.dtype);
  return a.data == nullptr ||
         (a.dim == 1 && a.batch % 4 == 0 && a.time % 4 == 0 && std::abs(a.time) * size < (1ll << 31) &&
          reinterpret_cast<std::uintptr_t>(a.data) % (4 * size) == 0);
}

// How the kernels for rows divide time: `chunks` blocks of warps that walk through `chunk` steps each. No more blocks
// than the device holds at one time, of walks that are neither short, beside what they look back, nor long.
void divide_rows(const ConvProblem& p, i64 resident_blocks, i64& chunk, i64& chunks) {
  constexpr i64 kShortest = 8 * kRowConvWarps, kLongest = 64 * kRowConvWarps;  // steps of a block
  const i64 rows = std::max<i64>(p.batch * conv_rows_columns(p), 1);
  const i64 most = (p.seqlen + kShortest - 1) / kShortest, least = (p.seqlen + kLongest - 1) / kLongest;
  chunks = std::clamp(resident_blocks / rows, least, std::max(most, least));
  chunk = (p.seqlen + chunks * kRowConvWarps - 1) / std::max<i64>(chunks * kRowConvWarps, 1);
}

bool fits_rows(const ConvProblem& p) { return p.dim % 4 == 0 && p.seq_idx == nullptr && p.seqlen < (1ll << 31) - 64; }

// Chooses the kernel and how it divides time; p's arrays are known.
bool divide(GpuConv& conv, bool backward) {
  const ConvProblem& p = conv.p;
  bool by_rows = fits_rows(p);
  for (const ConvArray* a : {&p.x, &p.out, &p.dout, &p.dx, &p.dx_addend}) by_rows &= has_rows(*a, p);
  if (!by_rows) {
    conv.chunk = backward ? kBackwardConvChunk : kForwardConvChunk;
    conv.chunks = (p.seqlen + conv.chunk - 1) / conv.chunk;
    return false;
  }
  divide_rows(p, conv_rows_resident_blocks(backward), conv.chunk, conv.chunks);
  return true;
}
const char* launch(const GpuConv& conv, bool rows, bool backward, void* stream) {
  return rows ? launch_conv_rows(conv, backward, stream) : launch_conv(conv, backward, stream);
}

}  // namespace

Tensor conv_fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& seq_idx,
                const OptionalTensor& initial_states, bool silu, bool reverse, Scratch* scratch) {
  const DeviceOf device(x);
  GpuConv conv = conv_of(x, weight, bias, seq_idx, initial_states, silu, reverse);
  Tensor out = empty_in_layout_of(x, scratch);
  conv.p.out = in_scan_order(out, x, reverse, "out");
  const bool rows = divide(conv, false);
  if (x.numel() > 0) check_launch(launch(conv, rows, false, device.stream()));
  return out;
}

ConvGradients conv_bwd(const Tensor& dout, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& seq_idx, const OptionalTensor& initial_states, bool silu, bool reverse,
                       const OptionalTensor& dx_addend, const OptionalTensor& dx_target, Scratch* scratch) {
  const DeviceOf device(x);
  GpuConv conv = conv_of(x, weight, bias, seq_idx, initial_states, silu, reverse);
  ConvProblem& p = conv.p;
  const Tensor dx = dx_target.has_value() ? *dx_target : empty_in_layout_of(x);
  OptionalTensor dinitial;
  p.dout = in_scan_order(dout, x, reverse, "dout");
  p.dx = in_scan_order(dx, x, reverse, "dx");
  if (dx_addend.has_value()) p.dx_addend = in_scan_order(*dx_addend, x, reverse, "dx_addend");
  if (initial_states.has_value()) {
    dinitial = new_tensor(x, {p.batch, p.dim, p.width - 1});
    p.dinitial = array_of(*dinitial);
  }
  const bool rows = divide(conv, true);
  const i64 walks = p.batch * conv.chunks, weights = p.dim * p.width, size = weights + p.dim;
  Scratch own_scratch(x);
  p.partial = (scratch == nullptr ? own_scratch : *scratch).float_memory(walks * size);
  const auto result = [&](const Sizes& sizes) {
    return scratch == nullptr ? new_floats(x, sizes) : scratch->floats(sizes);
  };
  const Tensor dweight = result({p.dim, p.width}), dbias = result({p.dim});
  if (x.numel() > 0) check_launch(launch(conv, rows, true, device.stream()));
  const RowSums sums[] = {{p.partial, walks, size, weights, dweight.mutable_data_ptr<float>()},
                          {p.partial + weights, walks, size, p.dim, dbias.mutable_data_ptr<float>()}};
  if (p.dim > 0) check_launch(launch_sum_rows(sums, 2, device.stream()));
  return {dx, dweight, dbias, dinitial};
}

namespace {

// Null where the kernel for pairs does not take this one.
std::optional<GpuConvPair> pair_of(const Tensor (&dout)[2], const Tensor& x, const ConvFilter (&filters)[2],
                                   const Tensor& dx) {
  const GpuConv one = conv_of(x, filters[0].weight, filters[0].bias, std::nullopt, std::nullopt, true, false);
  const GpuConv other = conv_of(x, filters[1].weight, filters[1].bias, std::nullopt, std::nullopt, true, false);
  GpuConvPair pair{one.p, {one.weight, other.weight}, {one.bias, other.bias}, {}, 0, 0};
  pair.p.dx = in_scan_order(dx, x, false, "dx");
  bool fits = fits_rows(one.p) && one.p.width == other.p.width && x.numel() > 0;
  for (int i = 0; i < 2; ++i) pair.dout[i] = in_scan_order(dout[i], x, false, "dout");
  for (const ConvArray* a : {&pair.p.x, &pair.p.dx, &pair.dout[0], &pair.dout[1]}) fits &= has_rows(*a, one.p);
  if (!fits) return std::nullopt;
  divide_rows(pair.p, conv_pair_resident_blocks(), pair.chunk, pair.chunks);
  return pair;
}

}  // namespace

ConvPairGradients conv_pair_bwd(const Tensor (&dout)[2], const Tensor& x, const ConvFilter (&filters)[2],
                                const Tensor& dx, Scratch& scratch) {
  const DeviceOf device(x);
  std::optional<GpuConvPair> pair = pair_of(dout, x, filters, dx);
  if (!pair.has_value()) return conv_each_bwd(dout, x, filters, dx, scratch);
  ConvProblem& p = pair->p;
  const i64 walks = p.batch * pair->chunks, weights = p.dim * p.width, size = weights + p.dim;
  p.partial = scratch.float_memory(walks * 2 * size);
  const ConvPairGradients result{{scratch.floats({p.dim, p.width}), scratch.floats({p.dim, p.width})},
                                 {scratch.floats({p.dim}), scratch.floats({p.dim})}};
  check_launch(launch_conv_pair(*pair, device.stream()));
  RowSums sums[4];
  for (int i = 0; i < 2; ++i) {
    const float* rows = p.partial + i * size;
    sums[2 * i] = {rows, walks, 2 * size, weights, result.dweight[i].mutable_data_ptr<float>()};
    sums[2 * i + 1] = {rows + weights, walks, 2 * size, p.dim, result.dbias[i].mutable_data_ptr<float>()};
  }
  check_launch(launch_sum_rows(sums, 4, device.stream()));
  return result;
}

namespace {

const std::int32_t* indices_of(const OptionalTensor& tensor, i64 batch, const char* name) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Int && tensor->numel() == batch && tensor->is_contiguous(), name,
                  " must be int32, (batch,), contiguous");
  return tensor->const_data_ptr<std::int32_t>();
}

Tensor conv_update(const Tensor& x, const Tensor& conv_state, const Tensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& cache_seqlens, const OptionalTensor& conv_state_indices, bool silu) {
  const DeviceOf device(x);
  Tensor out = empty_in_layout_of(x);
  GpuConvUpdate update{};
  ConvUpdate& p = update.p;
  p.batch = x.size(0);
  p.dim = x.size(1);
  p.seqlen = x.size(2);
  p.state_len = conv_state.size(2);
  p.width = static_cast<int>(weight.size(1));
  p.dtype = kernel_dtype(x, "x");
  p.state_dtype = kernel_dtype(conv_state, "conv_state");
  p.silu = silu;
  p.x = array_of(x);
  p.out = array_of(out);
  p.state = array_of(conv_state);
  p.cache_seqlens = indices_of(cache_seqlens, p.batch, "cache_seqlens");
  p.state_indices = indices_of(conv_state_indices, p.batch, "conv_state_indices");
  update.weight = parameter(weight, "weight");
  update.bias = parameter(bias, p.dim, "bias");
  update.rows = conv_state.size(0);
  STD_TORCH_CHECK(p.width >= 2 && p.width <= 4 && p.state_len >= p.width - 1 && weight.size(0) == p.dim &&
                      conv_state.size(1) == p.dim && (p.state_indices != nullptr || update.rows == p.batch),
                  "conv_state must be (batch, dim, state_len >= width - 1) and weight (dim, width)");
  if (x.numel() > 0) check_launch(launch_conv_update(update, device.stream()));
  return out;
}

}  // namespace
}  // namespace mamba_ssm

MAMBA_SSM_CUDA_IMPL(causal_conv1d, m) {
  m.impl("conv_fwd", TORCH_BOX(&mamba_ssm::conv_fwd_operator));
  m.impl("conv_bwd", TORCH_BOX(&mamba_ssm::conv_bwd_operator));
  m.impl("conv_update", TORCH_BOX(&mamba_ssm::conv_update));
}
