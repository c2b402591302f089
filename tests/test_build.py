"""The build: the discretizations compile for a GPU, a missing compiler is a warning, instruction sets stay apart."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mamba_ssm.ops.discretization_ref import METHODS

ROOT = Path(__file__).resolve().parent.parent
NVCC = shutil.which(os.environ.get("NVCC", "nvcc"))
CXX = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc here")
def test_discretizations_compile_for_a_gpu(tmp_path):
    source = ROOT / "csrc" / "tests" / "discretization_device.cu"
    command = [NVCC, "-std=c++20", "-arch=sm_90", "-cubin", "-Xptxas", "-v", "-o", str(tmp_path / "out.cubin")]
    result = subprocess.run([*command, str(source)], capture_output=True, text=True)
    log = result.stdout + result.stderr
    assert result.returncode == 0, log
    for kernel in ("forward", "gradient"):  # one of each for every method
        entries = re.findall(rf"Compiling entry function '_ZN9mamba_ssm\d+{kernel}I\w+' for 'sm_90'", log)
        assert len(entries) == len(METHODS)
    assert "warning" not in log
    assert not re.search(r"[1-9]\d* bytes spill", log)


def resource_report(source: Path, folder: Path) -> str:
    """What the assembler says of a source's kernels, compiled for sm_90 without a warning."""
    command = [NVCC, "-std=c++20", "-O3", "-gencode=arch=compute_90,code=sm_90", "-cubin", "-Xptxas", "-v"]
    command += [f"-I{ROOT / 'csrc' / 'common'}", "-o", str(folder / "out.cubin"), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    log = result.stdout + result.stderr
    assert result.returncode == 0, log
    assert "warning" not in log
    return log


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc here")
def test_the_scans_fast_path_keeps_to_its_registers(tmp_path):
    """As launch_config.h has it, three blocks of the kernels fit on a multiprocessor of 65,536 registers, or 16 warps
    where states are spread over lanes, without spilling."""
    log = resource_report(ROOT / "csrc" / "tests" / "scan_fast_path.cu", tmp_path)
    reports = re.findall(r"Compiling entry function '\w*scan_(\w+)_kernel.*?Used (\d+) registers", log, re.DOTALL)
    assert sorted(kernel for kernel, _ in reports) == ["backward", "backward_sums", "forward", "spread", "spread"]
    for kernel, registers in reports:
        assert int(registers) <= (128 if kernel == "spread" else 168), kernel
    assert log.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == len(reports)


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc here")
def test_add_norm_keeps_to_its_registers(tmp_path):
    """Where lanes of a warp share a row: no spills, with three blocks of 256 threads on a multiprocessor of 65,536
    registers forward and one of 512 backward. Half types beside a float32 residual, and float32 alone."""
    log = resource_report(ROOT / "csrc" / "layer_norm" / "norm_kernels.cu", tmp_path)
    for kernel, most in (("forward", 80), ("backward", 128)):
        reports = re.findall(
            rf"Compiling entry function '\w*norm_{kernel}_kernel\w*Known\w*Li(?:16|32)E\w*'.*?Used \d+ registers",
            log,
            re.DOTALL,
        )
        assert len(reports) == 6
        for report in reports:
            assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
            assert int(re.search(r"Used (\d+)", report)[1]) <= most, report


@pytest.fixture
def checkout(tmp_path) -> Path:
    """What a build reads, in a folder of its own."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "mamba_ssm", "causal_conv1d", "vim"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def build(checkout: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    kept = {k: v for k, v in os.environ.items() if k not in ("CXX", "NVCC", "MAMBA_SSM_BUILD", "TORCH_CUDA_ARCH_LIST")}
    result = subprocess.run(command, cwd=checkout, env={**kept, **environment}, capture_output=True, text=True)
    assert not list(checkout.glob("mamba_ssm/*.so"))
    return result


@pytest.mark.parametrize(
    ("environment", "cause"),
    [
        ({"MAMBA_SSM_BUILD": "none"}, "MAMBA_SSM_BUILD=none"),
        ({"CXX": "/nonexistent"}, "no C++ compiler found"),
        ({"PATH": "/nonexistent"}, "no C++ compiler found"),
    ],
)
def test_without_a_compiler_the_build_succeeds_with_one_warning(environment, cause, checkout):
    result = build(checkout, **environment)
    assert result.returncode == 0, result.stderr
    (warning,) = [line for line in result.stderr.splitlines() if "WARNING" in line and "_C_cpu" in line]
    assert cause in warning and "reference" in warning


def test_an_unknown_kind_of_build_is_an_error(checkout):
    result = build(checkout, MAMBA_SSM_BUILD="garbage")
    assert result.returncode != 0
    assert "MAMBA_SSM_BUILD='garbage': expected auto, cuda, cpu or none" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(CXX is None, reason="there is no C++ compiler here")
def test_a_source_that_does_not_compile_is_an_error(checkout):
    """Only a missing compiler is forgiven: a failing one must not quietly leave the slow reference."""
    for source in checkout.glob("csrc/*/*.cpp"):
        source.write_text('#error "broken on purpose"\n')
    result = build(checkout, MAMBA_SSM_BUILD="cpu")
    assert result.returncode != 0 and "broken on purpose" in result.stderr


@pytest.mark.skipif(CXX is None or shutil.which("nm") is None, reason="there is no C++ compiler or no nm here")
@pytest.mark.parametrize("source", sorted(ROOT.glob("csrc/*/*_cpu_avx*.cpp")), ids=lambda path: path.stem)
def test_no_instruction_set_lends_functions_to_another(source, tmp_path):
    """The linker keeps one copy of an inline function: compiled for AVX-512, it would crash processors without.

    So each object may define functions in the namespace of its instruction set only. -O1 inlines less than the build's
    -O3, and compiles sooner.
    """
    isa = source.stem.rsplit("_", 1)[1]
    target = tmp_path / "out.o"
    command = [
        CXX,
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-Wno-psabi",
        f"-I{ROOT / 'csrc' / 'common'}",
        "-c",
        str(source),
        "-o",
        target,
    ]
    subprocess.run(command, check=True)
    symbols = subprocess.run(["nm", "-C", "--defined-only", target], check=True, capture_output=True, text=True).stdout
    defined = [line.split(maxsplit=2)[1:] for line in symbols.splitlines()]
    functions = [name for kind, name in defined if kind in "TWuVi" and not name.startswith("DW.ref.")]
    assert functions or "__x86_64__" not in symbols
    foreign = [name for name in functions if f"mamba_ssm::{isa}::" not in name]
    assert foreign == []
