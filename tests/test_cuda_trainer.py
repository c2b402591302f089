"""The trainer on GPUs: mixed precision with its scaler, compiled, resumed; several GPUs against one (NCCL)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trainer_runs import DIGITS, STATEFUL, VIM, dies_at, interrupt, read_log, toy

from vim.checkpoint import load_checkpoint

pytestmark = pytest.mark.cuda
GPU = ["--device", "cuda"]


def test_a_run_in_float16_goes_on_in_mid_epoch(tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    toy(whole, *STATEFUL, *GPU, epochs=2)
    dies_at(monkeypatch, 18, interrupt)
    with pytest.raises(KeyboardInterrupt):
        toy(broken, *STATEFUL, *GPU, "--checkpoint-steps", "4", epochs=2)
    monkeypatch.undo()
    assert load_checkpoint(broken / "checkpoint.pth")["rng"][0]["cuda"] is not None
    torch.rand(7, device="cuda")
    toy(broken, *STATEFUL, *GPU, "--resume", "auto", epochs=2)
    for one, other in zip(read_log(broken), read_log(whole), strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
    scalers = [load_checkpoint(folder / "checkpoint.pth")["scaler"] for folder in (broken, whole)]
    assert scalers[0] == scalers[1] and scalers[0]["scale"] > 1


def test_a_compiled_model_in_bfloat16_learns(tmp_path):
    record = toy(tmp_path, *GPU, "--compile", "aot_eager", "--amp-dtype", "bfloat16", "--lr", "1e-2", epochs=6)
    assert record["train_loss"] < read_log(tmp_path)[0]["train_loss"] - 0.1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_are_one_with_twice_the_batch(tmp_path):
    flags = [*VIM, *DIGITS, *GPU, "--epochs", "2", "--lr", "2e-3", "--unscale-lr", "--drop-path", "0", "--dist-eval"]
    worker = Path(__file__).with_name("distributed_worker.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    losses = []
    for processes, batch in ((1, "64"), (2, "32")):
        folder = tmp_path / str(processes)
        folder.mkdir()
        (folder / "jobs.json").write_text(json.dumps([{"flags": [*flags, "--batch-size", batch]}]))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        subprocess.run([*launch, str(worker), str(folder), str(folder / "jobs.json")], check=True, env=environment)
        losses += [json.loads((folder / f"{rank}.json").read_text())[0]["losses"] for rank in range(processes)]
    assert len(losses[0]) == 44
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and losses[2] == losses[1]
