"""Tables, plots and the HTML report of scripts/study.py; `write` makes them from one dictionary, results.json."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from mamba_ssm.ops.discretization_ref import METHODS, discretize

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

Results = dict[str, Any]

# One colour and marker per method, the same in every plot; a truncated method is its full one, dashed and hollow.
_COLOURS = (
    "#000000",
    "#d55e00",
    "#0072b2",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#8c564b",
    "#7f7f7f",
    "#bcbd22",
)
_MARKERS = "osD^vPX*<>"


def _colour_and_marker(method: str) -> tuple[str, str]:
    full = [name for name in METHODS if not name.endswith("_taylor")]
    i = full.index(method.removesuffix("_taylor"))
    return _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]


def line_style(method: str) -> dict[str, Any]:
    return {"color": _colour_and_marker(method)[0], "linestyle": "--" if method.endswith("_taylor") else "-", "lw": 1.6}


def point_style(method: str) -> dict[str, Any]:
    colour, marker = _colour_and_marker(method)
    fill = "white" if method.endswith("_taylor") else colour
    return {"color": colour, "marker": marker, "markerfacecolor": fill, "linestyle": "none", "capsize": 4, "ms": 7}


# ---- Words ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Words:
    """How a task's figures are called. `more`: further columns, title and key of a method's row."""

    metric: str
    short: str
    unit: str
    images: str
    trainer: str
    caveats: tuple[str, ...]
    more: tuple[tuple[str, str], ...] = ()


_DENSE_CAVEATS = (
    "The scenes are small and made of one kind of object, and the training is short: an order of methods seen here "
    "need not hold on ADE20K or COCO, and none is claimed. What the runs do show is that each method trains through "
    "the whole pipeline, with its own gradient, and what it costs.",
    "The model and its learning rate were chosen once, for all methods, by <code>zoh</code> on these same held-out "
    "scenes: that makes the figures slightly optimistic, and favours <code>zoh</code> if any.",
    "The figures are those after the last update, not the best: choosing by the held-out scenes would flatter all.",
)
WORDS = {
    "cls": Words(
        "accuracy",
        "accuracy",
        "epoch",
        "held-out images",
        "--epochs {epochs} {trainer}",
        (
            "The data set is small and easy, the images tiny: an order of methods seen here need not hold on ImageNet, "
            "and none is claimed. What the runs do show is that each method trains, with its own gradient, and what it "
            "costs.",
            "The demo's model and learning rate were chosen once, for all methods, by the accuracy of "
            "<code>zoh</code> on these same held-out images: that makes the accuracies slightly optimistic, and "
            "favours <code>zoh</code> if any.",
            "The accuracy is that of the last epoch, not of the best: choosing epochs by the held-out images would "
            "flatter all.",
        ),
    ),
    "seg": Words(
        "mean IoU",
        "mIoU",
        "update",
        "held-out scenes",
        "--cfg-options train_cfg.max_iters={epochs} {trainer}",
        _DENSE_CAVEATS,
        (("pixels right %", "pixel_acc"),),
    ),
    "det": Words(
        "AP50 of boxes",
        "box AP50",
        "update",
        "held-out scenes",
        "--cfg-options train_cfg.max_iters={epochs} {trainer}",
        _DENSE_CAVEATS,
        (("box AP %", "box_ap"), ("mask AP %", "mask_ap")),
    ),
}


def words(results: Results) -> Words:
    return WORDS[results.get("task", "cls")]


# ---- Tables --------------------------------------------------------------------------------------------------------


def columns(results: Results) -> tuple[str, ...]:
    """The table's headings."""
    w = words(results)
    more = (title for title, _ in w.more)
    cost = ("seeds", "parameters", f"s/{w.unit}", "train img/s", "eval img/s", "peak MiB")
    return ("method", f"{w.short} %", *more, *cost)


def _rows(results: Results) -> list[tuple[str, ...]]:
    """The table's cells; a dash where nothing was measured."""

    def cell(row: dict[str, Any], key: str, form: str) -> str:
        return "–" if row.get(key) is None else format(row[key], form)

    return [
        (
            row["method"],
            cell(row, "accuracy_mean", ".2f")
            + ("" if row["accuracy_std"] is None else f" ± {row['accuracy_std']:.2f}"),
            *(cell(row, key, ".2f") for _, key in words(results).more),
            str(len(row["accuracies"])),
            cell(row, "parameters", ",d"),
            cell(row, "epoch_time_s", ".2f"),
            cell(row, "images_per_s", ",.0f"),
            cell(row, "inference_images_per_s", ",.0f"),
            cell(row, "peak_memory_mb", ",.0f"),
        )
        for row in results["methods"]
    ]


def table_note(results: Results) -> str:
    """What the table's figures are, in a sentence or two."""
    before = [row["memory_before_mb"] for row in results["methods"] if row.get("memory_before_mb") is not None]
    memory = f", of which {statistics.fmean(before):,.0f} MiB before the model is built" if before else ""
    w = words(results)
    return (
        f"{w.metric[0].upper()}{w.metric[1:]} on {results['held_out_images']} {w.images} after the last of "
        f"{results['settings']['epochs']} {w.unit}s: mean ± sample standard deviation over the seeds. Time and memory "
        f"are measured apart, one process with one thread at a time: s/{w.unit} and img/s are the best of several "
        f"{w.unit}s and evaluations; peak is the largest resident memory of the process{memory}."
    )


def print_table(results: Results, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(columns(results)):
        table.add_column(name.replace(" ", "\n"), justify="right" if i else "left", no_wrap=True)
    for row in _rows(results):
        table.add_row(*row)
    console.print(table)
    console.print(table_note(results), highlight=False)


def markdown_table(results: Results) -> str:
    names = columns(results)
    lines = ["| " + " | ".join(names) + " |", "|---" + "|---:" * (len(names) - 1) + "|"]
    lines += ["| " + " | ".join((f"`{row[0]}`", *row[1:])) + " |" for row in _rows(results)]
    return "\n".join(lines) + "\n\n" + table_note(results) + "\n"


def html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<table><thead>{line('th', columns)}</thead><tbody>{body}</tbody></table>"


def differences(results: Results, baseline: str = "zoh") -> list[tuple[str, ...]]:
    """Each method against the baseline, paired by seed: mean, smallest, largest difference; do all agree in sign?"""
    by_name = {row["method"]: row["accuracies"] for row in results["methods"]}
    rows = []
    for method, accuracies in by_name.items():
        pairs = [accuracies[seed] - by_name[baseline][seed] for seed in accuracies if seed in by_name.get(baseline, {})]
        if method == baseline or not pairs:
            continue
        agree = "–" if len(pairs) < 2 else "yes" if min(pairs) > 0 or max(pairs) < 0 else "no"
        rows.append((method, *(f"{v:+.2f}" for v in (statistics.fmean(pairs), min(pairs), max(pairs))), agree))
    return rows


# ---- Plots of the runs ---------------------------------------------------------------------------------------------


def plot_accuracy_cost(results: Results) -> Figure:
    """Accuracy against training time per epoch; the bars are ± one standard deviation over the seeds."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for row in results["methods"]:
        if row["accuracy_mean"] is None or row.get("epoch_time_s") is None:
            continue
        x, y, error = row["epoch_time_s"], row["accuracy_mean"], row["accuracy_std"] or 0.0
        axes.errorbar(x, y, error, label=row["method"], **point_style(row["method"]))
    w = words(results)
    axes.set(xlabel=f"training time per {w.unit}, s (one thread)", ylabel=f"held-out {w.metric}, %")
    axes.margins(x=0.15)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def plot_curves(results: Results) -> Figure:
    """Training loss and held-out accuracy by epoch: mean over the seeds, band from the smallest to the largest."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    lowest = 100.0
    for method in (row["method"] for row in results["methods"]):
        histories = [run["history"] for run in results["runs"] if run["method"] == method]
        if not histories:
            continue
        for axes, key in ((left, "train_loss"), (right, "test_acc1")):
            values = np.array([[epoch[key] for epoch in history] for history in histories], dtype=float)
            epochs = np.array([epoch.get("step", i + 1) for i, epoch in enumerate(histories[0])])
            axes.plot(epochs, values.mean(0), label=method, **line_style(method))
            axes.fill_between(epochs, values.min(0), values.max(0), color=line_style(method)["color"], alpha=0.1, lw=0)
        lowest = min(lowest, values[:, -1].min())
    w = words(results)
    left.set(xlabel=w.unit, ylabel="training loss")
    # The first epochs all look alike; what counts is the top.
    right.set(xlabel=w.unit, ylabel=f"held-out {w.metric}, %", ylim=(max(0, lowest - 10), 100.5))
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    if right.get_legend_handles_labels()[0]:
        figure.legend(*right.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


# ---- Plots of the mathematics --------------------------------------------------------------------------------------


def coefficients(method: str, x: np.ndarray, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Ā and c/Δ at x = ΔA for the scalar A = rate < 0, in float64."""
    delta = torch.from_numpy(x / rate)[:, None]
    A_bar, c = discretize(method, delta, torch.tensor([[rate]], dtype=torch.float64))
    return A_bar.flatten().numpy(), (c[..., 0] / delta).flatten().numpy()


def magnitudes(method: str, re: np.ndarray, im: np.ndarray) -> np.ndarray:
    """|Ā(x)| at x = re + i·im, by way of the real matrix [[re, -im], [im, re]], whose Ā has the determinant |Ā(x)|²."""
    re, im = np.broadcast_arrays(re, im)
    blocks = torch.from_numpy(np.stack([re, -im, im, re], -1).reshape(-1, 2, 2))
    A_bar, _ = discretize(method, torch.ones(len(blocks), dtype=torch.float64), blocks)
    return torch.linalg.det(A_bar).abs().sqrt().numpy().reshape(re.shape)


def _groups(values: dict[str, np.ndarray]) -> dict[str, list[str]]:
    """Methods whose values coincide, under the name of the first."""
    groups: dict[str, list[str]] = {}
    for method, value in values.items():
        first = next((name for name in groups if np.allclose(values[name], value, equal_nan=True)), method)
        groups.setdefault(first, []).append(method)
    return groups


def _equation(method: str) -> str:
    return f"Ā = {METHODS[method].A_bar}"


def plot_coefficients() -> Figure:
    """|Ā| and the input factor c/Δ of every method against -x, for a slow and a fast state."""
    x = -np.logspace(-2, np.log10(80), 400)
    figure, (first, *others) = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")

    values = {method: np.abs(coefficients(method, x, -1.0)[0]) for method in METHODS}
    for method, group in _groups(values).items():
        label = f"{_equation(method)}: {method if len(group) == 1 else f'{len(group)} methods'}"
        first.plot(-x, values[method], label=label, **line_style(method))
    first.set(title="state factor |Ā|", xlabel="-x = -ΔA", xscale="log", ylim=(0, 1.3))
    first.legend(loc="upper left", frameon=False)

    for axes, rate in zip(others, (-1.0, -16.0), strict=True):
        for method in METHODS:
            axes.plot(-x, coefficients(method, x, rate)[1], label=method, **line_style(method))
        axes.axhline(0, color="0.6", lw=0.8)
        axes.set(title=f"input factor c/Δ at A = {rate:g}", xlabel="-x = -ΔA", xscale="log")
        axes.set_yscale("symlog", linthresh=1, linscale=2)
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.set_ylim(-2e4, 1e2)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    for axes in (first, *others):
        axes.grid(alpha=0.3)
    return figure


def plot_stability() -> Figure:
    """Where in the complex plane of x = ΔA a state decays, |Ā(x)| < 1; one panel for each Ā that occurs."""
    re, im = np.linspace(-6, 6, 241)[None, :], np.linspace(-6, 6, 242)[:, None]  # never on bilinear's pole, x = 2
    values = {method: magnitudes(method, re, im) for method in METHODS}
    groups = _groups(values)
    figure, panels = plt.subplots(1, len(groups), figsize=(5.4 * len(groups), 5.2), layout="constrained", squeeze=False)
    for axes, (method, group) in zip(panels[0], groups.items(), strict=True):
        grid = np.broadcast_arrays(re, im)
        axes.contourf(*grid, values[method], levels=(0, 1), colors=["#cfe3f3"])
        axes.contour(*grid, values[method], levels=(1,), colors=["#0072b2"], linewidths=2)
        lines = axes.contour(*grid, values[method], levels=(0.05, 0.2, 0.5, 2, 5, 20), colors=["0.35"], linewidths=0.8)
        axes.clabel(lines, fmt="%g", fontsize=8)
        axes.axhline(0, color="0.6", lw=0.6)
        names = "\n".join(", ".join(group[i : i + 5]) for i in range(0, len(group), 5))
        axes.set_title(f"{_equation(method)}\n{names}", fontsize=10)
        axes.set(xlabel="Re x", ylabel="Im x", aspect="equal")
    return figure


# ---- Report --------------------------------------------------------------------------------------------------------

PLOTS = {
    "accuracy_cost.png": "What the held-out figure costs in training time. Bars: ± one standard deviation over seeds.",
    "overlays.png": "The first held-out scenes: the truth, and each method's predictions (first seed) over the scene.",
    "curves.png": "Learning curves: mean over the seeds; the bands reach from the smallest to the largest seed.",
    "coefficients.png": (
        "The coefficients, computed by the library's reference. Left: all methods but the bilinear one share one state "
        "factor. Middle and right: the input factor relative to Δ, where the methods differ far more. The dashed "
        "(truncated) ones agree with the solid ones of their colour for small |x| only, and so does rk4, a polynomial, "
        "with zoh_exact. The vertical scale is linear between -1 and 1, logarithmic outside."
    ),
    "stability.png": (
        "Stability: where |Ā(x)| < 1 (shaded), x = ΔA complex. The model's A is real and negative, so no method here "
        "makes the recurrence unstable. Far to the left eˣ forgets at once, whereas the bilinear Ā tends to -1: the "
        "fastest states alternate in sign and fade slowly."
    ),
}

RUN_PLOTS = ("accuracy_cost.png", "curves.png", "overlays.png")
_NO_REVISION = "not a git checkout"

STYLE = """\
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ccc; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #444; }
figure { margin: 2rem 0; }
figcaption { color: #555; font-size: .9rem; }
img { max-width: 100%; }
code, pre { font-size: .85rem; background: #f4f4f4; overflow-wrap: anywhere; white-space: pre-wrap; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Discretization methods in VisionMamba</title>
<style>
{style}</style>
</head>
<body>
<h1>Discretization methods in VisionMamba</h1>
<p>The same small network, trained once per method and seed; only <code>discretization_method</code> differs.</p>
{table}
<p>{note}</p>
{failed}
{curves}
<h2>What may be concluded, and what not</h2>
<ul>
<li>{spread}</li>
<li>{resolution}</li>
{caveats}
<li><code>foh</code> as published is not consistent: its input factor is about Δ²/2 instead of Δ, so the input fades as
the steps get shorter. Where it trains, it does so by learning a large Δ or a larger scale elsewhere. This says nothing
about the textbook first-order hold, which is another rule.</li>
<li><code>poly</code> and <code>highorder</code> add terms in Δ² and Δ³ without the matching power of A: their meaning
depends on the unit of time. They are implemented as published.</li>
</ul>
{differences}
<h2>The methods</h2>
{methods}
<h2>How it was made</h2>
<pre>{command}</pre>
<p>Trainer arguments: <code>{arguments}</code></p>
{environment}
<p>The figures, losses and memory of every run are in <code>results.json</code> beside this file.</p>
</body>
</html>
"""


def _figure(name: str, data: bytes) -> str:
    source = base64.b64encode(data).decode()
    caption = html.escape(PLOTS[name])
    image = f'<img alt="{caption}" src="data:image/png;base64,{source}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _spread(results: Results) -> str:
    stds = [row["accuracy_std"] for row in results["methods"] if row["accuracy_std"] is not None]
    if not stds:
        return "There is one seed per method: nothing can be said about differences between methods."
    return (
        f"The standard deviation over the seeds is up to {max(stds):.2f} percentage points, and so few seeds "
        f"({len(results['settings']['seeds'])}) estimate it badly. A difference between two methods that is not "
        "several times larger is not a result."
    )


def _resolution(results: Results) -> str:
    count = results["held_out_images"]
    if not count:
        return "The number of held-out images is unknown, for every measurement of time failed."
    if results.get("task", "cls") != "cls":
        return f"There are {count} held-out scenes, which share no digit with the training scenes."
    best = max((row["accuracy_mean"] for row in results["methods"] if row["accuracy_mean"] is not None), default=0.0)
    error = (best * (100 - best) / count) ** 0.5
    return (
        f"There are {count} held-out images: one image is {100 / count:.2f} percentage points, and at {best:.1f} % "
        f"their choice alone gives an accuracy a standard error of {error:.2f} points."
    )


def environment_rows(env: dict[str, Any]) -> list[tuple[str, str]]:
    """What `vim.provenance.environment` found, as rows of a table."""
    return [
        ("git revision", env["revision"] or _NO_REVISION),
        ("Python", env["python"]),
        *((name, number or "not installed") for name, number in env["packages"].items()),
        ("system", env["system"]),
        ("processor", f"{env['cpu']}, {env['cores']} cores available"),
    ]


def html_report(results: Results, plots: dict[str, bytes]) -> str:
    """One self-contained page: tables, plots (embedded), caveats, and how it was made."""
    failed, w = results["failed"], words(results)
    rows = differences(results)
    heading = ("against zoh, points", "mean", "smallest", "largest", "all seeds agree in sign")
    revisions = sorted({run["environment"]["revision"] or _NO_REVISION for run in results["runs"]})
    facts = [
        ("date (UTC)", results["created"]),
        ("revisions of the runs", ", ".join(revisions) or "–"),
        *environment_rows(results["environment"]),
    ]
    return _PAGE.format(
        style=STYLE,
        table=html_table(columns(results), _rows(results)),
        note=html.escape(table_note(results)),
        failed=f"<p><strong>Failed runs, left out: {html.escape(', '.join(failed))}.</strong></p>" if failed else "",
        curves="".join(_figure(name, plots[name]) for name in RUN_PLOTS if name in plots),
        spread=html.escape(_spread(results)),
        resolution=html.escape(_resolution(results)),
        differences=f"<p>Differences in {w.metric}, paired by seed:</p>" + html_table(heading, rows) if rows else "",
        methods="".join(_figure(name, plots[name]) for name in ("coefficients.png", "stability.png")),
        command=html.escape(results["command"]),
        arguments=html.escape(w.trainer.format(**results["settings"])),
        caveats="\n".join(f"<li>{caveat}</li>" for caveat in w.caveats),
        environment=html_table(("", ""), facts),
    )


def write(results: Results, output: Path) -> None:
    """table.md, the PNG plots and report.html, into `output`."""
    figures = {
        "accuracy_cost.png": plot_accuracy_cost(results),
        "curves.png": plot_curves(results),
        "coefficients.png": plot_coefficients(),
        "stability.png": plot_stability(),
    }
    plots = {}
    for name, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        plt.close(figure)
        plots[name] = buffer.getvalue()
        (output / name).write_bytes(plots[name])
    if (output / "overlays.png").exists():
        plots["overlays.png"] = (output / "overlays.png").read_bytes()
    (output / "table.md").write_text(markdown_table(results), encoding="utf-8")
    (output / "report.html").write_text(html_report(results, plots), encoding="utf-8")
