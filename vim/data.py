"""Data sets by name, their augmentation, and the loader for them; see `vim.loaders` for what a loader promises."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IterableImageDataset, auto_augment, create_dataset, create_transform
from timm.data.transforms import ResizeKeepRatio
from timm.layers import to_2tuple
from torchvision import datasets, transforms
from torchvision.datasets.folder import default_loader

from vim.loaders import DataError, EpochOrder, ImageLoader, ImageSource, Loader, StreamLoader, TensorLoader

# Defaults of flags that the data set decides; YAML and the command line win over them.
DATA_SETS: dict[str, dict[str, Any]] = {
    "IMNET": {},
    "INAT": {},
    "INAT19": {},
    "CIFAR10": {},
    "CIFAR100": {},
    "DIGITS": {"input_size": 8, "mixup": 0.0, "cutmix": 0.0, "repeated_aug": False, "model_ema": False},
}
# timm's schemes, and the package that each needs. hfds/ gives access to any image, the others are streams.
SCHEMES = {"wds": "webdataset", "hfds": "datasets", "hfids": "datasets"}
INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")

_INAT_YEARS = {"INAT": 2018, "INAT19": 2019}
DIGITS_MEAN, DIGITS_STD = 0.305, 0.376  # over all pixels, of values in [0, 1]
# Images this small are padded and cropped instead of rescaled, as in DeiT.
_SMALL = 32


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm's strongest level keeps 0 bits: a black image with the Pillow of the published runs, an error since 13."""
    return auto_augment.posterize(image, bits, **options) if bits > 0 else Image.new(image.mode, image.size)


auto_augment.NAME_TO_OP.update({"Posterize": _posterize, "PosterizeIncreasing": _posterize})


def data_set_name(text: str) -> str:
    """The name under which a data set is known: CIFAR is CIFAR100. Raises DataError, listing the known ones."""
    name = "CIFAR100" if text == "CIFAR" else text
    scheme, slash, _ = name.partition("/")
    if name not in DATA_SETS and not (slash and scheme in SCHEMES):
        schemes = ", ".join(f"{scheme}/…" for scheme in SCHEMES)
        raise DataError(f"--data-set {text} is not known; choose {', '.join(DATA_SETS)}, CIFAR, or timm's {schemes}")
    return name


def data_set_defaults(name: str) -> dict[str, Any]:
    """Defaults of flags for the data set of that name."""
    return DATA_SETS.get(name, {"repeated_aug": False})


def build_loader(
    args: argparse.Namespace,
    *,
    train: bool,
    channels: int,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Loader:
    """The training or the held-out loader of `args.data_set`, `rank`'s share of it.

    channels: of the images, as the model wants them. Photographs are RGB; the digits' one channel is repeated.

    Raises DataError if the data are not there or not as they must be.
    """
    name, scheme = args.data_set, _scheme(args.data_set)
    if name == "DIGITS":
        loader: Loader = _digits(args, train, channels, rank, world_size)
    elif channels != 3:
        raise DataError(f"{name} has RGB images, but the model is made for {channels} channels")
    elif scheme in ("wds", "hfids"):
        loader = _stream(args, train, rank, pin_memory)
    else:
        source = _image_source(args, train)
        loader = ImageLoader(
            source,
            _transform(args, train),
            _order(args, len(source), train, rank, world_size),
            num_workers=args.num_workers,
            pin_memory=pin_memory,
        )
    if scheme is None and (args.train_split or args.val_split):
        raise DataError(f"--train-split and --val-split are for {', '.join(SCHEMES)}; {name} has its own")
    if args.num_classes not in (None, len(loader.classes)):
        raise DataError(f"--num-classes {args.num_classes}: {name} has {len(loader.classes)} classes")
    if train and len(loader) == 0:
        raise DataError(
            f"--batch-size {args.batch_size}: the training set has fewer images for each of {world_size} processes; "
            "choose a smaller one"
        )
    return loader


def _order(args: argparse.Namespace, count: int, train: bool, rank: int, world_size: int) -> EpochOrder:
    return EpochOrder(
        count,
        train=train,
        seed=args.seed,
        batch_size=args.batch_size,
        repeats=args.repeated_aug,
        rank=rank,
        world_size=world_size,
    )


def _digits(args: argparse.Namespace, train: bool, channels: int, rank: int, world_size: int) -> TensorLoader:
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
    size = to_2tuple(args.input_size)
    if size != tuple(images.shape[-2:]):
        images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
    return TensorLoader(
        images.repeat(1, channels, 1, 1),
        torch.from_numpy(labels).long(),
        [str(name) for name in digits.target_names],
        _order(args, len(images), train, rank, world_size),
        title="DIGITS, training image" if train else "DIGITS, held-out image",
        mean=DIGITS_MEAN,
        std=DIGITS_STD,
    )


class _Files:
    """Images in files of their own: samples of (path, label)."""

    def __init__(self, classes: list[str], samples: Sequence[tuple[str, int]]) -> None:
        self.classes, self.samples = classes, samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return default_loader(path), label

    def name(self, index: int) -> str:
        return self.samples[index][0]


class _Archive:
    """Images without files of their own: a torchvision data set of (RGB image, label)."""

    def __init__(self, title: str, dataset: Any) -> None:
        self.classes, self.title, self.dataset = list(dataset.classes), title, dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.dataset[index]

    def name(self, index: int) -> str:
        return f"{self.title} {index}"


class _Reader:
    """Images that a random-access reader of timm gives as (file, label)."""

    def __init__(self, title: str, classes: list[str], reader: Any) -> None:
        self.title, self.classes, self.reader = title, classes, reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, label = self.reader[index]
        return Image.open(file).convert("RGB"), label

    def name(self, index: int) -> str:
        return f"{self.title} {index}"


def _image_source(args: argparse.Namespace, train: bool) -> ImageSource:
    if _scheme(args.data_set):
        dataset = _timm_dataset(args, train)
        return _Reader(args.data_set, _class_names(args, dataset.reader), dataset.reader)
    root = _data_path(args)
    if args.data_set in _INAT_YEARS:
        return _inat(root, _INAT_YEARS[args.data_set], args.inat_category, train)
    if args.data_set == "IMNET":
        return _image_folder(root / ("train" if train else "val"))
    return _cifar(root, args.data_set, train)


def _image_folder(folder: Path) -> _Files:
    """`folder/<class>/<image>`, the layout of ImageNet as everyone unpacks it."""
    if not folder.is_dir():
        raise DataError(f"no folder {folder}; --data-path must hold train/ and val/ with one folder per class")
    try:
        dataset = datasets.ImageFolder(str(folder))
    except FileNotFoundError as error:  # no class folders, or one without images: the message names it
        raise DataError(f"{folder}: {error}") from error
    return _Files(dataset.classes, dataset.samples)


def _inat(root: Path, year: int, category: str, train: bool) -> _Files:
    """iNaturalist 2018 or 2019 as its archives unpack: {train,val}YEAR.json, categories.json, and the images.

    A class is a value of `category`. As in DeiT, classes are numbered as they first occur in the training annotations.
    """
    taxa = {taxon["id"]: taxon for taxon in _json(root / "categories.json")}
    try:
        taxon_names = {key: taxon[category] for key, taxon in taxa.items()}
        in_order = (taxon_names[entry["category_id"]] for entry in _json(root / f"train{year}.json")["annotations"])
        labels = {name: label for label, name in enumerate(dict.fromkeys(in_order))}
        listing = _json(root / f"{'train' if train else 'val'}{year}.json")
        taxon_of = {entry["image_id"]: entry["category_id"] for entry in listing["annotations"]}
        samples = [
            (str(root / entry["file_name"]), labels[taxon_names[taxon_of[entry["id"]]]]) for entry in listing["images"]
        ]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"the annotations of iNaturalist {year} in {root} lack the entry {error}; if that is the category, choose "
            f"another --inat-category of {', '.join(INAT_CATEGORIES)}"
        ) from error
    return _Files(list(labels), samples)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}; --data-path must hold iNaturalist's json files"
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is not json: {error}") from error


def _cifar(root: Path, name: str, train: bool) -> _Archive:
    kind = getattr(datasets, name)
    try:
        dataset = kind(str(root), train, download=False)
    except RuntimeError as error:
        raise DataError(
            f"{name} is not in {root}, or its files are damaged: unpack {kind.url} there, "
            f"so that {root / kind.base_folder} exists"
        ) from error
    return _Archive(f"{name}, {'training' if train else 'test'} image", dataset)


def _stream(args: argparse.Namespace, train: bool, rank: int, pin_memory: bool) -> StreamLoader:
    if args.num_workers == 0:
        raise DataError(f"--num_workers 0: {args.data_set} is a stream, which needs at least one")
    if args.repeated_aug:
        raise DataError(f"--repeated-aug is not possible with {args.data_set}, which is a stream")
    dataset = _timm_dataset(args, train)
    dataset.transform = _transform(args, train)
    return StreamLoader(
        dataset,
        _class_names(args, dataset.reader),
        train=train,
        seed=args.seed,
        rank=rank,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        pin_memory=pin_memory,
    )


def _timm_dataset(args: argparse.Namespace, train: bool) -> Any:
    package = SCHEMES[_scheme(args.data_set)]
    if importlib.util.find_spec(package) is None:
        raise DataError(f"--data-set {args.data_set} needs the package {package}: pip install {package}")
    split = (args.train_split or "train") if train else (args.val_split or "validation")
    options: dict[str, Any] = {"root": args.data_path, "split": split, "batch_size": args.batch_size, "seed": args.seed}
    if _scheme(args.data_set) == "hfids":  # SPLIT|NUMBER, as timm has it for shards
        name, _, number = split.partition("|")
        options |= {"split": name, "num_samples": int(number) if number.isdecimal() else None}
    try:
        dataset = create_dataset(args.data_set, is_training=train, **options)
    except Exception as error:  # whatever the package raises for a missing folder, split, repository or network
        raise DataError(f"--data-set {args.data_set}, split {split}: {error}") from error
    if isinstance(dataset, IterableImageDataset) and not dataset.reader.num_samples:
        raise DataError(
            f"--data-set {args.data_set}, split {split}: the number of samples is not known; give it after the shards, "
            "as in val-{00..07}.tar|50000, or write it into info.json"
        )
    return dataset


def _class_names(args: argparse.Namespace, reader: Any) -> list[str]:
    if reader.class_to_idx:
        return sorted(reader.class_to_idx, key=reader.class_to_idx.get)
    if args.num_classes is None:
        raise DataError(f"{args.data_set} does not say how many classes it has: give --num-classes")
    return [str(label) for label in range(args.num_classes)]


def _data_path(args: argparse.Namespace) -> Path:
    if not args.data_path:
        raise DataError(f"--data-set {args.data_set} needs --data-path, the folder that holds it")
    root = Path(args.data_path)
    if not root.is_dir():
        raise DataError(f"--data-path {root} is not a folder")
    return root


def _transform(args: argparse.Namespace, train: bool) -> transforms.Compose:
    """timm's pipeline with DeiT's settings, and DeiT III's two alternatives.

    `args.ThreeAugment`: one of grey, solarized or blurred, in place of `args.aa`. `args.src`: the shorter side resized
    and a random crop with 4 reflected pixels around, in place of a crop of random size and shape.
    """
    size = to_2tuple(args.input_size)
    small = max(size) <= _SMALL
    if not train:
        return create_transform(size, interpolation="bicubic", crop_pct=1.0 if small else args.eval_crop_ratio)
    policy = "3a" if args.ThreeAugment else args.aa
    try:
        transform = create_transform(
            size,
            is_training=True,
            color_jitter=args.color_jitter,
            auto_augment=None if policy == "none" else policy,
            interpolation=args.train_interpolation,
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
        )
    except (AssertionError, ValueError) as error:
        raise DataError(
            f"--aa {args.aa!r} is not an augmentation policy of timm (such as rand-m9-mstd0.5-inc1, or none): {error!r}"
        ) from error
    if small or args.src:
        transform.transforms[0] = transforms.Compose(
            [
                ResizeKeepRatio(size, interpolation=args.train_interpolation),
                transforms.RandomCrop(size, padding=4, padding_mode="reflect" if args.src else "constant"),
            ]
        )
    return transform


def _scheme(name: str) -> str | None:
    scheme, slash, _ = name.partition("/")
    return scheme if slash else None
