"""A model as one file for other programs: `python -m vim.export --resume CHECKPOINT --output model.onnx`.

- `--format onnx` (a file ending in .onnx): standard ONNX operators alone, for onnxruntime and others; the selective
  scan is an ONNX `Scan`. Needs the packages of the extra `export`: onnx, onnxscript and onnxruntime.
- `--format torch` (.pt2): a program of torch.export with this project's operators in it. `torch.export.load` reads it,
  after `import mamba_ssm`; it runs at full speed.

The batch is dynamic, and with --dynamic-size (Vision Mamba) height and width are too. float32, inference. The written
file is read back and compared with the model on random images of other batch sizes; unless they agree to 1e-4 of the
largest output, the exit status is 1 and the file is removed.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mamba_ssm._backend import use_kernel
from mamba_ssm.modules.mamba_simple import Mamba
from vim.checkpoint import CheckpointError
from vim.config import is_vision_mamba
from vim.provenance import revision
from vim.trained import Trained, UsageError, add_model_flags, load_from_flags

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
TOLERANCE = 1e-4
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def trace(
    model: nn.Module, input_size: tuple[int, int], *, channels: int = 3, dynamic_size: bool = False
) -> ExportedProgram:
    """The program of a model for images (B, channels, H, W), float32, for any B ≥ 1.

    dynamic_size: also for any H, W that exceed the patch; a Vision Mamba with dynamic_img_size=True.
    Raises UsageError where the model runs on the PyTorch reference, whose loops over time would be unrolled.
    """
    images = torch.zeros(2, channels, *input_size)
    mixers = [module for module in model.modules() if isinstance(module, Mamba)]
    if mixers and not use_kernel(images, mixers[0].use_cuda_kernel):
        raise UsageError(
            "the model runs on the PyTorch reference, which cannot be exported: unset VIM_USE_CUDA_KERNEL, and see "
            "python -m mamba_ssm.doctor for a missing library"
        )
    dimensions = {0: Dim("batch", min=1)}
    if dynamic_size:
        for axis, name, side in zip((2, 3), ("height", "width"), model.patch_embed.patch_size, strict=True):
            dimensions[axis] = Dim(name, min=side + 1, max=2**14)
    with torch.no_grad():
        return torch.export.export(model.eval(), (images,), dynamic_shapes=(dimensions,), strict=False)


def save_torch(program: ExportedProgram, path: Path) -> None:
    with warnings.catch_warnings():  # about where weights lie; they are on the CPU
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")
        torch.export.save(program, path)


def save_onnx(program: ExportedProgram, path: Path, about: dict[str, str] | None = None) -> None:
    """One file, weights included, with input "images" and output "logits"; about: its metadata."""
    from mamba_ssm.ops.onnx_export import to_onnx  # here: needs packages that only this format needs

    result = to_onnx(program, input_names=["images"], output_names=["logits"])
    result.model.metadata_props.update(about or {})
    result.save(path, external_data=False)


def open_torch(path: Path) -> Callable[[Tensor], Tensor]:
    return torch.export.load(path).module()


def open_onnx(path: Path, threads: int = 0) -> Callable[[Tensor], Tensor]:
    """The file in onnxruntime, on the CPU; threads: 0 for its own choice."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@torch.no_grad()
def largest_difference(model: nn.Module, other: Callable[[Tensor], Tensor], shapes: Sequence[tuple[int, ...]]) -> float:
    """Over random images of these shapes, the largest difference next to the largest output."""
    worst = 0.0
    for i, shape in enumerate(shapes):
        images = torch.randn(shape, generator=torch.Generator().manual_seed(i))
        expected, found = model(images), other(images)
        worst = max(worst, ((found - expected).abs().max() / expected.abs().max()).item())
    return worst


def export(trained: Trained, path: Path, form: str, *, dynamic_size: bool = False) -> float:
    """Write `path` in the format `form`, read it back, and return the `largest_difference`.

    Raises UsageError for a model that cannot be traced or written.
    """
    model, (height, width) = trained.model, trained.input_size
    channels = next(p.shape[1] for p in model.parameters() if p.dim() == 4)  # the first convolution's
    program = trace(model, trained.input_size, channels=channels, dynamic_size=dynamic_size)
    about = {"model": trained.name, "input_size": f"{height}×{width}", "weights": "; ".join(trained.about)}
    about |= {"discretization_method": trained.method or "", "revision": revision() or ""}
    partial = path.with_name(path.name + ".partial" + path.suffix)
    try:
        if form == "torch":
            save_torch(program, partial)
        else:
            save_onnx(program, partial, about)
        shapes = [(1, channels, height, width), (3, channels, height, width)]
        if dynamic_size:
            shapes.append((1, channels, height + 17, max(height, width)))
        difference = largest_difference(model, open_torch(partial) if form == "torch" else open_onnx(partial), shapes)
        if difference <= TOLERANCE:
            os.replace(partial, path)
    except OSError as error:
        raise UsageError(f"--output {path} cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return difference


def _check(args: argparse.Namespace) -> str:
    """The format. Raises UsageError."""
    by_suffix = {suffix: form for form, suffix in SUFFIXES.items()}
    form = args.format or by_suffix.get(args.output.suffix)
    if form is None or args.output.suffix != SUFFIXES[form]:
        raise UsageError(f"--output {args.output}: its name must end in .onnx (--format onnx) or .pt2 (--format torch)")
    if not args.output.parent.is_dir():
        raise UsageError(f"--output {args.output}: there is no folder {args.output.parent}")
    missing = [name for name in _ONNX_PACKAGES if find_spec(name) is None]
    if form == "onnx" and missing:
        raise UsageError(
            f"--format onnx needs {', '.join(missing)}: pip install -c constraints.txt {' '.join(_ONNX_PACKAGES)}"
        )
    return form


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vim.export", description="A model as one file, of torch.export or ONNX.", allow_abbrev=False
    )
    add_model_flags(parser)
    parser.add_argument("--format", choices=SUFFIXES, help="(default: what the name of --output says)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="ending in .onnx or .pt2")
    parser.add_argument("--dynamic-size", action="store_true", help="any image size, not only --input-size")
    args = parser.parse_args(argv)
    try:
        form = _check(args)
        trained = load_from_flags(args, **({"dynamic_img_size": True} if args.dynamic_size else {}))
        if args.dynamic_size and not is_vision_mamba(trained.name):
            raise UsageError(f"--dynamic-size is for Vision Mamba; {trained.name} has one image size")
        difference = export(trained, args.output, form, dynamic_size=args.dynamic_size)
    except (UsageError, CheckpointError) as error:
        print(f"vim.export: error: {error}", file=sys.stderr)
        return 2
    for line in trained.about:
        print(line)
    if difference > TOLERANCE:
        print(f"vim.export: the file's outputs differ from the model's by {difference:.1e}; removed", file=sys.stderr)
        return 1
    print(f"{args.output}: {args.output.stat().st_size / 2**20:.1f} MiB, differs from the model by {difference:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
