"""Timings that can be compared, and tables of them.

What is compared is interleaved: every round gives each candidate a slice of time, so that a machine that drifts drifts
for all of them. Figures are medians over all calls of all rounds; a ratio is one of medians from one run, and its
range is the middle half of the ratios that single rounds give.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable


@dataclass(frozen=True)
class Timing:
    """rounds: the seconds of every call, by round."""

    rounds: Sequence[Sequence[float]]

    @property
    def calls(self) -> list[float]:
        return [seconds for calls in self.rounds for seconds in calls]

    @property
    def median(self) -> float:
        return statistics.median(self.calls)

    def summary(self) -> dict[str, Any]:
        calls = self.calls
        first, median, third = statistics.quantiles(calls, n=4, method="inclusive")
        return {
            "median_s": median,
            "min_s": min(calls),
            "quartiles_s": [first, third],
            "calls": len(calls),
            "rounds": len(self.rounds),
        }


@dataclass(frozen=True)
class Ratio:
    """low, high: quartiles of the ratio over rounds."""

    value: float
    low: float
    high: float

    def cells(self) -> tuple[str, str]:
        return significant(self.value), f"{significant(self.low)} … {significant(self.high)}"


def wall_clock(call: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    slice_s: float,
    on_round: Callable[[], object],
    seconds_of: Callable[[Callable[[], object]], float] = wall_clock,
) -> dict[str, Timing]:
    """Time the candidates: per round each is called for `slice_s` seconds, at least once; one more round warms up.

    Every other round runs in reversed order. Calls on_round after each round, outside of what is timed. seconds_of
    calls a candidate and says how long it took.
    """
    times: dict[str, list[list[float]]] = {name: [] for name in candidates}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for round_ in range(rounds + 1):
            gc.collect()
            for name in list(candidates)[:: -1 if round_ % 2 else 1]:
                times[name].append(_calls(candidates[name], slice_s, seconds_of))
            on_round()
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(calls[1:]) for name, calls in times.items()}


def _calls(
    candidate: Callable[[], object], slice_s: float, seconds_of: Callable[[Callable[[], object]], float]
) -> list[float]:
    calls: list[float] = []
    end = time.perf_counter() + slice_s
    while not calls or time.perf_counter() < end:
        calls.append(seconds_of(candidate))
    return calls


def measure_with_progress(
    console: Console,
    what: str,
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    slice_s: float,
    seconds_of: Callable[[Callable[[], object]], float] = wall_clock,
) -> dict[str, Timing]:
    """`measure`, with a progress bar named `what`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Refreshed between rounds only: a refreshing thread would disturb what is timed.
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        task = progress.add_task(what, total=rounds + 1)

        def on_round() -> None:
            progress.advance(task)
            progress.refresh()

        progress.refresh()
        return measure(candidates, rounds, slice_s, on_round, seconds_of)


def ratio(a: Timing, b: Timing) -> Ratio:
    """How many times as long a takes as b; both from one `measure`."""
    by_round = [statistics.median(x) / statistics.median(y) for x, y in zip(a.rounds, b.rounds, strict=True)]
    low, _, high = statistics.quantiles(by_round, n=4, method="inclusive")
    return Ratio(a.median / b.median, low, high)


@dataclass(frozen=True)
class Check:
    """A figure and what it has to reach: at least `must`, or with `at_most` at most. `aim` is what is hoped for."""

    name: str
    value: float
    must: float
    aim: float | None = None
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.value <= self.must if self.at_most else self.value >= self.must

    @property
    def sign(self) -> str:
        return "≤" if self.at_most else "≥"


@dataclass
class Table:
    """Rows of text; the first column is left-aligned, the others right."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    note: str | None = None

    def rich(self) -> RichTable:
        table = RichTable(title=self.title, title_justify="left", caption=self.note, caption_justify="left")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"**{self.title}**\n\n{table}\n" + (f"\n{self.note}\n" if self.note else "")


@dataclass
class Section:
    """What one section of a benchmark found: figures for JSON, tables for people, checks against what is required."""

    name: str
    figures: dict[str, Any]
    tables: list[Table]
    checks: list[Check] = field(default_factory=list)


def check_table(checks: Sequence[Check]) -> Table:
    table = Table("required", ["figure", "value", "must", "aim", ""])
    for check in checks:
        aim = "" if check.aim is None else f"{check.sign} {check.aim:g}"
        verdict = "met" if check.met else "missed"
        table.rows.append([check.name, significant(check.value), f"{check.sign} {check.must:g}", aim, verdict])
    return table


def significant(value: float, digits: int = 3) -> str:
    """Decimal notation with that many significant digits, all digits before the point kept: 1234, 12.3, 0.0123."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def milliseconds(timing: Timing) -> str:
    return significant(timing.median * 1e3)
