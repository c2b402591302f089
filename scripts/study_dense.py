"""The study of segmentation and detection: scripts/study.py --task seg|det, its presets, jobs and measurements."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCENES = ROOT / "data" / "digit_scenes"
CONFIGS = {"seg": "seg/configs/upernet_vim_digits.py", "det": "det/configs/mask_rcnn_vim_digits.py"}
# What is compared, and what else a run's `final` keeps, by the names that the evaluators give.
METRICS = {
    "seg": {"test_acc1": "mIoU", "pixel_acc": "aAcc"},
    "det": {"test_acc1": "coco/bbox_mAP_50", "box_ap": "coco/bbox_mAP", "mask_ap": "coco/segm_mAP"},
}
PERCENT = {"seg": 1.0, "det": 100.0}  # to make percent of them
PICTURES = 6


def smoke_options(task: str) -> tuple[str, ...]:
    """The smallest model that goes through every part."""
    shape = ["model.backbone.embed_dim=16", "model.backbone.depth=2", "model.backbone.d_state=4"]
    above = {
        "seg": ["model.backbone.out_indices=[1]", "model.decode_head.channels=8", "model.auxiliary_head.channels=8",
                "model.decode_head.in_channels=[16,16,16,16]", "model.auxiliary_head.in_channels=16"],
        "det": ["model.neck.in_channels=16"],
    }[task]  # fmt: skip
    few = [f"{split}_dataloader.dataset.indices=8" for split in ("train", "val")]
    return (*shape, *above, *few, "train_dataloader.batch_size=2")


def prepare() -> None:
    """The scenes of digits, made where they are not there yet."""
    import sys

    sys.path.insert(0, str(ROOT / "tools"))
    import make_digit_scenes

    make_digit_scenes.make_scenes(SCENES, make_digit_scenes.Options())


def training_argv(task: str, trainer: Sequence[str], method: str, seed: int, updates: int, folder: Path) -> list[str]:
    """Arguments of {seg,det}/train.py. `trainer` are options of the configuration, KEY=VALUE."""
    every, warm_up = max(1, updates // 4), max(1, updates // 20)
    options = [
        *data_options(task),
        f"train_cfg.max_iters={updates}",
        f"param_scheduler.0.end={warm_up}",
        f"param_scheduler.1.begin={warm_up}",
        f"param_scheduler.1.end={updates}",
        f"train_cfg.val_interval={every}",
        f"default_hooks.checkpoint.interval={min(50, every)}",
        "default_hooks.checkpoint.save_best=None",
        "default_hooks.logger.interval=10",
        *trainer,
        f"model.backbone.discretization_method={method}",
        f"randomness.seed={seed}",
    ]
    return [str(ROOT / CONFIGS[task]), "--work-dir", str(folder), "--resume", "--cfg-options", *options]


def timing_argv(argv: Sequence[str], updates: int) -> list[str]:
    """The same without evaluation, each update timed."""
    return [*argv, "default_hooks.logger.interval=1", f"train_cfg.val_begin={updates + 1}"]


def data_options(task: str) -> list[str]:
    options = [f"{split}_dataloader.dataset.data_root={SCENES}" for split in ("train", "val", "test")]
    if task == "det":
        file = SCENES / "annotations/instances_validation.json"
        options += [f"{split}_evaluator.ann_file={file}" for split in ("val", "test")]
    return options


def check(task: str, argv: Sequence[str]) -> None:
    """Raises RunError for options that the configuration or the model cannot have."""
    from vim.openmmlab import runs

    args = runs.training_parser(task).parse_args(argv)
    runs.load_config(args.config, args.cfg_options)


def updates_done(folder: Path) -> int:
    return max((record["step"] for record in _records(folder)), default=0)


# ---- One run, in its own process -----------------------------------------------------------------------------------


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Train as the job says; the result's `final` and `history`, with the keys of the classifier's study."""
    import os

    from vim.openmmlab import runs

    os.chdir(ROOT)
    task, folder = job["task"], Path(job["folder"])
    args = runs.training_parser(task).parse_args(job["argv"])
    runner = runs.build_training(args)
    runner.train()
    batch = runner.cfg.train_dataloader.batch_size
    parameters = sum(p.numel() for p in runner.model.parameters())
    if job["measure"]:
        seconds = min(record["time"] for record in _records(folder) if "loss" in record)
        final = {"n_parameters": parameters, "epoch_time_s": seconds}
        history = [{"epoch_time_s": seconds, "images_per_s": batch / seconds}]
        return {"final": final, "history": history, **_measure_inference(runner)}
    last = runner.max_iters
    history = _history(folder, task)
    if not history or history[-1]["step"] != last:  # killed between the last checkpoint and its evaluation
        history.append({"step": last, **_metrics(runner.val(), task), "train_loss": None})
    final = {**history[-1], "n_parameters": parameters}
    _draw(runner, folder)
    return {"final": final, "history": history}


def _records(folder: Path) -> list[dict[str, Any]]:
    """What MMEngine logged, in the order of its steps; a resumed run's entries replace those of the broken one."""
    found: dict[tuple[int, bool], dict[str, Any]] = {}
    for path in sorted(folder.glob("*/vis_data/scalars.json")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            found[record["step"], "loss" in record] = record
    return [found[key] for key in sorted(found)]


def _metrics(values: dict[str, float], task: str) -> dict[str, float]:
    return {ours: PERCENT[task] * values[theirs] for ours, theirs in METRICS[task].items()}


def _history(folder: Path, task: str) -> list[dict[str, Any]]:
    """One entry per evaluation: its step and metrics, and the mean loss since the one before."""
    history: list[dict[str, Any]] = []
    losses: list[float] = []
    for record in sorted(_records(folder), key=lambda r: (r["step"], "loss" not in r)):
        if "loss" in record:
            losses.append(record["loss"])
        elif METRICS[task]["test_acc1"] in record:
            loss = sum(losses) / len(losses) if losses else None
            history.append({"step": record["step"], **_metrics(record, task), "train_loss": loss})
            losses = []
    return history


def _measure_inference(runner: Any, images: int = 24, repetitions: int = 3) -> dict[str, float]:
    """Images per second of the evaluation's forward and postprocessing (the fastest), one at a time."""
    import torch

    loader = runner.build_dataloader(runner.cfg.val_dataloader)
    batches = [batch for batch, _ in zip(loader, range(images), strict=False)]
    runner.model.eval()
    seconds = []
    with torch.no_grad():
        for _ in range(repetitions):
            start = time.perf_counter()
            for batch in batches:
                runner.model.val_step(batch)
            seconds.append(time.perf_counter() - start)
    return {"inference_images_per_s": len(batches) / min(seconds), "held_out_images": len(loader.dataset)}


def _draw(runner: Any, folder: Path) -> None:
    """The predictions for the first held-out scenes, as PNG files beside the result."""
    from vim.openmmlab import pictures
    from vim.openmmlab.runs import metainfo

    model = runner.model.eval()
    model.cfg = runner.cfg
    model.dataset_meta = metainfo(runner.cfg.val_dataloader.dataset)
    (folder / "pictures").mkdir(exist_ok=True)
    for number in range(PICTURES):
        name = f"{number:05d}.png"
        pictures.draw(model, str(SCENES / "images/validation" / name), scale=2).save(folder / "pictures" / name)


# ---- The report ----------------------------------------------------------------------------------------------------


def overlays(task: str, folders: dict[str, Path], output: Path) -> bool:
    """OUTPUT/overlays.png: the first held-out scenes, truth above, then each method's predictions; False if none."""
    from PIL import Image

    from vim.openmmlab import pictures

    rows = [("truth", [_truth(task, number) for number in range(PICTURES)])]
    for method, folder in folders.items():
        files = sorted((folder / "pictures").glob("*.png"))
        if len(files) == PICTURES:
            rows.append((method, [Image.open(file) for file in files]))
    if len(rows) > 1:
        pictures.sheet(rows).save(output / "overlays.png")
    return len(rows) > 1


def _truth(task: str, number: int) -> Any:
    import numpy as np
    from mmengine.config import Config
    from PIL import Image

    from vim.openmmlab import pictures

    name = f"{number:05d}.png"
    image = Image.open(SCENES / "images/validation" / name).convert("RGB")
    classes = np.array(Image.open(SCENES / "annotations/validation" / name))
    cfg = Config.fromfile(str(ROOT / CONFIGS[task]))
    if task == "seg":
        return pictures.paint_classes(image, classes, cfg.palette, scale=2)
    coco = json.loads((SCENES / "annotations/instances_validation.json").read_text())
    instances = []
    for a in coco["annotations"]:
        if a["image_id"] == number:
            left, top, width, height = a["bbox"]
            label = a["category_id"] - 1
            mask = _decode(a["segmentation"])
            instances.append((mask, (left, top, left + width, top + height), cfg.classes[label], label))
    return pictures.paint_instances(image, instances, scale=2)


def _decode(segmentation: dict[str, Any]) -> Any:
    """The mask of uncompressed RLE: runs of 0 and 1 in turn, down the columns."""
    import numpy as np

    height, width = segmentation["size"]
    flat = np.repeat(np.arange(len(segmentation["counts"])) % 2, segmentation["counts"])
    return flat.reshape(width, height).T.astype(bool)
