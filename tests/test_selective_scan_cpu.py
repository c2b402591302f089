"""The scan's CPU kernel against the float64 reference: outputs and every gradient, in every form and layout."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mpmath
import pytest
import torch
import torch._dynamo.testing
from mpmath import mpf
from test_discretization import GRID, POLYNOMIAL, exact
from torch import Tensor

from mamba_ssm.ops import selective_scan
from mamba_ssm.ops.discretization_ref import METHODS
from mamba_ssm.ops.selective_scan import ScanArgs, bidirectional_scan_fn, selective_scan_fn
from mamba_ssm.ops.selective_scan_ref import bidirectional_scan_ref, selective_scan_ref

ROOT = Path(__file__).resolve().parent.parent
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("channel_last", "contiguous", "channel_last_slice", "strided", "reversed_dimensions", "expanded")
FORMS = ("constant", "constant_in_dtype", "varying", "one_group", "two_groups", "six_groups")

needs_kernel = pytest.mark.needs_kernel
reversible = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
every_method = pytest.mark.parametrize("method", METHODS)


# ---- Inputs --------------------------------------------------------------------------------------------------------


def activation(layout: str, batch: int, channels: int, length: int, dtype: torch.dtype) -> Tensor:
    """Random (batch, channels, length) in the given memory layout."""
    if layout == "channel_last":
        return torch.randn(batch, length, channels, dtype=dtype).transpose(1, 2)
    if layout == "channel_last_slice":  # a part of what an input projection gives
        return torch.randn(batch, length, 2 * channels + 3, dtype=dtype)[..., 3 : channels + 3].transpose(1, 2)
    if layout == "strided":
        return torch.randn(batch, 2 * channels, 3 * length, dtype=dtype)[:, ::2, ::3]
    if layout == "reversed_dimensions":
        return torch.randn(length, channels, batch, dtype=dtype).permute(2, 1, 0)
    if layout == "expanded":
        return torch.randn(channels, 1, dtype=dtype).expand(batch, channels, length)
    return torch.randn(batch, channels, length, dtype=dtype)


def input_matrix(form: str, batch: int, channels: int, states: int, length: int, dtype: torch.dtype) -> Tensor:
    if form.startswith("constant"):
        return torch.randn(channels, states, dtype=torch.float32 if form == "constant" else dtype)
    if form == "varying":  # a slice of a projection, as in the mixer
        return torch.randn(batch, length, states + 5, dtype=dtype)[..., 5:].transpose(1, 2)
    groups = {"one_group": 1, "two_groups": 2, "six_groups": 6}[form]
    return torch.randn(batch, groups, states, length, dtype=dtype)


def decay_rates(channels: int, states: int) -> Tensor:
    """A: -16 to -0.5 in blocks of 16 channels, where the kernels have a fast form, and -0.4 to -1e-12 in between."""
    fast = torch.arange(channels)[:, None] % 32 < 16
    decades = torch.rand(channels, states) * torch.where(fast, 1.5, 11.5)
    return -torch.where(fast, 16.0, 0.4) * 10**-decades


def make_inputs(
    batch: int = 2,
    channels: int = 20,
    length: int = 35,
    states: int = 5,
    dtype: torch.dtype = torch.float32,
    forms: tuple[str, str] = ("varying", "varying"),
    layout: str = "channel_last",
) -> dict[str, Tensor]:
    """All tensors of `selective_scan_fn`."""
    return {
        "u": activation(layout, batch, channels, length, dtype),
        "delta": activation(layout, batch, channels, length, dtype) * 0.5,
        "A": decay_rates(channels, states),
        "B": input_matrix(forms[0], batch, channels, states, length, dtype),
        "C": input_matrix(forms[1], batch, channels, states, length, dtype),
        "D": torch.randn(channels),
        "z": activation(layout, batch, channels, length, dtype),
        "delta_bias": torch.randn(channels) * 0.3 - 0.5,
        "initial_state": torch.randn(batch, channels, states),
    }


# ---- Comparison ----------------------------------------------------------------------------------------------------


def results(function, inputs: dict[str, Tensor], weights: tuple[Tensor, Tensor], double=False, **options):
    """Output, last state and the gradient of every input, by name, under a loss linear in both with these weights."""
    leaves = {
        name: (t.detach().double() if double else t.detach()).requires_grad_() for name, t in inputs.items()
    }  # detached views keep their strides
    out, last = function(**leaves, return_last_state=True, **options)
    assert out.shape == leaves["u"].shape and out.dtype == leaves["u"].dtype
    gradients = torch.autograd.grad(
        (out, last), tuple(leaves.values()), tuple(w.to(t.dtype) for w, t in zip(weights, (out, last), strict=True))
    )
    for gradient, leaf in zip(gradients, leaves.values(), strict=True):
        assert gradient.shape == leaf.shape and gradient.dtype == leaf.dtype
    names = [f"gradient of {name}" for name in leaves]
    return {"out": out.detach(), "last state": last.detach(), **dict(zip(names, gradients, strict=True))}


def error(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item()


# The float32 reference has relative errors from 3e-8 on. Below one unit in the last place (1.2e-7) twice that
# is no room for a kernel that adds in another order or rounds e^x otherwise: this floor of two units decides.
# In half types the rounding of the result, 2e-4 and more, is the error of both, and the floor is nothing beside it.
FLOOR = 2.5e-7
# The norm over a few elements is one draw of the rounding, not a mean over many: those get this many times the room
# (with AVX2, one draw of dA took 4.2).
FEW, ROOM_FOR_FEW = 64, 6


def assert_as_accurate(kernel: dict, reference: dict, truth: dict, floor: float = FLOOR) -> None:
    for name, value in kernel.items():
        found, allowed = error(value, truth[name]), 2 * error(reference[name], truth[name]) + floor
        allowed *= ROOM_FOR_FEW if value.numel() < FEW else 1
        assert found <= allowed, f"{name}: error {found:.3g}, allowed {allowed:.3g}"


def compare(
    inputs: dict[str, Tensor], method: str, reverse: bool = False, delta_softplus: bool = True, floor: float = FLOOR
) -> None:
    """The kernel is at most twice as far from the float64 reference as the reference in the inputs' own dtype is."""
    u, states = inputs["u"], inputs["A"].shape[1]
    weights = torch.randn(u.shape).to(u.dtype), torch.randn(*u.shape[:2], states)
    options = {"discretization_method": method, "reverse": reverse, "delta_softplus": delta_softplus}
    assert_as_accurate(
        results(selective_scan_fn, inputs, weights, **options),
        results(selective_scan_ref, inputs, weights, **options),
        results(selective_scan_ref, inputs, weights, double=True, **options),
        floor,
    )


@needs_kernel
@reversible
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_method
def test_every_method(method, dtype, reverse):
    compare(make_inputs(channels=36, length=65, states=6, dtype=dtype), method, reverse)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 7, 63, 64, 65, 197, 1025, 2049])
def test_lengths(length, dtype):
    inputs = make_inputs(batch=1, channels=3, length=length, states=2, dtype=dtype)
    compare(inputs, "zoh", reverse=dtype == torch.bfloat16)
    if length < 200:
        compare(inputs, "highorder", reverse=dtype != torch.bfloat16)


@needs_kernel
@pytest.mark.parametrize("method", ["zoh", "bilinear", "poly"])
@pytest.mark.parametrize("states", [1, 8, 16, 17, 64, 256])
def test_numbers_of_states(states, method):
    A = torch.zeros(1, states, requires_grad=True)
    interval = selective_scan.checkpoint_steps((A,), A)
    length = 2 * interval + 3 if method == "zoh" else 20  # several checkpoints
    compare(make_inputs(channels=18, length=length, states=states), method, reverse=states == 17)


@needs_kernel
@pytest.mark.parametrize(("method", "dtype", "reverse"), [("foh", torch.float32, False), ("zoh", torch.bfloat16, True)])
@pytest.mark.parametrize("forms", list(itertools.product(FORMS, FORMS)), ids="-".join)
def test_forms_of_B_and_C(forms, method, dtype, reverse):
    inputs = make_inputs(channels=42, length=9, states=3, dtype=dtype, forms=forms)
    compare(inputs, method, reverse)


@needs_kernel
@pytest.mark.parametrize("delta_softplus", [True, False])
def test_optional_arguments(delta_softplus):
    optional = ("D", "z", "delta_bias", "initial_state")
    for absent in itertools.chain.from_iterable(itertools.combinations(optional, n) for n in range(5)):
        inputs = make_inputs(length=7)
        if not delta_softplus:
            inputs["delta"] = inputs["delta"].abs()
            inputs["delta_bias"] = inputs["delta_bias"].abs()
        compare({k: v for k, v in inputs.items() if k not in absent}, "highorder", len(absent) == 2, delta_softplus)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_delta_in_float32_beside_half_types(dtype):
    inputs = make_inputs(dtype=dtype)
    inputs["delta"] = inputs["delta"].float()
    compare(inputs, "bilinear")


@needs_kernel
@reversible
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, reverse):
    for batch, channels in ((2, 21), (1, 16), (3, 1)):
        inputs = make_inputs(batch, channels, 35, 2, dtype, layout=layout)
        out = selective_scan_fn(**inputs)
        channels_innermost = inputs["u"].stride(1) == 1 and channels > 1
        assert out.stride() == ((35 * channels, 1, channels) if channels_innermost else (35 * channels, 35, 1))
        compare(inputs, "zoh_exact" if channels == 21 else "zoh", reverse)


@needs_kernel
def test_layouts_may_differ_from_tensor_to_tensor():
    for layouts in (("channel_last", "contiguous", "strided"), ("contiguous", "channel_last_slice", "channel_last")):
        inputs = make_inputs(dtype=torch.bfloat16)
        for name, layout in zip(("u", "delta", "z"), layouts, strict=True):
            inputs[name] = activation(layout, 2, 20, 35, torch.bfloat16)
        inputs["A"] = -torch.rand(5, 20).t()  # parameters and states of any strides, too
        inputs["D"] = torch.randn(40)[::2]
        inputs["initial_state"] = torch.randn(5, 20, 2).permute(2, 1, 0)
        compare(inputs, "poly")


@needs_kernel
@pytest.mark.parametrize("groups", [(1, 4), (2, 4), (6, 2)])
def test_different_numbers_of_groups(groups):
    inputs = make_inputs(channels=12, length=9, states=3)
    for name, count in zip("BC", groups, strict=True):
        inputs[name] = torch.randn(2, count, 3, 9)
    compare(inputs, "zoh")


@needs_kernel
def test_an_output_without_gradient_and_a_last_state_alone():
    inputs = make_inputs()
    for chosen in (0, 1):
        gradients = []
        for function in (selective_scan_fn, selective_scan_ref):
            leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
            function(**leaves, delta_softplus=True, return_last_state=True)[chosen].square().sum().backward()
            gradients.append({n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in leaves.items()})
        for name in inputs:
            torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-4, atol=1e-4, msg=name)


# ---- Extreme arguments ---------------------------------------------------------------------------------------------


@needs_kernel
@pytest.mark.parametrize("fast_form", [True, False])
@pytest.mark.parametrize("step", [1e-6, 2.0**-10, 0.7, 8.0])
@every_method
def test_values_match_mpmath(method, step, fast_form):
    """Scans of one step, whose last states are Ā and c. `fast_form`: four equal |A| >= 0.5 side by side get a form of
    their own; a neighbouring channel with a small |A| denies it to them."""
    points = [x for x in GRID if x <= -1e-8]
    A = (torch.tensor(points, dtype=torch.float64) / step).float()
    for start in range(0, len(points), 64):
        rates = A[start : start + 64].repeat_interleave(4)[None]
        if not fast_form:
            rates = torch.cat([rates, torch.full_like(rates, -1e-3)])
        channels, states = rates.shape
        one, ones = torch.ones(1, channels, 1), torch.ones(channels, states)
        options = {"return_last_state": True, "discretization_method": method}
        _, c = selective_scan_fn(one, one * step, rates, ones, ones, **options)
        _, A_bar = selective_scan_fn(0 * one, one * step, rates, ones, ones, initial_state=ones[None], **options)
        with mpmath.workdps(50):
            for i, rate in enumerate(rates[0].tolist()):
                delta = mpf(one.mul(step)[0, 0, 0].item())
                true_A_bar, true_c = exact(method, delta, mpf(rate))
                # a polynomial has zeros in x < 0; its error is measured against the sum of its absolute terms
                size = exact(method, delta, -mpf(rate))[1] if method in POLYNOMIAL else abs(true_c)
                x = float(delta * mpf(rate))
                assert abs(c[0, 0, i].item() - true_c) <= 1e-5 * size, f"c at x = {x}, A = {rate}"
                # bilinear's Ā has a zero at x = -2, where the rounding of x is felt
                allowed = 1e-5 * abs(true_A_bar) + (2e-7 if method == "bilinear" else 0)
                assert abs(A_bar[0, 0, i].item() - true_A_bar) <= allowed, f"Ā at x = {x}, A = {rate}"


@needs_kernel
@every_method
def test_derivatives_from_tiny_to_huge_steps(method):
    """∂c and ∂Ā by Δ and A, one scan of one step per point, against the float64 reference, which mpmath vouches for."""
    x, step = torch.tensor(GRID).repeat(4), torch.tensor([1e-4, 2.0**-6, 0.7, 8.0]).repeat_interleave(len(GRID))
    for u, state in ((1.0, 0.0), (0.0, 1.0)):
        gradients = []
        for sign, dtype in ((1, torch.float32), (1, torch.float64), (-1, torch.float64)):
            delta = step.to(dtype)[None, :, None].requires_grad_()
            A = (x / step).to(dtype)[:, None].mul(sign).requires_grad_()
            inputs = torch.full_like(delta, u), delta, A, torch.ones_like(A), torch.ones_like(A)
            states = torch.full_like(A, state)[None]
            _, last = selective_scan_fn(
                *inputs, return_last_state=True, discretization_method=method, initial_state=states
            )
            gradients.append([g.flatten() for g in torch.autograd.grad(last.sum(), (delta, A))])
        for name, found, true, magnitude in zip(("delta", "A"), *gradients, strict=True):
            size = magnitude.abs() if method in POLYNOMIAL and u else true.abs()
            wrong = (found.double() - true).abs() > 2e-5 * size
            assert not wrong.any(), (
                f"gradient of {name}, u = {u}: at x = {x[wrong].tolist()}, Δ = {step[wrong].tolist()}"
            )


@needs_kernel
@pytest.mark.parametrize("rate", [0.0, -1e-12, -1e-8, -1e-3, 0.3, 1.5])
@every_method
def test_zero_small_and_positive_A(method, rate):
    """A = 0 and its neighbours, alone and mixed into a block of ordinary channels; short steps keep off the pole."""
    for alone in (True, False):
        inputs = make_inputs(channels=17, length=9)
        inputs["delta_bias"] -= 1.5
        if alone:
            inputs["A"].fill_(rate)
        else:
            inputs["A"][3, 2] = rate
        # the kernels' φ functions are made for x <= 0; their differences lose digits beyond
        compare(inputs, method, floor=FLOOR if rate <= 0 else 2e-5)


@needs_kernel
@every_method
def test_steps_far_beyond_the_decay_time(method):
    """A down to -1e6, for the polynomials -1e3: Ā is 0, or bilinear's -1, and nothing overflows.

    A few elements decide each norm, and the errors of the powers of A are those of all of them: a higher floor.
    """
    inputs = make_inputs(length=9)
    inputs["A"] = -torch.logspace(2, 3 if method in POLYNOMIAL else 6, 100).view(20, 5)
    compare(inputs, method, floor=1e-6)


@needs_kernel
@every_method
@pytest.mark.parametrize("bias", [-7.0, -4.0, -2.0])
def test_steps_short_of_the_decay_time(bias, method):
    """|x| from 1e-4 to a few: where the kernels' closed forms subtract, and where they choose between forms."""
    inputs = make_inputs(channels=32, length=65, states=6)
    inputs["A"] = -torch.logspace(-0.5, 1.5, 192).view(32, 6)
    inputs["delta_bias"].fill_(bias)
    compare(inputs, method, floor=1e-6)  # a few elements make up the norms: with AVX2, 8.4e-7 for dB of foh


@needs_kernel
def test_bilinear_at_its_pole():
    inputs = make_inputs(channels=17)
    out = selective_scan_fn(**inputs, discretization_method="bilinear")
    inputs["delta"][:, 3, 20] = 1.0
    inputs["delta_bias"][3] = 0.0
    clean = selective_scan_fn(**inputs, discretization_method="bilinear")
    inputs["A"][3, 1] = 2.0
    poled = selective_scan_fn(**inputs, discretization_method="bilinear")
    assert not poled[:, 3, 20:].isfinite().any()
    others = torch.arange(17) != 3
    assert torch.equal(poled[:, others], clean[:, others]) and torch.equal(poled[:, others], out[:, others])


@needs_kernel
@reversible
@pytest.mark.parametrize("layout", ["channel_last", "contiguous"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", ["u", "delta", "z", "A", "B", "C", "D", "delta_bias", "initial_state"])
def test_nan_and_inf_reach_only_what_depends_on_them(place, bad, layout, reverse):
    """Other batch elements and channels keep their bits, in the output and in the gradients of u, delta and z."""

    def run(method):
        leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
        out, last = selective_scan_fn(
            **leaves, delta_softplus=True, return_last_state=True, discretization_method=method, reverse=reverse
        )
        gradients = torch.autograd.grad(out.sum() + last.sum(), [leaves[name] for name in ("u", "delta", "z")])
        return [out.detach(), last.detach(), *gradients]

    for method in ("zoh", "bilinear", "highorder"):
        inputs = make_inputs(channels=20, length=20, layout=layout)
        clean = run(method)
        touched = torch.zeros(2, 20, dtype=torch.bool)
        if place in ("u", "delta", "z"):
            inputs[place][1, 3, 11] = bad
            touched[1, 3] = True
        elif place in ("B", "C"):
            inputs[place][1, 2, 11] = bad
            touched[1] = True
        elif place == "initial_state":
            inputs[place][1, 3, 2] = bad
            touched[1, 3] = True
        else:
            inputs[place][(3, 2) if place == "A" else 3] = bad
            touched[:, 3] = True
        dirty = run(method)
        for before, after in zip(clean, dirty, strict=True):
            if (
                place == "A" and bad != bad
            ):  # the other channels of its vector change from their fast form to the general one
                torch.testing.assert_close(before[~touched], after[~touched], rtol=1e-4, atol=1e-5)
            else:
                assert torch.equal(before[~touched], after[~touched])
        if bad != bad:
            assert dirty[0][touched].isnan().any(-1).all()
            steps = slice(0, 11) if reverse else slice(12, None)
            if place in ("u", "delta", "B"):  # time flows on from there, and not back
                assert dirty[0][touched][:, steps].isnan().all()
                steps = slice(12, None) if reverse else slice(0, 11)
                assert torch.equal(dirty[0][touched][:, steps], clean[0][touched][:, steps])


# ---- Both directions at once ---------------------------------------------------------------------------------------


def bidirectional_results(function, tensors: list[Tensor | None], weight: Tensor, double: bool, **options):
    leaves = [t if t is None else (t.detach().double() if double else t.detach()).requires_grad_() for t in tensors]
    out = function(ScanArgs(*leaves[:7]), ScanArgs(*leaves[7:14]), leaves[14], **options)
    given = [t for t in leaves if t is not None]
    gradients = torch.autograd.grad(out, given, weight.to(out.dtype))
    return {"out": out.detach(), **{f"gradient {i}": g for i, g in enumerate(gradients)}}


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_method
def test_bidirectional_scan(method, dtype):
    gated = method != "foh"
    inputs = [make_inputs(length=33, dtype=dtype) for _ in range(2)]
    tensors = [t[name] for t in inputs for name in ("u", "delta", "A", "B", "C", "D", "delta_bias")]
    if method == "bilinear":
        tensors[5] = tensors[13] = None
    tensors.append(inputs[0]["z"] if gated else None)
    weight = torch.randn(2, 20, 33).to(dtype)
    options = {"scale": 0.5, "discretization_method": method}
    assert_as_accurate(
        bidirectional_results(bidirectional_scan_fn, tensors, weight, False, **options),
        bidirectional_results(bidirectional_scan_ref, tensors, weight, False, **options),
        bidirectional_results(bidirectional_scan_ref, tensors, weight, True, **options),
    )


# ---- The rules of torch --------------------------------------------------------------------------------------------


@needs_kernel
@pytest.mark.parametrize("absent", [(), ("D", "z", "delta_bias", "initial_state")], ids=["all", "required"])
@pytest.mark.parametrize("forms", [("varying", "varying"), ("constant", "six_groups")], ids="-".join)
@pytest.mark.parametrize("layout", ["channel_last", "contiguous"])
def test_operators_keep_torch_library_rules(layout, forms, absent):
    inputs = make_inputs(channels=18, length=9, states=3, layout=layout, forms=forms)
    tensors = [inputs[name] for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    initial_state, addend = inputs["initial_state"], activation(layout, 2, 18, 9, torch.float32)
    projected = [*tensors, torch.randn(18, 5)]  # Δ from five inputs
    projected[1] = activation(layout, 2, 5, 9, torch.float32)
    if absent:
        tensors[5:8], initial_state = [None] * 3, None
    forward, backward = torch.ops.mamba_ssm.selective_scan_fwd, torch.ops.mamba_ssm.selective_scan_bwd
    options = 0.5, True, True, "poly"

    leaves = [t if t is None else t.detach().requires_grad_() for t in (*tensors, None, initial_state)]
    torch.library.opcheck(forward, (*leaves, None, *options, False, 32))
    torch.library.opcheck(forward, (*tensors, None, initial_state, addend, *options, False, 0))
    torch.library.opcheck(forward, (*projected, initial_state, addend, *options, True, 64))
    for given in ([*tensors, None], projected):
        out, last, checkpoints = forward(*given, initial_state, None, *options, False, 32)
        dz_addend = None if given[6] is None else torch.randn_like(out)
        for dlast, dz_float in ((None, True), (torch.randn_like(last), False)):
            arguments = (torch.randn_like(out), dlast, *given, dz_addend, checkpoints, *options, dz_float, 32)
            torch.library.opcheck(backward, arguments)


@needs_kernel
@pytest.mark.parametrize("bidirectional", [False, True])
def test_one_graph_for_every_batch_size(bidirectional):
    def function(u, delta, A, B, C, D, z, delta_bias):
        if bidirectional:
            args = ScanArgs(u, delta, A, B, C, D, delta_bias)
            return bidirectional_scan_fn(args, args, z, scale=0.5, discretization_method="poly")
        return selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, True, discretization_method="poly", reverse=True)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for batch in (2, 5):
        inputs = make_inputs(batch=batch)
        del inputs["initial_state"]
        found, expected = [], []
        for call, values in ((compiled, found), (function, expected)):
            leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
            out = call(**leaves)
            values += [out, *torch.autograd.grad(out.square().sum(), tuple(leaves.values()))]
        torch.testing.assert_close(found, expected)
    assert counter.frame_count == 1


@needs_kernel
@pytest.mark.parametrize("layout", ["channel_last", "contiguous"])
def test_threads_and_repetition_change_no_bit(layout):
    inputs = make_inputs(batch=3, channels=150, length=130, states=16, layout=layout, forms=("varying", "two_groups"))
    weights = torch.randn(3, 150, 130), torch.randn(3, 150, 16)
    found = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        found.append(results(selective_scan_fn, inputs, weights, delta_softplus=True))
    for other in found[1:]:
        for name, value in other.items():
            assert torch.equal(value, found[0][name]), name


@needs_kernel
@pytest.mark.parametrize("forms", [("varying", "six_groups"), ("constant", "varying")], ids="-".join)
def test_every_element_is_written(forms):
    """Deterministic algorithms fill what torch.empty gives with NaN."""
    inputs = make_inputs(channels=36, length=37, forms=forms)
    weights = torch.randn(2, 36, 37), torch.randn(2, 36, 5)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        found = results(selective_scan_fn, inputs, weights, delta_softplus=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [name for name, value in found.items() if not value.isfinite().all()] == []


def peak_of_forward_and_backward(length: int) -> int:
    """The growth in bytes of this process's resident memory, at its peak during forward and backward."""

    def resident(which: str) -> int:
        return 1024 * int(re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1))

    inputs = make_inputs(*MEMORY_SHAPE[:2], length, MEMORY_SHAPE[2])
    leaves = [t.requires_grad_() for t in inputs.values()]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    out = selective_scan_fn(*leaves[:8], True, initial_state=leaves[8])
    out.backward(out.detach())
    return resident("VmHWM") - before


MEMORY_SHAPE = 4, 512, 64  # batch, channels, states


@needs_kernel
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's account of peak memory")
def test_memory_is_linear_and_holds_no_state_per_step():
    """In a process of its own, where nothing else allocates."""
    program = (
        "from test_selective_scan_cpu import *\n"
        "print(*[peak_of_forward_and_backward(length) for length in (16, 1024, 2048)])"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    output = subprocess.check_output([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path})
    _, short, long = map(int, output.split())
    batch, channels, states = MEMORY_SHAPE
    activation = 4 * batch * channels * 1024
    assert 5 * activation < short < 20 * activation < activation * states / 3
    assert long < 2.2 * short


@needs_kernel
def test_second_derivatives_are_refused():
    u, delta, A, B = (torch.randn(s).requires_grad_() for s in ((1, 4, 5), (1, 4, 5), (4, 2), (1, 2, 5)))
    out = selective_scan_fn(u, delta, A, B, B.detach(), delta_softplus=True)
    (gradient,) = torch.autograd.grad(out.square().sum(), u, create_graph=True)
    with pytest.raises(NotImplementedError, match="no derivative of its own"):
        gradient.sum().backward()


@needs_kernel
def test_other_instruction_sets(rerun_on_instruction_set):
    rerun_on_instruction_set(
        "test_every_method and reverse or test_values_match and 0.7 or test_layouts and float32 or test_derivatives"
        " or test_numbers and zoh or test_forms and bfloat16 and six_groups or test_nan_and_inf and channel_last"
        " or test_steps_far"
    )


# ---- The table, and what is refused --------------------------------------------------------------------------------


@needs_kernel
def test_the_two_tables_are_equal():
    assert torch.ops.mamba_ssm.discretization_names().split(",") == list(METHODS)


def test_the_header_lists_the_same_methods():
    """The same without a compiled library: the X-macro, and each struct's name."""
    text = (ROOT / "csrc/selective_scan/discretization.h").read_text()
    macro = text[text.index("#define MAMBA_SSM_DISCRETIZATIONS(X)") :]
    structs = re.findall(r"\bX\((\w+)\)", macro.split("\n", 1)[1])
    names = [re.search(rf'struct {s} :?.*?name = "(\w+)"', text, re.DOTALL).group(1) for s in structs]
    assert names == list(METHODS)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (r"discretization_method: unknown method 'euler'; choose one of zoh, foh, .*zoh_exact", {"method": "euler"}),
        (r"^A: got 257 states; expected 1 to 256 states", {"A": torch.zeros(20, 257)}),
        (r"^u: got shape \(2, 20\); expected shape \(batch, channels, length\)", {"u": torch.zeros(2, 20)}),
        (r"^u: got shape \(0, 20, 35\).*at least 1", {"u": torch.zeros(0, 20, 35)}),
        (r"^u: got shape \(2, 20, 0\).*at least 1", {"u": torch.zeros(2, 20, 0)}),
        (r"^delta: got shape \(2, 20, 34\); expected shape \(2, 20, 35\)", {"delta": torch.zeros(2, 20, 34)}),
        (r"^B: got shape \(2, 6, 35\)", {"B": torch.zeros(2, 6, 35)}),
        (r"^C: got shape \(2, 3, 5, 35\).*dividing 20 channels", {"C": torch.zeros(2, 3, 5, 35)}),
        (r"^A: got torch.float16; expected torch.float32", {"A": torch.zeros(20, 5).half()}),
        (r"^A: got torch.complex64.*complex", {"A": torch.zeros(20, 5, dtype=torch.complex64)}),
        (r"^z: got torch.bfloat16; expected torch.float32", {"z": torch.zeros(2, 20, 35).bfloat16()}),
        (r"^D: got device meta; expected u's device", {"D": torch.zeros(20, device="meta")}),
        (
            r"^B and C: got 2 and 5 groups; expected one number of groups to divide the other",
            {"B": torch.zeros(2, 2, 5, 35), "C": torch.zeros(2, 5, 5, 35)},
        ),
        (r"^A: got shape \(20, 5, 5\).*selective_scan_ref for full matrices", {"A": torch.zeros(20, 5, 5)}),
    ],
)
@needs_kernel
def test_bad_arguments(message, changes):
    inputs = {**make_inputs(), **changes}
    method = inputs.pop("method", "zoh")
    with pytest.raises(ValueError, match=message):
        selective_scan_fn(**inputs, discretization_method=method)


@needs_kernel
def test_operators_refuse_what_would_read_out_of_bounds():
    """The Python above checks every argument; the operators themselves can be called without it."""
    inputs = make_inputs()
    inputs |= {"delta_weight": None, "addend": None}
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_weight", "initial_state", "addend")
    for name, bad in {
        "delta": torch.zeros(2, 20, 34),
        "A": torch.zeros(19, 5),
        "B": torch.zeros(2, 5, 34),
        "C": torch.zeros(20, 4),
        "D": torch.zeros(19),
        "delta_bias": torch.zeros(19),
        "delta_weight": torch.zeros(20, 19),
        "initial_state": torch.zeros(2, 20, 4),
        "addend": torch.zeros(2, 20, 34),
    }.items():
        given = [bad if n == name else inputs[n] for n in names]
        with pytest.raises(RuntimeError, match=name):
            torch.ops.mamba_ssm.selective_scan_fwd(*given, 1.0, True, False, "zoh", False, 0)
    with pytest.raises(RuntimeError, match=r"'euler'; expected one of zoh, foh"):
        torch.ops.mamba_ssm.selective_scan_fwd(*(inputs[n] for n in names), 1.0, True, False, "euler", False, 0)


@needs_kernel
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_kernels_touch_nothing_outside_of_their_tensors(isa):
    program = Path(__file__).with_name("guarded_memory.py")
    environment = {**os.environ, "MAMBA_SSM_CPU_ISA": isa}
    result = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True)
    if "that this processor has" in result.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert result.returncode == 0 and "nothing outside was touched" in result.stdout, result.stderr[-2000:]


# ---- Which backend runs --------------------------------------------------------------------------------------------


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the calls of the compiled forward."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function is torch.ops.mamba_ssm.selective_scan_fwd.default
        return function(*arguments, **(options or {}))


def kernel_calls(inputs: dict[str, Tensor], **options) -> int:
    with Calls() as calls:
        selective_scan_fn(**inputs, **options)
    return calls.count


@needs_kernel
def test_choice_of_backend(monkeypatch):
    inputs = make_inputs(length=3)
    assert kernel_calls(inputs) == 1
    assert kernel_calls(inputs, use_cuda_kernel=False) == 0
    with pytest.raises(RuntimeError, match=r"use_cuda_kernel=True asks for the CUDA kernel, but .* on 'cpu'"):
        selective_scan_fn(**inputs, use_cuda_kernel=True)
    assert kernel_calls({name: t.double() for name, t in inputs.items()}) == 0
    assert kernel_calls({**inputs, "A": inputs["A"].double()}) == 0

    monkeypatch.setenv("VIM_USE_CUDA_KERNEL", "0")  # it wins over the argument
    assert kernel_calls(inputs) == kernel_calls(inputs, use_cuda_kernel=True) == 0
    torch.testing.assert_close(selective_scan_fn(**inputs), selective_scan_ref(**inputs), rtol=0, atol=0)
    monkeypatch.setenv("VIM_USE_CUDA_KERNEL", "1")
    for option in (None, False):
        with pytest.raises(RuntimeError, match=r"VIM_USE_CUDA_KERNEL=1 asks for the CUDA kernel.*Unset it"):
            selective_scan_fn(**inputs, use_cuda_kernel=option)
    monkeypatch.setenv("VIM_USE_CUDA_KERNEL", "yes")
    with pytest.raises(ValueError, match=r"VIM_USE_CUDA_KERNEL: got 'yes'; expected 1 .*0 .*or unset"):
        selective_scan_fn(**inputs)


WITHOUT_LIBRARY = """
import warnings
import torch
import mamba_ssm
from mamba_ssm.ops.selective_scan import selective_scan_fn
from mamba_ssm.ops.selective_scan_ref import selective_scan_ref

assert mamba_ssm.__file__.startswith({folder!r}), mamba_ssm.__file__
u, A, B = torch.randn(2, 3, 9), -torch.rand(3, 4), torch.randn(2, 4, 9)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        out = selective_scan_fn(u, u.abs(), A, B, B)
    mamba_ssm.Mamba(8)(torch.randn(1, 5, 8))
assert torch.equal(out, selective_scan_ref(u, u.abs(), A, B, B))
assert len(caught) == 1, [str(w.message) for w in caught]
print(caught[0].message)
"""


@pytest.mark.parametrize(("content", "cause"), [(None, "was not built"), (b"no library", "could not be loaded")])
def test_without_the_library_the_reference_runs_after_one_warning(content, cause, tmp_path):
    for package in ("mamba_ssm", "causal_conv1d"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if content is not None:
        (tmp_path / "mamba_ssm" / "_C_cpu.so").write_bytes(content)
    program = WITHOUT_LIBRARY.format(folder=str(tmp_path))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert cause in result.stdout and "PyTorch reference runs" in result.stdout and "doctor" in result.stdout
