"""Speed and size of image models: `python -m vim.benchmark --models vim_tiny deit_tiny_patch16_224 --methods zoh rk4`.

Every model of timm's registry × method (Vision Mamba only) × image size × batch size, in one table: images per second,
median latency, peak memory, parameters and FLOPs. Models have random weights and no stochastic depth; images are noise.

- Latency is the median over calls for at least --seconds, by torch.utils.benchmark, which waits for the GPU. The call
  is a forward pass in inference mode, or with --train forward, cross-entropy and backward, no optimizer. With
  --cuda-graph it is a replay of the call as a CUDA graph: the GPU's own time, without Python's.
- Peak memory: on a GPU the most that the tensors of this model and its images took during such calls, what was there
  before them taken off; on the CPU the most that the whole process held (None where the system has no /proc), so that
  the rows before count too.
- FLOPs are per image, of the same call, by torch.utils.flop_counter: a multiply-add counts as two, elementwise
  operations and norms count as nothing. See `count_flops`.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Measurement, Timer
from torch.utils.flop_counter import FlopCounterMode

from mamba_ssm._backend import is_out_of_memory
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.discretization_ref import METHODS, PAPER_METHODS
from vim.config import is_vision_mamba
from vim.provenance import environment
from vim.trained import UsageError, choose_device, require_known_model

METHOD_GROUPS = {"all": tuple(METHODS), "paper": PAPER_METHODS}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


Step = Callable[[nn.Module, Tensor], None]


class BenchmarkError(UsageError):
    """Something that was asked for cannot be measured; the message says why."""


class FlopsUnknown(BenchmarkError):
    """The operations that ran cannot all be counted."""


@dataclass(frozen=True)
class Row:
    """What was measured of one model; None: not to be had, `note` says why.

    latency_s: median seconds of one call on the whole batch; quartiles_s: of the same calls, `calls` in number.
    memory_bytes: peak. flops: per image.
    """

    model: str
    method: str | None
    input_size: int
    batch_size: int
    parameters: int
    images_per_s: float | None = None
    latency_s: float | None = None
    quartiles_s: tuple[float, float] | None = None
    calls: int | None = None
    memory_bytes: int | None = None
    flops: int | None = None
    note: str | None = None


def inference(model: nn.Module, images: Tensor) -> None:
    with torch.inference_mode():
        model(images)


def training_step(model: nn.Module, images: Tensor) -> None:
    """Forward, loss and backward; no optimizer."""
    logits = model(images)
    F.cross_entropy(logits.float(), torch.zeros(len(images), dtype=torch.long, device=images.device)).backward()
    model.zero_grad()


def count_flops(model: nn.Module, images: Tensor, train: bool = False) -> int:
    """Operations of one call on a batch of images, (B, C, H, W), by `torch.utils.flop_counter`.

    The call is `inference`, or with train a `training_step`, what it computes again included. Attention runs as matrix
    products meanwhile: the counter has no formula for every fused kernel.
    Raises FlopsUnknown where a Mamba mixer runs on the PyTorch reference, whose scan is elementwise operations: the
    counter takes these for nothing.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        (training_step if train else inference)(model.train(train), images)
    counts = counter.get_flop_counts()
    for name, module in model.named_modules(prefix=type(model).__name__):
        scans = {torch.ops.mamba_ssm.mixer_fwd, torch.ops.mamba_ssm.selective_scan_fwd}
        if isinstance(module, Mamba) and not scans & counts.get(name, {}).keys():
            raise FlopsUnknown(
                f"FLOPs: {name.partition('.')[2]} ran on the PyTorch reference, whose scan cannot be counted: unset "
                "VIM_USE_CUDA_KERNEL and use_cuda_kernel, and see python -m mamba_ssm.doctor for a missing library"
            )
    return counter.get_total_flops()


def create(name: str, method: str | None, input_size: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A model of timm's registry for images of input_size² pixels, with random weights.

    Raises BenchmarkError where the model cannot be built for that size.
    """
    options = {} if method is None else {"discretization_method": method, "drop_path_rate": 0.0}  # timm's default is 0
    if _takes_image_size(name):
        options["img_size"] = input_size
    try:
        model = timm.create_model(name, **options)
    except (ValueError, AssertionError, TypeError) as error:
        raise BenchmarkError(f"{name} cannot be built for --input-size {input_size}: {error}") from error
    return model.to(device, dtype)


def _takes_image_size(name: str) -> bool:
    """Models that are not told take any size."""
    config = timm.get_pretrained_cfg(name)
    return is_vision_mamba(name) or (config is not None and config.fixed_input_size)


def measure(
    name: str,
    method: str | None,
    input_size: int,
    batch_size: int,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    amp_dtype: torch.dtype | None = None,
    train: bool = False,
    seconds: float = 2.0,
    cuda_graph: bool = False,
) -> Row:
    """One row of the table; a model that does not fit into the GPU's memory gives one with a note.

    cuda_graph: time replays of a CUDA graph of the call; `device` must be a GPU then.
    Raises BenchmarkError where the model cannot be built or does not take such images.
    """
    with _alone_on(device):
        options = {"device": device, "dtype": dtype, "amp_dtype": amp_dtype, "train": train}
        return _measure(name, method, input_size, batch_size, **options, seconds=seconds, cuda_graph=cuda_graph)


@contextmanager
def _alone_on(device: torch.device) -> Iterator[None]:
    """What earlier rows left is freed. On a GPU, calls are on a stream that a graph can be captured from."""
    gc.collect()  # a model whose forward is wrapped refers to itself
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()  # they lie among the tensors, and the first row would pay for all
        torch.cuda.empty_cache()
        with torch.cuda.stream(torch.cuda.Stream()):
            yield
        torch.cuda.synchronize()


def _measure(
    name: str,
    method: str | None,
    input_size: int,
    batch_size: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    amp_dtype: torch.dtype | None,
    train: bool,
    seconds: float,
    cuda_graph: bool,
) -> Row:
    held_before = _allocated(device)
    model = create(name, method, input_size, device, dtype).train(train)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    row = Row(name, method, input_size, batch_size, parameters)
    images = torch.randn(batch_size, 3, input_size, input_size, device=device, dtype=dtype)
    step = training_step if train else inference
    if amp_dtype is not None:  # of the forward pass alone
        model.forward = torch.autocast(device.type, amp_dtype)(model.forward)
    try:
        step(model, images)  # what is chosen, compiled or allocated with the first call
        _reset_peak_memory(device)
        step(model, images)
        memory = _peak_memory(device, held_before)
        timing = _timing(step, model, images, seconds, cuda_graph)
        flops, note = _flops_per_image(model, images[:2], train)  # two: batch norm in training wants more than one
    except (RuntimeError, ValueError, AssertionError) as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            return replace(row, note=f"{name}, {batch_size} images of {input_size}² pixels: out of memory on {device}")
        raise BenchmarkError(
            f"{name} failed on {batch_size} images of {input_size}² pixels on {device}: {error}"
        ) from error
    return replace(
        row,
        images_per_s=batch_size / timing.median,
        latency_s=timing.median,
        quartiles_s=tuple(np.quantile(timing.times, (0.25, 0.75)).tolist()),
        calls=len(timing.times) * timing.number_per_run,
        memory_bytes=memory,
        flops=flops,
        note=note,
    )


def _timing(step: Step, model: nn.Module, images: Tensor, seconds: float, cuda_graph: bool) -> Measurement:
    statement, names = "step(model, images)", {"step": step, "model": model, "images": images}
    if cuda_graph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graph takes memory of its own
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            step(model, images)
        statement, names = "graph.replay()", {"graph": graph}
    timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds)


def _flops_per_image(model: nn.Module, images: Tensor, train: bool) -> tuple[int | None, str | None]:
    try:
        return count_flops(model, images, train) // len(images), None
    except FlopsUnknown as error:
        return None, str(error)


def _reset_peak_memory(device: torch.device) -> None:
    clear = Path("/proc/self/clear_refs")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif clear.exists():
        clear.write_text("5")  # sets VmHWM to what is resident now


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _peak_memory(device: torch.device, held_before: int) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) - held_before
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line)


# ---- what is shown and written ---------------------------------------------------------------------------------------


COLUMNS = (
    "model",
    "method",
    "size",
    "batch",
    "images/s",
    "latency, ms",
    "memory, MiB",
    "parameters, M",
    "GFLOPs/image",
)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.model,
        row.method or "",
        str(row.input_size),
        str(row.batch_size),
        _figure(row.images_per_s, 1, ".1f"),
        _figure(row.latency_s, 1e-3, ".2f"),
        _figure(row.memory_bytes, 2**20, ".0f"),
        _figure(row.parameters, 1e6, ".2f"),
        _figure(row.flops, 1e9, ".3f"),
    )


def table(rows: Sequence[Row], title: str) -> Table:
    result = Table(title=title, title_justify="left")
    for i, column in enumerate(COLUMNS):
        result.add_column(column, justify="left" if i < 2 else "right")
    for row in rows:
        result.add_row(*_cells(row))
    return result


def markdown(rows: Sequence[Row], title: str) -> str:
    """One table for each image and batch size, in the order in which they first come, and the notes."""
    head = [name for name in COLUMNS if name not in ("size", "batch")]
    parts = [f"**{title}**"]
    for size, batch in dict.fromkeys((row.input_size, row.batch_size) for row in rows):
        of_size = [_cells(row) for row in rows if (row.input_size, row.batch_size) == (size, batch)]
        lines = [head, ["---", "---", *["---:"] * (len(head) - 2)], *(cells[:2] + cells[4:] for cells in of_size)]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts.append(f"{size}×{size} pixels, batch {batch}:\n\n{table}")
    return "\n\n".join([*parts, *_notes(rows)]) + "\n"


def _notes(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.note for row in rows if row.note))


def _figure(value: float | None, unit: float, form: str) -> str:
    return "–" if value is None else format(value / unit, form)


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Images per second and peak memory over the image size, a line per model, method and batch size."""
    import matplotlib  # here, so that only --plot needs it

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    panels = (("images/s", "images_per_s", 1), ("peak memory, MiB", "memory_bytes", 2**20))
    for ax, (label, field, unit) in zip(axes, panels, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            if (value := getattr(row, field)) is not None:
                name = " ".join(filter(None, (row.model, row.method, f"×{row.batch_size}")))
                lines.setdefault(name, []).append((row.input_size, value / unit))
        for name, points in lines.items():
            ax.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        sizes = sorted({row.input_size for row in rows})
        ax.set(xlabel="image size, pixels", ylabel=label, xscale="log", yscale="log")
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number of at least 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a number above 0")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vim.benchmark",
        description="Images/s, latency, peak memory, parameters and FLOPs of image models.",
        allow_abbrev=False,
    )
    parser.add_argument("--models", nargs="+", default=["vim_tiny"], metavar="NAME", help="any of timm's registry")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["zoh"],
        metavar="METHOD",
        help="discretizations of Vision Mamba; all; paper: its six",
    )
    parser.add_argument("--input-size", nargs="+", type=_positive, default=[224], metavar="PIXELS", help="side")
    parser.add_argument("--batch-size", nargs="+", type=_positive, default=[8], metavar="IMAGES")
    parser.add_argument(
        "--pair", action="store_true", help="the first size with the first batch size, and so on; else all with all"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: cuda if there is a GPU, else cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and images")
    parser.add_argument("--amp-dtype", choices=("bfloat16", "float16"), help="autocast")
    parser.add_argument("--train", action="store_true", help="a training step instead of inference")
    parser.add_argument("--cuda-graph", action="store_true", help="time replays of a CUDA graph; needs a GPU")
    parser.add_argument("--seconds", type=_seconds, default=2.0, help="at least this long a row (default: 2)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="rows, settings and versions; written after every row"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the table; written after every row")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    return parser


def _check(args: argparse.Namespace) -> None:
    for name in args.models:
        require_known_model(name, "--models")
    for name in args.methods:
        if name not in METHODS:
            choices = ", ".join(METHODS)
            raise BenchmarkError(f"--methods: unknown method {name!r}; choose of {choices}, or all, or paper")
    if args.pair and len(args.input_size) != len(args.batch_size):
        raise BenchmarkError(
            f"--pair: got {len(args.input_size)} image sizes and {len(args.batch_size)} batch sizes; "
            "give as many --batch-size as --input-size"
        )
    for option, path in (("--json", args.json), ("--markdown", args.markdown), ("--plot", args.plot)):
        if path is not None and not path.parent.is_dir():
            raise BenchmarkError(f"{option} {path}: there is no folder {path.parent}")
    if args.plot is not None and args.plot.suffix != ".png":
        raise BenchmarkError(f"--plot {args.plot}: its name must end in .png")
    if args.plot is not None and find_spec("matplotlib") is None:
        raise BenchmarkError("--plot needs matplotlib: pip install matplotlib")


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    args.methods = list(dict.fromkeys(m for name in args.methods for m in METHOD_GROUPS.get(name, (name,))))
    console = Console()
    try:
        _check(args)
        rows = _run(args, choose_device(args.device), console)
    except UsageError as error:
        print(f"vim.benchmark: error: {error}", file=sys.stderr)
        return 2
    for note in _notes(rows):
        console.print(note, highlight=False)
    return 0


def _run(args: argparse.Namespace, device: torch.device, console: Console) -> list[Row]:
    if args.cuda_graph and device.type != "cuda":
        raise BenchmarkError(f"--cuda-graph: the device is {device}; expected a GPU: leave it out, or --device cuda")
    hardware = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    precision = args.dtype + (f", autocast to {args.amp_dtype}" if args.amp_dtype else "")
    graph = ", CUDA graphs" if args.cuda_graph else ""
    title = f"{'training step' if args.train else 'inference'} on {hardware}, {precision}{graph}"
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    record = {"title": title, "settings": settings, "hardware": hardware, "environment": environment()}
    sizes = list((zip if args.pair else product)(args.input_size, args.batch_size))
    cases = [
        (name, method, size, batch)
        for name in args.models
        for method in (args.methods if is_vision_mamba(name) else [None])
        for size, batch in sizes
    ]
    rows: list[Row] = []
    for name, method, size, batch in cases:
        with console.status(" ".join(filter(None, (name, method, f"{size}² ×{batch}")))):
            row = measure(
                name,
                method,
                size,
                batch,
                device=device,
                dtype=DTYPES[args.dtype],
                amp_dtype=DTYPES[args.amp_dtype] if args.amp_dtype else None,
                train=args.train,
                seconds=args.seconds,
                cuda_graph=args.cuda_graph,
            )
        rows.append(row)
        if args.json is not None:
            args.json.write_text(json.dumps({**record, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
        if args.markdown is not None:
            args.markdown.write_text(markdown(rows, title), encoding="utf-8")
    console.print(table(rows, title))
    if args.plot is not None:
        plot(rows, title, args.plot)
    return rows


if __name__ == "__main__":
    sys.exit(main())
