"""Residual add followed by RMSNorm or LayerNorm, fused: ``h = scale * x + residual``, ``y = norm(h) * weight + bias``.

Interface: mamba_ssm 1.x, ``mamba_ssm.ops.triton.layernorm``.
RMSNorm: Zhang & Sennrich, 2019; LayerNorm: Ba, Kiros & Hinton, 2016.
"""

import torch
from torch import Tensor, nn

from mamba_ssm._backend import KERNEL_DTYPES, use_kernel

_FLOATS = (*KERNEL_DTYPES, torch.float64)


def _check_arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, drop_path_scale: Tensor | None
) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, but must be (..., dim) with dim >= 1")
    shape, device = x.shape, x.device
    for name, tensor, expected, meaning in (
        ("x", x, shape, "(..., dim)"),
        ("weight", weight, shape[-1:], "(dim,)"),
        ("bias", bias, shape[-1:], "(dim,)"),
        ("residual", residual, shape, "the shape of x"),
        ("drop_path_scale", drop_path_scale, shape[:1], "(batch,)"),
    ):
        if tensor is None:
            continue
        if tensor.shape != expected:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but must be {meaning} = {tuple(expected)}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, but x is on {device}: move one with .to(device)")
        if tensor.dtype not in _FLOATS:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}, but must be float32, float16, bfloat16 or float64: "
                "convert it with .to()"
            )
    if drop_path_scale is not None and x.dim() < 2:
        raise ValueError(f"drop_path_scale needs x of shape (batch, ..., dim), but x has shape {tuple(x.shape)}")


def _normalize(h: Tensor, weight: Tensor, bias: Tensor | None, eps: float, is_rms_norm: bool) -> Tensor:
    if not is_rms_norm:
        h = h - h.mean(dim=-1, keepdim=True)
    y = h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + eps) * weight
    return y if bias is None else y + bias


def _add_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    residual_in_fp32: bool,
    is_rms_norm: bool,
    drop_path_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Specification of the fused op: (y in x's dtype, h in the residual's); arithmetic in float32 or float64."""
    tensors = [t for t in (x, weight, bias, residual) if t is not None]
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    h = x.to(dtype)
    if drop_path_scale is not None:
        h = h * drop_path_scale.to(dtype).view(-1, *[1] * (x.dim() - 1))
    if residual is not None:
        h = h + residual.to(dtype)
    y = _normalize(h, weight.to(dtype), None if bias is None else bias.to(dtype), eps, is_rms_norm).to(x.dtype)
    if residual is not None:
        return y, h.to(residual.dtype)
    return y, h.to(torch.promote_types(x.dtype, torch.float32) if residual_in_fp32 else x.dtype)


def _same_dtype_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    prenorm: bool,
    upcast: bool,
    is_rms_norm: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    _check_arguments(x, weight, bias, residual, None)
    out_dtype = x.dtype
    if upcast:
        x, weight, bias, residual = (
            None if t is None else t.to(torch.promote_types(t.dtype, torch.float32))
            for t in (x, weight, bias, residual)
        )
    if residual is not None:
        x = (x + residual).to(x.dtype)
    y = _normalize(x, weight, bias, eps, is_rms_norm).to(out_dtype)
    return (y, x) if prenorm else y


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    upcast: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm of ``x + residual`` in the inputs' own dtype, or in at least float32 with ``upcast``."""
    return _same_dtype_ref(x, weight, bias, residual, eps, prenorm, upcast, is_rms_norm=False)


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    upcast: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm of ``x + residual`` in the inputs' own dtype, or in at least float32 with ``upcast``."""
    return _same_dtype_ref(x, weight, bias, residual, eps, prenorm, upcast, is_rms_norm=True)


# ---- the compiled operators; implementations in csrc/layer_norm -----------------------------------------------------
# x, residual, y, h and their gradients are (..., dim). h is empty unless keep_sum, dresidual unless separate_dresidual.

_library = torch.library.Library("mamba_ssm", "FRAGMENT")
for _schema in (
    "add_norm_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? scale, float eps, "
    "bool residual_in_fp32, bool is_rms_norm, bool keep_sum) -> (Tensor y, Tensor h, Tensor mean, Tensor rstd)",
    "add_norm_bwd(Tensor dy, Tensor? dh, Tensor h, Tensor weight, Tensor? scale, Tensor mean, Tensor rstd, "
    "bool is_rms_norm, bool has_bias, bool separate_dresidual) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake("mamba_ssm::add_norm_fwd", lib=_library)
def _(x, weight, bias, residual, scale, eps, residual_in_fp32, is_rms_norm, keep_sum):
    rows = x.numel() // x.shape[-1]
    stream = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape if keep_sum else 0, dtype=stream),
        x.new_empty(0 if is_rms_norm else rows, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.float32),
    )


@torch.library.register_fake("mamba_ssm::add_norm_bwd", lib=_library)
def _(dy, dh, h, weight, scale, mean, rstd, is_rms_norm, has_bias, separate_dresidual):
    dim = dy.shape[-1]
    return (
        dy.new_empty(dy.shape),
        h.new_empty(h.shape if separate_dresidual else 0),
        dy.new_empty(dim, dtype=torch.float32),
        dy.new_empty(dim if has_bias else 0, dtype=torch.float32),
    )


class _AddNorm(torch.autograd.Function):
    """(y, h); h is empty unless keep_sum."""

    @staticmethod
    def forward(ctx, options, x, weight, bias, residual, scale):
        _eps, _residual_in_fp32, is_rms_norm, keep_sum = options
        y, h, mean, rstd = torch.ops.mamba_ssm.add_norm_fwd(x, weight, bias, residual, scale, *options)
        ctx.save_for_backward(h if keep_sum else x, weight, bias, scale, mean, rstd)
        ctx.x_dtype, ctx.is_rms_norm, ctx.keep_sum = x.dtype, is_rms_norm, keep_sum
        ctx.has_residual = residual is not None
        ctx.separate_dresidual = residual is not None and (scale is not None or residual.dtype != x.dtype)
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh):
        h, weight, bias, scale, mean, rstd = ctx.saved_tensors
        if dy is None:  # only h was used
            dy = h.new_zeros(h.shape, dtype=ctx.x_dtype)
        dx, dresidual, dweight, dbias = torch.ops.mamba_ssm.add_norm_bwd(
            dy, dh if ctx.keep_sum else None, h, weight, scale, mean, rstd,
            ctx.is_rms_norm, bias is not None, ctx.separate_dresidual,
        )  # fmt: skip
        return (
            None,
            dx,
            dweight.to(weight.dtype),
            None if bias is None else dbias.to(bias.dtype),
            None if not ctx.has_residual else dresidual if ctx.separate_dresidual else dx,
            None,
        )


def _add_norm_kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    residual_in_fp32: bool,
    is_rms_norm: bool,
    drop_path_scale: Tensor | None,
    prenorm: bool,
) -> tuple[Tensor, Tensor]:
    h_is_x = residual is None and drop_path_scale is None and (x.dtype == torch.float32 or not residual_in_fp32)
    for_backward = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias, residual)
    )
    options = (eps, residual_in_fp32, is_rms_norm, not h_is_x and (prenorm or for_backward))
    tensors = (x, weight, bias, residual, drop_path_scale)
    if for_backward:
        y, h = _AddNorm.apply(options, *tensors)
    else:
        y, h, _mean, _rstd = torch.ops.mamba_ssm.add_norm_fwd(*tensors, *options)
    return y, x if h_is_x else h


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    *,
    drop_path_scale: Tensor | None = None,
    use_cuda_kernel: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``h = drop_path_scale * x + residual``; ``y = norm(h) * weight + bias``, norm over the last dimension.

    Args:
        x: (..., dim), any number of leading dimensions, float32, float16 or bfloat16 (float64: reference).
        weight: (dim,). bias: (dim,) or None. Any floating dtype.
        residual: shape of x, or None for 0.
        eps: added to the mean square (RMSNorm) or to the variance (LayerNorm).
        prenorm: return ``(y, h)``, h being the residual of the next block.
        residual_in_fp32: where no residual is given, h is float32. A given residual keeps its own dtype.
        is_rms_norm: RMSNorm (no mean subtracted) instead of LayerNorm.
        drop_path_scale: (batch,), x being (batch, ..., dim): factor of each sample's x (0 drops the branch), taken as
            constant by the gradient.
        use_cuda_kernel: True: CUDA kernel or RuntimeError; False: reference; None: the kernel of x's device.
            The environment variable VIM_USE_CUDA_KERNEL wins.

    Returns:
        y in x's dtype, or ``(y, h)`` with prenorm; computed in float32, the norm from the unrounded h.

    Raises:
        ValueError: a shape or device does not fit. TypeError: a dtype does not fit. RuntimeError: dim is above 32768 in
            the CUDA kernel.
    """
    _check_arguments(x, weight, bias, residual, drop_path_scale)
    scale = None if drop_path_scale is None else drop_path_scale.detach()
    float64 = (t for t in (weight, bias, residual) if t is not None and t.dtype == torch.float64)
    if use_kernel(next(float64, x), use_cuda_kernel):
        y, h = _add_norm_kernel(x, weight, bias, residual, eps, residual_in_fp32, is_rms_norm, scale, prenorm)
    else:
        y, h = _add_norm_ref(x, weight, bias, residual, eps, residual_in_fp32, is_rms_norm, scale)
    return (y, h) if prenorm else y


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
    *,
    drop_path_scale: Tensor | None = None,
    use_cuda_kernel: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`layer_norm_fn` with RMSNorm; mind the public order of the arguments, eps last."""
    return layer_norm_fn(
        x,
        weight,
        bias,
        residual,
        eps,
        prenorm,
        residual_in_fp32,
        is_rms_norm=True,
        drop_path_scale=drop_path_scale,
        use_cuda_kernel=use_cuda_kernel,
    )


class RMSNorm(nn.Module):
    """``y = h / sqrt(mean(h^2) + eps) * weight`` with ``h = drop_path_scale * x + residual``, over the last dimension.

    Args:
        hidden_size: size of the last dimension.
        eps: added to the mean square.
        use_cuda_kernel: as in :func:`layer_norm_fn`.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        use_cuda_kernel: bool | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.use_cuda_kernel = use_cuda_kernel
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
        *,
        drop_path_scale: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See :func:`layer_norm_fn`."""
        return rms_norm_fn(
            x,
            self.weight,
            self.bias,
            residual,
            prenorm,
            residual_in_fp32,
            self.eps,
            drop_path_scale=drop_path_scale,
            use_cuda_kernel=self.use_cuda_kernel,
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
