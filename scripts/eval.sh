#!/usr/bin/env bash
# Evaluates a checkpoint on the held-out images; see usage.
usage() {
    cat <<'USAGE'
usage: scripts/eval.sh [--dry-run] SIZE METHOD GPUS CHECKPOINT [flags of vim/main.py]

  SIZE         tiny, small or base: the recipe vim/configs/pretrain_SIZE.yaml
  METHOD       discretization that the checkpoint was trained with: zoh, bilinear, … (README.md lists them)
  GPUS         of this machine; 0: one process on the CPU
  CHECKPOINT   a .pth or .safetensors file, its URL, or hf-hub:OWNER/NAME
  flags        win over the recipe, e.g. --data-path /path/to/imagenet --input-size 384 256,
               --config vim/configs/finetune_SIZE.yaml for a model fine-tuned at stride 8,
               --use-ema for the moving averages of the weights instead of the weights

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
check_config pretrain "$size"
check_gpus "$gpus"
check_checkpoint "$checkpoint"
set -- --config "$config" --eval --resume "$checkpoint" "$@"
check_flags "$gpus" "$method" "$@"
start "$gpus" "$method" "$@"
