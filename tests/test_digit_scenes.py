"""Scenes of digits: exact masks and boxes, the same files from the same options, no digit on both sides."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SOURCE = Path(__file__).resolve().parent.parent / "tools" / "make_digit_scenes.py"
spec = importlib.util.spec_from_file_location("make_digit_scenes", SOURCE)
make_digit_scenes = importlib.util.module_from_spec(spec)
sys.modules["make_digit_scenes"] = make_digit_scenes  # dataclasses look there
spec.loader.exec_module(make_digit_scenes)
Options, main, make_scenes = make_digit_scenes.Options, make_digit_scenes.main, make_digit_scenes.make_scenes

FEW = Options(train=6, val=3, size=(64, 80), vary=0.2)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "some"
    assert make_scenes(folder, FEW)
    return folder


def decode(segmentation: dict) -> np.ndarray:
    """COCO's RLE, as its definition says: runs of 0 and 1 in turn, down the columns."""
    height, width = segmentation["size"]
    flat = np.repeat(np.arange(len(segmentation["counts"])) % 2, segmentation["counts"])
    return flat.reshape(width, height).T.astype(bool)


def read(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def test_masks_boxes_and_classes_agree(scenes):
    sizes = set()
    for split, count in (("training", 6), ("validation", 3)):
        coco = json.loads((scenes / f"annotations/instances_{split}.json").read_text())
        assert len(coco["images"]) == count == len(list((scenes / "images" / split).iterdir()))
        for image in coco["images"]:
            pixels = read(scenes / "images" / split / image["file_name"])
            classes = read(scenes / "annotations" / split / image["file_name"])
            assert pixels.shape == (*classes.shape, 3) == (image["height"], image["width"], 3)
            sizes.add(classes.shape)
            painted = np.zeros_like(classes)
            instances = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
            assert 3 <= len(instances) <= 6
            for a in instances:
                mask = decode(a["segmentation"])
                assert mask.sum() == a["area"] > 0 and not painted[mask].any()
                painted[mask] = a["category_id"]
                left, top, width, height = a["bbox"]
                rows, columns = np.nonzero(mask)
                assert (left, top) == (columns.min(), rows.min())
                assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)
            np.testing.assert_array_equal(painted, classes)
    assert len(sizes) > 3  # they vary


def test_a_digit_stands_out_from_what_is_behind_it(scenes):
    for path in (scenes / "images/training").iterdir():
        classes = read(scenes / "annotations/training" / path.name)
        pixels = read(path).mean(-1)
        background = pixels[classes == 0].mean()
        assert np.mean([abs(pixels[classes == c].mean() - background) for c in np.unique(classes)[1:]]) > 25


def test_masks_of_the_evaluation_library_are_the_same(scenes):
    coco_api = pytest.importorskip("pycocotools.coco", reason="scripts/install_mm.sh det installs it")
    coco = coco_api.COCO(scenes / "annotations/instances_training.json")
    for annotation in coco.dataset["annotations"]:
        np.testing.assert_array_equal(coco.annToMask(annotation).astype(bool), decode(annotation["segmentation"]))


def test_same_options_make_the_same_files(scenes, tmp_path):
    assert make_scenes(tmp_path / "again", FEW)
    for path in scenes.rglob("*.*"):
        assert (tmp_path / "again" / path.relative_to(scenes)).read_bytes() == path.read_bytes()
    assert not make_scenes(scenes, FEW)  # nothing to do


def test_another_seed_makes_others(scenes, tmp_path):
    make_scenes(tmp_path / "other", Options(train=1, val=1, size=(64, 80), vary=0.2, seed=1))
    name = "images/training/00000.png"
    assert (tmp_path / "other" / name).read_bytes() != (scenes / name).read_bytes()


def test_no_digit_is_on_both_sides():
    trained, held_out = make_digit_scenes._split_digits(0)
    assert len(trained) + len(held_out) == 1797 and len(held_out) == 539
    # Equal images of two digits do not occur in the data set, so that bytes identify a digit.
    assert not {image.tobytes() for image, _ in trained} & {image.tobytes() for image, _ in held_out}
    assert {digit for _, digit in held_out} == set(range(10))


def test_folders_with_something_else_are_left_alone(scenes, tmp_path, capsys):
    assert main(["--out", str(scenes), "--train", "9"]) == 2
    assert "holds other scenes" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path)]) == 2
    assert "is not empty and holds no scenes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": 0}, "at least 1 scene"),
        ({"size": (32, 64)}, "at least 48×48"),
        ({"vary": 1.0}, "vary must be"),
        ({"digits": (4, 3)}, "digits must be"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**options)
