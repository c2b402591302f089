"""`benchmarks/scaling.py` refuses GPUs that there are not, and measures those there are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "scaling.py"


def run(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True)


def test_gpus_that_are_not_there_are_named():
    done = run("--gpus", "1", "1000")
    there = torch.cuda.device_count()
    assert done.returncode == 1
    assert f"--gpus: got [1, 1000]; expected numbers from 1 to the GPUs here, of which there are {there}" in done.stderr


@pytest.mark.cuda
def test_steps_are_measured(tmp_path):
    flags = ["--batch-size", "4", "--input-size", "32", "--steps", "2", "--rounds", "1"]
    done = run(*flags, "--gpus", "1", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    seconds = json.loads((tmp_path / "scaling.json").read_text())["figures"]["seconds"]["1"]
    assert 1e-4 < seconds[0] < 60 and "| 1 |" in (tmp_path / "scaling.md").read_text()
