"""The causal depthwise convolution in plain PyTorch: the specification that the kernels are tested against.

    y[b, d, t] = act(bias[d] + sum_k weight[d, k] * x[b, d, t - (W - 1) + k]),    k = 0 .. W-1

x at t < 0 is ``initial_states`` (oldest first), or 0. Arithmetic is in float32, or in float64 if an input is float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = (None, "silu", "swish")
WIDTHS = (2, 3, 4)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _check_tensor(name: str, given: Tensor, shape: tuple[int, ...], meaning: str, like: Tensor) -> None:
    if tuple(given.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(given.shape)}, but must be {meaning} = {shape}: reshape or slice it")
    if given.device != like.device:
        raise ValueError(f"{name} is on {given.device}, but x is on {like.device}: move one with .to(device)")


def _check_float(name: str, given: Tensor) -> None:
    if given.dtype not in _FLOATS:
        raise TypeError(
            f"{name} has dtype {given.dtype}, but must be float32, float16, bfloat16 or float64: convert it with .to()"
        )


def _check_int(name: str, given: Tensor) -> None:
    if given.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} has dtype {given.dtype}, but must be int32 or int64: convert it with .to(torch.int32)")


def _check_filter(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    dim = x.shape[1]
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, but must be one of {', '.join(map(repr, ACTIVATIONS))}")
    if weight.dim() != 2 or weight.shape[1] not in WIDTHS:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, but must be (dim, width) with width in {WIDTHS}: "
            "for a Conv1d pass conv.weight.squeeze(1)"
        )
    _check_tensor("weight", weight, (dim, weight.shape[1]), "(dim, width)", x)
    _check_float("x", x)
    _check_float("weight", weight)
    if bias is not None:
        _check_tensor("bias", bias, (dim,), "(dim,)", x)
        _check_float("bias", bias)


def check_conv_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    return_final_states: bool,
    final_states_out: Tensor | None,
    activation: str | None,
) -> None:
    """Raise ValueError or TypeError, naming the argument, for anything that :func:`causal_conv1d_fn` does not take."""
    if x.dim() != 3 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, but must be (batch, dim, seqlen) with seqlen >= 1")
    _check_filter(x, weight, bias, activation)
    batch, dim, seqlen = x.shape
    state_shape = (batch, dim, weight.shape[1] - 1)
    if seq_idx is not None:
        _check_tensor("seq_idx", seq_idx, (batch, seqlen), "(batch, seqlen)", x)
        _check_int("seq_idx", seq_idx)
        if initial_states is not None or return_final_states:
            raise ValueError(
                "seq_idx packs several sequences into a row, so initial_states and return_final_states are not defined "
                "with it: leave seq_idx out, or process the sequences one by one"
            )
    if initial_states is not None:
        _check_tensor("initial_states", initial_states, state_shape, "(batch, dim, width - 1)", x)
        _check_float("initial_states", initial_states)
    if final_states_out is not None:
        if not return_final_states:
            raise ValueError("final_states_out is given, but return_final_states is False: pass True to have it filled")
        _check_tensor("final_states_out", final_states_out, state_shape, "(batch, dim, width - 1)", x)
        _check_float("final_states_out", final_states_out)


def check_update_arguments(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> None:
    """Raise ValueError or TypeError, naming the argument, for what :func:`causal_conv1d_update` does not take."""
    if x.dim() not in (2, 3) or (x.dim() == 3 and x.shape[-1] == 0):
        raise ValueError(f"x has shape {tuple(x.shape)}, but must be (batch, dim) or (batch, dim, seqlen >= 1)")
    _check_filter(x, weight, bias, activation)
    batch, dim = x.shape[:2]
    if conv_state.dim() != 3 or conv_state.shape[-1] < weight.shape[1] - 1:
        raise ValueError(
            f"conv_state has shape {tuple(conv_state.shape)}, but must be (batch, dim, state_len) with "
            f"state_len >= width - 1 = {weight.shape[1] - 1}"
        )
    rows = batch if conv_state_indices is None else conv_state.shape[0]
    _check_tensor("conv_state", conv_state, (rows, dim, conv_state.shape[-1]), "(batch, dim, state_len)", x)
    _check_float("conv_state", conv_state)
    for name, index in (("cache_seqlens", cache_seqlens), ("conv_state_indices", conv_state_indices)):
        if index is not None:
            _check_tensor(name, index, (batch,), "(batch,)", x)
            _check_int(name, index)


def _compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def final_states(x: Tensor, initial_states: Tensor | None, width: int, reverse: bool) -> Tensor:
    """The last ``width - 1`` inputs in scan order, (batch, dim, width - 1): what a continuation needs."""
    history = width - 1
    last = x[..., :history].flip(-1) if reverse else x[..., -history:]
    if x.shape[-1] >= history:
        return last.clone()
    if initial_states is None:
        return F.pad(last, (history - x.shape[-1], 0))
    return torch.cat([initial_states.to(x.dtype), last], dim=-1)[..., -history:]


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    *,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Reference of :func:`causal_conv1d_fn`; the order of the positional arguments is that of the public reference."""
    check_conv_arguments(x, weight, bias, seq_idx, initial_states, return_final_states, final_states_out, activation)
    width, seqlen = weight.shape[1], x.shape[-1]
    dtype = _compute_dtype(x, weight, bias, initial_states)
    scan_x = x.flip(-1) if reverse else x
    history = x.new_zeros(*x.shape[:2], width - 1) if initial_states is None else initial_states
    padded = torch.cat([history.to(dtype), scan_x.to(dtype)], dim=-1)
    taps = [padded[..., k : k + seqlen] for k in range(width)]
    if seq_idx is not None:
        scan_idx = seq_idx.flip(-1) if reverse else seq_idx
        owner = F.pad(scan_idx, (width - 1, 0), value=-1)
        taps = [torch.where((owner[:, k : k + seqlen] == scan_idx)[:, None], tap, 0) for k, tap in enumerate(taps)]
    y = sum(weight[:, k, None].to(dtype) * tap for k, tap in enumerate(taps))
    if bias is not None:
        y = y + bias[:, None].to(dtype)
    if activation is not None:
        y = F.silu(y)
    if seq_idx is not None:
        y = torch.where((scan_idx >= 0)[:, None], y, 0)
    out = (y.flip(-1) if reverse else y).to(x.dtype)
    if not return_final_states:
        return out
    states = final_states(x, initial_states, width, reverse)
    return out, states if final_states_out is None else final_states_out.copy_(states)


def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Reference of :func:`causal_conv1d_update`."""
    check_update_arguments(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
    if x.dim() == 2:
        return causal_conv1d_update_ref(
            x[..., None], conv_state, weight, bias, activation, cache_seqlens, conv_state_indices
        )[..., 0]
    width, state_len = weight.shape[1], conv_state.shape[-1]
    dim, seqlen = x.shape[1:]
    if conv_state_indices is None:
        state = conv_state
    else:
        valid = conv_state_indices >= 0
        state = conv_state[conv_state_indices.clamp(min=0)]

    if cache_seqlens is None:
        history = state[..., state_len - (width - 1) :]
        new_state = torch.cat([state, x.detach().to(state.dtype)], dim=-1)[..., -state_len:]
    else:

        def slots(steps: Tensor) -> Tensor:
            """Positions in the circular buffer of the tokens ``steps`` after the next one, (batch, dim, len(steps))."""
            return ((cache_seqlens[:, None].long() + steps) % state_len)[:, None].expand(-1, dim, -1)

        history = state.gather(2, slots(torch.arange(1 - width, 0, device=x.device)))
        kept = min(seqlen, state_len)
        written = slots(torch.arange(seqlen - kept, seqlen, device=x.device))
        new_state = state.scatter(2, written, x[..., seqlen - kept :].detach().to(state.dtype))

    out = causal_conv1d_ref(x, weight, bias, history.clone(), activation=activation)
    if conv_state_indices is None:
        conv_state.copy_(new_state)
        return out
    conv_state[conv_state_indices[valid].long()] = new_state[valid]
    return torch.where(valid[:, None, None], out, 0)
