"""What the tests of the CUDA kernels, on a GPU and emulated, share: how accurate they must be, steps of every size."""

from collections.abc import Callable

import pytest
import torch
from test_selective_scan_cpu import DTYPES, make_inputs
from torch import Tensor

from mamba_ssm.ops.discretization_ref import METHODS

FLOOR = 1e-6  # the fast exponential has errors up to 2^-22: eight units in the last place
HOLDS = ("foh", "poly", "highorder", "zoh_exact")
# (smallest, largest) |A|, and those of Δ. Which form of a method a chunk is scanned with depends on them.
SIZES = {
    "tiny": ((0.5, 4.0), (1e-6, 1e-5)),
    "small": ((1.0, 2.0), (2.0**-11, 2.0**-9)),
    "ordinary": ((0.5, 16.0), (0.01, 0.1)),
    "large": ((16.0, 64.0), (0.5, 3.0)),
}


def floor_of(dtype: torch.dtype, method: str) -> float:
    """The holds of half types take e^x − 1 as the difference leaves it, which shows in what is float32 beside them."""
    return 3e-5 if dtype != torch.float32 and method in HOLDS else FLOOR


def steps_of_one_size(size: str, method: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], float]:
    """Arguments of a scan without softplus in which nothing drowns the steps' own errors, and the floor for these."""
    inputs = make_inputs(batch=1, channels=24, length=27, states=16, dtype=dtype)
    for name in ("delta_bias", "initial_state", "D", "z"):
        del inputs[name]
    (least, most), (shortest, longest) = SIZES[size]
    if size == "large" and (method == "rk4" or method.endswith("_taylor")):  # c grows as x^3
        shortest, longest = shortest / 60, longest / 60
    inputs["A"] = -(least + (most - least) * torch.rand(24, 16))
    delta = inputs["delta"]
    inputs["delta"] = (shortest + (longest - shortest) * torch.rand_like(delta.float())).to(dtype)
    floor = max(
        floor_of(dtype, method), {"tiny": 1e-5, "small": 5e-6}.get(size, 3 * FLOOR)
    )  # small steps' errors add up
    if size == "small" and dtype != torch.float32 and method in HOLDS:
        floor = 2e-2  # of dA: what c has lost, 2^-11, counts as 1/x there
    return inputs, floor


def steps_of_all_sizes(method: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Chunks of steps of one size after another, and with exactly 0, which leave the state as it is."""
    inputs = make_inputs(batch=1, channels=40, length=40, states=16, dtype=dtype)
    inputs["A"] = -0.5 - 4 * torch.rand(40, 16)
    del inputs["delta_bias"]
    largest = 1.0 if method.endswith("_taylor") or method == "rk4" else 3.0
    sizes = torch.tensor([1e-5, 0.05, largest, 0.0]).repeat_interleave(8).tolist()
    sizes += [1e-5, 0.0, largest, 1e-3, 1e-2, 0.1, 0.5, 1.0]
    inputs["delta"] = (inputs["delta"].float().abs().clamp(0.5, 1) * torch.tensor(sizes)).to(dtype)
    return inputs


def steps_of_both_signs(dtype: torch.dtype) -> dict[str, Tensor]:
    """x of both signs, and 0: of a warp, channels with A <= 0 and chunks of Δ > 0 and of Δ < 0; of another, A > 0."""
    inputs = make_inputs(batch=1, channels=40, length=40, states=16, dtype=dtype)
    inputs["A"] = 0.5 + 1.5 * torch.rand(40, 16)
    inputs["A"][:32] *= -1
    inputs["A"][::5, 3] = 0.0
    del inputs["delta_bias"]
    signs = torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0]).repeat_interleave(8)
    inputs["delta"] = (inputs["delta"].float().abs().clamp(0.1, 0.5) * signs).to(dtype)
    return inputs


def huge_steps(dtype: torch.dtype) -> dict[str, Tensor]:
    """|x| from 1e2 to 1e5, of |A| below 0.5 and above."""
    inputs = make_inputs(batch=1, channels=40, length=27, states=16, dtype=dtype)
    for name in ("delta_bias", "initial_state", "D", "z"):
        del inputs[name]
    inputs["A"] = -(100.0 + 900.0 * torch.rand(40, 16))
    inputs["A"][32:] /= 3000.0
    inputs["delta"] = (10.0 + 90.0 * torch.rand_like(inputs["delta"].float())).to(dtype)
    inputs["delta"][:, 32:] *= 500.0  # what float16 can hold
    return inputs


def aligned(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with B and C as the fast path wants them: states innermost, at even offsets."""
    for name in "BC":
        batch, states, length = inputs[name].shape
        inputs[name] = torch.randn(batch, length, states + 4, dtype=inputs[name].dtype)[..., 4:].transpose(1, 2)
    return inputs


class StepTests:
    """Steps of every size, for the kernels that `check` compares with the reference."""

    check: Callable[..., None]

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("method", METHODS)
    def test_steps_of_one_size(self, method, dtype, size):
        inputs, floor = steps_of_one_size(size, method, dtype)
        self.check(aligned(inputs), method, reverse=dtype == torch.bfloat16, delta_softplus=False, floor=floor)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("method", METHODS)
    def test_steps_of_all_sizes(self, method, dtype):
        inputs, floor = aligned(steps_of_all_sizes(method, dtype)), max(3 * FLOOR, floor_of(dtype, method))
        self.check(inputs, method, delta_softplus=False, floor=floor)
        inputs["A"][:, 0] = -1e-3
        self.check(inputs, method, reverse=True, delta_softplus=False, floor=floor)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_steps_of_both_signs(self, dtype):
        for method in ("foh", "zoh_exact"):  # the former has a form for x <= 0 only
            floor = max(3 * FLOOR, floor_of(dtype, method))
            self.check(aligned(steps_of_both_signs(dtype)), method, delta_softplus=False, floor=floor)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_huge_steps(self, dtype):
        for method in ("foh", "zoh_exact"):
            floor = max(3 * FLOOR, floor_of(dtype, method))
            self.check(aligned(huge_steps(dtype)), method, delta_softplus=False, floor=floor)
