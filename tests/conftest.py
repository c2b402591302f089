"""What all tests share: one thread, a seed, an environment without our switches, and the rule for missing kernels."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, here and in the processes that tests start

import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from mamba_ssm import _backend

INSTRUCTION_SETS = ("generic", "avx2", "avx512")  # from the least to the best


def pytest_configure(config):
    config.addinivalue_line("markers", "needs_kernel: tests the compiled CPU library; fails where it could be built")


@pytest.hookimpl(tryfirst=True)  # before the fixtures, which may call the kernels
def pytest_runtest_setup(item):
    """A missing CPU library is a failure, unless there is no compiler to build it with."""
    reason = _backend.unavailable["cpu"]
    if reason is None or item.get_closest_marker("needs_kernel") is None:
        return
    if any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        pytest.fail(f"{reason}. There is a compiler: run `python setup.py build_ext --inplace`", pytrace=False)
    pytest.skip(f"{reason}; there is no compiler here")


@pytest.fixture(autouse=True)
def same_start_for_every_test():
    """One thread (models this small only lose time to more), the same random numbers, the default choice of backend.

    A test may set the number of threads; it is put back afterwards.
    """
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as environment:  # its own, which a test's monkeypatch.undo() does not undo
        environment.delenv(_backend.ENVIRONMENT_VARIABLE, raising=False)
        yield
    torch.set_num_threads(1)


@pytest.fixture(params=INSTRUCTION_SETS)
def rerun_on_instruction_set(request):
    """A function (expression) that runs the tests of this file that pytest's -k selects again, in a process of its own,
    with the kernels of another instruction set than the one that all tests run on: the processor's best."""
    chosen = torch.ops.mamba_ssm.cpu_isa()
    if request.param == chosen:
        pytest.skip(f"all tests run on {chosen}")
    if INSTRUCTION_SETS.index(request.param) > INSTRUCTION_SETS.index(chosen):
        pytest.skip(f"this processor has no {request.param}")

    def rerun(expression: str) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-x", str(request.path), "-k", expression]
        environment = {**os.environ, "MAMBA_SSM_CPU_ISA": request.param}
        result = subprocess.run(
            [*command, "-p", "no:cacheprovider"], env=environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]

    return rerun
