#!/usr/bin/env bash
# Sourced by scripts/dist_train_seg.sh and dist_train_det.sh, which set `task`: {seg,det}/train.py on several GPUs.
#   scripts/dist_train_seg.sh CONFIG GPUS [arguments of seg/train.py]
# For several machines set NNODES, NODE_RANK, MASTER_ADDR and PORT, as torchrun has them, and call it on each.
# PYTHON: interpreter that has the project (default: .venv's if there is one, else python3).
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z "${PYTHON:-}" ]]; then
    if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
if (($# < 2)) || ! [[ "$2" =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $(basename "$0") CONFIG GPUS [arguments of $task/train.py]" >&2
    exit 2
fi
config="$1" gpus="$2"
shift 2
exec "$PYTHON" -m torch.distributed.run --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" \
    --nproc_per_node "$gpus" --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${PORT:-29500}" \
    "$task/train.py" "$config" --launcher pytorch "$@"
