"""Loaders of (images (B, C, H, W) float32, labels (B,) int64) batches that can be repeated and entered anywhere.

What batch number b of an epoch holds depends on (seed, epoch, b) alone. The order is one for all processes: rank r of W
takes the places r, r + W, … of it, and every place has random numbers of its own. So W processes with batches of B see,
step by step, the same images, equally augmented, as one process with batches of W · B; and since the global random
number generators are neither read nor moved, (epoch, batch) is all there is to remember of a loader.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IterableImageDataset
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, get_worker_info

Batch = tuple[Tensor, Tensor]

_WORKER_ADVICE = "If memory ran out, fewer --num_workers help"


class DataError(RuntimeError):
    """A data set is missing, malformed, or does not fit the flags."""


class Loader(Protocol):
    """classes: the names, in label order. len(): the batches of a whole epoch on this rank.

    `set_epoch(epoch, start_batch)`: what the next iteration yields. `sample_names(batch)`: the files in a batch of that
    epoch, or what else names its images; [] where a stream cannot tell. `explain(error)`: raise DataError, naming the
    image, if the death of a worker process is what `error`, caught anywhere in the main thread, is about.
    """

    classes: list[str]

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Batch]: ...
    def set_epoch(self, epoch: int, start_batch: int = 0) -> None: ...
    def sample_names(self, batch: int) -> list[str]: ...
    def explain(self, error: RuntimeError) -> None: ...


class ImageSource(Protocol):
    """Photographs before augmentation. `source[i]`: (RGB image, label); `name(i)`: its file, or what else names it."""

    classes: list[str]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...
    def name(self, index: int) -> str: ...


class Draw(NamedTuple):
    """An image to load, and its place in the order of an epoch, which decides its random numbers."""

    index: int
    place: int
    epoch: int


class EpochOrder:
    """Which images a rank takes in each batch of an epoch.

    train: shuffled, full batches only, as many on every rank; repeats: every image three times in a row, a third of
    the images (repeated augmentation: Hoffer et al., 2020). Otherwise all `count` images in order, each on one rank.
    """

    def __init__(
        self,
        count: int,
        *,
        train: bool,
        seed: int,
        batch_size: int,
        repeats: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.train, self.seed, self.batch_size = train, seed, batch_size
        self.rank, self.world_size = rank, world_size
        images = range(count)
        if not train:
            self._sampler = range(rank, count, world_size)
        elif repeats:
            self._sampler = RepeatAugSampler(images, world_size, rank)
        else:
            self._sampler = DistributedSampler(images, world_size, rank, drop_last=True)
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self.epoch, self.start_batch = epoch, start_batch
        if self.train:
            # Their own seed is the epoch, or the sum of seed and epoch: run `seed + 1` would repeat run `seed`.
            self._sampler.set_epoch(mix_seed(self.seed, epoch))
        self._indices = list(self._sampler)

    def __len__(self) -> int:
        count = len(self._sampler)
        return count // self.batch_size if self.train else math.ceil(count / self.batch_size)

    def batch(self, number: int) -> list[Draw]:
        own = range(number * self.batch_size, min((number + 1) * self.batch_size, len(self._indices)))
        return [Draw(self._indices[i], self.rank + i * self.world_size, self.epoch) for i in own]

    def __iter__(self) -> Iterator[list[Draw]]:
        return map(self.batch, range(self.start_batch, len(self)))


class ImageLoader:
    """Batches of an `ImageSource`, read and transformed in `num_workers` processes (0: in this one).

    Iterating raises DataError that names the image, if it cannot be read or if a worker dies over it.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Callable[[Image.Image], Tensor],
        order: EpochOrder,
        *,
        num_workers: int,
        pin_memory: bool = False,
    ) -> None:
        self.classes, self.source, self.order = source.classes, source, order
        # Per worker: its process and the image that it took up last, to be read when it has died.
        self._reading = torch.full((max(1, num_workers), 2), -1).share_memory_()
        self._loader = DataLoader(
            _Seeded(source, transform, order.seed, self._reading),
            batch_sampler=order,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            worker_init_fn=_outlive_signals,
            generator=torch.Generator(),  # or DataLoader would draw from the global one
        )

    def __len__(self) -> int:
        return len(self.order)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self.order.set_epoch(epoch, start_batch)

    def sample_names(self, batch: int) -> list[str]:
        return [self.source.name(draw.index) for draw in self.order.batch(batch)]

    def __iter__(self) -> Iterator[Batch]:
        try:
            yield from self._loader
        except DataError as error:
            raise _without_traceback(error) from None
        except RuntimeError as error:
            self.explain(error)
            raise

    def explain(self, error: RuntimeError) -> None:
        processes = _dead_workers(error)
        if processes:
            names = [self.source.name(index) for process, index in self._reading.tolist() if process in processes]
            last = f"the image it took up last is {', '.join(names)}" if names else "it had not taken up any image"
            raise DataError(f"{_first_line(error)}; {last}. {_WORKER_ADVICE}") from error


class _Seeded(Dataset):
    """The images of a source by `Draw`, transformed with random numbers that depend on (seed, epoch, place)."""

    def __init__(
        self, source: ImageSource, transform: Callable[[Image.Image], Tensor], seed: int, reading: Tensor
    ) -> None:
        self.source, self.transform, self.seed, self.reading = source, transform, seed, reading

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int]:
        worker = get_worker_info()
        if worker is not None:
            self.reading[worker.id] = torch.tensor([os.getpid(), draw.index])
        try:
            with _random_numbers(self.seed, draw.epoch, draw.place):
                image, label = self.source[draw.index]
                return self.transform(image), label
        except Exception as error:  # Pillow's plug-ins raise almost any type on a damaged file
            raise DataError(f"cannot read image {self.source.name(draw.index)}: {error}") from error


class StreamLoader:
    """Batches of a timm stream (tar shards, streamed hub data), whose reader shuffles and splits it among processes.

    Reproducible for the same number of processes and workers; a start in mid-epoch reads what it skips. An epoch is
    rounded up to whole batches of every worker. Held-out data are read whole by every process: a stream cannot be
    split exactly. A damaged image is skipped with a warning, by timm.
    """

    def __init__(
        self,
        dataset: IterableImageDataset,
        classes: list[str],
        *,
        train: bool,
        seed: int,
        rank: int,
        batch_size: int,
        num_workers: int,
        pin_memory: bool = False,
    ) -> None:
        self.classes, self.dataset, self.seed, self.rank, self.start_batch = classes, dataset, seed, rank, 0
        if not train:
            dataset.reader.dist_rank, dataset.reader.dist_num_replicas = 0, 1
        dataset.set_loader_cfg(num_workers=num_workers)
        # New workers every epoch: their seeds come from the generator, which set_epoch() seeds.
        self._loader = DataLoader(
            dataset,
            batch_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
            drop_last=train,
            worker_init_fn=_outlive_signals,
            generator=torch.Generator(),
        )
        self.set_epoch(0)

    def __len__(self) -> int:
        return len(self._loader)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self.start_batch = start_batch
        self.dataset.set_epoch(epoch)
        self._loader.generator.manual_seed(mix_seed(self.seed, epoch, self.rank))

    def sample_names(self, batch: int) -> list[str]:
        return []

    def __iter__(self) -> Iterator[Batch]:
        try:
            yield from islice(self._loader, self.start_batch, None)
        except RuntimeError as error:
            self.explain(error)
            raise

    def explain(self, error: RuntimeError) -> None:
        if _dead_workers(error):
            raise DataError(f"{_first_line(error)}; a stream cannot tell at which image. {_WORKER_ADVICE}") from error


class TensorLoader:
    """Batches of images that are held in memory, augmented as whole batches.

    images: (N, C, H, W) float32 in [0, 1], background 0; labels: (N,) int64; mean, std: of the images.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        classes: list[str],
        order: EpochOrder,
        *,
        title: str,
        mean: float,
        std: float,
    ) -> None:
        self.images, self.labels, self.classes, self.order = images, labels, classes, order
        self.title, self.mean, self.std = title, mean, std

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self.order.set_epoch(epoch, start_batch)

    def __len__(self) -> int:
        return len(self.order)

    def sample_names(self, batch: int) -> list[str]:
        return [f"{self.title} {draw.index}" for draw in self.order.batch(batch)]

    def __iter__(self) -> Iterator[Batch]:
        order = self.order
        if order.train:
            generator = torch.Generator().manual_seed(mix_seed(order.seed, order.epoch))
            places = len(order) * order.batch_size * order.world_size
            moves = torch.rand(places, 4, generator=generator) * 2 - 1
        for draws in order:
            chosen = [draw.index for draw in draws]
            images = self.images[chosen]
            if order.train:
                images = move_images(images, moves[[draw.place for draw in draws]])
            yield (images - self.mean) / self.std, self.labels[chosen]

    def explain(self, error: RuntimeError) -> None:
        """There are no workers that could die."""


def move_images(
    images: Tensor, moves: Tensor, *, degrees: float = 10.0, shift: float = 0.1, zoom: float = 0.1
) -> Tensor:
    """Rotate, zoom and shift each image of a batch (B, C, H, W); what comes in from outside is 0.

    moves (B, 4) in [-1, 1]: the angle in `degrees`, the zoom about 1 in `zoom`, the shifts in `shift` of the width and
    height.
    """
    angle, scale, dx, dy = moves.unbind(1)
    angle, scale = angle * math.radians(degrees), 1 + scale * zoom
    cos, sin = scale * angle.cos(), scale * angle.sin()
    # Coordinates run from -1 to 1, so the whole width is 2.
    theta = torch.stack([cos, -sin, 2 * shift * dx, sin, cos, 2 * shift * dy], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def mix_seed(*numbers: int) -> int:
    """One seed below 2^63 for several numbers ≥ 0, such that neighbours have nothing to do with each other."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextlib.contextmanager
def _random_numbers(*numbers: int) -> Iterator[None]:
    """Inside, the global generators (Python, NumPy, torch on the CPU) start from `numbers`; afterwards they go on."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = mix_seed(*numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _outlive_signals(worker_id: int) -> None:
    """In a worker: what a signal to all processes of a run means, the main process decides, and needs time to save.

    So SIGUSR1 is ignored, and SIGTERM unless it comes from the main process, which ends its workers that way.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parents_sigterm, daemon=True).start()


def _end_with_parents_sigterm() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _dead_workers(error: RuntimeError) -> Sequence[int]:
    """The process ids in DataLoader's message that workers died; none if it is another message."""
    found = re.match(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", str(error))
    return [int(number) for number in found[1].split(",")] if found else []


def _first_line(error: RuntimeError) -> str:
    return str(error).splitlines()[0].strip().rstrip(".")


def _without_traceback(error: DataError) -> DataError:
    """From a worker process it arrives wrapped in that process's traceback; its own text comes last."""
    return DataError(str(error).rsplit("DataError: ", 1)[-1].strip())
