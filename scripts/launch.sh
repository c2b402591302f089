#!/usr/bin/env bash
# Sourced by scripts/pretrain.sh, finetune.sh, eval.sh, sweep.sh, dist_train.sh and slurm/train.sbatch, which define
# `usage`: checks of their arguments, and how vim/main.py is started.
#   PYTHON   interpreter that has the project (default: .venv's if there is one, else python3)
# Afterwards the working directory is the checkout.
set -euo pipefail

caller_folder="$PWD" # what the caller's relative paths are relative to
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z "${PYTHON:-}" ]]; then
    if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
dry_run=0

die() { # what is wrong, then how it is meant; exit 2
    printf '%s: %s\n\n' "$(basename "$0")" "$*" >&2
    usage >&2
    exit 2
}

absolute() { # absolute FILE_OR_URL: a path against the caller's folder; addresses and hf-hub: names as they are
    case "$1" in
        /* | *://* | hf-hub:*) printf '%s' "$1" ;;
        *) printf '%s/%s' "$caller_folder" "$1" ;;
    esac
}

check_config() { # check_config KIND SIZE: sets $config
    local sizes
    sizes="$(cd vim/configs && printf '%s\n' "$1"_*.yaml | sed "s/^$1_//; s/\.yaml\$//" | paste -sd ' ')"
    [[ " $sizes " == *" $2 "* ]] || die "SIZE '$2' is not one of: $sizes"
    config="vim/configs/$1_$2.yaml"
}

check_gpus() {
    [[ "$1" =~ ^[0-9]+$ ]] || die "GPUS '$1' is not a number (0: one process on the CPU)"
}

check_checkpoint() {
    case "$1" in
        /*) [[ -f "$1" ]] || die "no checkpoint at '$1'" ;;
    esac
}

# check_flags GPUS "METHOD …" FLAG…: the trainer's own parser sees the flags with each method, so that a wrong one gives
# one message and nothing is started; and there must be as many GPUs.
check_flags() {
    "$PYTHON" - "$dry_run" "$@" <<'PYTHON_CODE' || exit 2
import sys

import torch

from vim.main import ConfigError, DataError, parse_args

dry_run, gpus, methods, *flags = sys.argv[1:]
try:
    for method in methods.split():
        parse_args([*flags, "--discretization-method", method])
except (ConfigError, DataError) as error:
    sys.exit(f"error: {error}")
if dry_run == "0" and int(gpus) > torch.cuda.device_count():
    sys.exit(f"error: {gpus} GPUs are asked for, {torch.cuda.device_count()} are usable here")
PYTHON_CODE
}

# start GPUS METHOD FLAG…: vim/main.py on that many GPUs of this machine, 0 for one process on the CPU, in place of this
# shell, so that signals arrive. With $dry_run, only print the command; with $apart, in a session of its own.
start() {
    local gpus="$1" method="$2"
    shift 2
    local -a command=("$PYTHON")
    if ((gpus)); then command+=(-m torch.distributed.run --standalone "--nproc_per_node=$gpus"); fi
    command+=(-m vim.main "$@" --discretization-method "$method")
    if ((gpus == 0)); then command+=(--device cpu); fi
    if ((dry_run)); then
        printf '%q ' "${command[@]}"
        echo
        exit
    fi
    if ((${apart:-0})); then command=(setsid "${command[@]}"); fi
    exec "${command[@]}"
}

signalled=0 # set by traps

await() { # await PID: its exit status, however often signals interrupt the waiting
    local status
    while :; do
        signalled=0 status=0
        wait "$1" || status=$?
        ((signalled)) || return "$status"
    done
}
