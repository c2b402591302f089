"""Look into a Vision Mamba on an image: `python -m vim.visualize IMAGE --resume CHECKPOINT --output FOLDER`.

Writes attention.png (the hidden attention of each layer and direction, and what the class token takes from each
patch), delta.png (the steps Δ), activation.png (Grad-CAM of the class), receptive_field.png, and index.html, one page
that holds them all. `vim.inspection` says what each is. Any discretization; on a GPU if --device says so.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from vim.checkpoint import CheckpointError
from vim.config import is_vision_mamba
from vim.data import DIGITS_MEAN, DIGITS_STD
from vim.inspection import (
    class_activation,
    class_places,
    effective_receptive_field,
    layer_scans,
    mean_attention,
    patch_places,
    patches,
    steps,
)
from vim.provenance import environment
from vim.trained import Trained, UsageError, add_model_flags, choose_device, load_from_flags

_CAPTIONS = {
    "attention": "Hidden attention: the mean of |α| over channels, logarithmic over four decades. Row t is what the "
    "output at place t of the sequence takes from the input at each place. Right: what {taker} takes from each patch, "
    "both directions together.",
    "delta": "Steps Δ, mean over channels: a small step keeps the state and lets little of the patch in, a large one "
    "forgets.",
    "activation": "Grad-CAM of class {target} on what each layer's mixer reads: where the class is seen.",
    "receptive_field": "Effective receptive field of the central patch after each layer: the influence of each pixel, "
    "logarithmic over four decades.",
}


def read_image(path: Path, trained: Trained) -> tuple[Tensor, Tensor]:
    """The image as the model was evaluated with, (1, C, H, W), and for the eye, (H, W, 3) in [0, 1].

    Raises UsageError for a file that is not an image.
    """
    try:
        image = Image.open(path).convert("RGB")
    except (OSError, ValueError) as error:
        raise UsageError(f"IMAGE {path} cannot be read: {error}") from error
    channels = trained.model.patch_embed.channels
    crop = 1.0 if max(trained.input_size) <= 32 else trained.args.get("eval_crop_ratio") or 0.875
    to_tensor = create_transform(
        trained.input_size, interpolation="bicubic", crop_pct=crop, mean=(0, 0, 0), std=(1, 1, 1)
    )
    shown = to_tensor(image)
    if channels not in (1, 3):
        raise UsageError(f"IMAGE {path}: the model wants {channels} channels, and images have 1 or 3")
    values = shown if channels == 3 else shown.mean(0, keepdim=True)
    if trained.args.get("data_set") == "DIGITS":
        mean, std = torch.tensor(DIGITS_MEAN), torch.tensor(DIGITS_STD)
    else:
        config = trained.model.default_cfg
        mean, std = (torch.tensor(config[key][:channels])[:, None, None] for key in ("mean", "std"))
    return ((values - mean) / std)[None], shown.permute(1, 2, 0)


def look(trained: Trained, images: Tensor, layers: Sequence[int], target: int | None = None) -> dict[str, Any]:
    """All that is drawn of one image (1, C, H, W), on the CPU.

    By layer: "attention", matrices (L, L) by direction, "along" and "against" the sequence; "taken", (rows, columns);
    "delta", (rows, columns) by direction; "activation", (rows, columns); "receptive_field", (H, W). And the "logits".
    """
    model = trained.model
    found: dict[str, Any] = {name: {} for name in ("attention", "taken", "delta")}
    takers = class_places(model, images) or (central_patch(model, images),)
    with torch.no_grad():
        for layer, scans in layer_scans(model, images, layers).items():
            attention = {_direction(scan.reverse): mean_attention(scan)[0].cpu() for scan in scans}
            found["attention"][layer] = attention
            taken = sum(alpha[list(takers)].sum(0) for alpha in attention.values())
            found["taken"][layer] = patches(model, images, taken)
            found["delta"][layer] = {
                _direction(scan.reverse): patches(model, images, steps(scan)[0].mean(0)).cpu() for scan in scans
            }
    activation, logits = class_activation(model, images, layers, target)
    fields = effective_receptive_field(model, images, layers)
    found["activation"] = {layer: value[0].cpu() for layer, value in activation.items()}
    found["receptive_field"] = {layer: value[0].cpu() for layer, value in fields.items()}
    found["logits"] = logits[0].cpu()
    return found


def central_patch(model: torch.nn.Module, images: Tensor) -> int:
    rows, columns = model.patch_embed.dynamic_feat_size(images.shape[-2:])
    return patch_places(model, images)[rows // 2 * columns + columns // 2]


def _direction(reverse: bool) -> str:
    return "against" if reverse else "along"


# ---- pictures ------------------------------------------------------------------------------------------------------


def draw(found: dict[str, Any], shown: Tensor) -> dict[str, bytes]:
    """PNG files by name; shown: the image (H, W, 3)."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.colors import LogNorm

    layers = list(found["attention"])

    def over_image(ax: Any, values: Tensor) -> None:
        height, width = shown.shape[:2]
        values = values / values.max().clamp(min=1e-30)
        smooth = F.interpolate(values[None, None], size=(height, width), mode="bilinear")[0, 0]
        ax.imshow(shown.numpy())
        ax.imshow(smooth.numpy(), cmap="inferno", alpha=0.6, vmin=0, vmax=1)

    def logarithmic(ax: Any, values: Tensor) -> None:
        top = values.max().item() or 1.0
        ax.imshow(
            values.clamp(min=1e-4 * top).numpy(), norm=LogNorm(1e-4 * top, top), cmap="viridis", interpolation="nearest"
        )

    def grid(columns: Sequence[tuple[str, Callable[[Any, int], None]]]) -> bytes:
        """A row of panels for each layer, the image before them."""
        figure, axes = pyplot.subplots(
            len(layers), 1 + len(columns), figsize=(2.6 * (1 + len(columns)), 2.6 * len(layers)), squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for row, layer in zip(axes, layers, strict=True):
            row[0].imshow(shown.numpy())
            row[0].set_ylabel(f"layer {layer}")
            for ax, (_, panel) in zip(row[1:], columns, strict=True):
                panel(ax, layer)
            for ax in row:
                ax.set(xticks=[], yticks=[])
        for ax, title in zip(axes[0], ["image", *(title for title, _ in columns)], strict=True):
            ax.set_title(title, fontsize="medium")
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=80)
        pyplot.close(figure)
        return file.getvalue()

    directions = list(dict.fromkeys(name for layer in layers for name in found["attention"][layer]))

    def of_direction(what: str, name: str, paint: Callable[[Any, Tensor], None]) -> tuple[str, Callable]:
        def panel(ax: Any, layer: int) -> None:
            if name in found[what][layer]:
                paint(ax, found[what][layer][name])
            else:
                ax.axis("off")

        return f"{name} the sequence", panel

    def with_range(ax: Any, values: Tensor) -> None:
        ax.imshow(values.numpy(), cmap="magma", interpolation="nearest")
        ax.set_xlabel(f"{values.min():.3g} to {values.max():.3g}", fontsize="small")

    attention = [of_direction("attention", name, logarithmic) for name in directions]
    delta = [of_direction("delta", name, with_range) for name in directions]
    return {
        "attention": grid([*attention, ("taken from each patch", lambda ax, i: over_image(ax, found["taken"][i]))]),
        "delta": grid(delta),
        "activation": grid([("Grad-CAM", lambda ax, i: over_image(ax, found["activation"][i]))]),
        "receptive_field": grid([("influence", lambda ax, i: logarithmic(ax, found["receptive_field"][i]))]),
    }


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
td, th {{ padding: .2rem .8rem; text-align: left; border-bottom: 1px solid #ccc; }}
figure {{ margin: 2rem 0; }} figcaption {{ color: #555; }} img {{ max-width: 100%; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{about}</p>
<table><tr><th>class</th><th>probability</th></tr>{classes}</table>
{figures}
<pre>{command}</pre>
<p>{environment}</p>
</body>
</html>
"""


def page(title: str, about: Sequence[str], logits: Tensor, pictures: dict[str, bytes], captions: dict[str, str],
         command: str) -> str:  # fmt: skip
    probabilities, classes = logits.softmax(-1).topk(min(5, len(logits)))
    rows = zip(classes.tolist(), probabilities.tolist(), strict=True)
    env = environment()
    versions = ", ".join(f"{name} {number}" for name, number in env["packages"].items() if number)
    return _PAGE.format(
        title=html.escape(title),
        about="<br>".join(map(html.escape, about)),
        classes="".join(f"<tr><td>{name}</td><td>{value:.4f}</td></tr>" for name, value in rows),
        figures="".join(
            f'<figure><img alt="{name}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
            f"<figcaption>{html.escape(captions[name])}</figcaption></figure>"
            for name, data in pictures.items()
        ),
        command=html.escape(command),
        environment=html.escape(f"git revision {env['revision'] or 'unknown'}; {versions}; {env['cpu']}"),
    )


# ---- the command ---------------------------------------------------------------------------------------------------


def _layers(given: Sequence[int] | None, depth: int) -> list[int]:
    """Their numbers from 0, ascending; four spread over the depth if None. Raises UsageError."""
    if given is None:
        given = [round(i * (depth - 1) / 3) for i in range(4)]
    for layer in given:
        if not -depth <= layer < depth:
            raise UsageError(f"--layers: got {layer}; the model has {depth}: expected {-depth} to {depth - 1}")
    return sorted({layer % depth for layer in given})


def _visualize(args: argparse.Namespace, command: str) -> list[Path]:
    if find_spec("matplotlib") is None:
        raise UsageError("the pictures need matplotlib: pip install matplotlib")
    if args.output.exists() and not args.output.is_dir():
        raise UsageError(f"--output {args.output}: there is a file of that name; expected a folder")
    device = choose_device(args.device)
    trained = load_from_flags(args)
    model = trained.model
    if not is_vision_mamba(trained.name):
        raise UsageError(f"--model: {trained.name} has no state space to look into; expected a Vision Mamba")
    layers = _layers(args.layers, len(model.layers))
    if not model.num_classes:
        raise UsageError(f"--model {trained.name}: it has no classes, so that there is no class to look for")
    if args.target is not None and not 0 <= args.target < model.num_classes:
        raise UsageError(f"--class: got {args.target}; the model has classes 0 to {model.num_classes - 1}")
    images, shown = read_image(args.image, trained)
    model.to(device)
    found = look(trained, images.to(device), layers, args.target)
    target = found["logits"].argmax().item() if args.target is None else args.target
    taker = "the class token" if class_places(model, images) else "the central patch"
    captions = {name: text.format(target=target, taker=taker) for name, text in _CAPTIONS.items()}
    pictures = draw(found, shown)
    about = [f"{trained.name}, {trained.method}, {'×'.join(map(str, trained.input_size))} pixels", *trained.about]
    text = page(f"{trained.name} on {args.image.name}", about, found["logits"], pictures, captions, command)
    files = {args.output / f"{name}.png": data for name, data in pictures.items()}
    files[args.output / "index.html"] = text.encode()
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        for path, data in files.items():
            path.write_bytes(data)
    except OSError as error:
        raise UsageError(f"--output {args.output} cannot be written: {error.strerror}") from error
    return list(files)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vim.visualize", description="Look into a Vision Mamba on an image.", allow_abbrev=False
    )
    parser.add_argument("image", type=Path, metavar="IMAGE")
    add_model_flags(parser)
    parser.add_argument("--layers", nargs="+", type=int, metavar="N", help="from 0, or -1 from the end (default: four)")
    parser.add_argument("--class", dest="target", type=int, metavar="N", help="of Grad-CAM (default: the predicted)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 … (default: cpu)")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    try:
        files = _visualize(args, shlex.join(["python", "-m", "vim.visualize", *map(str, argv)]))
    except (UsageError, CheckpointError) as error:
        print(f"vim.visualize: error: {error}", file=sys.stderr)
        return 2
    for path in files:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
