"""Images per second of the loader alone, on real JPEG files, and what its time goes into.

    python benchmarks/loader.py                              # about two minutes
    python benchmarks/loader.py --data-path /path/to/imagenet --workers 8 16 32
    python benchmarks/loader.py -- --ThreeAugment --src      # what follows -- are flags of vim/main.py

Without --data-path the files are windows of the photographs that scikit-learn and, if installed, scikit-image bring
along, written as 500×375 JPEG: ImageNet's usual size. They lie in the page cache, so that no disk is measured. Prints
two tables and writes loader.json and loader.md to the output folder. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Section, Table, significant
from PIL import Image
from rich.console import Console
from workloads import ROOT, write

from vim.data import build_loader
from vim.main import parse_args as trainer_args
from vim.provenance import revision

SIZE = (500, 375)  # width, height
CLASSES = 2


def photographs() -> list[Image.Image]:
    """Those that come with the installed packages."""
    from sklearn.datasets import load_sample_images

    images = list(load_sample_images().images)
    with contextlib.suppress(ImportError):
        from skimage import data

        images += [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    return [Image.fromarray(image) for image in images]


def write_jpegs(root: Path, count: int) -> None:
    """`count` files for training and a quarter as many held out: windows of half to all of a photograph's height."""
    sources, rng = photographs(), np.random.default_rng(0)
    for split, number in (("train", count), ("val", count // 4)):
        for index in range(number):
            source = sources[index % len(sources)]
            height = rng.uniform(0.5, 1) * min(source.height, source.width * SIZE[1] / SIZE[0])
            width = height * SIZE[0] / SIZE[1]
            left, top = rng.uniform(0, source.width - width), rng.uniform(0, source.height - height)
            folder = root / split / f"class {index % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            window = source.resize(SIZE, Image.Resampling.LANCZOS, (left, top, left + width, top + height))
            window.save(folder / f"{index:05}.jpg", quality=92)


def loader(flags: Sequence[str], workers: int, *, train: bool) -> Any:
    args = trainer_args([*flags, "--num_workers", str(workers)])
    return build_loader(args, train=train, channels=3)


def images_per_second(flags: Sequence[str], workers: int, seconds: float, *, train: bool) -> float:
    """Over whole batches for at least `seconds`, after the workers have started and their first batches are made."""
    source = loader(flags, workers, train=train)
    images, start, epoch = 0, 0.0, 0
    while True:
        source.set_epoch(epoch)
        for step, (batch, _) in enumerate(source):
            if epoch == 0 and step < max(1, 2 * workers):
                start = time.perf_counter()  # what was made ahead of this moment is not counted below
                images = 0
                continue
            images += len(batch)
            if time.perf_counter() - start > seconds:
                return images / (time.perf_counter() - start)
        epoch += 1


def stage_times(flags: Sequence[str], count: int) -> dict[str, list[float]]:
    """Milliseconds of each stage for `count` training images, one after the other in this process."""
    source = loader(flags, 0, train=True)
    transform = source._loader.dataset.transform.transforms
    stages: list[tuple[str, Callable]] = [("read and decode", lambda index: source.source[index][0])]
    stages += [(type(step).__name__, step) for step in transform]
    times: dict[str, list[float]] = {name: [] for name, _ in stages}
    for index in range(-10, count):  # ten to warm up
        value: Any = index % len(source.source)
        for name, stage in stages:
            start = time.perf_counter()
            value = stage(value)
            if index >= 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def stage_table(times: dict[str, list[float]]) -> Table:
    total = sum(map(statistics.fmean, times.values()))
    table = Table("training, one process: where an image's time goes", ["stage", "ms per image", "share"])
    for name, values in times.items():
        mean = statistics.fmean(values)
        table.rows.append([name, significant(mean), f"{mean / total:.0%}"])
    table.rows.append(["together", significant(total), f"{1000 / total:.0f} images/s"])
    return table


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> list[int]:
    return sorted({1, max(1, cores() // 2), cores()})


def measure_loader(flags: Sequence[str], workers: Sequence[int], seconds: float, count: int) -> Section:
    times = stage_times(flags, count)
    table = Table(
        f"loader alone, {cores()} cores", ["workers", "training, images/s", "per worker", "evaluation, images/s"]
    )
    rates = {}
    for number in workers:
        train, test = (images_per_second(flags, number, seconds, train=train) for train in (True, False))
        rates[number] = {"training": train, "evaluation": test}
        table.rows.append([str(number), f"{train:.0f}", f"{train / number:.0f}", f"{test:.0f}"])
    best, core = max(rate["training"] for rate in rates.values()), 1000 / sum(map(statistics.fmean, times.values()))
    table.note = (
        f"A model that trains faster than {best:.0f} images/s on this machine waits for this loader. A core makes at "
        f"most {core:.0f}: more cores help, and files with a shorter side of 256 pixels, which decode faster."
    )
    figures = {"rates": rates, "stages_ms": {name: statistics.fmean(values) for name, values in times.items()}}
    return Section("loader", figures, [stage_table(times), table])


@contextlib.contextmanager
def data_folder(path: str | None, count: int) -> Iterator[str]:
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(Path(folder), count)
        yield folder


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", help="your own train/ and val/ instead")
    parser.add_argument("--workers", type=int, nargs="+", default=default_workers(), help="default: 1, half, all cores")
    parser.add_argument("--images", type=int, default=1024, help="files to write; 1024")
    parser.add_argument("--seconds", type=float, default=10.0, help="of every measurement; 10")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "benchmarks", metavar="DIR")
    parser.add_argument("trainer", nargs="*", help="after --: flags of vim/main.py, e.g. -- --input-size 384")
    args = parser.parse_args(argv)
    if min(args.workers) < 1:
        parser.error(f"--workers: got {min(args.workers)}; expected at least 1")
    if args.images < 256:
        parser.error(f"--images: got {args.images}; expected at least 256")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 120)
    record = {
        "machine": {"cores": cores(), "load_average_before": os.getloadavg()[0]},
        "torch": torch.__version__,
        "pillow": Image.__version__,
        "revision": revision(),
        "data_path": args.data_path,
        "trainer": args.trainer,
    }
    with data_folder(args.data_path, args.images) as folder:
        files = list(Path(folder).glob("train/*/*"))[:1000]
        size = statistics.fmean(file.stat().st_size for file in files) / 1024
        console.print(f"{cores()} cores, load {os.getloadavg()[0]:.2f}; JPEG files of {size:.0f} KiB on average")
        flags = ["--model", "vim_tiny", "--data-set", "IMNET", "--data-path", folder, "--batch-size", "32"]
        section = measure_loader([*flags, *args.trainer], args.workers, args.seconds, min(200, args.images))
    args.output.mkdir(parents=True, exist_ok=True)
    write(section, {**record, "file_kib": size}, args.output)
    for table in section.tables:
        console.print(table.rich())
    console.print(f"Written to {args.output}", highlight=False)


if __name__ == "__main__":
    main()
