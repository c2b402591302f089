"""The pictures of tools.md, by running the tools: `python documentation/make_pictures.py [NAME …]`.

Small runs, a few minutes in all. What a tool prints becomes a picture of its last lines, what it draws is made small.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PICTURES = Path(__file__).with_name("pictures")
WIDTH, LARGEST = 720, 100_000  # pixels, bytes

_MODEL = ["--model", "vim_tiny", "--model-kwargs", "depth=4", "embed_dim=64", "patch_size=2", "stride=2", "channels=1"]
_DIGITS = ["--data-set", "DIGITS", *_MODEL, "--discretization-method", "bilinear", "--epochs", "4", "--lr", "3e-3"]
_DIGITS += ["--unscale-lr"]


def run(folder: Path, *argv: str) -> str:
    """The output of `python argv…` in the checkout; {} in it stands for `folder`."""
    command = [sys.executable, *(part.replace("{}", str(folder)) for part in argv)]
    environment = {**os.environ, "COLUMNS": "110", "NO_COLOR": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip()}")
    return result.stdout.replace(f"{folder}/", "").replace(str(folder), "output")


def of_text(text: str, lines: int = 18) -> bytes:
    """The last lines, as a terminal shows them."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shown = [line[:110] for line in text.rstrip().splitlines()[-lines:]]
    figure = pyplot.figure(figsize=(9, 0.19 * len(shown) + 0.2), facecolor="#1e1e1e")
    figure.text(0.01, 0.97, "\n".join(shown), va="top", family="monospace", size=8.5, color="#dddddd")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=80)
    pyplot.close(figure)
    return file.getvalue()


def trained(folder: Path) -> Path:
    """A checkpoint of a model trained for a few epochs."""
    if not (folder / "best_checkpoint.pth").exists():
        (folder / "main.txt").write_text(run(folder, "vim/main.py", *_DIGITS, "--output_dir", "{}"))
    return folder / "best_checkpoint.pth"


def main_py(folder: Path) -> bytes:
    trained(folder)
    return of_text((folder / "main.txt").read_text())


def convert(folder: Path) -> bytes:
    trained(folder)
    return of_text(run(folder, "-m", "vim.convert", "{}/best_checkpoint.pth", "{}/vim.safetensors"))


def export(folder: Path) -> bytes:
    trained(folder)
    command = ["-m", "vim.export", "--resume", "{}/best_checkpoint.pth", "--dynamic-size"]
    return of_text("".join(run(folder, *command, "--output", f"{{}}/digits.{suffix}") for suffix in ("onnx", "pt2")))


def visualize(folder: Path) -> bytes:
    from sklearn.datasets import load_digits

    trained(folder)
    Image.fromarray((load_digits().images[3] * 255 / 16).astype(np.uint8)).save(folder / "digit.png")
    options = ["--resume", "{}/best_checkpoint.pth", "--layers", "0", "3", "--output", "{}/look"]
    run(folder, "-m", "vim.visualize", "{}/digit.png", *options)
    return (folder / "look" / "attention.png").read_bytes()


def benchmark(folder: Path) -> bytes:
    options = ["--models", "vim_tiny", "deit_tiny_patch16_224", "--methods", "zoh", "bilinear", "highorder"]
    options += ["--input-size", "64", "128", "224", "--batch-size", "2", "--seconds", "0.5", "--device", "cpu"]
    run(folder, "-m", "vim.benchmark", *options, "--plot", "{}/benchmark.png")
    return (folder / "benchmark.png").read_bytes()


def study(folder: Path) -> bytes:
    run(folder, "scripts/study.py", "--preset", "smoke", "--output", "{}/study")
    return (folder / "study" / "coefficients.png").read_bytes()


def ops(folder: Path) -> bytes:
    run(folder, "scripts/study.py", "--task", "ops", "--parts", "gain", "--output", "{}/ops")
    return (folder / "ops" / "ops_gain.png").read_bytes()


def text(*argv: str) -> Callable[[Path], bytes]:
    return lambda folder: of_text(run(folder, *argv))


MAKERS: dict[str, Callable[[Path], bytes]] = {
    "doctor": text("-m", "mamba_ssm.doctor"),
    "study": study,
    "ops": ops,
    "main": main_py,
    "benchmark": benchmark,
    "export": export,
    "visualize": visualize,
    "convert": convert,
    "loader": text("benchmarks/loader.py", "--images", "256", "--workers", "1", "--seconds", "2", "--output", "{}"),
}


def small(picture: bytes) -> bytes:
    """At most WIDTH wide and LARGEST bytes."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.thumbnail((WIDTH, WIDTH))
    for colours in (None, 256, 128, 64, 32):  # fewer only where they must: lines are told apart by theirs
        file = io.BytesIO()
        (image if colours is None else image.quantize(colours)).save(file, format="png", optimize=True)
        if file.tell() <= LARGEST:
            break
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description="The pictures of tools.md.", allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MAKERS)} (default: all)")
    parser.add_argument("--output", type=Path, default=PICTURES, metavar="FOLDER")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(MAKERS))
    if unknown:
        parser.error(f"unknown picture {unknown[0]!r}; choose of {', '.join(MAKERS)}")
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.names or MAKERS:
            path = args.output / f"{name}.png"
            path.write_bytes(small(MAKERS[name](Path(folder))))
            print(f"{path}: {path.stat().st_size / 1024:.0f} KiB", flush=True)


if __name__ == "__main__":
    main()
