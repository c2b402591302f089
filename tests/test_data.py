"""Data sets: what is in a batch, that it can be repeated, and what is said when the files are not as they must be."""

import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from photographs import photograph_folder
from PIL import Image
from sklearn.datasets import load_digits
from timm.data.auto_augment import rand_augment_transform
from torchvision import datasets

from vim.data import DataError, _transform, build_loader
from vim.loaders import EpochOrder, ImageLoader, move_images
from vim.main import parse_args

MODEL = ["--model", "resnet18"]


def loader(*flags: str, train: bool = True, channels: int = 3):
    return build_loader(parse_args([*MODEL, *flags]), train=train, channels=channels)


def digits(*flags: str, train: bool = True, channels: int = 1):
    return loader("--data-set", "DIGITS", *flags, train=train, channels=channels)


def batches(source, epoch: int = 0, start_batch: int = 0):
    source.set_epoch(epoch, start_batch)
    images, labels = zip(*source, strict=True)
    return torch.cat(images), torch.cat(labels)


def ranks(*flags: str, world_size: int = 2, train: bool = True, channels: int = 3) -> list:
    args = parse_args([*MODEL, *flags])
    return [
        build_loader(args, train=train, channels=channels, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    return photograph_folder(tmp_path_factory.mktemp("photographs"))


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


def test_images_that_are_not_moved_stay_the_same():
    images = digits(train=False).images[:10]
    assert torch.allclose(move_images(images, torch.zeros(10, 4)), images, atol=1e-5)


def test_images_are_moved_but_never_flipped():
    bar = torch.zeros(200, 1, 16, 16)
    bar[:, :, 2:14, 3:5] = 1.0  # an upright bar, left of the middle
    moved = move_images(bar, torch.rand(200, 4) * 2 - 1)
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


def test_a_workers_death_names_its_image():
    class Deadly:
        classes = ("only",)

        def __len__(self):
            return 1

        def __getitem__(self, index):
            os.kill(os.getpid(), signal.SIGKILL)

        def name(self, index):
            return f"file {index}"

    source = ImageLoader(Deadly(), None, EpochOrder(1, train=False, seed=0, batch_size=1), num_workers=1)
    with pytest.raises(DataError, match=r"DataLoader worker .*; the image it took up last is file 0\. If memory"):
        next(iter(source))


def test_workers_outlive_signals_but_not_the_main_process(photographs):
    """Launchers signal every process of a run; the main one needs time to save. Its end must not wait for workers."""
    program = f"""
import multiprocessing, subprocess, time
from vim.config import parse_args
from vim.data import build_loader
flags = {[*MODEL, "--data-path", str(photographs), "--num_workers", "2", "--batch-size", "2", "--input-size", "32"]}
batches = iter(build_loader(parse_args(flags), train=True, channels=3))
next(batches)
for worker in multiprocessing.active_children():
    for name in ("TERM", "USR1", "TERM"):
        subprocess.run(["kill", "-s", name, str(worker.pid)], check=True)  # another process than the main one
time.sleep(0.5)
print(1 + len(list(batches)), "batches")
raise SystemExit("left with the loader alive")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.stdout == "10 batches\n", result.stderr
    assert result.stderr.endswith("left with the loader alive\n") and result.returncode == 1


def test_another_error_is_not_taken_for_a_workers_death(photographs):
    image_folder(photographs).explain(RuntimeError("CUDA error: out of memory"))


# --- order: places of an epoch, shared among processes ---

AUGMENTED = ["--reprob", "0.9", "--input-size", "48"]


@pytest.mark.parametrize("repeats", ["--repeated-aug", "--no-repeated-aug"])
@pytest.mark.parametrize("data", ["photographs", "DIGITS"])
def test_two_processes_see_what_one_sees_with_twice_the_batch(photographs, data, repeats):
    flags = ["--data-path", str(photographs), *AUGMENTED, "--num_workers", "0"]
    channels = 3
    if data == "DIGITS":
        flags, channels = ["--data-set", "DIGITS"], 1
    one = loader(*flags, repeats, "--batch-size", "8", channels=channels)
    two = ranks(*flags, repeats, "--batch-size", "4", channels=channels)
    for source in (one, *two):
        source.set_epoch(3)
    assert len(one) == len(two[0]) == len(two[1])
    for step, (whole, *halves) in enumerate(zip(one, *two, strict=True)):
        for together, *parts in zip(whole, *halves, strict=True):
            assert torch.equal(together, torch.stack(parts, dim=1).flatten(0, 1))
        names = [name for pair in zip(*(half.sample_names(step) for half in two), strict=True) for name in pair]
        assert one.sample_names(step) == names


@pytest.mark.parametrize("data", ["photographs", "DIGITS"])
@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_epoch_can_be_entered_anywhere(photographs, data, workers):
    if data == "DIGITS":
        source = digits("--batch-size", "100")
    else:
        source = image_folder(photographs, *AUGMENTED, "--num_workers", workers)
    images, labels = batches(source, epoch=2)
    for start in (1, 3):
        skipped = start * len(images) // len(source)
        rest, rest_labels = batches(source, epoch=2, start_batch=start)
        assert torch.equal(rest, images[skipped:]) and torch.equal(rest_labels, labels[skipped:])


def test_the_number_of_workers_changes_nothing(photographs):
    expected = batches(image_folder(photographs, *AUGMENTED, "--num_workers", "0"), epoch=1)
    source = image_folder(photographs, *AUGMENTED, "--num_workers", "2")
    batches(source, epoch=0)  # the workers stay from one epoch to the next
    assert torch.equal(batches(source, epoch=1)[0], expected[0])


def test_the_global_random_numbers_are_left_alone(photographs):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    def restart():
        random.seed(5), np.random.seed(5), torch.manual_seed(5)

    restart()
    expected = draw()
    for source in (
        image_folder(photographs, "--num_workers", "0"),
        digits(),
        image_folder(photographs, "--num_workers", "1"),
    ):
        restart()
        batches(source)
        assert draw() == expected


def test_repeated_augmentation_shows_a_third_of_the_images_three_times(photographs):
    source = image_folder(photographs, *AUGMENTED, "--num_workers", "0", "--repeated-aug", "--batch-size", "6")
    seen = []
    for epoch in range(2):
        images, _ = batches(source, epoch)
        names = [name for step in range(len(source)) for name in source.sample_names(step)]
        assert names[0::3] == names[1::3] == names[2::3] and len(set(names)) == len(names) // 3
        assert not torch.equal(images[0], images[1])  # each time in another way
        seen.append(names)
    assert seen[0] != seen[1]


def test_a_seed_does_not_repeat_another_ones_epochs(photographs):
    def names(seed, epoch, repeats):
        source = image_folder(photographs, "--seed", str(seed), repeats)
        source.set_epoch(epoch)
        return source.sample_names(0)

    for repeats in ("--repeated-aug", "--no-repeated-aug"):
        assert names(0, 1, repeats) != names(1, 0, repeats)


@pytest.mark.parametrize("world_size", [1, 3, 7])
def test_every_held_out_image_is_seen_by_exactly_one_process(photographs, world_size):
    flags = ["--data-path", str(photographs), "--batch-size", "4", "--num_workers", "0", "--input-size", "32"]
    seen = []
    for source in ranks(*flags, train=False, world_size=world_size):
        names = [source.sample_names(step) for step in range(len(source))]
        assert [len(images) for images, _ in source] == list(map(len, names))
        seen += [name for batch in names for name in batch]
    assert sorted(seen) == sorted(str(path) for path in (photographs / "val").rglob("*.jpg"))


def test_all_processes_train_on_equally_many_batches(photographs):
    lengths = [len(source) for source in ranks("--data-path", str(photographs), "--batch-size", "2", world_size=3)]
    assert lengths == [3, 3, 3]  # 20 images


# --- augmentation ---


def steps(transform) -> list[str]:
    return [type(step).__name__ for step in transform.transforms]


def transform(*flags: str, train: bool = True):
    return _transform(parse_args([*MODEL, *flags]), train)


def test_the_default_augmentation_is_deits():
    default = transform()
    assert steps(default) == [
        "RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "RandAugment", "MaybeToTensor", "Normalize",
        "RandomErasing",
    ]  # fmt: skip
    assert len(default.transforms[2].ops) == 15 and default.transforms[2].ops[0].magnitude == 9
    assert (default.transforms[-1].probability, default.transforms[-1].max_count) == (0.25, 1)
    assert "ColorJitter" in steps(transform("--aa", "none")) and "RandomErasing" not in steps(
        transform("--reprob", "0")
    )


def test_three_augment_greys_solarizes_or_blurs(photographs):
    three = transform("--ThreeAugment", "--color-jitter", "0.3")
    assert steps(three)[2:4] == ["AutoAugment", "ColorJitter"]
    image = Image.open(photographs / "train" / "flower" / "0.jpg")
    results = {np.asarray(three.transforms[2](image)).tobytes(): None for _ in range(40)}
    arrays = [np.frombuffer(result, np.uint8).reshape(80, 90, 3).astype(int) for result in results]
    original = np.asarray(image).astype(int)
    grey = [array for array in arrays if (array == array[..., :1]).all()]
    solarized = [array for array in arrays if (array == np.where(original < 128, original, 255 - original)).all()]
    blurred = [array for array in arrays if abs(array.mean() - original.mean()) < 1 and array.std() < original.std()]
    assert len(grey) == len(solarized) == 1 and len(blurred) > 2 and len(blurred) == len(arrays) - 2


def test_simple_random_crop_keeps_the_scale(photographs):
    simple = transform("--src", "--input-size", "60").transforms[0]
    image = Image.open(photographs / "train" / "flower" / "0.jpg")  # 80 high, 90 wide
    small = np.asarray(image.resize((68, 60), Image.Resampling.BICUBIC)).astype(int)
    padded = np.pad(small, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    for _ in range(10):
        crop = np.asarray(simple(image)).astype(int)
        assert crop.shape == (60, 60, 3)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (60, 60, 3))[:, :, 0]
        assert np.abs(windows - crop).mean(axis=(2, 3, 4)).min() < 1


@pytest.mark.parametrize("flags", [[], ["--src"], ["--ThreeAugment"]])
def test_rectangular_images(photographs, flags):
    flags = ["--data-path", str(photographs), "--num_workers", "0", "--batch-size", "2", *flags]
    for train in (True, False):
        args = parse_args([*MODEL, *flags])
        args.input_size = (48, 64)
        images, _ = batches(build_loader(args, train=train, channels=3))
        assert images.shape[1:] == (3, 48, 64)


def test_evaluation_takes_the_middle(photographs):
    image = Image.open(photographs / "val" / "china" / "0.jpg")
    whole = transform("--input-size", "64", "--eval-crop-ratio", "1", train=False)(image)
    middle = transform("--input-size", "64", "--eval-crop-ratio", "0.8", train=False)(image)
    assert whole.shape == middle.shape == (3, 64, 64)
    enlarged = torch.nn.functional.interpolate(whole[None, :, 6:-6, 6:-6], 64, mode="bicubic")[0]
    assert (enlarged - middle).abs().mean() < 0.5 * (whole - middle).abs().mean()


def test_the_strongest_posterization_is_black(photographs):
    """As in the published runs; Pillow 13 refuses 0 bits."""
    image = Image.open(photographs / "val" / "china" / "0.jpg")
    strongest = rand_augment_transform("rand-m10-n1-inc1", {})
    posterize = next(op for op in strongest.ops if op.name.startswith("Posterize"))
    posterize.prob = 1.0
    assert posterize(image).getextrema() == ((0, 0),) * 3
    posterize.magnitude = 9
    assert posterize(image).getextrema()[0][1] == 128


# --- iNaturalist ---


@pytest.fixture
def inaturalist(tmp_path, photographs) -> Path:
    """Four training images and two held-out ones, laid out as iNaturalist 2018 and 2019."""
    files = sorted((photographs / "train").rglob("*.jpg"))
    taxa = [
        {"id": 0, "name": "a a", "genus": "a"},
        {"id": 1, "name": "a b", "genus": "a"},
        {"id": 2, "name": "c d", "genus": "c"},
    ]
    (tmp_path / "categories.json").write_text(json.dumps(taxa))
    for year in (2018, 2019):
        for split, taxon_ids in (("train", [2, 0, 1, 0]), ("val", [1, 2])):
            images, annotations = [], []
            for number, taxon in enumerate(taxon_ids):
                name = f"train_val{year}/Kingdom/{taxon}/{split}{number}.jpg"
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name).write_bytes(files[number].read_bytes())
                images.append({"id": 100 + number, "file_name": name})
                annotations.insert(0, {"image_id": 100 + number, "category_id": taxon})
            annotations.sort(key=lambda entry: entry["image_id"])
            (tmp_path / f"{split}{year}.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return tmp_path


def inat(root: Path, *flags: str, train: bool = True):
    flags = ("--data-path", str(root), "--batch-size", "2", "--num_workers", "0", "--input-size", "32", *flags)
    return loader(*flags, train=train)


@pytest.mark.parametrize("name", ["INAT", "INAT19"])
def test_inaturalist_numbers_classes_as_they_first_occur(inaturalist, name):
    source = inat(inaturalist, "--data-set", name, train=False)
    assert source.classes == ["c d", "a a", "a b"] and batches(source)[1].tolist() == [2, 0]
    source = inat(inaturalist, "--data-set", name, "--inat-category", "genus", train=False)
    assert source.classes == ["c", "a"] and batches(source)[1].tolist() == [1, 0]
    train = inat(inaturalist, "--data-set", name)
    _, labels = batches(train)
    assert labels.tolist() == [
        dict(train.source.samples)[path] for step in range(2) for path in train.sample_names(step)
    ]


def test_inaturalist_missing_pieces_are_named(inaturalist):
    with pytest.raises(DataError, match=r"lack the entry 'kingdom'; .*another --inat-category"):
        inat(inaturalist, "--data-set", "INAT", "--inat-category", "kingdom")
    (inaturalist / "train2018.json").write_text("{")
    with pytest.raises(DataError, match=r"train2018\.json is not json"):
        inat(inaturalist, "--data-set", "INAT")
    (inaturalist / "categories.json").unlink()
    with pytest.raises(DataError, match=r"cannot read .*categories\.json: No such file"):
        inat(inaturalist, "--data-set", "INAT19")


# --- timm's schemes ---


@pytest.mark.parametrize(
    ("name", "package"), [("wds/x", "webdataset"), ("hfds/a/b", "datasets"), ("hfids/a/b", "datasets")]
)
def test_a_scheme_says_which_package_it_needs(monkeypatch, name, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=f"--data-set {name} needs the package {package}: pip install {package}"):
        loader("--data-set", name, "--num_workers", "1")


def test_streams_need_a_worker_and_cannot_be_repeated():
    with pytest.raises(DataError, match="--num_workers 0: wds/x is a stream"):
        loader("--data-set", "wds/x", "--num_workers", "0")
    with pytest.raises(DataError, match="--repeated-aug is not possible with wds/x"):
        loader("--data-set", "wds/x", "--num_workers", "1", "--repeated-aug")


def test_splits_belong_to_schemes(photographs):
    with pytest.raises(DataError, match="--train-split and --val-split are for wds, hfds, hfids; IMNET has its own"):
        image_folder(photographs, "--val-split", "test")


def test_a_number_of_classes_that_is_not_the_data_sets_is_refused(photographs):
    image_folder(photographs, "--num-classes", "2")
    with pytest.raises(DataError, match="--num-classes 3: IMNET has 2 classes"):
        image_folder(photographs, "--num-classes", "3")


@pytest.mark.parametrize("scheme", ["hfds", "hfids"])
def test_hub_data_sets(photographs, tmp_path, monkeypatch, scheme):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    flags = ["--data-set", f"{scheme}/{photographs}", "--data-path", str(tmp_path)]  # the path is only a cache
    flags += ["--num_workers", "1", "--batch-size", "4", "--input-size", "32"]
    classes = ["china", "flower"]
    if scheme == "hfids":  # of a folder, neither the images nor the classes are counted ahead
        with pytest.raises(DataError, match=r"split train: .*length is unknown"):
            loader(*flags)
        flags += ["--train-split", "train|20", "--val-split", "validation|10", "--num-classes", "2"]
        classes = ["0", "1"]
    train, held_out = loader(*flags), loader(*flags, train=False)
    assert train.classes == held_out.classes == classes
    images, labels = batches(train, epoch=1)
    assert images.shape == (20, 3, 32, 32) and sorted(labels.tolist()) == [0] * 10 + [1] * 10
    assert torch.equal(batches(train, epoch=1, start_batch=2)[0], images[8:])
    assert batches(held_out)[1].tolist() == [0] * 5 + [1] * 5
    assert len(train.sample_names(1)) == (4 if scheme == "hfds" else 0)


@pytest.fixture(scope="module")
def shards(photographs, tmp_path_factory) -> Path:
    """The photographs as tar shards: train-0.tar, train-1.tar, val-0.tar, val-1.tar."""
    pytest.importorskip("webdataset")
    root = tmp_path_factory.mktemp("shards")
    for split in ("train", "val"):
        files = sorted((photographs / split).rglob("*.jpg"))
        for shard in range(2):
            with tarfile.open(root / f"{split}-{shard}.tar", "w") as tar:
                for number, path in enumerate(files[shard::2]):
                    label = str(["china", "flower"].index(path.parent.name)).encode()
                    for suffix, content in (("jpg", path.read_bytes()), ("cls", label)):
                        entry = tarfile.TarInfo(f"{shard}{number:04}.{suffix}")
                        entry.size = len(content)
                        tar.addfile(entry, io.BytesIO(content))
    return root


def wds(root: Path, *flags: str, train: bool = True, workers: str = "2"):
    flags = ("--data-set", "wds/photographs", "--data-path", str(root), "--num_workers", workers, *flags)
    splits = ("--train-split", "train-{0..1}.tar|20", "--val-split", "val-{0..1}.tar|10")
    return loader(
        *splits,
        *flags,
        "--mixup",
        "0",
        "--cutmix",
        "0",
        "--batch-size",
        "5",
        "--input-size",
        "32",
        "--num-classes",
        "2",
        train=train,
    )


def test_tar_shards(shards):
    held_out = wds(shards, train=False)
    assert held_out.classes == ["0", "1"]
    images, labels = batches(held_out)
    assert images.shape == (10, 3, 32, 32) and sorted(labels.tolist()) == [0] * 5 + [1] * 5
    train = wds(shards)
    images, labels = batches(train, epoch=1)
    assert len(train) == 4 and images.shape == (20, 3, 32, 32)
    again = batches(wds(shards), epoch=1)
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    assert not torch.equal(images, batches(train, epoch=2)[0])
    rest = batches(train, epoch=1, start_batch=2)
    assert torch.equal(rest[0], images[10:])
    assert train.sample_names(0) == []


def test_tar_shards_that_are_not_described_are_refused(shards):
    with pytest.raises(DataError, match="number of samples is not known; give it after the shards"):
        wds(shards, "--val-split", "val-{0..1}.tar", train=False)
    with pytest.raises(DataError, match="split nothing"):
        wds(shards, "--train-split", "nothing")
    flags = ["--data-set", "wds/x", "--data-path", str(shards), "--num_workers", "1", "--val-split", "val-0.tar|5"]
    with pytest.raises(DataError, match="wds/x does not say how many classes it has: give --num-classes"):
        loader(*flags, train=False)


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
