"""The selective scan as operators: `selective_scan_fn` and `bidirectional_scan_fn`, on kernels or on the reference.

The kernels are two functional operators that the dispatcher finds by device, `mamba_ssm::selective_scan_fwd` and its
backward `mamba_ssm::selective_scan_bwd`. Both directions of time, the gate, the skip D and the sum of two directions
are part of them, so that a bidirectional block is two calls without a flip or a copy:

    out = scale · (scan(u, …) + D u + addend) · silu(z)
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from causal_conv1d.ops import refuse_second_derivative
from mamba_ssm._backend import use_kernel
from mamba_ssm.ops.discretization_ref import get_method
from mamba_ssm.ops.selective_scan_ref import (
    ScanArgs,
    bidirectional_scan_ref,
    check_bidirectional_arguments,
    check_scan_arguments,
    selective_scan_ref,
)

_TENSORS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
# (channels, rank) float32: Δ before the bias is delta_weight · delta, and delta is (batch, rank, length)
_TENSORS += "Tensor? delta_weight, "
_OPTIONS = "float scale, bool delta_softplus, bool reverse, str discretization_method"
# out, last state (batch, channels, states), and the states before every `checkpoint_steps` steps, the first of all only
# where it is not zeros; only the backward reads them; none with checkpoint_steps = 0
torch.library.define(
    "mamba_ssm::selective_scan_fwd",
    f"({_TENSORS} Tensor? initial_state, Tensor? addend, {_OPTIONS}, bool float_out, int checkpoint_steps) "
    "-> (Tensor out, Tensor last_state, Tensor checkpoints)",
)
# The gradients without addend, whose share of dz comes from the scan that made it, through dz_addend: it is added to
# dz, which is float32 with float_dz, so that a sum of two is rounded once. ddelta is (batch, channels, length), with
# delta_weight too. dB and dC in float32, (batch, groups, states, length) or constant. The gradients of absent tensors
# are empty.
torch.library.define(
    "mamba_ssm::selective_scan_bwd",
    f"(Tensor dout, Tensor? dlast_state, {_TENSORS} Tensor? dz_addend, Tensor checkpoints, {_OPTIONS}, "
    "bool float_dz, int checkpoint_steps) "
    "-> (Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz, Tensor ddelta_bias, "
    "Tensor dinitial_state)",
)


def selective_scan_fn(
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
    use_cuda_kernel: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan (Mamba, arXiv 2312.00752, Alg. 2) under any discretization of `METHODS`.

        Δ = softplus(delta + delta_bias)     h_t = Ā(Δ_t, A) h_{t-1} + c(Δ_t, A) B_t u_t     out = (C·h + D u) silu(z)

    u, delta, z: (batch, channels, length), float32, float16 or bfloat16, any strides; memory with the channels
    innermost, as a transposed view of (batch, length, channels), is the fast path. delta may also be float32.
    A: (channels, N) float32, N from 1 to 256. D, delta_bias: (channels,) float32.
    B, C: (channels, N) constant, (batch, N, length), or (batch, groups, N, length).
    initial_state: (batch, channels, N) float32, the state before the first step; zero by default.
    reverse: scan from the last position to the first. out[..., t] stays at t.
    use_cuda_kernel: see `mamba_ssm._backend.use_kernel`.

    Returns out, (batch, channels, length) in u's dtype, laid out in memory as u is; with return_last_state also the
    state after the last step, (batch, channels, N) float32. Everything is differentiable, the last state included.
    Δ, A, D and the state are computed in float32 whatever the dtype of u; float64 inputs run on the reference.
    Raises ValueError for a wrong argument (named, with what is allowed), RuntimeError where a CUDA kernel is asked for
    and missing.
    """
    check_scan_arguments(u, delta, A, B, C, D, z, delta_bias, initial_state, discretization_method)
    if not use_kernel(u, use_cuda_kernel) or _any_float64(A, B, C, D, delta_bias, initial_state):
        return selective_scan_ref(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, discretization_method,
            initial_state, reverse=reverse,
        )  # fmt: skip
    _check_diagonal(A)
    args = ScanArgs(u, delta, A, B, C, D, delta_bias)
    out, last_state = _scan(args, z, initial_state, delta_softplus, reverse, discretization_method)
    return (out, last_state) if return_last_state else out


def bidirectional_scan_fn(
    forward: ScanArgs,
    backward: ScanArgs,
    z: Tensor | None = None,
    *,
    delta_softplus: bool = True,
    scale: float = 1.0,
    discretization_method: str = "zoh",
    use_cuda_kernel: bool | None = None,
) -> Tensor:
    """scale · (scan(forward) + reverse scan(backward)) · silu(z): Vision Mamba's two directions under one gate.

    The arguments of each direction are those of `selective_scan_fn`; nothing is flipped, position t of every tensor is
    position t of the sequence. The sum is carried in float32. Returns (batch, channels, length) in the dtype of
    forward.u. Raises as `selective_scan_fn` does.
    """
    check_bidirectional_arguments(forward, backward, z, discretization_method)
    parameters = [t for args in (forward, backward) for t in (args.A, args.B, args.C, args.D, args.delta_bias)]
    if not use_kernel(forward.u, use_cuda_kernel) or _any_float64(*parameters):
        return bidirectional_scan_ref(
            forward,
            backward,
            z,
            delta_softplus=delta_softplus,
            scale=scale,
            discretization_method=discretization_method,
        )
    _check_diagonal(forward.A)
    _check_diagonal(backward.A)
    tensors = (*_with_equal_groups(forward), *_with_equal_groups(backward), z)
    # Each tensor is passed once, though both directions may use it: torch.compile asks for that.
    distinct: list[Tensor | None] = []
    places = []
    for tensor in tensors:
        place = next((i for i, known in enumerate(distinct) if known is tensor), len(distinct))
        places.append(place)
        if place == len(distinct):
            distinct.append(tensor)
    options = (scale, delta_softplus, discretization_method, checkpoint_steps(distinct, forward.A))
    return _BidirectionalScan.apply(options, tuple(places), *distinct)


def _any_float64(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.dtype == torch.float64 for t in tensors)


def _check_diagonal(A: Tensor) -> None:
    if A.dim() != 2:
        raise ValueError(
            f"A: got shape {tuple(A.shape)}; expected (channels, N), as the kernels take diagonal A only; call "
            "selective_scan_ref for full matrices"
        )


def _scan(
    args: ScanArgs,
    z: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    discretization_method: str,
) -> tuple[Tensor, Tensor]:
    u, delta, A, B, C, D, delta_bias = _with_equal_groups(args)
    inputs = (u, delta, A, B, C, D, z, delta_bias, None, initial_state, None)
    out, last_state, _ = torch.ops.mamba_ssm.selective_scan_fwd(
        *inputs, 1.0, delta_softplus, reverse, discretization_method, False, checkpoint_steps(inputs, A)
    )
    return out, last_state


def needs_gradient(tensors: Iterable[Tensor | None]) -> bool:
    """Whether autograd will ask for a gradient of any of them."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def checkpoint_steps(tensors: Iterable[Tensor | None], A: Tensor, lean_length: int | None = None) -> int:
    """Steps from one checkpoint of the state to the next, 0 where autograd will ask for no gradient of the tensors.

    On a GPU, 8 make the backward pass fastest. Where memory counts more, for sequences of `lean_length` steps, there
    are 64, or no checkpoints in a short sequence: what lies between is made again in scratch memory. On a CPU they are
    at least N, so that the checkpoints are no larger than the activations."""
    if not needs_gradient(tensors):
        return 0
    if A.device.type == "cuda":
        return 8 if lean_length is None else 256 if lean_length <= 256 else 64
    return min(max(1 << (A.shape[1] - 1).bit_length(), 32), 256)


def checkpoint_count(length: int, steps: int, from_zeros: bool) -> int:
    """How many states `selective_scan_fwd` keeps of each sequence; from_zeros: without an initial state."""
    return -(-length // steps) - int(from_zeros) if length and steps else 0


def _with_equal_groups(args: ScanArgs) -> ScanArgs:
    if args.B.dim() == 2 or args.C.dim() == 2:
        return args
    groups = max(t.shape[1] if t.dim() == 4 else 1 for t in (args.B, args.C))
    return args._replace(B=_with_groups(args.B, groups), C=_with_groups(args.C, groups))


def _with_groups(B: Tensor, groups: int) -> Tensor:
    """B (batch, N, length) or (batch, g, N, length) as the operators take it: one group, or as many as its partner."""
    own = B.shape[1] if B.dim() == 4 else 1
    if own == groups:
        return B
    if own == 1:
        return B.squeeze(1) if B.dim() == 4 else B
    if groups % own:
        raise ValueError(f"B and C: got {own} and {groups} groups; expected one number of groups to divide the other")
    return B.repeat_interleave(groups // own, dim=1)


# ---- what torch.compile and autograd need to know of the operators -----------------------------------------------


def empty_like_activation(like: Tensor, dtype: torch.dtype, channels: int | None = None) -> Tensor:
    """(batch, channels, length), with the channels innermost in memory where `like` has them so."""
    batch, own_channels, length = like.shape
    channels = own_channels if channels is None else channels
    if like.stride(1) == 1 and own_channels > 1:
        return like.new_empty(batch, length, channels, dtype=dtype).transpose(1, 2)
    return like.new_empty(batch, channels, length, dtype=dtype)


@torch.library.register_fake("mamba_ssm::selective_scan_fwd")
def _(
    u, delta, A, B, C, D, z, delta_bias, delta_weight, initial_state, addend,
    scale, delta_softplus, reverse, method, float_out, checkpoint_steps,
):  # fmt: skip
    batch, channels, length = u.shape
    states = A.shape[1]
    checkpoints = checkpoint_count(length, checkpoint_steps, from_zeros=initial_state is None)
    return (
        empty_like_activation(u, torch.float32 if float_out else u.dtype),
        u.new_empty(batch, channels, states, dtype=torch.float32),
        u.new_empty(batch, checkpoints, states, channels, dtype=torch.float32),
    )


@torch.library.register_fake("mamba_ssm::selective_scan_bwd")
def _(
    dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, delta_weight, dz_addend, checkpoints,
    scale, delta_softplus, reverse, method, float_dz, checkpoint_steps,
):  # fmt: skip
    batch, channels, length = u.shape
    states = A.shape[1]
    groups = max(t.shape[1] if t.dim() == 4 else 1 for t in (B, C))

    def floats(*shape: int) -> Tensor:
        return u.new_empty(shape, dtype=torch.float32)

    def matrix(t: Tensor) -> Tensor:
        if t.dim() == 2:
            return floats(channels, states)
        if t.stride(-2) == 1:
            return floats(batch, groups, length, states).transpose(2, 3)
        return floats(batch, groups, states, length)

    return (
        empty_like_activation(u, u.dtype),
        empty_like_activation(delta if delta_weight is None else u, delta.dtype),
        floats(channels, states),
        matrix(B),
        matrix(C),
        floats(0) if D is None else floats(channels),
        floats(0) if z is None else empty_like_activation(z, torch.float32 if float_dz else z.dtype),
        floats(0) if delta_bias is None else floats(channels),
        floats(batch, channels, states),
    )


def _setup_context(ctx, inputs, output):
    *tensors, initial_state, addend, scale, delta_softplus, reverse, method, _, steps = inputs
    if tensors[8] is not None or addend is not None:
        raise NotImplementedError(
            "mamba_ssm::selective_scan_fwd has no derivative of its own where delta_weight or addend is given: "
            "call selective_scan_fn, bidirectional_scan_fn or mixer_fn"
        )
    ctx.save_for_backward(*tensors, output[2])
    ctx.has_initial_state = initial_state is not None
    ctx.options, ctx.checkpoint_steps = (scale, delta_softplus, reverse, method), steps
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlast_state, dcheckpoints):
    *tensors, checkpoints = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(tensors[0])
    gradients, dinitial_state = scan_gradients(
        dout, dlast_state, *tensors, None, checkpoints, *ctx.options, False, ctx.checkpoint_steps
    )
    return *gradients, None, dinitial_state if ctx.has_initial_state else None, *[None] * 7


torch.library.register_autograd("mamba_ssm::selective_scan_fwd", _backward, setup_context=_setup_context)
refuse_second_derivative("mamba_ssm::selective_scan_bwd")


# ---- what torch.utils.flop_counter.FlopCounterMode needs to know of them ------------------------------------------


@register_flop_formula(torch.ops.mamba_ssm.selective_scan_fwd)
def selective_scan_flops(
    u, delta, A, B, C, D, z, delta_bias, delta_weight, initial_state, addend,
    scale, delta_softplus, reverse, method, float_out, checkpoint_steps, *, out_shape=None,
) -> int:  # fmt: skip
    """Operations of `selective_scan_fwd` from the shapes of its tensors; a multiply-add is two, an exp one.

    Per state and step: Ā and c, `forward_operations` of the method; c·B·u 2, h = Ā h + · 2, C·h 2. For zoh these are 8.
    Per channel and step: D u 2 where D is given, and 2 R for Δ = delta_weight · delta. Elementwise operations around
    them (bias, softplus, gate, scale, addend) are not counted, as torch's counter counts none.

    The figure often quoted, 9·B·L·D·N + B·L·D (state-spaces/mamba, issue 110), is that of zoh in a parallel scan, whose
    2 L compositions of 3 operations make 6 of the 9; this recurrence needs 2 there. Its last term is D u as one
    operation.
    """
    batch, channels, length = u
    per_state = get_method(method).forward_operations + 6
    per_channel = 2 * (D is not None) + _delta_flops(delta_weight)
    return batch * channels * length * (A[1] * per_state + per_channel)


@register_flop_formula(torch.ops.mamba_ssm.selective_scan_bwd)
def selective_scan_backward_flops(
    dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, delta_weight, dz_addend, checkpoints,
    scale, delta_softplus, reverse, method, float_dz, checkpoint_steps, *, out_shape=None,
) -> int:  # fmt: skip
    """Operations of `selective_scan_bwd`, what it computes again included, in the units of `selective_scan_flops`.

    Per state and step: Ā and c with their derivatives and the gradients of Δ and A, `backward_operations` of the
    method; the state again, with c·u and c·u·B 4; its gradient g = C dout + Ā g 3; the gradients of Ā, g·h 1, of c,
    g·B·u 2, and shares of those of u, g·B·c 2, of B, g·(c·u) 2, and of C, h·dout 2; the sums into those of Δ and A 2.
    For zoh these are 24. With z, whose gradient needs the output before the gate, C·h again 2.
    Per channel and step: 4 for the gradients of u and D through D u where D is given, and 2 R for Δ again.
    The gradients of delta and delta_weight are matrix products outside of the operator.
    """
    batch, channels, length = u
    per_state = get_method(method).backward_operations + 18 + 2 * (z is not None)
    per_channel = 4 * (D is not None) + _delta_flops(delta_weight)
    return batch * channels * length * (A[1] * per_state + per_channel)


def _delta_flops(delta_weight: tuple[int, int] | None) -> int:
    return 0 if delta_weight is None else 2 * delta_weight[1]


def scan_gradients(dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, *rest):
    """selective_scan_bwd, with the gradients of u … delta_bias in their tensors' shapes and dtypes, None for None."""
    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state = torch.ops.mamba_ssm.selective_scan_bwd(
        dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, *rest
    )
    gradients = (
        du,
        ddelta,
        dA,
        _sum_groups(dB, B).to(B.dtype),
        _sum_groups(dC, C).to(C.dtype),
        None if D is None else dD,
        None if z is None else dz,
        None if delta_bias is None else ddelta_bias,
    )
    return gradients, dinitial_state


def _sum_groups(gradient: Tensor, B: Tensor) -> Tensor:
    if B.dim() != 3:
        return gradient
    return gradient.squeeze(1) if gradient.shape[1] == 1 else gradient.sum(1)


class _BidirectionalScan(torch.autograd.Function):
    """Both scans under one gate. Neither the sum of the two nor its gradient is kept: each scan brings its share."""

    @staticmethod
    def forward(ctx, options, places, *distinct):
        scale, delta_softplus, method, steps = options
        *tensors, z = [distinct[i] for i in places]
        along, against = ScanArgs(*tensors[:7]), ScanArgs(*tensors[7:])
        scan = torch.ops.mamba_ssm.selective_scan_fwd
        y, _, along_checkpoints = scan(
            *along[:6], None, along.delta_bias, None, None, None,
            1.0, delta_softplus, False, method, True, steps,
        )  # fmt: skip
        out, _, against_checkpoints = scan(
            *against[:6], z, against.delta_bias, None, None, y,
            scale, delta_softplus, True, method, False, steps,
        )  # fmt: skip
        ctx.save_for_backward(*distinct, along_checkpoints, against_checkpoints)
        ctx.options, ctx.places = options, places
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        scale, delta_softplus, method, steps = ctx.options
        *distinct, along_checkpoints, against_checkpoints = ctx.saved_tensors
        *tensors, z = [distinct[i] for i in ctx.places]
        gradients, dz = [], None
        for args, checkpoints, reverse in (
            (ScanArgs(*tensors[:7]), along_checkpoints, False),
            (ScanArgs(*tensors[7:]), against_checkpoints, True),
        ):
            (*of_args, dz, ddelta_bias), _ = scan_gradients(
                dout, None, *args[:6], z, args.delta_bias, None, dz, checkpoints,
                scale, delta_softplus, reverse, method, not reverse, steps,
            )  # fmt: skip
            gradients += [*of_args, ddelta_bias]
        totals: list[Tensor | None] = [None] * len(distinct)
        for place, gradient in zip(ctx.places, [*gradients, dz], strict=True):
            totals[place] = gradient if totals[place] is None else totals[place] + gradient
        return None, None, *totals
