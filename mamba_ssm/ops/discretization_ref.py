"""The discretizations of a state space model, in PyTorch: the mathematics that every kernel is checked against.

A continuous model  h'(t) = A h(t) + B(t) u(t)  becomes, with a step Δ,

    h_t = Ā h_{t-1} + c B_t u_t,        Ā and c functions of Δ and A.

`METHODS` is the table of all methods, in the order of the C++ table (`csrc/selective_scan/discretization.h`). With
x = ΔA and the functions φ1 = (eˣ-1)/x, φ2 = (eˣ-1-x)/x², φ3 = (eˣ-1-x-x²/2)/x³, one function per method states its
equation. To add a method, write one such function and one row here, with the operations it costs, and one struct there.

The first six rows are the methods of "Beyond ZOH: Advanced Discretization Strategies for State Space Models", by their
mathematical definitions. The `_taylor` rows are the truncated coefficients with which the paper's code was published;
they agree with the definitions for small |x| only. What theory says of them:

- Only u_t enters a step, so for an input that varies smoothly every consistent method is of global order 1 in Δ. For an
  input held constant over each step, `zoh_exact` is exact, `rk4` of order 4, `bilinear` 2, the others 1.
- `foh` as published is not consistent: c ≈ Δ²/2, so c/Δ → 0 and the input fades as the steps get shorter.
- The Δ² and Δ³ terms that `poly` and `highorder` add to Δφ1 carry no matching power of A: they mix units, and so depend
  on the unit in which time is measured.
- `zoh` is Mamba's rule, whose input factor is the Euler step Δ; what textbooks call zero-order hold is `zoh_exact`.
- `bilinear` has a pole at x = 2, which a stable A (all eigenvalues negative) cannot reach. There Ā and c are infinite,
  and Inf and NaN propagate from them. |Ā| < 1 for every x < 0, but Ā < 0 beyond x = -2.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_SERIES_RADIUS = 2.0
_SERIES_TERMS = {torch.float32: 15, torch.float64: 24}  # the first term left out is below the dtype's precision


class _DiagonalStep:
    """One step with a diagonal A, every entry a scalar equation: delta (..., D, 1), A (D, N), x = ΔA (..., D, N).

    Each quantity has two formulas, one for small |x| and one for large, so that values *and* autograd's derivatives
    keep the accuracy of the dtype. `torch.where` evaluates both; a formula therefore gets a harmless argument wherever
    the other one is used, because 0 · Inf in its backward would be NaN.
    """

    def __init__(self, delta: Tensor, A: Tensor):
        self.x = delta[..., None] * A
        self.delta = delta[..., None]
        self.A = A

    def exp(self) -> Tensor:
        return torch.exp(self.x)

    def polynomial(self, *coefficients: float) -> Tensor:
        """Sum of coefficients[j] xʲ."""
        return _horner(self.x, coefficients)

    def phis(self, count: int) -> list[Tensor]:
        """[Δφ1(x), Δ²φ2(x), Δ³φ3(x)][:count].

        These are the integrals of eᴬˢ, (Δ-s)eᴬˢ and (Δ-s)²eᴬˢ/2 over a step.
        """
        near = self.x.abs() < _SERIES_RADIUS

        x = torch.where(near, self.x, 0.0)
        delta = torch.where(near, self.delta, 0.0)
        phi3 = _horner(x, [1 / math.factorial(j + 3) for j in range(_SERIES_TERMS[x.dtype])])
        phi2 = 1 / 2 + x * phi3
        phi1 = 1 + x * phi2
        series = [delta * phi1, delta**2 * phi2, delta**3 * phi3]

        # Division by A, not by x, makes the derivative to Δ of each exactly the one before it: d(Δφ1)/dΔ = eˣ, which
        # the product rule on Δ·φ1(x) would get as a difference of two large numbers.
        x = torch.where(near, -1.0, self.x)
        A = torch.where(near, -1.0, self.A)
        first = (torch.exp(x) - 1) / A
        second = (first - self.delta) / A
        third = (second - self.delta**2 / 2) / A
        closed = [first, second, third]

        return [torch.where(near, a, b) for a, b in zip(series[:count], closed[:count], strict=True)]

    def bilinear(self) -> tuple[Tensor, Tensor]:
        """(1 + x/2) / (1 - x/2) and Δ / (1 - x/2)."""
        near = self.x > -4  # holds the zero of Ā at x = -2, where only the quotient is accurate

        x = torch.where(near, self.x, 0.0)
        quotient = (1 + x / 2) / (1 - x / 2), torch.where(near, self.delta, 0.0) / (1 - x / 2)

        # The same in terms of r = 1 / (1 - x/2) alone, whose derivatives do not cancel.
        r = 1 / (1 - torch.where(near, -4.0, self.x) / 2)
        reciprocal = 2 * r - 1, 2 * (r - 1) / torch.where(near, -1.0, self.A)

        A_bar, c = (torch.where(near, a, b) for a, b in zip(quotient, reciprocal, strict=True))
        return A_bar, c


class _MatrixStep:
    """One step with full matrices: delta (..., D, 1, 1), A (D, N, N), x = ΔA (..., D, N, N). A may be singular."""

    def __init__(self, delta: Tensor, A: Tensor):
        self.delta = delta[..., None, None]
        self.x = (self.delta * A).contiguous()  # matrix_exp refuses some strides

    def exp(self) -> Tensor:
        return torch.matrix_exp(self.x)

    def polynomial(self, *coefficients: float) -> Tensor:
        identity = self._identity()
        total = coefficients[-1] * identity
        for coefficient in reversed(coefficients[:-1]):
            total = total @ self.x + coefficient * identity
        return total

    def phis(self, count: int) -> list[Tensor]:
        """The φ functions are the blocks beside eˣ in the exponential of [[x, 1, 0, ..], [0, 0, 1, ..], .., [0]]."""
        n = self.x.shape[-1]
        shift = torch.diag(self.x.new_ones(count * n), n)
        top = torch.cat([self.x, shift[:n, n:].expand(*self.x.shape[:-1], count * n)], dim=-1)
        rest = shift[n:].expand(*self.x.shape[:-2], count * n, (count + 1) * n)
        first_row = torch.matrix_exp(torch.cat([top, rest], dim=-2))[..., :n, :]
        return [self.delta**k * first_row[..., k * n : (k + 1) * n] for k in range(1, count + 1)]

    def bilinear(self) -> tuple[Tensor, Tensor]:
        identity = self._identity()
        # solve_ex, because at the pole solve would raise where the diagonal formula gives Inf.
        A_bar, _ = torch.linalg.solve_ex(identity - self.x / 2, identity + self.x / 2)
        c, _ = torch.linalg.solve_ex(identity - self.x / 2, self.delta * identity)
        return A_bar, c

    def _identity(self) -> Tensor:
        return torch.eye(self.x.shape[-1], dtype=self.x.dtype, device=self.x.device).expand_as(self.x)


def _horner(x: Tensor, coefficients) -> Tensor:
    total = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total


_Step = _DiagonalStep | _MatrixStep


def _zoh(step: _Step) -> tuple[Tensor, Tensor]:
    return step.exp(), step.delta * step.polynomial(1)


def _foh(step: _Step) -> tuple[Tensor, Tensor]:
    _, phi2 = step.phis(2)
    return step.exp(), phi2


def _bilinear(step: _Step) -> tuple[Tensor, Tensor]:
    return step.bilinear()


def _poly(step: _Step) -> tuple[Tensor, Tensor]:
    phi1, phi2 = step.phis(2)
    return step.exp(), phi1 + phi2 / 2


def _highorder(step: _Step) -> tuple[Tensor, Tensor]:
    phi1, phi2, phi3 = step.phis(3)
    return step.exp(), phi1 + phi2 + phi3 / 2


def _rk4(step: _Step) -> tuple[Tensor, Tensor]:
    return step.exp(), step.delta * step.polynomial(1, 1 / 2, 1 / 6, 1 / 24)


def _foh_taylor(step: _Step) -> tuple[Tensor, Tensor]:
    return step.exp(), step.delta**2 * step.polynomial(1 / 2, 1 / 6, 1 / 24, 1 / 120)


def _poly_taylor(step: _Step) -> tuple[Tensor, Tensor]:
    c = step.delta * step.polynomial(1, 1 / 2, 1 / 6, 1 / 24)
    return step.exp(), c + step.delta**2 * step.polynomial(1 / 4, 1 / 12, 1 / 48)


def _highorder_taylor(step: _Step) -> tuple[Tensor, Tensor]:
    c = step.delta * step.polynomial(1, 1 / 2, 1 / 6, 1 / 24)
    c = c + step.delta**2 * step.polynomial(1 / 2, 1 / 6, 1 / 24)
    return step.exp(), c + step.delta**3 * step.polynomial(1 / 12, 1 / 48)


def _zoh_exact(step: _Step) -> tuple[Tensor, Tensor]:
    (phi1,) = step.phis(1)
    return step.exp(), phi1


@dataclass(frozen=True)
class Discretization:
    """One row of the table.

    name: the value of `discretization_method`.
    A_bar, c: the equations, as text.
    held_order: global order in Δ for an input held constant over each step; inf: exact; None: does not converge.
    function: the equations, for a step with diagonal or full A.
    forward_operations: arithmetic operations for Ā and c, per state and step.
    backward_operations: those for Ā, c, their derivatives, and the gradients of Δ and A from those of Ā and c.

    An operation is one addition, subtraction, multiplication, division or exp; what depends on A alone is computed once
    and counts as nothing. The forms counted, with e = eˣ - 1 and m, a, b, d, α, β, γ, δ for what is made of A:

        forward     x and eˣ 2, then c: zoh 0; zoh_exact a e 2; foh a (e - x) 3; poly a e + b x 4; highorder
                    a e + x (b + d x) 6; rk4 and the other polynomials Δ (m0 + m1 Δ + m2 Δ² + m3 Δ³) 7, foh_taylor one
                    factor Δ more, 8. bilinear: ΔA/2, w = 1/(1 - ·) 3, Ā = w (1 + ·) 2, c = Δ w 1.
        dĀ/dx       eˣ again; bilinear w² 1.
        ∂c/∂Δ       zoh 0; zoh_exact eˣ 0; foh a e 1; poly a eˣ + b 2; highorder a eˣ + b + d x 4; bilinear w² again;
                    polynomials m0 + … + m3 Δ³ 6, foh_taylor one factor Δ more, 7.
        ∂c/∂A       zoh 0; zoh_exact a (Δ eˣ - c) 3; foh a (e (x - 2) + 2 x) 5; poly e (α + β x) + γ x 5; highorder
                    e (α + β x) + x (γ + δ x) 7; bilinear c²/2 2; polynomials Δ² (m1 + m2 Δ + m3 Δ²) 6, foh_taylor 7.
        chain rule  g = Ā' dĀ/dx 1, A g + c' ∂c/∂Δ 3, Δ g + c' ∂c/∂A 3; zoh, with ∂c/∂Δ = 1 and ∂c/∂A = 0: 1 + 2 + 1.
    """

    name: str
    A_bar: str
    c: str
    held_order: float | None
    function: Callable[[_Step], tuple[Tensor, Tensor]]
    forward_operations: int
    backward_operations: int


_ROWS = (
    Discretization("zoh", "eˣ", "Δ", 1, _zoh, 2, 6),
    Discretization("foh", "eˣ", "Δ²φ2", None, _foh, 5, 18),
    Discretization("bilinear", "(1 + x/2) / (1 - x/2)", "Δ / (1 - x/2)", 2, _bilinear, 6, 16),
    Discretization("poly", "eˣ", "Δφ1 + ½Δ²φ2", 1, _poly, 6, 20),
    Discretization("highorder", "eˣ", "Δφ1 + Δ²φ2 + ½Δ³φ3", 1, _highorder, 8, 26),
    Discretization("rk4", "eˣ", "Δ(1 + x/2 + x²/6 + x³/24)", 4, _rk4, 9, 28),
    Discretization("foh_taylor", "eˣ", "Δ²/2 + AΔ³/6 + A²Δ⁴/24 + A³Δ⁵/120", None, _foh_taylor, 10, 31),
    Discretization(
        "poly_taylor", "eˣ", "Δ + (A/2 + 1/4)Δ² + (A²/6 + A/12)Δ³ + (A³/24 + A²/48)Δ⁴", 1, _poly_taylor, 9, 28
    ),
    Discretization(
        "highorder_taylor",
        "eˣ",
        "Δ + (A/2 + 1/2)Δ² + (A²/6 + A/6 + 1/12)Δ³ + (A³/24 + A²/24 + A/48)Δ⁴",
        1,
        _highorder_taylor,
        9,
        28,
    ),
    Discretization("zoh_exact", "eˣ", "Δφ1", math.inf, _zoh_exact, 4, 14),
)

METHODS: dict[str, Discretization] = {row.name: row for row in _ROWS}
PAPER_METHODS: tuple[str, ...] = tuple(METHODS)[:6]


def get_method(name: str) -> Discretization:
    """The row called `name`; ValueError, listing the known names, if there is none."""
    if name not in METHODS:
        raise ValueError(f"discretization_method: unknown method {name!r}; choose one of {', '.join(METHODS)}")
    return METHODS[name]


def discretize(name: str, delta: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Ā and c of one method, differentiable with respect to delta and A.

    delta: (..., D), the steps, in the unit of time in which A is a rate.
    A: (D, N), the diagonals of the state matrices, or (D, N, N), full state matrices (for study; any matrix).
    Returns Ā and c, each of shape (..., D, N) or (..., D, N, N), in float64 if an input is float64, else in float32.

    With diagonal A, values and derivatives are accurate to a few units in the last place for every x = ΔA ≤ 0; for a
    polynomial, next to its sum of absolute terms. ValueError for an unknown name or an A of another rank.
    """
    method = get_method(name)
    dtype = torch.promote_types(torch.promote_types(delta.dtype, A.dtype), torch.float32)
    delta, A = delta.to(dtype), A.to(dtype)
    if A.dim() == 2:
        return method.function(_DiagonalStep(delta, A))
    if A.dim() == 3:
        return method.function(_MatrixStep(delta, A))
    raise ValueError(f"A: got shape {tuple(A.shape)}; expected (D, N), a diagonal, or (D, N, N), full matrices")
