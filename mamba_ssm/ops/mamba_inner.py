"""A Mamba block's mixer: causal convolution, input-dependent Δ, B and C, selective scan, output projection.

Names, argument order and meaning of the `*_inner_*` functions are those of the public `mamba_ssm` 1.x and of its
bidirectional extension in Vim (Zhu et al., 2024), with `discretization_method` and `use_cuda_kernel` as keywords beside
them. Activations have the logical shape (B, D, L) with any strides; channel-last memory, i.e. a transposed view of
(B, L, D), is the fast path and is never copied.

`mixer_fn` is a whole mixer in one operator and one autograd node: the convolution's output and Δ are made again in the
backward pass instead of being kept, gradients of one tensor are summed as they arise, and parameters are converted
together.

Shapes, for all `*_inner_*` functions: xz (B, 2D, L); conv1d_weight (D, 1, W); x_proj_weight (R [+ N] [+ N], D), whose
rows give the R inputs of Δ, then B, then C, the last two unless they are passed; delta_proj_weight (D, R);
out_proj_weight (E, D); A (D, N); B and C as in `selective_scan_fn`; D, delta_bias (D,); B_proj_bias, C_proj_bias (N,).
An unknown `discretization_method` raises ValueError and lists the known ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from causal_conv1d import causal_conv1d_fn, causal_conv1d_ref
from causal_conv1d.ops import conv_backward_flops, conv_flops
from mamba_ssm._backend import KERNEL_DTYPES, use_kernel
from mamba_ssm.ops.discretization_ref import get_method
from mamba_ssm.ops.selective_scan import (
    ScanArgs,
    bidirectional_scan_fn,
    checkpoint_count,
    checkpoint_steps,
    selective_scan_backward_flops,
    selective_scan_flops,
    selective_scan_fn,
    selective_scan_ref,
)
from mamba_ssm.ops.selective_scan_ref import MAX_STATES, bidirectional_scan_ref


class Direction(NamedTuple):
    """The parameters of one direction of a mixer with D channels, N states, convolution width W and R inputs of Δ."""

    conv_weight: Tensor  # (D, 1, W)
    conv_bias: Tensor | None  # (D,)
    x_proj_weight: Tensor  # (R + 2N, D)
    dt_weight: Tensor  # (D, R)
    dt_bias: Tensor | None  # (D,)
    A_log: Tensor  # (D, N); A = −exp(A_log)
    D: Tensor | None  # (D,)


class Projection(NamedTuple):
    """The parameters of a mixer's first or last linear layer."""

    weight: Tensor  # (outputs, inputs)
    bias: Tensor | None  # (outputs,)


_NO_PROJECTION = (None,) * len(Projection._fields)
_NO_DIRECTION = (None,) * len(Direction._fields)


def mixer_fn(
    hidden_states: Tensor,
    in_proj: Projection | None,
    out_proj: Projection | None,
    forward: Direction | None,
    backward: Direction | None,
    *,
    scale: float = 1.0,
    delta_softplus: bool = True,
    discretization_method: str = "zoh",
    use_cuda_kernel: bool | None = None,
) -> Tensor:
    """out_proj(scale · (scan along time + scan against time) · silu(z)), where in_proj gives x, then z.

    Each scan has its own convolution and projections of x. forward, backward: the direction that runs along and the one
    that runs against time, convolution included; one of them may be None.

    hidden_states: (B, L, E), float32, float16 or bfloat16 (float64: reference). in_proj: E → 2D,
    or None where hidden_states are x and z already. out_proj: D → E', or None for none.
    Under autocast activations are in its dtype, else in that of hidden_states. The parameters may have any of these
    dtypes: Δ's, A and D are taken as float32, the outer projections' and x_proj's in the activations' dtype.
    Returns (B, L, E'), or (B, L, D), in the activations' dtype. Raises ValueError for a wrong argument, which it names.
    """
    get_method(discretization_method)  # unknown: ValueError that lists the known
    device_type = hidden_states.device.type
    if hidden_states.dtype in KERNEL_DTYPES and torch.is_autocast_enabled(device_type):
        hidden_states = hidden_states.to(torch.get_autocast_dtype(device_type))
    groups = (hidden_states, in_proj, out_proj, forward, backward)
    options = (scale, delta_softplus, discretization_method)
    if not use_kernel(hidden_states, use_cuda_kernel):
        _check_mixer(*groups)
        xz = _linear(hidden_states, in_proj).transpose(1, 2)
        return _linear(_mixer_scan_ref(*split_channels(xz), forward, backward, *options).mT, out_proj)
    if torch.compiler.is_compiling():
        _check_mixer(*groups)
        return _mixer_kernel(*groups, options)
    try:
        return _mixer_kernel(*groups, options)
    except Exception:
        _check_mixer(*groups)  # the operator checks as much in a tenth of the time; this says more of what is wrong
        raise


def _mixer_kernel(
    hidden_states: Tensor,
    in_proj: Projection | None,
    out_proj: Projection | None,
    forward: Direction | None,
    backward: Direction | None,
    options: tuple[float, bool, str],
) -> Tensor:
    outer = (*(in_proj or _NO_PROJECTION), *(out_proj or _NO_PROJECTION))
    parameters = (*outer, *(forward or _NO_DIRECTION), *(backward or _NO_DIRECTION))
    A_log = (backward if forward is None else forward).A_log
    steps = checkpoint_steps((hidden_states, *parameters), A_log, lean_length=hidden_states.shape[1])
    if steps == 0:
        return torch.ops.mamba_ssm.mixer_fwd(hidden_states, *parameters, *options, 0)[0]
    return _Mixer.apply((*options, steps), hidden_states, *parameters)


_DTYPES = (*KERNEL_DTYPES, torch.float64)


def _check_mixer(
    hidden_states: Tensor,
    in_proj: Projection | None,
    out_proj: Projection | None,
    forward: Direction | None,
    backward: Direction | None,
) -> None:
    if forward is None and backward is None:
        raise ValueError("forward and backward: got None for both; expected a Direction for at least one")
    for name, direction in (("forward", forward), ("backward", backward)):
        for field in ("conv_weight", "x_proj_weight", "dt_weight", "A_log"):
            if direction is not None and getattr(direction, field) is None:
                raise ValueError(f"{name}.{field}: got None; expected a tensor, or None for the whole direction")
    shape = tuple(hidden_states.shape)
    if len(shape) != 3 or 0 in shape:
        raise ValueError(f"hidden_states: got shape {shape}; expected (B, L, E), each at least 1")
    if hidden_states.dtype not in _DTYPES:
        raise ValueError(f"hidden_states: got {hidden_states.dtype}; expected float32, float16, bfloat16 or float64")
    channels = (backward if forward is None else forward).A_log.shape[0]
    vector = (channels,)
    if in_proj is not None:
        _check_group("in_proj", in_proj, ((2 * channels, shape[2]), (2 * channels,)), hidden_states)
    elif shape[2] != 2 * channels:
        raise ValueError(f"hidden_states: got shape {shape}; expected (B, L, {2 * channels}): in_proj is None")
    if out_proj is not None:
        outputs = out_proj.weight.shape[0]
        _check_group("out_proj", out_proj, ((outputs, channels), (outputs,)), hidden_states)
    for name, direction in (("forward", forward), ("backward", backward)):
        if direction is None:
            continue
        rank, states = direction.dt_weight.shape[-1], direction.A_log.shape[-1]
        if not 1 <= states <= MAX_STATES:
            raise ValueError(f"{name}.A_log: got {states} states; expected 1 to {MAX_STATES}")
        width = direction.conv_weight.shape[-1]
        if width not in (2, 3, 4):
            raise ValueError(f"{name}.conv_weight: got width {width}; expected 2, 3 or 4")
        shapes = ((channels, 1, width), vector, (rank + 2 * states, channels), (channels, rank), vector,
                  (channels, states), vector)  # fmt: skip
        _check_group(name, direction, shapes, hidden_states)


def _check_group(name: str, group: Projection | Direction, shapes: tuple, hidden_states: Tensor) -> None:
    device, dtype = hidden_states.device, hidden_states.dtype
    for field, tensor, shape in zip(group._fields, group, shapes, strict=True):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name}.{field}: got shape {tuple(tensor.shape)}; expected {shape}")
        if tensor.device != device:
            raise ValueError(
                f"{name}.{field}: got a tensor on {tensor.device}; expected {device}, where hidden_states is"
            )
        if tensor.dtype not in _DTYPES or (tensor.dtype == torch.float64 != dtype):
            raise ValueError(
                f"{name}.{field}: got {tensor.dtype} beside hidden_states in {dtype}; expected float32, float16, "
                "bfloat16, or float64 for both: convert one with .to()"
            )


def _linear(x: Tensor, projection: Projection | None) -> Tensor:
    if projection is None:
        return x
    return F.linear(x, *(None if t is None else t.to(x.dtype) for t in projection))


def at_least_float32(parameter: Tensor) -> Tensor:
    """A, D and Δ's bias enter the scan in float32 (float64 stays), whatever autocast or the module's dtype says."""
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


def _mixer_scan_ref(
    x: Tensor,
    z: Tensor,
    forward: Direction | None,
    backward: Direction | None,
    scale: float,
    delta_softplus: bool,
    discretization_method: str,
) -> Tensor:
    """What `mixer_fn` does between its outer projections, composed of the PyTorch references: its specification."""
    options = {"delta_softplus": delta_softplus, "discretization_method": discretization_method}

    def arguments(direction: Direction, reverse: bool) -> ScanArgs:
        return direction_arguments(x, direction, conv_fn=partial(causal_conv1d_ref, reverse=reverse))

    if forward is not None and backward is not None:
        return bidirectional_scan_ref(arguments(forward, False), arguments(backward, True), z, scale=scale, **options)
    reverse = forward is None
    args = arguments(backward if reverse else forward, reverse)
    return scale * gated_scan(args, z, scan_fn=selective_scan_ref, reverse=reverse, **options)


# ---- the operators behind mixer_fn ----------------------------------------------------------------------------------

_DIRECTION = (
    "Tensor? conv_weight{0}, Tensor? conv_bias{0}, Tensor? x_proj_weight{0}, Tensor? dt_weight{0}, Tensor? dt_bias{0}, "
    "Tensor? A{0}_log, Tensor? D{0}"
)
_TENSORS = (
    "Tensor hidden_states, Tensor? in_proj_weight, Tensor? in_proj_bias, Tensor? out_proj_weight, "
    f"Tensor? out_proj_bias, {_DIRECTION.format('')}, {_DIRECTION.format('_b')}"
)
_OPTIONS = "float scale, bool delta_softplus, str discretization_method, int checkpoint_steps"
# The tensors of a projection or a direction that there is not are None. For the backward pass: in_proj's output,
# (B, L, 2D), what out_proj reads, (B, D, L), both empty without these, and of each direction x_proj's output,
# (B·L, columns), whose parts begin at aligned columns, and the scan's checkpoints.
torch.library.define(
    "mamba_ssm::mixer_fwd",
    f"({_TENSORS}, {_OPTIONS}) -> (Tensor out, Tensor xz, Tensor y, "
    "Tensor projected, Tensor checkpoints, Tensor projected_b, Tensor checkpoints_b)",
)
# The gradients of hidden_states and of the parameters; empty where a tensor is absent, or its bit of `needed` not set:
# the lowest bit for hidden_states, the next for the first parameter.
torch.library.define(
    "mamba_ssm::mixer_bwd",
    f"(Tensor dout, {_TENSORS}, Tensor xz, Tensor y, Tensor projected, Tensor checkpoints, Tensor projected_b, "
    f"Tensor checkpoints_b, {_OPTIONS}, int needed) -> ({', '.join(['Tensor'] * 19)})",
)
_PARAMETERS = 2 * len(Projection._fields) + 2 * len(Direction._fields)


@torch.library.register_fake("mamba_ssm::mixer_fwd")
def _(hidden_states, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, *rest):
    *parameters, _scale, _delta_softplus, _method, steps = rest
    # The kernels check as much; one tensor on the meta device is enough to come here instead.
    in_proj = None if in_proj_weight is None else Projection(in_proj_weight, in_proj_bias)
    out_proj = None if out_proj_weight is None else Projection(out_proj_weight, out_proj_bias)
    directions = (None if all(t is None for t in d) else d for d in _directions(parameters))
    _check_mixer(hidden_states, in_proj, out_proj, *directions)
    batch, length, _ = hidden_states.shape
    kept, nothing = [], hidden_states.new_empty(0)
    for direction in _directions(parameters):
        if direction.conv_weight is None:
            kept += [nothing.clone(), nothing.clone()]
            continue
        rank, (channels, states) = direction.dt_weight.shape[1], direction.A_log.shape
        columns = _aligned(rank, hidden_states) + 2 * _aligned(states, hidden_states)
        checkpoints = checkpoint_count(length, steps, from_zeros=True)
        kept += [
            hidden_states.new_empty(batch * length, columns),
            hidden_states.new_empty(batch, checkpoints, states, channels, dtype=torch.float32),
        ]
    y = hidden_states.new_empty(batch, length, channels).transpose(1, 2)
    y = y if channels > 1 else y.contiguous()
    xz = nothing if in_proj_weight is None else hidden_states.new_empty(batch, length, 2 * channels)
    if out_proj_weight is None:
        return y.transpose(1, 2), xz, nothing.clone(), *kept
    return hidden_states.new_empty(batch, length, out_proj_weight.shape[0]), xz, y, *kept


@torch.library.register_fake("mamba_ssm::mixer_bwd")
def _(dout, hidden_states, *rest):
    tensors = (hidden_states, *rest[:_PARAMETERS])
    return tuple(
        t.new_empty(t.shape) if t is not None and _is_needed(rest[-1], i) else hidden_states.new_empty(0)
        for i, t in enumerate(tensors)
    )


def _is_needed(needed: int, index: int) -> bool:
    return needed >> index & 1 == 1


def _aligned(columns: int, hidden_states: Tensor) -> int:
    """As kColumnAlignment in csrc/mixer has it: a GPU's matrix products want aligned rows."""
    alignment = 8 if hidden_states.device.type == "cuda" else 1
    return -(-columns // alignment) * alignment


def _directions(parameters: Sequence[Tensor | None]) -> list[Direction]:
    count = len(Direction._fields)
    return [Direction(*parameters[i : i + count]) for i in range(0, len(parameters), count)]


class _Mixer(torch.autograd.Function):
    """`mixer_fn` on kernels. Kept for the backward pass besides the inputs and the parameters: what in_proj and x_proj
    give, what out_proj reads, and the scans' states every few steps. The convolution's output and Δ are made again."""

    @staticmethod
    def forward(ctx, options, *tensors):
        out, *kept = torch.ops.mamba_ssm.mixer_fwd(*tensors, *options)
        ctx.save_for_backward(*tensors, *kept)
        ctx.options = options
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        needed = ctx.needs_input_grad[1:]
        if torch.compiler.is_compiling():  # which may not know that an activation was written to in place
            needed = (True, *needed[1:])
        bits = sum(1 << i for i, is_needed in enumerate(needed) if is_needed)
        gradients = torch.ops.mamba_ssm.mixer_bwd(dout, *ctx.saved_tensors, *ctx.options, bits)
        return None, *(g if is_needed else None for g, is_needed in zip(gradients, needed, strict=True))


@register_flop_formula(torch.ops.mamba_ssm.mixer_fwd)
def mixer_flops(hidden_states, in_proj, in_proj_bias, out_proj, out_proj_bias, *rest, out_shape=None) -> int:
    """Operations of `mixer_fwd` from the shapes of its tensors: of all its projections, convolutions and scans.

    Each in the units of the operators that they are without the mixer."""
    *parameters, scale, delta_softplus, method, steps = rest
    batch, length, _ = hidden_states
    x = batch, _channels(parameters), length
    total = _outer_flops(hidden_states, in_proj, out_proj)
    for conv_weight, conv_bias, x_proj_weight, dt_weight, dt_bias, A, D in _directions(parameters):
        if conv_weight is None:
            continue
        matrix = (batch, A[1], length)
        total += conv_flops(x, (x[1], conv_weight[2]), conv_bias, None, None, True, False)
        total += 2 * batch * length * x_proj_weight[0] * x[1]
        total += selective_scan_flops(
            x, (batch, dt_weight[1], length), A, matrix, matrix, D, x, dt_bias, dt_weight, None, None,
            scale, delta_softplus, False, method, False, steps,
        )  # fmt: skip
    return total


@register_flop_formula(torch.ops.mamba_ssm.mixer_bwd)
def mixer_backward_flops(dout, hidden_states, in_proj, in_proj_bias, out_proj, out_proj_bias, *rest, out_shape=None):
    """Operations of `mixer_bwd`: its parts' backward passes, and the convolutions again.

    Of a projection, the gradient of its input and that of its weight, as far as they are needed."""
    *tensors, scale, delta_softplus, method, steps, needed = rest
    parameters = tensors[: 2 * len(Direction._fields)]
    batch, length, _ = hidden_states
    x = batch, _channels(parameters), length
    total = _outer_flops(hidden_states, in_proj, None) * (_is_needed(needed, 0) + _is_needed(needed, 1))
    total += _outer_flops(hidden_states, None, out_proj) * (1 + _is_needed(needed, 3))
    first = 1 + 2 * len(Projection._fields)
    for conv_weight, conv_bias, x_proj_weight, dt_weight, dt_bias, A, D in _directions(parameters):
        if conv_weight is not None:
            matrix, filters = (batch, A[1], length), (x[1], conv_weight[2])
            total += conv_flops(x, filters, conv_bias, None, None, True, False)
            total += conv_backward_flops(x, x, filters, conv_bias, None, None, True, False, None)
            products = x_proj_weight[0] * (1 + _is_needed(needed, first + 2))
            products += dt_weight[1] * (1 + _is_needed(needed, first + 3))
            total += 2 * batch * length * x[1] * products
            total += selective_scan_backward_flops(
                x, None, x, (batch, dt_weight[1], length), A, matrix, matrix, D, x, dt_bias, dt_weight, None, None,
                scale, delta_softplus, False, method, False, steps,
            )  # fmt: skip
        first += len(Direction._fields)
    return total


def _outer_flops(hidden_states, in_proj, out_proj) -> int:
    batch, length, _ = hidden_states
    return 2 * batch * length * sum(weight[0] * weight[1] for weight in (in_proj, out_proj) if weight is not None)


def _channels(parameters) -> int:
    return next(d.A_log[0] for d in _directions(parameters) if d.conv_weight is not None)


def scan_arguments(
    x: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    *,
    conv_fn: Callable[..., Tensor] = causal_conv1d_fn,
) -> ScanArgs:
    """What one direction of the scan reads: u = silu(conv(x)), and Δ (before bias and softplus), B, C from u.

    x is (B, D, L). The results are views of channel-last memory where x is one.
    """
    rank, d_state = delta_proj_weight.shape[1], A.shape[-1]
    u = conv_fn(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    sizes = [rank] + [d_state] * ((B is None) + (C is None))
    dt, *projected = F.linear(u.transpose(1, 2), x_proj_weight).split(sizes, dim=-1)  # (B, L, R), (B, L, N) …
    delta = F.linear(dt.to(delta_proj_weight.dtype), delta_proj_weight).transpose(1, 2)
    if B is None:
        B = projected.pop(0)
        B = (B if B_proj_bias is None else B + B_proj_bias.to(B.dtype)).transpose(1, 2)
    if C is None:
        C = projected.pop(0)
        C = (C if C_proj_bias is None else C + C_proj_bias.to(C.dtype)).transpose(1, 2)
    return ScanArgs(u, delta, A, B, C, D, delta_bias)


def direction_arguments(x: Tensor, direction: Direction, *, conv_fn: Callable[..., Tensor]) -> ScanArgs:
    """`scan_arguments` of a mixer's direction, in the dtypes that `mixer_fn` takes its tensors in."""
    conv_weight, conv_bias, x_proj_weight, *others = direction
    dtype = torch.promote_types(x.dtype, torch.float32)
    dt_weight, dt_bias, A_log, D = (None if t is None else t.to(dtype) for t in others)
    return scan_arguments(
        x, conv_weight, conv_bias, x_proj_weight.to(x.dtype), dt_weight, -torch.exp(A_log),
        D=D, delta_bias=dt_bias, conv_fn=conv_fn,
    )  # fmt: skip


def split_channels(xz: Tensor) -> tuple[Tensor, Tensor]:
    """The halves x and z of (B, 2D, L), split as (B, L, 2D) along its last axis: so the gradient is channel-last."""
    x, z = xz.transpose(1, 2).chunk(2, dim=-1)
    return x.transpose(1, 2), z.transpose(1, 2)


def gated_scan(args: ScanArgs, z: Tensor, delta_softplus: bool = True, *, scan_fn=selective_scan_fn, **options):
    """`scan_fn` on named arguments; `options` are its other keywords."""
    return scan_fn(
        args.u,
        args.delta,
        args.A,
        args.B,
        args.C,
        args.D,
        z=z,
        delta_bias=args.delta_bias,
        delta_softplus=delta_softplus,
        **options,
    )


def mamba_inner_fn_no_out_proj(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    *,
    discretization_method: str = "zoh",
    use_cuda_kernel: bool | None = None,
) -> Tensor:
    """Convolution, projections and gated scan: (B, 2D, L) -> (B, D, L)."""
    x, z = split_channels(xz)
    args = scan_arguments(
        x,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        A,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        conv_fn=partial(causal_conv1d_fn, use_cuda_kernel=use_cuda_kernel),
    )
    return gated_scan(
        args, z, delta_softplus, discretization_method=discretization_method, use_cuda_kernel=use_cuda_kernel
    )


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    *,
    discretization_method: str = "zoh",
    use_cuda_kernel: bool | None = None,
) -> Tensor:
    """A whole mixer after its input projection: (B, 2D, L) -> (B, L, E)."""
    y = mamba_inner_fn_no_out_proj(
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        A,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        delta_softplus,
        discretization_method=discretization_method,
        use_cuda_kernel=use_cuda_kernel,
    )
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def bimamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    *,
    discretization_method: str = "zoh",
    use_cuda_kernel: bool | None = None,
) -> Tensor:
    """Bidirectional mixer "v1": both scans read the same u, Δ, B, C, D; only A (D, N) and A_b (D, N) differ.

    The convolution stays causal for both, and the two outputs are added. (B, 2D, L) -> (B, L, E).
    """
    x, z = split_channels(xz)
    args = scan_arguments(
        x,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        A,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        conv_fn=partial(causal_conv1d_fn, use_cuda_kernel=use_cuda_kernel),
    )
    y = bidirectional_scan_fn(
        args,
        args._replace(A=A_b),
        z,
        delta_softplus=delta_softplus,
        discretization_method=discretization_method,
        use_cuda_kernel=use_cuda_kernel,
    )
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    *,
    discretization_method: str = "zoh",
) -> Tensor:
    """`mamba_inner_fn` on the PyTorch references of the convolution and of the scan."""
    x, z = split_channels(xz)
    args = scan_arguments(
        x,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        A,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        conv_fn=causal_conv1d_ref,
    )
    y = gated_scan(args, z, delta_softplus, scan_fn=selective_scan_ref, discretization_method=discretization_method)
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def bimamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    *,
    discretization_method: str = "zoh",
) -> Tensor:
    """`bimamba_inner_fn` on the PyTorch references of the convolution and of the scan."""
    x, z = split_channels(xz)
    args = scan_arguments(
        x,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        A,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        conv_fn=causal_conv1d_ref,
    )
    scan = partial(
        gated_scan,
        z=z,
        delta_softplus=delta_softplus,
        scan_fn=selective_scan_ref,
        discretization_method=discretization_method,
    )
    y = scan(args) + scan(args._replace(A=A_b), reverse=True)
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)
