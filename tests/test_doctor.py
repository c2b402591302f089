"""`python -m mamba_ssm.doctor`: what it prints and its exit status, in every state of the libraries."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mamba_ssm import _backend, doctor
from mamba_ssm.ops.discretization_ref import METHODS

ROOT = Path(__file__).resolve().parent.parent

needs_kernel = pytest.mark.needs_kernel


def in_a_process(folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(folder), **environment}
    command = [sys.executable, "-m", "mamba_ssm.doctor"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@needs_kernel
def test_all_is_well():
    result = in_a_process()
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ("mamba_ssm", "python", "torch", "torchvision", "timm"):
        assert f"\n  {name} " in result.stdout
    assert torch.__version__ in result.stdout
    assert f"loaded, instruction set {torch.ops.mamba_ssm.cpu_isa()}" in result.stdout
    assert "compiled kernels: _C_cpu.so is loaded" in result.stdout
    for operator in (*(f"selective_scan {method} " for method in METHODS), "causal_conv1d", "rms_norm"):
        (line,) = [line for line in result.stdout.splitlines() if line.startswith(f"  {operator}")]
        assert "ok, largest error" in line
    assert result.stdout.endswith("\nconsistent\n")
    assert result.stdout.isascii() and "\x1b" not in result.stdout  # plain where there is no terminal
    assert result.stderr == ""


@needs_kernel
@pytest.mark.parametrize(
    ("value", "expected"), [("0", "PyTorch reference: VIM_USE_CUDA_KERNEL=0"), ("1", "refused: VIM_USE_CUDA_KERNEL=1")]
)
def test_it_respects_the_environment(value, expected, monkeypatch, capsys):
    monkeypatch.setenv("VIM_USE_CUDA_KERNEL", value)
    assert doctor.main() == 0
    output = capsys.readouterr().out
    assert expected in output and "loaded, instruction set" in output
    assert "nothing to compare" in output


@needs_kernel
@pytest.mark.parametrize("wrong", [1e-3, torch.nan])
def test_a_wrong_kernel_is_found(wrong, monkeypatch, capsys):
    kernel = doctor.selective_scan_fn

    def broken(*tensors, discretization_method, **options):
        out = kernel(*tensors, discretization_method=discretization_method, **options)
        return out * (1 + wrong) if discretization_method == "rk4" else out

    monkeypatch.setattr(doctor, "selective_scan_fn", broken)
    assert doctor.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if "WRONG" in line] == ["rk4"]
    assert lines[-1].startswith("not consistent")


@needs_kernel
def test_a_failing_kernel_is_reported(monkeypatch, capsys):
    def fail(*tensors, **options):
        raise RuntimeError("no such [instruction]")

    monkeypatch.setattr(doctor, "causal_conv1d_fn", fail)
    assert doctor.main() == 1
    assert "failed: no such [instruction]" in capsys.readouterr().out


@needs_kernel
def test_an_instruction_set_the_processor_lacks():
    result = in_a_process(MAMBA_SSM_CPU_ISA="avx1024")
    assert result.returncode == 1
    assert "loaded, but MAMBA_SSM_CPU_ISA=avx1024 is not one of" in result.stdout


@pytest.mark.parametrize(
    ("content", "status", "expected"),
    [
        (None, 0, "not loaded: _C_cpu.so was not built"),
        (b"no library", 1, "built, not loaded: _C_cpu.so could not be loaded"),
    ],
)
def test_library_missing_or_damaged(content, status, expected, tmp_path):
    for package in ("mamba_ssm", "causal_conv1d"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if content is not None:
        (tmp_path / "mamba_ssm" / "_C_cpu.so").write_bytes(content)
    result = in_a_process(tmp_path)
    assert result.returncode == status, result.stdout + result.stderr
    assert str(tmp_path) in result.stdout and expected in result.stdout
    assert "PyTorch reference: _C_cpu.so" in result.stdout and "nothing to compare" in result.stdout
    assert result.stderr == ""


def test_a_terminal_gets_a_table(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert doctor.show("title", [("name", "text", True)]) is True
    assert "│ name │ text │" in capsys.readouterr().out
    assert doctor.show("title", [("name", "[text]", False), ("other", "text", True)]) is False
    assert "[text]" in capsys.readouterr().out


def test_every_library_has_a_row():
    assert [name for name, _, _ in doctor.libraries()] == list(_backend.LIBRARIES.values())
