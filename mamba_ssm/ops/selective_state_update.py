"""One step of the selective scan, for generation token by token: the state of the past in, the next output out."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_ssm.ops.discretization_ref import discretize, get_method


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    discretization_method: str = "zoh",
) -> Tensor:
    """Advance `state` in place by one token and return the output; token by token this is `selective_scan_ref`.

    state: (B, D, N), any floating dtype; float32 keeps it exact. x, dt, z: (B, D). A: (D, N). B, C: (B, N).
    D, dt_bias: (D,). Or, with H heads of P channels and G groups: state (B, H, P, N); x, dt, z (B, H, P);
    A (H, P, N); B, C (B, G, N); D, dt_bias (H, P); head h belongs to group h // (H // G).
    dt_softplus: the step is softplus(dt + dt_bias).

    Computes in float32, in float64 if any input is float64, also under autocast. Returns (B, D), or (B, H, P), in x's
    dtype. Raises ValueError for an unknown method, a wrong shape, an integer or complex tensor, a mix of devices.
    """
    _check(discretization_method, state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    tensors = (x, dt, A, B, C, D, z, dt_bias)
    is_double = any(t is not None and t.dtype == torch.float64 for t in (state, *tensors))
    dtype = torch.float64 if is_double else torch.float32
    out_dtype = x.dtype
    x, dt, A, B, C, D, z, dt_bias = (None if t is None else t.to(dtype) for t in tensors)

    if state.dim() == 4:
        heads_per_group = state.shape[1] // B.shape[1]
        B = B.repeat_interleave(heads_per_group, dim=1)[:, :, None]  # (B, H, 1, N)
        C = C.repeat_interleave(heads_per_group, dim=1)[:, :, None]
    else:
        B, C = B[:, None], C[:, None]  # (B, 1, N)

    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = F.softplus(dt)
    # Heads and their channels are one axis to `discretize`, for which a third axis of A would mean full matrices.
    A_bar, c = discretize(discretization_method, dt.flatten(1), A.flatten(0, -2))
    new_state = A_bar.view_as(state) * state + c.view_as(state) * B * x[..., None]
    state.copy_(new_state)

    out = (new_state * C).sum(-1)
    if D is not None:
        out = out + D * x
    if z is not None:
        out = out * F.silu(z)
    return out.to(out_dtype)


# In the public package the name of the plain PyTorch version; here the two are one.
selective_state_update_ref = selective_state_update


def _check(discretization_method: str, state: Tensor, **tensors: Tensor | None) -> None:
    """Ranks, shapes, dtypes and devices against those of the state; `tensors` by the names of the arguments."""
    get_method(discretization_method)
    if state.dim() not in (3, 4) or 0 in state.shape:
        _refuse("state", f"shape {tuple(state.shape)}", "a non-empty (batch, channels, N) or (batch, heads, P, N)")
    batch, *channels, states = state.shape
    groups = []
    if state.dim() == 4:
        groups = [tensors["B"].shape[1] if tensors["B"].dim() == 3 else 1]
        if groups[0] < 1 or channels[0] % groups[0] != 0:
            _refuse("B", f"{groups[0]} groups", f"a number that divides the {channels[0]} heads")

    per_token, per_channel, per_state = (batch, *channels), tuple(channels), (batch, *groups, states)
    shapes = {"x": per_token, "dt": per_token, "z": per_token, "D": per_channel, "dt_bias": per_channel}
    shapes |= {"A": (*channels, states), "B": per_state, "C": per_state}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != shapes[name]:
            given, state_shape = tuple(tensor.shape), tuple(state.shape)
            _refuse(name, f"shape {given}", f"shape {shapes[name]}, to match a state of shape {state_shape}")

    for name, tensor in {"state": state, **tensors}.items():
        if tensor is not None and not tensor.dtype.is_floating_point:
            _refuse(name, str(tensor.dtype), "a real floating dtype; complex state spaces are not supported")
        if tensor is not None and tensor.device != state.device:
            _refuse(name, f"device {tensor.device}", f"the state's device, {state.device}; move it with .to()")


def _refuse(argument: str, given: str, allowed: str) -> None:
    raise ValueError(f"{argument}: got {given}; expected {allowed}")
