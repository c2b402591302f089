"""The trainer's settings: every flag, YAML files under them, and what is refused.

Defaults < those of the data set < `--config FILE.yaml` < the command line. The flags have the names and, except where
the help says otherwise, the defaults of DeiT's trainer and of Vim's, which grew out of it.
"""

import argparse
import ast
import difflib
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import timm
import torch
import yaml
from timm.optim import list_optimizers

import vim.models_mamba  # registers the Vision Mamba models with timm
from mamba_ssm.ops.discretization_ref import METHODS
from vim.checkpoint import atomic_write
from vim.data import INAT_CATEGORIES, DataError, data_set_defaults, data_set_name
from vim.provenance import environment

# Flags of the published trainers that are not here, and why.
_NO_PLATEAU = "timm is about to drop the plateau schedule, whose state is lost in a resumption; use cosine or step"
_NO_LOCAL_RANK = "torchrun says it in the environment variable LOCAL_RANK"
REFUSED = {
    "--patience-epochs": _NO_PLATEAU,
    "--resplit": "has no effect in the published trainer either; leave it out",
    "--cosub": "training with pairs of submodels is not part of this trainer",
    "--distributed": "not needed: start several processes with torchrun, and they find each other",
    "--local-rank": _NO_LOCAL_RANK,
    "--local_rank": _NO_LOCAL_RANK,
}
SCHEDULES = ("cosine", "tanh", "poly", "step")
_MADE_BY = "made_by"  # key of a saved configuration that is for people, not for the trainer


class ConfigError(ValueError):
    """The settings ask for something that does not exist or does not fit together."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


class _Refused(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> NoReturn:
        raise ConfigError(f"{option_string} is refused: {REFUSED[option_string]}")


def _above(bound: float, kind: type = float, *, or_equal: bool = False) -> Callable[[str], Any]:
    """An argparse type: a finite `kind` above `bound`."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not math.isfinite(value) or value < bound or (value == bound and not or_equal):
            raise argparse.ArgumentTypeError(f"{text} is not {'at least' if or_equal else 'above'} {bound:g}")
        return value

    parse.__name__ = kind.__name__  # argparse's messages say "invalid int value"
    return parse


positive_int = _above(0, int)
_count = _above(0, int, or_equal=True)
_positive = _above(0)
_not_negative = _above(0, or_equal=True)


def _probability(text: str) -> float:
    value = _not_negative(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is not a probability, from 0 to 1")
    return value


def _below_one(text: str) -> float:
    value = _not_negative(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text} is not below 1")
    return value


def key_value(text: str) -> tuple[str, Any]:
    """`KEY=VALUE` with VALUE a Python literal, or else a string."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _schedule(text: str) -> str:
    if text == "plateau":
        raise argparse.ArgumentTypeError(f"plateau is refused: {_NO_PLATEAU}")
    if text not in SCHEDULES:
        raise argparse.ArgumentTypeError(f"{text} is not known; choose {', '.join(SCHEDULES)}")
    return text


def _data_set(text: str) -> str:
    try:
        return data_set_name(text)
    except DataError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def build_parser() -> argparse.ArgumentParser:
    """Every flag with its default. `parse_args` adds what depends on more than one flag."""
    parser = _Parser(prog="vim/main.py", description="Train or evaluate an image classifier.", allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="settings, by flag name; the command line wins over them")

    def switch(add: Callable[..., Any], name: str, off: str, help: str, default: bool | None = False) -> None:
        """A published pair of flags: `name` turns on, `off` turns off."""
        dest = name.lstrip("-").replace("-", "_")
        add(name, dest=dest, action="store_true", default=default, help=help)
        add(off, dest=dest, action="store_false", default=default, help=argparse.SUPPRESS)

    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model", default="vim_tiny", help="any model of timm's registry, Vision Mamba's included (default: vim_tiny)")
    add("--model-kwargs", nargs="+", type=key_value, default=[], metavar="KEY=VALUE",
        help="further arguments of the model, e.g. depth=4 embed_dim=64 patch_size=2")  # fmt: skip
    add("--discretization-method", choices=tuple(METHODS), help="of the state space, Vision Mamba only (default: zoh)")
    add("--input-size", type=positive_int, nargs="+", default=[224], metavar="PIXELS",
        help="of the images: one number, or height and width (default: 224; DIGITS: 8)")  # fmt: skip
    add("--drop", type=_below_one, help="dropout rate (default: the model's)")
    add("--drop-path", type=_below_one, help="stochastic depth rate (default: the model's)")
    switch(add, "--if_random_cls_token_position", "--no_random_cls_token_position",
           "train with the class token at a random place; Vision Mamba with the token at the head only")  # fmt: skip
    switch(add, "--if_random_token_rank", "--no_random_token_rank",
           "train with shuffled tokens; Vision Mamba only")  # fmt: skip
    add("--model-ema", action=argparse.BooleanOptionalAction, default=True,
        help="keep an exponential moving average of the weights (default: yes; DIGITS: no)")  # fmt: skip
    add("--model-ema-decay", type=_probability, default=0.99996)
    add("--model-ema-force-cpu", action="store_true", help="keep the average off the GPU; then it is not evaluated")

    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data-set", type=_data_set, default="IMNET",
        help="IMNET: --data-path holds train/ and val/ with one folder per class; CIFAR is CIFAR100; INAT and INAT19: "
        "iNaturalist 2018 and 2019; DIGITS: scikit-learn's handwritten digits, nothing to download; or wds/…, hfds/…, "
        "hfids/… of timm (default: IMNET)")  # fmt: skip
    add("--data-path", help="folder of the data set")
    add("--inat-category", choices=INAT_CATEGORIES, default="name", help="what is classified, INAT and INAT19 only")
    add("--num-classes", type=positive_int, help="of a data set that does not say (wds/…); checked where it does")
    add("--train-split", help="split or shards to train on, wds/…, hfds/… and hfids/… only (default: train)")
    add("--val-split", help="split or shards to evaluate on (default: validation)")
    add("--num_workers", "--num-workers", type=_count, default=min(10, os.cpu_count() or 1), help="image files only")
    add("--pin-mem", action=argparse.BooleanOptionalAction, default=True, help="pinned host memory for GPUs")

    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--batch-size", type=positive_int, default=64, help="of each process and backward pass (default: 64)")
    add("--grad-accum-steps", type=positive_int, default=1, metavar="N", help="batches per update (default: 1)")
    add("--epochs", type=positive_int, default=300)
    add("--start_epoch", "--start-epoch", type=_count, default=0, help="first epoch, if not resumed")
    add("--train-mode", action=argparse.BooleanOptionalAction, default=True, help="no: train without dropped paths")
    add("--opt", default="adamw", help="optimizer, any of timm's (default: adamw)")
    add("--opt-eps", type=_positive, default=1e-8)
    add("--opt-betas", type=_probability, nargs="+", help="(default: the optimizer's)")
    add("--momentum", type=_not_negative, default=0.9)
    add("--weight-decay", type=_not_negative, default=0.05)
    add("--layer-decay", type=_probability, metavar="FACTOR",
        help="each block learns slower than the next by this factor (default: all alike)")  # fmt: skip
    add("--clip-grad", type=_positive, metavar="NORM", help="largest gradient norm (default: no limit)")
    add("--sched", type=_schedule, default="cosine", metavar="{" + ",".join(SCHEDULES) + "}")
    add("--lr", type=_positive, default=5e-4,
        help="peak learning rate for an update of 512 images; scaled with their number (default: 5e-4)")  # fmt: skip
    add("--unscale-lr", action="store_true", help="take --lr as it is")
    add("--lr-noise", type=_not_negative, nargs="+", metavar="FRACTION", help="of the epochs: where noise begins, ends")
    add("--lr-noise-pct", type=_positive, default=0.67, help="noise stays within this factor")
    add("--lr-noise-std", type=_positive, default=1.0)
    add("--warmup-lr", type=_not_negative, default=1e-6)
    add("--min-lr", type=_not_negative, default=1e-5)
    add("--warmup-epochs", type=_count, default=5)
    add("--cooldown-epochs", type=_count, default=0, metavar="N",
        help="more epochs at --min-lr after --epochs (default: 0; the published 10 were never run)")  # fmt: skip
    add("--decay-epochs", type=_positive, default=30, help="epochs between two steps of --sched step")
    add("--decay-rate", "--dr", type=_positive, default=0.1, help="factor of --sched step; power of --sched poly")
    add("--bce-loss", action="store_true", help="binary cross-entropy, every class by itself; needs --smoothing 0")
    add("--finetune", default="", metavar="CHECKPOINT",
        help="start from these weights, fitted to image size and classes: a file, URL or hf-hub:NAME")  # fmt: skip
    add("--attn-only", action="store_true", help="train only attention or mixers, position embedding and head")
    add("--distillation-type", choices=("none", "soft", "hard"), default="none")
    add("--distillation-alpha", type=_probability, default=0.5, help="the teacher's share of the loss")
    add("--distillation-tau", type=_positive, default=1.0, help="temperature of soft distillation")
    add("--teacher-model", default="regnety_160", help="any of timm's (default: regnety_160)")
    add("--teacher-path", default="", metavar="CHECKPOINT", help="the teacher's weights: a file, URL or hf-hub:NAME")

    group = parser.add_argument_group("augmentation", "DIGITS takes smoothing, mixup and cutmix of these")
    add = group.add_argument
    add("--smoothing", type=_below_one, default=0.1, help="label smoothing")
    add("--mixup", type=_not_negative, default=0.8, help="alpha, 0 is off (DIGITS: 0)")
    add("--cutmix", type=_not_negative, default=1.0, help="alpha, 0 is off (DIGITS: 0)")
    add("--cutmix-minmax", type=_probability, nargs=2, help="smallest and largest box, instead of alpha")
    add("--mixup-prob", type=_probability, default=1.0)
    add("--mixup-switch-prob", type=_probability, default=0.5)
    add("--mixup-mode", choices=("batch", "pair", "elem"), default="batch")
    add("--repeated-aug", action=argparse.BooleanOptionalAction, default=None,
        help="each image three times per epoch, for a third of the images (default, as published: with several "
        "processes)")  # fmt: skip
    add("--ThreeAugment", action="store_true", help="grey, solarize or blur, as in DeiT III, in place of --aa")
    add("--src", action="store_true", help="simple random crop, as in DeiT III")
    add("--color-jitter", type=_not_negative, default=0.3)
    add("--aa", default="rand-m9-mstd0.5-inc1", help="AutoAugment policy of timm, or none")
    add("--train-interpolation", choices=("random", "bilinear", "bicubic"), default="bicubic")
    add("--reprob", type=_probability, default=0.25, help="probability of random erasing")
    add("--remode", choices=("const", "rand", "pixel"), default="pixel")
    add("--recount", type=positive_int, default=1)
    add("--eval-crop-ratio", type=_positive, default=0.875)

    group = parser.add_argument_group("run")
    add = group.add_argument
    add(
        "--output_dir", "--output-dir", default="", help="for config.yaml, log.txt, checkpoint.pth, best_checkpoint.pth"
    )
    add("--resume", default="", help="a checkpoint, or 'auto': the last one of --output_dir if there is one")
    add("--checkpoint-steps", type=positive_int, metavar="N", help="also save after every N updates (default: epochs)")
    add("--save-every-minutes", type=_positive, metavar="MINUTES", help="also save in mid-epoch, this often")
    add("--eval", action="store_true", help="evaluate the --resume checkpoint, no training")
    add("--use-ema", action="store_true", help="of --resume with --eval, or of --finetune, take the averaged weights")
    add("--dist-eval", action="store_true", help="share the held-out images among the processes; the result is exact")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one, else cpu)")
    add("--seed", type=_count, default=0)
    add("--tensorboard", action="store_true", help="write events for TensorBoard to OUTPUT_DIR/tensorboard")
    add("--log-wandb", action="store_true", help="report to Weights & Biases, if it is installed")
    add("--log-mlflow", action="store_true", help="report to MLflow, if it is installed")
    add("--project", default="vision-mamba", help="name of the project there (default: vision-mamba)")

    group = parser.add_argument_group("speed and precision")
    add = group.add_argument
    add("--amp-dtype", choices=("bfloat16", "float16", "none"), help="of mixed precision (default: none)")
    switch(add, "--if_amp", "--no_amp", "the published --amp-dtype float16", default=None)
    add("--compile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile (default backend: inductor)")
    add("--grad-checkpointing", action="store_true", help="recompute activations in the backward pass, to save memory")
    switch(add, "--if_continue_inf", "--no_continue_inf",
           "skip updates whose loss is not finite instead of ending with status 3")  # fmt: skip
    switch(add, "--if_nan2num", "--no_nan2num", "count what is not finite in losses and gradients as 0")
    add("--world_size", "--world-size", type=positive_int, help="number of processes (default: as torchrun started)")
    add("--dist_url", "--dist-url", default="env://", help="where processes meet (default: env://, as torchrun says)")

    for flag in REFUSED:
        parser.add_argument(flag, action=_Refused, nargs="*", dest=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of the command line `argv` (default: the process's own), as plain types. Raises ConfigError."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    config = _parse(parser, argv).config
    if config:
        from_file = read_config(Path(config), parser)
        try:
            _parse(parser, from_file)
        except ConfigError as error:
            raise ConfigError(f"--config {config}: {error}") from error
        argv = [*from_file, *argv]
    parser.set_defaults(**data_set_defaults(_parse(parser, argv).data_set))
    args = _parse(parser, argv)

    args.model_kwargs = dict(args.model_kwargs)
    size = [args.input_size] if isinstance(args.input_size, int) else list(args.input_size)
    if len(size) > 2:
        raise ConfigError(f"--input-size {' '.join(map(str, size))}: give one number, or height and width")
    args.input_size = (size[0], size[-1])
    if args.repeated_aug is None:
        args.repeated_aug = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not args.eval
    if args.amp_dtype is None:
        args.amp_dtype = "float16" if args.if_amp else "none"
    elif args.if_amp is not None and args.if_amp != (args.amp_dtype != "none"):
        raise ConfigError(f"--amp-dtype {args.amp_dtype} contradicts {'--if_amp' if args.if_amp else '--no_amp'}")
    args.if_amp = args.amp_dtype != "none"
    _check_model(args)
    _check_combinations(args)
    args.device = _device(args.device)
    return args


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise ConfigError(f"unrecognized arguments: {' '.join(unknown)}{did_you_mean(unknown[0], flags)}")
    return args


def _check_model(args: argparse.Namespace) -> None:
    for flag, name in (("--model", args.model), ("--teacher-model", args.teacher_model)):
        if not timm.is_model(name):
            raise ConfigError(f"{flag} {name} is not known{did_you_mean(name, timm.list_models())}")
    if args.opt not in list_optimizers():
        raise ConfigError(f"--opt {args.opt} is not known{did_you_mean(args.opt, list_optimizers())}")
    if "img_size" in args.model_kwargs:
        raise ConfigError("--model-kwargs img_size=… would not match the images: use --input-size")
    if is_vision_mamba(args.model):
        args.discretization_method = args.discretization_method or "zoh"
        return
    if args.discretization_method:
        raise ConfigError(f"--discretization-method is for Vision Mamba; {args.model} has no state space")
    for name in ("if_random_cls_token_position", "if_random_token_rank"):
        if getattr(args, name):
            raise ConfigError(f"--{name} is for Vision Mamba; {args.model} does not know it")


def _check_combinations(args: argparse.Namespace) -> None:
    mixes = args.mixup or args.cutmix or args.cutmix_minmax
    rules = [
        (args.batch_size % 2 and mixes and not args.eval,
         f"--batch-size {args.batch_size}: mixup and cutmix need an even one"),
        (args.bce_loss and args.smoothing,
         f"--bce-loss has targets of 0 and 1, not smoothed by {args.smoothing:g}: add --smoothing 0"),
        (args.cutmix_minmax and args.cutmix_minmax[0] > args.cutmix_minmax[1],
         "--cutmix-minmax: the smallest box comes first"),
        (args.opt_betas and len(args.opt_betas) < 2, "--opt-betas takes two numbers, for some optimizers three"),
        (args.lr_noise and (len(args.lr_noise) > 2 or args.lr_noise != sorted(args.lr_noise)),
         "--lr-noise takes one or two rising fractions: where noise begins, and where it ends"),
        (args.distillation_type != "none" and not args.teacher_path,
         f"--distillation-type {args.distillation_type} needs --teacher-path, the teacher's weights"),
        (args.start_epoch and args.resume,
         "--start_epoch cannot be set together with --resume: the checkpoint knows its epoch"),
        (args.resume == "auto" and not args.output_dir,
         "--resume auto needs --output_dir, where it looks for checkpoint.pth"),
        (args.eval and not args.resume, "--eval needs --resume, the checkpoint to evaluate"),
        (args.eval and args.finetune, "--eval evaluates --resume; --finetune is for training"),
        (args.use_ema and not (args.eval or args.finetune), "--use-ema needs --eval or --finetune"),
        (args.tensorboard and not args.output_dir, "--tensorboard needs --output_dir, where it writes"),
        ((args.checkpoint_steps or args.save_every_minutes) and not args.output_dir,
         "--checkpoint-steps and --save-every-minutes need --output_dir, where they write"),
    ]  # fmt: skip
    for broken, message in rules:
        if broken:
            raise ConfigError(message)


def read_config(path: Path, parser: argparse.ArgumentParser) -> list[str]:
    """The command line that says what the YAML file says: one key per flag, dashes or underscores. null is unset.

    Raises ConfigError if it cannot be read, or has a key that is no flag.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"--config {path} is not a list of `flag: value` lines")
    actions: dict[str, list[argparse.Action]] = {}
    for action in parser._actions:
        actions.setdefault(action.dest, []).append(action)
    known = sorted(set(actions) - {"help", "config", argparse.SUPPRESS})
    argv: list[str] = []
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if name == _MADE_BY:
            continue
        for flag in REFUSED:
            if name == flag.lstrip("-").replace("-", "_"):
                raise ConfigError(f"--config {path}: {key} is refused: {REFUSED[flag]}")
        if name not in known:
            raise ConfigError(f"--config {path}: {key} is not a flag{did_you_mean(name, known)}")
        if value is not None:
            argv += _as_flag(actions[name], value, f"--config {path}: {key}")
    return argv


def _as_flag(actions: Sequence[argparse.Action], value: Any, where: str) -> list[str]:
    """`value` of the flags `actions`, which share a name, as it is written on the command line."""
    flag = actions[0].option_strings[0]
    if all(action.nargs == 0 for action in actions):
        if not isinstance(value, bool):
            raise ConfigError(f"{where} must be true or false; it is {value!r}")
        if isinstance(actions[0], argparse.BooleanOptionalAction):
            return [flag if value else actions[0].option_strings[-1]]
        return [action.option_strings[0] for action in actions if action.const is value]
    if isinstance(value, bool):
        raise ConfigError(f"{where} must not be {str(value).lower()}: quote it if it is a word")
    if isinstance(value, Mapping):
        return [flag, *(f"{name}={item}" for name, item in value.items())]
    if isinstance(value, list):
        if actions[0].nargs is None:
            raise ConfigError(f"{where} must be one value; it is the list {value!r}")
        return [flag, *map(str, value)]
    return [f"{flag}={value}"]


def save_config(path: Path, args: argparse.Namespace, argv: Sequence[str] | None) -> None:
    """Write `args` as a file for --config, with the command, git revision and versions. Raises CheckpointError."""
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(args).items()}
    del settings["config"]
    made_by = {
        "command": shlex.join(sys.orig_argv),
        "arguments": shlex.join(sys.argv[1:] if argv is None else argv),
        **environment(),
    }
    text = yaml.safe_dump({_MADE_BY: made_by, **settings}, sort_keys=False, allow_unicode=True, width=120)
    atomic_write(path, lambda file: file.write(text.encode()))


def is_vision_mamba(name: str) -> bool:
    """Whether the model that timm knows by `name` is a Vision Mamba."""
    return timm.is_model(name) and timm.model_entrypoint(name).__module__ == vim.models_mamba.__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The known names closest to `name`, or to which it could be the beginning."""
    known = list(known)
    close = difflib.get_close_matches(name, {full[: len(name) + 1]: full for full in known}, n=3, cutoff=0.75)
    names = [full for full in known if full[: len(name) + 1] in close]
    return f"; close to it: {', '.join(names[:5])}" if names else ""


def _device(name: str | None) -> str:
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
    return str(device)
