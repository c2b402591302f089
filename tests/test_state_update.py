"""One token at a time equals the whole sequence, for every method; heads and groups; the public 1.x behaviour."""

import pytest
import torch
import torch.nn.functional as F

from mamba_ssm.ops.discretization_ref import METHODS
from mamba_ssm.ops.selective_scan_ref import selective_scan_ref
from mamba_ssm.ops.selective_state_update import selective_state_update
from mamba_ssm.ops.triton import selective_state_update as public

ALL = list(METHODS)
BATCH, CHANNELS, LENGTH, STATES = 2, 4, 6, 3


def arguments(dtype=torch.float32):
    """The scan's arguments: u, delta, A, B, C, D, z, delta_bias."""
    torch.manual_seed(0)
    wide, narrow = (BATCH, CHANNELS, LENGTH), (BATCH, STATES, LENGTH)
    return {
        "u": torch.randn(wide, dtype=dtype),
        "delta": torch.randn(wide, dtype=dtype),
        "A": -3 * torch.rand(CHANNELS, STATES),
        "B": torch.randn(narrow, dtype=dtype),
        "C": torch.randn(narrow, dtype=dtype),
        "D": torch.randn(CHANNELS),
        "z": torch.randn(wide, dtype=dtype),
        "delta_bias": torch.randn(CHANNELS),
    }


def token(args, t):
    """The update's arguments for step t."""
    u, delta, A, B, C, D, z, delta_bias = args.values()
    at_t = {"x": u, "dt": delta, "B": B, "C": C, "z": z}
    return {"A": A, "D": D, "dt_bias": delta_bias, **{name: tensor[..., t] for name, tensor in at_t.items()}}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ALL)
def test_token_by_token_equals_the_scan(method, dtype):
    args = arguments(dtype)
    expected, expected_state = selective_scan_ref(
        **args, delta_softplus=True, return_last_state=True, discretization_method=method
    )
    state = torch.zeros(BATCH, CHANNELS, STATES, dtype=expected_state.dtype)
    outs = [
        selective_state_update(state, **token(args, t), dt_softplus=True, discretization_method=method)
        for t in range(LENGTH)
    ]
    assert outs[0].dtype == dtype
    torch.testing.assert_close(torch.stack(outs, dim=-1), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(state, expected_state)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_state_is_updated_in_place_in_its_own_dtype(state_dtype):
    args = token(arguments(), 0)
    state = torch.randn(BATCH, CHANNELS, STATES).to(state_dtype)
    alias, exact = state.view(-1), state.float().clone()
    out = selective_state_update(state, **args, dt_softplus=True)
    expected = selective_state_update(exact, **args, dt_softplus=True)
    torch.testing.assert_close(out, expected)  # the output sees the new state before it is rounded
    assert torch.equal(alias, exact.to(state_dtype).view(-1))


def test_public_formula():
    """mamba_ssm 1.x: state ← exp(dt A) state + dt B x, y = state · C + D x, gated by silu(z)."""
    args, state = token(arguments(), 0), torch.randn(BATCH, CHANNELS, STATES)
    dt = F.softplus(args["dt"] + args["dt_bias"])
    new = torch.exp(torch.einsum("bd,dn->bdn", dt, args["A"])) * state
    new += torch.einsum("bd,bn,bd->bdn", dt, args["B"], args["x"])
    y = torch.einsum("bdn,bn->bd", new, args["C"]) + args["D"] * args["x"]
    out = public.selective_state_update(
        state, args["x"], args["dt"], args["A"], args["B"], args["C"], args["D"], args["z"], args["dt_bias"], True
    )
    torch.testing.assert_close(out, y * F.silu(args["z"]))
    torch.testing.assert_close(state, new)
    assert public.selective_state_update_ref is public.selective_state_update


def test_optional_arguments():
    args = token(arguments(), 0)
    required = {name: args[name] for name in ("x", "dt", "A", "B", "C")}
    state = torch.zeros(BATCH, CHANNELS, STATES)
    out = selective_state_update(state, **required)
    torch.testing.assert_close(state, args["dt"][..., None] * args["B"][:, None] * args["x"][..., None])
    torch.testing.assert_close(out, torch.einsum("bdn,bn->bd", state, args["C"]))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True], ids=["per channel", "tied over a head"])
@pytest.mark.parametrize("method", ["zoh", "highorder"])
def test_heads(method, tied, groups):
    """Heads of channels give, head by head, what the update without heads gives."""
    torch.manual_seed(0)
    heads, channels = 4, 5
    x, dt, z = torch.randn(3, BATCH, heads, channels)
    A, D, dt_bias = -torch.rand(heads, channels, STATES), torch.randn(heads, channels), torch.randn(heads, channels)
    if tied:
        dt, dt_bias, D = (t[..., :1].expand(t.shape) for t in (dt, dt_bias, D))
        A = A[:, :1, :1].expand(A.shape)
    B, C = torch.randn(2, BATCH, groups, STATES)
    state = torch.randn(BATCH, heads, channels, STATES)
    states = state.clone()

    options = {"dt_softplus": True, "discretization_method": method}
    out = selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, **options)
    assert out.shape == (BATCH, heads, channels)
    for h in range(heads):
        g, head_state = h // (heads // groups), states[:, h].clone()
        expected = selective_state_update(
            head_state, x[:, h], dt[:, h], A[h], B[:, g], C[:, g], D[h], z[:, h], dt_bias[h], **options
        )
        torch.testing.assert_close(out[:, h], expected)
        torch.testing.assert_close(state[:, h], head_state)


def test_autocast_does_not_lower_the_precision():
    args, start = token(arguments(), 0), torch.randn(BATCH, CHANNELS, STATES)
    plain, cast = start.clone(), start.clone()
    expected = selective_state_update(plain, **args, dt_softplus=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(selective_state_update(cast, **args, dt_softplus=True), expected)
    assert torch.equal(cast, plain)


BAD = {
    "state rank": ("state", torch.zeros(2, 4), r"state: got shape \(2, 4\); expected a non-empty"),
    "empty batch": ("state", torch.zeros(0, 4, 3), "state: .* non-empty"),
    "x shape": ("x", torch.zeros(2, 5), r"x: got shape \(2, 5\); expected shape \(2, 4\), to match a state of shape"),
    "dt shape": ("dt", torch.zeros(2, 4, 1), "dt: got shape"),
    "A full": ("A", torch.zeros(4, 3, 3), r"A: got shape \(4, 3, 3\); expected shape \(4, 3\)"),
    "B shape": ("B", torch.zeros(2, 1, 3), "B: got shape"),
    "C shape": ("C", torch.zeros(4, 3), "C: got shape"),
    "D shape": ("D", torch.zeros(3), "D: got shape"),
    "z shape": ("z", torch.zeros(2, 3), "z: got shape"),
    "dt_bias shape": ("dt_bias", torch.zeros(2, 4), "dt_bias: got shape"),
    "A complex": ("A", torch.zeros(4, 3, dtype=torch.complex64), "A: .* complex state spaces are not supported"),
    "x integer": ("x", torch.zeros(2, 4).int(), "x: got torch.int32"),
    "device": ("z", torch.zeros(2, 4, device="meta"), "z: got device meta; expected the state's device, cpu"),
    "method": ("discretization_method", "euler", "unknown method 'euler'; choose one of zoh"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case):
    name, value, message = BAD[case]
    args = {"state": torch.zeros(BATCH, CHANNELS, STATES), **token(arguments(), 0)}
    with pytest.raises(ValueError, match=message):
        selective_state_update(**args | {name: value})


def test_refuses_groups_that_do_not_divide_the_heads():
    state, x, A = torch.zeros(1, 4, 2, 3), torch.zeros(1, 4, 2), torch.zeros(4, 2, 3)
    with pytest.raises(ValueError, match="B: got 3 groups; expected a number that divides the 4 heads"):
        selective_state_update(state, x, x, A, torch.zeros(1, 3, 3), torch.zeros(1, 3, 3))
