"""Trained models for the tools: what a checkpoint says of itself, and the checks that all tools share."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from mamba_ssm.ops.discretization_ref import METHODS
from vim.checkpoint import load_checkpoint, load_weights, model_state
from vim.config import is_vision_mamba, key_value, positive_int


class UsageError(Exception):
    """Something that was asked for cannot be done; the message names the option and says what to do."""


def require_known_model(name: str, option: str = "--model") -> None:
    """Raises UsageError, with the nearest names, for one that timm does not know."""
    if not timm.is_model(name):
        similar = get_close_matches(name, timm.list_models())
        hint = f"is it one of {', '.join(similar)}?" if similar else "timm.list_models() lists all"
        raise UsageError(f"{option}: timm knows no model {name!r}; {hint}")


def choose_device(name: str | None) -> torch.device:
    """The device of that name; None: a GPU if there is one, else the CPU. Raises UsageError."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device: got {name!r}; expected cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device: got {name!r}; expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs; use --device cpu")
    return device


@dataclass(frozen=True)
class Trained:
    """A model in eval mode and what it is. args: the checkpoint's; about: lines on where the weights come from."""

    model: nn.Module
    name: str
    method: str | None  # None: no Vision Mamba
    input_size: tuple[int, int]
    args: Mapping[str, Any]
    about: Sequence[str]


def load_trained(
    source: str | Path | None,
    *,
    name: str | None = None,
    method: str | None = None,
    input_size: Sequence[int] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    ema: bool = False,
) -> Trained:
    """The model of a checkpoint, built as its arguments say; what is given here wins over them.

    source: whatever the trainer's --resume takes; None: random weights, and name is needed.
    name: of timm's registry. method: a discretization, for Vision Mamba. input_size: (H, W), or one number for both;
    the position embedding is resampled. model_kwargs: over the checkpoint's. ema: the moving averages of the weights.
    Raises UsageError for a name, method or option that does not fit, CheckpointError for a file that does not.
    """
    checkpoint = {} if source is None else load_checkpoint(source)
    stored = checkpoint.get("args") or {}
    args = dict(vars(stored) if isinstance(stored, argparse.Namespace) else stored)
    if name is None and not timm.is_model(args.get("model", "")):
        raise UsageError(
            "--model: give a name, or a checkpoint that knows its own (--resume)"
            if source is None
            else f"--model: {source} does not say which model it is; give the name"
        )
    name = name or args["model"]
    require_known_model(name)
    if method is not None and method not in METHODS:
        raise UsageError(f"--discretization-method: unknown method {method!r}; choose of {', '.join(METHODS)}")
    if method is not None and not is_vision_mamba(name):
        raise UsageError(f"--discretization-method is for Vision Mamba; {name} has no state space")
    if ema and source is None:
        raise UsageError("--use-ema needs --resume, the checkpoint")

    about = [f"{source}: epoch {checkpoint['epoch']}" if "epoch" in checkpoint else str(source)]
    if source is None:
        about = ["random weights"]
    size = list(input_size or _pair(args.get("input_size")) or timm.get_pretrained_cfg(name).input_size[1:])
    size = (size[0], size[-1])
    options = {**args.get("model_kwargs", {}), **(model_kwargs or {})}
    config = timm.get_pretrained_cfg(name)
    if is_vision_mamba(name) or config.fixed_input_size:
        options["img_size"] = size
    if is_vision_mamba(name):
        trained_method = args.get("discretization_method")
        method = method or trained_method or "zoh"
        if trained_method not in (None, method):
            about.append(f"trained with {trained_method}, discretized here with {method}")
        options["discretization_method"] = method
    state = {} if source is None else model_state(checkpoint, source, ema=ema)
    if "head.weight" in state:
        options.setdefault("num_classes", state["head.weight"].shape[0])
    try:
        model = timm.create_model(name, **options)
    except (TypeError, ValueError, AssertionError, AttributeError) as error:
        raise UsageError(f"--model {name} cannot be built with {_shown(options)}: {error}") from error
    if source is not None:
        about += load_weights(model, checkpoint, source, ema=ema)
    return Trained(model.eval(), name, method, size, args, about)


def _pair(size: Any) -> Sequence[int] | None:
    return [size] if isinstance(size, int) else size


def _shown(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items())


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """--model, --resume, --use-ema, --discretization-method, --input-size and --model-kwargs."""
    parser.add_argument("--model", metavar="NAME", help="any of timm's registry (default: what the checkpoint says)")
    parser.add_argument("--resume", metavar="CHECKPOINT", help="as the trainer's; without it, random weights")
    parser.add_argument("--use-ema", action="store_true", help="the moving averages of the weights")
    parser.add_argument(
        "--discretization-method", metavar="METHOD", help="of Vision Mamba (default: what it was trained with, or zoh)"
    )
    parser.add_argument(
        "--input-size", nargs="+", type=positive_int, metavar="PIXELS",
        help="side, or height and width (default: what the model was trained with)",
    )  # fmt: skip
    parser.add_argument("--model-kwargs", nargs="+", type=key_value, default=[], metavar="KEY=VALUE")


def load_from_flags(args: argparse.Namespace, **model_kwargs: Any) -> Trained:
    """`load_trained` on the flags of `add_model_flags`; model_kwargs: more, over these."""
    if args.input_size is not None and len(args.input_size) > 2:
        raise UsageError(f"--input-size: got {len(args.input_size)} numbers; give one, or height and width")
    return load_trained(
        args.resume,
        name=args.model,
        method=args.discretization_method,
        input_size=args.input_size,
        model_kwargs={**dict(args.model_kwargs), **model_kwargs},
        ema=args.use_ema,
    )
