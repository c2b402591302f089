"""Data sets: what is in a batch, that it can be repeated, and what is said when the files are not as they must be."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torchvision import datasets

from vim.data import DataError, build_loader, random_affine
from vim.main import parse_args

MODEL = ["--model", "resnet18"]


def loader(*flags: str, train: bool = True, channels: int = 3):
    return build_loader(parse_args([*MODEL, *flags]), train=train, channels=channels)


def digits(*flags: str, train: bool = True, channels: int = 1):
    return loader("--data-set", "DIGITS", *flags, train=train, channels=channels)


def batches(source, epoch: int = 0):
    source.set_epoch(epoch)
    images, labels = zip(*source, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """An ImageFolder of real images: crops of scikit-learn's two photographs, one class each."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        for split, count in (("train", 10), ("val", 5)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                top, left = rng.integers(0, photograph.shape[0] - 80), rng.integers(0, photograph.shape[1] - 90)
                Image.fromarray(photograph[top : top + 80, left : left + 90]).save(folder / f"{index}.jpg")
    return root


def image_folder(root: Path, *flags: str, train: bool = True):
    return loader("--data-path", str(root), "--batch-size", "4", "--input-size", "64", *flags, train=train)


# --- DIGITS ---


def test_digits_are_split_without_overlap_and_in_proportion():
    train, test = digits(train=True), digits(train=False)
    assert (len(train.images), len(test.images)) == (1437, 360)
    together = torch.cat([train.images, test.images]).flatten(1)
    original = torch.from_numpy(load_digits().data / 16.0).float()
    assert torch.equal(together.sum(0), original.sum(0))
    shares = torch.bincount(test.labels).double() / torch.bincount(torch.cat([train.labels, test.labels]))
    assert (shares - 0.2).abs().max() < 0.005


def test_digits_held_out_images_do_not_depend_on_the_seed():
    assert torch.equal(digits("--seed", "1", train=False).images, digits("--seed", "2", train=False).images)


def test_digits_evaluation_is_in_order_complete_and_not_augmented():
    source = digits("--batch-size", "100", train=False)
    images, labels = batches(source)
    assert len(source) == 4 and torch.equal(labels, source.labels)
    assert torch.allclose(images, (source.images - 0.305) / 0.376)


def test_digits_training_batches_are_full_and_normalized():
    images, labels = batches(digits("--batch-size", "50"))
    assert images.shape == (1400, 1, 8, 8) and images.dtype == torch.float32
    assert labels.shape == (1400,) and labels.dtype == torch.int64
    assert abs(images.mean()) < 0.1 and abs(images.std() - 1) < 0.2


def test_digits_order_and_augmentation_depend_on_seed_and_epoch_only():
    first, again = batches(digits("--seed", "3"), epoch=5), batches(digits("--seed", "3"), epoch=5)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    for other in (batches(digits("--seed", "3"), epoch=6), batches(digits("--seed", "4"), epoch=5)):
        assert not torch.equal(first[1], other[1])


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (16, 3), (32, 3)])
def test_digits_size_and_channels(size, channels):
    images, _ = next(iter(digits("--input-size", str(size), train=False, channels=channels)))
    assert images.shape[1:] == (channels, size, size)
    assert torch.equal(images[:, :1].expand_as(images), images)


def test_random_affine_without_freedom_changes_nothing():
    images = digits(train=False).images[:10]
    same = random_affine(images, torch.Generator(), degrees=0, shift=0, zoom=0)
    assert torch.allclose(same, images, atol=1e-5)


def test_random_affine_moves_but_never_flips():
    bar = torch.zeros(200, 1, 16, 16)
    bar[:, :, 2:14, 3:5] = 1.0  # an upright bar, left of the middle
    moved = random_affine(bar, torch.Generator().manual_seed(0))
    columns = moved.sum(dim=(1, 2))
    centre = (columns * torch.arange(16)).sum(1) / columns.sum(1)
    assert centre.std() > 0.3
    assert centre.max() < 8
    assert moved.min() >= 0 and moved.max() <= 1 + 1e-5


# --- folders of images ---


def test_image_folder(photographs):
    source = image_folder(photographs, "--num_workers", "0")
    assert source.classes == ["china", "flower"] and len(source) == 5
    images, labels = batches(source)
    assert images.shape == (20, 3, 64, 64) and sorted(labels.tolist()) == [0] * 10 + [1] * 10


def test_image_folder_evaluation_is_complete_and_repeatable(photographs):
    images, labels = batches(image_folder(photographs, "--num_workers", "0", train=False))
    assert labels.tolist() == [0] * 5 + [1] * 5
    assert torch.equal(images, batches(image_folder(photographs, "--num_workers", "2", train=False))[0])


def test_workers_repeat_an_epoch(photographs):
    flags = ("--num_workers", "2", "--seed", "7")
    first, again = (batches(image_folder(photographs, *flags), epoch=2) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], batches(image_folder(photographs, *flags), epoch=3)[0])


def test_small_images_are_padded_and_cropped(photographs):
    images, _ = batches(image_folder(photographs, "--input-size", "32", "--num_workers", "0"))
    assert images.shape == (20, 3, 32, 32)


def test_missing_data_path_is_asked_for():
    with pytest.raises(DataError, match="IMNET needs --data-path"):
        loader()


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere is not a folder"):
        image_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no folder .*train.*must hold train/ and val/"):
        image_folder(tmp_path)


def test_empty_class_folder_is_named(photographs, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "china").symlink_to(photographs / "train" / "china")
    (tmp_path / "train" / "nothing").mkdir()
    with pytest.raises(DataError, match=r"train.*nothing"):
        image_folder(tmp_path)


def test_folder_without_classes_is_named(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="train"):
        image_folder(tmp_path)


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_corrupt_image_is_named(photographs, tmp_path, workers, damage):
    whole = (photographs / "val" / "china" / "0.jpg").read_bytes()
    folder = tmp_path / "val" / "china"
    folder.mkdir(parents=True)
    (folder / "a.jpg").write_bytes(whole)
    content = {"truncated": whole[: len(whole) // 2], "text": b"no image", "empty": b""}[damage]
    (folder / "b.jpg").write_bytes(content)
    with pytest.raises(DataError) as caught:
        batches(image_folder(tmp_path, "--num_workers", workers, train=False))
    assert str(caught.value).startswith(f"cannot read image {folder / 'b.jpg'}: ")
    assert "Traceback" not in str(caught.value)


def test_batch_larger_than_the_training_set_is_refused(photographs):
    with pytest.raises(DataError, match=r"--batch-size 64: .* fewer images"):
        image_folder(photographs, "--batch-size", "64")


def test_photographs_are_not_given_to_a_model_of_one_channel(photographs):
    with pytest.raises(DataError, match="RGB images, but the model is made for 1 channels"):
        loader("--data-path", str(photographs), channels=1)


# --- CIFAR ---


def write_cifar(root: Path, kind: type[datasets.CIFAR10], per_file: int = 20) -> None:
    """The files of the python version of CIFAR, with a few real images: digits."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    source = load_digits()
    images = np.kron(source.images * 15.9, np.ones((4, 4))).astype(np.uint8)  # 32x32
    key = "labels" if kind is datasets.CIFAR10 else "fine_labels"
    files = [name for name, _ in (*kind.train_list, *kind.test_list)]
    for index, name in enumerate(files):
        chosen = slice(index * per_file, (index + 1) * per_file)
        data = np.repeat(images[chosen, None], 3, axis=1).reshape(per_file, 3072)
        (folder / name).write_bytes(pickle.dumps({"data": data, key: source.target[chosen].tolist()}))
    names = [f"class {index}" for index in range(100 if kind is datasets.CIFAR100 else 10)]
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: names}))


@pytest.mark.parametrize(
    ("name", "kind", "train_images", "classes"),
    [
        ("CIFAR10", datasets.CIFAR10, 100, 10),
        ("CIFAR100", datasets.CIFAR100, 20, 100),
        ("CIFAR", datasets.CIFAR100, 20, 100),
    ],
)
def test_cifar(tmp_path, monkeypatch, name, kind, train_images, classes):
    write_cifar(tmp_path, kind)
    # These are not the original files, so their checksums are not either.
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).is_file())
    flags = ["--data-set", name, "--data-path", str(tmp_path), "--input-size", "32", "--batch-size", "10"]
    train = loader(*flags, "--num_workers", "0")
    images, _ = batches(train)
    assert images.shape == (train_images, 3, 32, 32) and len(train.classes) == classes
    images, labels = batches(loader(*flags, "--num_workers", "0", train=False))
    assert images.shape == (20, 3, 32, 32)
    held_out = slice(len(kind.train_list) * 20, len(kind.train_list) * 20 + 20)
    assert labels.tolist() == load_digits().target[held_out].tolist()


@pytest.mark.parametrize("damaged", [False, True])
def test_cifar_missing_or_damaged(tmp_path, damaged):
    if damaged:
        write_cifar(tmp_path, datasets.CIFAR10)
    with pytest.raises(DataError, match=r"unpack https?://.*cifar-10-python.tar.gz there, .*cifar-10-batches-py"):
        loader("--data-set", "CIFAR10", "--data-path", str(tmp_path))
