"""What tests/test_distributed.py runs in every process: python distributed_worker.py OUTPUT JOBS.json.

A job is {"flags": [...]}; "signal": [rank, batch] or "nan": [rank, batch] beside it disturb one process.
OUTPUT receives RANK.json: for each job the loss of every update, and the record or the error.
"""

import json
import math
import os
import signal
import sys
from pathlib import Path

import torch

from vim.engine import Trainer
from vim.main import main

RANK = int(os.environ.get("RANK", 0))
train, backward = Trainer.train, Trainer._backward


def run(job: dict) -> dict:
    losses: list[float] = []
    calls = 0

    def noted(self, position, wishes):
        for update in train(self, position, wishes):
            losses.append(update.loss)
            yield update

    def disturbed(self, images, *args, **kwargs):
        nonlocal calls
        calls += 1
        if job.get("signal") == [RANK, calls]:
            os.kill(os.getpid(), signal.SIGTERM)
        if job.get("nan") == [RANK, calls]:
            images = torch.full_like(images, math.nan)
        return backward(self, images, *args, **kwargs)

    Trainer.train, Trainer._backward = noted, disturbed
    try:
        return {"record": main(job["flags"]), "losses": losses}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "losses": losses}


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[2]).read_text())
    results = [run(job) for job in jobs]
    Path(sys.argv[1], f"{RANK}.json").write_text(json.dumps(results))
