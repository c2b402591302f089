"""One pass over the data: training and evaluation."""

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from timm.scheduler.scheduler import Scheduler
from timm.utils import AverageMeter, accuracy
from torch import Tensor, nn

from vim.data import Loader

_SECONDS_BETWEEN_LINES = 30.0


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite."""


class Track:
    """Iterate over a loader and show how far it is: a bar on a terminal, else a line now and then.

    `note` is shown beside it; set it while iterating.
    """

    def __init__(self, loader: Loader, title: str, console: Console) -> None:
        self.loader, self.title, self.console = loader, title, console
        self.note = ""

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        total = len(self.loader)
        last_line = time.perf_counter()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        terminal = self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=not terminal) as bar:
            task = bar.add_task(self.title, total=total, note="")
            for step, batch in enumerate(self.loader):
                yield step, batch
                bar.update(task, advance=1, note=self.note)
                if not terminal and time.perf_counter() - last_line > _SECONDS_BETWEEN_LINES:
                    last_line = time.perf_counter()
                    self.console.print(f"{self.title}  {step + 1}/{total}  {self.note}")


def train_one_epoch(
    model: nn.Module,
    loader: Loader,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Scheduler,
    epoch: int,
    *,
    device: torch.device,
    console: Console,
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    clip_grad: float | None = None,
) -> dict[str, float]:
    """Train for one pass over `loader`, setting the learning rate before each step.

    Returns train_loss (mean over samples), train_lr (of the last step), epoch_time_s, images_per_s.

    Raises NonFiniteLossError, before the step is taken, naming epoch and step.
    """
    model.train()
    loader.set_epoch(epoch)
    losses = AverageMeter()
    track = Track(loader, f"epoch {epoch}", console)
    start = time.perf_counter()
    for step, (images, labels) in track:
        scheduler.step_update(epoch * len(loader) + step)
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        if mixup is not None:
            images, labels = mixup(images, labels)
        loss = criterion(model(images), labels)
        loss_value = loss.item()
        if not math.isfinite(loss_value):
            raise NonFiniteLossError(
                f"the loss is {loss_value} in epoch {epoch}, step {step} of {len(loader)}; nothing was saved since "
                "the last whole epoch. A lower --lr, a longer warm-up or --clip-grad 1 often helps"
            )
        optimizer.zero_grad()
        loss.backward()
        if clip_grad is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
        optimizer.step()
        losses.update(loss_value, len(images))
        track.note = f"loss {losses.avg:.4f}"
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    return {
        "train_loss": losses.avg,
        "train_lr": optimizer.param_groups[0]["lr"],
        "epoch_time_s": seconds,
        "images_per_s": losses.count / seconds,
    }


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Loader, *, device: torch.device, console: Console) -> dict[str, float]:
    """test_loss (mean cross-entropy), test_acc1 and test_acc5 in percent (with fewer than 5 classes: of them all)."""
    model.eval()
    losses, acc1, acc5 = AverageMeter(), AverageMeter(), AverageMeter()
    track = Track(loader, "evaluation", console)
    for _, (images, labels) in track:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        logits = model(images).float()
        top1, top5 = accuracy(logits, labels, topk=(1, 5))
        losses.update(F.cross_entropy(logits, labels).item(), len(images))
        acc1.update(top1.item(), len(images))
        acc5.update(top5.item(), len(images))
        track.note = f"acc@1 {acc1.avg:.2f} %"
    return {"test_loss": losses.avg, "test_acc1": acc1.avg, "test_acc5": acc5.avg}


def peak_memory_mb(device: torch.device) -> float:
    """Highest memory use so far, in MiB: of the tensors on a GPU, of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere
