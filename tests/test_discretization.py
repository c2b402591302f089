"""The discretizations: accuracy against mpmath, derivatives, order of convergence, full matrices, extremes."""

import itertools
import math

import mpmath
import pytest
import torch
from mpmath import mpf

from mamba_ssm.ops.discretization_ref import METHODS, PAPER_METHODS, discretize, get_method
from mamba_ssm.ops.selective_scan_ref import selective_scan_ref

ALL = list(METHODS)
POLYNOMIAL = {"rk4", "foh_taylor", "poly_taylor", "highorder_taylor"}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}

# x from -1e-8 to -80, and both sides of every point where a formula changes.
GRID = [-(10 ** (-8 + 9.9 * i / 60)) for i in range(61)]
GRID += [-80.0, -4.0001, -4.0, -3.9999, -2.0001, -2.0, -1.9999, -1.0, -36.0, -17.0]


@pytest.fixture(autouse=True)
def fifty_digits():
    with mpmath.workdps(50):
        yield


def exact(name, delta, A):
    """(Ā, c) in 50 digits; φk by the confluent hypergeometric function, which knows no cancellation."""
    x = delta * A
    phi1, phi2, phi3 = (mpmath.hyp1f1(1, k + 1, x) / mpmath.factorial(k) for k in (1, 2, 3))
    d, half = delta, mpf(1) / 2
    c = {
        "zoh": lambda: d,
        "foh": lambda: d**2 * phi2,
        "bilinear": lambda: d / (1 - x / 2),
        "poly": lambda: d * phi1 + half * d**2 * phi2,
        "highorder": lambda: d * phi1 + d**2 * phi2 + half * d**3 * phi3,
        "rk4": lambda: d * (1 + x / 2 + x**2 / 6 + x**3 / 24),
        "foh_taylor": lambda: d**2 / 2 + A * d**3 / 6 + A**2 * d**4 / 24 + A**3 * d**5 / 120,
        "poly_taylor": lambda: (
            d + (A / 2 + mpf(1) / 4) * d**2 + (A**2 / 6 + A / 12) * d**3 + (A**3 / 24 + A**2 / 48) * d**4
        ),
        "highorder_taylor": lambda: (
            d
            + (A / 2 + half) * d**2
            + (A**2 / 6 + A / 6 + mpf(1) / 12) * d**3
            + (A**3 / 24 + A**2 / 24 + A / 48) * d**4
        ),
        "zoh_exact": lambda: d * phi1,
    }[name]()
    return ((1 + x / 2) / (1 - x / 2) if name == "bilinear" else mpmath.exp(x)), c


def exact_with_derivatives(name, delta, A):
    """[Ā, ∂Ā/∂Δ, ∂Ā/∂A, c, ∂c/∂Δ, ∂c/∂A] in 50 digits."""
    values = []
    for i in (0, 1):
        values.append(exact(name, delta, A)[i])
        values.append(mpmath.diff(lambda d, i=i: exact(name, d, A)[i], delta))
        values.append(mpmath.diff(lambda a, i=i: exact(name, delta, a)[i], A))
    return values


def with_derivatives(name, delta, A):
    """The same six by `discretize` and autograd; delta (P, 1) and A (1, 1) per point, as (P,) vectors."""
    delta, A = delta.clone().requires_grad_(), A.clone().requires_grad_()
    results = []
    for value in discretize(name, delta[None], A[:, None]):
        results += [
            value.flatten(),
            *torch.autograd.grad(value.sum(), (delta, A), retain_graph=True, allow_unused=True),
        ]
    return [torch.zeros_like(delta) if r is None else r.detach() for r in results]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("step", [2.0**-10, 0.7, 8.0])
def test_values_and_derivatives_match_mpmath(name, dtype, step):
    delta = torch.full((len(GRID),), step, dtype=dtype)
    A = torch.tensor(GRID, dtype=torch.float64).div(step).to(dtype)
    actual = with_derivatives(name, delta, A)
    for i in range(len(GRID)):
        d, a = mpf(delta[i].item()), mpf(A[i].item())
        expected = exact_with_derivatives(name, d, a)
        # A polynomial has zeros in x < 0; its error is measured against the sum of its absolute terms, all of whose
        # coefficients are positive.
        magnitude = exact_with_derivatives(name, d, -a) if name in POLYNOMIAL else expected
        for what, got, value, size in zip(
            ("A_bar", "dA_bar/ddelta", "dA_bar/dA", "c", "dc/ddelta", "dc/dA"), actual, expected, magnitude, strict=True
        ):
            allowed = TOLERANCE[dtype] * abs(size)
            if name == "bilinear" and what == "A_bar" and step == 0.7:
                allowed += torch.finfo(dtype).eps  # the rounding of x = ΔA, felt at the zero x = -2; other steps are 2ⁿ
            assert abs(mpf(got[i].item()) - value) <= allowed, f"{what} at x = {float(d * a)}"


@pytest.mark.parametrize("x", [-1e3, -1e5])
def test_bilinear_derivatives_do_not_cancel_far_out(x):
    """All else has settled there, but 1/(1 - x/2) falls off slowly."""
    actual = with_derivatives("bilinear", torch.tensor([0.5]), torch.tensor([2 * x]))
    for got, expected in zip(actual, exact_with_derivatives("bilinear", mpf(0.5), mpf(2 * x)), strict=True):
        assert abs(mpf(got.item()) - expected) <= 1e-6 * abs(expected)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full"])
def test_gradcheck(name, full):
    torch.manual_seed(0)
    delta = torch.tensor([[0.01, 0.5], [1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    A = torch.tensor([[-1e-3, -0.4, -1.9], [-2.1, -4.5, -16.0]], dtype=torch.float64)
    if full:
        A = torch.diag_embed(A) + 0.3 * torch.randn(2, 3, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda d, a: discretize(name, d, a), (delta, A.requires_grad_()))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_extremes_are_finite_with_finite_derivatives(name, dtype):
    x = torch.tensor([0.0, -0.0, -1e-30, -1e-8, -1e-3, -1.9999, -2.0, -4.0, -20.0, -80.0, -1e3, -1e6], dtype=dtype)
    for step in (0.0, 1e-38, 1e-8, 1e-3, 1.0, 1e3, 1e6):
        delta = torch.full_like(x, step)
        A = x / step if step >= 1e-8 else x
        for result in with_derivatives(name, delta, A):
            assert result.isfinite().all(), f"delta = {step}, x = {(delta * A)[~result.isfinite()].tolist()}"


@pytest.mark.parametrize("name", ALL)
def test_zero_rate_integrates(name):
    """A = 0: Ā = 1, and c is the first terms of its series."""
    step = 0.3
    A_bar, c = discretize(name, torch.tensor([step]), torch.zeros(1, 1))
    assert A_bar.item() == 1.0
    expected = exact(name, mpf(torch.tensor(step).item()), mpf(0))[1]
    assert c.item() == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_nan_and_inf_propagate(name):
    bad = torch.tensor([math.nan])
    good = torch.tensor([1.0])
    assert all(value.isnan().all() for value in discretize(name, bad, -good[:, None]))
    A_bar, c = discretize(name, good, bad[:, None])
    assert A_bar.isnan().all()
    assert c.isnan().all() or name == "zoh"  # zoh's c is Δ, whatever A is

    # An infinite step is the limit of long steps: the steady state -1/A of zoh_exact, 2 · (-1/A) of bilinear.
    _, c = discretize(name, torch.tensor([math.inf]), torch.tensor([[-0.5]]))
    limit = {"zoh_exact": 2.0, "bilinear": 4.0}.get(name)
    assert c.item() == limit if limit else not c.isfinite()


def test_bilinear_pole_gives_inf_not_an_error():
    A_bar, c = discretize("bilinear", torch.tensor([1.0]), torch.tensor([[2.0, -1.0]]))
    assert A_bar[0, 0].isinf() and c[0, 0].isinf()
    assert A_bar[0, 1].item() == pytest.approx(1 / 3)
    A_bar, c = discretize("bilinear", torch.tensor([1.0]), torch.tensor([[[2.0, 0.0], [0.0, -1.0]]]))
    assert not A_bar.isfinite().all() and not c.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_positive_rates(name):
    """Unstable A is allowed; values are still those of the equations."""
    for x in (1e-4, 0.5, 1.9, 2.1, 5.0):
        delta, A = torch.tensor([0.5], dtype=torch.float64), torch.tensor([[x / 0.5]], dtype=torch.float64)
        for got, expected in zip(discretize(name, delta, A), exact(name, mpf(0.5), mpf(A.item())), strict=True):
            assert got.item() == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("name", ["foh", "poly", "highorder"])
def test_taylor_rows_agree_for_small_x_only(name):
    def c(row, step, rate):
        return discretize(row, torch.tensor([step]), torch.tensor([[rate]]))[1].item()

    for x in (-1e-3, -1e-2):
        assert c(name + "_taylor", 0.1, x / 0.1) == pytest.approx(c(name, 0.1, x / 0.1), rel=1e-6)
    truth = {"foh": 0.04, "poly": 0.08, "highorder": 0.11}[name]
    truncated = {"foh": -3.6, "poly": -27.4, "highorder": -26.5}[name]
    assert c(name, 0.693, -16.0) == pytest.approx(truth, abs=0.005)
    assert c(name + "_taylor", 0.693, -16.0) == pytest.approx(truncated, abs=0.05)


@pytest.mark.parametrize("name", ALL)
def test_full_matrices_agree_with_diagonal(name):
    torch.manual_seed(0)
    delta = torch.rand(2, 5, 3, dtype=torch.float64)
    A = -4 * torch.rand(3, 4, dtype=torch.float64)
    basis = torch.eye(4, dtype=torch.float64) + 0.3 * torch.randn(3, 4, 4, dtype=torch.float64)
    full = basis @ torch.diag_embed(A) @ torch.linalg.inv(basis)
    for diagonal, matrix in zip(discretize(name, delta, A), discretize(name, delta, full), strict=True):
        assert matrix.shape == (2, 5, 3, 4, 4)
        expected = basis @ torch.diag_embed(diagonal) @ torch.linalg.inv(basis)
        torch.testing.assert_close(matrix, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("rate", [0.0, -0.5, -3.0])
@pytest.mark.parametrize("name", ALL)
def test_full_matrix_not_diagonalizable(name, rate):
    """A function f of the Jordan block [[a, 1], [0, a]] is [[f(a), f'(a)], [0, f(a)]]; with a = 0 it is singular."""
    delta = torch.tensor([0.7], dtype=torch.float64)
    block = torch.tensor([[[rate, 1.0], [0.0, rate]]], dtype=torch.float64)
    _, _, dA_bar, _, _, dc = (float(v) for v in exact_with_derivatives(name, mpf(delta.item()), mpf(rate)))
    A_bar, c = (float(v) for v in exact(name, mpf(delta.item()), mpf(rate)))
    for matrix, value, slope in zip(discretize(name, delta, block), (A_bar, c), (dA_bar, dc), strict=True):
        expected = torch.tensor([[[value, slope], [0.0, value]]], dtype=torch.float64)
        torch.testing.assert_close(matrix, expected, rtol=1e-12, atol=1e-14)


def global_errors(name, held, halvings=(3, 4, 5, 6)):
    """Error of the last state at time 2, over four rates, for steps 2⁻³, 2⁻⁴, ..; and the exact state's size.

    held: u is constant over each of 8 intervals, so over every step; else u(t) = cos(3t) + t, sampled at a step's end.
    """
    A = torch.tensor([[-0.3, -0.7, -1.7, -2.9]], dtype=torch.float64)
    levels = torch.tensor([1.0, -0.5, 2.0, 0.3, -1.2, 0.8, 1.5, -0.4], dtype=torch.float64)
    end, errors = 2.0, []
    if held:
        solution = torch.zeros_like(A)
        for level in levels:
            solution = torch.exp(A * end / 8) * solution + level * torch.expm1(A * end / 8) / A
    else:
        # ∫ e^{A(T-t)} (cos 3t + t) dt over [0, T]
        decay = torch.exp(A * end)
        wave = (3 * math.sin(3 * end) - A * math.cos(3 * end) + A * decay) / (A**2 + 9)
        solution = wave + (decay - 1 - A * end) / A**2
    for halving in halvings:
        steps = int(end * 2**halving)
        times = torch.arange(1, steps + 1, dtype=torch.float64) / 2**halving
        u = levels.repeat_interleave(steps // 8) if held else torch.cos(3 * times) + times
        ones = torch.ones(1, 4, dtype=torch.float64)
        delta = torch.full((1, 1, steps), 2.0**-halving, dtype=torch.float64)
        _, state = selective_scan_ref(
            u[None, None], delta, A, ones, ones, return_last_state=True, discretization_method=name
        )
        errors.append((state[0] - solution).norm().item())
    return errors, solution.norm().item()


@pytest.mark.parametrize("held", [True, False], ids=["held", "smooth"])
@pytest.mark.parametrize("name", ALL)
def test_order_of_accuracy(name, held):
    errors, size = global_errors(name, held)
    order = METHODS[name].held_order
    if order is None:  # does not converge: the state fades with Δ, until the error is the whole solution
        assert errors == sorted(errors)
        assert errors[-1] == pytest.approx(size, rel=0.02)
        return
    if held and order == math.inf:
        assert max(errors) < 1e-13
        return
    measured = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert measured[-1] == pytest.approx(order if held else 1, abs=0.1), measured


@pytest.mark.parametrize("name", ["foh", "foh_taylor"])
def test_foh_fades_with_the_step(name):
    """c/Δ → Δ/2: at Δ = 0.01 the input of `foh` is 1/200 of the others'."""
    delta, A = torch.tensor([0.01]), torch.tensor([[-0.1]])
    ratio = discretize(name, delta, A)[1] / discretize("zoh_exact", delta, A)[1]
    assert ratio.item() == pytest.approx(1 / 200, rel=1e-3)


def test_table():
    assert PAPER_METHODS == ("zoh", "foh", "bilinear", "poly", "highorder", "rk4")
    assert ALL[6:] == ["foh_taylor", "poly_taylor", "highorder_taylor", "zoh_exact"]
    assert all(get_method(name).name == name for name in ALL)


def test_unknown_method_lists_the_known():
    with pytest.raises(ValueError, match="discretization_method: unknown method 'euler'") as error:
        discretize("euler", torch.ones(1), -torch.ones(1, 1))
    assert all(name in str(error.value) for name in ALL)


def test_rank_of_A():
    with pytest.raises(ValueError, match=r"A: got shape \(3,\)"):
        discretize("zoh", torch.ones(3), -torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    delta, A = torch.tensor([0.3], dtype=dtype), torch.tensor([[-1.5]])
    for got, expected in zip(discretize("poly", delta, A), discretize("poly", delta.float(), A), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, expected)
