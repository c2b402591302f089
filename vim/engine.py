"""One pass over the data: training and evaluation, on one process or several."""

import contextlib
import functools
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from vim.data import Loader
from vim.diagnosis import first_nonfinite
from vim.distributed import World
from vim.losses import Criterion

_SECONDS_BETWEEN_LINES = 30.0
_ADVICE = (
    "The last checkpoint stays. A lower --lr, a longer warm-up, --clip-grad 1 or --amp-dtype bfloat16 often helps."
)

Autocast = Callable[[], AbstractContextManager]


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite."""


def autocast(device: torch.device, dtype: str) -> Autocast:
    """A factory of contexts of mixed precision: dtype "bfloat16" or "float16", or "none" for none."""
    if dtype == "none":
        return contextlib.nullcontext
    return functools.partial(torch.autocast, device.type, dtype=getattr(torch, dtype))


class Track:
    """Iterate over a loader and show how far it is: a bar on a terminal, else a line now and then.

    `start`: number of the first batch that the loader will yield. `note` is shown beside it; set it while iterating.
    """

    def __init__(self, loader: Loader, title: str, console: Console, start: int = 0) -> None:
        self.loader, self.title, self.console, self.start = loader, title, console, start
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
            task = bar.add_task(self.title, total=total, completed=self.start, note="")
            for batch, data in enumerate(self.loader, self.start):
                yield batch, data
                bar.update(task, advance=1, note=self.note)
                if not terminal and time.perf_counter() - last_line > _SECONDS_BETWEEN_LINES:
                    last_line = time.perf_counter()
                    self.console.print(f"{self.title}  {batch + 1}/{total}  {self.note}")


@dataclass
class Position:
    """How far a run is: updates done in an epoch, and what they add up to over all processes."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0  # over images
    images: int = 0
    skipped: int = 0  # updates, for a loss that was not finite
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"epoch {self.epoch}, step {self.step}"


class Update(NamedTuple):
    """One update: mean loss over its images, NaN if it was skipped; number of processes that have each wish; what the
    model saw last."""

    loss: float
    wishes: tuple[int, ...]
    images: Tensor


@dataclass
class Trainer:
    """Everything that takes part in an update.

    parallel: `model` for the forward pass of training (DistributedDataParallel with several processes).
    autocast: see `autocast`; scaler: disabled but for float16.
    accumulate: batches per update.
    options: further arguments of the model's forward in training.
    """

    model: nn.Module
    parallel: nn.Module
    loader: Loader
    criterion: Criterion
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    world: World
    console: Console
    autocast: Autocast = contextlib.nullcontext
    mixup: Mixup | None = None
    ema: ModelEmaV3 | None = None
    accumulate: int = 1
    clip_grad: float | None = None
    train_mode: bool = True
    continue_inf: bool = False
    nan2num: bool = False
    options: dict[str, bool] = field(default_factory=dict)

    @property
    def updates_per_epoch(self) -> int:
        return math.ceil(len(self.loader) / self.accumulate)

    @property
    def learning_rate(self) -> float:
        """Of the last update; with --layer-decay that of the head."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def train(self, position: Position, wishes: Callable[[], Sequence[bool]]) -> Iterator[Update]:
        """Train from `position` to the end of its epoch; yields after every update, `position` being up to date.

        wishes: asked just before each update what this process wants; `Update` says how many want it.

        Raises NonFiniteLossError for a loss or gradient, before the update is made, naming epoch, batch, images and
        layer; with `continue_inf` that update is skipped, and only an epoch without any raises.
        """
        self.model.train(self.train_mode)
        self.parallel.train(self.train_mode)
        batches = len(self.loader)
        first = position.step * self.accumulate
        self.loader.set_epoch(position.epoch, start_batch=first)
        track = Track(self.loader, f"epoch {position.epoch}", self.console, first)
        losses: list[float] = []
        images_seen, problem = 0, ""
        clock = time.perf_counter()
        for batch, (images, labels) in track:
            start = batch - batch % self.accumulate
            size = min(self.accumulate, batches - start)
            last = batch + 1 == start + size
            loss, inputs = self._backward(images, labels, size, sync=last)
            if not math.isfinite(loss) and not problem:
                problem = self._explain(loss, inputs, position.epoch, batch)
            losses.append(loss * len(images))
            images_seen += len(images)
            if not last:
                continue

            loss_sum, count, bad, *wanted = self.world.sum([sum(losses), images_seen, bool(problem), *wishes()])
            if not bad:
                problem = self._update(position)
                bad = bool(problem)
            if bad:
                self._skip(problem, position)
            else:
                position.loss_sum += loss_sum
                position.images += int(count)
            losses, images_seen, problem = [], 0, ""
            position.step += 1
            track.note = f"loss {position.loss_sum / max(position.images, 1):.4f}"
            position.seconds += time.perf_counter() - clock
            yield Update(math.nan if bad else loss_sum / count, tuple(map(int, wanted)), inputs)
            clock = time.perf_counter()
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        position.seconds += time.perf_counter() - clock
        if position.images == 0:
            raise NonFiniteLossError(f"the loss was not finite in any update of epoch {position.epoch}")

    def summary(self, position: Position) -> dict[str, float]:
        """train_loss (mean over images), train_lr (of the last update), epoch_time_s, images_per_s; skipped_steps."""
        return {
            "train_loss": position.loss_sum / position.images,
            "train_lr": self.learning_rate,
            "epoch_time_s": position.seconds,
            "images_per_s": position.images / position.seconds,
            **({"skipped_steps": position.skipped} if self.continue_inf else {}),
        }

    @torch.no_grad()
    def explain_divergence(self, images: Tensor) -> str:
        """Why the weights are not worth keeping: what is not finite of them or their outputs; "" if nothing is.

        An update's loss is that of the weights before it, so that what it made of them is judged by `images`, in every
        process. A model may draw random numbers on the way.
        """
        images = torch.nan_to_num(images, nan=0.0, posinf=0.0, neginf=0.0)  # not the weights' fault
        finite = all(parameter.isfinite().all() for parameter in self.model.parameters())
        self.model.eval()
        with torch.compiler.set_stance("force_eager"), self.autocast():  # a signal does not wait for a compiler
            finite = finite and bool(self.model(images).isfinite().all())
        problem = "" if finite else first_nonfinite(self.model, images, self.autocast, {})
        self.model.train(self.train_mode)
        (bad,) = self.world.sum([bool(problem)])
        return problem or ("something is not finite in another process, which says what" if bad else "")

    def _backward(self, images: Tensor, labels: Tensor, batches: int, sync: bool) -> tuple[float, Tensor]:
        """Add the gradients of one of the `batches` of an update; returns its loss, and the images the model saw."""
        device = self.world.device
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        if self.mixup is not None:
            images, labels = self.mixup(images, labels)
        with contextlib.nullcontext() if sync or self.world.size == 1 else self.parallel.no_sync():
            with self.autocast():
                loss = self.criterion(images, self.parallel(images, **self.options), labels)
            if self.nan2num:
                loss = torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0)
            self.scaler.scale(loss / batches).backward()
        return loss.item(), images

    def _update(self, position: Position) -> str:
        """Make the update, or say why not: gradients that are not finite, the same ones on all processes."""
        self.scheduler.step_update(position.epoch * self.updates_per_epoch + position.step)
        self.scaler.unscale_(self.optimizer)
        gradients = {name: parameter for name, parameter in self.model.named_parameters() if parameter.grad is not None}
        if self.nan2num:
            for parameter in gradients.values():
                torch.nan_to_num_(parameter.grad, nan=0.0, posinf=0.0, neginf=0.0)
        norm = nn.utils.get_total_norm([parameter.grad for parameter in gradients.values()])
        if not self.scaler.is_enabled() and not norm.isfinite():  # a scaler skips such updates itself
            infinite = [name for name, parameter in gradients.items() if not parameter.grad.isfinite().all()]
            return (
                f"the gradient of {infinite[-1] if infinite else 'all weights together'} is not finite in {position}, "
                f"though the loss is. {_ADVICE}"
            )
        if self.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(gradients.values(), self.clip_grad, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model)
        return ""

    def _skip(self, problem: str, position: Position) -> None:
        if not self.continue_inf:
            raise NonFiniteLossError(problem or "the loss is not finite in another process, which says where")
        if problem:  # not through the console, which is the main process's
            print(f"{problem}\nskipped", file=sys.stderr)
        self.optimizer.zero_grad()
        position.skipped += 1

    def _explain(self, loss: float, images: Tensor, epoch: int, batch: int) -> str:
        cause = first_nonfinite(self.model, images, self.autocast, self.options)
        names = self.loader.sample_names(batch)
        listed = " The batch:" + "".join(f"\n  {name}" for name in names) if names else ""
        return f"the loss is {loss} in epoch {epoch}, batch {batch} of {len(self.loader)}: {cause}. {_ADVICE}{listed}"


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Loader,
    *,
    world: World,
    console: Console,
    autocast: Autocast = contextlib.nullcontext,
) -> dict[str, float]:
    """test_loss (mean cross-entropy), test_acc1 and test_acc5 in percent (with fewer than 5 classes: of them all).

    world: the processes that share the images, each having its own in `loader`; every one of them gets the result.
    """
    model.eval()
    loss_sum, correct1, correct5, count = 0.0, 0, 0, 0
    track = Track(loader, "evaluation", console)
    for _, (images, labels) in track:
        images, labels = images.to(world.device, non_blocking=True), labels.to(world.device, non_blocking=True)
        with autocast():
            logits = model(images)
        logits = logits.float()
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss_sum += F.cross_entropy(logits, labels, reduction="sum").item()
        correct1 += best[:, 0].sum().item()
        correct5 += best.sum().item()
        count += len(labels)
        track.note = f"acc@1 {100 * correct1 / count:.2f} %"
    loss_sum, correct1, correct5, count = world.sum([loss_sum, correct1, correct5, count])
    return {
        "test_loss": loss_sum / count,
        "test_acc1": 100 * correct1 / count,
        "test_acc5": 100 * correct5 / count,
    }


def peak_memory_mb(device: torch.device) -> float:
    """Highest memory use so far, in MiB: of the tensors on a GPU, of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere
