"""benchmarks/gpu.py: its floors, its arguments, and every section at tiny sizes on the CPU. Speed is not tested."""

import importlib
import io
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mamba_ssm.ops.discretization_ref import METHODS

pytest.importorskip("triton", reason="the ceilings are measured with Triton")

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def gpu():
    """The module, with the kernels of the ceilings in Triton's interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("ceilings")
        patch.delenv("TRITON_INTERPRET")
        yield importlib.import_module("gpu")


@pytest.fixture(scope="module")
def bench(gpu):
    clock, console = gpu.EagerClock(CPU, 0.0), Console(file=io.StringIO())
    found, section = gpu.measure_ceilings(clock, console, CPU, 2, copied=2**16, programs=2, repeats=1)
    assert section.figures["exp2"] == 2 * 1024 * 16 / section.figures["timings"]["exp2"]["median_s"]
    assert section.figures["bytes"] == 2 * 2**16 / section.figures["timings"]["bytes"]["median_s"]
    return gpu.Bench(CPU, found, clock, clock, "bilinear", rounds=2, slice_s=0.0, rotated_bytes=2**15, console=console)


def assert_timing(timing):
    first, third = timing["quartiles_s"]
    assert 0 < timing["min_s"] <= first <= timing["median_s"] <= third
    assert timing["calls"] >= timing["rounds"] == 2


def assert_against_floor(bench, section, names, checked):
    assert list(section.figures["operations"]) == names
    for operation in section.figures["operations"].values():
        for name in ("forward", "backward"):
            record = operation[name]
            assert_timing(record)
            floors = [record["work"][key] / getattr(bench.ceilings, key) for key in ("bytes", "exp2", "fma")]
            assert record["floor_s"] == max(floors) > 0
            assert record["over_floor"] == record["median_s"] / record["floor_s"]
    assert len(section.checks) == checked
    (table,) = section.tables
    assert [row[0] for row in table.rows] == names
    assert all(len(row) == len(table.columns) for row in table.rows)


@pytest.mark.parametrize(
    ("shape", "forward", "backward"),
    [
        ((128, 384, 197, 16), 38, 68),
        ((128, 768, 197, 16), 76, 136),
        ((64, 1536, 197, 16), 76, 136),
        ((16, 384, 1025, 16), 25, 44),
        ((8, 384, 4097, 16), 49, 88),
        ((1, 384, 16385, 16), 25, 44),
    ],
)
def test_floor_of_the_scan(gpu, shape, forward, backward):
    """Microseconds on an H200: 4.27 TB/s copied, 4.10 T exponentials/s, 32 T multiply-adds/s."""
    ceilings = gpu.Ceilings(bytes=4.27e12, exp2=4.10e12, fma=32e12)
    work = gpu.scan_work(gpu.Shape(*shape), itemsize=2)
    assert round(work["forward"].floor(ceilings) * 1e6) == forward
    assert round(work["backward"].floor(ceilings) * 1e6) == backward
    one_state = gpu.scan_work(gpu.Shape(*shape[:3], 1), itemsize=2)  # then bytes are the floor
    batch, channels, length, _ = shape
    assert one_state["forward"].floor(ceilings) * 4.27e12 == pytest.approx(2 * batch * length * (4 * channels + 2))
    assert one_state["backward"].floor(ceilings) * 4.27e12 == pytest.approx(2 * batch * length * (7 * channels + 4))


def test_scan(gpu, bench):
    shapes = {gpu.Shape(2, 8, 9, 4): gpu.IMAGES, gpu.Shape(1, 8, 33, 4): {}}
    section = gpu.scan(bench, shapes)
    assert_against_floor(bench, section, [str(shape) for shape in shapes], checked=2)
    assert [(check.must, check.aim, check.at_most) for check in section.checks] == [(1.6, 1.3, True), (2.6, 1.8, True)]
    assert section.figures["operations"]["B 2, D 8, L 9, N 4"]["input_sets"] > 1


def test_methods(gpu, bench):
    section = gpu.methods(bench, gpu.Shape(2, 8, 9, 4))
    assert section.figures["errors"].keys() == set(METHODS)
    assert section.figures["passes"].keys() == {"forward", "forward + backward"}
    for result in section.figures["passes"].values():
        assert result.keys() == {*METHODS, "zoh again"}
        for timing in result.values():
            assert_timing(timing)
            assert timing["over_zoh"]["value"] == timing["median_s"] / result["zoh"]["median_s"]
    slowest = max(timing["over_zoh"]["value"] for timing in result.values() if timing is not result["zoh again"])
    assert (section.checks[1].value, section.checks[1].must, section.checks[1].aim) == (slowest, 1.35, 1.15)


def test_conv_and_norm(gpu, bench):
    assert_against_floor(bench, gpu.conv(bench, (2, 8, 9)), ["B 2, D 8, L 9"], checked=2)
    assert_against_floor(bench, gpu.norm(bench, [(2, 9, 8)]), ["B 2, L 9, D 8"], checked=0)


def test_model(gpu, bench, tmp_path, monkeypatch):
    # What a CPU process holds says nothing: memory that earlier tests freed is used again. A GPU's tensors are counted.
    counter = itertools.count(1)
    monkeypatch.setattr(gpu, "memory_peak", lambda device: next(counter) ** 2 * 2**20)
    both = {"forward": (0.5, 0.7), "training step": (0.5, 0.7)}
    comparison = gpu.Comparison("vim_tiny", "deit_tiny_patch16_224", 32, 2, both, memory=(1.2, 0.8), eager=True)
    section = gpu.model(bench, [comparison])
    for run in section.figures["runs"]:
        times = {name: timing["median_s"] for name, timing in run["timings"].items()}
        for name in ("vim_tiny", "deit_tiny_patch16_224"):
            assert_timing(run["timings"][name])
            assert run["images_per_s"][name] == 2 / times[name]
            assert run["over_peer"][name]["value"] == times["deit_tiny_patch16_224"] / times[name]
            assert run["eager_over_graph"][name] == run["eager"][name]["median_s"] / times[name]
        assert run["peak_memory_bytes"] == {"vim_tiny": (4 - 1) * 2**20, "deit_tiny_patch16_224": (16 - 9) * 2**20}
    assert [check.at_most for check in section.checks] == [False, True, False, True, True]
    peaks = run["peak_memory_bytes"]
    assert section.checks[-1].value == peaks["vim_tiny"] / peaks["deit_tiny_patch16_224"]

    gpu.write(section, {"machine": "this one"}, tmp_path)
    written = json.loads((tmp_path / "model.json").read_text())
    assert written["machine"] == "this one" and len(written["checks"]) == 5
    lines = (tmp_path / "model.md").read_text().splitlines()
    assert lines[0].startswith("**model, bilinear") and sum(line.startswith("| ") for line in lines) == 2 + 4


def test_no_speed_for_a_wrong_kernel(gpu, bench):
    (case,) = gpu.scan_cases(gpu.SMALL, dtype=torch.bfloat16)
    right, wrong = gpu.scan_with("zoh", gpu.selective_scan_ref), gpu.scan_with("rk4", gpu.selective_scan_ref)
    errors = gpu.require_accuracy("the same", right, right, case)
    assert 0 < errors.kernel == errors.reference < 0.01
    with pytest.raises(SystemExit, match=r"another: the kernel's error is .*a wrong kernel has no speed"):
        gpu.require_accuracy("another", wrong, right, case)


def test_arguments(gpu, capsys):
    assert gpu.parse_args([]).section == ["scan", "methods", "conv", "norm", "model"]
    assert gpu.parse_args(["--section", "conv", "scan"]).section == ["conv", "scan"]
    for arguments, message in (
        (["--section", "everything"], "invalid choice: 'everything'"),
        (["--rounds", "1"], "--rounds: got 1; expected at least 2"),
        (["--method", "euler"], "invalid choice: 'euler'"),
    ):
        with pytest.raises(SystemExit):
            gpu.parse_args(arguments)
        assert message in capsys.readouterr().err


def run(*arguments, **environment):
    command = [sys.executable, str(FOLDER / "gpu.py"), *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600)


def test_refuses_without_a_gpu():
    result = run(CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("This measures the CUDA kernels, but torch sees no CUDA device")


@pytest.mark.cuda
def test_graph_clock(gpu, bench):
    """A replay covers the sets of inputs a whole number of times, for 2 ms or more."""
    with torch.cuda.stream(torch.cuda.Stream()):
        tensors, calls = torch.zeros(3, 1000, device="cuda"), []

        def call():
            calls.append(len(calls) % 3)
            tensors[calls[-1]].add_(1)

        clock = gpu.GraphClock()
        prepared = clock.prepare(call, 3)
        tensors.zero_()
        seconds = clock.seconds(prepared)
        assert prepared.calls % 3 == 0 and seconds * prepared.calls > 1e-3
        assert torch.equal(tensors, torch.full_like(tensors, prepared.calls / 3))
        timings = replace(bench, clock=clock).measure("add", {"add": call}, 3)
        assert 0 < timings["add"].median < 1e-3


@pytest.mark.cuda
def test_the_command(tmp_path):
    result = run("--section", "conv", "norm", "--rounds", "2", "--output", str(tmp_path))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    ceilings = json.loads((tmp_path / "ceilings.json").read_text())["figures"]
    assert min(ceilings["bytes"], ceilings["exp2"], ceilings["fma"]) > 1e11
    for name in ("conv", "norm"):
        assert json.loads((tmp_path / f"{name}.json").read_text())["machine"]["gpu"]
    assert "causal convolution" in (tmp_path / "checks.md").read_text()
