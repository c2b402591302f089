"""The discretizations on problems with known answers, without training: `scripts/study.py --task ops`.

    python scripts/study.py --task ops                            # everything, into output/ops
    python scripts/study.py --task ops --parts gain truncation    # two parts only

Every part solves its problem with each method, by the library's reference in float64, and compares with a solution in
closed form. All problems are h' = A h + u with A < 0, one state per rate; time has no unit, x = ΔA.

    bank           relaxations, A from -1/4 to -16; u held over each step, and u smooth and sampled at a step's end
    exponentials   a kernel that is a sum of exponentials, applied to an input that is one
    copy           selective copy: a long step writes a token, short steps hold it while other tokens pass
    image          a smooth 2-D field of n x n pixels scanned row by row, sampled at a pixel's end or at its centre
    gain           the steady state under a constant input, against the exact -1/A
    stability      |Ā(x)| over real and complex x
    truncation     coefficients that are truncated series, against the functions they truncate
    gradients      ∂loss/∂Δ and ∂loss/∂A, against finite differences and against those of the exact solution

The output folder receives ops.json, ops.txt, ops_*.png and ops.html (study_ops_report.py). There is no randomness but
that of fixed seeds, and no time of day: a second run on the same machine writes the same files. The exit status is 1 if
a conclusion of the page does not hold in this run, 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from mamba_ssm.ops.discretization_ref import METHODS, discretize
from mamba_ssm.ops.selective_scan_ref import selective_scan_ref
from vim.provenance import environment

Results = dict[str, Any]

# What a truncated coefficient stands for. The c of rk4 is the Taylor polynomial of degree 3 of zoh_exact's.
DEFINITION = {name: name.removesuffix("_taylor") for name in METHODS if name.endswith("_taylor")} | {"rk4": "zoh_exact"}

ORDER_TOLERANCE = 0.1
_ROUNDING = 1e-12  # an error below this is one of float64, not of the method


@dataclass(frozen=True)
class Sizes:
    """How far the steps shrink. halvings: Δ = 2**-halving; sides: n of the n x n images."""

    halvings: tuple[int, ...]
    sides: tuple[int, ...]


FULL = Sizes(tuple(range(9)), (8, 16, 32, 64))
SMALL = Sizes((2, 6, 7), (8, 16, 32))


# ---- Solutions and errors ------------------------------------------------------------------------------------------


def scan_states(method: str, u: Tensor, delta: Tensor, rates: Tensor) -> Tensor:
    """The states h_t after every step (B, D, L), from inputs and steps (B, D, L) and one rate A per channel (D,)."""
    ones = torch.ones(len(rates), 1, dtype=rates.dtype)
    with torch.no_grad():
        return selective_scan_ref(u, delta, rates[:, None], ones, ones, discretization_method=method)


def exponential_response(rates: Tensor, weights: Tensor, s: Tensor, times: Tensor) -> Tensor:
    """Solution (D, T) of h' = A h + Re Σ w eˢᵗ, h(0) = 0; rates A (D,), complex w and s (K,), times (T,)."""
    A, t = rates[:, None, None], times[:, None]
    return (weights * (torch.exp(s * t) - torch.exp(A * t)) / (s - A)).sum(-1).real


def held_response(rates: Tensor, u: Tensor, delta: Tensor) -> Tensor:
    """Solution after every step (B, D, L) for an input that is constant over each step; u and delta (B, D, L)."""
    state, states = torch.zeros_like(u[..., 0]), []
    for value, step in zip(u.unbind(-1), delta.unbind(-1), strict=True):
        state = torch.exp(rates * step) * state + torch.expm1(rates * step) / rates * value
        states.append(state)
    return torch.stack(states, -1)


def relative_error(difference: Tensor, exact: Tensor) -> float:
    """Per state (first dimension) the norm over times relative to the exact one's; over states the root mean square."""
    return (difference.norm(dim=1) / exact.norm(dim=1)).square().mean().sqrt().item()


def error_parts(states: Tensor, definition: Tensor, exact: Tensor, readout: Tensor | None = None) -> dict[str, float]:
    """The error of `states` (D, T) and its three parts, each relative to `exact`; `readout` (D,) sums the states first.

    truncation: states - definition, where definition are the states by the coefficients that were truncated;
    gain: what a constant factor per state, the best one, removes from the definition's states: B or C can learn it;
    rest: what is left then: the state factor Ā, the sampling of the input, and how c varies with Δ where Δ varies.
    """
    factor = (definition * exact).sum(1, keepdim=True) / definition.square().sum(1, keepdim=True)
    fitted = factor * definition
    parts = [states - exact, states - definition, definition - fitted, fitted - exact]
    if readout is not None:
        parts, exact = [readout[None] @ part for part in parts], readout[None] @ exact
    names = ("error", "truncation", "gain", "rest")
    return {name: relative_error(part, exact) for name, part in zip(names, parts, strict=True)}


def observed_order(errors: Sequence[float]) -> float | str:
    """log2 of the last two errors' quotient (Δ halves); 'exact' if all are rounding, 'none' if the last do not fall."""
    if max(errors) < _ROUNDING:
        return "exact"
    order = math.log2(errors[-2] / errors[-1])
    return order if order > ORDER_TOLERANCE else "none"


def expected_order(method: str, held: bool) -> float | str:
    """The same by theory: `Discretization.held_order`, and 1 for a smooth input if the method converges at all."""
    order = METHODS[method].held_order
    if order is None:
        return "none"
    if not held:
        return 1
    return "exact" if order == math.inf else order


def order_agrees(observed: float | str, expected: float | str) -> bool:
    if isinstance(observed, str) or isinstance(expected, str):
        return observed == expected
    return abs(observed - expected) <= ORDER_TOLERANCE


# States of one input at the sample times (D, T), and the exact ones.
_Solve = Callable[[str, float], dict[str, tuple[Tensor, Tensor]]]


def convergence(steps: Sequence[float], solve: _Solve, readout: Tensor | None = None) -> Results:
    """{input: {method: {error, truncation, gain, rest (one per step), order}}} for `solve(method, step)`."""
    table: Results = {}
    for step in steps:
        solved = {method: solve(method, step) for method in METHODS}
        for method, inputs in solved.items():
            for name, (states, exact) in inputs.items():
                definition, _ = solved[DEFINITION.get(method, method)][name]
                row = table.setdefault(name, {}).setdefault(method, {})
                for key, value in error_parts(states, definition, exact, readout).items():
                    row.setdefault(key, []).append(value)
    for rows in table.values():
        for row in rows.values():
            row["order"] = observed_order(row["error"])
    return {"steps": list(steps), "inputs": table}


def _per_state(u: Tensor, count: int) -> Tensor:
    """Inputs (B, L) given to each of `count` states, (B, count, L)."""
    return u[:, None].expand(-1, count, -1)


def _tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- The parts -----------------------------------------------------------------------------------------------------


def bank(sizes: Sizes) -> Results:
    """Seven relaxations from 1/4 to 16 over the time [0, 8], compared at 1, 2, .., 8, where the held input changes."""
    rates = -(2.0 ** torch.arange(-2, 5, dtype=torch.float64))
    levels = _tensor(1.0, -0.5, 2.0, 0.3, -1.2, 0.8, 1.5, -0.4)
    seconds = torch.arange(1, len(levels) + 1, dtype=torch.float64)
    weights, s = _tensor(1.0, 0.5).to(torch.complex128), 1j * _tensor(0.7, 3.0)
    unit = torch.ones(1, len(rates), len(levels), dtype=torch.float64)
    exact = {
        "held": held_response(rates, levels * unit, unit)[0],
        "smooth": exponential_response(rates, weights, s, seconds),
    }

    def solve(method: str, step: float) -> dict[str, tuple[Tensor, Tensor]]:
        per_second = round(1 / step)
        times = step * torch.arange(1, len(levels) * per_second + 1, dtype=torch.float64)
        smooth = (weights * torch.exp(s * times[:, None])).sum(-1).real
        u = _per_state(torch.stack([levels.repeat_interleave(per_second), smooth]), len(rates))
        states = scan_states(method, u, torch.full_like(u, step), rates)[..., per_second - 1 :: per_second]
        return {name: (states[i], exact[name]) for i, name in enumerate(("held", "smooth"))}

    return {"rates": rates.tolist()} | convergence([2.0**-h for h in sizes.halvings], solve)


def exponentials(sizes: Sizes) -> Results:
    """y = Σ C h with the kernel Σ C eᴬᵗ, for the input e⁻ᵗ⸍³ - ½ e⁻⁵ᵗ⸍² over [0, 4], compared at 1, 2, 3, 4."""
    rates, readout = _tensor(-0.5, -1.0, -2.0, -4.0), _tensor(1.0, -2.0, 3.0, -1.0)
    weights, s = _tensor(1.0, -0.5).to(torch.complex128), _tensor(-1 / 3, -5 / 2).to(torch.complex128)
    exact = exponential_response(rates, weights, s, _tensor(1, 2, 3, 4))

    def solve(method: str, step: float) -> dict[str, tuple[Tensor, Tensor]]:
        per_second = round(1 / step)
        times = step * torch.arange(1, 4 * per_second + 1, dtype=torch.float64)
        u = _per_state((weights * torch.exp(s * times[:, None])).sum(-1).real[None], len(rates))
        states = scan_states(method, u, torch.full_like(u, step), rates)[..., per_second - 1 :: per_second]
        return {"smooth": (states[0], exact)}

    return {"rates": rates.tolist()} | convergence([2.0**-h for h in sizes.halvings], solve, readout)


def image(sizes: Sizes) -> Results:
    """An n x n image of cosines, rows from left to right; a row lasts 1, so Δ = 1/n. Compared at the rows' ends."""
    rates = _tensor(-0.5, -1.0, -2.0, -4.0)
    amplitude, along, down = _tensor(1.0, 0.5, 0.3, 0.7), _tensor(1, 2, 3, 0), _tensor(1, 3, 1, 2)

    def row_weights(n: int) -> Tensor:
        """Amplitudes (n, K) of the waves along each row."""
        rows = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        return amplitude * torch.cos(math.pi * down * rows[:, None])

    def exact(n: int) -> Tensor:
        state, states = torch.zeros_like(rates), []
        for weights in row_weights(n).to(torch.complex128):
            added = exponential_response(rates, weights, 1j * math.pi * along, _tensor(1.0))
            state = torch.exp(rates) * state + added[:, 0]
            states.append(state)
        return torch.stack(states, -1)

    def solve(method: str, step: float) -> dict[str, tuple[Tensor, Tensor]]:
        n = round(1 / step)
        pixels = torch.arange(n, dtype=torch.float64)
        places = {"end": (pixels + 1) / n, "centre": (pixels + 0.5) / n}
        fields = [row_weights(n) @ torch.cos(math.pi * along[:, None] * place) for place in places.values()]
        u = _per_state(torch.stack(fields).flatten(1), len(rates))
        states = scan_states(method, u, torch.full_like(u, step), rates)[..., n - 1 :: n]
        return {name: (states[i], exact(n)) for i, name in enumerate(places)}

    return {"rates": rates.tolist()} | convergence([1 / n for n in sizes.sides], solve)


def copy(sizes: Sizes, length: int = 64, slots: int = 8, batch: int = 32, hold: float = 0.01) -> Results:
    """Every channel (A = -1) holds one marked token of each sequence to the end, while other tokens pass.

    A mark's step is the writing step times a factor from [½, 1½], as a network's Δ would vary; all others are `hold`.
    Compared are the last states, with the exact ones for a held input and, up to one factor, with the tokens.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(batch, length, dtype=torch.float64, generator=generator)
    marks = torch.rand(batch, length, generator=generator).argsort(1)[:, :slots].sort(1).values
    factors = 0.5 + torch.rand(batch, slots, dtype=torch.float64, generator=generator)
    rates = -torch.ones(slots, dtype=torch.float64)
    u = _per_state(tokens, slots)
    wanted = tokens.gather(1, marks).reshape(1, -1)

    def contrast(method: str, write: float) -> float:
        """How much more of its token a writing step takes in than a holding one."""
        _, c = discretize(method, _tensor(hold, write)[:, None], rates[:1, None])
        return (c[1] / c[0]).item()

    writes = [0.25, 0.5, 1.0, 2.0, 4.0, 8.0]
    table: Results = {}
    for write in writes:
        delta = torch.full_like(u, hold).scatter(2, marks[..., None], write * factors[..., None])
        exact = held_response(rates, u, delta)[..., -1].reshape(1, -1)
        states = {method: scan_states(method, u, delta, rates)[..., -1].reshape(1, -1) for method in METHODS}
        for method, state in states.items():
            row = table.setdefault(method, {})
            parts = error_parts(state, states[DEFINITION.get(method, method)], exact)
            token = error_parts(state, state, wanted)["rest"]
            for key, value in (parts | {"token": token, "contrast": contrast(method, write)}).items():
                row.setdefault(key, []).append(value)
    return {"hold": hold, "writes": writes, "methods": table}


def _dc_gain(method: str, delta: Tensor, rates: Tensor) -> Tensor:
    """Steady state c/(1 - Ā) of one method over the exact -1/A, for pairs of steps and rates (P,)."""
    A_bar, c = discretize(method, delta, rates[:, None])
    return (c / (1 - A_bar))[:, 0] * -rates


def gain(sizes: Sizes) -> Results:
    """The steady state over the exact one, with |x| growing by the step (A = -1) and by the rate (Δ = 0.1)."""
    x = torch.logspace(-2, 2, 81, dtype=torch.float64)
    curves = {
        "step": {method: _dc_gain(method, x, -torch.ones_like(x)).tolist() for method in METHODS},
        "rate": {method: _dc_gain(method, torch.full_like(x, 0.1), -x / 0.1).tolist() for method in METHODS},
    }
    # The same from the scan itself: 64 steps with x = -1 reach the steady state.
    u = torch.ones(1, 1, 64, dtype=torch.float64)
    by_scan = {method: scan_states(method, u, u, -_tensor(1.0))[0, 0, -1].item() for method in METHODS}
    difference = max(abs(by_scan[m] / _dc_gain(m, _tensor(1.0), -_tensor(1.0)).item() - 1) for m in METHODS)
    points = {
        f"A = {A:g}, Δ = {step:g}": {m: _dc_gain(m, _tensor(step), _tensor(A)).item() for m in METHODS}
        for A, step in ((-1.0, 0.1), (-1.0, 1.0), (-16.0, 1 / 16), (-16.0, 0.1), (-16.0, 1.0))
    }
    fade = [(m, discretize(m, _tensor(0.01), -_tensor(1.0)[None])[1].item()) for m in METHODS]
    reference = dict(fade)["zoh_exact"]
    return {
        "minus_x": x.tolist(),
        "curves": curves,
        "points": points,
        "scan_difference": difference,
        "input_at_short_step": {method: c / reference for method, c in fade},
    }


def stability(sizes: Sizes) -> Results:
    """|Ā| on the negative real axis and on a grid of the complex plane, |Re x|, |Im x| ≤ 6."""
    from study_report import magnitudes

    x = -torch.logspace(-3, 2, 501, dtype=torch.float64)
    im = np.linspace(-6, 6, 62)[:, None]  # never on bilinear's pole, x = 2
    left = np.linspace(-6, -0.1, 60)[None]
    table = {}
    for method in METHODS:
        A_bar = discretize(method, -x[:, None], -torch.ones(1, 1, dtype=torch.float64))[0].flatten()
        at_16, at_80 = (discretize(method, _tensor(s), -torch.ones(1, 1).double())[0].item() for s in (16.0, 80.0))
        negative = x[A_bar < 0]
        table[method] = {
            "largest_real": A_bar.abs().max().item(),
            "stable_left": float((magnitudes(method, left, im) < 1).mean()),
            "stable_right": float((magnitudes(method, -left, im) < 1).mean()),
            "negative_beyond": negative.max().item() if len(negative) else None,
            "at_16": at_16,
            "at_80": at_80,
            "steps_to_percent": max(1, math.ceil(math.log(0.01) / math.log(abs(at_80)))),
        }
    return {"methods": table}


def truncation(sizes: Sizes) -> Results:
    """c of the truncated coefficients against the functions they truncate, with |x| growing by the rate at fixed Δ."""
    x = -torch.logspace(-2, math.log10(80), 2001, dtype=torch.float64)
    curves: Results = {}
    limits: Results = {}
    for step in (0.1, 0.693):
        for method, definition in DEFINITION.items():
            c, truth = (discretize(name, _tensor(step), x[None] / step)[1].flatten() for name in (method, definition))
            error = ((c - truth) / truth).abs()
            wrong_sign = -x[c * truth < 0]
            limits.setdefault(method, {})[f"{step:g}"] = {
                "percent": -x[error > 0.01][0].item(),
                "all": -x[error > 1][0].item(),
                "sign": wrong_sign.min().item() if len(wrong_sign) else None,
            }
            curves.setdefault(f"{step:g}", {})[method] = error[::20].tolist()
    anchor = {
        name: discretize(name, _tensor(0.693), _tensor(-16.0)[None])[1].item()
        for pair in DEFINITION.items()
        for name in pair
    }
    return {"minus_x": (-x[::20]).tolist(), "curves": curves, "limits": limits, "anchor": anchor}


def gradients(sizes: Sizes, length: int = 12) -> Results:
    """∂loss/∂Δ_t and ∂loss/∂A of ½ Σ (|A| h_t - target)², for A = -1, -4, -16 and steps that vary by a half.

    `difference`: autograd against five-point differences of the same scan: is the gradient that of the function?
    `delta`, `A`: autograd against the exact solution's gradient (held input, complex step), relative norms.
    """
    generator = torch.Generator().manual_seed(1)
    rates = _tensor(-1.0, -4.0, -16.0)
    shape = (1, len(rates), length)
    u = torch.randn(shape, dtype=torch.float64, generator=generator)
    target = torch.randn(shape, dtype=torch.float64, generator=generator)
    shape_of_steps = 0.75 + 0.5 * torch.rand(shape, dtype=torch.float64, generator=generator)

    def loss(states: Tensor, rates: Tensor) -> Tensor:
        """One value per copy and channel: the channels do not mix, so that all of them can be varied at once."""
        return 0.5 * (-rates[:, None] * states - target).square().sum(-1)

    def varied(delta: Tensor, by: complex) -> Tensor:
        """`length` copies of delta (1, D, L); in copy t, step t is multiplied by 1 + by."""
        return delta * (1 + by * torch.eye(length, dtype=torch.float64)[:, None])

    def differences(f: Callable[[float], Tensor], h: float = 1e-4) -> Tensor:
        return (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)

    bases = [0.01, 0.03, 0.1, 0.3, 0.7, 1.5]
    table: Results = {method: {"difference": [], "delta": [], "A": []} for method in METHODS}
    for base in bases:
        delta = base * shape_of_steps
        # Complex step: Im f(v(1 + ih)) / h is v f'(v), without cancellation. Everything is relative to v.
        h = 1e-30
        complex_rates = rates.to(torch.complex128)
        varied_rates = complex_rates * (1 + 1j * h)
        by_delta = loss(held_response(complex_rates, u.expand(length, -1, -1), varied(delta, 1j * h)), complex_rates)
        by_rate = loss(held_response(varied_rates, u, delta.to(torch.complex128)), varied_rates)
        exact_delta, exact_rate = by_delta.imag.T / h, by_rate.imag[0] / h
        for method in METHODS:
            d, a = delta.clone().requires_grad_(), rates.clone().requires_grad_()
            ones = torch.ones(len(rates), 1, dtype=torch.float64)
            states = selective_scan_ref(u, d, a[:, None], ones, ones, discretization_method=method)
            grad_delta, grad_rate = torch.autograd.grad(loss(states, a).sum(), (d, a))
            own_delta, own_rate = (grad_delta * delta)[0], grad_rate * rates

            def vary_delta(by: float, method: str = method, delta: Tensor = delta) -> Tensor:
                steps = varied(delta, by)
                return loss(scan_states(method, u.expand_as(steps), steps, rates), rates)

            def vary_rates(by: float, method: str = method, delta: Tensor = delta) -> Tensor:
                return loss(scan_states(method, u, delta, rates * (1 + by)), rates * (1 + by))

            numeric_delta, numeric_rate = differences(vary_delta).T, differences(vary_rates)[0]
            table[method]["difference"].append(
                max(_distance(own_delta, numeric_delta), _distance(own_rate, numeric_rate))
            )
            table[method]["delta"].append(_distance(own_delta, exact_delta))
            table[method]["A"].append(_distance(own_rate, exact_rate))
    return {"rates": rates.tolist(), "steps": bases, "methods": table}


def _distance(value: Tensor, truth: Tensor) -> float:
    return ((value - truth).norm() / truth.norm()).item()


PARTS: dict[str, Callable[[Sizes], Results]] = {
    "bank": bank,
    "exponentials": exponentials,
    "copy": copy,
    "image": image,
    "gain": gain,
    "stability": stability,
    "truncation": truncation,
    "gradients": gradients,
}


# ---- Command line --------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="study.py --task ops",
        description="Compare the discretization methods on problems with known answers; nothing is trained.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, default=Path("output/ops"), help="folder to write (default output/ops)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default all)")
    parser.add_argument("--small", action="store_true", help="fewer steps and smaller images: seconds")
    args = parser.parse_args(argv)
    args.parts = [part for part in PARTS if part in args.parts]
    return args


def measure(parts: Sequence[str], sizes: Sizes, report: Callable[[str], None] = lambda part: None) -> Results:
    """{part: its results}; calls `report` with the name of each part before it starts. One thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results = {}
        for part in parts:
            report(part)
            results[part] = PARTS[part](sizes)
        return results
    finally:
        torch.set_num_threads(threads)


def main(argv: Sequence[str]) -> int:
    """The command line without `--task ops`. Returns the exit status."""
    args = parse(argv)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"study: --output {args.output}: {error.strerror}; give a folder that can be written", file=sys.stderr)
        return 2
    if not os.access(args.output, os.W_OK):
        print(f"study: --output {args.output}: not writable; give a folder that can be written", file=sys.stderr)
        return 2
    import study_ops_report

    console = Console(highlight=False)
    with console.status("") as status:
        parts = measure(args.parts, SMALL if args.small else FULL, lambda part: status.update(f"measuring: {part}"))
    results = {
        "command": shlex.join(["python", "scripts/study.py", "--task", "ops", *argv]),
        "small": args.small,
        "environment": environment(),
        "parts": parts,
    }
    conclusions = study_ops_report.conclusions(results)
    results["conclusions"] = [conclusion.as_dict() for conclusion in conclusions]
    (args.output / "ops.json").write_text(json.dumps(results, indent=1, allow_nan=False), encoding="utf-8")
    study_ops_report.write(results, conclusions, args.output)
    study_ops_report.print_tables(results, console)
    failed = [conclusion for conclusion in conclusions if not conclusion.holds]
    for conclusion in failed:
        console.print(f"does not hold in this run: {conclusion.claim} ({conclusion.figure})", style="red", markup=False)
    console.print(f"Page: {args.output / 'ops.html'}", soft_wrap=True)
    return 1 if failed else 0
