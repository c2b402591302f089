"""Conclusions, tables, plots and the page of `scripts/study.py --task ops`, made from the results of study_ops.py."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
from rich import box
from rich.console import Console
from rich.table import Table
from study_ops import DEFINITION, expected_order, order_agrees
from study_report import STYLE, environment_rows, html_table, line_style, plot_stability, point_style

from mamba_ssm.ops.discretization_ref import METHODS

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Results = dict[str, Any]

CONVERGENT = [name for name, row in METHODS.items() if row.held_order is not None]
# All with Ā = eˣ, given by the functions themselves: they differ in c only, and none of it is truncation.
_EXPONENTIAL = [name for name in METHODS if name != "bilinear" and name not in DEFINITION]

# Where the parts of the error are compared: steps that are in the small run as well.
_STEP, _SIDE, _WRITE = 0.25, 32, 4.0


# ---- Conclusions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conclusion:
    """One sentence to cite. cause: 'discretization', 'sampling', 'gain', 'truncation' or 'gradients'.

    figure: the numbers of this run it rests on; holds: whether they bear it out; command: what measures them.
    """

    cause: str
    claim: str
    figure: str
    holds: bool
    command: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


_Found = Iterator[tuple[str, str, str, bool]]  # cause, claim, figure, holds


def _order(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.2f}"


def _orders(rows: Results) -> str:
    return ", ".join(f"{method} {_order(row['order'])}" for method, row in rows.items())


def _from_bank(part: Results) -> _Found:
    held, smooth, steps = part["inputs"]["held"], part["inputs"]["smooth"], part["steps"]
    i = steps.index(_STEP)
    yield (
        "discretization",
        "For an input that is constant over each step the observed orders of accuracy are those of theory: zoh_exact "
        "exact, rk4 4, bilinear 2, zoh, poly and highorder 1 (also truncated); the foh rows do not converge.",
        f"observed: {_orders(held)}",
        all(order_agrees(row["order"], expected_order(method, held=True)) for method, row in held.items()),
    )
    yield (
        "sampling",
        "For a smooth input sampled once per step every convergent method is of order 1, rk4 and bilinear included: "
        "a name that promises a higher order does not deliver it there, because only u_t enters a step.",
        f"observed: {_orders(smooth)}",
        all(order_agrees(row["order"], expected_order(method, held=False)) for method, row in smooth.items()),
    )
    ratio = smooth["rk4"]["error"][-1] / smooth["zoh_exact"]["error"][-1]
    yield (
        "sampling",
        "On the smooth input at the shortest step rk4 and zoh_exact have the same error: the rule that is of order 4 "
        "for a held input gains nothing, the sampling of the input decides.",
        f"rk4's error over zoh_exact's at Δ = {steps[-1]:g}: {ratio:.4f}",
        abs(ratio - 1) < 0.01,
    )
    rest = [smooth[m]["rest"] for m in _EXPONENTIAL]
    given = [smooth[m]["error"][i] for m in _EXPONENTIAL]
    spread = max(abs(a / b - 1) for row in rest for a, b in zip(row, smooth["zoh_exact"]["rest"], strict=True))
    yield (
        "gain",
        "At a constant step all methods with Ā = eˣ are one method up to a constant factor per state, which a learned "
        "B or C takes up: with the best factor their errors coincide.",
        f"largest relative difference between the errors of {', '.join(_EXPONENTIAL)} over all steps after the fit: "
        f"{spread:.1e}; before it, at Δ = {_STEP:g}, the errors reach from {min(given):.2g} to {max(given):.2g}",
        spread < 1e-6,
    )
    yield (
        "gain",
        "That foh does not converge is a matter of its gain alone: with the best constant factor its error for a held "
        "input is rounding.",
        f"at Δ = {steps[-1]:g} error {held['foh']['error'][-1]:.3f} as given, {held['foh']['rest'][-1]:.1e} after the "
        "fit",
        held["foh"]["error"][-1] > 0.9 and max(held["foh"]["rest"]) < 1e-10,
    )
    worst = {m: held[m]["truncation"][i] for m in DEFINITION}
    yield (
        "truncation",
        f"At Δ = {_STEP:g}, with rates up to {-min(part['rates']):g}, truncation makes rk4's error larger than the "
        "whole solution, though it is the method of the highest order: an order speaks of short steps only.",
        f"held input, error relative to the solution: rk4 {held['rk4']['error'][i]:.2f}, bilinear "
        f"{held['bilinear']['error'][i]:.2g}, zoh_exact {held['zoh_exact']['error'][i]:.0e}; what truncation adds: "
        + ", ".join(f"{m} {value:.2g}" for m, value in worst.items()),
        held["rk4"]["error"][i] > 1 > held["bilinear"]["error"][i],
    )


def _from_exponentials(part: Results) -> _Found:
    rows = part["inputs"]["smooth"]
    rest = {m: rows[m]["rest"][-1] for m in _EXPONENTIAL}
    error = {m: rows[m]["error"][-1] for m in _EXPONENTIAL if m in CONVERGENT}
    spread = max(rest.values()) / min(rest.values())
    yield (
        "gain",
        "A kernel that is a sum of exponentials comes out equally well by every method with Ā = eˣ once the read-out C "
        "is adapted, foh included, although as given their errors differ several times.",
        f"at Δ = {part['steps'][-1]:g}, largest error over smallest: {max(error.values()) / min(error.values()):.2f} "
        f"as given (without foh, whose error is {rows['foh']['error'][-1]:.3f}), {spread:.6f} after the fit",
        spread < 1 + 1e-6 and max(error.values()) > 2 * min(error.values()),
    )


def _from_copy(part: Results) -> _Found:
    rows, i = part["methods"], part["writes"].index(_WRITE)
    contrast = {m: rows[m]["contrast"][i] for m in _EXPONENTIAL}
    rest = {m: rows[m]["rest"][i] for m in _EXPONENTIAL}
    others = [m for m in _EXPONENTIAL if m != "zoh_exact"]
    yield (
        "gain",
        "Where Δ varies from token to token the gains differ in shape, not only in size, and no constant makes the "
        "methods equal: c(Δ) is part of the selection. Here a difference between methods is real, but it is one of "
        "the input gate, not of accuracy in time.",
        f"selective copy, writing steps about {_WRITE:g}: error left after the best factor "
        + ", ".join(f"{m} {rest[m]:.2g}" for m in others),
        min(rest[m] for m in others) > 0.01 and rest["zoh_exact"] < 1e-10,
    )
    yield (
        "gain",
        f"foh is the sharpest gate: its c falls as Δ², so a holding step (Δ = {part['hold']:g}) takes in far less of "
        "its token than with any other method that is not truncated.",
        f"c of a writing step (Δ = {_WRITE:g}) over c of a holding one: "
        + ", ".join(f"{m} {value:,.0f}" for m, value in contrast.items()),
        contrast["foh"] > 10 * max(value for m, value in contrast.items() if m != "foh"),
    )
    token = {m: rows[m]["token"][i] for m in METHODS}
    best = min(token, key=lambda m: token[m])
    yield (
        "gain",
        "That sharpness does not make foh the best copier where writing steps vary: its gain grows with Δ where the "
        "exact one saturates, and so tokens are weighted by their steps.",
        f"distance of the kept values from the tokens after the best factor: "
        f"{', '.join(f'{m} {token[m]:.2f}' for m in METHODS)}; smallest: {best}",
        token["foh"] > token["zoh_exact"],
    )


def _from_image(part: Results) -> _Found:
    end, centre = part["inputs"]["end"], part["inputs"]["centre"]
    n = round(1 / part["steps"][-1])
    second = ("bilinear", "rk4", "zoh_exact")
    yield (
        "sampling",
        "If u_t is the image at a pixel's centre instead of its end, three rules become second order without "
        "any change: zoh_exact, bilinear and rk4. The gains of zoh, poly and highorder keep those at order 1.",
        f"observed: {_orders(centre)}; sampled at the end: {_orders(end)}",
        all(order_agrees(centre[m]["order"], 2 if m in second else 1) for m in CONVERGENT)
        and all(order_agrees(end[m]["order"], expected_order(m, held=False)) for m in METHODS),
    )
    place = end["zoh_exact"]["error"][-1] / centre["zoh_exact"]["error"][-1]
    errors = [end[m]["error"][-1] for m in CONVERGENT]
    yield (
        "sampling",
        "On a smooth image the place of the sample in its step matters more than the choice among the convergent "
        "methods.",
        f"{n} x {n} pixels: zoh_exact's error falls {place:.0f} times from end to centre; at the end, the largest "
        f"error of a convergent method is {max(errors) / min(errors):.1f} times the smallest",
        place > 10 * max(errors) / min(errors),
    )


def _from_gain(part: Results) -> _Found:
    points = part["points"]
    far, unit_a, unit_b = points["A = -16, Δ = 1"], points["A = -1, Δ = 1"], points["A = -16, Δ = 0.0625"]
    yield (
        "gain",
        "zoh's steady state under a constant input grows as |x| (its c is Δ whatever A is); zoh_exact and bilinear "
        "have the exact one at every x.",
        f"over the exact -1/A at x = -16: zoh {far['zoh']:.4g}, zoh_exact {far['zoh_exact']:.6f}, bilinear "
        f"{far['bilinear']:.6f} (A = -16, Δ = 1); the scan itself agrees with c/(1 - Ā) to "
        f"{part['scan_difference']:.0e}",
        abs(far["zoh"] / 16 - 1) < 1e-3
        and all(abs(far[m] - 1) < 1e-9 for m in ("zoh_exact", "bilinear"))
        and part["scan_difference"] < 1e-10,
    )
    mixed = ("foh", "poly", "highorder")
    yield (
        "gain",
        "The gains of foh, poly and highorder depend on the unit of time: the same x = -1 gives another one when A is "
        "16 times larger and Δ 16 times shorter. Those of zoh, bilinear, rk4 and zoh_exact depend on x alone.",
        "A = -1, Δ = 1 against A = -16, Δ = 1/16: "
        + ", ".join(f"{m} {unit_a[m]:.3f} and {unit_b[m]:.3f}" for m in (*mixed, "zoh", "rk4")),
        all(abs(unit_a[m] / unit_b[m] - 1) > 0.1 for m in mixed)
        and all(abs(unit_a[m] / unit_b[m] - 1) < 1e-9 for m in ("zoh", "bilinear", "rk4", "zoh_exact")),
    )
    short = part["input_at_short_step"]
    yield (
        "gain",
        "With short steps foh lets almost nothing in: its input fades as Δ/2. Where it trains, it does so with longer "
        "steps or larger weights, and a comparison at equal initial Δ compares gains.",
        f"c over zoh_exact's at Δ = 0.01, A = -1: foh {short['foh']:.5f} (1/{1 / short['foh']:.0f}), zoh "
        f"{short['zoh']:.5f}",
        short["foh"] < 0.01,
    )


def _from_stability(part: Results) -> _Found:
    rows = part["methods"]
    yield (
        "discretization",
        "No method makes the recurrence unstable: |Ā| < 1 for every real x < 0 and in the whole left half-plane. "
        "Stability is no ground to prefer any of them.",
        f"largest |Ā| over x from -100 to -0.001: {max(row['largest_real'] for row in rows.values()):.6f}; share of "
        f"the left half-plane (to |Re x|, |Im x| = 6) with |Ā| < 1: "
        f"{min(row['stable_left'] for row in rows.values()):.0%} at least, of the right one "
        f"{max(row['stable_right'] for row in rows.values()):.0%} at most",
        all(row["largest_real"] < 1 and row["stable_left"] == 1 and row["stable_right"] == 0 for row in rows.values()),
    )
    bilinear, exact = rows["bilinear"], rows["zoh_exact"]
    yield (
        "discretization",
        "bilinear alone has another state factor, and only in it can a method differ beyond its input gain at a "
        "constant step: beyond x = -2 its states alternate in sign, and far out they hardly fade, where eˣ forgets at "
        "once.",
        f"Ā at x = -80: bilinear {bilinear['at_80']:.3f}, the others {exact['at_80']:.0e}; steps until 1 % is left: "
        f"{bilinear['steps_to_percent']} and {exact['steps_to_percent']}",
        bilinear["at_80"] < -0.9
        and all(row["negative_beyond"] is None for name, row in rows.items() if name != "bilinear"),
    )


def _from_truncation(part: Results) -> _Found:
    limits, anchor = part["limits"], part["anchor"]
    percent = [limit["percent"] for by_step in limits.values() for limit in by_step.values()]
    signs = [limit["sign"] for by_step in limits.values() for limit in by_step.values()]
    yield (
        "truncation",
        "The truncated coefficients hold for |x| below about 1 only, and soon after they have the wrong sign: the "
        "input enters inverted, and grows with a power of |x|.",
        f"1 % off from |x| = {min(percent):.2f} to {max(percent):.2f} on, wrong sign from {min(signs):.2f} to "
        f"{max(signs):.2f} on (rk4 against zoh_exact, the _taylor rows against their definitions)",
        all(0.5 < value < 2 for value in percent) and all(value < 5 for value in signs),
    )
    pairs = [(m, d) for m, d in DEFINITION.items()]
    yield (
        "truncation",
        "At the step a network starts from when a bias of its step is 0 (softplus(0) = 0.693), the fastest of 16 "
        "states (A = -16) has its input multiplied by coefficients of the wrong sign and about a hundred times too "
        "large or more. A result obtained there is one about the truncation.",
        "c truncated and by definition: " + ", ".join(f"{m} {anchor[m]:.1f} and {anchor[d]:.3f}" for m, d in pairs),
        all(anchor[m] < 0 < anchor[d] and abs(anchor[m]) > 50 * anchor[d] for m, d in pairs),
    )


def _from_gradients(part: Results) -> _Found:
    rows, steps = part["methods"], part["steps"]
    worst = max(max(row["difference"]) for row in rows.values())
    yield (
        "gradients",
        "Every method's gradient is that of its own equations: a difference in training is not due to wrong "
        "derivatives here.",
        f"autograd against five-point differences, largest relative difference over methods and steps: {worst:.0e}",
        worst < 1e-6,
    )
    i = steps.index(0.7)
    yield (
        "gradients",
        "Against the exact solution's gradient the truncated coefficients are off by factors where their values are "
        "off by factors: clipping, learning rate and warm-up then act on truncation, not on the method.",
        f"relative error of ∂loss/∂A at Δ about {steps[i]:g} with A = -1, -4, -16: "
        + ", ".join(f"{m} {row['A'][i]:.2g}" for m, row in rows.items()),
        all(rows[m]["A"][i] > 100 * rows[DEFINITION[m]]["A"][i] for m in DEFINITION),
    )
    yield (
        "gradients",
        "zoh_exact's gradient is the exact one for a held input; zoh's departs from it with |x| by its gain.",
        f"relative error of ∂loss/∂Δ at Δ about {steps[0]:g} and {steps[i]:g}: zoh {rows['zoh']['delta'][0]:.2g} and "
        f"{rows['zoh']['delta'][i]:.3g}, zoh_exact at most {max(rows['zoh_exact']['delta']):.0e}",
        max(rows["zoh_exact"]["delta"]) < 1e-10 and rows["zoh"]["delta"][i] > rows["zoh"]["delta"][0],
    )


_CONCLUSIONS: dict[str, Callable[[Results], _Found]] = {
    "bank": _from_bank,
    "exponentials": _from_exponentials,
    "copy": _from_copy,
    "image": _from_image,
    "gain": _from_gain,
    "stability": _from_stability,
    "truncation": _from_truncation,
    "gradients": _from_gradients,
}


def conclusions(results: Results) -> list[Conclusion]:
    """Those of the parts that were measured, in the order of the parts."""
    small = " --small" if results["small"] else ""
    return [
        Conclusion(*found, command=f"python scripts/study.py --task ops --parts {part}{small}")
        for part, values in results["parts"].items()
        for found in _CONCLUSIONS[part](values)
    ]


# ---- Tables --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sheet:
    """A table of text: the same in the terminal, in ops.txt and on the page."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}" if abs(value) < 1e4 else f"{value:.1e}"


def _order_sheet(parts: Results) -> Sheet:
    measured = [(part, name) for part in ("bank", "exponentials", "image") if part in parts
                for name in parts[part]["inputs"]]  # fmt: skip
    rows = [
        (method, *(_order(parts[part]["inputs"][name][method]["order"]) for part, name in measured))
        for method in METHODS
    ]
    return Sheet("Observed order of accuracy", ("method", *(f"{part}, {name}" for part, name in measured)), rows)


def _parts_sheet(title: str, rows: Results, i: int) -> Sheet:
    keys = ("error", "truncation", "gain", "rest")
    body = [(method, *(_number(row[key][i]) for key in keys)) for method, row in rows.items()]
    return Sheet(title, ("method", "error", "truncation", "input gain", "rest"), body)


def sheets(results: Results) -> list[Sheet]:
    """All tables of the parts that were measured."""
    parts, found = results["parts"], []
    if parts.keys() & {"bank", "exponentials", "image"}:
        found.append(_order_sheet(parts))
    if bank := parts.get("bank"):
        i = bank["steps"].index(_STEP)
        for name in bank["inputs"]:
            found.append(_parts_sheet(f"Relaxations, {name} input, Δ = {_STEP:g}: parts of the error",
                                      bank["inputs"][name], i))  # fmt: skip
    if exponentials := parts.get("exponentials"):
        i = exponentials["steps"].index(_STEP)
        title = f"Sum of exponentials, Δ = {_STEP:g}: parts of the error"
        found.append(_parts_sheet(title, exponentials["inputs"]["smooth"], i))
    if copied := parts.get("copy"):
        i = copied["writes"].index(_WRITE)
        found.append(_parts_sheet(f"Selective copy, writing steps about {_WRITE:g}: parts of the error",
                                  copied["methods"], i))  # fmt: skip
        body = [(m, _number(row["token"][i]), f"{row['contrast'][i]:,.0f}") for m, row in copied["methods"].items()]
        columns = ("method", "distance from the tokens", "c(write) / c(hold)")
        found.append(Sheet(f"Selective copy, writing steps about {_WRITE:g}: the tokens", columns, body))
    if image := parts.get("image"):
        i = image["steps"].index(1 / _SIDE)
        for name in image["inputs"]:
            title = f"Image of {_SIDE} x {_SIDE}, sampled at a pixel's {name}: parts of the error"
            found.append(_parts_sheet(title, image["inputs"][name], i))
    if gain := parts.get("gain"):
        body = [(m, *(_number(values[m]) for values in gain["points"].values())) for m in METHODS]
        found.append(Sheet("Steady state over the exact -1/A", ("method", *gain["points"]), body))
    if stability := parts.get("stability"):
        keys = ("largest_real", "stable_left", "negative_beyond", "at_16", "at_80", "steps_to_percent")
        columns = ("method", "largest |Ā|, x < 0", "stable, Re x < 0", "Ā < 0 beyond", "Ā(-16)", "Ā(-80)",
                   "steps to 1 % at x = -80")  # fmt: skip
        forms = ("{:.4f}", "{:.0%}", "{:.2f}", "{:.2g}", "{:.2g}", "{:d}")
        body = [
            (m, *("–" if row[k] is None else form.format(row[k]) for k, form in zip(keys, forms, strict=True)))
            for m, row in stability["methods"].items()
        ]
        found.append(Sheet("Stability", columns, body))
    if truncation := parts.get("truncation"):
        body = [
            (m, DEFINITION[m], step, *(f"{limit[key]:.2f}" for key in ("percent", "all", "sign")))
            for m, by_step in truncation["limits"].items()
            for step, limit in by_step.items()
        ]
        columns = ("method", "stands for", "Δ", "1 % off from |x|", "100 % off from", "wrong sign from")
        found.append(Sheet("Where truncation ends to be harmless", columns, body))
    if gradients := parts.get("gradients"):
        for key, name in (("delta", "∂loss/∂Δ"), ("A", "∂loss/∂A")):
            body = [(m, *(_number(v) for v in row[key])) for m, row in gradients["methods"].items()]
            title = f"{name} against the exact solution's, relative error (columns: Δ)"
            found.append(Sheet(title, ("method", *(f"{step:g}" for step in gradients["steps"])), body))
        body = [(m, f"{max(row['difference']):.0e}") for m, row in gradients["methods"].items()]
        found.append(Sheet("Autograd against finite differences", ("method", "largest relative difference"), body))
    return found


def print_tables(results: Results, console: Console) -> None:
    for sheet in sheets(results):
        table = Table(
            title=sheet.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
        )
        for i, name in enumerate(sheet.columns):
            table.add_column(name, justify="right" if i else "left", no_wrap=not i)
        for row in sheet.rows:
            table.add_row(*row)
        console.print(table)


# ---- Plots ---------------------------------------------------------------------------------------------------------


def _curves(axes: Axes, x: Sequence[float], values: dict[str, Sequence[float]], marked: bool = False) -> None:
    """One line per method. Markers shrink from method to method, so that lines that coincide can all be seen."""
    for i, (method, y) in enumerate(values.items()):
        style = line_style(method)
        if marked:
            # Hollow, one inside the other.
            marker = point_style(method)["marker"]
            style |= {"marker": marker, "ms": 13 - i, "mfc": "none"}
        axes.plot(x, y, label=method, **style)
    axes.grid(alpha=0.3)


def _panels(titles: Sequence[str], width: float = 5.6) -> tuple[Figure, list[Axes]]:
    figure, panels = plt.subplots(
        1, len(titles), figsize=(width * len(titles) + 1.6, 4.8), layout="constrained", squeeze=False
    )
    for axes, title in zip(panels[0], titles, strict=True):
        axes.set_title(title, fontsize=11)
    return figure, list(panels[0])


def _legend(figure: Figure) -> Figure:
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def _visible(values: Sequence[float]) -> list[float]:
    """Errors on a logarithmic scale: rounding is drawn at the floor, or its zeros would vanish."""
    return [max(value, 1e-12) for value in values]


# The method whose errors a guide of that slope is drawn below.
_GUIDED = {1: "poly", 2: "bilinear", 4: "rk4"}


def _plot_convergence(part: Results, panels: Sequence[tuple[str, str, str, tuple[int, ...]]]) -> Figure:
    """Error against Δ; panels: (title, input, key, slopes of the dotted guides)."""
    steps = part["steps"]
    figure, axes_list = _panels([title for title, *_ in panels])
    for axes, (_, name, key, slopes) in zip(axes_list, panels, strict=True):
        rows = part["inputs"][name]
        _curves(axes, steps, {m: _visible(row[key]) for m, row in rows.items()}, marked=True)
        for slope in slopes:
            guide = [0.3 * rows[_GUIDED[slope]][key][-1] * (step / steps[-1]) ** slope for step in steps]
            axes.plot(steps, guide, color="0.5", linestyle=":", lw=1.2)
            axes.annotate(
                f"slope {slope}", (steps[-1], guide[-1]), xytext=(8, -8), textcoords="offset points", color="0.3",
                fontsize=8,
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="Δ", ylabel="relative error")
        ticks = steps[:: 1 if len(steps) < 5 else 2]
        axes.set_xticks(ticks, ["1" if step == 1 else f"1/{round(1 / step)}" for step in ticks])
        axes.minorticks_off()
    return _legend(figure)


def _plot_bank(part: Results) -> Figure:
    figure = _plot_convergence(
        part,
        [
            ("held input", "held", "error", (1, 2, 4)),
            ("smooth input", "smooth", "error", (1,)),
            ("smooth input, best constant gain", "smooth", "rest", (1,)),
        ],
    )
    held, *smooth = figure.axes
    held.set_ylim(3e-13, 3e3)
    for axes in smooth:
        axes.set_ylim(3e-4, 3e3)
    return figure


def _plot_exponentials(part: Results) -> Figure:
    panels = [("as given", "smooth", "error", (1,)), ("with the read-out C adapted", "smooth", "rest", (1,))]
    figure = _plot_convergence(part, panels)
    for axes in figure.axes:
        axes.set_ylim(3e-5, 3)
    return figure


def _plot_image(part: Results) -> Figure:
    figure = _plot_convergence(
        part,
        [
            ("sampled at a pixel's end", "end", "error", (1,)),
            ("sampled at its centre", "centre", "error", (1, 2)),
            ("at its centre, best constant gain", "centre", "rest", (2,)),
        ],
    )
    for axes in figure.axes:
        axes.set_ylim(3e-6, 3)
    return figure


def _plot_copy(part: Results) -> Figure:
    titles = ("error against the exact states", "the same, best constant gain", "distance from the tokens")
    figure, panels = _panels(titles)
    for axes, key in zip(panels, ("error", "rest", "token"), strict=True):
        values = {m: row[key] for m, row in part["methods"].items()}
        if key == "rest":
            # zoh_exact is exact here; the truncated rows have their definition's, which is drawn.
            values = {m: v for m, v in values.items() if m not in DEFINITION and m != "zoh_exact"}
        _curves(axes, part["writes"], {m: _visible(v) for m, v in values.items()}, marked=True)
        axes.set(xscale="log", xlabel="writing step", ylabel="relative error", yscale="log")
        axes.set_xticks(part["writes"], [f"{w:g}" for w in part["writes"]])
        axes.minorticks_off()
    panels[0].set_ylim(1e-5, 1e3)
    panels[2].set(yscale="linear", ylim=(0, 1))
    return _legend(figure)


def _plot_gain(part: Results) -> Figure:
    figure, panels = _panels(("|x| grows by the step, A = -1", "|x| grows by the rate, Δ = 0.1"))
    for axes, key in zip(panels, ("step", "rate"), strict=True):
        _curves(axes, part["minus_x"], part["curves"][key])
        axes.axhline(1, color="0.4", lw=0.8)
        axes.set(xscale="log", xlabel="-x", ylabel="steady state over the exact one", xlim=(1e-2, 1e2))
        axes.set_yscale("symlog", linthresh=2, linscale=2)
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.set_ylim(-1e3, 1e3)
    return _legend(figure)


def _plot_truncation(part: Results) -> Figure:
    figure, panels = _panels([f"Δ = {step}" for step in part["curves"]])
    for axes, values in zip(panels, part["curves"].values(), strict=True):
        _curves(axes, part["minus_x"], {m: _visible(v) for m, v in values.items()})
        axes.axhline(0.01, color="0.4", lw=0.8)
        axes.annotate("1 %", (1.1e-2, 0.012), color="0.3", fontsize=8)
        axes.set(xscale="log", yscale="log", xlabel="-x", ylabel="relative error of c")
    return _legend(figure)


def _plot_gradients(part: Results) -> Figure:
    figure, panels = _panels(("∂loss/∂Δ", "∂loss/∂A"))
    for axes, key in zip(panels, ("delta", "A"), strict=True):
        values = {m: _visible(row[key]) for m, row in part["methods"].items() if m != "zoh_exact"}
        _curves(axes, part["steps"], values, marked=True)
        axes.set(xscale="log", yscale="log", xlabel="Δ, on average", ylabel="relative error against the exact gradient")
        axes.set_xticks(part["steps"], [f"{step:g}" for step in part["steps"]])
        axes.minorticks_off()
    return _legend(figure)


PLOTS: dict[str, tuple[Callable[[Results], Figure], str]] = {
    "bank": (
        _plot_bank,
        "Relaxations with A from -1/4 to -16: error relative to the exact solution against Δ; what is below 1e-12 is "
        "drawn there. Left: constant input over each step. Middle: smooth input, sampled at a step's end. Right: the "
        "same after the best constant factor per state, truncated rows by their definitions; all methods but bilinear "
        "coincide. Hollow marks lie inside each other where curves coincide.",
    ),
    "exponentials": (
        _plot_exponentials,
        "A sum of exponentials as kernel, applied to a sum of exponentials. Right: with the read-out C adapted.",
    ),
    "copy": (
        _plot_copy,
        "Selective copy: last states against the writing step. Left: against the exact states (zoh_exact is exact, "
        "below the axis). Middle: after the best constant factor, without the truncated rows. Right: distance from "
        "the tokens to be kept, relative to them, after the best factor.",
    ),
    "image": (
        _plot_image,
        "A smooth n x n image scanned row by row, Δ = 1/n. Where in its step the input is sampled decides the order.",
    ),
    "gain": (
        _plot_gain,
        "Steady state under a constant input, relative to the exact -1/A. The scale is linear between -2 and 2, "
        "logarithmic outside; curves that leave it go on. zoh_exact and bilinear lie on 1.",
    ),
    "stability": (
        lambda part: plot_stability(),
        "Where |Ā(x)| < 1 (shaded; the thick line is |Ā| = 1), x = ΔA complex; one panel for each Ā that occurs.",
    ),
    "truncation": (
        _plot_truncation,
        "Truncated coefficients against the functions they truncate, with |x| growing by the rate at a fixed step.",
    ),
    "gradients": (
        _plot_gradients,
        "Gradient of a loss on the states against that of the exact solution's loss, for A = -1, -4, -16 and a held "
        "input. zoh_exact's is exact to rounding and not drawn.",
    ),
}


# ---- Page ----------------------------------------------------------------------------------------------------------

_CAUSES = {
    "discretization": "What is due to the discretization itself: the state factor and the order",
    "sampling": "What is due to the sampling of the input, whatever the method",
    "gain": "What is due to the input gain",
    "truncation": "What is due to the truncation",
    "gradients": "Gradients",
}

_MEANING = """
<p>Before a difference between two methods is put down to a better discretization, three other causes have to be ruled
out, each of which is measured below; the figures are those of this run.</p>
<ol>
<li><strong>Discretization.</strong> All methods but <code>bilinear</code> share the state factor Ā = eˣ, which is
exact. Among them there is no better or worse integration of the state; they differ in one factor of the input, c. How
exact c is shows only where the input is constant over each step, or sampled at its centre, and where steps are
short.</li>
<li><strong>Input gain.</strong> At a constant Δ a different c is a constant factor per state, which a learned B or C
takes up. A claim needs runs in which the gain was equalized (initial Δ, scale of B, learning rate), or a method that
differs by its gain only as a control. Where Δ varies, c(Δ) is a gate of its own; a better gate is a possible result,
but not one about accuracy in time.</li>
<li><strong>Truncation.</strong> Results with truncated coefficients are results about polynomials outside their range
as soon as steps reach |x| of about 1. They carry over to the methods named only where Δ|A| stayed below that. At a
constant Δ truncation, too, is a factor per state; but it grows with a power of |x| and changes sign, so that with a
varying Δ no B or C follows it.</li>
</ol>
<p>None of this says which method trains best: it says what a comparison has to exclude before it may say so.</p>
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Discretizations on problems with known answers</title>
<style>
{style}.figure {{ color: #333; font-size: .9rem; }}
.fails {{ color: #b00; font-weight: bold; }}
</style>
</head>
<body>
<h1>Discretizations on problems with known answers</h1>
<p>Ten discretizations of h' = A h + u, A &lt; 0, by the library's reference in float64; nothing is trained. All errors
are relative to the exact solution. x = ΔA.</p>
<h2>What it means for a claim that one method is better</h2>
{meaning}
<h2>Conclusions</h2>
{conclusions}
<h2>Tables</h2>
<p>Parts of the error: <em>truncation</em> is what the truncated coefficients add to their definitions (rk4: to
zoh_exact, whose c it truncates); <em>input gain</em> is what the best constant factor per state would remove;
<em>rest</em> is what remains: state factor, sampling, and the shape of c(Δ) where Δ varies. The parts are norms, so
they do not add up to the error exactly.</p>
{tables}
<h2>Plots</h2>
{plots}
<h2>How it was made</h2>
<pre>{command}</pre>
{environment}
<p>All figures are in <code>ops.json</code> beside this file, in full precision.</p>
</body>
</html>
"""


def _conclusion(conclusion: Conclusion) -> str:
    warning = "" if conclusion.holds else '<span class="fails">Does not hold in this run.</span> '
    return (
        f"<li>{warning}{html.escape(conclusion.claim)}<br>"
        f'<span class="figure">{html.escape(conclusion.figure)}.</span><br>'
        f"<code>{html.escape(conclusion.command)}</code></li>"
    )


def page(results: Results, found: Sequence[Conclusion], plots: dict[str, bytes]) -> str:
    """One self-contained page: the meaning, the conclusions by cause, tables, plots (embedded), and how it was made."""
    by_cause = "".join(
        f"<h3>{heading}</h3><ul>{''.join(_conclusion(c) for c in found if c.cause == cause)}</ul>"
        for cause, heading in _CAUSES.items()
        if any(c.cause == cause for c in found)
    )
    tables = "".join(f"<h3>{html.escape(s.title)}</h3>{html_table(s.columns, s.rows)}" for s in sheets(results))
    figures = ""
    for part, data in plots.items():
        caption = html.escape(PLOTS[part][1])
        source = base64.b64encode(data).decode()
        figures += f'<figure><img alt="{caption}" src="data:image/png;base64,{source}">'
        figures += f"<figcaption>{caption}</figcaption></figure>"
    return _PAGE.format(
        style=STYLE,
        meaning=_MEANING,
        conclusions=by_cause,
        tables=tables,
        plots=figures,
        command=html.escape(results["command"]),
        environment=html_table(("", ""), environment_rows(results["environment"])),
    )


def write(results: Results, found: Sequence[Conclusion], output: Path) -> None:
    """ops.txt, ops_PART.png and ops.html, into `output`."""
    plots = {}
    for part, values in results["parts"].items():
        figure = PLOTS[part][0](values)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        plt.close(figure)
        plots[part] = buffer.getvalue()
        (output / f"ops_{part}.png").write_bytes(plots[part])
    with (output / "ops.txt").open("w", encoding="utf-8") as file:
        print_tables(results, Console(file=file, width=140))
    (output / "ops.html").write_text(page(results, found, plots), encoding="utf-8")
