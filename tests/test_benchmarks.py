"""benchmarks/cpu.py at its smallest sizes: every section runs and writes what it says. Speed is not tested."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mamba_ssm.ops.discretization_ref import METHODS

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "cpu.py"
SECTIONS = ("ceiling", "scan", "methods", "length", "model", "breakdown")
PASSES = {"forward", "forward + backward"}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> dict[str, dict]:
    """The JSON of all sections, of one run."""
    folder = tmp_path_factory.mktemp("benchmarks")
    result = run("--quick", "--threads", "1", "--rounds", "2", "--output", str(folder))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    for name in SECTIONS:
        assert (folder / f"{name}.md").read_text().startswith("**")
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in SECTIONS}


def assert_timing(timing: dict) -> None:
    first, third = timing["quartiles_s"]
    assert 0 < timing["min_s"] <= first <= timing["median_s"] <= third
    assert timing["calls"] >= timing["rounds"] == 2


@pytest.mark.needs_kernel
@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_says_what_it_measured_and_where(records, name):
    record = records[name]
    assert record["section"] == name
    assert record["settings"] == {"quick": True, "threads": 1, "rounds": 2}
    assert {"cpu", "cores", "kernel_instructions", "torch", "revision"} <= record["machine"].keys()
    for check in record["checks"]:
        reached = check["value"] <= check["must"] if check["at_most"] else check["value"] >= check["must"]
        assert check["met"] is reached


@pytest.mark.needs_kernel
def test_ceiling(records):
    figures = records["ceiling"]["figures"]
    for run_ in figures["runs"]:
        assert_timing(run_)
    best = max(run_["rate"] for run_ in figures["runs"] if run_["unit"] == "FMA/s")
    assert figures["fma_per_s"] == best and figures["copy_bytes_per_s"] > 0


@pytest.mark.needs_kernel
def test_scan_and_the_kernel_is_faster_than_the_reference(records):
    figures = records["scan"]["figures"]
    state_steps = math.prod(figures["shape"].values())
    assert figures["passes"].keys() == PASSES
    assert figures["error"] <= 1e-4
    for result in figures["passes"].values():
        for timing in result["timings"].values():
            assert_timing(timing)
        kernel, reference = (result["timings"][name]["median_s"] for name in ("kernel", "reference"))
        assert result["speedups"]["reference"]["value"] == pytest.approx(reference / kernel)
        assert result["state_steps_per_s_per_core"] == pytest.approx(state_steps / kernel)
        assert kernel < reference


@pytest.mark.needs_kernel
def test_methods_cover_the_table(records):
    figures = records["methods"]["figures"]
    assert figures["passes"].keys() == PASSES
    for result in figures["passes"].values():
        assert result.keys() == {*METHODS, "zoh again"}
        for timing in result.values():
            assert_timing(timing)
            assert timing["over_zoh"]["value"] == pytest.approx(timing["median_s"] / result["zoh"]["median_s"])


@pytest.mark.needs_kernel
def test_length_doubles_and_its_memory_is_that_of_the_tensors(records):
    figures = records["length"]["figures"]
    lengths, peaks = figures["lengths"], figures["peak_memory_bytes"]
    assert all(b == 2 * a for a, b in itertools.pairwise(lengths))
    for timings in figures["passes"].values():
        assert len(timings) == len(lengths)
        for timing in timings:
            assert_timing(timing)
    # u, z, delta and the gradient of out come in, out, du, dz and ddelta go out: at least these, and never N times them
    tensor = 4 * figures["shape"]["batch"] * figures["shape"]["channels"] * lengths[-1]
    assert 7 * tensor < peaks[-1] < 14 * tensor


@pytest.mark.needs_kernel
def test_model(records):
    for result in records["model"]["figures"]["runs"]:
        models = {"vim_tiny", "deit_tiny_patch16_224"}
        assert models <= result["timings"].keys()
        for name, timing in result["timings"].items():
            assert_timing(timing)
            assert result["images_per_s"][name] == pytest.approx(2 / timing["median_s"])
        # The patch embedding 768 → 192; 24 layers of in_proj 192 → 768, two x_proj 384 → 44, two dt_proj 12 → 384,
        # out_proj 384 → 192 on 2 images of 4 patches and a class token; and the head.
        per_token = 192 * 768 + 2 * 384 * 44 + 384 * 192  # dt_proj is part of the scan
        assert result["matrix_product_fma"] == 2 * 4 * 768 * 192 + 24 * 2 * 5 * per_token + 2 * 192 * 1000


@pytest.mark.needs_kernel
def test_breakdown_adds_up_and_finds_our_operators(records):
    for result in records["breakdown"]["figures"]["passes"].values():
        groups = result["groups_s"]
        ours = ("mixers", "norm", "matrix products")
        assert all(groups[name] > 0 for name in ours)
        assert sum(groups.values()) == pytest.approx(result["seconds"], rel=0.05)


def test_refuses_to_measure_the_reference():
    result = run("--quick", VIM_USE_CUDA_KERNEL="0")
    assert result.returncode == 1
    assert "This measures the CPU kernels" in result.stderr
