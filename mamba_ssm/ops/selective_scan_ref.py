"""The selective scan in plain PyTorch: a loop over time that is the specification of every kernel.

Per channel d, with a state h of N entries, Ā and c from one row of `discretization_ref.METHODS`:

    Δ_t = softplus(delta_t + delta_bias)                    (softplus optional)
    h_t = Ā(Δ_t, A) h_{t-1} + c(Δ_t, A) B_t u_t             h before the first step: initial_state, or 0
    y_t = C_t · h_t + D u_t
    out_t = y_t · silu(z_t)                                 (gate optional)

Symbols: batch B, channels D, length L, states N, groups G.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_ssm.ops.discretization_ref import discretize, get_method

MAX_STATES = 256

_ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_PARAMETER_DTYPES = (torch.float32, torch.float64)


class ScanArgs(NamedTuple):
    """The arguments of one direction of a bidirectional scan; shapes as in `selective_scan_ref`."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    delta_bias: Tensor | None = None


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    discretization_method: str = "zoh",
    initial_state: Tensor | None = None,
    *,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The equations at the top of this file, with any strides, differentiable in every tensor.

    u, delta, z: (B, D, L), one floating dtype; delta may also be float32.
    A: (D, N) diagonals, or (D, N, N) full matrices (c is then a matrix too, and acts on B_t); float32 or float64.
    B, C: (D, N) constant, or (B, N, L) or (B, G, N, L) varying in time; channel d belongs to group d // (D // G).
    D, delta_bias: (D,), initial_state: (B, D, N); float32 or float64.
    delta_softplus: Δ = softplus(delta + delta_bias), where softplus(v) = v for v > 20.
    reverse: scan from t = L-1 down to 0. out[..., t] stays at t; the last state is the one after t = 0.

    Computes in float32, in float64 if any input is float64, also under autocast. For the backward pass autograd
    keeps B·D·L·N numbers many times over: 5 times for zoh, 32 times for the methods with φ functions.
    Returns out (B, D, L) in u's dtype, and with return_last_state also the last state (B, D, N), in the dtype of the
    computation. Raises ValueError for what `check_scan_arguments` lists. Inf and NaN in the inputs propagate.
    """
    check_scan_arguments(u, delta, A, B, C, D, z, delta_bias, initial_state, discretization_method)
    args = ScanArgs(u, delta, A, B, C, D, delta_bias)
    dtype = _compute_dtype(*args, z, initial_state)
    with torch.autocast(u.device.type, enabled=False):
        y, last_state = _scan(args, delta_softplus, discretization_method, initial_state, reverse, dtype)
        out = _gate(y, z).to(u.dtype)
    return (out, last_state) if return_last_state else out


def bidirectional_scan_ref(
    forward: ScanArgs,
    backward: ScanArgs,
    z: Tensor | None = None,
    *,
    delta_softplus: bool = True,
    scale: float = 1.0,
    discretization_method: str = "zoh",
) -> Tensor:
    """scale · (scan(forward) + reverse scan(backward)) · silu(z), gated once, rounded once; (B, D, L) in u's dtype.

    Both directions have their own arguments, in `selective_scan_ref`'s shapes and dtypes; the u of both must agree in
    shape, dtype and device. Raises ValueError as `selective_scan_ref` does.
    """
    check_bidirectional_arguments(forward, backward, z, discretization_method)
    dtype = _compute_dtype(*forward, *backward, z)
    with torch.autocast(forward.u.device.type, enabled=False):
        y_forward, _ = _scan(forward, delta_softplus, discretization_method, None, False, dtype)
        y_backward, _ = _scan(backward, delta_softplus, discretization_method, None, True, dtype)
        return _gate(scale * (y_forward + y_backward), z).to(forward.u.dtype)


def _scan(
    args: ScanArgs,
    delta_softplus: bool,
    discretization_method: str,
    initial_state: Tensor | None,
    reverse: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """y (B, D, L) before the gate, and the last state (B, D, N), in dtype."""
    u, delta, A, B, C, D, delta_bias = (None if t is None else t.to(dtype) for t in args)
    batch, channels, length = u.shape

    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)

    # One entry per step: unbind, because its backward is one stack, where indexing by t would fill a whole tensor each.
    us, deltas = u.unbind(-1), delta.unbind(-1)
    Bs, Cs = _per_step(B, channels, length), _per_step(C, channels, length)

    state = u.new_zeros(batch, channels, A.shape[-1]) if initial_state is None else initial_state.to(dtype)
    ys = []
    for t in reversed(range(length)) if reverse else range(length):
        A_bar, c = discretize(discretization_method, deltas[t], A)
        state = _matvec(A_bar, state) + _matvec(c, Bs[t]) * us[t][..., None]
        ys.append((Cs[t] * state).sum(-1))

    y = torch.stack(ys[::-1] if reverse else ys, dim=-1)
    if D is not None:
        y = y + D[:, None] * u
    return y, state


def _matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """Product of a full matrix (.., N, N), or of a diagonal (.., N) of the vector's rank, and a vector (.., N)."""
    if matrix.dim() > vector.dim():
        return (matrix @ vector[..., None])[..., 0]
    return matrix * vector


def _per_step(B: Tensor, channels: int, length: int) -> Sequence[Tensor]:
    """B or C in any of its forms, as one tensor per step that broadcasts against (B, D, N)."""
    if B.dim() == 2:
        return [B[None]] * length
    if B.dim() == 3:
        return B[:, None].unbind(-1)
    return B.repeat_interleave(channels // B.shape[1], dim=1).unbind(-1)


def _gate(y: Tensor, z: Tensor | None) -> Tensor:
    return y if z is None else y * F.silu(z.to(y.dtype))


def _compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def check_scan_arguments(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    discretization_method: str = "zoh",
) -> None:
    """Raise ValueError, naming the argument and the remedy, unless the arguments are what `selective_scan_ref` states.

    Refused: an unknown method; a wrong rank or shape; an empty batch, B = 0, no channels, or L = 0; N outside 1..256;
    a number of groups that does not divide D; a complex or integer tensor; u, z and time-varying B, C of different
    dtypes; half-precision A, D, delta_bias or initial_state; tensors on different devices. Looks at metadata only, so
    it costs microseconds and torch.compile traces through it.
    """
    get_method(discretization_method)

    if u.dim() != 3:
        _refuse("u", _shape(u), "shape (batch, channels, length)")
    batch, channels, length = u.shape
    if batch < 1 or channels < 1 or length < 1:
        _refuse("u", _shape(u), "batch, channels and length of at least 1", "skip the scan for empty inputs")
    if A.dim() not in (2, 3) or A.shape[0] != channels or (A.dim() == 3 and A.shape[1] != A.shape[2]):
        _refuse("A", _shape(A), f"shape ({channels}, N), or ({channels}, N, N) for full matrices")
    states = A.shape[-1]
    if not 1 <= states <= MAX_STATES:
        _refuse("A", f"{states} states", f"1 to {MAX_STATES} states", "change d_state")

    _check_shape("delta", delta, (batch, channels, length))
    _check_shape("z", z, (batch, channels, length))
    _check_shape("D", D, (channels,))
    _check_shape("delta_bias", delta_bias, (channels,))
    _check_shape("initial_state", initial_state, (batch, channels, states))
    _check_input_matrix("B", B, batch, channels, states, length)
    _check_input_matrix("C", C, batch, channels, states, length)

    _check_dtype("u", u, _ACTIVATION_DTYPES, "convert it")
    same_as_u = "convert it to u's dtype"
    _check_dtype("delta", delta, (u.dtype, torch.float32), same_as_u)
    _check_dtype("z", z, (u.dtype,), same_as_u)
    _check_dtype("B", B, (u.dtype,) if B.dim() > 2 else (u.dtype, *_PARAMETER_DTYPES), same_as_u)
    _check_dtype("C", C, (u.dtype,) if C.dim() > 2 else (u.dtype, *_PARAMETER_DTYPES), same_as_u)
    parameters = (("A", A), ("D", D), ("delta_bias", delta_bias), ("initial_state", initial_state))
    for name, tensor in parameters:
        _check_dtype(name, tensor, _PARAMETER_DTYPES, "keep it in float32, with .float()")

    others = (("delta", delta), ("B", B), ("C", C), ("z", z), *parameters)
    for name, tensor in others:
        if tensor is not None and tensor.device != u.device:
            _refuse(name, f"device {tensor.device}", f"u's device, {u.device}", f"move it, with .to({str(u.device)!r})")


def check_bidirectional_arguments(
    forward: ScanArgs, backward: ScanArgs, z: Tensor | None = None, discretization_method: str = "zoh"
) -> None:
    """`check_scan_arguments` for both directions, and agreement of their u in shape, dtype and device."""
    for args in (forward, backward):
        u, delta, A, B, C, D, delta_bias = args
        check_scan_arguments(
            u, delta, A, B, C, D, z if args is forward else None, delta_bias, None, discretization_method
        )
    _check_shape("backward.u", backward.u, forward.u.shape)
    _check_dtype("backward.u", backward.u, (forward.u.dtype,), "convert it to the dtype of forward.u")
    if backward.u.device != forward.u.device:
        _refuse("backward.u", f"device {backward.u.device}", f"the device of forward.u, {forward.u.device}")


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tensor.shape != shape:
        _refuse(name, _shape(tensor), f"shape {tuple(shape)}")


def _check_input_matrix(name: str, B: Tensor, batch: int, channels: int, states: int, length: int) -> None:
    constant, varying = (channels, states), (batch, states, length)
    if B.dim() == 4:
        groups = B.shape[1]
        if B.shape != (batch, groups, states, length) or groups < 1 or channels % groups != 0:
            allowed = f"shape {(batch, 'G', states, length)} with G dividing {channels} channels"
            _refuse(name, _shape(B), allowed.replace("'", ""))
    elif B.shape != (varying if B.dim() == 3 else constant):
        _refuse(name, _shape(B), f"shape {constant}, {varying} or {(batch, 'G', states, length)}".replace("'", ""))


def _check_dtype(name: str, tensor: Tensor | None, allowed: tuple[torch.dtype, ...], remedy: str) -> None:
    if tensor is None or tensor.dtype in allowed:
        return
    if tensor.dtype.is_complex:
        remedy = "complex state spaces are not supported, use a real one"
    _refuse(name, str(tensor.dtype), " or ".join(str(dtype) for dtype in dict.fromkeys(allowed)), remedy)


def _shape(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"


def _refuse(argument: str, given: str, allowed: str, remedy: str = "") -> None:
    raise ValueError(f"{argument}: got {given}; expected {allowed}" + (f"; {remedy}" if remedy else ""))
