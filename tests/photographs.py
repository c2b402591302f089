"""An ImageFolder of real photographs, for tests: nothing has to be downloaded."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


def photograph_folder(root: Path, train: int = 10, val: int = 5, size: tuple[int, int] = (80, 90)) -> Path:
    """JPEG windows of `size` (H, W) of scikit-learn's two photographs in `root`, one class each; so many per class."""
    rng = np.random.default_rng(0)
    height, width = size
    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        for split, count in (("train", train), ("val", val)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                top = rng.integers(0, photograph.shape[0] - height)
                left = rng.integers(0, photograph.shape[1] - width)
                window = photograph[top : top + height, left : left + width]
                Image.fromarray(window).save(folder / f"{index}.jpg")
    return root
