#!/usr/bin/env bash
# Sets everything up and runs the small study: six discretizations, three seeds, handwritten digits, on the CPU.
#   scripts/demo.sh                     table in the terminal, report in output/demo/report.html
#   scripts/demo.sh seg                 the same for segmentation of scenes of digits, in output/demo-seg
#   scripts/demo.sh det                 for detection; compiles mmcv's operators once, 10 to 15 minutes
#   DEMO_PRESET=smoke scripts/demo.sh   the same path in about a minute, for CI; the accuracies mean nothing
# Further arguments go to scripts/study.py (see scripts/study.py --help). Interrupted, the next call goes on.
# PYTHON and VENV: see scripts/setup_env.sh.
set -euo pipefail

# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
preset="${DEMO_PRESET:-demo}"
task=cls output="output/$preset"
if [[ "${1:-}" == seg || "${1:-}" == det ]]; then
    task="$1" output="output/$preset-$1"
    shift
    scripts/install_mm.sh "$task"
fi
exec "$VENV/bin/python" scripts/study.py --task "$task" --preset "$preset" --output "$output" "$@"
