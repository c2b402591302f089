"""Speed and memory on a GPU, each figure beside its floor or its peer, all from one run.

    python benchmarks/gpu.py                              # everything
    python benchmarks/gpu.py --section scan model         # some sections

Sections: scan (forward and backward against the floor), methods (the discretizations against zoh), conv (the causal
convolution against a copy), norm (add + RMSNorm against a copy), model (Vim against timm's DeiT and ViT). The ceilings
that floors are made of are measured first. bfloat16 activations, float32 states. Times are those of the GPU, medians
of CUDA-graph replays over inputs that rotate among more memory than its cache holds; no kernel is timed that is less
accurate than twice the error of the PyTorch reference. Prints tables, and writes SECTION.json and SECTION.md to the
output folder as each section ends.
"""

from __future__ import annotations

import argparse
import datetime
import math
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import triton
from ceilings import Ceilings, Work, measure_ceilings, scan_work
from clocks import Call, Clock, EagerClock, GraphClock
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
from workloads import (
    ROOT,
    Autocast,
    Case,
    Errors,
    Function,
    Shape,
    against_zoh,
    backward,
    create,
    forward,
    inference,
    memory_peak,
    require_accuracy,
    reset_memory_peak,
    scan_cases,
    scan_with,
    set_count,
    training_step,
    write,
)

from causal_conv1d import causal_conv1d_fn, causal_conv1d_ref
from mamba_ssm._backend import ENVIRONMENT_VARIABLE, unavailable, use_kernel
from mamba_ssm.ops.discretization_ref import METHODS
from mamba_ssm.ops.selective_scan_interface import selective_scan_ref
from mamba_ssm.ops.triton.layer_norm import rms_norm_fn
from vim.provenance import revision

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Bench:
    """What all sections share. rounds, slice_s: see `measure`; rotated_bytes: what sets of inputs hold together."""

    device: torch.device
    ceilings: Ceilings
    clock: Clock
    eager: Clock  # for what is timed without CUDA graphs too
    method: str
    rounds: int
    slice_s: float
    rotated_bytes: int
    console: Console

    def measure(
        self, what: str, candidates: Mapping[str, Call], sets: int, clock: Clock | None = None
    ) -> dict[str, Timing]:
        clock = clock or self.clock
        prepared = {name: clock.prepare(call, sets) for name, call in candidates.items()}
        return measure_with_progress(self.console, what, prepared, self.rounds, self.slice_s, clock.seconds)


# ---- floors --------------------------------------------------------------------------------------------------------


class Operation(NamedTuple):
    """work, required (must, aim; times the floor): by pass."""

    function: Function
    cases: Sequence[Case]
    work: dict[str, Work]
    required: dict[str, tuple[float, float | None]]


FLOOR_PASSES = {"forward": forward, "backward": backward}


def against_floor(
    bench: Bench, section: str, title: str, errors: Errors, operations: Iterable[tuple[str, Operation]]
) -> Section:
    table = Table(title, ["", *(column for name in FLOOR_PASSES for column in (f"{name}, µs", "floor, µs", "× floor"))])
    figures: dict[str, Any] = {"ceilings": bench.ceilings._asdict(), "errors": errors._asdict(), "operations": {}}
    checks = []
    for name, operation in operations:
        row, record = [name], {}
        for pass_, make in FLOOR_PASSES.items():
            call = make(operation.function, operation.cases)
            timing = bench.measure(f"{title}, {name}, {pass_}", {pass_: call}, len(operation.cases))[pass_]
            work = operation.work[pass_]
            floor = work.floor(bench.ceilings)
            over = timing.median / floor
            row += [significant(timing.median * 1e6), significant(floor * 1e6), significant(over)]
            record[pass_] = {**timing.summary(), "work": work._asdict(), "floor_s": floor, "over_floor": over}
            if pass_ in operation.required:
                must, aim = operation.required[pass_]
                checks.append(Check(f"{title}, {name}, {pass_} / floor", over, must, aim, at_most=True))
        table.rows.append(row)
        figures["operations"][name] = {"input_sets": len(operation.cases), **record}
    return Section(section, figures, [table], checks)


# ---- sections ------------------------------------------------------------------------------------------------------

VIM_TINY, VIM_SMALL, VIM_BASE = Shape(128, 384, 197, 16), Shape(128, 768, 197, 16), Shape(64, 1536, 197, 16)
SMALL = Shape(2, 64, 67, 16)  # for accuracy
# must and aim, in floors
IMAGES = {"forward": (1.6, 1.3), "backward": (2.6, 1.8)}
LONG = {"forward": (2.5, 1.6), "backward": (4.0, 2.5)}
SCANS = {
    VIM_TINY: IMAGES,
    VIM_SMALL: IMAGES,
    VIM_BASE: {},
    Shape(16, 384, 1025, 16): LONG,
    Shape(8, 384, 4097, 16): LONG,
    Shape(1, 384, 16385, 16): LONG,
}


def require_accurate_scan(bench: Bench, method: str) -> Errors:
    with bench.device:
        (case,) = scan_cases(SMALL, dtype=DTYPE)
    return require_accuracy(method, scan_with(method), scan_with(method, selective_scan_ref), case)


def scan(bench: Bench, shapes: Mapping[Shape, dict[str, tuple[float, float]]] = SCANS) -> Section:
    """The scan with gate and softplus against its floor."""

    def operations() -> Iterator[tuple[str, Operation]]:
        for shape, required in shapes.items():  # one at a time: their inputs together take gigabytes
            with bench.device:
                cases = scan_cases(shape, bench.rotated_bytes, DTYPE)
            yield str(shape), Operation(scan_with(bench.method), cases, scan_work(shape, DTYPE.itemsize), required)

    return against_floor(
        bench, "scan", f"scan, {bench.method}", require_accurate_scan(bench, bench.method), operations()
    )


def methods(bench: Bench, shape: Shape = VIM_TINY) -> Section:
    errors = {method: require_accurate_scan(bench, method) for method in METHODS}
    with bench.device:
        cases = scan_cases(shape, bench.rotated_bytes, DTYPE)
    section = against_zoh(partial(bench.measure, sets=len(cases)), cases, f"methods, {shape}", must=1.35, aim=1.15)
    section.figures |= {"shape": shape._asdict(), "errors": {name: e._asdict() for name, e in errors.items()}}
    table = Table("errors against float64, bfloat16", ["", "kernel", "reference"])
    table.rows += [[name, *(f"{error:.1e}" for error in pair)] for name, pair in errors.items()]
    section.tables.append(table)
    return section


def conv(bench: Bench, shape: tuple[int, int, int] = VIM_TINY[:3]) -> Section:
    """The causal convolution with SiLU, width 4, channel-last, against a copy: x and out, or x, dout and dx."""

    def cases(batch: int, channels: int, length: int, count: int) -> list[Case]:
        def activation() -> Tensor:
            return torch.randn(batch, length, channels, dtype=DTYPE).transpose(1, 2)

        def inputs() -> dict[str, Tensor]:
            tensors = {"x": activation(), "weight": torch.randn(channels, 4), "bias": torch.randn(channels)}
            return {name: t.requires_grad_() for name, t in tensors.items()}

        with bench.device:
            return [Case(inputs(), activation()) for _ in range(count)]

    function, reference = (partial(f, activation="silu") for f in (causal_conv1d_fn, causal_conv1d_ref))
    errors = require_accuracy("convolution", function, reference, *cases(*SMALL[:3], 1))
    elements, size = math.prod(shape), DTYPE.itemsize
    sets = cases(*shape, set_count(3 * size * elements, bench.rotated_bytes))
    work = {"forward": Work(2 * size * elements), "backward": Work(3 * size * elements)}
    operation = Operation(function, sets, work, {"forward": (1.5, 1.2), "backward": (2.5, 1.6)})
    name = "B {}, D {}, L {}".format(*shape)
    return against_floor(bench, "conv", "causal convolution", errors, [(name, operation)])


def norm(bench: Bench, shapes: Sequence[tuple[int, int, int]] = ((128, 197, 192), (128, 197, 384))) -> Section:
    """Residual add + RMSNorm, a bfloat16 branch and a float32 residual, against a copy: x, residual, y and the sum; or
    dy, the sum and its gradient, dx and dresidual."""

    def cases(shape: tuple[int, ...], count: int) -> list[Case]:
        def inputs() -> dict[str, Tensor]:
            x, residual, weight = torch.randn(shape, dtype=DTYPE), torch.randn(shape), torch.randn(shape[-1])
            return {name: t.requires_grad_() for name, t in (("x", x), ("residual", residual), ("weight", weight))}

        with bench.device:
            return [Case(inputs(), (torch.randn(shape, dtype=DTYPE), torch.randn(shape))) for _ in range(count)]

    options = {"bias": None, "prenorm": True}
    function, reference = (partial(rms_norm_fn, **options, use_cuda_kernel=switch) for switch in (None, False))
    errors = require_accuracy("norm", function, reference, *cases((2, 67, 64), 1))

    def operations() -> Iterator[tuple[str, Operation]]:
        half, full = DTYPE.itemsize, torch.float32.itemsize
        for shape in shapes:
            elements = math.prod(shape)
            sets = cases(shape, set_count(2 * (half + full) * elements, bench.rotated_bytes))
            work = {
                "forward": Work((2 * half + 2 * full) * elements),
                "backward": Work((2 * half + 3 * full) * elements),
            }
            yield "B {}, L {}, D {}".format(*shape), Operation(function, sets, work, {})

    return against_floor(bench, "norm", "add + RMSNorm", errors, operations())


# ---- model ---------------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """A model against a peer.

    required: (must, aim) of images/s over the peer's, by pass. memory: (must, aim) of the peak of a training step over
    the peer's, or None. eager: whether it is also timed without CUDA graphs.
    """

    name: str
    peer: str
    size: int
    batch: int
    required: dict[str, tuple[float, float]]
    memory: tuple[float, float] | None = None
    eager: bool = False


EQUAL = {"forward": (0.45, 0.7), "training step": (0.45, 0.7)}
COMPARISONS = (
    Comparison("vim_tiny", "deit_tiny_patch16_224", 224, 128, EQUAL, memory=(1.2, 0.8), eager=True),
    Comparison("vim_small", "vit_small_patch16_224", 224, 128, EQUAL, eager=True),
    Comparison("vim_tiny", "deit_tiny_patch16_224", 512, 16, {"forward": (0.7, 0.9)}),
    Comparison("vim_tiny", "deit_tiny_patch16_224", 1248, 2, {"forward": (1.2, 1.6)}),
)


def create_and_weigh(bench: Bench, name: str, comparison: Comparison) -> tuple[nn.Module, list[Tensor], int]:
    """The model, images to rotate among, and the bytes that they and a training step take at most together."""
    reset_memory_peak(bench.device)
    before = memory_peak(bench.device)
    with bench.device:
        module = Autocast(create(name, comparison.size, bench.method), DTYPE)
        images = [torch.randn(comparison.batch, 3, comparison.size, comparison.size) for _ in range(2)]
    step = training_step(module, images)
    for _ in images:
        step()
    return module, images, memory_peak(bench.device) - before


def model(bench: Bench, comparisons: Sequence[Comparison] = COMPARISONS) -> Section:
    """Images per second and memory of Vim and of its peer."""
    figures: dict[str, Any] = {"method": bench.method, "runs": []}
    title = f"model, {bench.method}, bfloat16 autocast"
    columns = ["", "ms", "images/s", "over peer", "middle half", "peak memory, GiB", "eager, ms", "/ graph"]
    table = Table(title, columns, note="Training step: forward, loss, backward. Memory: of a training step, eager.")
    checks = []
    for comparison in comparisons:
        name, peer, size, batch, required, weighed, is_eager = comparison
        label = f"{name}, {size}², batch {batch}"
        models = {key: create_and_weigh(bench, key, comparison) for key in (name, peer)}
        peaks = {key: peak for key, (_, _, peak) in models.items()}
        for pass_, make in (("forward", inference), ("training step", training_step)):
            calls = {key: make(module, images) for key, (module, images, _) in models.items()}
            timings = bench.measure(f"model, {label}, {pass_}", calls, 2)
            eager = bench.measure(f"model, {label}, {pass_}, eager", calls, 2, bench.eager) if is_eager else {}
            ratios = {key: ratio(timings[peer], timing) for key, timing in timings.items()}
            over_graph = {key: eager[key].median / timings[key].median for key in eager}
            for key, timing in timings.items():
                row = [f"{pass_}, {size}², batch {batch}: {key}", milliseconds(timing)]
                row += [significant(batch / timing.median), *(("", "") if key == peer else ratios[key].cells())]
                row.append(significant(peaks[key] / 2**30) if pass_ == "training step" else "")
                row += [milliseconds(eager[key]), significant(over_graph[key])] if eager else ["", ""]
                table.rows.append(row)
            figures["runs"].append(
                {
                    **comparison._asdict(),
                    "pass": pass_,
                    "timings": {key: timing.summary() for key, timing in timings.items()},
                    "images_per_s": {key: batch / timing.median for key, timing in timings.items()},
                    "over_peer": {key: asdict(value) for key, value in ratios.items()},
                    "peak_memory_bytes": peaks,
                    "eager": {key: timing.summary() for key, timing in eager.items()},
                    "eager_over_graph": over_graph,
                }
            )
            if pass_ in required:
                checks.append(Check(f"{label}, {pass_}: images/s over {peer}", ratios[name].value, *required[pass_]))
            if eager:
                checks.append(Check(f"{label}, {pass_}: eager / graph", over_graph[name], 1.3, at_most=True))
        if weighed is not None:
            memory = peaks[name] / peaks[peer]
            checks.append(Check(f"{label}, training step: memory over {peer}", memory, *weighed, at_most=True))
    return Section("model", figures, [table], checks)


# ---- the command ---------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Bench], Section]] = {f.__name__: f for f in (scan, methods, conv, norm, model)}


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "revision": revision(),
    }


def require_gpu() -> torch.device:
    """The current device; ends the program where kernels would not run on it."""
    if not torch.cuda.is_available():
        sys.exit("This measures the CUDA kernels, but torch sees no CUDA device; benchmarks/cpu.py measures the CPU's")
    device = torch.device("cuda", torch.cuda.current_device())
    if not use_kernel(torch.empty(0, device=device)):
        reason = unavailable["cuda"] or f"{ENVIRONMENT_VARIABLE}=0 asks for the reference"
        sys.exit(f"This measures the CUDA kernels, but {reason}")
    return device


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="default: all")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "benchmarks-gpu", metavar="DIR")
    parser.add_argument("--method", choices=METHODS, default="zoh", help="in scan and model")
    parser.add_argument("--rounds", type=int, default=15, help="at least 2; default: 15")
    args = parser.parse_args(argv)
    if args.rounds < 2:
        parser.error(f"--rounds: got {args.rounds}; expected at least 2")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    device = require_gpu()
    console = Console(width=None if sys.stdout.isatty() else 160)
    torch.manual_seed(0)
    torch.cuda.set_stream(torch.cuda.Stream())
    args.output.mkdir(parents=True, exist_ok=True)
    info = machine(device)
    console.print("\n".join(f"{key}: {value}" for key, value in info.items()), highlight=False)
    record = {"machine": info, "settings": {"rounds": args.rounds}}
    checks = []

    def report(section: Section, started: str) -> None:
        write(section, {**record, "started": started}, args.output)
        for table in section.tables:
            console.print(table.rich())
        checks.extend(section.checks)

    clock = GraphClock()
    resident = 16 * info["multiprocessors"]  # programs of 128 threads
    limits, section = measure_ceilings(clock, console, device, args.rounds, 2**30, 4 * resident, 64)
    report(section, now())
    bench = Bench(device, limits, clock, EagerClock(device, 0.2), args.method, args.rounds, 0.05, 2**28, console)
    for name in args.section:
        started = now()
        report(SECTIONS[name](bench), started)
    (args.output / "checks.md").write_text(check_table(checks).markdown(), encoding="utf-8")
    console.print(check_table(checks).rich())
    console.print(f"Written to {args.output}", highlight=False)


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


if __name__ == "__main__":
    main()
