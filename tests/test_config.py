"""The trainer's settings: every flag, YAML files, what is saved of them, and what is said of wrong ones."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from timm.data import create_transform
from trainer_runs import DIGITS, FOLDER_TOY, TOY, VIM, assert_same_run, digit_folder, toy, toy_flags

import vim.data
import vim.main
from mamba_ssm.ops.discretization_ref import METHODS
from vim.config import REFUSED, ConfigError, build_parser, parse_args
from vim.distributed import World
from vim.main import main

# Each flag, an example on the command line, and what it must become.
EVERY_FLAG = {
    "--config": ("a.yaml", "a.yaml"),
    "--model": ("vim_small", "vim_small"),
    "--model-kwargs": ("depth=3 if_rope=True", [("depth", 3), ("if_rope", True)]),
    "--discretization-method": ("rk4", "rk4"),
    "--input-size": ("96 128", [96, 128]),
    "--drop": ("0.1", 0.1),
    "--drop-path": ("0.2", 0.2),
    "--if_random_cls_token_position": ("", True),
    "--no_random_cls_token_position": ("", False),
    "--if_random_token_rank": ("", True),
    "--no_random_token_rank": ("", False),
    "--model-ema": ("", True),
    "--no-model-ema": ("", False),
    "--model-ema-decay": ("0.99", 0.99),
    "--model-ema-force-cpu": ("", True),
    "--data-set": ("CIFAR10", "CIFAR10"),
    "--data-path": ("/data", "/data"),
    "--inat-category": ("genus", "genus"),
    "--num-classes": ("12", 12),
    "--train-split": ("train-{00..07}.tar", "train-{00..07}.tar"),
    "--val-split": ("test", "test"),
    "--num_workers": ("99", 99),
    "--num-workers": ("99", 99),
    "--pin-mem": ("", True),
    "--no-pin-mem": ("", False),
    "--batch-size": ("32", 32),
    "--grad-accum-steps": ("4", 4),
    "--epochs": ("7", 7),
    "--start_epoch": ("2", 2),
    "--start-epoch": ("2", 2),
    "--train-mode": ("", True),
    "--no-train-mode": ("", False),
    "--opt": ("lamb", "lamb"),
    "--opt-eps": ("1e-6", 1e-6),
    "--opt-betas": ("0.8 0.9", [0.8, 0.9]),
    "--momentum": ("0.8", 0.8),
    "--weight-decay": ("0.1", 0.1),
    "--layer-decay": ("0.7", 0.7),
    "--clip-grad": ("2", 2.0),
    "--sched": ("poly", "poly"),
    "--lr": ("1e-2", 1e-2),
    "--unscale-lr": ("", True),
    "--lr-noise": ("0.4 0.9", [0.4, 0.9]),
    "--lr-noise-pct": ("0.5", 0.5),
    "--lr-noise-std": ("0.1", 0.1),
    "--warmup-lr": ("1e-7", 1e-7),
    "--min-lr": ("0", 0.0),
    "--warmup-epochs": ("1", 1),
    "--cooldown-epochs": ("3", 3),
    "--decay-epochs": ("5", 5.0),
    "--decay-rate": ("0.5", 0.5),
    "--dr": ("0.5", 0.5),
    "--bce-loss": ("", True),
    "--finetune": ("some.pth", "some.pth"),
    "--attn-only": ("", True),
    "--distillation-type": ("hard", "hard"),
    "--distillation-alpha": ("0.3", 0.3),
    "--distillation-tau": ("3", 3.0),
    "--teacher-model": ("resnet18", "resnet18"),
    "--teacher-path": ("teacher.pth", "teacher.pth"),
    "--smoothing": ("0.2", 0.2),
    "--mixup": ("0", 0.0),
    "--cutmix": ("0.4", 0.4),
    "--cutmix-minmax": ("0.2 0.4", [0.2, 0.4]),
    "--mixup-prob": ("0.5", 0.5),
    "--mixup-switch-prob": ("0.6", 0.6),
    "--mixup-mode": ("elem", "elem"),
    "--repeated-aug": ("", True),
    "--no-repeated-aug": ("", False),
    "--ThreeAugment": ("", True),
    "--src": ("", True),
    "--color-jitter": ("0.2", 0.2),
    "--aa": ("v0", "v0"),
    "--train-interpolation": ("random", "random"),
    "--reprob": ("0.1", 0.1),
    "--remode": ("const", "const"),
    "--recount": ("2", 2),
    "--eval-crop-ratio": ("0.9", 0.9),
    "--output_dir": ("out", "out"),
    "--output-dir": ("out", "out"),
    "--resume": ("some.pth", "some.pth"),
    "--checkpoint-steps": ("100", 100),
    "--save-every-minutes": ("0.5", 0.5),
    "--eval": ("", True),
    "--use-ema": ("", True),
    "--dist-eval": ("", True),
    "--device": ("cuda:3", "cuda:3"),
    "--seed": ("4", 4),
    "--tensorboard": ("", True),
    "--log-wandb": ("", True),
    "--log-mlflow": ("", True),
    "--project": ("mine", "mine"),
    "--amp-dtype": ("bfloat16", "bfloat16"),
    "--if_amp": ("", True),
    "--no_amp": ("", False),
    "--compile": ("eager", "eager"),
    "--grad-checkpointing": ("", True),
    "--if_continue_inf": ("", True),
    "--no_continue_inf": ("", False),
    "--if_nan2num": ("", True),
    "--no_nan2num": ("", False),
    "--world_size": ("2", 2),
    "--world-size": ("2", 2),
    "--dist_url": ("tcp://localhost:1", "tcp://localhost:1"),
    "--dist-url": ("tcp://localhost:1", "tcp://localhost:1"),
}


def all_flags() -> dict[str, argparse.Action]:
    return {flag: action for action in build_parser()._actions for flag in action.option_strings}


def test_every_flag_is_listed_here_or_refused():
    assert set(all_flags()) - {"-h", "--help"} - set(REFUSED) == set(EVERY_FLAG)


@pytest.mark.parametrize("flag", EVERY_FLAG)
def test_every_flag_is_parsed(flag):
    text, expected = EVERY_FLAG[flag]
    assert getattr(build_parser().parse_args([flag, *text.split()]), all_flags()[flag].dest) == expected


def test_every_flag_is_used_by_a_test():
    """Beyond the table above: by a run, by a test of the data, or by a complaint. Other spellings count as one."""
    own = Path(__file__)
    sources = [path.read_text() for path in own.parent.glob("test_*.py") if path != own]
    text = own.read_text()
    sources.append(text[text.index("def test_every_flag_is_used_by_a_test") :])
    words = set(re.findall(r"--[\w-]+", " ".join(sources)))
    unused = [
        action.option_strings
        for action in build_parser()._actions
        if not words & set(action.option_strings) and action.option_strings[0] not in REFUSED
    ]
    assert unused == []


@pytest.mark.parametrize("flag", REFUSED)
def test_refused_flags_say_why(flag):
    with pytest.raises(ConfigError, match=re.escape(f"{flag} is refused: {REFUSED[flag]}")):
        parse_args([flag, "1"])


def test_model_kwargs_are_python_values():
    kwargs = ["depth=3", "if_rope=True", "final_pool_type=mean", "ssm_cfg={'d_state': 8}", "name=a=b", "none=None"]
    args = parse_args(["--model-kwargs", *kwargs])
    assert args.model_kwargs == {
        "depth": 3, "if_rope": True, "final_pool_type": "mean", "ssm_cfg": {"d_state": 8}, "name": "a=b", "none": None,
    }  # fmt: skip


def test_the_data_set_decides_defaults_and_the_command_line_wins():
    args = parse_args(["--data-set", "DIGITS", "--cutmix", "0.5"])
    assert (args.input_size, args.mixup, args.cutmix, args.model_ema) == ((8, 8), 0.0, 0.5, False)
    args = parse_args(["--data-set", "CIFAR"])
    assert (args.data_set, args.input_size, args.mixup, args.model_ema) == ("CIFAR100", (224, 224), 0.8, True)
    assert parse_args(["--input-size", "384", "256"]).input_size == (384, 256)


def test_repeated_augmentation_is_for_several_processes(monkeypatch):
    assert parse_args([]).repeated_aug is False
    assert parse_args(["--repeated-aug"]).repeated_aug is True
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert parse_args([]).repeated_aug is True
    assert parse_args(["--no-repeated-aug"]).repeated_aug is False
    assert parse_args(["--data-set", "DIGITS"]).repeated_aug is False


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ([], "none"),
        (["--if_amp"], "float16"),
        (["--no_amp"], "none"),
        (["--if_amp", "--amp-dtype", "bfloat16"], "bfloat16"),
        (["--amp-dtype", "bfloat16"], "bfloat16"),
    ],
)
def test_precision(flags, dtype):
    args = parse_args(flags)
    assert (args.amp_dtype, args.if_amp) == (dtype, dtype != "none")


@pytest.mark.parametrize(
    ("on", "off", "dest"),
    [
        ("--if_random_cls_token_position", "--no_random_cls_token_position", "if_random_cls_token_position"),
        ("--if_random_token_rank", "--no_random_token_rank", "if_random_token_rank"),
        ("--if_continue_inf", "--no_continue_inf", "if_continue_inf"),
        ("--if_nan2num", "--no_nan2num", "if_nan2num"),
    ],
)
def test_published_pairs_of_flags(on, off, dest):
    assert getattr(parse_args([]), dest) is False
    assert getattr(parse_args([off, on]), dest) is True
    assert getattr(parse_args([on, off]), dest) is False


def test_options_of_the_augmentation_reach_timm(tmp_path, monkeypatch):
    """What tests/test_data.py leaves to timm: how images are resized, and what is erased from them."""
    seen = {}

    def noted(size, **options):
        seen.update(options)
        return create_transform(size, **options)

    monkeypatch.setattr(vim.data, "create_transform", noted)
    flags = ["--train-interpolation", "bilinear", "--remode", "const", "--recount", "3", "--reprob", "0.5"]
    data = digit_folder(tmp_path)
    args = parse_args([*FOLDER_TOY, "--input-size", "40", "--data-path", str(data), "--num_workers", "0", *flags])
    vim.data.build_loader(args, train=True, channels=3)
    assert (seen["interpolation"], seen["re_mode"], seen["re_count"], seen["re_prob"]) == ("bilinear", "const", 3, 0.5)


def test_pinned_memory_is_for_gpus(monkeypatch):
    seen, build = [], vim.main.build_loader

    def noted(args, **options):
        seen.append(options["pin_memory"])
        return build(args, **options)

    monkeypatch.setattr(vim.main, "build_loader", noted)
    args = parse_args([*TOY, *DIGITS, "--pin-mem"])
    for device, pinned in (("cpu", False), ("cuda", True)):
        vim.main._build_loader(args, World(torch.device(device)), train=False)
        assert seen.pop() is pinned
    args = parse_args([*TOY, *DIGITS, "--no-pin-mem"])
    vim.main._build_loader(args, World(torch.device("cuda")), train=False)
    assert seen == [False]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--warmup-epoch", "3"], "unrecognized arguments: --warmup-epoch 3; close to it: --warmup-epochs"),
        (["--batch", "3"], "unrecognized arguments: --batch 3"),
        (["--model", "vim_tyny"], r"--model vim_tyny is not known; close to it: .*vim_tiny"),
        (["--teacher-model", "resnet19"], r"--teacher-model resnet19 is not known; close to it: .*resnet18"),
        (["--discretization-method", "euler"], "invalid choice: 'euler'.*zoh.*highorder.*zoh_exact"),
        (["--discretization-method", "rk4", "--model", "resnet18"], "for Vision Mamba; resnet18 has no state space"),
        (["--if_random_token_rank", "--model", "resnet18"], "--if_random_token_rank is for Vision Mamba"),
        (["--data-set", "MNIST"], "MNIST is not known; choose IMNET.*DIGITS"),
        (["--opt", "adamv"], "--opt adamv is not known; close to it: .*adam"),
        (["--sched", "triangle"], "--sched: triangle is not known; choose cosine, "),
        (["--sched", "plateau"], "--sched: plateau is refused: timm is about to drop"),
        (["--batch-size", "0"], "--batch-size: 0 is not above 0"),
        (["--batch-size", "many"], "--batch-size: invalid int value: 'many'"),
        (["--input-size", "8", "8", "8"], "--input-size 8 8 8: give one number, or height and width"),
        (["--lr", "nan"], "--lr: nan is not above 0"),
        (["--smoothing", "1"], "--smoothing: 1 is not below 1"),
        (["--drop-path", "1"], "--drop-path: 1 is not below 1"),
        (["--reprob", "2"], "--reprob: 2 is not a probability"),
        (["--mixup-prob", "-1"], "--mixup-prob: -1 is not at least 0"),
        (["--model-kwargs", "img_size=64"], "use --input-size"),
        (["--epochs", "-1"], "--epochs"),
        (["--model-kwargs", "depth"], "'depth' is not KEY=VALUE"),
        (["--batch-size", "3"], "mixup and cutmix need an even one"),
        (["--bce-loss"], "--bce-loss has targets of 0 and 1, not smoothed by 0.1: add --smoothing 0"),
        (["--cutmix-minmax", "0.5", "0.1"], "--cutmix-minmax: the smallest box comes first"),
        (["--opt-betas", "0.9"], "--opt-betas takes two numbers"),
        (["--lr-noise", "0.9", "0.1"], "--lr-noise takes one or two rising fractions"),
        (["--distillation-type", "soft"], "--distillation-type soft needs --teacher-path"),
        (["--eval"], "--eval needs --resume"),
        (["--eval", "--resume", "x.pth", "--finetune", "x.pth"], "--eval evaluates --resume; --finetune is for"),
        (["--use-ema"], "--use-ema needs --eval or --finetune"),
        (["--resume", "auto"], "--resume auto needs --output_dir"),
        (["--tensorboard"], "--tensorboard needs --output_dir"),
        (["--checkpoint-steps", "5"], "--checkpoint-steps and --save-every-minutes need --output_dir"),
        (["--start_epoch", "1", "--resume", "x.pth"], "--start_epoch cannot be set together with --resume"),
        (["--amp-dtype", "bfloat16", "--no_amp"], "--amp-dtype bfloat16 contradicts --no_amp"),
        (["--amp-dtype", "none", "--if_amp"], "--amp-dtype none contradicts --if_amp"),
        (["--device", "gpu"], "--device gpu is not cpu, cuda or cuda:N"),
        (["--device", "mps"], "--device mps is not cpu, cuda or cuda:N"),
        (["--device", "cuda"], "--device cuda: 0 CUDA devices are usable here; try --device cpu"),
        (["--data-set", "DIGITS"], "--model vim_tiny cannot be built with these options: .*img_size"),
        ([*VIM, "no_such_option=1", *DIGITS], "--model vim_tiny cannot be built.*no_such_option"),
        ([*TOY, *DIGITS, "--epochs", "1", "--start_epoch", "1"], "--epochs 1: nothing to do from epoch 1 on"),
        ([*TOY, *DIGITS, "--output_dir", "/dev/null/x"], "--output_dir /dev/null/x cannot be made"),
        ([*TOY, *DIGITS, "--world_size", "2"], "--world_size 2, but 1 was started: torchrun --nproc_per_node 2"),
        ([*TOY, *DIGITS, "--log-wandb"], "--log-wandb needs a package that is not installed: pip install wandb"),
        ([*TOY, *DIGITS, "--log-mlflow"], "--log-mlflow needs a package that is not installed: pip install mlflow"),
        (["--model", "resnet18", *DIGITS, "--attn-only"], "--attn-only: resnet18 has no attention and no mixers"),
    ],
)
def test_errors_of_the_command_line(argv, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for package in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=said):
        main(argv)


# --- YAML files ---


def write(path: Path, text: str) -> list[str]:
    path.write_text(text)
    return ["--config", str(path)]


def test_yaml_is_under_the_command_line_and_over_the_data_set(tmp_path):
    argv = write(
        tmp_path / "a.yaml",
        "data-set: DIGITS\nmixup: 0.3\nlr: 5e-4\nopt_betas: [0.8, 0.95]\nmodel_kwargs: {depth: 3, if_rope: true}\n"
        "pin_mem: false\nThreeAugment: true\nif_amp: false\naa: none\nclip-grad: null\nsrc: false\n",
    )
    args = parse_args([*argv, "--lr", "1e-3"])
    assert (args.lr, args.mixup, args.cutmix, args.input_size) == (1e-3, 0.3, 0.0, (8, 8))
    assert args.opt_betas == [0.8, 0.95] and args.model_kwargs == {"depth": 3, "if_rope": True}
    assert (args.pin_mem, args.ThreeAugment, args.src, args.if_amp) == (False, True, False, False)
    assert (args.aa, args.clip_grad) == ("none", None)
    assert parse_args(argv).lr == 5e-4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("drop_paths: 0.1", r"a.yaml: drop_paths is not a flag; close to it: drop_path$"),
        ("config: b.yaml", "config is not a flag"),
        ("no_pin_mem: true", "no_pin_mem is not a flag"),
        ("resplit: true", "resplit is refused: has no effect"),
        ("lr: fast", r"--config .*a.yaml: argument --lr: could not convert|--config .*a.yaml: argument --lr: invalid"),
        ("lr: true", "lr must not be true"),
        ("lr: [1, 2]", "lr must be one value; it is the list"),
        ("eval: 1", "eval must be true or false; it is 1"),
        ("eval: true", "--eval needs --resume"),
        ("- lr", "is not a list of `flag: value` lines"),
        ("a: [", "cannot be read"),
    ],
)
def test_errors_of_yaml(tmp_path, text, said):
    with pytest.raises(ConfigError, match=said):
        parse_args(write(tmp_path / "a.yaml", text))


def test_missing_yaml_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"--config .*nowhere.yaml cannot be read"):
        parse_args(["--config", str(tmp_path / "nowhere.yaml")])


def test_the_saved_configuration_repeats_the_run(tmp_path):
    flags = ["--mixup", "0.2", "--lr-noise", "0.1", "0.9", "--lr-noise-pct", "0.5", "--lr-noise-std", "0.3"]
    toy(tmp_path / "first", *flags, epochs=2)
    saved = tmp_path / "first" / "config.yaml"
    made_by = yaml.safe_load(saved.read_text())["made_by"]
    assert made_by["packages"]["torch"]
    assert "--lr-noise 0.1 0.9" in made_by["arguments"] and made_by["command"] and made_by["python"]
    assert re.match(r"[0-9a-f]{40}|None", str(made_by["revision"]))
    main(["--config", str(saved), "--output_dir", str(tmp_path / "again")])
    assert_same_run(tmp_path / "again", tmp_path / "first")
    args, again = (
        vars(parse_args(argv)) for argv in (toy_flags(tmp_path / "first", *flags, epochs=2), ["--config", str(saved)])
    )
    assert {**again, "config": None} == args


# --- as a program ---


def test_script_gives_one_message_and_exit_code_2():
    result = subprocess.run([sys.executable, vim.main.__file__, "--epochs", "0"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.strip() == "vim/main.py: error: argument --epochs: 0 is not above 0"


def test_help_names_every_method_and_data_set(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said for name in (*METHODS, "IMNET", "CIFAR10", "DIGITS"))
