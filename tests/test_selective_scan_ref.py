"""The reference scan against scalar arithmetic, the public zoh formula, finite differences; its argument checks."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from mamba_ssm.ops.discretization_ref import METHODS, discretize
from mamba_ssm.ops.selective_scan_ref import (
    ScanArgs,
    bidirectional_scan_ref,
    check_scan_arguments,
    selective_scan_ref,
)

ALL = list(METHODS)
FORMS = ["constant", "varying", "grouped"]
BATCH, CHANNELS, LENGTH, STATES, GROUPS = 2, 4, 5, 3, 2


def input_matrix(form, batch=BATCH, channels=CHANNELS, length=LENGTH, states=STATES, dtype=torch.float64):
    shape = {
        "constant": (channels, states),
        "varying": (batch, states, length),
        "grouped": (batch, GROUPS, states, length),
    }[form]
    return torch.randn(shape, dtype=dtype)


def arguments(B_form="varying", C_form="varying", full=False, batch=BATCH, channels=CHANNELS, length=LENGTH,
              states=STATES, dtype=torch.float64):  # fmt: skip
    """Every tensor of the scan, seeded; A diagonal or full."""
    torch.manual_seed(0)
    size = {"batch": batch, "channels": channels, "length": length, "states": states, "dtype": dtype}
    A = -torch.rand(channels, states, dtype=dtype) * 3
    if full:
        A = torch.diag_embed(A) + 0.2 * torch.randn(channels, states, states, dtype=dtype)
    return {
        "u": torch.randn(batch, channels, length, dtype=dtype),
        "delta": torch.randn(batch, channels, length, dtype=dtype),
        "A": A,
        "B": input_matrix(B_form, **size),
        "C": input_matrix(C_form, **size),
        "D": torch.randn(channels, dtype=dtype),
        "z": torch.randn(batch, channels, length, dtype=dtype),
        "delta_bias": torch.randn(channels, dtype=dtype),
        "initial_state": torch.randn(batch, channels, states, dtype=dtype),
    }


def scan_in_scalars(u, delta, A, B, C, D, z, delta_bias, initial_state, method, reverse):
    """The equations for one number at a time."""
    u, delta, A, D, z, delta_bias = (t.tolist() for t in (u, delta, A, D, z, delta_bias))
    channels, states, length = len(A), len(A[0]), len(u[0][0])
    state, out = initial_state.tolist(), torch.zeros(len(u), channels, length, dtype=torch.float64)

    def entry(matrix, b, d, n, t):
        if matrix.dim() == 2:
            return matrix[d, n].item()
        if matrix.dim() == 3:
            return matrix[b, n, t].item()
        return matrix[b, d // (channels // matrix.shape[1]), n, t].item()

    for b, d in itertools.product(range(len(u)), range(channels)):
        for t in reversed(range(length)) if reverse else range(length):
            step = math.log1p(math.exp(delta[b][d][t] + delta_bias[d]))
            y = D[d] * u[b][d][t]
            for n in range(states):
                rate = torch.tensor([[A[d][n]]], dtype=torch.float64)
                A_bar, c = (v.item() for v in discretize(method, torch.tensor([step], dtype=torch.float64), rate))
                state[b][d][n] = A_bar * state[b][d][n] + c * entry(B, b, d, n, t) * u[b][d][t]
                y += entry(C, b, d, n, t) * state[b][d][n]
            out[b, d, t] = y * z[b][d][t] / (1 + math.exp(-z[b][d][t]))
    return out, torch.tensor(state, dtype=torch.float64)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(
    ("method", "B_form", "C_form"),
    [("zoh", b, c) for b in FORMS for c in FORMS] + [(name, "varying", "grouped") for name in ALL[1:]],
)
def test_equals_scalar_arithmetic(method, B_form, C_form, reverse):
    args = arguments(B_form, C_form)
    out, state = selective_scan_ref(
        **args, delta_softplus=True, return_last_state=True, discretization_method=method, reverse=reverse
    )
    expected, expected_state = scan_in_scalars(**args, method=method, reverse=reverse)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, expected_state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_default_is_the_public_zoh_scan(dtype):
    """mamba_ssm 1.x: Ā = exp(ΔA), ΔB u; here as one product over all earlier steps instead of a recurrence."""
    args = arguments(length=64, dtype=torch.float32)
    args = {k: v.to(dtype) if k in ("u", "delta", "B", "C", "z") else v for k, v in args.items()}
    args.pop("initial_state")
    out = selective_scan_ref(**args, delta_softplus=True)
    assert out.dtype == dtype

    u, delta, A, B, C, D, z, bias = (v.double() for v in args.values())
    delta = F.softplus(delta + bias[:, None])
    elapsed = delta.cumsum(-1)
    gap = elapsed[..., :, None] - elapsed[..., None, :]  # from step s to step t
    mask = torch.ones(64, 64, dtype=torch.bool).tril()
    kernel = torch.exp(torch.where(mask, gap, 0.0)[..., None] * A[:, None, None]) * mask[..., None]
    y = torch.einsum("bdtsn,bnt,bns,bds->bdt", kernel, C, B, delta * u) + D[:, None] * u
    expected = y * F.silu(z)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def gradcheck(B_form, C_form, method, reverse, full=False):
    args = arguments(B_form, C_form, full, batch=1, channels=2, length=3, states=2)
    tensors = {name: tensor.requires_grad_() for name, tensor in args.items()}

    def function(*values):
        return selective_scan_ref(
            **dict(zip(tensors, values, strict=True)),
            delta_softplus=True,
            return_last_state=True,
            discretization_method=method,
            reverse=reverse,
        )

    return torch.autograd.gradcheck(function, tuple(tensors.values()))


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("method", ALL)
def test_gradcheck_of_every_method(method, reverse):
    """Every gradient, of the output and of the last state, the initial state's included."""
    assert gradcheck("varying", "varying", method, reverse)


@pytest.mark.parametrize(("B_form", "C_form"), [(b, c) for b in FORMS for c in FORMS if (b, c) != ("varying",) * 2])
def test_gradcheck_of_every_form(B_form, C_form):
    assert gradcheck(B_form, C_form, "poly", reverse=False)


@pytest.mark.parametrize("method", ["zoh", "bilinear", "highorder", "rk4"])
def test_gradcheck_of_full_matrices(method):
    assert gradcheck("varying", "varying", method, reverse=True, full=True)


@pytest.mark.parametrize("B_form", FORMS)
@pytest.mark.parametrize("method", ALL)
def test_full_diagonal_matrix_equals_diagonal(method, B_form):
    args = arguments(B_form)
    options = {"delta_softplus": True, "return_last_state": True, "discretization_method": method}
    expected = selective_scan_ref(**args, **options)
    actual = selective_scan_ref(**args | {"A": torch.diag_embed(args["A"])}, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ALL)
def test_full_matrix_is_a_change_of_basis(method):
    """h' = P h turns A into P A P⁻¹, B into P B and C into P⁻ᵀ C, and changes no output."""
    args = arguments(channels=1)
    P = torch.eye(STATES, dtype=torch.float64) + 0.3 * torch.randn(STATES, STATES, dtype=torch.float64)
    inverse = torch.linalg.inv(P)
    changed = {
        "A": P @ torch.diag_embed(args["A"]) @ inverse,
        "B": P @ args["B"],
        "C": inverse.T @ args["C"],
        "initial_state": args["initial_state"] @ P.T,
    }
    expected = selective_scan_ref(**args, delta_softplus=True, discretization_method=method)
    actual = selective_scan_ref(**args | changed, delta_softplus=True, discretization_method=method)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_reverse_equals_flipped_scan():
    args = arguments("grouped", "constant")
    out, state = selective_scan_ref(**args, delta_softplus=True, return_last_state=True, reverse=True)
    flipped = args | {name: args[name].flip(-1) for name in ("u", "delta", "B", "z")}
    expected, expected_state = selective_scan_ref(**flipped, delta_softplus=True, return_last_state=True)
    torch.testing.assert_close(out, expected.flip(-1))
    torch.testing.assert_close(state, expected_state)


@pytest.mark.parametrize("method", ALL)
def test_state_carries_a_scan_on(method):
    """Two scans, the state of the first handed to the second, are one scan."""
    args = arguments(length=7)
    args.pop("initial_state")
    options = {"delta_softplus": True, "return_last_state": True, "discretization_method": method}
    expected, expected_state = selective_scan_ref(**args, **options)
    in_time = ("u", "delta", "B", "C", "z")
    first, state = selective_scan_ref(**args | {name: args[name][..., :3] for name in in_time}, **options)
    rest = args | {name: args[name][..., 3:] for name in in_time}
    second, state = selective_scan_ref(**rest, initial_state=state, **options)
    torch.testing.assert_close(torch.cat([first, second], dim=-1), expected)
    torch.testing.assert_close(state, expected_state)


def test_softplus_is_linear_beyond_20():
    args = arguments(length=1)
    args["delta"], args["delta_bias"] = torch.full_like(args["delta"], 30.0), torch.zeros(CHANNELS).double()
    torch.testing.assert_close(
        selective_scan_ref(**args, delta_softplus=True),
        selective_scan_ref(**args, delta_softplus=False),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("omitted", ["D", "z", "delta_bias", "initial_state"])
def test_optional_arguments_default_to_neutral(omitted):
    args = arguments()
    neutral = torch.zeros_like(args[omitted])
    if omitted == "z":  # no gate is not a gate of any value: divide it out
        expected = selective_scan_ref(**args, delta_softplus=True) / F.silu(args["z"])
    else:
        expected = selective_scan_ref(**args | {omitted: neutral}, delta_softplus=True)
    torch.testing.assert_close(selective_scan_ref(**args | {omitted: None}, delta_softplus=True), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype):
    """The output has u's dtype; the state and the computation are float32, or float64 where an input is."""
    args = arguments(dtype=torch.float32)
    args = {k: v.to(dtype) if k in ("u", "delta", "B", "C", "z") else v for k, v in args.items()}
    out, state = selective_scan_ref(**args, delta_softplus=True, return_last_state=True)
    assert out.dtype == dtype
    assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact, exact_state = selective_scan_ref(
        **{k: v.double() for k, v in args.items()}, delta_softplus=True, return_last_state=True
    )
    torch.testing.assert_close(out, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    torch.testing.assert_close(state.double(), exact_state, rtol=1e-5, atol=1e-5)


def test_float32_delta_beside_half_precision():
    args = arguments(dtype=torch.float32)
    half = {k: v.bfloat16() if k in ("u", "B", "C", "z") else v for k, v in args.items()}
    expected = selective_scan_ref(**{k: v.float() for k, v in half.items()}, delta_softplus=True)
    assert torch.equal(selective_scan_ref(**half, delta_softplus=True), expected.bfloat16())


def test_autocast_does_not_lower_the_precision():
    for full in (False, True):
        args = arguments(full=full, dtype=torch.float32)
        expected = selective_scan_ref(**args, delta_softplus=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(selective_scan_ref(**args, delta_softplus=True), expected)


def test_any_strides():
    args = arguments("grouped", "varying")
    expected = selective_scan_ref(**args, delta_softplus=True, discretization_method="highorder")
    strided = {}
    for name, tensor in args.items():
        memory = torch.empty([2 * size for size in reversed(tensor.shape)], dtype=tensor.dtype)
        view = memory.permute(*reversed(range(tensor.dim())))[(slice(None, None, 2),) * tensor.dim()]
        strided[name] = view.copy_(tensor)
        assert not strided[name].is_contiguous()
    torch.testing.assert_close(
        selective_scan_ref(**strided, delta_softplus=True, discretization_method="highorder"), expected
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", ALL)
def test_nan_and_inf_propagate_forward_in_time_only(method, value):
    args = arguments()
    args["u"][0, 1, 2] = value
    out = selective_scan_ref(**args, delta_softplus=True, discretization_method=method)
    assert not out[0, 1, 2:].isfinite().any()
    out[0, 1, 2:] = 0
    assert out.isfinite().all()


def test_bilinear_pole_propagates():
    args = arguments(length=3)
    args["delta"], args["A"][1, 0] = torch.ones_like(args["delta"]), 2.0
    args["delta_bias"] = None
    out = selective_scan_ref(**args, discretization_method="bilinear")
    assert not out[:, 1].isfinite().any()
    assert out[:, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("method", ALL)
def test_bidirectional_is_the_sum_of_both(method, gated):
    forward, backward = arguments("grouped", "varying"), arguments("varying", "constant")
    for args in (forward, backward):
        args.pop("initial_state")
    z = forward.pop("z") if gated else None
    backward["u"] = backward["u"].flip(0)
    for args in (forward, backward):
        args.pop("z", None)
    out = bidirectional_scan_ref(ScanArgs(**forward), ScanArgs(**backward), z, scale=0.5, discretization_method=method)
    options = {"delta_softplus": True, "discretization_method": method}
    expected = selective_scan_ref(**forward, **options) + selective_scan_ref(**backward, **options, reverse=True)
    torch.testing.assert_close(out, 0.5 * expected * (F.silu(z) if gated else 1))


def test_bidirectional_rounds_once():
    args = {
        k: v.bfloat16() if k in ("u", "delta", "B", "C", "z") else v for k, v in arguments(dtype=torch.float32).items()
    }
    z, _ = args.pop("z"), args.pop("initial_state")
    out = bidirectional_scan_ref(ScanArgs(**args), ScanArgs(**args), z)
    wide = ScanArgs(**{k: v.float() for k, v in args.items()})
    assert torch.equal(out, bidirectional_scan_ref(wide, wide, z.float()).bfloat16())


def test_bidirectional_arguments_must_match():
    args = arguments()
    z, _ = args.pop("z"), args.pop("initial_state")
    other = {
        **args,
        "u": args["u"][..., :3],
        "delta": args["delta"][..., :3],
        "B": args["B"][..., :3],
        "C": args["C"][..., :3],
    }
    with pytest.raises(ValueError, match=r"backward\.u: got shape"):
        bidirectional_scan_ref(ScanArgs(**args), ScanArgs(**other), z)
    with pytest.raises(ValueError, match="unknown method"):
        bidirectional_scan_ref(ScanArgs(**args), ScanArgs(**args), z, discretization_method="euler")
    with pytest.raises(ValueError, match="z: got shape"):
        bidirectional_scan_ref(ScanArgs(**args), ScanArgs(**args), z[..., :3])


@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full"])
def test_compiles_into_one_graph(full):
    args = arguments(full=full, length=2, dtype=torch.float32)
    compiled = torch.compile(selective_scan_ref, fullgraph=True, backend="eager")
    for method in ("bilinear", "highorder"):
        options = {"delta_softplus": True, "discretization_method": method}
        torch.testing.assert_close(compiled(**args, **options), selective_scan_ref(**args, **options))


# argument -> (value, what the message must say), for arguments of BATCH, CHANNELS, LENGTH, STATES in float32
BAD = {
    "u rank": ("u", torch.zeros(2, 4), r"u: got shape \(2, 4\); expected shape \(batch, channels, length\)"),
    "empty batch": ("u", torch.zeros(0, 4, 5), "u: .* at least 1"),
    "no channels": ("u", torch.zeros(2, 0, 5), "u: .* at least 1"),
    "no length": ("u", torch.zeros(2, 4, 0), "u: .* at least 1; skip the scan"),
    "u integer": ("u", torch.zeros(2, 4, 5, dtype=torch.int64), "u: got torch.int64; expected torch.float32 or"),
    "u complex": ("u", torch.zeros(2, 4, 5, dtype=torch.complex64), "u: .*complex state spaces are not supported"),
    "delta shape": ("delta", torch.zeros(2, 4, 6), r"delta: got shape \(2, 4, 6\); expected shape \(2, 4, 5\)"),
    "delta half": ("delta", torch.zeros(2, 4, 5).half(), "delta: got torch.float16; expected torch.float32"),
    "A rank": ("A", torch.zeros(4), r"A: got shape \(4,\); expected shape \(4, N\), or \(4, N, N\)"),
    "A channels": ("A", torch.zeros(5, 3), "A: got shape"),
    "A not square": ("A", torch.zeros(4, 3, 2), "A: got shape"),
    "A no states": ("A", torch.zeros(4, 0), "A: got 0 states; expected 1 to 256 states"),
    "A too many states": ("A", torch.zeros(4, 257), "A: got 257 states; expected 1 to 256 states"),
    "A complex": ("A", torch.zeros(4, 3, dtype=torch.complex64), "A: .*complex state spaces are not supported"),
    "A half": ("A", torch.zeros(4, 3).bfloat16(), "A: got torch.bfloat16; .* keep it in float32"),
    "B rank": ("B", torch.zeros(3), r"B: got shape \(3,\); .*\(4, 3\), \(2, 3, 5\) or \(2, G, 3, 5\)"),
    "B constant shape": ("B", torch.zeros(3, 3), "B: got shape"),
    "B varying shape": ("B", torch.zeros(2, 3, 4), "B: got shape"),
    "B groups": ("B", torch.zeros(2, 3, 3, 5), "B: .* G dividing 4 channels"),
    "B no groups": ("B", torch.zeros(2, 0, 3, 5), "B: .* G dividing 4 channels"),
    "B half": ("B", torch.zeros(2, 3, 5).half(), "B: got torch.float16; expected torch.float32; convert it to u's"),
    "C groups": ("C", torch.zeros(2, 3, 3, 5), "C: .* G dividing 4 channels"),
    "C constant half": ("C", torch.zeros(4, 3).half(), "C: got torch.float16"),
    "C integer": ("C", torch.zeros(2, 3, 5).int(), "C: got torch.int32"),
    "D shape": ("D", torch.zeros(4, 1), r"D: got shape \(4, 1\); expected shape \(4,\)"),
    "D half": ("D", torch.zeros(4).half(), "D: got torch.float16; .* keep it in float32"),
    "z shape": ("z", torch.zeros(2, 4, 1), "z: got shape"),
    "z half": ("z", torch.zeros(2, 4, 5).half(), "z: got torch.float16; .*convert it to u's dtype"),
    "delta_bias shape": ("delta_bias", torch.zeros(3), "delta_bias: got shape"),
    "delta_bias half": ("delta_bias", torch.zeros(4).half(), "delta_bias: got torch.float16"),
    "initial_state shape": ("initial_state", torch.zeros(2, 4, 4), "initial_state: got shape"),
    "initial_state half": ("initial_state", torch.zeros(2, 4, 3).half(), "initial_state: got torch.float16"),
    "device": ("D", torch.zeros(4, device="meta"), r"D: got device meta; expected u's device, cpu; .*\.to\('cpu'\)"),
    "method": ("discretization_method", "tustin", "unknown method 'tustin'; choose one of zoh, foh, bilinear"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case):
    name, value, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        selective_scan_ref(**arguments(dtype=torch.float32) | {name: value})


@pytest.mark.parametrize("states", [1, 256])
def test_limits_of_the_number_of_states(states):
    args = arguments(states=states, dtype=torch.float32)
    assert selective_scan_ref(**args).isfinite().all()


def test_constant_matrices_may_be_float32_or_of_the_dtype_of_u():
    args = arguments("constant", "constant", dtype=torch.float32)
    args |= {name: args[name].half() for name in ("u", "delta", "z", "B")}
    check_scan_arguments(**args)
    assert selective_scan_ref(**args, delta_softplus=True).dtype == torch.float16
