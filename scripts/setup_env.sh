#!/usr/bin/env bash
# Sourced by scripts/demo.sh and scripts/test.sh: a virtual environment with this project installed in it.
#   PYTHON   interpreter to make it with (default python3; 3.10 to 3.13)
#   VENV     its folder (default .venv in the checkout)
# Afterwards the working directory is the checkout and $VENV/bin/python runs the project. Nothing is done when nothing has
# changed since the last time; an interrupted installation is taken up again.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$(realpath -m "${VENV:-$ROOT/.venv}")" # against the caller's folder, before cd
cd "$ROOT"

setup_die() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

setup_check_python() { # refuses an interpreter outside 3.10–3.13
    local version
    version="$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" ||
        setup_die "cannot run '$1'; install Python 3.10 to 3.13 or name one: PYTHON=/path/to/python3.12 $0"
    case "$version" in
        3.10 | 3.11 | 3.12 | 3.13) ;;
        *) setup_die "'$1' is Python $version, but 3.10 to 3.13 is needed; name another: PYTHON=/path/to/python3.12 $0" ;;
    esac
}

setup_create_venv() {
    local python="${PYTHON:-python3}"
    setup_check_python "$python"
    if [[ -e "$VENV" && ! -f "$VENV/pyvenv.cfg" && -n "$(ls -A "$VENV")" ]]; then
        setup_die "'$VENV' exists and is not a virtual environment; name another folder with VENV=…"
    fi
    echo "setup: creating $VENV with $("$python" --version 2>&1)"
    "$python" -m venv --clear "$VENV" ||
        setup_die "'$python -m venv' failed (Debian and Ubuntu have it in a package of its own: apt install python3-venv)"
}

# Whatever decides what gets installed or compiled: a change of any of it means installing again.
setup_fingerprint() {
    {
        "$VENV/bin/python" --version
        { "${CXX:-c++}" --version || echo "no C++ compiler"; } 2>/dev/null | head -n 1
        { nvcc --version || echo "no nvcc"; } 2>/dev/null | tail -n 1
        echo "${MAMBA_SSM_BUILD:-} ${NVCC:-} ${TORCH_CUDA_ARCH_LIST:-}"
        find mamba_ssm -name '_C_*.so' | LC_ALL=C sort
        find setup.py pyproject.toml constraints.txt csrc -type f -print0 | LC_ALL=C sort -z | xargs -0 cksum
    } 2>&1
}

setup_main() {
    local stamp="$VENV/project-installed"
    if [[ -n "${PYTHON:-}" ]]; then setup_check_python "$PYTHON"; fi
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || setup_create_venv
    if [[ -n "${PYTHON:-}" && "$("$PYTHON" --version)" != "$("$VENV/bin/python" --version)" ]]; then
        setup_die "'$VENV' was made with $("$VENV/bin/python" --version), but PYTHON is $("$PYTHON" --version);" \
            "remove that folder or name another with VENV=…"
    fi
    if [[ -f "$stamp" && "$(cat "$stamp")" == "$(setup_fingerprint)" ]]; then return; fi

    rm -f "$stamp"
    echo "setup: installing into $VENV (the first time downloads a few gigabytes)"
    # torch first: the project's C++ is compiled against it, so the build must not be isolated from it.
    local -a pip=("$VENV/bin/python" -m pip --disable-pip-version-check install --quiet)
    "${pip[@]}" --upgrade "pip>=23"
    "${pip[@]}" -c constraints.txt torch torchvision ninja setuptools wheel
    "${pip[@]}" -c constraints.txt --no-build-isolation -e ".[study,test]"
    if [[ ! -f mamba_ssm/_C_cpu.so ]]; then
        echo "setup: no C++ kernels were compiled, so the PyTorch reference will run, many times slower;" \
            "with a C++20 compiler (Debian and Ubuntu: apt install g++) call this again"
    fi
    setup_fingerprint >"$stamp"
}

setup_main
