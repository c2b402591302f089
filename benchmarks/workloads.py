"""What the benchmarks of the CPU and of the GPU time, and the files that they write."""

from __future__ import annotations

import itertools
import json
import math
import platform
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from measure import Check, Section, Table, Timing, milliseconds, ratio
from torch import Tensor, nn

import vim.models_mamba  # noqa: F401  (registers vim_tiny and vim_small with timm)
from mamba_ssm.ops.discretization_ref import METHODS
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

ROOT = Path(__file__).resolve().parent.parent


class Shape(NamedTuple):
    batch: int
    channels: int
    length: int
    states: int

    @property
    def state_steps(self) -> int:
        return math.prod(self)

    def __str__(self) -> str:
        return f"B {self.batch}, D {self.channels}, L {self.length}, N {self.states}"


# ---- passes of a differentiable function -----------------------------------------------------------------------------

Function = Callable[..., Tensor | tuple[Tensor, ...]]


class Case(NamedTuple):
    """Arguments of a function by name, all of them leaves, and the gradient of what it returns."""

    inputs: dict[str, Tensor]
    dout: Tensor | tuple[Tensor, ...]


def forward(function: Function, cases: Sequence[Case]) -> Callable[[], object]:
    """Calls the function without gradient, on the next of the cases each time."""
    rotating = itertools.cycle(cases)

    @torch.no_grad()
    def run() -> object:
        return function(**next(rotating).inputs)

    return run


def backward(function: Function, cases: Sequence[Case]) -> Callable[[], object]:
    """The gradients of all inputs alone; the forward passes run once, now."""
    rotating = itertools.cycle([(function(**case.inputs), case) for case in cases])

    def run() -> tuple[Tensor, ...]:
        out, (inputs, dout) = next(rotating)
        return torch.autograd.grad(out, list(inputs.values()), dout, retain_graph=True)

    return run


def forward_backward(function: Function, cases: Sequence[Case]) -> Callable[[], object]:
    rotating = itertools.cycle(cases)

    def run() -> tuple[Tensor, ...]:
        inputs, dout = next(rotating)
        return torch.autograd.grad(function(**inputs), list(inputs.values()), dout)

    return run


PASSES = {"forward": forward, "forward + backward": forward_backward}


class Errors(NamedTuple):
    """The largest relative error (norm over norm) of outputs and gradients against the reference in float64."""

    kernel: float
    reference: float


def require_accuracy(what: str, function: Function, reference: Function, case: Case) -> Errors:
    """Ends the program if the kernel's error is above twice that of the reference on the same inputs."""

    def results(function: Function, dtype: torch.dtype | None) -> list[Tensor]:
        inputs = {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in case.inputs.items()}
        out = function(**inputs)
        outs, douts = ((t,) if isinstance(t, Tensor) else t for t in (out, case.dout))
        return [*outs, *torch.autograd.grad(outs, list(inputs.values()), [d.to(dtype or d.dtype) for d in douts])]

    exact = results(reference, torch.float64)
    errors = Errors(
        *(
            max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(results(f, None), exact, strict=True))
            for f in (function, reference)
        )
    )
    if not errors.kernel <= 2 * errors.reference + 1e-6:
        sys.exit(
            f"{what}: the kernel's error is {errors.kernel:.2g}, the reference's {errors.reference:.2g}; "
            "a wrong kernel has no speed"
        )
    return errors


# ---- scan ------------------------------------------------------------------------------------------------------------


def scan_inputs(shape: Shape, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What a mixer hands to its scan: views of channel-last memory in dtype, and Δ and A as of a fresh model.

    Every view is a leaf: its gradient is the scan's own, and not widened to the tensor that it is a slice of.
    """
    batch, channels, length, states = shape
    rank = math.ceil(channels / 2 / 16)
    u, z = torch.randn(batch, length, 2 * channels, dtype=dtype).transpose(1, 2).chunk(2, dim=1)
    B, C = torch.randn(batch, length, rank + 2 * states, dtype=dtype)[..., rank:].transpose(1, 2).chunk(2, dim=1)
    step = torch.empty(channels).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
    inputs = {
        "u": u,
        "delta": torch.empty(batch, length, channels, dtype=dtype).normal_(std=0.1).transpose(1, 2),
        "A": -torch.arange(1.0, states + 1).repeat(channels, 1),
        "B": B,
        "C": C,
        "D": torch.ones(channels),
        "z": z,
        "delta_bias": step + torch.log(-torch.expm1(-step)),  # the inverse of softplus
    }
    return {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}


def set_count(bytes_per_set: int, rotated_bytes: int) -> int:
    """How many sets of inputs make up rotated_bytes: at least 1, at most 256."""
    return min(256, max(1, math.ceil(rotated_bytes / bytes_per_set)))


def scan_cases(shape: Shape, rotated_bytes: int = 0, dtype: torch.dtype = torch.float32) -> list[Case]:
    """Input sets to rotate among, of rotated_bytes together, on torch's default device."""
    batch, channels, length, states = shape
    count = set_count(dtype.itemsize * batch * length * (5 * channels + 2 * states), rotated_bytes)
    return [
        Case(scan_inputs(shape, dtype), torch.randn(batch, length, channels, dtype=dtype).transpose(1, 2))
        for _ in range(count)
    ]


def scan_with(method: str, scan: Function = selective_scan_fn) -> Function:
    return partial(scan, delta_softplus=True, discretization_method=method)


def against_zoh(
    measure: Callable[[str, dict[str, Callable[[], object]]], dict[str, Timing]],
    cases: Sequence[Case],
    title: str,
    must: float,
    aim: float | None = None,
) -> Section:
    """Every discretization against zoh; zoh runs twice, which shows the noise. must, aim: of the slowest method."""
    again = "zoh again"
    rows = {name: [name] for name in (*METHODS, again)}
    checks, passes = [], {}
    for name, make in PASSES.items():
        calls = {method: make(scan_with(method), cases) for method in METHODS}
        timings = measure(f"methods, {name}", {**calls, again: make(scan_with("zoh"), cases)})
        ratios = {key: ratio(timing, timings["zoh"]) for key, timing in timings.items()}
        for key, row in rows.items():
            row += [milliseconds(timings[key]), *ratios[key].cells()]
        slowest = max(METHODS, key=lambda method: ratios[method].value)
        checks.append(Check(f"{name}: {slowest} (the slowest) / zoh", ratios[slowest].value, must, aim, at_most=True))
        passes[name] = {key: {**t.summary(), "over_zoh": asdict(ratios[key])} for key, t in timings.items()}
    columns = ["", *(column for name in PASSES for column in (f"{name}, ms", "/ zoh", "middle half"))]
    return Section("methods", {"passes": passes}, [Table(title, columns, list(rows.values()))], checks)


# ---- model -----------------------------------------------------------------------------------------------------------


def create(name: str, size: int, method: str) -> nn.Module:
    """A model of timm's registry for images of size² pixels, without stochastic depth."""
    options = {"discretization_method": method} if name.startswith("vim_") else {}
    return timm.create_model(name, img_size=size, drop_path_rate=0.0, **options)


def inference(model: nn.Module, images: Sequence[Tensor]) -> Callable[[], object]:
    rotating = itertools.cycle(images)

    @torch.inference_mode()
    def run() -> Tensor:
        if model.training:  # rounds of inference and of training take turns; setting it takes time
            model.eval()
        return model(next(rotating))

    return run


def training_step(model: nn.Module, images: Sequence[Tensor]) -> Callable[[], object]:
    """Forward, loss and backward; gradients are dropped as an optimizer does it, there is none."""
    rotating = itertools.cycle(images)
    parameters = list(model.parameters())

    def run() -> None:
        if not model.training:
            model.train()
        x = next(rotating)
        F.cross_entropy(model(x), torch.arange(len(x), device=x.device)).backward()
        for parameter in parameters:  # Module.zero_grad looks for them at every call: a tenth of an eager step
            parameter.grad = None

    return run


class Autocast(nn.Module):
    """The model under autocast; its gradients are computed outside, as they should be."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.dtype):
            return self.model(x).float()


# ---- memory ----------------------------------------------------------------------------------------------------------


CPU = torch.device("cpu")


def memory_peak(device: torch.device = CPU) -> int:
    """The most bytes in use since `reset_memory_peak`: of tensors on a GPU; else resident, of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # not ru_maxrss, which a child process inherits from its parent
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def reset_memory_peak(device: torch.device = CPU) -> None:
    """For the CPU, on Linux only."""
    if device.type == "cuda":
        return torch.cuda.reset_peak_memory_stats(device)
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


# ---- records ---------------------------------------------------------------------------------------------------------


def write(section: Section, record: dict[str, Any], folder: Path) -> None:
    record = {
        **record,
        "section": section.name,
        "checks": [{**asdict(check), "met": check.met} for check in section.checks],
        "figures": section.figures,
    }
    (folder / f"{section.name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / f"{section.name}.md").write_text("\n".join(t.markdown() for t in section.tables), encoding="utf-8")
