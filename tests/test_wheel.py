"""scripts/build_wheel.sh: one wheel for every Python, with the libraries and nothing that does not belong in it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

import mamba_ssm

needs_kernel = pytest.mark.needs_kernel
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mamba_ssm", "causal_conv1d", "vim", "seg", "det")
LIBRARY = Path(mamba_ssm.__file__).with_name("_C_cpu.so")

# In the compiler's place: compiling takes minutes, and another test sees to it. Linking yields the library that is
# installed.
COMPILER = """#!/bin/sh
case " $* " in
    *" -fsyntax-only "*) exit 0 ;;
    *" -shared "*) source={library} ;;
    *) source=/dev/null ;;
esac
while [ "$1" != -o ]; do shift; done
cp "$source" "$2"
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What a build reads and what may lie beside it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    for name in (*PACKAGES, "csrc", "scripts", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    stale = folder / "build" / "lib.linux-x86_64-cpython-39" / "vim" / "removed_long_ago.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    compiler = folder / "compiler"
    compiler.write_text(COMPILER.format(library=LIBRARY))
    compiler.chmod(0o755)
    return folder


def build_wheel(checkout, **environment):
    kept = {key: value for key, value in os.environ.items() if key not in ("NVCC", "MAMBA_SSM_BUILD", "PYTHONPATH")}
    environment = {**kept, "PYTHON": sys.executable, "CXX": str(checkout / "compiler"), **environment}
    command = [checkout / "scripts" / "build_wheel.sh", "wheels"]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def wheel(checkout):
    result = build_wheel(checkout, MAMBA_SSM_BUILD="cpu")
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-2000:]
    (path,) = (checkout / "wheels").iterdir()
    assert result.stdout.splitlines()[-1] == str(path)
    return path


@needs_kernel
def test_serves_every_python(wheel):
    assert re.fullmatch(r"vision_mamba_discretizations-[\d.]+-py3-none-(many)?linux_\w+\.whl", wheel.name)
    (metadata,) = (name for name in ZipFile(wheel).namelist() if name.endswith(".dist-info/WHEEL"))
    lines = ZipFile(wheel).read(metadata).decode().splitlines()
    assert "Root-Is-Purelib: false" in lines
    assert [line for line in lines if line.startswith("Tag: ")] == [f"Tag: {wheel.stem.split('-', 2)[2]}"]


@needs_kernel
def test_holds_the_packages_and_the_library_alone(wheel, checkout):
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert archive.read("mamba_ssm/_C_cpu.so") == LIBRARY.read_bytes()
    assert {name.split("/")[0] for name in names} == set(PACKAGES)
    assert [name for name in names if name.endswith(".so")] == ["mamba_ssm/_C_cpu.so"]
    modules = {str(path.relative_to(checkout)) for package in PACKAGES for path in checkout.glob(f"{package}/**/*.py")}
    assert {name for name in names if name.endswith(".py")} == modules


@needs_kernel
def test_unpacked_it_runs_its_kernels(wheel, tmp_path):
    with ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    result = subprocess.run(
        [sys.executable, "-m", "mamba_ssm.doctor"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"in {tmp_path / 'mamba_ssm'}" in result.stdout
    assert re.search(r"_C_cpu.so +loaded", result.stdout)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NVCC": "/nonexistent/nvcc"}, "_C_cuda cannot be built: no nvcc found"),
        ({"MAMBA_SSM_BUILD": "none"}, "MAMBA_SSM_BUILD='none': a wheel is made with cuda or cpu"),
        ({"PYTHON": "/nonexistent/python"}, "'/nonexistent/python' lacks torch"),
    ],
)
def test_refuses_what_would_make_a_useless_wheel(environment, message, checkout):
    result = build_wheel(checkout, **environment)
    assert result.returncode == 1
    assert re.search(message, result.stderr)


def test_a_library_that_was_not_built_is_an_error(checkout):
    result = build_wheel(checkout, MAMBA_SSM_BUILD="cpu", CXX="/nonexistent/c++")
    assert result.returncode == 1
    assert "should hold ['mamba_ssm/_C_cpu.so']" in result.stderr
