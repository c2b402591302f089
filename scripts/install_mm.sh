#!/usr/bin/env bash
# Installs the OpenMMLab packages that seg/ and det/ are written for, in the versions of constraints.txt.
#   scripts/install_mm.sh [seg|det|all]    (default all)
# seg needs no compiler. det needs mmcv's operators, which are compiled here: 10 to 15 minutes on two cores, once, for
# the wheel is kept. Where there are nvcc and a GPU, or FORCE_CUDA=1, they are compiled for CUDA too. Nothing is done
# when nothing is missing. Environment:
#   MM_PYTHON    interpreter to install into, which must have this project's torch (default: the environment of
#                scripts/setup_env.sh, made if it is not there)
#   MM_CACHE     folder of the kept wheels (default ${XDG_CACHE_HOME:-~/.cache}/vision-mamba)
#   MM_SDIST     mmcv's source archive, if it is not to be downloaded
#   MAX_JOBS     compilers at a time (default: one per core)
#   PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER   install from a folder of wheels, without network; MM_NO_DEPS=1: install only
#                the packages themselves; what they import must be there, but mmdet's image corruptions need not
set -euo pipefail

MM_SEG=(onedl-mmengine onedl-mmsegmentation)
MM_DET=(onedl-mmengine onedl-mmdetection)

mm_die() {
    printf 'install_mm: %s\n' "$*" >&2
    exit 1
}

task="${1:-all}"
case "$task" in seg | det | all) ;; *) mm_die "'$task' is not one of seg, det, all" ;; esac

if [[ -z "${MM_PYTHON:-}" ]]; then
    # shellcheck source=scripts/setup_env.sh
    source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
    MM_PYTHON="$VENV/bin/python"
else
    found="$(command -v "$MM_PYTHON")" || mm_die "cannot run MM_PYTHON='$MM_PYTHON'"
    MM_PYTHON="$(cd "$(dirname "$found")" && pwd)/$(basename "$found")" # not resolved: in an environment it is a link
    if [[ -n "${MM_SDIST:-}" ]]; then MM_SDIST="$(realpath "$MM_SDIST")"; fi
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
fi

"$MM_PYTHON" -c "import torch" || mm_die "$MM_PYTHON has no working torch; install this project into it first"
mm_pip() { "$MM_PYTHON" -m pip --disable-pip-version-check "$@"; }

mm_pinned() { # mm_pinned NAME…: NAME==VERSION as constraints.txt has it
    local name
    for name; do grep -E "^$name==" constraints.txt || mm_die "constraints.txt does not pin $name"; done
}

# The same import names come from two families of packages; installed together, they overwrite each other's files.
mm_check_family() {
    "$MM_PYTHON" - <<'PYTHON' || exit 1
import sys
from importlib.metadata import distributions

found = sorted({d.name.lower() for d in distributions()} & {"mmcv", "mmcv-lite", "mmengine", "mmsegmentation", "mmdet"})
if found:
    sys.exit(f"install_mm: {', '.join(found)} are installed already; they share folders with the onedl-* packages. "
             f"Remove them first: {sys.executable} -m pip uninstall {' '.join(found)}")
PYTHON
}

mm_is_installed() { # mm_is_installed NAME==VERSION…
    "$MM_PYTHON" - "$@" <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version

try:
    sys.exit(any(version(name) != number for name, number in (spec.split("==") for spec in sys.argv[1:])))
except PackageNotFoundError:
    sys.exit(1)
PYTHON
}

mm_install() { # mm_install NAME==VERSION…
    if mm_is_installed "$@"; then return; fi
    echo "install_mm: installing $*"
    local -a options=(--quiet -c constraints.txt)
    if [[ -n "${MM_NO_DEPS:-}" ]]; then options+=(--no-deps --no-build-isolation); fi
    mm_pip install "${options[@]}" "$@"
}

mm_has_ops() { # with CUDA where they are wanted with CUDA
    "$MM_PYTHON" - "$cuda" >/dev/null 2>&1 <<'PYTHON'
import sys

import torch
from mmcv.ops import get_compiling_cuda_version, nms

boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 9.0, 9.0]])
assert len(nms(boxes, torch.tensor([0.9, 0.8]), 0.5)[1]) == 1
assert sys.argv[1] == "0" or get_compiling_cuda_version() != "not available"
PYTHON
}

mm_build() ( # mm_build FOLDER: compiles the wheel and puts it there
    folder="$1"
    work="$(mktemp -d)"
    trap 'rm -rf "$work"' EXIT
    command -v "${CXX:-c++}" >/dev/null || mm_die "det needs a C++ compiler (Debian and Ubuntu: apt install g++)"
    if [[ -n "${MM_SDIST:-}" ]]; then
        [[ -f "$MM_SDIST" ]] || mm_die "no file at MM_SDIST='$MM_SDIST'"
        cp "$MM_SDIST" "$work/"
    else
        mm_pip download --quiet --no-deps --no-build-isolation --no-binary :all: -d "$work" "$mmcv"
    fi
    mkdir "$work/source" "$work/wheel"
    tar xzf "$work"/*.tar.gz --strip-components 1 -C "$work/source"
    sed -i "s/'-std=c++1[47]'//g" "$work/source/setup.py" # torch knows which standard its headers want
    jobs="${MAX_JOBS:-$(nproc)}"
    echo "install_mm: compiling mmcv's operators with $jobs processes (10 to 15 minutes on two cores)"
    # Not from the archive and not through pip's cache: both give the wheel without operators, which has the same name.
    if ! MMCV_WITH_OPS=1 FORCE_CUDA="$cuda" MAX_JOBS="$jobs" CFLAGS="-g0 -O2" CXXFLAGS="-g0 -O2" \
        mm_pip wheel --no-deps --no-build-isolation --no-cache-dir -w "$work/wheel" "$work/source" >"$work/log" 2>&1; then
        tail -n 40 "$work/log" >&2
        mm_die "compiling mmcv's operators failed"
    fi
    mkdir -p "$folder"
    cp "$work/wheel"/*.whl "$folder/.new" # renamed when it is whole
    mv "$folder/.new" "$folder/$(basename "$work/wheel"/*.whl)"
)

mm_install_ops() {
    cuda="${FORCE_CUDA:-}"
    if [[ -z "$cuda" ]]; then
        cuda=0
        if command -v nvcc >/dev/null && "$MM_PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
            cuda=1
        fi
    fi
    if mm_has_ops; then return; fi
    local key folder
    # A compiled extension fits one Python, one torch and one kind of device.
    key="$("$MM_PYTHON" -c 'import platform, sys, torch; print("py%d.%d-torch%s-%s" % (*sys.version_info[:2],
        torch.__version__, platform.machine()))')-cuda$cuda"
    if [[ "$cuda" != 0 ]]; then key+="-${TORCH_CUDA_ARCH_LIST:-native}"; fi
    folder="${MM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/vision-mamba}/$mmcv-${key//[ ;]/_}"
    mkdir -p "$folder"
    (
        flock 9 # two callers would compile the same thing side by side
        if ! compgen -G "$folder/*.whl" >/dev/null; then mm_build "$folder"; fi
    ) 9>"$folder/lock"
    mm_pip install --quiet --no-deps --force-reinstall "$folder"/*.whl
    mm_has_ops || mm_die "mmcv.ops does not work although it was compiled; remove '$folder' and try again, or see:" \
        "$MM_PYTHON -c 'import mmcv.ops'"
}

mm_check_family
mmcv="$(mm_pinned onedl-mmcv)"
readarray -t mm_build_tools < <(mm_pinned setuptools ninja)
packages=()
if [[ "$task" != det ]]; then readarray -t -O "${#packages[@]}" packages < <(mm_pinned "${MM_SEG[@]}"); fi
if [[ "$task" != seg ]]; then readarray -t -O "${#packages[@]}" packages < <(mm_pinned "${MM_DET[@]}"); fi
mm_install "${packages[@]}"
if [[ "$task" == seg ]]; then
    mm_install "$mmcv" # with or without operators
else
    if [[ -z "${MM_NO_DEPS:-}" ]]; then mm_pip install --quiet "${mm_build_tools[@]}" wheel; fi
    mm_install_ops
    "$MM_PYTHON" -c "import mmcv.ops, mmdet.apis" || mm_die "mmdet does not import"
fi
if [[ "$task" != det ]]; then "$MM_PYTHON" -c "import mmseg.apis" || mm_die "mmseg does not import"; fi
echo "install_mm: $task is ready"
