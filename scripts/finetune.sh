#!/usr/bin/env bash
# Fine-tunes a trained model with patches at half the stride; see usage. The same command goes on after an interruption.
usage() {
    cat <<'USAGE'
usage: scripts/finetune.sh [--dry-run] SIZE METHOD GPUS CHECKPOINT [flags of vim/main.py]

  SIZE         tiny or small: the recipe vim/configs/finetune_SIZE.yaml
  METHOD       discretization that the checkpoint was trained with: zoh, bilinear, … (README.md lists them)
  GPUS         of this machine; 0: one process on the CPU
  CHECKPOINT   a .pth or .safetensors file, its URL, or hf-hub:OWNER/NAME
  flags        win over the recipe, e.g. --data-path /path/to/imagenet --output_dir /runs/one
               (default --output_dir: output/finetune_SIZE_METHOD; relative paths are relative to the checkout)

  --dry-run   check everything, print the command, start nothing
USAGE
}
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

if [[ "${1:-}" == --help ]]; then usage && exit; fi
if [[ "${1:-}" == --dry-run ]]; then dry_run=1 && shift; fi
(($# >= 4)) || die "SIZE, METHOD, GPUS and CHECKPOINT are needed"
size="$1" method="$2" gpus="$3" checkpoint="$(absolute "$4")"
shift 4
check_config finetune "$size"
check_gpus "$gpus"
check_checkpoint "$checkpoint"
set -- --config "$config" --finetune "$checkpoint" --output_dir "output/finetune_${size}_$method" --resume auto "$@"
check_flags "$gpus" "$method" "$@"
start "$gpus" "$method" "$@"
