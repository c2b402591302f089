"""What a GPU can do at most, measured, and the least time that some work takes under these ceilings.

The ceilings are bytes copied, exponentials and multiply-adds per second. The two arithmetic rates come from Triton
kernels that stay in registers: eight independent chains per thread, all threads that a multiprocessor holds.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from clocks import Clock
from measure import Section, Table, measure_with_progress, significant
from rich.console import Console
from workloads import Shape

BLOCK = 1024  # of 4 warps: 8 elements per thread
UNROLLED = 16


@triton.jit
def exp2_kernel(out, REPEATS: tl.constexpr, UNROLLED: tl.constexpr, BLOCK: tl.constexpr):
    v = tl.arange(0, BLOCK) / BLOCK
    for _ in range(REPEATS):
        for _ in tl.static_range(UNROLLED):
            v = tl.exp2(-v)
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), v)


@triton.jit
def fma_kernel(out, REPEATS: tl.constexpr, UNROLLED: tl.constexpr, BLOCK: tl.constexpr):
    v = tl.arange(0, BLOCK) / BLOCK
    for _ in range(REPEATS):
        for _ in tl.static_range(UNROLLED):
            v = tl.fma(v, 0.5, 0.25)
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), v)


@triton.jit
def copy_kernel(source, target, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + place, tl.load(source + place))


class Ceilings(NamedTuple):
    """Per second: bytes read + written by a large copy, exponentials, fp32 multiply-adds."""

    bytes: float
    exp2: float
    fma: float


def candidates(device: torch.device, copied: int, programs: int, repeats: int) -> dict[str, Callable[[], object]]:
    """What to time: a copy of that many bytes, and programs · repeats · BLOCK · UNROLLED of each operation."""
    source = torch.randint(2**31, (copied // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    out = torch.empty(programs * BLOCK, device=device)
    return {
        # Not target.copy_(source): a memory copy in a CUDA graph runs at two thirds of what a kernel reaches.
        "bytes": partial(copy_kernel[(len(source) // BLOCK,)], source, target, BLOCK),
        "exp2": partial(exp2_kernel[(programs,)], out, repeats, UNROLLED, BLOCK),
        "fma": partial(fma_kernel[(programs,)], out, repeats, UNROLLED, BLOCK),
    }


def measure_ceilings(
    clock: Clock, console: Console, device: torch.device, rounds: int, copied: int, programs: int, repeats: int
) -> tuple[Ceilings, Section]:
    """The ceilings, and what there is to print and to record. copied, programs, repeats: see `candidates`."""
    calls = candidates(device, copied, programs, repeats)
    prepared = {name: clock.prepare(call, 1) for name, call in calls.items()}
    timings = measure_with_progress(console, "ceilings", prepared, rounds, 0.0, clock.seconds)
    operations = programs * repeats * BLOCK * UNROLLED
    work = {"bytes": 2 * copied, "exp2": operations, "fma": operations}
    found = Ceilings(**{name: amount / timings[name].median for name, amount in work.items()})
    table = Table("ceilings", ["", "per second"])
    units = ("bytes read + written, copy", "exp2, fp32", "multiply-adds, fp32")
    table.rows += [[unit, f"{significant(rate * 1e-12)} T"] for unit, rate in zip(units, found, strict=True)]
    figures = {**found._asdict(), "timings": {name: timing.summary() for name, timing in timings.items()}}
    return found, Section("ceilings", figures, [table])


# ---- floors --------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """What cannot be avoided: bytes read and written once, exponentials, multiply-adds."""

    bytes: float
    exp2: float = 0.0
    fma: float = 0.0

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds that it takes at least."""
        return max(amount / rate for amount, rate in zip(self, ceilings, strict=True))


def scan_work(shape: Shape, itemsize: int) -> dict[str, Work]:
    """Of a scan whose activations have itemsize bytes, by pass.

    A state-step is one exponential and 4 multiply-adds forward, 14 backward. Forward reads u, Δ, z and writes out;
    backward reads u, Δ, z, dout and writes du, dΔ, dz; beside them B and C, and backward their gradients. The
    exponentials and logarithms of softplus and gate, a quarter more at 16 states, are not counted."""
    steps, batch_steps = shape.state_steps, itemsize * shape.batch * shape.length
    return {
        "forward": Work(batch_steps * (4 * shape.channels + 2 * shape.states), steps, 4 * steps),
        "backward": Work(batch_steps * (7 * shape.channels + 4 * shape.states), steps, 14 * steps),
    }
