#!/usr/bin/env bash
# Sourced by scripts/dist_train_seg.sh and dist_train_det.sh, which set `task`: {seg,det}/train.py on several GPUs.
#   scripts/dist_train_seg.sh CONFIG GPUS [arguments of seg/train.py]
# For several machines set NNODES, NODE_RANK, MASTER_ADDR and PORT, as torchrun has them, and call it on each.
# PYTHON: see scripts/launch.sh.
set -euo pipefail

usage() { echo "usage: $(basename "$0") CONFIG GPUS [arguments of $task/train.py]"; }
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
(($# >= 2)) || die "CONFIG or GPUS is missing"
[[ "$2" =~ ^[1-9][0-9]*$ ]] || die "GPUS '$2' is not a number from 1 on"
config="$1" gpus="$2"
shift 2
exec "$PYTHON" -m torch.distributed.run --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" \
    --nproc_per_node "$gpus" --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${PORT:-29500}" \
    "$task/train.py" "$config" --launcher pytorch "$@"
