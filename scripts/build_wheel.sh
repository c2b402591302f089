#!/usr/bin/env bash
# Makes one wheel for every Python and every torch >= 2.11, with the compiled libraries in it.
#   scripts/build_wheel.sh [FOLDER]    the folder to put it in, default dist
# Both libraries, or an error; MAMBA_SSM_BUILD=cpu asks for a wheel without the CUDA library. TORCH_CUDA_ARCH_LIST, CXX,
# NVCC and MAX_JOBS: see setup.py.
#   PYTHON   an interpreter with torch, setuptools and wheel (default python3, that of an activated environment)
set -euo pipefail

FOLDER="$(realpath -m "${1:-dist}")" # against the caller's folder, before cd
PYTHON="${PYTHON:-python3}"
export MAMBA_SSM_BUILD="${MAMBA_SSM_BUILD:-cuda}"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() {
    printf 'build_wheel: %s\n' "$*" >&2
    exit 1
}

# Fails unless the wheel is tagged for every Python and holds the libraries.
check_wheel() {
    "$PYTHON" - "$1" "$MAMBA_SSM_BUILD" <<'CHECK'
import sys
from zipfile import ZipFile

path, build = sys.argv[1:]
wanted = {"mamba_ssm/_C_cpu.so"} if build == "cpu" else {"mamba_ssm/_C_cpu.so", "mamba_ssm/_C_cuda.so"}
found = {name for name in ZipFile(path).namelist() if name.endswith(".so")}
if found != wanted or "-py3-none-" not in path:
    sys.exit(f"build_wheel: {path} holds the libraries {sorted(found)}, but should hold {sorted(wanted)}")
CHECK
}

"$PYTHON" -c 'import importlib.util as u, sys; sys.exit(None in map(u.find_spec, ("setuptools", "torch", "wheel")))' ||
    die "'$PYTHON' lacks torch, setuptools or wheel; activate the project's environment or name it: PYTHON=.venv/bin/python $0"
[[ "$MAMBA_SSM_BUILD" == @(cuda|cpu) ]] || die "MAMBA_SSM_BUILD='$MAMBA_SSM_BUILD': a wheel is made with cuda or cpu"
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
