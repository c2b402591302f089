"""What a run must keep to go on as if it had never stopped: checks, random generators, signals, checkpoints."""

import dataclasses
import random
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vim.checkpoint import CheckpointError, load_model, model_state
from vim.config import is_vision_mamba
from vim.engine import Position, Trainer

# What a resumed run may change: where and how fast it runs, what it writes, when it ends. All else decides the weights,
# and a resumed run is the same run. How many images make an update is compared by their total.
_MAY_CHANGE = frozenset({
    "config", "output_dir", "resume", "start_epoch", "eval", "epochs", "cooldown_epochs", "data_path", "device",
    "num_workers", "pin_mem", "dist_eval", "world_size", "dist_url", "batch_size", "grad_accum_steps",
    "checkpoint_steps", "save_every_minutes", "tensorboard", "log_wandb", "log_mlflow", "project", "compile",
    "grad_checkpointing", "model_ema_force_cpu", "finetune", "use_ema", "teacher_path", "if_continue_inf",
})  # fmt: skip
# Options that change neither the meaning nor (position embeddings apart, which are resampled) the shapes of weights.
_NOT_ARCHITECTURE = frozenset({"img_size", "stride", "dynamic_img_size", "drop_rate", "drop_path_rate", "num_classes"})
_NEEDED = ("model", "optimizer", "epoch", "position", "args", "rng", "best_acc1", "images_per_update")


def check_same_run(
    checkpoint: Mapping[str, Any], args: Mapping[str, Any], images_per_update: int, source: str | Path
) -> None:
    """Raise CheckpointError unless training under `args` continues the run that wrote `checkpoint`.

    Flags that came after the checkpoint was written are not compared.
    """
    absent = [name for name in _NEEDED if name not in checkpoint]
    if absent:
        raise CheckpointError(
            f"{source} has no {', '.join(absent)}: training cannot resume from it; it can be evaluated with --eval, "
            "or be the start of another run with --finetune, if its weights fit"
        )
    stored = checkpoint["args"]
    differing = {name: (stored[name], args[name]) for name in args if name in stored and name not in _MAY_CHANGE}
    differing["images per update"] = (checkpoint["images_per_update"], images_per_update)
    _refuse(differing, source)


def check_same_architecture(checkpoint: Mapping[str, Any], args: Mapping[str, Any], source: str | Path) -> None:
    """Raise CheckpointError if `checkpoint` says that it was trained as another model than `args` describe.

    Only what decides how the weights are used beyond their shapes: one state dict fits every discretization method.
    """
    stored = checkpoint.get("args")
    if not isinstance(stored, Mapping):  # a published checkpoint's Namespace names no discretization method
        return
    names = [stored.get("model", args["model"]), args["model"]]
    if all(map(is_vision_mamba, names)):  # the registered names differ in sizes and strides
        names = ["a Vision Mamba"] * 2
    options = [
        {name: value for name, value in kwargs.items() if name not in _NOT_ARCHITECTURE}
        for kwargs in (stored.get("model_kwargs", args["model_kwargs"]), args["model_kwargs"])
    ]
    method = args["discretization_method"]
    _refuse(
        {
            "model": tuple(names),
            "model_kwargs": tuple(options),
            "discretization_method": (stored.get("discretization_method", method), method),
        },
        source,
    )


def _refuse(pairs: Mapping[str, tuple[Any, Any]], source: str | Path) -> None:
    differing = [
        f"  {name}: {then!r} in the checkpoint, {now!r} now" for name, (then, now) in pairs.items() if then != now
    ]
    if differing:
        raise CheckpointError(f"{source} belongs to a run with other settings:\n" + "\n".join(differing))


def rng_state(device: torch.device) -> dict[str, Any]:
    """The states of this process's global random number generators, as tensors and plain types."""
    numpy_state = np.random.get_state(legacy=False)
    key = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    return {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {"key": key, "pos": int(numpy_state["state"]["pos"])}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore what `rng_state` returned; the GPU's if there was one and is one."""
    random.setstate(state["python"])
    inner = state["numpy"]["state"]
    key = inner["key"].numpy().astype(np.uint32)
    np.random.set_state({**state["numpy"], "state": {"key": key, "pos": inner["pos"]}})
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def snapshot(trainer: Trainer, position: Position) -> dict[str, Any]:
    """What training changes, as a dict of tensors and plain types; every process must call it.

    `epoch` is the last whole one. The schedule needs nothing: it is a function of the flags and the update. Nor does
    the loader: its order and augmentation are functions of the seed and `position`.
    """
    return {
        "model": trainer.model.state_dict(),
        **({"model_ema": trainer.ema.module.state_dict()} if trainer.ema is not None else {}),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "epoch": position.epoch - 1,
        "position": dataclasses.asdict(position),
        "updates_per_epoch": trainer.updates_per_epoch,
        "rng": trainer.world.gather(rng_state(trainer.world.device)),
    }


def restore(trainer: Trainer, checkpoint: Mapping[str, Any], source: str) -> tuple[Position, float]:
    """Put `trainer` and the random generators where `checkpoint` left them; returns position and best acc@1 so far.

    Raises CheckpointError if the weights do not fit, the averaged ones are wanted and missing, or an epoch had another
    number of updates, by which learning rates and positions count.
    """
    updates = checkpoint.get("updates_per_epoch", trainer.updates_per_epoch)
    if updates != trainer.updates_per_epoch:
        raise CheckpointError(
            f"{source} has {updates} updates per epoch, this run would have {trainer.updates_per_epoch}: go on with "
            "the --batch-size and --grad-accum-steps of that run, or start anew in another --output_dir"
        )
    load_model(trainer.model, model_state(checkpoint, source), source)
    if trainer.ema is not None:
        load_model(trainer.ema.module, model_state(checkpoint, source, ema=True), source)
    trainer.optimizer.load_state_dict(checkpoint["optimizer"])
    trainer.scaler.load_state_dict(checkpoint["scaler"])
    world, rngs = trainer.world, checkpoint["rng"]
    if len(rngs) == world.size:
        set_rng_state(rngs[world.rank], world.device)
    else:
        trainer.console.print(f"{source} is of {len(rngs)} processes, now there are {world.size}: random numbers "
                              "start anew, so that the run is not bit for bit the unbroken one")  # fmt: skip
    return Position(**checkpoint["position"]), checkpoint["best_acc1"]


class Stopped(Exception):
    """A signal asked the run to end; it was saved and can go on."""


class Wishes:
    """What this process wants after an update: to end, because of a signal, or to save, because it is time."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, save_every_minutes: float | None) -> None:
        self.stop = False
        self.interval = save_every_minutes * 60 if save_every_minutes else float("inf")
        self.saved_at = time.monotonic()

    def __call__(self) -> tuple[bool, bool]:
        """(end, save)."""
        return self.stop, time.monotonic() - self.saved_at > self.interval

    def saved(self) -> None:
        """The next save is due an interval from now."""
        self.saved_at = time.monotonic()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take note of SIGTERM and SIGUSR1 instead of dying.

        However often they come: srun and torchrun each send one to every process. SIGINT and SIGKILL work as ever.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may handle signals
            return

        def note(*_: Any) -> None:
            self.stop = True

        before = {number: signal.signal(number, note) for number in self.SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
