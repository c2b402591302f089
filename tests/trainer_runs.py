"""Small runs of the trainer that several test files share."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from vim.checkpoint import load_checkpoint
from vim.engine import Trainer
from vim.main import main

# 2 x 2 patches and the cls token, 28,554 parameters: small enough for the reference scan.
VIM = ["--model", "vim_tiny", "--model-kwargs", "patch_size=4", "stride=4", "depth=2", "embed_dim=32", "channels=1"]
# A model that learns nothing in time but costs next to nothing, for the machinery. Its dropped paths need the RNG.
TOY = ["--model", "vit_tiny_patch16_224", "--drop-path", "0.2",
       "--model-kwargs", "patch_size=4", "depth=2", "embed_dim=16", "num_heads=1", "in_chans=1"]  # fmt: skip
DIGITS = ["--data-set", "DIGITS", "--device", "cpu"]
BRIEF = ["--batch-size", "128", "--warmup-epochs", "1", "--lr", "2e-3", "--unscale-lr"]  # 11 updates per epoch
# Everything that keeps a state from one update to the next.
STATEFUL = ["--mixup", "0.4", "--model-ema", "--model-ema-decay", "0.9", "--grad-accum-steps", "2",
            "--amp-dtype", "float16", "--batch-size", "64"]  # fmt: skip

# Of files, as `digit_folder` makes them.
FOLDER_TOY = [*TOY[:-1], "--input-size", "16", "--batch-size", "32", "--device", "cpu", "--epochs", "2",
              "--no-model-ema"]  # fmt: skip

TIMES = ("epoch_time_s", "images_per_s", "peak_memory_mb")
FILES = {"checkpoint.pth", "best_checkpoint.pth", "log.txt", "config.yaml", ".lock"}


def toy_flags(output: Path, *flags: str, epochs: int = 3) -> list[str]:
    return [*TOY, *DIGITS, *BRIEF, "--epochs", str(epochs), "--output_dir", str(output), *flags]


def toy(output: Path, *flags: str, epochs: int = 3) -> dict:
    return main(toy_flags(output, *flags, epochs=epochs))


def digit_folder(root: Path) -> Path:
    """An ImageFolder of real images in `root`: the digits 0, 1 and 2 as PNG files."""
    source = load_digits()
    for digit in range(3):
        images = source.images[source.target == digit]
        for split, chosen in (("train", images[:40]), ("val", images[40:60])):
            folder = root / split / f"digit {digit}"
            folder.mkdir(parents=True)
            for index, image in enumerate(chosen):
                Image.fromarray((image * 15.9).astype(np.uint8)).save(folder / f"{index}.png")
    return root


def command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "vim.main", *argv]


def read_log(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]


def assert_same_run(output: Path, expected: Path) -> None:
    """Same weights, optimizer state and best, bit for bit; same log but for the clock."""
    one, other = (load_checkpoint(folder / "checkpoint.pth") for folder in (output, expected))
    for part in {"model", "model_ema", "optimizer", "scaler"} & (set(one) | set(other)):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)
    assert one["epoch"] == other["epoch"] and one["best_acc1"] == other["best_acc1"]
    best, other_best = (load_checkpoint(folder / "best_checkpoint.pth") for folder in (output, expected))
    torch.testing.assert_close(best["model"], other_best["model"], rtol=0, atol=0)
    logs = [[{k: v for k, v in record.items() if k not in TIMES} for record in read_log(f)] for f in (output, expected)]
    assert logs[0] == logs[1]
    assert {path.name for path in output.iterdir()} == FILES


def dies_at(monkeypatch, death: int, act: Callable[[], None]) -> None:
    """Call `act` instead of the update number `death` of what follows."""
    update, done = Trainer._update, 0

    def update_until_death(self, position):
        nonlocal done
        done += 1
        if done == death:
            act()
        return update(self, position)

    monkeypatch.setattr(Trainer, "_update", update_until_death)


def interrupt() -> None:
    raise KeyboardInterrupt
