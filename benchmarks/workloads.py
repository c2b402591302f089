"""What the benchmarks of the CPU and of the GPU time, and the files that they write."""

from __future__ import annotations

import itertools
import json
import math
import platform
import resource
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from measure import Section
from torch import Tensor, nn

import vim.models_mamba  # noqa: F401  (registers vim_tiny and vim_small with timm)

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


class ScanCase(NamedTuple):
    inputs: dict[str, Tensor]
    dout: Tensor


def set_count(bytes_per_set: int, rotated_bytes: int) -> int:
    """How many sets of inputs make up rotated_bytes: at least 1, at most 256."""
    return min(256, max(1, math.ceil(rotated_bytes / bytes_per_set)))


def scan_cases(shape: Shape, rotated_bytes: int = 0, dtype: torch.dtype = torch.float32) -> list[ScanCase]:
    """Input sets to rotate among, of rotated_bytes together, on torch's default device."""
    batch, channels, length, states = shape
    count = set_count(dtype.itemsize * batch * length * (5 * channels + 2 * states), rotated_bytes)
    return [
        ScanCase(scan_inputs(shape, dtype), torch.randn(batch, length, channels, dtype=dtype).transpose(1, 2))
        for _ in range(count)
    ]


ScanFn = Callable[..., Tensor]


def forward(scan: ScanFn, cases: Sequence[ScanCase], method: str) -> Callable[[], object]:
    rotating = itertools.cycle(cases)

    @torch.no_grad()
    def run() -> Tensor:
        return scan(**next(rotating).inputs, delta_softplus=True, discretization_method=method)

    return run


def forward_backward(scan: ScanFn, cases: Sequence[ScanCase], method: str) -> Callable[[], object]:
    rotating = itertools.cycle(cases)

    def run() -> tuple[Tensor, ...]:
        inputs, dout = next(rotating)
        out = scan(**inputs, delta_softplus=True, discretization_method=method)
        return torch.autograd.grad(out, list(inputs.values()), dout)

    return run


# ---- model -----------------------------------------------------------------------------------------------------------


def create(name: str, size: int, method: str) -> nn.Module:
    """A model of timm's registry for images of size² pixels, without stochastic depth."""
    options = {"discretization_method": method} if name.startswith("vim_") else {}
    return timm.create_model(name, img_size=size, drop_path_rate=0.0, **options)


def inference(model: nn.Module, images: Sequence[Tensor]) -> Callable[[], object]:
    rotating = itertools.cycle(images)

    @torch.inference_mode()
    def run() -> Tensor:
        model.eval()
        return model(next(rotating))

    return run


def training_step(model: nn.Module, images: Sequence[Tensor]) -> Callable[[], object]:
    """Forward, loss and backward; no optimizer."""
    rotating = itertools.cycle(images)

    def run() -> None:
        model.train()
        x = next(rotating)
        F.cross_entropy(model(x), torch.arange(len(x), device=x.device)).backward()
        model.zero_grad()

    return run


# ---- memory ----------------------------------------------------------------------------------------------------------


def memory_peak() -> int:
    """The most bytes this process has had resident, on Linux since `reset_memory_peak`."""
    status = Path("/proc/self/status")
    if status.exists():  # not ru_maxrss, which a child process inherits from its parent
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def reset_memory_peak() -> None:
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


# ---- records ---------------------------------------------------------------------------------------------------------


def revision() -> str | None:
    def git(*command: str) -> str | None:
        try:
            result = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return result.stdout.strip()

    head = git("rev-parse", "HEAD")
    return f"{head} with local changes" if head and git("status", "--porcelain", "--untracked-files=no") else head


def write(section: Section, record: dict[str, Any], folder: Path) -> None:
    record = {
        **record,
        "section": section.name,
        "checks": [{**asdict(check), "met": check.met} for check in section.checks],
        "figures": section.figures,
    }
    (folder / f"{section.name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / f"{section.name}.md").write_text("\n".join(t.markdown() for t in section.tables), encoding="utf-8")
