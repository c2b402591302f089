"""What the tests of seg/ and det/ share: a few scenes, and runs of the command lines small enough to take seconds."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent

# For every command line: two blocks, 16 channels, batches of 2.
TINY = ["model.backbone.embed_dim=16", "model.backbone.depth=2", "model.backbone.d_state=4"]
BRIEF = ["train_dataloader.batch_size=2", "train_cfg.val_interval=4000", "default_hooks.checkpoint.interval=2",
         "default_hooks.logger.interval=1", "train_cfg.max_iters=4"]  # fmt: skip


def data_options(scenes: Path) -> list[str]:
    """The configurations' data sets, moved to `scenes`."""
    return [f"{split}_dataloader.dataset.data_root={scenes}" for split in ("train", "val", "test")]


def metric_options(scenes: Path) -> list[str]:
    file = scenes / "annotations/instances_validation.json"
    return [f"{split}_evaluator.ann_file={file}" for split in ("val", "test")]


def start(script: str, *arguments: str, options: Sequence[str] = ()) -> subprocess.Popen:
    """`python SCRIPT ARGUMENTS --cfg-options OPTIONS` from the checkout; its output is merged into one pipe."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    if options:
        command += ["--cfg-options", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def call(script: str, *arguments: str, options: Sequence[str] = (), status: int = 0) -> str:
    """The output of `start`, which must end with `status`."""
    process = start(script, *arguments, options=options)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == status, output[-4000:]
    return output


def kill_when(process: subprocess.Popen, condition: Callable[[], bool], patience: float = 200.0) -> None:
    """kill -9 as soon as `condition`; a process that ends before is an error."""
    deadline = time.monotonic() + patience
    while not condition():
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def check_resumption_after_kill(script: str, config: str, options: Sequence[str], folder: Path) -> None:
    process = start(script, config, "--work-dir", str(folder), options=[*options, "train_cfg.max_iters=400"])
    kill_when(process, lambda: (folder / "last_checkpoint").exists() and (folder / "iter_4.pth").exists())
    output = call(script, config, "--work-dir", folder, "--resume", options=[*options, "train_cfg.max_iters=40"])
    first = int(output.split("Iter(train) [")[1].split("/")[0])
    assert first > 2  # it did not begin anew
    assert (folder / "last_checkpoint").read_text().endswith("iter_40.pth")


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, map_location="cpu", weights_only=False)["state_dict"]
