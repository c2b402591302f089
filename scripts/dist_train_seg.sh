#!/usr/bin/env bash
# Trains seg/configs on several GPUs; see scripts/dist_train.sh.
set -euo pipefail

task=seg
# shellcheck source=scripts/dist_train.sh
source "$(dirname "${BASH_SOURCE[0]}")/dist_train.sh"
