"""Speed and memory on the CPU, each figure beside what it is compared with, in one run.

    python benchmarks/cpu.py                                 # everything, about ten minutes on two cores
    python benchmarks/cpu.py --only scan --only model        # some sections
    python benchmarks/cpu.py --quick                         # tiny sizes: does it run?

Sections: ceiling (what the machine can do), scan (kernel against reference), methods (the discretizations against
zoh), length (time and memory as the sequence doubles), model (Vim-Ti against DeiT-Ti), breakdown (where Vim-Ti's time
goes). Prints tables, and writes SECTION.json and SECTION.md to the output folder as each section ends. NOTES.md tells
how to read them. Run it on a quiet machine: other load moves even ratios.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import math
import multiprocessing
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["KINETO_LOG_LEVEL"] = "6"  # read when torch is imported: the profiler would report every start and stop

import timm
import torch
import torch.nn.functional as F
from measure import (
    Check,
    Section,
    Table,
    Timing,
    check_table,
    measure_with_progress,
    milliseconds,
    ratio,
    significant,
)
from rich.console import Console
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from workloads import (
    PASSES,
    ROOT,
    Function,
    Shape,
    against_zoh,
    create,
    forward,
    forward_backward,
    inference,
    memory_peak,
    reset_memory_peak,
    scan_cases,
    scan_inputs,
    scan_with,
    training_step,
    write,
)

from mamba_ssm._backend import ENVIRONMENT_VARIABLE, unavailable, use_kernel
from mamba_ssm.ops.discretization_ref import METHODS
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref
from vim.provenance import available_cores, revision

# Operations per state-step, the exponential counted as one: what remains are multiply-adds. Backward recomputes nothing
# of the forward in this count.
FORWARD_OPERATIONS = 1 + 4
BACKWARD_OPERATIONS = 1 + 14


VIM_TINY = Shape(8, 384, 197, 16)
SMALL = Shape(2, 64, 67, 16)


@dataclass(frozen=True)
class Bench:
    """What all sections share. rounds, slice_s: see `measure`.

    rotated_bytes: inputs rotate among sets that together hold so much; more than a cache, so that none is found there.
    """

    quick: bool
    threads: int
    method: str
    rounds: int
    slice_s: float
    rotated_bytes: int
    console: Console

    def measure(
        self, what: str, candidates: dict[str, Callable[[], object]], rounds: int | None = None
    ) -> dict[str, Timing]:
        return measure_with_progress(self.console, what, candidates, rounds or self.rounds, self.slice_s)


# ---- ceiling -------------------------------------------------------------------------------------------------------


def matrix_product(size: int) -> Callable[[], object]:
    a, b, out = (torch.randn(size, size) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)


def with_threads(threads: int, candidate: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            candidate()
        finally:
            torch.set_num_threads(before)

    return run


def ceiling(bench: Bench) -> Section:
    """The fastest large matrix product (multiply-adds per second) and copy (bytes read + bytes written)."""
    sizes = (128, 256) if bench.quick else (1024, 2048)
    copied = 2**20 if bench.quick else 2**28
    source, target = torch.randn(copied // 4), torch.empty(copied // 4)
    candidates: dict[tuple[str, int], Callable[[], object]] = {}
    work: dict[tuple[str, int], float] = {}
    for threads in sorted({1, bench.threads}):
        for size in sizes:
            key = (f"mm {size}", threads)
            candidates[key] = with_threads(threads, matrix_product(size))
            work[key] = size**3
        key = (f"copy {copied / 2**20:g} MiB", threads)
        candidates[key] = with_threads(threads, functools.partial(target.copy_, source))
        work[key] = 2 * copied
    timings = bench.measure("ceiling", candidates)

    figures: dict[str, Any] = {"threads": bench.threads, "runs": []}
    table = Table("ceiling", ["what", "threads", "ms", "rate"])
    table.note = "FMA: one multiply-add of two fp32 numbers, two floating-point operations. Bytes: read + written."
    for key, timing in timings.items():
        what, threads = key
        rate = work[key] / timing.median
        unit = "FMA/s" if what.startswith("mm") else "B/s"
        figures["runs"].append({"what": what, "threads": threads, "rate": rate, "unit": unit, **timing.summary()})
        table.rows.append([what, str(threads), milliseconds(timing), f"{significant(rate / 1e9)} G{unit}"])
    rates = {(unit, threads): 0.0 for unit in ("FMA/s", "B/s") for threads in (1, bench.threads)}
    for run in figures["runs"]:
        key = run["unit"], run["threads"]
        rates[key] = max(rates[key], run["rate"])
    figures["fma_per_s"] = rates["FMA/s", bench.threads]
    figures["fma_per_s_one_core"] = rates["FMA/s", 1]
    figures["copy_bytes_per_s"] = rates["B/s", bench.threads]
    figures["copy_bytes_per_s_one_core"] = rates["B/s", 1]
    return Section("ceiling", figures, [table])


# ---- scan ----------------------------------------------------------------------------------------------------------


AHEAD = "discretized ahead"


def require_agreement(shape: Shape, method: str) -> float:
    """The largest relative error of the kernel, over output and gradients; ends the program above 1e-4."""
    cases = scan_cases(shape)

    def results(scan: Function) -> list[Tensor]:
        return [forward(scan, cases)(), *forward_backward(scan, cases)()]

    pairs = zip(results(scan_with(method)), results(scan_with(method, selective_scan_ref)), strict=True)
    error = max(((ours - wanted).norm() / wanted.norm()).item() for ours, wanted in pairs)
    if not error <= 1e-4:
        sys.exit(f"{method} at {shape}: the kernel is off the reference by {error:.2g}; a wrong kernel has no speed")
    return error


def discretized_ahead(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    *,
    delta_softplus: bool,
    discretization_method: str,
) -> Tensor:
    """zoh in the shape of other packages' references: Ā and c·B·u of all steps, (B, D, L, N), then a loop over time."""
    delta = F.softplus(delta + delta_bias[:, None])
    A_bar = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    inputs = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
    state, ys = torch.zeros_like(A_bar[:, :, 0]), []
    for t in range(u.shape[-1]):
        state = A_bar[:, :, t] * state + inputs[:, :, t]
        ys.append(torch.einsum("bdn,bn->bd", state, C[:, :, t]))
    return (torch.stack(ys, dim=-1) + D[:, None] * u) * F.silu(z)


def scan(bench: Bench) -> Section:
    """The kernel against the PyTorch reference, and against the machine's rate of multiply-adds in the same rounds."""
    shape = SMALL if bench.quick else VIM_TINY
    product = 256 if bench.quick else 1024
    figures: dict[str, Any] = {"shape": shape._asdict(), "method": bench.method, "threads": bench.threads, "passes": {}}
    figures["error"] = require_agreement(shape, bench.method)
    cases = scan_cases(shape, bench.rotated_bytes)
    figures["input_sets"] = len(cases)
    table = Table(
        f"scan, {bench.method}, {shape}, fp32, {bench.threads} threads",
        ["", "ms", "fastest", "/ kernel", "middle half of rounds"],
    )
    rates = Table(
        "scan against the ceiling",
        ["", "G state-steps/s per core", "ns per 16 state-steps", "G FMA/s per core (mm)", "share of ceiling"],
        note=f"A state-step counts as {FORWARD_OPERATIONS} operations forward (1 exp + {FORWARD_OPERATIONS - 1} FMA), "
        f"{BACKWARD_OPERATIONS} backward (1 exp + {BACKWARD_OPERATIONS - 1} FMA), each as long as an FMA of the "
        "matrix product in the same rounds. An exp costs several times that, so 100 % is out of reach.",
    )
    checks = []
    operations = {"forward": FORWARD_OPERATIONS, "forward + backward": FORWARD_OPERATIONS + BACKWARD_OPERATIONS}
    required = {"forward": 100, "forward + backward": 50}
    for name, make in PASSES.items():
        candidates = {
            "kernel": make(scan_with(bench.method), cases),
            "reference": make(scan_with(bench.method, selective_scan_ref), cases),
            "mm": matrix_product(product),
        }
        timings = bench.measure(f"scan, {name}", candidates)
        kernel = timings["kernel"]
        per_core = shape.state_steps / kernel.median / bench.threads
        fma_per_core = product**3 / timings["mm"].median / bench.threads
        share = per_core * operations[name] / fma_per_core
        speedups = {"reference": ratio(timings["reference"], kernel)}
        if bench.method == "zoh":  # apart and only twice: it takes many seconds, and fills the cache
            other = {"kernel": candidates["kernel"], AHEAD: make(scan_with(bench.method, discretized_ahead), cases)}
            apart = bench.measure(f"scan, {name}, {AHEAD}", other, rounds=2)
            timings[AHEAD] = apart[AHEAD]
            speedups[AHEAD] = ratio(apart[AHEAD], apart["kernel"])
        labels = {"kernel": "kernel", "reference": "selective_scan_ref", AHEAD: f"not ours: {AHEAD}, (B, D, L, N)"}
        for candidate in ("kernel", *speedups):
            timing = timings[candidate]
            row = [f"{name}: {labels[candidate]}", milliseconds(timing), significant(min(timing.calls) * 1e3)]
            table.rows.append([*row, *(speedups[candidate].cells() if candidate in speedups else ("", ""))])
        rates.rows.append(
            [
                name,
                significant(per_core / 1e9),
                significant(16e9 / per_core),
                significant(fma_per_core / 1e9),
                f"{share:.0%}",
            ]
        )
        checks.append(Check(f"scan {name}: reference / kernel", speedups["reference"].value, required[name]))
        figures["passes"][name] = {
            "timings": {candidate: timing.summary() for candidate, timing in timings.items()},
            "speedups": {other: asdict(speedup) for other, speedup in speedups.items()},
            "state_steps_per_s_per_core": per_core,
            "fma_per_s_per_core": fma_per_core,
            "operations_per_state_step": operations[name],
            "share_of_ceiling": share,
        }
    return Section("scan", figures, [table, rates], checks)


# ---- methods -------------------------------------------------------------------------------------------------------


def methods(bench: Bench) -> Section:
    shape = SMALL if bench.quick else VIM_TINY
    errors = {method: require_agreement(SMALL, method) for method in METHODS}
    title = f"discretization methods, {shape}, fp32, {bench.threads} threads"
    section = against_zoh(bench.measure, scan_cases(shape, bench.rotated_bytes), title, must=1.5)
    section.figures |= {"shape": shape._asdict(), "threads": bench.threads, "error": errors}
    return section


# ---- length --------------------------------------------------------------------------------------------------------


def peak_memory(threads: int, shape: Shape, method: str) -> int:
    """Bytes that a scan forward and backward adds to a fresh process, its inputs and gradients included."""
    torch.set_num_threads(threads)

    def run(shape: Shape) -> None:
        inputs = scan_inputs(shape)
        out = selective_scan_fn(**inputs, delta_softplus=True, discretization_method=method)
        torch.autograd.grad(out, list(inputs.values()), torch.ones_like(out))

    run(shape._replace(channels=16, length=32))  # libraries, threads, their first allocations
    reset_memory_peak()
    before = memory_peak()
    run(shape)
    return memory_peak() - before


def length(bench: Bench) -> Section:
    """Time and memory as the length doubles."""
    shape = Shape(1, 384, 0, 16)
    lengths = [2**k for k in ((9, 10) if bench.quick else range(8, 17))]
    shapes = {n: shape._replace(length=n) for n in lengths}
    cases = {n: scan_cases(s, bench.rotated_bytes) for n, s in shapes.items()}
    timings = {}
    for name, make in PASSES.items():
        candidates = {n: make(scan_with(bench.method), cases[n]) for n in lengths}
        timings[name] = bench.measure(f"length, {name}", candidates)
    # glibc: 64 KiB or more leave the process when they are freed, so that no earlier memory is reused unseen.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # a fresh process for every length
        tasks = [(bench.threads, s, bench.method) for s in shapes.values()]
        peaks = dict(zip(lengths, pool.starmap(peak_memory, tasks, chunksize=1), strict=True))

    table = Table(
        f"length, {bench.method}, B {shape.batch}, D {shape.channels}, N {shape.states}, {bench.threads} threads",
        ["L", "forward, ms", "×", "forward + backward, ms", "×", "peak memory, MB", "×"],
        note="×: over the line before. Peak memory: what one forward and backward adds to a fresh process, its inputs, "
        "outputs and gradients included; the system counts it to within about 0.5 MB.",
    )
    series = {name: {n: timing.median for n, timing in by_length.items()} for name, by_length in timings.items()}
    series["peak memory"] = peaks
    scale = {"peak memory": 1e-6}
    for previous, n in zip([None, *lengths], lengths, strict=False):
        row = [str(n)]
        for name, values in series.items():
            factor = "" if previous is None else f"{values[n] / values[previous]:.2f}"
            row += [significant(values[n] * scale.get(name, 1e3)), factor]
        table.rows.append(row)
    doublings = len(lengths) - 1
    growth = {name: (values[lengths[-1]] / values[lengths[0]]) ** (1 / doublings) for name, values in series.items()}
    checks = [
        Check(f"length doubles, {name}: mean factor", factor, 2.1, at_most=True) for name, factor in growth.items()
    ]
    figures = {
        "shape": {key: value for key, value in shape._asdict().items() if key != "length"},
        "method": bench.method,
        "threads": bench.threads,
        "lengths": lengths,
        "passes": {name: [timing.summary() for timing in by_length.values()] for name, by_length in timings.items()},
        "peak_memory_bytes": list(peaks.values()),
        "growth_per_doubling": growth,
    }
    return Section("length", figures, [table], checks)


# ---- model ---------------------------------------------------------------------------------------------------------

VIM, DEIT, PRODUCTS = "vim_tiny", "deit_tiny_patch16_224", "vim_tiny, matrix products alone"


class RecordLinear(TorchFunctionMode):
    """Remembers the arguments of every F.linear, and of those in a mixer: (shape and strides of x, weight, bias)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[tuple[int, ...], tuple[int, ...]], Tensor, Tensor | None]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, bias = (*args, None)[:3]
            self.calls.append(((tuple(x.shape), x.stride()), weight, bias))
        if str(func).startswith("mamba_ssm.mixer_fwd"):
            batch, length, _ = args[0].shape
            names = [argument.name for argument in torch.ops.mamba_ssm.mixer_fwd.default._schema.arguments]
            for name in ("in_proj_weight", "x_proj_weight", "x_proj_weight_b", "out_proj_weight"):
                weight = args[names.index(name)]
                layout = (batch, length, weight.shape[1]), (length * weight.shape[1], weight.shape[1], 1)
                self.calls.append((layout, weight, None))
        return func(*args, **(kwargs or {}))


class MatrixProducts:
    """The linear layers of a model's forward, on random inputs of the same shapes and strides, and nothing else."""

    def __init__(self, model: nn.Module, images: Tensor):
        with RecordLinear() as recorded, torch.inference_mode():
            model.eval()(images)
        self._calls = recorded.calls
        self._inputs = {layout: self._rotating(*layout) for layout, _, _ in self._calls}
        self.multiply_adds = sum(math.prod(shape) * weight.shape[0] for (shape, _), weight, _ in self._calls)

    @staticmethod
    def _rotating(shape: tuple[int, ...], stride: tuple[int, ...]) -> Iterator[Tensor]:
        elements = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        return itertools.cycle([torch.randn(elements).as_strided(shape, stride) for _ in range(4)])

    @torch.inference_mode()
    def __call__(self) -> None:
        for layout, weight, bias in self._calls:
            F.linear(next(self._inputs[layout]), weight, bias)


REQUIRED = {  # images/s of Vim-Ti over those of DeiT-Ti: must, aim
    ("forward", 224): (0.6, 0.75),
    ("forward", 512): (1.0, 1.25),
    ("training step", 224): (0.6, None),
    ("training step", 512): (0.9, None),
}


def model(bench: Bench) -> Section:
    """Images per second of Vim-Ti and of timm's DeiT-Ti, and of Vim-Ti's matrix products as the floor of its time."""
    batch, sizes = (2, (32,)) if bench.quick else (8, (224, 512))
    figures: dict[str, Any] = {"batch": batch, "method": bench.method, "threads": bench.threads, "runs": []}
    table = Table(
        f"model, {bench.method}, batch {batch}, fp32, {bench.threads} threads",
        ["", "ms", "images/s", "over DeiT-Ti", "middle half of rounds"],
        note="Training step: forward, loss, backward. Matrix products: those of the forward's linear layers.",
    )
    checks = []
    for size in sizes:
        models = {name: create(name, size, bench.method) for name in (VIM, DEIT)}
        images = [torch.randn(batch, 3, size, size) for _ in range(4)]
        products = MatrixProducts(models[VIM], images[0])
        for name, make in (("forward", inference), ("training step", training_step)):
            candidates = {key: make(module, images) for key, module in models.items()}
            if name == "forward":
                candidates[PRODUCTS] = products
            timings = bench.measure(f"model, {name}, {size}²", candidates)
            ratios = {key: ratio(timings[DEIT], timing) for key, timing in timings.items()}
            for key, timing in timings.items():
                speed = significant(batch / timing.median)
                versus = ("", "") if key == DEIT else ratios[key].cells()
                table.rows.append([f"{name}, {size}²: {key}", milliseconds(timing), speed, *versus])
            figures["runs"].append(
                {
                    "pass": name,
                    "size": size,
                    "timings": {key: timing.summary() for key, timing in timings.items()},
                    "images_per_s": {key: batch / timing.median for key, timing in timings.items()},
                    "over_deit": {key: asdict(value) for key, value in ratios.items()},
                    "matrix_product_fma": products.multiply_adds,
                }
            )
            if (name, size) in REQUIRED:
                must, aim = REQUIRED[name, size]
                checks.append(Check(f"{name}, {size}²: Vim-Ti / DeiT-Ti, images/s", ratios[VIM].value, must, aim))
    return Section("model", figures, [table], checks)


# ---- breakdown -----------------------------------------------------------------------------------------------------

GROUPS = {  # operator names begin with …
    "mixers": ("mamba_ssm::mixer",),
    "norm": ("mamba_ssm::", "aten::native_layer_norm", "aten::_fused_rms_norm"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear"),
}
OTHER, OUTSIDE = "other operators", "outside operators (Python, profiler)"


def group_of(operator: str) -> str:
    return next((group for group, prefixes in GROUPS.items() if operator.startswith(prefixes)), OTHER)


def breakdown(bench: Bench) -> Section:
    """Where the time of Vim-Ti goes, by operator."""
    batch, size = (2, 32) if bench.quick else (8, 224)
    vim_tiny = create(VIM, size, bench.method)
    images = [torch.randn(batch, 3, size, size) for _ in range(4)]
    figures: dict[str, Any] = {"batch": batch, "size": size, "method": bench.method, "threads": bench.threads}
    figures["passes"] = {}
    tables = []
    for name, make in (("forward", inference), ("training step", training_step)):
        run = make(vim_tiny, images)
        for _ in range(2):
            run()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            start = time.perf_counter()
            for _ in range(bench.rounds):
                run()
            seconds = (time.perf_counter() - start) / bench.rounds
        operators = sorted(profiler.key_averages(), key=lambda op: op.self_cpu_time_total, reverse=True)
        own = {op.key: op.self_cpu_time_total * 1e-6 / bench.rounds for op in operators}
        groups: Counter[str] = Counter({group: 0.0 for group in (*GROUPS, OTHER)})
        for operator, time_s in own.items():
            groups[group_of(operator)] += time_s
        groups[OUTSIDE] = max(0.0, seconds - sum(own.values()))
        title = f"breakdown, Vim-Ti {name}, {size}², batch {batch}, {bench.threads} threads"
        tables.append(Table(title, ["", "ms", "share"]))
        for group, time_s in groups.items():
            tables[-1].rows.append([group, significant(time_s * 1e3), f"{time_s / seconds:.1%}"])
        tables.append(Table(f"{title}: operators", ["", "calls", "ms", "share"]))
        for op in operators[:15]:
            calls, time_s = op.count / bench.rounds, own[op.key]
            tables[-1].rows.append([op.key, f"{calls:g}", significant(time_s * 1e3), f"{time_s / seconds:.1%}"])
        figures["passes"][name] = {"seconds": seconds, "groups_s": dict(groups), "operators_s": own}
    return Section("breakdown", figures, tables)


# ---- the command ---------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Bench], Section]] = {
    section.__name__: section for section in (ceiling, scan, methods, length, model, breakdown)
}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": available_cores(),
        "kernel_instructions": torch.ops.mamba_ssm.cpu_isa(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "revision": revision(),
    }


def load_average() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few rounds; its figures mean nothing")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "benchmarks", metavar="DIR")
    parser.add_argument("--threads", type=int, default=available_cores(), help="default: the cores of this machine")
    parser.add_argument("--method", choices=METHODS, default="zoh", help="in scan, length, model and breakdown")
    parser.add_argument("--rounds", type=int, help="default: 15, or 3 with --quick")
    args = parser.parse_args(argv)
    if args.rounds is None:
        args.rounds = 3 if args.quick else 15
    for name in ("threads", "rounds"):
        if getattr(args, name) < (2 if name == "rounds" else 1):
            parser.error(f"--{name}: got {getattr(args, name)}; expected at least {2 if name == 'rounds' else 1}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if not use_kernel(torch.empty(0)):
        reason = unavailable["cpu"] or f"{ENVIRONMENT_VARIABLE}=0 asks for the reference"
        sys.exit(f"This measures the CPU kernels, but {reason}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    console = Console(width=None if sys.stdout.isatty() else 120)
    slice_s, rotated_bytes = (0.0, 2**20) if args.quick else (0.2, 2**27)
    bench = Bench(args.quick, args.threads, args.method, args.rounds, slice_s, rotated_bytes, console)
    args.output.mkdir(parents=True, exist_ok=True)

    info, load = machine(), load_average()
    console.print("\n".join(f"{key}: {value}" for key, value in info.items()), highlight=False)
    if load is not None and load > 0.3:
        console.print(f"[yellow]The load average is {load:.2f} before the first measurement: other work disturbs it.")
    settings = {"quick": args.quick, "threads": args.threads, "rounds": args.rounds}
    record = {"machine": info, "load_average_before": load, "settings": settings}
    checks = []
    for name in args.only or SECTIONS:
        started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        section = SECTIONS[name](bench)
        write(section, {**record, "started": started}, args.output)
        for table in section.tables:
            console.print(table.rich())
        checks += section.checks
    if checks and not args.quick:
        (args.output / "checks.md").write_text(check_table(checks).markdown(), encoding="utf-8")
        console.print(check_table(checks).rich())
    console.print(f"Written to {args.output}", highlight=False)


if __name__ == "__main__":
    main()
