#!/usr/bin/env bash
# Makes one wheel for every Python and every torch >= 2.11, with the compiled libraries in it.
#   scripts/build_wheel.sh [FOLDER]    the folder to put it in, default dist
# TORCH_CUDA_ARCH_LIST, MAMBA_SSM_BUILD, CXX, NVCC and MAX_JOBS: see setup.py. Without nvcc it refuses, unless
# MAMBA_SSM_BUILD=cpu asks for a wheel without the CUDA library.
#   PYTHON   an interpreter with torch, setuptools and wheel (default python3, that of an activated environment)
set -euo pipefail

FOLDER="$(realpath -m "${1:-dist}")" # against the caller's folder, before cd
PYTHON="${PYTHON:-python3}"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() {
    printf 'build_wheel: %s\n' "$*" >&2
    exit 1
}

check_tools() {
    "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(None in map(u.find_spec, ("setuptools", "torch", "wheel")))' ||
        die "'$PYTHON' lacks torch, setuptools or wheel; activate the project's environment or name it: PYTHON=.venv/bin/python $0"
    case "${MAMBA_SSM_BUILD:-auto}" in
        cpu) ;;
        auto)
            command -v "${NVCC:-nvcc}" >/dev/null || [[ -z "${NVCC:-}" && -x /usr/local/cuda/bin/nvcc ]] ||
                die "there is no nvcc, so the wheel would lack the CUDA library; install CUDA's compiler, name it with" \
                    "NVCC=/path/to/nvcc, or ask for a wheel without it: MAMBA_SSM_BUILD=cpu $0"
            ;;
        *) die "MAMBA_SSM_BUILD='$MAMBA_SSM_BUILD': a wheel needs libraries; use auto or cpu" ;;
    esac
}

# Fails unless the wheel is tagged for every Python and holds the libraries.
check_wheel() {
    "$PYTHON" - "$1" "${MAMBA_SSM_BUILD:-auto}" <<'CHECK'
import sys
from zipfile import ZipFile

path, build = sys.argv[1:]
wanted = {"mamba_ssm/_C_cpu.so"} if build == "cpu" else {"mamba_ssm/_C_cpu.so", "mamba_ssm/_C_cuda.so"}
found = {name for name in ZipFile(path).namelist() if name.endswith(".so")}
if found != wanted or "-py3-none-" not in path:
    sys.exit(f"build_wheel: {path} holds the libraries {sorted(found)}, but should hold {sorted(wanted)}")
CHECK
}

check_tools
# setuptools packs whatever an earlier build left here; compiled objects, in build/temp.*, are kept.
rm -rf build/lib* build/bdist*
output="$(mktemp -d)"
trap 'rm -rf "$output"' EXIT
"$PYTHON" -m pip --disable-pip-version-check wheel --quiet --no-build-isolation --no-deps --wheel-dir "$output" .
wheel=("$output"/*.whl)
check_wheel "${wheel[0]}"
mkdir -p "$FOLDER"
mv "${wheel[0]}" "$FOLDER/"
echo "$FOLDER/$(basename "${wheel[0]}")"
