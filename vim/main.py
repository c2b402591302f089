"""Train or evaluate an image classifier: `python vim/main.py --help`, or `torchrun --nproc_per_node N vim/main.py …`.

`vim.config` has the flags, `vim.engine` the passes over the data; this file puts a run together and keeps it.
"""

import argparse
import errno
import fcntl
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, random_seed
from torch import nn

from vim.checkpoint import (
    CheckpointError,
    atomic_write,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from vim.config import ConfigError, build_parser, is_vision_mamba, parse_args, save_config
from vim.data import DataError, Loader, build_loader
from vim.distributed import World, join
from vim.engine import NonFiniteLossError, Position, Trainer, Update, autocast, evaluate, peak_memory_mb
from vim.loggers import Loggers
from vim.losses import create_criterion, create_mixup
from vim.run_state import (
    Stopped,
    Wishes,
    check_same_architecture,
    check_same_run,
    restore,
    rng_state,
    set_rng_state,
    snapshot,
)

__all__ = ["ConfigError", "build_parser", "create_model", "create_optimizer", "create_scheduler", "main", "parse_args"]

Record = dict[str, Any]


def create_model(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """The model that `args` describe. Raises ConfigError if it does not take the options."""
    options: dict[str, Any] = {
        "num_classes": num_classes,
        "drop_rate": args.drop,
        "drop_path_rate": args.drop_path,
        "discretization_method": args.discretization_method,
    }
    try:
        model = timm.create_model(args.model, **{**options, **_image_size(args.model, args), **args.model_kwargs})
        if args.grad_checkpointing:
            model.set_grad_checkpointing(True)
    except (TypeError, ValueError, AssertionError, AttributeError) as error:
        raise ConfigError(f"--model {args.model} cannot be built with these options: {error}") from error
    return model


def _image_size(name: str, args: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """The option that tells a model its image size, for those that want to know."""
    config = timm.get_pretrained_cfg(name)
    fixed = is_vision_mamba(name) or (config is not None and config.fixed_input_size)
    return {"img_size": args.input_size} if fixed else {}


def create_optimizer(args: argparse.Namespace, model: nn.Module, processes: int = 1) -> torch.optim.Optimizer:
    """timm's optimizer; vectors, biases and the model's `no_weight_decay()` are not decayed. Raises ConfigError."""
    options = optimizer_kwargs(args)
    if not args.unscale_lr:
        options["lr"] = args.lr * args.batch_size * args.grad_accum_steps * processes / 512
    try:
        return create_optimizer_v2(model, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"--opt {args.opt} cannot be made with these options: {error}") from error


def create_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> Scheduler:
    """timm's scheduler, stepped once per update. The learning rate is a function of the flags and the update."""
    options = {**scheduler_kwargs(args), "step_on_epochs": False}
    scheduler, _ = create_scheduler_v2(optimizer, **options, updates_per_epoch=updates_per_epoch)
    return scheduler


def main(argv: Sequence[str] | None = None) -> Record:
    """Run the command line `argv` (default: the process's own).

    Returns the record of the last epoch, as written to log.txt; with --eval, that of the evaluation.

    Raises ConfigError, vim.data.DataError, vim.checkpoint.CheckpointError or vim.engine.NonFiniteLossError; after
    SIGTERM or SIGUSR1, vim.run_state.Stopped if there is an --output_dir to save to.
    """
    args = parse_args(argv)
    with join(args.device, args.dist_url, args.world_size) as world:
        console = Console(soft_wrap=True, highlight=False, markup=False, quiet=not world.is_main)
        random_seed(args.seed)
        if args.eval:
            return _evaluate(args, world, console)
        wishes = Wishes(args.save_every_minutes)
        output = _output_folder(args)
        with wishes.listening() if output else nullcontext(), _sole_run(output, world):
            return _train(args, argv, world, console, wishes, output)


def _evaluate(args: argparse.Namespace, world: World, console: Console) -> Record:
    source = str(Path(args.output_dir, "checkpoint.pth")) if args.resume == "auto" else args.resume
    loader = _test_loader(args, world)
    model = create_model(args, len(loader.classes))
    _load_weights(args, model, source, console, replace_head=False)
    model = model.to(world.device)
    if args.compile:
        model.compile(backend=args.compile)
    with _explained(loader):
        scores = _scores(args, model, loader, world, console)
    console.print(f"{source}: acc@1 {scores['test_acc1']:.2f} %  acc@5 {scores['test_acc5']:.2f} %  "
                  f"loss {scores['test_loss']:.4f}")  # fmt: skip
    return {**scores, **_constants(args, model)}


def _train(
    args: argparse.Namespace,
    argv: Sequence[str] | None,
    world: World,
    console: Console,
    wishes: Wishes,
    output: Path | None,
) -> Record:
    source = _checkpoint_to_resume(args, output)
    if len(set(world.gather(source))) > 1:
        raise ConfigError(f"--output_dir {output}: the processes do not see the same files there; use a shared disk")
    checkpoint = load_checkpoint(source) if source else None
    images_per_update = args.batch_size * args.grad_accum_steps * world.size
    if checkpoint is not None:
        check_same_run(checkpoint, vars(args), images_per_update, source)
    test_loader = _test_loader(args, world)
    trainer = _trainer(args, test_loader.classes, world, console, load_finetune=checkpoint is None)
    run = _Run(args, trainer, test_loader, output, wishes, images_per_update, Position(epoch=args.start_epoch))
    if checkpoint is not None:
        run.position, run.best_acc1 = restore(trainer, checkpoint, source)
        console.print(f"resumed from {source}, {run.position} of {trainer.updates_per_epoch}")
    del checkpoint  # the optimizer's state is large
    earlier = _read_log(output / "log.txt") if output is not None else []
    run.records = [record for record in earlier if record["epoch"] < run.position.epoch]
    processes = f"{world.size} processes with " if world.size > 1 else ""
    console.print(f"{args.model}, {run.constants['n_parameters']:,} parameters, on {processes}{world.device.type}; "
                  f"{args.data_set}, {len(test_loader.classes)} classes")  # fmt: skip
    epochs = args.epochs + args.cooldown_epochs
    with Loggers(args, run.step + 1, world.is_main) as loggers, _explained(trainer.loader, test_loader):
        if output is not None and world.is_main and run.position.epoch < epochs:
            save_config(output / "config.yaml", args, argv)
        while run.position.epoch < epochs:
            run.train(loggers)
            run.evaluate(loggers)
    if not run.records:
        raise ConfigError(f"--epochs {args.epochs}: nothing to do from epoch {run.position.epoch} on")
    return run.records[-1]


@dataclass
class _Run:
    """A training run at `position`; its methods do one epoch, and keep what came of it in `output`, if any."""

    args: argparse.Namespace
    trainer: Trainer
    test_loader: Loader
    output: Path | None
    wishes: Wishes
    images_per_update: int
    position: Position
    best_acc1: float = -math.inf
    records: list[Record] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Updates since the run began."""
        return self.position.epoch * self.trainer.updates_per_epoch + self.position.step

    @property
    def constants(self) -> Record:
        return _constants(self.args, self.trainer.model)

    def train(self, loggers: Loggers) -> None:
        """To the end of the epoch. Raises Stopped, after saving, if a signal came to any process.

        Raises NonFiniteLossError if what is to be saved has diverged.
        """
        every, update = self.args.checkpoint_steps, None
        for update in self.trainer.train(self.position, self.wishes):
            loggers.write({"train/loss": update.loss, "train/lr": self.trainer.learning_rate}, self.step)
            stop, due = update.wishes
            if stop or due or (every and self.position.step % every == 0):
                self._save_within_epoch(update, stop)
        # A signal since the last update: evaluation may take too long.
        if any(self.trainer.world.sum([self.wishes.stop])):
            self._save_within_epoch(update, True)

    def _save_within_epoch(self, update: Update | None, stop: bool) -> None:
        """After `update`; None: none was made since the run was resumed. Raises Stopped in the end, if `stop`."""
        problem = ""
        if update is not None:
            before = rng_state(self.trainer.world.device)
            problem = self.trainer.explain_divergence(update.images)
            set_rng_state(before, self.trainer.world.device)
        if problem:
            problem = f"not saved after {self.position}: {problem}; the last checkpoint stays"
            if stop or not (self.args.if_continue_inf or self.args.if_nan2num):
                raise NonFiniteLossError(problem)
            print(problem, file=sys.stderr)  # not through the console, which is the main process's
            self.wishes.saved()  # in so far as the next attempt is due an interval from now
            return
        self.save("checkpoint.pth")
        if stop:
            raise Stopped(f"{self.position} of {self.trainer.updates_per_epoch}")

    def evaluate(self, loggers: Loggers) -> None:
        """End the epoch: evaluate, log, save, and move `position` on.

        Raises NonFiniteLossError if the loss is not finite; nothing is saved then.
        """
        args, world, epoch = self.args, self.trainer.world, self.position.epoch
        trained = self.trainer.summary(self.position)
        tested = _scores(args, self.trainer.model, self.test_loader, world, self.trainer.console)
        if not math.isfinite(tested["test_loss"]):
            raise NonFiniteLossError(
                f"the loss on the held-out images is {tested['test_loss']} after epoch {epoch}; the epoch was not saved"
            )
        if self.trainer.ema is not None and not args.model_ema_force_cpu:
            averaged = _scores(args, self.trainer.ema.module, self.test_loader, world, self.trainer.console)
            tested |= {f"ema_{name}": value for name, value in averaged.items()}
        memory = {"peak_memory_mb": peak_memory_mb(world.device)}
        self.records.append({"epoch": epoch, **trained, **tested, **memory, **self.constants})
        loggers.write({f"epoch/{name}": value for name, value in self.records[-1].items()}, self.step)
        is_best = tested["test_acc1"] > self.best_acc1
        self.best_acc1 = max(self.best_acc1, tested["test_acc1"])
        self.position = Position(epoch=epoch + 1)
        if self.output is not None:
            if world.is_main:
                _write_log(self.output / "log.txt", self.records)
            # checkpoint.pth last: what was written before it is written again if the run dies in between.
            self.save(*(["best_checkpoint.pth"] if is_best else []), "checkpoint.pth")
        self.trainer.console.print(
            f"epoch {epoch}/{args.epochs + args.cooldown_epochs}  train loss {trained['train_loss']:.4f}  "
            f"test loss {tested['test_loss']:.4f}  acc@1 {tested['test_acc1']:.2f} %  best {self.best_acc1:.2f} %  "
            f"{trained['images_per_s']:.0f} img/s"
        )

    def save(self, *names: str) -> None:
        """Write the run as it is under all `names`; every process takes part, the main one writes.

        Raises NonFiniteLossError instead if weights are not finite.
        """
        for name, parameter in self.trainer.model.named_parameters():
            if not parameter.isfinite().all():
                raise NonFiniteLossError(f"{name} is not finite after {self.position}; the last checkpoint stays")
        state = {
            **snapshot(self.trainer, self.position),
            "best_acc1": self.best_acc1,
            "images_per_update": self.images_per_update,
            "args": vars(self.args),
        }
        self.wishes.saved()
        if self.trainer.world.is_main:
            for name in names:
                save_checkpoint(self.output / name, state)


def _trainer(
    args: argparse.Namespace, classes: Sequence[str], world: World, console: Console, load_finetune: bool
) -> Trainer:
    """All that takes part in training, at its beginning. `classes` are those of the held-out images."""
    loader = _build_loader(args, world, train=True)
    if loader.classes != classes:
        differing = sorted(set(loader.classes) ^ set(classes))
        raise DataError(f"train/ and val/ of {args.data_path} differ in their classes: {', '.join(differing[:10])}")
    model = create_model(args, len(classes))
    if args.finetune and load_finetune:
        _load_weights(args, model, args.finetune, console, replace_head=True)
    if args.attn_only:
        _freeze_all_but_mixers(args, model)
    model.to(world.device)
    ema = None
    if args.model_ema:
        place = torch.device("cpu") if args.model_ema_force_cpu else None
        ema = ModelEmaV3(model, decay=args.model_ema_decay, device=place)
    optimizer = create_optimizer(args, model, world.size)
    updates_per_epoch = math.ceil(len(loader) / args.grad_accum_steps)
    scheduler = create_scheduler(args, optimizer, updates_per_epoch)
    mixup = create_mixup(args, len(classes))
    criterion = create_criterion(args, mixup, _teacher(args, len(classes), world.device))
    if args.compile:
        model.compile(backend=args.compile)
    parallel = world.parallel(model)
    random_seed(args.seed, world.rank)  # each process drops other paths and mixes other images
    return Trainer(
        model=model,
        parallel=parallel,
        loader=loader,
        criterion=criterion,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=torch.amp.GradScaler(world.device.type, enabled=args.amp_dtype == "float16"),
        world=world,
        console=console,
        autocast=autocast(world.device, args.amp_dtype),
        mixup=mixup,
        ema=ema,
        accumulate=args.grad_accum_steps,
        clip_grad=args.clip_grad,
        train_mode=args.train_mode,
        continue_inf=args.if_continue_inf,
        nan2num=args.if_nan2num,
        options={
            name: True for name in ("if_random_cls_token_position", "if_random_token_rank") if getattr(args, name)
        },
    )


def _load_weights(
    args: argparse.Namespace, model: nn.Module, source: str, console: Console, *, replace_head: bool
) -> None:
    """The weights of `source` into `model`, fitted to its image size, and with `replace_head` to its classes."""
    checkpoint = load_checkpoint(source)
    check_same_architecture(checkpoint, vars(args), source)
    for change in load_weights(model, checkpoint, source, ema=args.use_ema, replace_head=replace_head):
        console.print(f"{source}: {change}")


def _freeze_all_but_mixers(args: argparse.Namespace, model: nn.Module) -> None:
    """Leave what mixes tokens (attention, or the state space), the position embedding and the head to be trained."""
    head = {id(parameter) for parameter in model.get_classifier().parameters()}
    mixers = 0
    for name, parameter in model.named_parameters():
        mixes = ".attn." in name or ".mixer." in name
        mixers += mixes
        parameter.requires_grad_(mixes or name == "pos_embed" or id(parameter) in head)
    if not mixers:
        raise ConfigError(f"--attn-only: {args.model} has no attention and no mixers")


def _teacher(args: argparse.Namespace, num_classes: int, device: torch.device) -> nn.Module | None:
    if args.distillation_type == "none":
        return None
    name, options = args.teacher_model, {"num_classes": num_classes, "in_chans": _channels(args)}
    try:
        teacher = timm.create_model(name, **options, **_image_size(name, args))
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"--teacher-model {name} cannot be built for these images: {error}") from error
    load_weights(teacher, load_checkpoint(args.teacher_path), args.teacher_path)
    return teacher.to(device)


def _output_folder(args: argparse.Namespace) -> Path | None:
    if not args.output_dir:
        return None
    output = Path(args.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output_dir {output} cannot be made: {error.strerror}") from error
    return output


@contextmanager
def _sole_run(output: Path | None, world: World) -> Iterator[None]:
    """Keep other runs out of `output`, where files can be locked.

    Raises ConfigError if another run is in it, or if it cannot be written.
    """
    with ExitStack() as held:
        problem = _lock(output, held) if output is not None and world.is_main else ""
        problems = [text for text in world.gather(problem) if text]
        if problems:
            raise ConfigError(problems[0])
        yield


def _lock(output: Path, held: ExitStack) -> str:
    """Lock `output` until `held` is closed; why that is not possible, if another run has it or it cannot be written."""
    lock = output / ".lock"
    try:
        file = os.open(lock, os.O_WRONLY | os.O_CREAT, 0o666)
    except OSError as error:
        of_another_user = isinstance(error, PermissionError) and lock.exists()
        return "" if of_another_user else f"--output_dir {output} cannot be written: {error.strerror}"
    held.callback(os.close, file)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process, and is not its workers'
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # any other: this file system has no locks
            ask = "wait for its end, or choose another"
            return f"--output_dir {output} is in use by another run, which holds {lock}: {ask}"
    return ""


def _checkpoint_to_resume(args: argparse.Namespace, output: Path | None) -> str | None:
    """The checkpoint to go on from, if any."""
    if args.resume and args.resume != "auto":
        return args.resume
    own = output / "checkpoint.pth" if output is not None else None
    if own is None or not own.exists():
        return None
    if not args.resume:
        raise ConfigError(f"{own} exists: go on with --resume auto, or choose another --output_dir")
    return str(own)


def _test_loader(args: argparse.Namespace, world: World) -> Loader:
    return _build_loader(args, world if args.dist_eval else World(world.device), train=False)


def _scores(
    args: argparse.Namespace, model: nn.Module, loader: Loader, world: World, console: Console
) -> dict[str, float]:
    """Of the held-out images: each process looks at all of them, or with --dist-eval at its share."""
    sharers = world if args.dist_eval else World(world.device)
    return evaluate(model, loader, world=sharers, console=console, autocast=autocast(world.device, args.amp_dtype))


def _build_loader(args: argparse.Namespace, world: World, *, train: bool) -> Loader:
    pin_memory = args.pin_mem and world.device.type == "cuda"
    return build_loader(
        args, train=train, channels=_channels(args), pin_memory=pin_memory, rank=world.rank, world_size=world.size
    )


@contextmanager
def _explained(*loaders: Loader) -> Iterator[None]:
    """The death of a worker process is raised anywhere in the main thread; its loader says which image it had."""
    try:
        yield
    except RuntimeError as error:
        for loader in loaders:
            loader.explain(error)
        raise


def _channels(args: argparse.Namespace) -> int:
    return args.model_kwargs.get("channels", args.model_kwargs.get("in_chans", 3))


def _constants(args: argparse.Namespace, model: nn.Module) -> Record:
    """What is the same in all records of a run."""
    return {
        "n_parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "discretization_method": args.discretization_method,
        "seed": args.seed,
    }


def _read_log(path: Path) -> list[Record]:
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise CheckpointError(f"{path} is not a log of JSON lines: {error}") from error


def _write_log(path: Path, records: Iterable[Record]) -> None:
    text = "".join(json.dumps(record) + "\n" for record in records)
    atomic_write(path, lambda file: file.write(text.encode()))


def cli() -> int:
    """`main` as a program: 0, also after a signal; 2 on an error of the user's, 3 if the loss is not finite.

    Errors are one message each.
    """
    try:
        main()
    except Stopped as stopped:
        print(f"vim/main.py: stopped by a signal at {stopped}; saved, go on with --resume auto")
    except (ConfigError, DataError, CheckpointError, NonFiniteLossError) as error:
        process = f" in process {os.environ['RANK']}" if "RANK" in os.environ else ""
        print(f"vim/main.py: error{process}: {error}", file=sys.stderr)
        return 3 if isinstance(error, NonFiniteLossError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(cli())
