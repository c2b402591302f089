"""Builds the operator libraries; everything else about the package is in pyproject.toml.

Two plain shared libraries against torch's stable C ABI, loaded with ``torch.ops.load_library``. They link neither
Python nor libtorch's C++ ABI, so one binary serves every Python and every torch >= 2.11:

    mamba_ssm/_C_cpu.so     csrc/*/*_cpu*.cpp                needs a C++20 compiler
    mamba_ssm/_C_cuda.so    csrc/*/*.cu, csrc/*/*_cuda*.cpp  needs nvcc too

What cannot be compiled is left out with one warning, and the package then runs on its PyTorch reference.

Environment:
    MAMBA_SSM_BUILD       auto (the default): the CPU library; the CUDA library where there is nvcc and a use for it: a
                          GPU here, or TORCH_CUDA_ARCH_LIST. cuda: both, or an error. cpu: the first. none: neither.
    TORCH_CUDA_ARCH_LIST  the GPUs to compile for, such as "9.0;10.0+PTX"; default: those of CUDA_ARCHITECTURES that the
                          nvcc knows, some minutes of compilation for each
    CXX, NVCC, MAX_JOBS   the C++ compiler, the CUDA compiler, and how many compilations run at one time
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
NVCC_FLAGS = ["-std=c++20", "-O3", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden"]
# Python loads libtorch with local scope: without --no-as-needed its symbols would not be found.
LINK_FLAGS = ["-shared", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"


def sources(*patterns: str) -> list[str]:
    folders = ("common", "selective_scan", "causal_conv1d", "layer_norm", "mixer")
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


def architecture_flags(nvcc: list[str]) -> list[str]:
    flags = []
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    known = subprocess.run([*nvcc, "--list-gpu-arch"], check=True, text=True, capture_output=True).stdout.split()
    for arch in (asked or CUDA_ARCHITECTURES).replace(" ", ";").split(";"):
        number = arch.removesuffix("+PTX").replace(".", "")
        if not asked and f"compute_{number}" not in known:
            continue
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class BuildLibraries(build_ext):
    """Compiles the sources in parallel and links each library; a missing compiler is a warning, not an error, unless
    MAMBA_SSM_BUILD=cuda asks for everything."""

    def build_extensions(self) -> None:
        wanted = os.environ.get("MAMBA_SSM_BUILD", "auto")
        if wanted not in ("auto", "cuda", "cpu", "none"):
            raise SystemExit(f"MAMBA_SSM_BUILD={wanted!r}: expected auto, cuda, cpu or none")
        reference = "these operators will run on the (slow) PyTorch reference"
        cxx = find_compiler("CXX", "c++", "g++", "clang++")
        nvcc = find_compiler("NVCC", "nvcc", "/usr/local/cuda/bin/nvcc")
        for extension in self.extensions:
            is_cuda = extension.name.endswith("_cuda")
            reason = None
            if wanted == "none" or (wanted == "cpu" and is_cuda):
                reason = f"MAMBA_SSM_BUILD={wanted}"
            elif cxx is None:
                reason = "no C++ compiler found (install g++ and install again)"
            elif not knows_cxx20(cxx):
                reason = f"{shlex.join(cxx)} cannot compile C++20"
            elif is_cuda:
                reason = self.obstacle_to_cuda(nvcc, wanted)
            if reason is None:
                self.build_library(extension, cxx, nvcc)
            elif wanted == "cuda":
                raise SystemExit(f"MAMBA_SSM_BUILD=cuda, but {extension.name} cannot be built: {reason}")
            else:
                where = "on CUDA tensors " if is_cuda else ""
                warn(f"{reason}: {extension.name} is not built; {where}{reference}")

    def obstacle_to_cuda(self, nvcc: list[str] | None, wanted: str) -> str | None:
        """Why the CUDA library cannot be built, or need not be; None if nothing speaks against it."""
        import torch

        if nvcc is None:
            return "no nvcc found"
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA"
        if wanted == "auto" and not torch.cuda.is_available() and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            return "no GPU here, and TORCH_CUDA_ARCH_LIST (such as 9.0) does not name one"
        return None

    def build_library(self, extension: Extension, cxx: list[str], nvcc: list[str] | None) -> None:
        import torch
        from torch.utils.cpp_extension import include_paths

        is_cuda = extension.name.endswith("_cuda")
        nvcc_flags = [*NVCC_FLAGS, *architecture_flags(nvcc)] if is_cuda else []
        defines = [*DEFINES, "-DUSE_CUDA"] if is_cuda else DEFINES
        own_headers = f"-I{ROOT / 'csrc' / 'common'}"
        torch_headers = [f"-isystem{path}" for path in include_paths()]

        def compile_source(source: str) -> str:
            output = Path(self.build_temp, source).with_suffix(".o")
            headers = [*ROOT.glob("csrc/common/*.h"), *(ROOT / source).parent.glob("*.*h")]
            if "mixer" in source:  # which is made of the others
                headers += ROOT.glob("csrc/*/*.h")
            inputs = [ROOT / source, ROOT / "setup.py", *headers]
            if output.exists() and output.stat().st_mtime > max(path.stat().st_mtime for path in inputs):
                return str(output)
            output.parent.mkdir(parents=True, exist_ok=True)
            cxx_flags = [*CXX_FLAGS, *defines, *torch_headers]  # what nvcc compiles knows nothing of torch
            compiler = [*nvcc, *nvcc_flags] if source.endswith(".cu") else [*cxx, *cxx_flags]
            command = [*compiler, own_headers, "-c", str(ROOT / source), "-o", str(output)]
            print(" ".join(command), flush=True)
            subprocess.run(command, check=True)
            return str(output)

        jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(compile_source, extension.sources))
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        linker = [*nvcc, "-Xcompiler=-fPIC"] if is_cuda else cxx
        link_flags = [f"-L{Path(torch.__file__).parent / 'lib'}", *LINK_FLAGS]
        if is_cuda:
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
