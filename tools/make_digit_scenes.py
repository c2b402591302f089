"""Scenes of handwritten digits, to train segmenters and detectors on without a download.

    python tools/make_digit_scenes.py                        # 2400 + 200 scenes of 128×128 into data/digit_scenes
    python tools/make_digit_scenes.py --out data/wide --size 96 160 --vary 0.25

scikit-learn's real digits, scaled, rotated, tinted, overlapping, on textured backgrounds, with exact masks, boxes and
classes; training and held-out scenes share no digit. The same options make the same files. The folder receives

    images/{training,validation}/NNNNN.png
    annotations/{training,validation}/NNNNN.png     class of every pixel, as in ADE20K: 0 background, 1 + d the digit d
    annotations/instances_{training,validation}.json    COCO: a box, a mask (RLE) and category 1 + d per digit
    scenes.json                                     the options
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS = ("training", "validation")
DRAWING = 3  # number of this way to draw: raise it when the same options would make other pixels
VISIBLE = 0.5  # of a digit's pixels, below which it does not count as seen: such a scene is drawn anew


@dataclasses.dataclass(frozen=True)
class Options:
    """What the scenes are; recorded beside them."""

    train: int = 2400
    val: int = 200
    size: tuple[int, int] = (128, 128)
    vary: float = 0.0
    digits: tuple[int, int] = (3, 6)
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.train, self.val) < 1:
            raise ValueError(f"train and val must be at least 1 scene; got {self.train} and {self.val}")
        if min(self.size) < 48:
            raise ValueError(f"size must be at least 48×48 pixels, or digits do not fit; got {self.size}")
        if not 0 <= self.vary < 1:
            raise ValueError(f"vary must be at least 0 and below 1; got {self.vary}")
        if not 1 <= self.digits[0] <= self.digits[1]:
            raise ValueError(f"digits must be (fewest, most), at least 1; got {self.digits}")


def make_scenes(folder: Path, options: Options) -> bool:
    """Write the scenes into `folder`; False if they are there already.

    Raises ValueError if the folder holds something else.
    """
    wanted = json.loads(json.dumps({"drawing": DRAWING, **dataclasses.asdict(options)}))
    record = folder / "scenes.json"
    if record.exists():
        there = json.loads(record.read_text())
        if there == wanted:
            return False
        raise ValueError(f"'{folder}' holds other scenes, made with {there}: give another --out, or remove it")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"'{folder}' is not empty and holds no scenes: give another --out")
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    for split, count, digits in zip(SPLITS, (options.train, options.val), _split_digits(options.seed), strict=True):
        _write_split(aside, split, count, digits, options)
    (aside / "scenes.json").write_text(json.dumps(wanted, indent=1))
    if folder.exists():
        folder.rmdir()
    aside.rename(folder)
    return True


def _split_digits(seed: int, held_out: float = 0.3) -> tuple[list[tuple[np.ndarray, int]], ...]:
    """(8×8 image from 0 to 1, class) of the training digits, and of the held-out ones."""
    data = load_digits()
    order = np.random.default_rng([seed, 0]).permutation(len(data.target))
    first = round(len(order) * held_out)
    return tuple([(data.images[i] / 16, int(data.target[i])) for i in part] for part in (order[first:], order[:first]))


def _write_split(
    folder: Path, split: str, count: int, digits: Sequence[tuple[np.ndarray, int]], options: Options
) -> None:
    for kind in ("images", "annotations"):
        (folder / kind / split).mkdir(parents=True)
    images, annotations = [], []
    for number in range(count):
        rng = np.random.default_rng([options.seed, 1 + SPLITS.index(split), number])
        pixels, instances = _scene(rng, digits, options)
        height, width = pixels.shape[:2]
        name = f"{number:05d}.png"
        Image.fromarray(pixels).save(folder / "images" / split / name)
        classes = np.zeros((height, width), np.uint8)
        for mask, digit in instances:
            classes[mask] = 1 + digit
            annotations.append(_annotation(len(annotations) + 1, number, mask, digit))
        Image.fromarray(classes).save(folder / "annotations" / split / name)
        images.append({"id": number, "file_name": name, "height": height, "width": width})
    categories = [{"id": 1 + digit, "name": name} for digit, name in enumerate(DIGIT_NAMES)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco))


def _annotation(number: int, image: int, mask: np.ndarray, digit: int) -> dict[str, Any]:
    rows, columns = np.nonzero(mask)
    left, top = int(columns.min()), int(rows.min())
    box = [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]
    return {
        "id": number,
        "image_id": image,
        "category_id": 1 + digit,
        "bbox": box,
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": list(mask.shape), "counts": _run_lengths(mask)},
    }


def _run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's RLE: lengths of the runs of 0 and 1 in turn, column by column, beginning with 0."""
    flat = mask.flatten(order="F").astype(np.int8)
    changes = np.flatnonzero(np.diff(flat, prepend=0))
    return np.diff(changes, prepend=0, append=flat.size).tolist()


def _scene(
    rng: np.random.Generator, digits: Sequence[tuple[np.ndarray, int]], options: Options
) -> tuple[np.ndarray, list[tuple[np.ndarray, int]]]:
    """Pixels (H, W, 3) uint8, and (visible pixels (H, W) bool, class) of each digit."""
    height, width = (round(n * (1 + rng.uniform(-options.vary, options.vary))) for n in options.size)
    while True:
        pixels = _background(rng, height, width)
        owner = np.full((height, width), -1)
        placed = []
        for number in range(rng.integers(options.digits[0], options.digits[1] + 1)):
            image, digit = digits[rng.integers(len(digits))]
            ink, (top, left) = _ink(rng, image, height, width)
            window = np.s_[top : top + ink.shape[0], left : left + ink.shape[1]]
            light = _tint(rng, pixels[window][ink > 0.5].mean())
            pixels[window] += ink[..., None] * (light - pixels[window])
            owner[window][ink > 0.5] = number
            placed.append((int((ink > 0.5).sum()), digit))
        visible = [(owner == number, digit) for number, (_, digit) in enumerate(placed)]
        if all(mask.sum() >= VISIBLE * full for (mask, _), (full, _) in zip(visible, placed, strict=True)):
            noisy = pixels + rng.normal(0, 0.02, pixels.shape)
            return (np.clip(noisy, 0, 1) * 255).round().astype(np.uint8), visible


def _ink(rng: np.random.Generator, image: np.ndarray, height: int, width: int) -> tuple[np.ndarray, tuple[int, int]]:
    """How much of its ink a scaled and rotated digit puts on each pixel, cut to it, and where its corner stands."""
    side = round(min(height, width) * rng.uniform(0.3, 0.45))
    big = Image.fromarray((image * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    turned = big.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)
    strength = np.asarray(turned, dtype=np.float64) / 255
    ink = np.clip((strength - 0.3) / 0.2, 0, 1)  # a sharp edge where the stroke has 0.4 of its strength
    rows, columns = np.nonzero(ink > 0)
    ink = ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    return ink, (rng.integers(height - ink.shape[0] + 1), rng.integers(width - ink.shape[1] + 1))


def _tint(rng: np.random.Generator, under: float) -> np.ndarray:
    """A colour brighter than what is under it."""
    brightness = min(1.0, under + rng.uniform(0.35, 0.5))
    return np.clip(brightness + rng.uniform(-0.12, 0.12, 3), 0, 1)


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(H, W, 3) from 0 to 1: clouds of two sizes in two colours, under stripes."""
    low, high = np.sort(rng.uniform(0.05, 0.5, (2, 3)), axis=0)
    clouds = 0.7 * _clouds(rng, height, width, 4) + 0.3 * _clouds(rng, height, width, 16)
    y, x = np.mgrid[:height, :width]
    angle, period = rng.uniform(0, math.pi), rng.uniform(4, 24)
    stripes = np.sin(2 * math.pi * (x * math.cos(angle) + y * math.sin(angle)) / period)
    mix = np.clip(clouds + rng.uniform(0, 0.15) * stripes, 0, 1)[..., None]
    return low + mix * (high - low)


def _clouds(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    noise = Image.fromarray(rng.uniform(0, 1, (cells, cells)).astype(np.float32))
    return np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = Options()
    parser.add_argument("--out", type=Path, default=Path("data/digit_scenes"), help="new folder (default %(default)s)")
    parser.add_argument("--train", type=int, default=default.train, help="training scenes (default %(default)s)")
    parser.add_argument("--val", type=int, default=default.val, help="held-out scenes (default %(default)s)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), default=default.size, help="pixels")
    parser.add_argument("--vary", type=float, default=default.vary, help="sizes differ by up to this fraction")
    parser.add_argument("--digits", type=int, nargs=2, metavar=("MIN", "MAX"), default=default.digits, help="a scene")
    parser.add_argument("--seed", type=int, default=default.seed)
    args = vars(parser.parse_args(argv))
    folder = args.pop("out")
    try:
        options = Options(**{k: tuple(v) if isinstance(v, list) else v for k, v in args.items()})
        made = make_scenes(folder, options)
    except ValueError as error:
        print(f"make_digit_scenes: {error}", file=sys.stderr)
        return 2
    print(f"{folder}: {options.train} + {options.val} scenes" + ("" if made else ", there already"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
