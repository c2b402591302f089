"""`python -m mamba_ssm.doctor`: what is installed, which backend serves which device, and whether each agrees with the
PyTorch reference.

Prints versions, the compiled libraries and the choice of backend, then runs every operator that a library provides on
small inputs and compares outputs and gradients with the reference's. Exit status 0 if all is consistent, 1 if a check
fails or a library that was built does not load. A library that was never built is no failure.
"""

import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

import mamba_ssm
from causal_conv1d import causal_conv1d_fn, causal_conv1d_ref
from mamba_ssm import _backend
from mamba_ssm.ops.discretization_ref import METHODS
from mamba_ssm.ops.selective_scan import selective_scan_fn
from mamba_ssm.ops.selective_scan_ref import selective_scan_ref
from mamba_ssm.ops.triton.layer_norm import rms_norm_fn, rms_norm_ref

TOLERANCE = 2e-5  # largest error beside the largest value, in float32

Function = Callable[..., Tensor]


def versions() -> Iterator[tuple[str, str]]:
    yield "mamba_ssm", f"{mamba_ssm.__version__} in {Path(mamba_ssm.__file__).parent}"
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'not compiled in'})"
    for name in ("torchvision", "timm"):
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "not installed"
    for i in range(torch.cuda.device_count()):
        yield f"GPU {i}", torch.cuda.get_device_name(i)


def libraries() -> Iterator[tuple[str, str, bool]]:
    """Name, state, and whether the state is one to live with."""
    for device, name in _backend.LIBRARIES.items():
        reason = _backend.unavailable[device]
        built = Path(_backend.__file__).with_name(name).exists()
        if reason is not None:
            needless = device == "cuda" and not torch.cuda.is_available()
            yield name, f"{'built, ' if built else ''}not loaded: {reason}", needless or not built
        elif device == "cpu":
            try:
                yield name, f"loaded, instruction set {torch.ops.mamba_ssm.cpu_isa()}", True
            except RuntimeError as error:
                yield name, f"loaded, but {error}", False
        else:
            yield name, "loaded", True


def backends() -> Iterator[tuple[str, bool, str]]:
    """Device type, whether its kernels run there by default, and why."""
    setting = os.environ.get(_backend.ENVIRONMENT_VARIABLE)
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # its content is what the table shows
                kernel = _backend.use_kernel(torch.empty(0, device=device))
        except (RuntimeError, ValueError) as error:
            yield device, False, f"refused: {error}"
            continue
        if setting:
            why = f"{_backend.ENVIRONMENT_VARIABLE}={setting}"
        else:
            why = _backend.unavailable[device] or f"{_backend.LIBRARIES[device]} is loaded"
        yield device, kernel, f"{'compiled kernels' if kernel else 'PyTorch reference'}: {why}"


def largest_error(kernel: Function, reference: Function, inputs: list[Tensor]) -> float:
    """Over the output and the gradient of every input: the largest difference beside the reference's largest value."""
    found = []
    for function in (kernel, reference):
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = function(*leaves)
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*found, strict=True))


def checks(device: str) -> Iterator[tuple[str, Function, Function, list[Tensor]]]:
    """Name, kernel, reference and inputs of each operator on that device."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    def activation() -> Tensor:  # channel-last, an odd number of steps, channels that fill no vector
        return randn(2, 37, 20).transpose(1, 2)

    u, delta, z = activation(), activation(), activation()
    A, B, C = -randn(20, 16).exp(), randn(2, 16, 37), randn(2, 16, 37)
    inputs = [u, delta, A, B, C, randn(20), z, randn(20)]
    for method in METHODS:
        options = {"delta_softplus": True, "discretization_method": method}
        kernel, reference = partial(selective_scan_fn, **options), partial(selective_scan_ref, **options)
        yield f"selective_scan {method}", kernel, reference, inputs
    kernel, reference = (partial(f, activation="silu") for f in (causal_conv1d_fn, causal_conv1d_ref))
    yield "causal_conv1d", kernel, reference, [u, randn(20, 4), randn(20)]
    yield "rms_norm", rms_norm_fn, rms_norm_ref, [randn(2, 37, 20), randn(20), randn(20)]


def check(kernel: Function, reference: Function, inputs: list[Tensor]) -> tuple[str, bool]:
    """The verdict in words, and whether it is good."""
    try:
        error = largest_error(kernel, reference, inputs)
    except RuntimeError as failure:
        return f"failed: {failure}", False
    if error <= TOLERANCE:
        return f"ok, largest error {error:.1e}", True
    return f"WRONG, largest error {error:.1e}, allowed {TOLERANCE:.0e}", False  # also for NaN


def show(title: str, rows: Iterable[tuple[str, str, bool]]) -> bool:
    """Print names, texts and verdicts, as a table on a terminal and as plain lines elsewhere; True if all are good."""
    table = Table(title=title, title_justify="left", show_header=False)
    plain, healthy = [title], True
    for name, text, good in rows:
        table.add_row(name, Text(text, style="" if good else "bold red"))
        plain.append(f"  {name:<32} {text}")
        healthy &= good
    if sys.stdout.isatty():
        Console().print(table)
    else:
        print(*plain, sep="\n")
    return healthy


def main() -> int:
    """Print the report on standard output; 0 if all is consistent, else 1."""
    show("versions", ((name, found, True) for name, found in versions()))
    healthy = show("compiled libraries", libraries())
    choices = list(backends())
    show("backends", ((device, why, True) for device, _, why in choices))
    in_use = [device for device, kernel, _ in choices if kernel]
    for device in in_use:
        rows = ((name, *check(*functions)) for name, *functions in checks(device))
        healthy &= show(f"{device} kernels against the reference, forward and backward", rows)
    if not in_use:
        print("No compiled kernels are in use: nothing to compare with the reference.")
    print("consistent" if healthy else "not consistent: something above is wrong or does not load")
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
