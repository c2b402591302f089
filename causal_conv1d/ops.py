"""The operators ``causal_conv1d::conv_fwd``, ``conv_bwd`` and ``conv_update``: schemas, shape rules and the gradient.

The compiled libraries bring the implementations (csrc/causal_conv1d). All of them want seq_idx and the other indices in
int32, initial_states in x's dtype; times are those of x, states are in scan order.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_library = torch.library.Library("causal_conv1d", "FRAGMENT")
_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? initial_states, bool silu, bool reverse"
for _schema in (
    f"conv_fwd({_INPUTS}) -> Tensor",
    # dx_addend, of x's shape, is added to dx: the gradient that x gets from elsewhere
    f"conv_bwd(Tensor dout, {_INPUTS}, Tensor? dx_addend) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_states)",
    "conv_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, Tensor? cache_seqlens, "
    "Tensor? conv_state_indices, bool silu) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _empty_in_layout_of(x: Tensor) -> Tensor:
    """Channel-last if x is, else contiguous."""
    if x.stride(1) == 1 and x.stride(2) != 1:
        return x.new_empty(x.shape[0], x.shape[2], x.shape[1]).transpose(1, 2)
    return x.new_empty(x.shape)


@torch.library.register_fake("causal_conv1d::conv_fwd", lib=_library)
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    silu: bool,
    reverse: bool,
) -> Tensor:
    return _empty_in_layout_of(x)


@torch.library.register_fake("causal_conv1d::conv_bwd", lib=_library)
def _(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    silu: bool,
    reverse: bool,
    dx_addend: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        _empty_in_layout_of(x),
        weight.new_empty(weight.shape, dtype=torch.float32),
        weight.new_empty(weight.shape[:1], dtype=torch.float32),
        x.new_empty(0 if initial_states is None else initial_states.shape),
    )


@torch.library.register_fake("causal_conv1d::conv_update", lib=_library)
def _(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
    silu: bool,
) -> Tensor:
    return _empty_in_layout_of(x)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.silu, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dout: Tensor):
    x, weight, bias, seq_idx, initial_states = ctx.saved_tensors
    dx, dweight, dbias, dinitial = torch.ops.causal_conv1d.conv_bwd(
        dout, x, weight, bias, seq_idx, initial_states, ctx.silu, ctx.reverse, None
    )
    return (
        dx,
        dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        None,
        None if initial_states is None else dinitial,
        None,
        None,
    )


torch.library.register_autograd("causal_conv1d::conv_fwd", _backward, setup_context=_setup_context, lib=_library)


def refuse_second_derivative(operator: str) -> None:
    """Let a derivative of `operator`, a backward kernel, be an error; torch's default is a warning and zeros."""

    def refuse(ctx, *gradients):
        raise NotImplementedError(
            f"{operator} has no derivative of its own: for second derivatives use the PyTorch reference, "
            "with VIM_USE_CUDA_KERNEL=0 or use_cuda_kernel=False"
        )

    torch.library.register_autograd(operator, refuse)


refuse_second_derivative("causal_conv1d::conv_bwd")


# For torch.utils.flop_counter.FlopCounterMode, from the shapes of the tensors. As in torch's own formulas of
# convolutions, a multiply-add is two operations, and bias and activation are not counted.


@register_flop_formula(torch.ops.causal_conv1d.conv_fwd)
def conv_flops(x, weight, *options, out_shape=None) -> int:
    batch, channels, length = x
    return 2 * batch * channels * length * weight[1]


@register_flop_formula(torch.ops.causal_conv1d.conv_bwd)
def conv_backward_flops(
    dout, x, weight, bias, seq_idx, initial_states, silu, reverse, dx_addend, *, out_shape=None
) -> int:
    """The gradients of x and weight, and with silu the convolution once more, for its slope."""
    return (2 + silu) * conv_flops(x, weight)
