#!/usr/bin/env bash
# Trains from scratch by a recipe of vim/configs; see usage. The same command goes on after an interruption.
usage() {
    cat <<'USAGE'
usage: scripts/pretrain.sh [--dry-run] SIZE METHOD GPUS [flags of vim/main.py]

  SIZE     tiny, small or base: the recipe vim/configs/pretrain_SIZE.yaml
  METHOD   discretization: zoh, bilinear, … (README.md lists them)
  GPUS     of this machine; 0: one process on the CPU
  flags    win over the recipe, e.g. --data-path /path/to/imagenet --output_dir /runs/one
           (default --output_dir: output/pretrain_SIZE_METHOD; relative paths are relative to the checkout)

  --dry-run   check everything, print the command, start nothing
USAGE
}
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

if [[ "${1:-}" == --help ]]; then usage && exit; fi
if [[ "${1:-}" == --dry-run ]]; then dry_run=1 && shift; fi
(($# >= 3)) || die "SIZE, METHOD and GPUS are needed"
size="$1" method="$2" gpus="$3"
shift 3
check_config pretrain "$size"
check_gpus "$gpus"
set -- --config "$config" --output_dir "output/pretrain_${size}_$method" --resume auto "$@"
check_flags "$gpus" "$method" "$@"
start "$gpus" "$method" "$@"
