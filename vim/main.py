"""Train or evaluate an image classifier: `python vim/main.py --help`.

The flags have the names and, except for augmentations that a data set rules out, the defaults of DeiT's trainer.
"""

import argparse
import ast
import difflib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import timm
import torch
from rich.console import Console
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from timm.utils import random_seed
from torch import nn

import vim.models_mamba  # registers the Vision Mamba models with timm
from mamba_ssm.ops.discretization_ref import METHODS
from vim.checkpoint import (
    CheckpointError,
    atomic_write,
    check_same_architecture,
    check_same_run,
    load_checkpoint,
    load_model,
    model_state,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from vim.data import INAT_CATEGORIES, DataError, Loader, build_loader, data_set_defaults, data_set_name
from vim.engine import NonFiniteLossError, evaluate, peak_memory_mb, train_one_epoch

Record = dict[str, Any]


class ConfigError(ValueError):
    """The command line asks for something that does not exist or does not fit together."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _above(bound: float, kind: type = float, *, or_equal: bool = False) -> Callable[[str], Any]:
    """An argparse type: a finite `kind` above `bound`."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not math.isfinite(value) or value < bound or (value == bound and not or_equal):
            raise argparse.ArgumentTypeError(f"{text} is not {'at least' if or_equal else 'above'} {bound:g}")
        return value

    parse.__name__ = kind.__name__  # argparse's messages say "invalid int value"
    return parse


_positive_int = _above(0, int)
_count = _above(0, int, or_equal=True)
_positive = _above(0)
_not_negative = _above(0, or_equal=True)


def _probability(text: str) -> float:
    value = _not_negative(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is not a probability, from 0 to 1")
    return value


def _data_set(text: str) -> str:
    try:
        return data_set_name(text)
    except DataError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _key_value(text: str) -> tuple[str, Any]:
    """`KEY=VALUE` with VALUE a Python literal, or else a string."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vim/main.py", description="Train or evaluate an image classifier.", allow_abbrev=False)

    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model", default="vim_tiny", help="any model of timm's registry, Vision Mamba's included (default: vim_tiny)")
    add("--model-kwargs", nargs="+", type=_key_value, default=[], metavar="KEY=VALUE",
        help="further arguments of the model, e.g. depth=4 embed_dim=64 patch_size=2")  # fmt: skip
    add("--discretization-method", choices=tuple(METHODS), help="of the state space, Vision Mamba only (default: zoh)")
    add("--input-size", type=_positive_int, default=224, help="image height and width (default: 224; DIGITS: 8)")
    add("--drop", type=_not_negative, help="dropout rate (default: the model's)")
    add("--drop-path", type=_not_negative, help="stochastic depth rate (default: the model's)")

    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data-set", type=_data_set, default="IMNET",
        help="IMNET: --data-path holds train/ and val/ with one folder per class; CIFAR is CIFAR100; INAT and INAT19: "
        "iNaturalist 2018 and 2019; DIGITS: scikit-learn's handwritten digits, nothing to download; or wds/…, hfds/…, "
        "hfids/… of timm (default: IMNET)")  # fmt: skip
    add("--data-path", help="folder of the data set")
    add("--inat-category", choices=INAT_CATEGORIES, default="name", help="what is classified, INAT and INAT19 only")
    add("--num-classes", type=_positive_int, help="of a data set that does not say (wds/…)")
    add("--train-split", help="split or shards to train on, wds/…, hfds/… and hfids/… only (default: train)")
    add("--val-split", help="split or shards to evaluate on (default: validation)")
    add("--num_workers", "--num-workers", type=_count, default=min(10, os.cpu_count() or 1), help="image files only")
    add("--pin-mem", action=argparse.BooleanOptionalAction, default=True, help="pinned host memory for GPUs")

    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--batch-size", type=_positive_int, default=64)
    add("--epochs", type=_positive_int, default=300)
    add("--start_epoch", "--start-epoch", type=_count, default=0, help="first epoch, if not resumed")
    add("--opt", default="adamw", help="optimizer, any of timm's (default: adamw)")
    add("--opt-eps", type=_positive, default=1e-8)
    add("--opt-betas", type=float, nargs=2, help="(default: the optimizer's)")
    add("--momentum", type=_not_negative, default=0.9)
    add("--weight-decay", type=_not_negative, default=0.05)
    add("--clip-grad", type=_positive, help="largest gradient norm (default: no limit)")
    add("--sched", choices=("cosine", "tanh", "poly", "step"), default="cosine")
    add("--lr", type=_positive, default=5e-4, help="peak learning rate for a batch of 512; scaled with the batch size")
    add("--unscale-lr", action="store_true", help="take --lr as it is")
    add("--warmup-lr", type=_not_negative, default=1e-6)
    add("--min-lr", type=_not_negative, default=1e-5)
    add("--warmup-epochs", type=_count, default=5)
    add("--decay-epochs", type=_positive, default=30, help="epochs between two steps of --sched step")
    add("--decay-rate", type=_positive, default=0.1, help="factor of --sched step; power of --sched poly")

    group = parser.add_argument_group("augmentation", "DIGITS takes smoothing, mixup and cutmix of these")
    add = group.add_argument
    add("--smoothing", type=_not_negative, default=0.1, help="label smoothing")
    add("--mixup", type=_not_negative, default=0.8, help="alpha, 0 is off (DIGITS: 0)")
    add("--cutmix", type=_not_negative, default=1.0, help="alpha, 0 is off (DIGITS: 0)")
    add("--mixup-prob", type=_probability, default=1.0)
    add("--mixup-switch-prob", type=_probability, default=0.5)
    add("--mixup-mode", choices=("batch", "pair", "elem"), default="batch")
    add("--color-jitter", type=_not_negative, default=0.3)
    add("--aa", default="rand-m9-mstd0.5-inc1", help="AutoAugment policy of timm")
    add("--ThreeAugment", action="store_true", help="grey, solarize or blur, as in DeiT III, in place of --aa")
    add("--src", action="store_true", help="simple random crop, as in DeiT III")
    add("--repeated-aug", action=argparse.BooleanOptionalAction, default=False, help="each image three times an epoch")
    add("--train-interpolation", choices=("random", "bilinear", "bicubic"), default="bicubic")
    add("--reprob", type=_probability, default=0.25, help="probability of random erasing")
    add("--remode", choices=("const", "rand", "pixel"), default="pixel")
    add("--recount", type=_positive_int, default=1)
    add("--eval-crop-ratio", type=_positive, default=0.875)

    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--output_dir", "--output-dir", default="", help="for log.txt, checkpoint.pth, best_checkpoint.pth")
    add("--resume", default="", help="a checkpoint, or 'auto': the last one of --output_dir if there is one")
    add("--eval", action="store_true", help="evaluate the --resume checkpoint, no training")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one, else cpu)")
    add("--seed", type=_count, default=0)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line as plain types. Raises ConfigError."""
    parser = build_parser()
    data_set = parser.parse_args(argv).data_set
    parser.set_defaults(**data_set_defaults(data_set))
    args = parser.parse_args(argv)
    args.model_kwargs = dict(args.model_kwargs)

    if not timm.is_model(args.model):
        raise ConfigError(f"--model {args.model} is not known{_did_you_mean(args.model, timm.list_models())}")
    if _is_vision_mamba(args.model):
        args.discretization_method = args.discretization_method or "zoh"
    elif args.discretization_method:
        raise ConfigError(f"--discretization-method is for Vision Mamba; {args.model} has no state space")
    if args.opt not in list_optimizers():
        raise ConfigError(f"--opt {args.opt} is not known{_did_you_mean(args.opt, list_optimizers())}")
    if "img_size" in args.model_kwargs:
        raise ConfigError("--model-kwargs img_size=… would not match the images: use --input-size")
    if args.smoothing >= 1:
        raise ConfigError(f"--smoothing {args.smoothing} is not below 1")
    if args.batch_size % 2 and (args.mixup or args.cutmix) and not args.eval:
        raise ConfigError(f"--batch-size {args.batch_size}: mixup and cutmix need an even one")
    if args.start_epoch and args.resume:
        raise ConfigError("--start_epoch cannot be set together with --resume: the checkpoint knows its epoch")
    if args.resume == "auto" and not args.output_dir:
        raise ConfigError("--resume auto needs --output_dir, where it looks for checkpoint.pth")
    if args.eval and not args.resume:
        raise ConfigError("--eval needs --resume, the checkpoint to evaluate")
    args.device = str(_device(args.device))
    return args


def create_model(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """The model that `args` describe. Raises ConfigError if it does not take the options."""
    options: dict[str, Any] = {
        "num_classes": num_classes,
        "drop_rate": args.drop,
        "drop_path_rate": args.drop_path,
        "discretization_method": args.discretization_method,
    }
    config = timm.get_pretrained_cfg(args.model)
    if _is_vision_mamba(args.model) or (config is not None and config.fixed_input_size):
        options["img_size"] = args.input_size
    try:
        return timm.create_model(args.model, **{**options, **args.model_kwargs})
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"--model {args.model} cannot be built with these options: {error}") from error


def create_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer; vectors, biases and the model's `no_weight_decay()` are not decayed."""
    options = optimizer_kwargs(args)
    if not args.unscale_lr:
        options["lr"] = args.lr * args.batch_size / 512
    return create_optimizer_v2(model, **options)


def create_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> Scheduler:
    """timm's scheduler, stepped once per update. The learning rate is a function of the flags and the update."""
    options = {**scheduler_kwargs(args), "step_on_epochs": False}
    scheduler, _ = create_scheduler_v2(optimizer, **options, updates_per_epoch=updates_per_epoch)
    return scheduler


def main(argv: Sequence[str] | None = None) -> Record:
    """Run the command line `argv` (default: the process's own).

    Returns the record of the last epoch, as written to log.txt; with --eval, that of the evaluation.

    Raises ConfigError, vim.data.DataError, vim.checkpoint.CheckpointError or vim.engine.NonFiniteLossError.
    """
    args = parse_args(argv)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    random_seed(args.seed)
    return _evaluate(args, console) if args.eval else _train(args, console)


def _evaluate(args: argparse.Namespace, console: Console) -> Record:
    path = Path(args.output_dir, "checkpoint.pth") if args.resume == "auto" else Path(args.resume)
    checkpoint = load_checkpoint(path)
    check_same_architecture(checkpoint, vars(args), path)
    device = torch.device(args.device)
    loader = _build_loader(args, train=False)
    model = create_model(args, len(loader.classes))
    load_model(model, model_state(checkpoint, path), path)
    scores = evaluate(model.to(device), loader, device=device, console=console)
    console.print(f"{path}: acc@1 {scores['test_acc1']:.2f} %  acc@5 {scores['test_acc5']:.2f} %  "
                  f"loss {scores['test_loss']:.4f}")  # fmt: skip
    return {**scores, **_constants(args, model)}


def _train(args: argparse.Namespace, console: Console) -> Record:
    device = torch.device(args.device)
    output = Path(args.output_dir) if args.output_dir else None
    checkpoint_path = _checkpoint_to_resume(args, output)

    train_loader, test_loader = _build_loader(args, train=True), _build_loader(args, train=False)
    if train_loader.classes != test_loader.classes:
        differing = sorted(set(train_loader.classes) ^ set(test_loader.classes))
        raise DataError(f"train/ and val/ of {args.data_path} differ in their classes: {', '.join(differing[:10])}")
    num_classes = len(train_loader.classes)

    model = create_model(args, num_classes).to(device)
    optimizer = create_optimizer(args, model)
    scheduler = create_scheduler(args, optimizer, updates_per_epoch=len(train_loader))
    mixup, criterion = _mixup_and_criterion(args, num_classes)
    start_epoch, best_acc1 = args.start_epoch, -math.inf
    if checkpoint_path is not None:
        start_epoch, best_acc1 = _resume(args, checkpoint_path, model, optimizer)
        console.print(f"resumed from {checkpoint_path}, epoch {start_epoch - 1}")
    earlier = _read_log(output / "log.txt") if output is not None else []
    records = [record for record in earlier if record["epoch"] < start_epoch]

    constants = _constants(args, model)
    console.print(f"{args.model}, {constants['n_parameters']:,} parameters, on {device}; "
                  f"{args.data_set}, {num_classes} classes")  # fmt: skip
    for epoch in range(start_epoch, args.epochs):
        trained = train_one_epoch(
            model, train_loader, criterion, optimizer, scheduler, epoch,
            device=device, console=console, mixup=mixup, clip_grad=args.clip_grad,
        )  # fmt: skip
        tested = evaluate(model, test_loader, device=device, console=console)
        if not math.isfinite(tested["test_loss"]):
            raise NonFiniteLossError(
                f"the loss on the held-out images is {tested['test_loss']} after epoch {epoch}; the epoch was not saved"
            )
        memory = {"peak_memory_mb": peak_memory_mb(device)}
        records.append({"epoch": epoch, **trained, **tested, **memory, **constants})
        is_best = tested["test_acc1"] > best_acc1
        best_acc1 = max(best_acc1, tested["test_acc1"])
        if output is not None:
            _write_log(output / "log.txt", records)
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "epoch": epoch,
                "args": vars(args),
                "rng": rng_state(),
                "best_acc1": best_acc1,
            }
            # checkpoint.pth last: whatever was written before it is written again if the run dies in between.
            if is_best:
                save_checkpoint(output / "best_checkpoint.pth", state)
            save_checkpoint(output / "checkpoint.pth", state)
        console.print(
            f"epoch {epoch}/{args.epochs}  train loss {trained['train_loss']:.4f}  "
            f"test loss {tested['test_loss']:.4f}  acc@1 {tested['test_acc1']:.2f} %  best {best_acc1:.2f} %  "
            f"{trained['images_per_s']:.0f} img/s"
        )
    if not records:
        raise ConfigError(f"--epochs {args.epochs}: nothing to do from epoch {start_epoch} on")
    return records[-1]


def _checkpoint_to_resume(args: argparse.Namespace, output: Path | None) -> Path | None:
    """Make the output folder; return the checkpoint to go on from, if any."""
    if output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--output_dir {output} cannot be made: {error.strerror}") from error
    if args.resume and args.resume != "auto":
        return Path(args.resume)
    own = output / "checkpoint.pth" if output is not None else None
    if own is None or not own.exists():
        return None
    if not args.resume:
        raise ConfigError(f"{own} exists: go on with --resume auto, or choose another --output_dir")
    return own


def _resume(
    args: argparse.Namespace, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Put model, optimizer and random number generators where `path` left them; return next epoch and best acc@1.

    The schedule needs nothing: it is a function of the flags and the update.
    """
    checkpoint = load_checkpoint(path)
    check_same_run(checkpoint, vars(args), path)
    load_model(model, model_state(checkpoint, path), path)
    optimizer.load_state_dict(checkpoint["optimizer"])
    set_rng_state(checkpoint["rng"])
    return checkpoint["epoch"] + 1, checkpoint["best_acc1"]


def _build_loader(args: argparse.Namespace, *, train: bool) -> Loader:
    channels = args.model_kwargs.get("channels", args.model_kwargs.get("in_chans", 3))
    pin_memory = args.pin_mem and args.device.startswith("cuda")
    return build_loader(args, train=train, channels=channels, pin_memory=pin_memory)


def _mixup_and_criterion(args: argparse.Namespace, num_classes: int) -> tuple[Mixup | None, nn.Module]:
    if args.mixup or args.cutmix:
        mixup = Mixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=num_classes,
        )
        return mixup, SoftTargetCrossEntropy()
    return None, LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()


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


def _is_vision_mamba(name: str) -> bool:
    return timm.model_entrypoint(name).__module__ == vim.models_mamba.__name__


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name} is not cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {name}: {torch.cuda.device_count()} CUDA devices are usable here; try --device cpu"
        )
    return device


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    """The known names closest to `name`, or to which it could be the beginning."""
    close = difflib.get_close_matches(name, {full[: len(name) + 1]: full for full in known}, n=3, cutoff=0.75)
    names = [full for full in known if full[: len(name) + 1] in close]
    return f"; close to it: {', '.join(names[:5])}" if names else ""


def cli() -> int:
    """`main` as a program: 0; 2 on an error of the user's, 3 if the loss is not finite, with one message."""
    try:
        main()
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"vim/main.py: error: {error}", file=sys.stderr)
        return 2
    except NonFiniteLossError as error:
        print(f"vim/main.py: error: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(cli())
