"""Builds the operator libraries; everything else about the package is in pyproject.toml.

Two plain shared libraries against torch's stable C ABI, loaded with ``torch.ops.load_library``. They link neither
Python nor libtorch's C++ ABI, so one binary serves every Python and every torch >= 2.11:

    mamba_ssm/_C_cpu.so     csrc/*/*_cpu*.cpp                needs a C++20 compiler
    mamba_ssm/_C_cuda.so    csrc/*/*.cu, csrc/*/*_cuda*.cpp  needs nvcc too

What cannot be compiled is left out with one warning, and the package then runs on its PyTorch reference.

Environment: MAMBA_SSM_BUILD = auto | cpu | none (default auto), CXX the C++ compiler, NVCC the CUDA compiler,
TORCH_CUDA_ARCH_LIST the GPUs (such as "9.0;10.0+PTX"), MAX_JOBS the number of parallel compilations.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# The oldest torch whose stable ABI the libraries use, encoded as in torch/headeronly/version.h.
DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
CXX_FLAGS += [
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-signed-zeros",
    "-fno-trapping-math",
]  # NaN and Inf stay exact
NVCC_FLAGS = ["-std=c++20", "-O3", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA"]
# Python loads libtorch with local scope: without --no-as-needed its symbols would not be found.
LINK_FLAGS = ["-shared", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"


def sources(*patterns: str) -> list[str]:
    folders = ("common", "selective_scan", "causal_conv1d", "layer_norm")
    found = (path for folder in folders for pattern in patterns for path in (ROOT / "csrc" / folder).glob(pattern))
    return sorted(str(path.relative_to(ROOT)) for path in found)


def warn(message: str) -> None:
    print(f"mamba_ssm: WARNING: {message}", file=sys.stderr, flush=True)


def find_compiler(variable: str, *names: str) -> list[str] | None:
    """The command that the environment variable names, launcher such as ccache included, or the first name found."""
    command = shlex.split(os.environ[variable]) if variable in os.environ else [n for n in names if shutil.which(n)][:1]
    return command if command and shutil.which(command[0]) else None


def knows_cxx20(cxx: list[str]) -> bool:
    probe = "#include <concepts>\ntemplate <class T> requires std::integral<T> T same(T x) { return x; }\n"
    command = [*cxx, "-std=c++20", "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(command, input=probe, text=True, capture_output=True).returncode == 0


def architecture_flags() -> list[str]:
    flags = []
    for arch in os.environ.get("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES).replace(" ", ";").split(";"):
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class BuildLibraries(build_ext):
    """Compiles the sources in parallel and links each library; a missing compiler is a warning, not an error."""

    def build_extensions(self) -> None:
        wanted = os.environ.get("MAMBA_SSM_BUILD", "auto")
        if wanted not in ("auto", "cpu", "none"):
            raise SystemExit(f"MAMBA_SSM_BUILD={wanted!r}: expected auto, cpu or none")
        reference = "these operators will run on the (slow) PyTorch reference"
        cxx = find_compiler("CXX", "c++", "g++", "clang++")
        nvcc = find_compiler("NVCC", "nvcc", "/usr/local/cuda/bin/nvcc")
        for extension in self.extensions:
            is_cuda = extension.name.endswith("_cuda")
            if wanted == "none" or (wanted == "cpu" and is_cuda):
                warn(f"MAMBA_SSM_BUILD={wanted}: {extension.name} is not built; {reference}")
            elif cxx is None:
                warn(
                    f"no C++ compiler found: {extension.name} is not built; {reference}. Install g++ and install again"
                )
            elif not knows_cxx20(cxx):
                warn(f"{shlex.join(cxx)} cannot compile C++20: {extension.name} is not built; {reference}")
            elif is_cuda and nvcc is None:
                warn(f"no nvcc found: {extension.name} is not built; on CUDA tensors {reference}")
            else:
                self.build_library(extension, cxx, nvcc)

    def build_library(self, extension: Extension, cxx: list[str], nvcc: list[str] | None) -> None:
        import torch
        from torch.utils.cpp_extension import include_paths

        includes = [f"-I{ROOT / 'csrc' / 'common'}", *(f"-isystem{path}" for path in include_paths())]

        def compile_source(source: str) -> str:
            output = Path(self.build_temp, source).with_suffix(".o")
            headers = [*ROOT.glob("csrc/common/*.h"), *(ROOT / source).parent.glob("*.*h")]
            inputs = [ROOT / source, ROOT / "setup.py", *headers]
            if output.exists() and output.stat().st_mtime > max(path.stat().st_mtime for path in inputs):
                return str(output)
            output.parent.mkdir(parents=True, exist_ok=True)
            compiler = [*nvcc, *NVCC_FLAGS, *architecture_flags()] if source.endswith(".cu") else [*cxx, *CXX_FLAGS]
            command = [*compiler, *DEFINES, *includes, "-c", str(ROOT / source), "-o", str(output)]
            print(" ".join(command), flush=True)
            subprocess.run(command, check=True)
            return str(output)

        jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(compile_source, extension.sources))
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        linker = [*nvcc, "-Xcompiler=-fPIC"] if extension.name.endswith("_cuda") else cxx
        link_flags = [f"-L{Path(torch.__file__).parent / 'lib'}", *LINK_FLAGS]
        if extension.name.endswith("_cuda"):
            link_flags = [f.replace("-Wl,", "-Xlinker=") for f in [*link_flags, "-ltorch_cuda"]]
        subprocess.run([*linker, *objects, *link_flags, "-o", str(target)], check=True)

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))


class PythonIndependentWheel(bdist_wheel):
    """For every Python 3, on a Linux with this one's C library or a later."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()[2]
        libc, version = platform.libc_ver()
        if libc == "glibc" and tag.startswith("linux"):
            tag = f"many{tag}".replace("linux", f"linux_{version.replace('.', '_')}")
        return "py3", "none", tag


# Optional: an installation without the libraries is complete, and runs on the reference.
extensions = [Extension("mamba_ssm._C_cpu", sources("*_cpu*.cpp"), optional=True)]
if cuda_sources := sources("*.cu", "*_cuda*.cpp"):
    extensions.append(Extension("mamba_ssm._C_cuda", cuda_sources, optional=True))

setup(ext_modules=extensions, cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PythonIndependentWheel})
