"""Checkpoints: written so that no failure can cost the previous one, read without running code from the file.

The file is a dict: `model`, `optimizer`, `epoch`, `args`, `rng`, `best_acc1`. Published Vim checkpoints carry `model`
too, so they load for evaluation; so does a bare state dict.
"""

import argparse
import contextlib
import os
import pickle
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

# What a resumed run may change. All else decides the weights, and a resumed run is the same run.
_MAY_CHANGE = frozenset(
    {"output_dir", "resume", "start_epoch", "eval", "epochs", "data_path", "device", "num_workers", "pin_mem"}
)
# What decides how the weights are used, beyond their shapes: one state dict fits every discretization method.
_ARCHITECTURE = ("model", "model_kwargs", "discretization_method")


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
        partial.unlink(missing_ok=True)
        # torch's zip writer may hide the failed write behind a RuntimeError of its own.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        kept = "; the previous file is untouched" if path.exists() else ""
        raise CheckpointError(f"cannot write {path}: {_first_line(cause)} ({_free_space(path)}){kept}") from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    # So that the rename outlives a power cut. Some network file systems cannot; the new file is whole all the same.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain types only) to `path`, atomically. Raises CheckpointError."""
    atomic_write(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, with `weights_only=True`: the file cannot run code.

    Raises CheckpointError if it is missing, truncated, corrupt, or holds more than tensors and plain types.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        # The published checkpoints keep their arguments in a Namespace, which is only a bag of attributes.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a checkpoint of tensors and plain types, or is corrupt: {_first_line(error)}"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is truncated, corrupt or not a checkpoint ({path.stat().st_size} bytes): {_first_line(error)}"
        ) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} holds a {type(checkpoint).__name__}; a checkpoint is a dict")
    return checkpoint


def model_state(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The model's state dict: `checkpoint["model"]`, or the checkpoint itself if it is a bare state dict."""
    state = checkpoint.get("model", checkpoint)
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} has no model weights; its entries are: {_shorten(checkpoint)}")
    return dict(state)


def load_model(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load `state` into `model`, all keys and shapes equal. Raises CheckpointError naming those that are not."""
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
        raise CheckpointError(f"{path} does not fit this model ({len(own)} entries):\n" + "\n".join(problems))
    model.load_state_dict(state)


def check_same_run(checkpoint: Mapping[str, Any], args: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError unless training under `args` continues the run that wrote `checkpoint`.

    Flags that came after the checkpoint was written are not compared.
    """
    absent = [name for name in ("model", "optimizer", "epoch", "args", "rng", "best_acc1") if name not in checkpoint]
    if absent:
        raise CheckpointError(
            f"{path} has no {', '.join(absent)}: training cannot resume from it; "
            "it can be evaluated with --eval if its weights fit"
        )
    _check_args(checkpoint["args"], args, [name for name in args if name not in _MAY_CHANGE], path)


def check_same_architecture(checkpoint: Mapping[str, Any], args: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError if `checkpoint` says that it was trained as another model than `args` describe."""
    stored = checkpoint.get("args")
    if isinstance(stored, Mapping):  # a published checkpoint's Namespace names no discretization method
        _check_args(stored, args, _ARCHITECTURE, path)


def rng_state() -> dict[str, Any]:
    """The states of all global random number generators, as tensors and plain types."""
    numpy_state = np.random.get_state(legacy=False)
    key = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    return {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {"key": key, "pos": int(numpy_state["state"]["pos"])}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what `rng_state` returned. GPU generators are restored if there are as many GPUs as then."""
    random.setstate(state["python"])
    inner = state["numpy"]["state"]
    key = inner["key"].numpy().astype(np.uint32)
    np.random.set_state({**state["numpy"], "state": {"key": key, "pos": inner["pos"]}})
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _check_args(stored: Mapping[str, Any], args: Mapping[str, Any], names: Any, path: Path) -> None:
    differing = [
        f"  {name}: {stored[name]!r} in the checkpoint, {args[name]!r} now"
        for name in names
        if name in stored and stored[name] != args[name]
    ]
    if differing:
        raise CheckpointError(f"{path} belongs to a run with other settings:\n" + "\n".join(differing))


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
