"""The training step of the published segmenters and detectors, on generated data: speed, memory, finite losses.

    python benchmarks/dense.py --task seg --methods paper --steps 200 --json seg.json
    python benchmarks/dense.py --task det --methods paper --steps 200 --json det.json

Runs the configuration's own model, optimizer and warm-up at its full resolution and its batch per GPU (halved until it
fits), with bfloat16 autocast on a GPU. Images are random; targets are blocks of random classes, or random boxes with
elliptic masks: the work of a step is that of real data, its losses mean nothing but that they are finite. Prints a
table; the JSON file is written after every method. The share of the scan is that of kernel time in three steps under
the profiler. Needs scripts/install_mm.sh seg or det. Exit status 1 if a loss or gradient was not finite.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from mamba_ssm._backend import is_out_of_memory
from mamba_ssm.ops.discretization_ref import METHODS, PAPER_METHODS
from vim.openmmlab.runs import load_config
from vim.provenance import environment

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {"seg": "seg/configs/upernet_vim_tiny_ade20k.py", "det": "det/configs/cascade_mask_rcnn_vim_tiny_coco.py"}
WARM_UP = 5  # steps that are not timed
DISTINCT = 4  # batches, used in turn
OBJECTS = (5, 20)  # an image


def generated(task: str, batch: int, side: int, classes: int, seed: int = 0) -> list[dict[str, Any]]:
    """DISTINCT batches as the frameworks' data loaders give them; images uint8 (3, side, side)."""
    generator = torch.Generator().manual_seed(seed)
    sample = _segmentation if task == "seg" else _detection
    batches = []
    for _ in range(DISTINCT):
        images = [torch.randint(256, (3, side, side), generator=generator, dtype=torch.uint8) for _ in range(batch)]
        samples = [sample(side, classes, generator) for _ in range(batch)]
        batches.append({"inputs": images, "data_samples": samples})
    return batches


def _meta(side: int) -> dict[str, Any]:
    shape = {key: (side, side) for key in ("img_shape", "ori_shape", "pad_shape", "batch_input_shape")}
    return {**shape, "scale_factor": (1.0, 1.0)}


def _segmentation(side: int, classes: int, generator: torch.Generator) -> Any:
    from mmseg.structures import SegDataSample

    blocks = torch.randint(classes, (1, -(-side // 32), -(-side // 32)), generator=generator)
    labels = blocks.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :side, :side]
    sample = SegDataSample(metainfo=_meta(side))
    sample.gt_sem_seg = PixelData(data=labels)
    return sample


def _detection(side: int, classes: int, generator: torch.Generator) -> Any:
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    count = int(torch.randint(OBJECTS[0], OBJECTS[1] + 1, (), generator=generator))
    sizes = (0.03 + 0.4 * torch.rand(count, 2, generator=generator) ** 2) * side
    corners = torch.rand(count, 2, generator=generator) * (side - sizes)
    centres = corners + sizes / 2
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    masks = [
        (((x - c[0]) / s[0]) ** 2 + ((y - c[1]) / s[1]) ** 2 <= 0.25).to(torch.uint8)
        for c, s in zip(centres, sizes, strict=True)
    ]
    sample = DetDataSample(metainfo=_meta(side))
    sample.gt_instances = InstanceData(
        bboxes=torch.cat([corners, corners + sizes], 1),
        labels=torch.randint(classes, (count,), generator=generator),
        masks=BitmapMasks(torch.stack(masks).numpy(), side, side),
    )
    return sample


class Training:
    """Model, optimizer and warm-up of a configuration; `step` is one update."""

    def __init__(self, cfg: Config, device: torch.device):
        torch.manual_seed(0)
        init_default_scope(cfg.default_scope)
        if cfg.default_scope == "mmseg":
            from mmseg.registry import MODELS
        else:
            from mmdet.registry import MODELS
        self.model = MODELS.build(cfg.model)
        self.model.init_weights()
        self.model.to(device).train()
        self.wrapper = build_optim_wrapper(self.model, cfg.optim_wrapper)
        self.warm_up = PARAM_SCHEDULERS.build(cfg.param_scheduler[0], default_args={"optimizer": self.wrapper})

    def step(self, batch: dict[str, Any]) -> torch.Tensor:
        """The loss, on the device."""
        losses = self.model.train_step(batch, optim_wrapper=self.wrapper)
        self.warm_up.step()
        return losses["loss"].detach()


def measure(cfg: Config, task: str, batch: int, side: int, steps: int, device: torch.device) -> dict[str, Any]:
    """One method's row. Raises RuntimeError, see `is_out_of_memory`, if the batch does not fit."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    training = Training(cfg, device)
    classes = cfg.model.decode_head.num_classes if task == "seg" else _classes(cfg)
    batches = generated(task, batch, side, classes)
    losses, start = [], 0.0
    for number in range(steps):
        if number == min(WARM_UP, steps - 1):
            _wait(device)
            start = time.perf_counter()
        losses.append(training.step(batches[number % DISTINCT]))
    _wait(device)
    seconds = (time.perf_counter() - start) / (steps - min(WARM_UP, steps - 1))
    losses = torch.stack(losses).float().cpu()
    return {
        "batch": batch,
        "image_size": side,
        "steps": steps,
        "seconds_per_step": seconds,
        "images_per_s": batch / seconds,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "losses_finite": int(losses.isfinite().sum()),
        "first_loss": losses[0].item(),
        "last_loss": losses[-1].item(),
        "parameters_finite": all(bool(p.isfinite().all()) for p in training.model.parameters()),
        "scan_share": scan_share(training, batches, device),
    }


def _classes(cfg: Config) -> int:
    head = cfg.model.roi_head.bbox_head
    return (head[0] if isinstance(head, list | tuple) else head).num_classes


def scan_share(training: Training, batches: Sequence[dict[str, Any]], device: torch.device, steps: int = 3) -> float:
    """Time in the scan's kernels (the CPU: in the mixer, of which the scan is part) by the time in all kernels."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        for number in range(steps):
            training.step(batches[number % DISTINCT])
        _wait(device)
    rows = [(row.key, row.self_device_time_total if cuda else row.self_cpu_time_total) for row in seen.key_averages()]
    part = "scan_" if cuda else "mamba_ssm::"
    return sum(t for key, t in rows if part in key) / sum(t for _, t in rows)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def rows(args: argparse.Namespace, console: Console) -> Iterator[dict[str, Any]]:
    """A row per method; the batch that one method needed to be halved to serves those after it too."""
    device = torch.device(args.device)
    batch = args.batch
    for method in args.methods:
        options = {"model.backbone.discretization_method": method, **(args.cfg_options or {})}
        cfg = load_config(ROOT / CONFIGS[args.task], options)
        if device.type == "cuda":
            cfg.optim_wrapper.update(type="AmpOptimWrapper", dtype="bfloat16")
        side = args.image_size or (512 if args.task == "seg" else 1024)
        batch = batch or cfg.train_dataloader.batch_size
        while True:
            try:
                row = measure(cfg, args.task, batch, side, args.steps, device)
                break
            except RuntimeError as error:
                if batch == 1 or not is_out_of_memory(error):
                    raise
                console.print(f"{method}: {batch} images do not fit, trying {batch // 2}")
                batch //= 2
            gc.collect()
            torch.cuda.empty_cache()
        yield {"method": method, **row}
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> int:
    from mmengine.config import DictAction

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", choices=CONFIGS, required=True)
    parser.add_argument(
        "--methods", nargs="+", default=["paper"], help=f"'paper', 'all' or any of {', '.join(METHODS)}"
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, help="images per step (default: the configuration's per GPU)")
    parser.add_argument("--image-size", type=int, help="pixels (default: the configuration's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="over the config's")
    args = parser.parse_args(argv)
    groups = {"paper": PAPER_METHODS, "all": METHODS}
    args.methods = list(dict.fromkeys(name for given in args.methods for name in groups.get(given, [given])))
    if unknown := [name for name in args.methods if name not in METHODS]:
        parser.error(f"--methods: unknown {', '.join(unknown)}; known are paper, all, {', '.join(METHODS)}")
    if args.steps < 2:
        parser.error(f"--steps must be at least 2, the first is not timed; got {args.steps}")

    console = Console(highlight=False, width=140)
    found: list[dict[str, Any]] = []
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    for row in rows(args, console):
        found.append(row)
        memory = f"{row['peak_memory_gib']:.2f} GiB" if row["peak_memory_gib"] is not None else "–"
        console.print(
            f"{row['method']:>16}  {row['images_per_s']:8.2f} img/s  {1e3 * row['seconds_per_step']:8.1f} ms a step of "
            f"{row['batch']}×{row['image_size']}²  {memory}  scan {100 * row['scan_share']:.1f} %  finite losses "
            f"{row['losses_finite']}/{row['steps']}  {row['first_loss']:.3f} to {row['last_loss']:.3f}"
        )
        if args.json is not None:
            record = {"task": args.task, "device": device, "environment": environment(), "rows": found}
            args.json.write_text(json.dumps(record, indent=1))
    return 0 if all(r["losses_finite"] == r["steps"] and r["parameters_finite"] for r in found) else 1


if __name__ == "__main__":
    sys.exit(main())
