"""The inside of a Mamba block: causal convolution, input-dependent Δ, B and C, selective scan, output projection.

Names, argument order and meaning are those of the public `mamba_ssm` 1.x and of its bidirectional extension in Vim
(Zhu et al., 2024), with `discretization_method` and `use_cuda_kernel` as keywords beside them. Everything composes
differentiable ops, so there is no backward here to keep in step. Activations have the logical shape (B, D, L) with any
strides; channel-last memory, i.e. a transposed view of (B, L, D), is the fast path and is never copied.

Shapes, for all functions: xz (B, 2D, L); conv1d_weight (D, 1, W); x_proj_weight (R [+ N] [+ N], D), whose rows give the
R inputs of Δ, then B, then C, the last two unless they are passed; delta_proj_weight (D, R); out_proj_weight (E, D);
A (D, N); B and C as in `selective_scan_fn`; D, delta_bias (D,); B_proj_bias, C_proj_bias (N,).
An unknown `discretization_method` raises ValueError and lists the known ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from causal_conv1d import causal_conv1d_fn, causal_conv1d_ref
from mamba_ssm.ops.selective_scan import (
    ScanArgs,
    bidirectional_scan_fn,
    selective_scan_fn,
    selective_scan_ref,
)


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
    delta = F.linear(dt, delta_proj_weight).transpose(1, 2)
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
