"""Data sets by name, as loaders of (images (B, C, H, W) float32, labels (B,) int64) batches.

A loader's order and augmentation are functions of (seed, epoch) (`set_epoch`), so that an epoch can be repeated.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler
from torchvision import datasets, transforms
from torchvision.datasets.folder import default_loader

# Defaults of flags that the data set decides; the command line wins over them.
DATA_SETS: dict[str, dict[str, object]] = {
    "IMNET": {},
    "CIFAR10": {},
    "CIFAR100": {},
    "DIGITS": {"input_size": 8, "mixup": 0.0, "cutmix": 0.0},
}
_DIGITS_MEAN, _DIGITS_STD = 0.305, 0.376  # over all pixels, of values in [0, 1]


class DataError(RuntimeError):
    """A data set is missing, malformed, or does not fit the flags."""


class EpochLoader(DataLoader):
    """A DataLoader whose order and workers' seeds depend on (seed, epoch) alone.

    `classes`: the class names, in label order.
    """

    def __init__(self, dataset: Dataset, *, train: bool, seed: int, batch_size: int, **options) -> None:
        self.classes: list[str] = list(dataset.classes)
        self.seed = seed
        generator = torch.Generator()
        sampler = RandomSampler(dataset, generator=generator) if train else SequentialSampler(dataset)
        super().__init__(dataset, batch_size, sampler=sampler, generator=generator, drop_last=train, **options)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(_mix_seed(self.seed, epoch))

    def __iter__(self) -> Iterator[list[Tensor]]:
        try:
            yield from super().__iter__()
        except DataError as error:
            # From a worker process it arrives wrapped in that process's traceback; its own text comes last.
            raise DataError(str(error).rsplit("DataError: ", 1)[-1].strip()) from None


class TensorLoader:
    """Batches of a data set that is held in memory, augmented as whole batches.

    images: (N, C, H, W) float32 in [0, 1], background 0; labels: (N,) int64; classes: names, in label order.
    train: shuffled, augmented, full batches only; otherwise in order, complete.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, classes: list[str], *, train: bool, seed: int, batch_size: int
    ) -> None:
        self.images, self.labels, self.classes = images, labels, classes
        self.train, self.seed, self.batch_size = train, seed, batch_size
        self.generator = torch.Generator()

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(_mix_seed(self.seed, epoch))

    def __len__(self) -> int:
        return len(self.images) // self.batch_size if self.train else math.ceil(len(self.images) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.images)
        order = torch.randperm(count, generator=self.generator) if self.train else torch.arange(count)
        for step in range(len(self)):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
            images = self.images[chosen]
            if self.train:
                images = random_affine(images, self.generator)
            yield (images - _DIGITS_MEAN) / _DIGITS_STD, self.labels[chosen]


Loader = EpochLoader | TensorLoader


def build_loader(args: argparse.Namespace, *, train: bool, channels: int, pin_memory: bool = False) -> Loader:
    """The training or the held-out loader of `args.data_set`.

    channels: of the images, as the model wants them. Photographs are RGB; the digits' one channel is repeated.

    Raises DataError if the data are not there or not as they must be.
    """
    if args.data_set == "DIGITS":
        loader: Loader = _digits(args, train, channels)
    else:
        if channels != 3:
            raise DataError(f"{args.data_set} has RGB images, but the model is made for {channels} channels")
        build_dataset = _image_folder if args.data_set == "IMNET" else _cifar
        loader = EpochLoader(
            build_dataset(args, train),
            train=train,
            seed=args.seed,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            pin_memory=pin_memory,
        )
    if len(loader) == 0:
        raise DataError(f"--batch-size {args.batch_size}: the training set has fewer images; choose a smaller one")
    return loader


def random_affine(
    images: Tensor, generator: torch.Generator, *, degrees: float = 10.0, shift: float = 0.1, zoom: float = 0.1
) -> Tensor:
    """Rotate, zoom and shift each image of a batch (B, C, H, W) at random; what comes in from outside is 0.

    Uniform in ±degrees, 1 ± zoom, and ±shift of the width and height.
    """
    angle, scale, dx, dy = torch.rand(4, len(images), generator=generator) * 2 - 1
    angle, scale = angle * math.radians(degrees), 1 + scale * zoom
    cos, sin = scale * angle.cos(), scale * angle.sin()
    # Coordinates run from -1 to 1, so the whole width is 2.
    theta = torch.stack([cos, -sin, 2 * shift * dx, sin, cos, 2 * shift * dy], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _digits(args: argparse.Namespace, train: bool, channels: int) -> TensorLoader:
    """scikit-learn's 1,797 handwritten digits, 8x8; the same fifth of each class is held out whatever the seed."""
    # Here, because only this data set needs scikit-learn, which takes a second to import.
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("--data-set DIGITS needs scikit-learn: pip install scikit-learn") from error

    digits = load_digits()
    split = train_test_split(digits.images / 16.0, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
    images, labels = split[0::2] if train else split[1::2]
    images = torch.from_numpy(images).float()[:, None]
    size = args.input_size
    if size != images.shape[-1]:
        images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    return TensorLoader(
        images.repeat(1, channels, 1, 1),
        torch.from_numpy(labels).long(),
        [str(name) for name in digits.target_names],
        train=train,
        seed=args.seed,
        batch_size=args.batch_size,
    )


def _image_folder(args: argparse.Namespace, train: bool) -> Dataset:
    """`data_path/{train,val}/<class>/<image>`, the layout of ImageNet as everyone unpacks it."""
    root = _data_path(args) / ("train" if train else "val")
    if not root.is_dir():
        raise DataError(f"no folder {root}; --data-path must hold train/ and val/ with one folder per class")
    try:
        return datasets.ImageFolder(str(root), _transform(args, train), loader=_load_image)
    except FileNotFoundError as error:  # no class folders, or one without images: the message names it
        raise DataError(f"{root}: {error}") from error


def _cifar(args: argparse.Namespace, train: bool) -> Dataset:
    root = _data_path(args)
    kind = getattr(datasets, args.data_set)
    try:
        return kind(str(root), train, _transform(args, train), download=False)
    except RuntimeError as error:
        raise DataError(
            f"{args.data_set} is not in {root}, or its files are damaged: unpack {kind.url} there, "
            f"so that {root / kind.base_folder} exists"
        ) from error


def _data_path(args: argparse.Namespace) -> Path:
    if not args.data_path:
        raise DataError(f"--data-set {args.data_set} needs --data-path, the folder that holds it")
    root = Path(args.data_path)
    if not root.is_dir():
        raise DataError(f"--data-path {root} is not a folder")
    return root


def _transform(args: argparse.Namespace, train: bool) -> transforms.Compose:
    """timm's pipeline as in DeiT: small images are padded and cropped instead of rescaled."""
    small = args.input_size <= 32
    if not train:
        crop = 1.0 if small else args.eval_crop_ratio
        return create_transform(args.input_size, interpolation=args.train_interpolation, crop_pct=crop)
    try:
        transform = create_transform(
            args.input_size,
            is_training=True,
            color_jitter=args.color_jitter,
            auto_augment=None if args.aa == "none" else args.aa,
            interpolation=args.train_interpolation,
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
        )
    except (AssertionError, ValueError) as error:
        raise DataError(
            f"--aa {args.aa!r} is not an augmentation policy of timm (such as rand-m9-mstd0.5-inc1, or none): {error!r}"
        ) from error
    if small:
        transform.transforms[0] = transforms.Compose(
            [transforms.Resize(args.input_size), transforms.RandomCrop(args.input_size, padding=4)]
        )
    return transform


def _load_image(path: str) -> Image.Image:
    try:
        return default_loader(path)
    except Exception as error:  # Pillow's plug-ins raise almost any type on a damaged file
        raise DataError(f"cannot read image {path}: {error}") from error


def _mix_seed(seed: int, epoch: int) -> int:
    """One 64-bit seed per (seed, epoch), so that run `seed + 1` does not repeat run `seed` an epoch later."""
    return (seed * 1_000_003 + epoch) % 2**63
