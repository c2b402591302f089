"""The inside of a Mamba block: causal convolution, input-dependent Δ, B and C, selective scan, output projection.

Names, argument order and meaning of the `*_inner_*` functions are those of the public `mamba_ssm` 1.x and of its
bidirectional extension in Vim (Zhu et al., 2024), with `discretization_method` and `use_cuda_kernel` as keywords beside
them. Activations have the logical shape (B, D, L) with any strides; channel-last memory, i.e. a transposed view of
(B, L, D), is the fast path and is never copied.

`mixer_scan` is what a mixer runs between its two outer projections, in one autograd node: the convolution's output and
Δ are made again in the backward pass instead of being kept, and gradients of one tensor are summed as they arise.

Shapes, for all `*_inner_*` functions: xz (B, 2D, L); conv1d_weight (D, 1, W); x_proj_weight (R [+ N] [+ N], D), whose
rows give the R inputs of Δ, then B, then C, the last two unless they are passed; delta_proj_weight (D, R);
out_proj_weight (E, D); A (D, N); B and C as in `selective_scan_fn`; D, delta_bias (D,); B_proj_bias, C_proj_bias (N,).
An unknown `discretization_method` raises ValueError and lists the known ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from causal_conv1d import causal_conv1d_fn, causal_conv1d_ref
from causal_conv1d.reference import check_conv_arguments
from mamba_ssm._backend import use_kernel
from mamba_ssm.ops.selective_scan import (
    ScanArgs,
    bidirectional_scan_fn,
    checkpoint_steps,
    scan_gradients,
    selective_scan_fn,
    selective_scan_ref,
)
from mamba_ssm.ops.selective_scan_ref import bidirectional_scan_ref, check_scan_arguments


class Direction(NamedTuple):
    """The parameters of one direction of a mixer with D channels, N states, convolution width W and R inputs of Δ."""

    conv_weight: Tensor  # (D, W)
    conv_bias: Tensor | None  # (D,)
    x_proj_weight: Tensor  # (R + 2N, D)
    dt_weight: Tensor  # (D, R), float32
    dt_bias: Tensor | None  # (D,), float32
    A: Tensor  # (D, N), float32
    D: Tensor | None  # (D,), float32


def mixer_scan(
    x: Tensor,
    z: Tensor,
    forward: Direction | None,
    backward: Direction | None,
    *,
    scale: float = 1.0,
    delta_softplus: bool = True,
    discretization_method: str = "zoh",
    use_cuda_kernel: bool | None = None,
) -> Tensor:
    """scale · (scan along time + scan against time) · silu(z), each from its own convolution and projections of x.

    x, z: (B, D, L), float32, float16 or bfloat16 (float64: reference). forward, backward: the direction that runs along
    and the one that runs against time, convolution included; one of them may be None.
    Returns (B, D, L) in x's dtype. Raises ValueError for a wrong argument, as `selective_scan_fn` does.
    """
    directions = [d for d in (forward, backward) if d is not None]
    if not directions:
        raise ValueError("forward and backward: got None for both; expected a Direction for at least one")
    parameters = [t for direction in directions for t in direction]
    float64 = (t for t in parameters if t is not None and t.dtype == torch.float64)
    if not use_kernel(next(float64, x), use_cuda_kernel):
        options = {"delta_softplus": delta_softplus, "discretization_method": discretization_method}
        return _mixer_scan_ref(x, z, forward, backward, scale, options)
    if torch.is_autocast_enabled(x.device.type):  # what autocast does to a linear layer
        directions = [d._replace(x_proj_weight=d.x_proj_weight.to(x.dtype)) for d in directions]
        parameters = [t for direction in directions for t in direction]
    reversed_ = tuple(reverse for d, reverse in ((forward, False), (backward, True)) if d is not None)
    options = (reversed_, scale, delta_softplus, discretization_method)
    steps = checkpoint_steps((x, z, *parameters), directions[0].A, lean_length=x.shape[-1])
    return _MixerScan.apply(steps, options, x, z, *parameters)


def _mixer_scan_ref(
    x: Tensor, z: Tensor, forward: Direction | None, backward: Direction | None, scale: float, options: dict
) -> Tensor:
    """`mixer_scan` composed of the PyTorch references: its specification."""

    def arguments(direction: Direction, reverse: bool) -> ScanArgs:
        conv_weight, conv_bias, x_proj_weight, dt_weight, dt_bias, A, D = direction
        conv_fn = partial(causal_conv1d_ref, reverse=reverse)
        return scan_arguments(
            x, conv_weight[:, None], conv_bias, x_proj_weight, dt_weight, A, D=D, delta_bias=dt_bias, conv_fn=conv_fn
        )

    if forward is not None and backward is not None:
        return bidirectional_scan_ref(arguments(forward, False), arguments(backward, True), z, scale=scale, **options)
    reverse = forward is None
    args = arguments(backward if reverse else forward, reverse)
    return scale * gated_scan(args, z, scan_fn=selective_scan_ref, reverse=reverse, **options)


class _MixerScan(torch.autograd.Function):
    """`mixer_scan` on kernels. Kept for the backward pass besides x, z and the parameters: x_proj's output, and the
    scans' states every few steps."""

    @staticmethod
    def forward(ctx, steps, options, x, z, *parameters):
        reversed_, scale, delta_softplus, method = options
        directions = _directions(parameters)
        out, kept = None, []
        for i, (direction, reverse) in enumerate(zip(directions, reversed_, strict=True)):
            last = i == len(directions) - 1
            conv_weight, conv_bias, x_proj_weight, dt_weight, dt_bias, A, D = direction
            check_conv_arguments(x, conv_weight, conv_bias, None, None, False, None, "silu")
            u = torch.ops.causal_conv1d.conv_fwd(x, conv_weight, conv_bias, None, None, True, reverse)
            projected = F.linear(u.transpose(1, 2), x_proj_weight)
            dt, B, C = _split(projected, dt_weight, A)
            check_scan_arguments(u, u, A, B, C, D, z, dt_bias, None, method)
            out, _, checkpoints = torch.ops.mamba_ssm.selective_scan_fwd(
                u, dt, A, B, C, D, z if last else None, dt_bias, dt_weight, None, out,
                scale if last else 1.0, delta_softplus, reverse, method, not last, steps,
            )  # fmt: skip
            kept += [projected, checkpoints]
        ctx.save_for_backward(x, z, *parameters, *kept)
        ctx.options, ctx.count, ctx.steps = options, len(parameters), steps
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        with torch.autocast(dout.device.type, enabled=False):  # the dtypes are those of the forward pass
            return _MixerScan.gradients(ctx, dout)

    @staticmethod
    def gradients(ctx, dout):
        reversed_, scale, delta_softplus, method = ctx.options
        x, z, *tensors = ctx.saved_tensors
        directions, kept = _directions(tensors[: ctx.count]), tensors[ctx.count :]
        dx = dz = None
        gradients = []
        for i, (direction, reverse) in enumerate(zip(directions, reversed_, strict=True)):
            last = i == len(directions) - 1
            conv_weight, conv_bias, x_proj_weight, dt_weight, dt_bias, A, D = direction
            projected, checkpoints = kept[2 * i : 2 * i + 2]
            u = torch.ops.causal_conv1d.conv_fwd(x, conv_weight, conv_bias, None, None, True, reverse)
            dt, B, C = _split(projected, dt_weight, A)
            (du, ddelta, dA, dB, dC, dD, dz, ddt_bias), _ = scan_gradients(
                dout, None, u, dt, A, B, C, D, z, dt_bias, dt_weight, dz, checkpoints,
                scale, delta_softplus, reverse, method, not last, ctx.steps,
            )  # fmt: skip
            ddelta = _rows(ddelta)
            ddt_weight = (_rows(dt).t() @ ddelta).t().to(dt_weight.dtype)  # this way round it is faster
            dprojected = torch.cat([ddelta @ dt_weight.to(ddelta.dtype), _rows(dB), _rows(dC)], dim=1)
            dx_proj_weight = dprojected.t() @ _rows(u)
            du = _rows(du).addmm_(dprojected, x_proj_weight)  # a tensor of our own
            du = du.view(*projected.shape[:2], -1).transpose(1, 2)
            dx, dconv_weight, dconv_bias, _ = torch.ops.causal_conv1d.conv_bwd(
                du, x, conv_weight, conv_bias, None, None, True, reverse, dx
            )
            gradients += [
                dconv_weight.to(conv_weight.dtype),
                None if conv_bias is None else dconv_bias.to(conv_bias.dtype),
                dx_proj_weight,
                ddt_weight,
                ddt_bias,
                dA,
                dD,
            ]
        return None, None, dx, dz, *gradients


if torch.ops.aten.addmm_ not in flop_registry:  # torch's counter knows addmm, but not the addmm_ of these gradients
    register_flop_formula(torch.ops.aten.addmm_, get_raw=True)(flop_registry[torch.ops.aten.addmm])


def _directions(parameters: list[Tensor | None]) -> list[Direction]:
    count = len(Direction._fields)
    return [Direction(*parameters[i : i + count]) for i in range(0, len(parameters), count)]


def _split(projected: Tensor, dt_weight: Tensor, A: Tensor) -> tuple[Tensor, ...]:
    """The inputs of Δ, (B, R, L), and B and C, (B, N, L): views of x_proj's output."""
    return tuple(t.transpose(1, 2) for t in projected.split([dt_weight.shape[1], A.shape[1], A.shape[1]], dim=-1))


def _rows(t: Tensor) -> Tensor:
    """(B, C, L) as (B·L, C), without a copy where t is channel-last."""
    return t.transpose(1, 2).reshape(-1, t.shape[1])


class _SplitLinear(torch.autograd.Function):
    """A linear layer whose output is used in halves: the gradients of the halves are never joined."""

    @staticmethod
    def forward(ctx, h, weight, bias):
        ctx.save_for_backward(h, weight)
        ctx.has_bias = bias is not None
        return tuple(t.transpose(1, 2) for t in F.linear(h, weight, bias).chunk(2, dim=-1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dx, dz):
        h, weight = ctx.saved_tensors
        rows, (weight_x, weight_z), dx, dz = h.reshape(-1, h.shape[-1]), weight.chunk(2), _rows(dx), _rows(dz)
        with torch.autocast(h.device.type, enabled=False):  # the dtypes are those of the forward pass
            dh = (dx @ weight_x).addmm_(dz, weight_z).view(h.shape)
            dweight = torch.cat([dx.t() @ rows, dz.t() @ rows])
        return dh, dweight, torch.cat([dx.sum(0), dz.sum(0)]) if ctx.has_bias else None


def project_in(
    h: Tensor, weight: Tensor, bias: Tensor | None = None, *, use_cuda_kernel: bool | None = None
) -> tuple[Tensor, Tensor]:
    """x and z, each (B, D, L) and channel-last, the halves of weight (2D, E) · h (B, L, E) + bias (2D,).

    Where the reference serves instead of kernels, every derivative and transform that torch has works.
    """
    if not use_kernel(h, use_cuda_kernel):
        return tuple(t.transpose(1, 2) for t in F.linear(h, weight, bias).chunk(2, dim=-1))
    if torch.is_autocast_enabled(h.device.type):
        dtype = torch.get_autocast_dtype(h.device.type)
        h, weight, bias = (t if t is None else t.to(dtype) for t in (h, weight, bias))
    return _SplitLinear.apply(h, weight, bias)


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
