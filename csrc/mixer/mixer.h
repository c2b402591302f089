// The operators mamba_ssm::mixer_fwd and _bwd of every device: a whole mixer in one call. Schemas and what the
// arguments mean are in mamba_ssm/ops/mamba_inner.py.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../causal_conv1d/conv_ops.h"
#include "../selective_scan/scan_arguments.h"
#include "matrix_jobs.h"

namespace mamba_ssm {

// ---- each library's own --------------------------------------------------------------------------------------------

// Products of matrices want their rows, and so the parts of a row, to begin at multiples of so many elements.
extern const std::int64_t kColumnAlignment;

// out = a b + addend, which may be out itself or one row for all; out may be a part of a larger matrix.
void multiply_matrices(const Tensor& out, const Tensor& a, const Tensor& b, const OptionalTensor& addend = {});
void run_matrix_jobs(const std::vector<MatrixJob>& jobs, const Tensor& like);

// ---- a mixer's parameters ------------------------------------------------------------------------------------------

// Where the outer projections' tensors are among all parameters.
enum OuterTensor { kInWeight, kInBias, kOutWeight, kOutBias, kOuterTensors };

struct OuterProjections {
  OptionalTensor in_weight;  // (2 channels, inputs): gives x, then z; without, they are given
  OptionalTensor in_bias;
  OptionalTensor out_weight;  // (outputs, channels); without, the gated sum is the result
  OptionalTensor out_bias;

  // inputs: the last dimension of hidden_states.
  void check(std::int64_t inputs, std::int64_t channels) const {
    STD_TORCH_CHECK(in_weight.has_value() || (!in_bias.has_value() && inputs == 2 * channels),
                    "hidden_states: expected x and z, ", 2 * channels, " columns, where there is no in_proj_weight");
    STD_TORCH_CHECK(out_weight.has_value() ? out_weight->dim() == 2 : !out_bias.has_value(),
                    "out_proj_weight must be (outputs, channels), or None and so its bias");
    check_shape(in_weight, {2 * channels, inputs}, "in_proj_weight");
    check_shape(in_bias, {2 * channels}, "in_proj_bias");
    if (!out_weight.has_value()) return;
    check_shape(out_weight, {out_weight->size(0), channels}, "out_proj_weight");
    check_shape(out_bias, {out_weight->size(0)}, "out_proj_bias");
  }
};

constexpr int kDirectionTensors = 7;
constexpr std::int64_t kMostStates = 256;

struct MixerDirection {
  Tensor conv_weight;  // (channels, 1, width)
  OptionalTensor conv_bias;
  Tensor x_proj_weight;  // (rank + 2 states, channels)
  Tensor dt_weight;      // (channels, rank)
  OptionalTensor dt_bias;
  Tensor A_log;  // (channels, states)
  OptionalTensor D;
  bool reverse;
  int index;  // of the direction's first tensor among all parameters
  std::int64_t channels, rank, states;
  // A row of x_proj's output, and of its gradient: the inputs of Δ, B, C, each beginning at an aligned column.
  std::int64_t rank_columns, state_columns, columns;

  MixerDirection(const OptionalTensor* tensors, bool reverse, int index)
      : conv_weight(*tensors[0]),
        conv_bias(tensors[1]),
        x_proj_weight(required(tensors[2], "x_proj_weight")),
        dt_weight(required(tensors[3], "dt_weight")),
        dt_bias(tensors[4]),
        A_log(required(tensors[5], "A_log")),
        D(tensors[6]),
        reverse(reverse),
        index(index) {
    STD_TORCH_CHECK(A_log.dim() == 2 && dt_weight.dim() == 2 && conv_weight.dim() == 3,
                    "A_log must be (channels, states), dt_weight (channels, rank), conv_weight (channels, 1, width)");
    channels = A_log.size(0), states = A_log.size(1), rank = dt_weight.size(1);
    STD_TORCH_CHECK(states >= 1 && states <= kMostStates, "A_log has ", states, " states, but must have 1 to ",
                    kMostStates);
    kernel_dtype(conv_weight, "conv_weight");
    if (conv_bias.has_value()) kernel_dtype(*conv_bias, "conv_bias");
    check_shape(conv_weight, {channels, 1, conv_weight.size(2)}, "conv_weight");
    check_shape(x_proj_weight, {rank + 2 * states, channels}, "x_proj_weight");
    check_shape(dt_weight, {channels, rank}, "dt_weight");
    for (const OptionalTensor* vector : {&conv_bias, &dt_bias, &D}) check_shape(*vector, {channels}, "a bias, or D,");
    const auto aligned = [](std::int64_t n) {
      return (n + kColumnAlignment - 1) / kColumnAlignment * kColumnAlignment;
    };
    rank_columns = aligned(rank), state_columns = aligned(states), columns = rank_columns + 2 * state_columns;
  }

  bool has_gaps_between_states() const { return state_columns != states; }
  Tensor conv_rows() const {
    return view_of(conv_weight, {channels, conv_weight.size(2)}, {conv_weight.stride(0), conv_weight.stride(2)});
  }

 private:
  static const Tensor& required(const OptionalTensor& t, const char* name) {
    STD_TORCH_CHECK(t.has_value(), name, ": got None beside a conv_weight");
    return *t;
  }
};

// In the order of the schemas: the outer projections', then each direction's.
using MixerParameters = std::array<OptionalTensor, kOuterTensors + 2 * kDirectionTensors>;

inline OuterProjections outer_projections(const MixerParameters& parameters) {
  return {parameters[kInWeight], parameters[kInBias], parameters[kOutWeight], parameters[kOutBias]};
}
inline std::vector<MixerDirection> mixer_directions(const MixerParameters& parameters) {
  std::vector<MixerDirection> directions;
  for (int i = 0; i < 2; ++i) {
    const int first = kOuterTensors + i * kDirectionTensors;
    if (parameters[first].has_value()) {
      directions.emplace_back(&parameters[first], i == 1, first);
      continue;
    }
    for (int t = first; t < first + kDirectionTensors; ++t) {
      STD_TORCH_CHECK(!parameters[t].has_value(), "conv_weight: got None beside other parameters of its direction");
    }
  }
  STD_TORCH_CHECK(!directions.empty(), "conv_weight: got None for both directions");
  return directions;
}

// ---- matrices ------------------------------------------------------------------------------------------------------

// (batch, channels, length) as (batch · length, channels), without a copy where t is channel-last.
inline Tensor rows_of(const Tensor& t) {
  const std::int64_t rows = t.size(0) * t.size(2);
  if (t.size(0) == 1 || t.stride(0) == t.size(2) * t.stride(2)) {
    return view_of(t, {rows, t.size(1)}, {t.stride(2), t.stride(1)});
  }
  return torch::stable::reshape(transposed(t, 1, 2), {rows, t.size(1)});
}
// (batch · length, channels) as (batch, channels, length).
inline Tensor sequences_of(const Tensor& rows, const Tensor& like) {
  const std::int64_t length = like.size(2);
  return view_of(rows, {like.size(0), rows.size(1), length}, {length * rows.stride(0), rows.stride(1), rows.stride(0)});
}
inline Tensor multiply(const Tensor& a, const Tensor& b, const OptionalTensor& addend = {}) {
  Tensor out = new_tensor(a, {a.size(0), b.size(1)});
  multiply_matrices(out, a, b, addend);
  return out;
}
inline Tensor transposed(const Tensor& t) { return transposed(t, 0, 1); }
inline Tensor to_float(const Tensor& t) {
  kernel_dtype(t, "parameter");  // throws for others
  return as_contiguous(t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float));
}
inline OptionalTensor to_float(const OptionalTensor& t) { return t.has_value() ? to_float(*t) : t; }

// A matrix, a vector as one row, or a convolution's weight, (channels, 1, width), as jobs read and write them.
struct MatrixView {
  void* data;
  Dtype dtype;
  std::int64_t row, column;  // distances in elements
  std::int64_t rows, columns;

  explicit MatrixView(const Tensor& t)
      : data(t.data_ptr()),
        dtype(kernel_dtype(t, "parameter")),
        row(t.dim() > 1 ? t.stride(0) : 0),
        column(t.stride(t.dim() - 1)),
        rows(t.dim() > 1 ? t.size(0) : 1),
        columns(t.size(t.dim() - 1)) {}

  MatrixView part(std::int64_t first_row, std::int64_t row_count, std::int64_t first_column,
                  std::int64_t column_count) const {
    MatrixView result = *this;
    result.data = static_cast<char*>(data) + (first_row * row + first_column * column) * element_size(dtype);
    result.rows = row_count, result.columns = column_count;
    return result;
  }
  MatrixView rows_from(std::int64_t first, std::int64_t count) const { return part(first, count, 0, columns); }
  MatrixView columns_from(std::int64_t first, std::int64_t count) const { return part(0, rows, first, count); }
  MatrixView transposed() const {
    MatrixView result = *this;
    std::swap(result.row, result.column);
    std::swap(result.rows, result.columns);
    return result;
  }
};
// to = from
inline MatrixJob copy_job(const MatrixView& from, const MatrixView& to) {
  return {from.data, from.dtype, from.row, from.column, nullptr, false, to.data, to.dtype, to.row, to.rows, to.columns};
}
inline MatrixJob zero_job(const MatrixView& to) {
  MatrixJob job = copy_job(to, to);
  job.from = nullptr;
  return job;
}

// The parts of x_proj's output, of its gradient or of the rows of its weight: where a part lies in a row, and where it
// would without gaps.
struct Part {
  std::int64_t column, width, packed;
};
inline std::array<Part, 3> parts_of(const MixerDirection& d) {
  return {Part{0, d.rank, 0}, Part{d.rank_columns, d.states, d.rank},
          Part{d.rank_columns + d.state_columns, d.states, d.rank + d.states}};
}

// What is made of the parameters before use. The weights of the outer projections and of x_proj are transposed for the
// forward pass, (inputs, outputs).
struct PreparedDirection {
  Tensor A;           // (channels, states) float32: −exp(A_log)
  Tensor x_proj;      // (columns, channels) in the activations' dtype, zeros in the gaps
  OptionalTensor dt;  // (channels, rank_columns) in the activations' dtype, for the backward pass
  Tensor dt_float;    // (channels, rank) float32
  OptionalTensor dt_bias, D;
};
struct PreparedMixer {
  OuterProjections outer;  // in the activations' dtype
  std::vector<PreparedDirection> directions;
};
inline PreparedMixer prepare(const OuterProjections& outer, const std::vector<MixerDirection>& directions,
                             const Tensor& activations, bool backward, Scratch& scratch) {
  std::vector<MatrixJob> jobs;
  const ScalarType dtype = activations.scalar_type();
  // A weight (outputs, inputs), and how jobs write it.
  const auto weight = [&](std::int64_t outputs, std::int64_t inputs) {
    return backward ? scratch.tensor({outputs, inputs}, dtype) : scratch.by_columns(inputs, outputs, dtype);
  };
  const auto written = [&](const Tensor& t) { return backward ? MatrixView(t) : MatrixView(t).transposed(); };
  const auto convert_weight = [&](OptionalTensor& t) {
    if (!t.has_value()) return;
    if (t->scalar_type() == dtype) {
      if (!backward) t = transposed(*t);
      return;
    }
    const Tensor converted = weight(t->size(0), t->size(1));
    jobs.push_back(copy_job(MatrixView(*t), written(converted)));
    t = converted;
  };
  const auto convert_bias = [&](OptionalTensor& t) {
    if (!t.has_value() || t->scalar_type() == dtype) return;
    const Tensor converted = scratch.tensor(sizes_of(*t), dtype);
    jobs.push_back(copy_job(MatrixView(*t), MatrixView(converted)));
    t = converted;
  };
  PreparedMixer prepared{outer, {}};
  convert_weight(prepared.outer.in_weight);
  convert_weight(prepared.outer.out_weight);
  if (!backward) {
    convert_bias(prepared.outer.in_bias);
    convert_bias(prepared.outer.out_bias);
  }
  for (const MixerDirection& d : directions) {
    PreparedDirection p{scratch.floats({d.channels, d.states}),
                        weight(d.columns, d.channels),
                        backward ? OptionalTensor(scratch.tensor({d.channels, d.rank_columns}, dtype)) : std::nullopt,
                        to_float(d.dt_weight),
                        to_float(d.dt_bias),
                        to_float(d.D)};
    jobs.push_back(copy_job(MatrixView(d.A_log), MatrixView(p.A)));
    jobs.back().negative_exponential = true;
    const MatrixView from(d.x_proj_weight), to = written(p.x_proj);
    std::int64_t end = 0;
    const auto fill_to = [&](std::int64_t column) {
      if (column > end) jobs.push_back(zero_job(to.rows_from(end, column - end)));
    };
    for (const Part& part : parts_of(d)) {
      fill_to(part.column);
      jobs.push_back(copy_job(from.rows_from(part.packed, part.width), to.rows_from(part.column, part.width)));
      end = part.column + part.width;
    }
    fill_to(d.columns);
    if (backward) {
      const MatrixView dt(*p.dt);
      jobs.push_back(copy_job(MatrixView(d.dt_weight), dt.columns_from(0, d.rank)));
      if (d.rank_columns > d.rank) jobs.push_back(zero_job(dt.columns_from(d.rank, d.rank_columns - d.rank)));
    }
    prepared.directions.push_back(std::move(p));
  }
  run_matrix_jobs(jobs, activations);
  return prepared;
}

// The parts of x_proj's output or of its gradient, (batch · length, columns), as (batch, width, length).
inline std::array<Tensor, 3> split(const MixerDirection& d, const Tensor& rows, const Tensor& like) {
  const std::int64_t length = like.size(2), row = rows.stride(0), column = rows.stride(1);
  const auto part = [&](const Part& p) {
    return view_of(rows, {like.size(0), p.width, length}, {length * row, column, row}, p.column * column);
  };
  const auto parts = parts_of(d);
  return {part(parts[0]), part(parts[1]), part(parts[2])};
}

// ---- convolutions --------------------------------------------------------------------------------------------------

inline ConvFilter filter_of(const MixerDirection& d) { return {d.conv_rows(), d.conv_bias}; }

// silu(conv(x)), in scratch memory
inline Tensor convolve(const MixerDirection& d, const Tensor& x, Scratch& scratch) {
  return conv_fwd(x, d.conv_rows(), d.conv_bias, std::nullopt, std::nullopt, true, d.reverse, &scratch);
}
struct FilterGradients {
  std::vector<Tensor> dweight, dbias;  // of each direction
};
// Sets dx.
inline FilterGradients return_through_convolutions(const std::vector<MixerDirection>& directions, const Tensor& x,
                                                   const std::vector<Tensor>& du, const Tensor& dx, Scratch& scratch) {
  if (directions.size() == 1) {
    const ConvFilter f = filter_of(directions[0]);
    const ConvGradients g = conv_bwd(du[0], x, f.weight, f.bias, std::nullopt, std::nullopt, true,
                                     directions[0].reverse, std::nullopt, dx, &scratch);
    return {{g.dweight}, {g.dbias}};
  }
  const ConvPairGradients g =
      conv_pair_bwd({du[0], du[1]}, x, {filter_of(directions[0]), filter_of(directions[1])}, dx, scratch);
  return {{g.dweight[0], g.dweight[1]}, {g.dbias[0], g.dbias[1]}};
}

// ---- the operators -------------------------------------------------------------------------------------------------

// Half of in_proj's output or of its gradient, (batch, length, 2 channels), as (batch, channels, length).
inline Tensor half_of(const Tensor& xz, int index) {
  const std::int64_t length = xz.size(1), channels = xz.size(2) / 2;
  return view_of(xz, {xz.size(0), channels, length}, {length * 2 * channels, 1, 2 * channels}, index * channels);
}
inline Tensor as_rows(const Tensor& t) {  // (batch, length, channels), contiguous, as (batch · length, channels)
  return view_of(t, {t.size(0) * t.size(1), t.size(2)}, {t.size(2), 1});
}

using MixerResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// What is kept is empty where it would be an input or the result itself.
inline MixerResults mixer_forward(Tensor hidden_states, OptionalTensor in_proj_weight, OptionalTensor in_proj_bias,
                                  OptionalTensor out_proj_weight, OptionalTensor out_proj_bias,
                                  OptionalTensor conv_weight, OptionalTensor conv_bias, OptionalTensor x_proj_weight,
                                  OptionalTensor dt_weight, OptionalTensor dt_bias, OptionalTensor A_log,
                                  OptionalTensor D, OptionalTensor conv_weight_b, OptionalTensor conv_bias_b,
                                  OptionalTensor x_proj_weight_b, OptionalTensor dt_weight_b, OptionalTensor dt_bias_b,
                                  OptionalTensor A_b_log, OptionalTensor D_b, double scale, bool delta_softplus,
                                  std::string method, std::int64_t checkpoint_steps) {
  const MixerParameters parameters{
      in_proj_weight, in_proj_bias,    out_proj_weight, out_proj_bias, conv_weight, conv_bias,
      x_proj_weight,  dt_weight,       dt_bias,         A_log,         D,           conv_weight_b,
      conv_bias_b,    x_proj_weight_b, dt_weight_b,     dt_bias_b,     A_b_log,     D_b};
  const OuterProjections outer = outer_projections(parameters);
  const auto directions = mixer_directions(parameters);
  STD_TORCH_CHECK(hidden_states.dim() == 3 && hidden_states.numel() > 0,
                  "hidden_states must be (batch, length, inputs), each at least 1");
  for (const OptionalTensor& t : parameters) {
    STD_TORCH_CHECK(!t.has_value() || on_one_device(*t, hidden_states), "parameters must be where hidden_states is");
  }
  const std::int64_t batch = hidden_states.size(0), length = hidden_states.size(1), channels = directions[0].channels;
  outer.check(hidden_states.size(2), channels);
  const Tensor hidden = as_contiguous(hidden_states);
  Scratch scratch(hidden), passing(hidden);  // passing: of one direction
  const PreparedMixer prepared = prepare(outer, directions, hidden, false, scratch);
  Tensor xz = hidden;
  if (outer.in_weight.has_value()) {
    xz = new_tensor(hidden, {batch, length, 2 * channels});
    multiply_matrices(as_rows(xz), as_rows(hidden), *prepared.outer.in_weight, prepared.outer.in_bias);
  }
  const Tensor x = half_of(xz, 0), z = half_of(xz, 1);
  OptionalTensor sum;
  std::array<OptionalTensor, 4> kept;
  for (std::size_t i = 0; i < directions.size(); ++i) {
    const MixerDirection& d = directions[i];
    const PreparedDirection& p = prepared.directions[i];
    const bool last = i + 1 == directions.size();
    const Tensor u = convolve(d, x, passing);
    const Tensor projected = multiply(rows_of(u), p.x_proj);
    const auto [dt, B, C] = split(d, projected, u);
    const ScanArguments arguments{u,
                                  dt,
                                  p.A,
                                  B,
                                  C,
                                  p.D,
                                  last ? OptionalTensor(z) : std::nullopt,
                                  p.dt_bias,
                                  p.dt_float,
                                  last ? scale : 1.0,
                                  delta_softplus,
                                  d.reverse,
                                  method};
    const auto [out, last_state, checkpoints] =
        scan_forward(arguments, std::nullopt, sum, !last, checkpoint_steps, false, &passing);
    sum = out;
    kept[d.reverse ? 2 : 0] = projected;
    kept[d.reverse ? 3 : 1] = checkpoints;
    passing.release();
  }
  const auto nothing = [&] { return new_tensor(hidden, {0}); };
  const auto result = [&](int i) { return kept[i].has_value() ? *kept[i] : nothing(); };
  Tensor y = *sum, out;
  if (outer.out_weight.has_value()) {
    out = new_tensor(hidden, {batch, length, outer.out_weight->size(0)});
    multiply_matrices(as_rows(out), rows_of(y), *prepared.outer.out_weight, prepared.outer.out_bias);
  } else {
    out = transposed(y, 1, 2);
    y = nothing();
  }
  return {out, outer.in_weight.has_value() ? xz : nothing(), y, result(0), result(1), result(2), result(3)};
}

using MixerGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                  Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline MixerGradients mixer_backward(Tensor dout, Tensor hidden_states, OptionalTensor in_proj_weight,
                                     OptionalTensor in_proj_bias, OptionalTensor out_proj_weight,
                                     OptionalTensor out_proj_bias, OptionalTensor conv_weight, OptionalTensor conv_bias,
                                     OptionalTensor x_proj_weight, OptionalTensor dt_weight, OptionalTensor dt_bias,
                                     OptionalTensor A_log, OptionalTensor D, OptionalTensor conv_weight_b,
                                     OptionalTensor conv_bias_b, OptionalTensor x_proj_weight_b,
                                     OptionalTensor dt_weight_b, OptionalTensor dt_bias_b, OptionalTensor A_b_log,
                                     OptionalTensor D_b, Tensor xz, Tensor y, Tensor projected, Tensor checkpoints,
                                     Tensor projected_b, Tensor checkpoints_b, double scale, bool delta_softplus,
                                     std::string method, std::int64_t checkpoint_steps, std::int64_t needed) {
  const MixerParameters parameters{
      in_proj_weight, in_proj_bias,    out_proj_weight, out_proj_bias, conv_weight, conv_bias,
      x_proj_weight,  dt_weight,       dt_bias,         A_log,         D,           conv_weight_b,
      conv_bias_b,    x_proj_weight_b, dt_weight_b,     dt_bias_b,     A_b_log,     D_b};
  const OuterProjections outer = outer_projections(parameters);
  const auto directions = mixer_directions(parameters);
  const Tensor hidden = as_contiguous(hidden_states), dout_rows = as_rows(as_contiguous(dout));
  Scratch scratch(hidden), passing(hidden);  // passing: of one direction
  const PreparedMixer prepared = prepare(outer, directions, hidden, true, scratch);
  const auto nothing = [&] { return new_tensor(hidden, {0}); };
  const auto needs = [&](int index) { return parameters[index].has_value() && (needed >> (index + 1) & 1) != 0; };
  const bool needs_hidden = (needed & 1) != 0;
  std::vector<Tensor> gradients;
  for (int i = 0; i < static_cast<int>(parameters.size()); ++i) {
    gradients.push_back(needs(i) ? new_tensor(*parameters[i], sizes_of(*parameters[i])) : nothing());
  }
  std::vector<MatrixJob> jobs;
  std::vector<Tensor> alive;  // what the jobs read
  // The product of two matrices, in scratch memory.
  const auto product = [&](const Tensor& a, const Tensor& b) {
    const Tensor out = scratch.tensor({a.size(0), b.size(1)}, hidden.scalar_type());
    multiply_matrices(out, a, b);
    return out;
  };
  // The gradient of a parameter, of what there is of it by now; of one that needs none, nothing.
  const auto finish = [&](int index, const MatrixView& from) {
    if (needs(index)) jobs.push_back(copy_job(from, MatrixView(gradients[index])));
  };
  const auto finish_weight = [&](int index, const Tensor& doutputs, const Tensor& inputs) {
    if (!needs(index)) return;
    const Tensor& to = gradients[index];
    if (to.scalar_type() == hidden.scalar_type()) {
      multiply_matrices(to, transposed(doutputs), inputs);
    } else {
      alive.push_back(product(transposed(doutputs), inputs));
      finish(index, MatrixView(alive.back()));
    }
  };
  const auto finish_bias = [&](int index, const Tensor& doutputs) {
    constexpr std::int64_t kRows = 0;
    if (!needs(index)) return;
    alive.push_back(
        torch::stable::sum(doutputs, torch::headeronly::IntHeaderOnlyArrayRef(&kRows, 1), false, ScalarType::Float));
    finish(index, MatrixView(alive.back()));
  };

  if (!outer.in_weight.has_value()) xz = hidden;
  const Tensor x = half_of(xz, 0), z = half_of(xz, 1);
  OptionalTensor dy_rows;
  if (outer.out_weight.has_value()) {
    finish_weight(kOutWeight, dout_rows, rows_of(y));
    finish_bias(kOutBias, dout_rows);
    dy_rows = multiply(dout_rows, *prepared.outer.out_weight);
  }
  const Tensor dy = sequences_of(dy_rows.has_value() ? *dy_rows : dout_rows, x);
  const Tensor dxz = new_tensor(hidden, sizes_of(xz));
  const Tensor dx = half_of(dxz, 0), dz_target = half_of(dxz, 1);
  std::vector<Tensor> dinputs;
  OptionalTensor dz;
  for (std::size_t i = 0; i < directions.size(); ++i) {
    const MixerDirection& d = directions[i];
    const PreparedDirection& p = prepared.directions[i];
    const bool last = i + 1 == directions.size();
    const Tensor& kept = d.reverse ? projected_b : projected;
    const Tensor u = convolve(d, x, passing);
    const auto [dt, B, C] = split(d, kept, u);
    const ScanArguments arguments{u,         dt,    p.A, B, C, p.D, z, p.dt_bias, p.dt_float, scale, delta_softplus,
                                  d.reverse, method};
    const Tensor dprojected = new_tensor(x, sizes_of(kept));
    // Nothing below writes these; the columns between those of Δ's inputs and B's, the product does.
    if (d.has_gaps_between_states()) TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(dprojected.get()));
    const auto [ddt, dB, dC] = split(d, dprojected, u);
    const auto as_group = [](const Tensor& t) {  // (batch, 1, states, length)
      return view_of(t, {t.size(0), 1, t.size(1), t.size(2)}, {t.stride(0), 0, t.stride(1), t.stride(2)});
    };
    const GradientTargets targets{as_group(dB), as_group(dC), dz_target, scratch, passing};
    const auto [du, ddelta, dA, unused_dB, unused_dC, dD, dz_sum, ddt_bias, dinitial_state] = scan_backward(
        arguments, dy, std::nullopt, dz, d.reverse ? checkpoints_b : checkpoints, !last, checkpoint_steps, &targets);
    dz = dz_sum;

    const Tensor ddelta_rows = rows_of(ddelta), du_rows = rows_of(du);
    const auto dt_columns = [&](const Tensor& rows) { return part_of(rows, 1, 0, d.rank_columns); };
    multiply_matrices(dt_columns(dprojected), ddelta_rows, *p.dt);
    if (needs(d.index + 2)) {
      alive.push_back(product(transposed(dprojected), rows_of(u)));
      const MatrixView from(alive.back()), to(gradients[d.index + 2]);
      for (const Part& part : parts_of(d)) {
        jobs.push_back(copy_job(from.rows_from(part.column, part.width), to.rows_from(part.packed, part.width)));
      }
    }
    if (needs(d.index + 3)) {
      alive.push_back(product(transposed(dt_columns(kept)), ddelta_rows));  // (rank, channels): faster this way
      finish(d.index + 3, MatrixView(alive.back()).rows_from(0, d.rank).transposed());
    }
    multiply_matrices(du_rows, dprojected, p.x_proj, du_rows);
    dinputs.push_back(sequences_of(du_rows, u));

    if (d.dt_bias.has_value()) finish(d.index + 4, MatrixView(ddt_bias));
    if (needs(d.index + 5)) {
      finish(d.index + 5, MatrixView(dA));
      jobs.back().factor = float_data(p.A);  // dA/d(A_log) = A
    }
    if (d.D.has_value()) finish(d.index + 6, MatrixView(dD));
    alive.insert(alive.end(), {ddt_bias, dA, dD});
    passing.release();
  }
  const FilterGradients conv = return_through_convolutions(directions, x, dinputs, dx, scratch);
  for (std::size_t i = 0; i < directions.size(); ++i) {
    finish(directions[i].index, MatrixView(conv.dweight[i]));
    if (directions[i].conv_bias.has_value()) finish(directions[i].index + 1, MatrixView(conv.dbias[i]));
  }
  Tensor dhidden = dxz;
  if (outer.in_weight.has_value()) {
    const Tensor dxz_rows = as_rows(dxz);
    finish_weight(kInWeight, dxz_rows, as_rows(hidden));
    finish_bias(kInBias, dxz_rows);
    dhidden = needs_hidden ? new_tensor(hidden, sizes_of(hidden)) : nothing();
    if (needs_hidden) multiply_matrices(as_rows(dhidden), dxz_rows, *prepared.outer.in_weight);
  } else if (!needs_hidden) {
    dhidden = nothing();
  }
  run_matrix_jobs(jobs, hidden);
  const auto& g = gradients;
  return {dhidden, g[0],  g[1],  g[2],  g[3],  g[4],  g[5],  g[6],  g[7], g[8],
          g[9],    g[10], g[11], g[12], g[13], g[14], g[15], g[16], g[17]};
}

}  // namespace mamba_ssm
