"""Strip a checkpoint down to its weights: `python -m vim.convert IN OUT.safetensors` (or OUT.pth).

IN is whatever the trainer's --resume takes. OUT keeps the weights, or with --ema their moving averages, the epoch, and
the arguments that decide what the weights compute; optimizer, random numbers and paths are left out. Either form is
taken by --resume and --finetune, and the safetensors file by timm too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from torch import Tensor

import vim.models_mamba  # noqa: F401, registers the Vision Mamba models with timm
from vim.checkpoint import CheckpointError, load_checkpoint, model_state, save_weights

# What decides what the weights compute, and where they come from.
_KEPT = ("model", "model_kwargs", "discretization_method", "input_size", "data_set", "seed", "epoch")
_SUFFIXES = (".safetensors", ".pth")


def convert(source: str | Path, target: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """Write the weights of the checkpoint `source` to `target`; return them.

    Raises CheckpointError if `source` cannot be read or has no such weights, or if `target` cannot be written.
    """
    if target.suffix not in _SUFFIXES:
        raise CheckpointError(f"cannot write {target}: its name must end in {' or '.join(_SUFFIXES)}")
    checkpoint = load_checkpoint(source)
    state = model_state(checkpoint, source, ema=ema)
    save_weights(target, state, _description(checkpoint))
    return state


def _description(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    stored = checkpoint.get("args") or {}
    args = vars(stored) if isinstance(stored, argparse.Namespace) else stored
    known = {name: value for name, value in checkpoint.items() if name == "epoch"} | args
    if not timm.is_model(known.get("model", "")):  # an old name: nothing to compare with
        known.pop("model", None)
    return {name: known[name] for name in _KEPT if name in known}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vim.convert", description="Strip a checkpoint down to its weights.", allow_abbrev=False
    )
    parser.add_argument("source", metavar="IN", help="a .pth or .safetensors file, its URL, or hf-hub:OWNER/NAME")
    parser.add_argument("target", metavar="OUT", type=Path, help="a file ending in .safetensors or .pth")
    parser.add_argument("--ema", action="store_true", help="the moving averages of the weights instead of the weights")
    args = parser.parse_args(argv)
    try:
        state = convert(args.source, args.target, ema=args.ema)
    except CheckpointError as error:
        print(f"vim.convert: error: {error}", file=sys.stderr)
        return 2
    count = sum(tensor.numel() for tensor in state.values())
    print(f"{args.target}: {len(state)} tensors, {count:,} numbers, {args.target.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
