#!/usr/bin/env bash
# Trains methods × seeds by one recipe, one run after the other; see usage.
usage() {
    cat <<'USAGE'
usage: scripts/sweep.sh [options] CONFIG GPUS [flags of vim/main.py]

  CONFIG   a recipe, e.g. vim/configs/pretrain_tiny.yaml
  GPUS     of this machine, for every run; 0: one process on the CPU

  --methods "A B …"   discretizations (default: the paper's six)
  --seeds "0 1 …"     (default: 0 1 2)
  --output FOLDER     every run gets FOLDER/METHOD-seedN (default: output/sweep)
  --dry-run           check everything, print the commands, start nothing

It can be interrupted at any moment: on SIGTERM, SIGUSR1 or SIGINT (Ctrl-C) the run saves, and the same command goes on
from there; Ctrl-Z stops only the script. Runs that are complete are not trained again. In the end the last record of each
run is printed.
USAGE
}
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

methods="zoh foh bilinear poly highorder rk4" seeds="0 1 2" output="output/sweep"
while [[ "${1:-}" == --* ]]; do
    case "$1" in
        --help) usage && exit ;;
        --dry-run) dry_run=1 && shift ;;
        --methods | --seeds | --output)
            (($# >= 2)) || die "$1 needs a value"
            printf -v "${1#--}" '%s' "$2"
            shift 2
            ;;
        *) die "unknown option $1" ;;
    esac
done
(($# >= 2)) || die "CONFIG and GPUS are needed"
config="$(absolute "$1")" gpus="$2" output="$(absolute "$output")"
shift 2
[[ -f "$config" ]] || die "no recipe at '$config'"
check_gpus "$gpus"
for seed in $seeds; do
    [[ "$seed" =~ ^[0-9]+$ ]] || die "seed '$seed' is not a number"
done

set -- --config "$config" --resume auto "$@"
check_flags "$gpus" "$methods" --output_dir "$output" "$@"

apart=1 # from the terminal: Ctrl-C reaches only this script, which passes it on
interrupted=0 run=""
pass_on() { # to the run, and start no other; as SIGTERM, which torchrun hands down to its processes
    signalled=1 interrupted=1
    if [[ -n "$run" ]]; then kill -s TERM "$run" 2>/dev/null || true; fi
}
trap pass_on TERM USR1 INT HUP

failed=()
for seed in $seeds; do
    for method in $methods; do
        if ((interrupted)); then break 2; fi
        (start "$gpus" "$method" --output_dir "$output/$method-seed$seed" --seed "$seed" "$@") &
        run=$! status=0
        if ((interrupted)); then pass_on; fi # the signal came before the run had a number
        await "$run" || status=$?
        run=""
        if ((status && !interrupted)); then failed+=("$method-seed$seed (status $status)"); fi
    done
done
if ((dry_run)); then exit; fi
if ((interrupted)); then echo "sweep: interrupted; the same command goes on" && exit; fi

for seed in $seeds; do
    for method in $methods; do
        log="$output/$method-seed$seed/log.txt"
        if [[ -f "$log" ]]; then printf '%s-seed%s  %s\n' "$method" "$seed" "$(tail -n 1 "$log")"; fi
    done
done
if ((${#failed[@]})); then
    printf 'sweep: failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
