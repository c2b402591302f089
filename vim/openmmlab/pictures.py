"""Predictions and truths drawn over their images, for one image or many side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

Colour = Sequence[int]


def predict(model: torch.nn.Module, path: str) -> Any:
    """The data sample that the framework's own inference gives for an image file."""
    if model.cfg.default_scope == "mmseg":
        from mmseg.apis import inference_model as run
    else:
        from mmdet.apis import inference_detector as run
    return run(model, path)


def draw(model: torch.nn.Module, path: str, score: float = 0.3, scale: int = 1) -> Image.Image:
    """The prediction for an image file over it, `scale` times as large; instances from `score` on."""
    sample = predict(model, path)
    image = Image.open(path).convert("RGB")
    if "pred_sem_seg" in sample:
        return paint_classes(image, sample.pred_sem_seg.data[0].cpu().numpy(), model.dataset_meta["palette"], scale)
    found = sample.pred_instances.cpu().numpy()
    kept = found.scores >= score
    masks = found.masks[kept] if "masks" in found else [None] * int(kept.sum())
    names = model.dataset_meta["classes"]
    instances = [
        (mask, box, f"{names[label]} {value:.2f}", int(label))
        for mask, box, label, value in zip(
            masks, found.bboxes[kept], found.labels[kept], found.scores[kept], strict=True
        )
    ]
    return paint_instances(image, instances, scale)


def paint_classes(image: Image.Image, classes: np.ndarray, palette: Sequence[Colour], scale: int = 1) -> Image.Image:
    """image (H×W) tinted by classes (H, W), integers; those without a colour in the palette stay as they are."""
    pixels = np.asarray(image, dtype=np.float64)
    known = classes < len(palette)
    colours = np.asarray(palette, dtype=np.float64)[np.where(known, classes, 0)]
    mixed = np.where(known[..., None], 0.4 * pixels + 0.6 * colours, pixels)
    return _enlarge(Image.fromarray(mixed.round().astype(np.uint8)), scale)


def paint_instances(
    image: Image.Image, instances: Sequence[tuple[np.ndarray | None, Sequence[float], str, int]], scale: int = 1
) -> Image.Image:
    """image with each instance's (mask (H, W) bool or None, box (x1, y1, x2, y2), words, class) over it."""
    pixels = np.asarray(image, dtype=np.float64).copy()
    for mask, _, _, label in instances:
        if mask is not None:
            pixels[mask.astype(bool)] = 0.4 * pixels[mask.astype(bool)] + 0.6 * np.asarray(_colour(label))
    out = _enlarge(Image.fromarray(pixels.round().astype(np.uint8)), scale)
    pen = ImageDraw.Draw(out)
    for _, box, words, label in instances:
        left, top, right, bottom = (float(v) * scale for v in box)
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=_colour(label), width=1)
        at = (left + 2, max(0.0, top - 11))
        pen.rectangle(pen.textbbox(at, words), fill=(0, 0, 0))
        pen.text(at, words, fill=(255, 255, 255))
    return out


def _colour(label: int) -> tuple[int, int, int]:
    """Far apart for neighbouring classes: steps of the golden angle around the colour wheel."""
    hue = int(label * 0.618034 * 255) % 256
    return Image.new("HSV", (1, 1), (hue, 200, 255)).convert("RGB").getpixel((0, 0))


def _enlarge(image: Image.Image, scale: int) -> Image.Image:
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST) if scale > 1 else image


def sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], margin: int = 90) -> Image.Image:
    """Rows of pictures, all alike in size, each row with its name at the left."""
    width, height = rows[0][1][0].size
    out = Image.new("RGB", (margin + max(len(r) for _, r in rows) * (width + 4), len(rows) * (height + 4)), "white")
    pen = ImageDraw.Draw(out)
    for y, (name, pictures) in enumerate(rows):
        pen.text((4, y * (height + 4) + height // 2 - 6), name, fill="black")
        for x, picture in enumerate(pictures):
            out.paste(picture, (margin + x * (width + 4), y * (height + 4)))
    return out
