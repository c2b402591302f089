"""Public functions: check the arguments, then call the compiled op or the reference."""

import torch
from torch import Tensor

import causal_conv1d.ops  # noqa: F401  defines torch.ops.causal_conv1d
from causal_conv1d.reference import (
    causal_conv1d_ref,
    causal_conv1d_update_ref,
    check_conv_arguments,
    check_update_arguments,
    final_states,
)

__all__ = ["causal_conv1d_fn", "causal_conv1d_ref", "causal_conv1d_update", "causal_conv1d_update_ref"]


def _use_kernel(x: Tensor, *others: Tensor | None, wish: bool | None = None) -> bool:
    # Imported late: mamba_ssm imports this package, whichever of the two is imported first.
    from mamba_ssm._backend import use_kernel

    float64 = (t for t in others if t is not None and t.dtype == torch.float64)
    return use_kernel(next(float64, x), wish)


def _int32(index: Tensor | None) -> Tensor | None:
    return None if index is None else index.to(torch.int32).contiguous()


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    *,
    reverse: bool = False,
    use_cuda_kernel: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal depthwise convolution over time, with an optional SiLU.

    ``out[b, d, t] = act(bias[d] + sum_k weight[d, k] * x[b, d, t - (width - 1) + k])``

    Args:
        x: (batch, dim, seqlen), float32, float16 or bfloat16 (float64: reference), any strides. A view of
            channel-last memory, ``(batch, seqlen, dim).transpose(1, 2)``, is the fast path, whatever its row stride.
        weight: (dim, width), width 2, 3 or 4, floating point.
        bias: (dim,) or None.
        seq_idx: (batch, seqlen), integer: which of several packed sequences a position belongs to. A position sees only
            positions of its own sequence; a negative index marks padding, whose output is 0.
            Not together with states.
        initial_states: (batch, dim, width - 1): the inputs before the first one, oldest first; differentiable.
        return_final_states: return ``(out, final_states)``, final_states (batch, dim, width - 1) being the
            last inputs, ``initial_states`` included where seqlen < width - 1; differentiable.
        final_states_out: (batch, dim, width - 1), filled with the final states and returned in their place.
        activation: None, ``"silu"`` or ``"swish"`` (the same).
        reverse: scan from the last position to the first: t sees t, t + 1, ... It equals flipping x and seq_idx,
            convolving, and flipping the output, without the copies; states are in scan order.
        use_cuda_kernel: True: CUDA kernel or RuntimeError; False: reference; None: the kernel of x's device.
            The environment variable VIM_USE_CUDA_KERNEL wins.

    Returns:
        out: (batch, dim, seqlen) of x's dtype, computed in float32.

    Raises:
        ValueError: a shape, device or option does not fit. TypeError: a dtype does not.

    Interface: Dao-AILab/causal-conv1d; the layer: Gu & Dao, "Mamba", 2023, section 3.4.
    """
    check_conv_arguments(x, weight, bias, seq_idx, initial_states, return_final_states, final_states_out, activation)
    if not _use_kernel(x, weight, bias, initial_states, wish=use_cuda_kernel):
        return causal_conv1d_ref(
            x,
            weight,
            bias,
            initial_states,
            return_final_states,
            final_states_out,
            activation,
            seq_idx=seq_idx,
            reverse=reverse,
        )
    history = None if initial_states is None else initial_states.to(x.dtype)
    out = torch.ops.causal_conv1d.conv_fwd(x, weight, bias, _int32(seq_idx), history, activation is not None, reverse)
    if not return_final_states:
        return out
    states = final_states(x, initial_states, weight.shape[1], reverse)
    return out, states if final_states_out is None else final_states_out.copy_(states)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
    *,
    use_cuda_kernel: bool | None = None,
) -> Tensor:
    """Convolve one or several new tokens with the inputs kept in ``conv_state``, and update it in place.

    For inference: where a gradient is asked for, the differentiable reference runs.

    Args:
        x: (batch, dim) for one token, or (batch, dim, seqlen).
        conv_state: (batch, dim, state_len), state_len >= width - 1: the latest inputs, oldest first. Written in place,
            in its own dtype.
        weight, bias, activation: as in :func:`causal_conv1d_fn`.
        cache_seqlens: (batch,), integer: number of tokens already seen. conv_state is then a circular buffer, and the
            new tokens go to ``cache_seqlens % state_len`` and on.
        conv_state_indices: (batch,), integer: the row of a larger conv_state, (rows, dim, state_len), that belongs to
            each batch entry; no row twice. A negative index marks padding: output 0, no row touched.
        use_cuda_kernel: as in :func:`causal_conv1d_fn`.

    Returns:
        out: of x's shape and dtype.

    Raises:
        ValueError: a shape, device or option does not fit. TypeError: a dtype does not.
    """
    check_update_arguments(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
    needs_gradient = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, conv_state, weight, bias)
    )
    if not _use_kernel(x, conv_state, weight, bias, wish=use_cuda_kernel) or needs_gradient:
        return causal_conv1d_update_ref(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
    out = torch.ops.causal_conv1d.conv_update(
        x[..., None] if x.dim() == 2 else x,
        conv_state,
        weight,
        bias,
        _int32(cache_seqlens),
        _int32(conv_state_indices),
        activation is not None,
    )
    return out[..., 0] if x.dim() == 2 else out
