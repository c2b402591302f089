"""Checkpoints: written so that no failure can cost the previous one, read without running code from the file.

A checkpoint is a dict with `model`, and perhaps `model_ema`, `args`, and the rest of a run's state. Published Vim
checkpoints are such dicts; bare state dicts, safetensors files and models of the Hugging Face hub load as well.
Weights of another image size, stride or number of classes are fitted to the model, and what was changed is said.
"""

import argparse
import contextlib
import json
import math
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path, PosixPath
from typing import Any, BinaryIO

import safetensors
import timm
import torch
from safetensors.torch import save as to_safetensors
from timm.models import clean_state_dict, load_state_dict_from_hf
from timm.models._hub import download_cached_file
from torch import Tensor, nn

from vim.pos_embed import resize_pos_embed


class CheckpointError(RuntimeError):
    """A checkpoint (or the log beside it) cannot be written, read, or used for this run."""


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write(file)` on a file aside and move it to `path` once it is on the disk.

    At every moment `path` is either the old file or the new one, whole. One process at a time may write `path`.

    Raises CheckpointError, naming the path and the space left, if it cannot be written; the old file survives.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        _remove(partial)
        # torch's zip writer may hide the failed write behind a RuntimeError of its own.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        kept = "; the previous file is untouched" if path.exists() else ""
        raise CheckpointError(f"cannot write {path}: {_first_line(cause)} ({_free_space(path)}){kept}") from error
    except BaseException:
        _remove(partial)
        raise
    # So that the rename outlives a power cut. Some network file systems cannot; the new file is whole all the same.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _remove(partial: Path) -> None:
    with contextlib.suppress(OSError):  # a disk that became read-only
        partial.unlink(missing_ok=True)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain types only) to `path`, atomically. Raises CheckpointError."""
    atomic_write(path, lambda file: torch.save(state, file))


def save_weights(path: Path, state: Mapping[str, Tensor], args: Mapping[str, Any]) -> None:
    """Write a state dict and the arguments it was trained with: safetensors if `path` ends so, else torch's format.

    A safetensors file has the arguments in its metadata, each as JSON; its tensors have the state dict's names, so that
    timm and others read it too. Raises CheckpointError, TypeError for arguments of other than plain types.
    """
    if path.suffix == ".safetensors":
        metadata = {"format": "pt", **{name: json.dumps(value) for name, value in args.items()}}
        # Every tensor its own memory: safetensors refuses shared ones.
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
        atomic_write(path, lambda file: file.write(to_safetensors(tensors, metadata)))
    else:
        save_checkpoint(path, {"model": dict(state), "args": dict(args)})


def load_checkpoint(source: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; the file cannot run code (`weights_only=True`, or safetensors).

    source: a file of torch or, ending so, of safetensors; its http(s) address; or `hf-hub:OWNER/NAME[@REVISION]`.
    Downloads are kept in torch's and the hub's cache.

    Raises CheckpointError if it is missing, truncated, corrupt, or holds more than tensors and plain types.
    """
    name = str(source)
    if name.startswith("hf-hub:"):
        try:
            return {"model": load_state_dict_from_hf(name.removeprefix("hf-hub:"))}
        except Exception as error:  # the hub's and the network's many types
            raise CheckpointError(f"cannot load {name}: {_first_line(error)}") from error
    if name.startswith(("http://", "https://")):
        try:
            source = download_cached_file(name, progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"cannot download {name}: {_first_line(error)}") from error
    path = Path(source)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        checkpoint = _load_safetensors(path) if path.suffix == ".safetensors" else _load_torch(path)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"unsupported global:? (?:GLOBAL )?(\S+)", str(error), re.IGNORECASE)
        raise CheckpointError(
            f"{path} holds a {foreign[1]}; only tensors and plain types are read, because others can run code: where "
            "you trust the file, load it with torch.load(…, weights_only=False) and save its tensors anew"
            if foreign
            else f"{path} is not a checkpoint of tensors and plain types, or is corrupt: {_first_line(error)}"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{path} is truncated, corrupt or not a checkpoint ({path.stat().st_size} bytes): {_first_line(error)}"
        ) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} holds a {type(checkpoint).__name__}; a checkpoint is a dict")
    return checkpoint


def _load_torch(path: Path) -> Any:
    # Published checkpoints keep their arguments in a Namespace, which is only a bag of attributes, with paths in it.
    paths = [(PosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")]  # until and from 3.13
    with torch.serialization.safe_globals([argparse.Namespace, *paths]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _load_safetensors(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is not a dict
        metadata = file.metadata() or {}
    args = {}
    for name, value in metadata.items():
        with contextlib.suppress(ValueError):  # other programs' metadata, such as format: pt, are not JSON
            args[name] = json.loads(value)
    return {"model": state, "args": args}


def model_state(checkpoint: Mapping[str, Any], source: str | Path, *, ema: bool = False) -> dict[str, Tensor]:
    """The model's state dict: `checkpoint["model"]`, or the checkpoint itself if it is a bare state dict.

    ema: its moving average instead. Prefixes that DDP and torch.compile put before the names are taken off.

    Raises CheckpointError if there is none.
    """
    if ema and not checkpoint.get("model_ema"):
        raise CheckpointError(f"{source} has no model_ema, moving averages of weights: leave out --use-ema")
    state = checkpoint["model_ema"] if ema else checkpoint.get("model", checkpoint)
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{source} has no model weights; its entries are: {_shorten(checkpoint)}")
    return clean_state_dict(dict(state))


def load_weights(
    model: nn.Module,
    checkpoint: Mapping[str, Any],
    source: str | Path,
    *,
    ema: bool = False,
    replace_head: bool = False,
) -> list[str]:
    """Load a checkpoint's weights (ema: their moving average), fitted to the model; see `fit_to_model`.

    Returns what was changed, a line for the log each. Raises CheckpointError.
    """
    state = model_state(checkpoint, source, ema=ema)
    grid = _trained_grid(checkpoint) if _has_patch_grid(model) else None
    fitted, changes = fit_to_model(state, model, source, replace_head=replace_head, grid=grid)
    load_model(model, fitted, source)
    return changes


def fit_to_model(
    state: Mapping[str, Tensor],
    model: nn.Module,
    source: str | Path,
    *,
    replace_head: bool = False,
    grid: tuple[int, int] | None = None,
) -> tuple[dict[str, Tensor], list[str]]:
    """A state dict of the same architecture, fitted to the model's image size, patch stride and, with replace_head,
    number of classes; and what was changed, a line for the log each.

    grid: (rows, columns) of patches that a Vision Mamba was trained with; None: as many rows as columns. With
    replace_head, a head for another number of classes gives way to the model's own. All else is left to `load_model`.

    Raises CheckpointError if the position embedding cannot be resampled.
    """
    own, fitted, changes = model.state_dict(), dict(state), []
    try:
        if "pos_embed" in own and "pos_embed" in fitted and _has_patch_grid(model):
            new_grid = model.patch_embed.grid_size
            patches = fitted["pos_embed"].shape[1] - model.num_tokens
            side = math.isqrt(max(0, patches))
            if grid is not None and grid[0] * grid[1] != patches:
                rows, columns = grid
                changes.append(f"its arguments speak of {rows}×{columns} patches, its position embedding has {patches}")
                grid = None
            if grid is None and side * side == patches:
                grid = (side, side)
            if grid is not None and grid != new_grid:
                fitted["pos_embed"] = resize_pos_embed(fitted["pos_embed"], new_grid, grid, model.cls_token_position)
                sizes = "{}×{} to {}×{}".format(*grid, *new_grid)
                changes.append(f"position embedding resampled from {sizes} patches")
        # timm's convention: a model's module knows how to fit a checkpoint of another image size to it.
        fit = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        if fit is not None:
            fitted = dict(fit(fitted, model))
    except ValueError as error:
        raise CheckpointError(f"{source} does not fit this model: {error}") from error
    if replace_head:
        changes += _replace_head(fitted, own, model)
    return fitted, changes


def _has_patch_grid(model: nn.Module) -> bool:
    """Whether it is a Vision Mamba; `vim.models_mamba` imports this module."""
    return hasattr(model, "cls_token_position")


def _trained_grid(checkpoint: Mapping[str, Any]) -> tuple[int, int] | None:
    """(rows, columns) of the patches that a Vision Mamba was trained with, if the checkpoint's arguments say so."""
    model = trained_model(checkpoint)
    return None if model is None else model.patch_embed.grid_size


def trained_model(checkpoint: Mapping[str, Any]) -> Any:
    """The model that the checkpoint's arguments describe, without weights; None where they do not."""
    stored = checkpoint.get("args")
    args = vars(stored) if isinstance(stored, argparse.Namespace) else stored
    if not isinstance(args, Mapping):
        return None
    name, size = args.get("model"), args.get("input_size")
    if not isinstance(name, str) or size is None or not timm.is_model(name):
        return None
    try:
        with torch.device("meta"):
            return timm.create_model(name, **{"img_size": size, **(args.get("model_kwargs") or {})})
    except (TypeError, ValueError, RuntimeError, AssertionError, AttributeError):  # arguments of other programs
        return None


def _replace_head(state: dict[str, Tensor], own: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """Put the model's own head into `state` where its shape is another, or where there is none."""
    classifier = model.get_classifier()
    name = next((name for name, module in model.named_modules() if module is classifier), "")
    keys = [key for key in own if key.startswith(f"{name}.")]
    foreign = [key for key in state if key.startswith(f"{name}.")]
    if all(key in state and state[key].shape == own[key].shape for key in keys) and len(keys) == len(foreign):
        return []
    classes = f"{state[foreign[0]].shape[0]} classes in the checkpoint" if foreign else "none in the checkpoint"
    for key in foreign:
        del state[key]
    state |= {key: own[key] for key in keys}
    return [f"{name}: {classes}, {model.num_classes} here: it starts anew"]


def load_model(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Load `state` into `model`, all keys and shapes equal. Raises CheckpointError naming those that are not."""
    require_fit(model, state, source)
    model.load_state_dict(state)


def require_fit(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Raises CheckpointError that names the keys of `state` that are missing, unexpected and mis-shaped for `model`."""
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = [
        f"  {len(names)} {kind}: {_shorten(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", shapes))
        if names
    ]
    if problems:
        raise CheckpointError(f"{source} does not fit this model ({len(own)} entries):\n" + "\n".join(problems))


def _shorten(names: Any, limit: int = 5) -> str:
    names = [str(name) for name in names]
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f", … and {rest} more" if rest > 0 else "")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _free_space(path: Path) -> str:
    try:
        return f"{shutil.disk_usage(path.parent).free / 2**20:,.0f} MiB free there"
    except OSError as error:
        return f"space unknown: {error.strerror}"
