"""The trainer as it is used: train, evaluate, be killed, go on; and what it says when it cannot."""

import errno
import io
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from rich.console import Console
from trainer_runs import (
    BRIEF,
    DIGITS,
    FOLDER_TOY,
    STATEFUL,
    TOY,
    VIM,
    assert_same_run,
    command,
    dies_at,
    digit_folder,
    interrupt,
    read_log,
    toy,
    toy_flags,
)

import vim.checkpoint
import vim.engine
import vim.main
from mamba_ssm.ops.discretization_ref import METHODS
from vim.checkpoint import CheckpointError, load_checkpoint
from vim.data import DataError
from vim.engine import NonFiniteLossError, Track, Trainer
from vim.main import ConfigError, create_model, create_optimizer, create_scheduler, main, parse_args
from vim.run_state import Stopped

RECORD = {
    "epoch", "train_loss", "train_lr", "test_loss", "test_acc1", "test_acc5", "n_parameters", "epoch_time_s",
    "images_per_s", "peak_memory_mb", "discretization_method", "seed",
}  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """A toy run of three epochs that nothing disturbed."""
    output = tmp_path_factory.mktemp("unbroken")
    toy(output)
    return output


# --- training and evaluation ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("trained")
    flags = ["--epochs", "4", "--lr", "8e-3", "--unscale-lr", "--warmup-epochs", "1", "--output_dir", str(output)]
    return output, main([*VIM, *DIGITS, *flags, "--discretization-method", "bilinear"])


def test_vision_mamba_learns_the_digits(trained):
    output, record = trained
    log = read_log(output)
    assert [entry["epoch"] for entry in log] == list(range(4)) and log[-1] == record
    assert set(record) == RECORD
    assert record["test_acc1"] > 70 and record["test_acc5"] > 90  # chance: 10 and 50
    assert log[-1]["train_loss"] < log[0]["train_loss"]
    assert record["discretization_method"] == "bilinear" and record["seed"] == 0
    assert record["images_per_s"] == pytest.approx(22 * 64 / record["epoch_time_s"])
    assert 50 < record["peak_memory_mb"] < 50_000


def test_evaluation_reproduces_the_log(trained):
    output, record = trained
    flags = ["--discretization-method", "bilinear", "--eval", "--resume"]
    scores = main([*VIM, *DIGITS, *flags, str(output / "checkpoint.pth"), "--batch-size", "50"])
    for name in ("test_acc1", "test_acc5", "n_parameters", "discretization_method"):
        assert scores[name] == pytest.approx(record[name])
    assert scores["test_loss"] == pytest.approx(record["test_loss"], rel=1e-5)
    scores = main([*VIM, *DIGITS, *flags, str(output / "best_checkpoint.pth")])
    assert scores["test_acc1"] == pytest.approx(max(entry["test_acc1"] for entry in read_log(output)))


def test_evaluation_with_another_method_is_refused(trained):
    with pytest.raises(CheckpointError, match="discretization_method: 'bilinear' in the checkpoint, 'zoh' now"):
        main([*VIM, *DIGITS, "--eval", "--resume", str(trained[0] / "checkpoint.pth")])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_reaches_the_model(method):
    args = parse_args([*VIM, *DIGITS, "--discretization-method", method])
    torch.manual_seed(0)
    model = create_model(args, 10).eval()
    torch.manual_seed(0)
    options = {"patch_size": 4, "stride": 4, "depth": 2, "embed_dim": 32, "channels": 1, "img_size": 8}
    same = timm.create_model("vim_tiny", num_classes=10, discretization_method=method, **options).eval()
    image = torch.rand(1, 1, 8, 8)
    assert torch.equal(model(image), same(image))


def test_same_seed_same_numbers(unbroken, tmp_path):
    toy(tmp_path / "again")
    assert_same_run(tmp_path / "again", unbroken)
    toy(tmp_path / "other", "--seed", "1")
    assert read_log(tmp_path / "other")[0]["train_loss"] != read_log(unbroken)[0]["train_loss"]


def test_learning_rate_follows_warm_up_and_cosine(unbroken):
    rates = [record["train_lr"] for record in read_log(unbroken)]
    assert rates[0] == pytest.approx(1e-6 + 10 / 11 * (2e-3 - 1e-6))
    cosine = [1e-5 + 0.5 * (2e-3 - 1e-5) * (1 + math.cos(math.pi * step / 33)) for step in (21, 32)]
    assert rates[1:] == pytest.approx(cosine)


def test_learning_rate_is_scaled_with_the_batch():
    for flags, expected in (([], 5e-4 * 64 / 512), (["--unscale-lr"], 5e-4)):
        args = parse_args([*TOY, *DIGITS, *flags])
        assert create_optimizer(args, create_model(args, 10)).param_groups[0]["lr"] == pytest.approx(expected)


@pytest.mark.parametrize("sched", ["cosine", "tanh", "poly", "step"])
def test_schedules_are_functions_of_the_update(sched):
    args = parse_args([*TOY, *DIGITS, "--sched", sched, "--epochs", "10", "--decay-epochs", "3"])

    def rates(updates):
        optimizer = create_optimizer(args, create_model(args, 10))
        scheduler = create_scheduler(args, optimizer, updates_per_epoch=5)
        for update in updates:
            scheduler.step_update(update)
            yield optimizer.param_groups[0]["lr"]

    through = list(rates(range(50)))
    assert list(rates(range(30, 50))) == through[30:]  # what a resumed run sees
    assert through[49] < max(through) and through[0] < through[10]


def test_what_the_model_says_is_not_decayed():
    args = parse_args([*VIM, *DIGITS, "--weight-decay", "0.3"])
    model = create_model(args, 10)
    decayed = {
        id(parameter)
        for group in create_optimizer(args, model).param_groups
        if group["weight_decay"] > 0
        for parameter in group["params"]
    }
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert {"layers.0.mixer.in_proj.weight", "layers.1.mixer.x_proj_b.weight", "head.weight"} <= names
    spared = {name for name, parameter in model.named_parameters() if id(parameter) not in decayed}
    for name in ("A_log", "A_b_log", "D", "D_b", "dt_proj.bias"):
        assert {f"layers.0.mixer.{name}", f"layers.1.mixer.{name}"} <= spared
    assert {"pos_embed", "cls_token", "norm_f.weight", "head.bias"} <= spared


def test_any_timm_model_trains_by_name():
    record = main(["--model", "test_efficientnet_ln", *DIGITS, "--epochs", "1", "--input-size", "16"])
    assert record["test_acc5"] > 40 and record["discretization_method"] is None


def test_clip_grad_and_mixup_are_used(unbroken, tmp_path):
    first = read_log(unbroken)[0]
    toy(tmp_path / "clip", "--clip-grad", "1e-3", epochs=1)
    toy(tmp_path / "mixup", "--mixup", "0.8", "--cutmix", "1", epochs=1)
    toy(tmp_path / "hard", "--smoothing", "0", epochs=1)
    losses = {read_log(tmp_path / name)[0]["train_loss"] for name in ("clip", "mixup", "hard")}
    assert len(losses | {first["train_loss"]}) == 4


def progress(terminal: bool) -> str:
    said = io.StringIO()
    track = Track(list("abc"), "epoch 7", Console(file=said, force_terminal=terminal, width=100))
    steps = []
    for step, batch in track:
        steps.append((step, batch))
        track.note = f"loss {step}.5"
    assert steps == [(0, "a"), (1, "b"), (2, "c")]
    return said.getvalue()


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch):
    assert progress(terminal=False) == ""  # too quick to say anything
    monkeypatch.setattr(vim.engine, "_SECONDS_BETWEEN_LINES", 0.0)
    lines = [line.rstrip() for line in progress(terminal=False).splitlines()]
    assert lines == ["epoch 7  1/3  loss 0.5", "epoch 7  2/3  loss 1.5", "epoch 7  3/3  loss 2.5"]
    bar = progress(terminal=True)
    assert "epoch 7" in bar and "3/3" in bar and "loss 2.5" in bar and "\x1b[" in bar


# --- going on after an end, an accident, or a kill ---


def test_resumed_run_equals_the_unbroken_one(unbroken, tmp_path, monkeypatch):
    dies_at(monkeypatch, 23, interrupt)  # the first of epoch 2
    with pytest.raises(KeyboardInterrupt):
        toy(tmp_path)
    monkeypatch.undo()
    torch.rand(7)  # the generators' state must come from the checkpoint
    toy(tmp_path, "--resume", "auto")
    assert_same_run(tmp_path, unbroken)


@pytest.fixture(scope="module")
def stateful(tmp_path_factory) -> Path:
    """Two epochs of 11 updates with all that keeps a state, that nothing disturbed."""
    output = tmp_path_factory.mktemp("stateful")
    toy(output, *STATEFUL, epochs=2)
    return output


@pytest.mark.parametrize("death", [3, 8, 12, 18, 22])
def test_resumed_from_mid_epoch_equals_the_unbroken_run(stateful, tmp_path, monkeypatch, death, capsys):
    flags = [*STATEFUL, "--checkpoint-steps", "4"]
    dies_at(monkeypatch, death, interrupt)
    with pytest.raises(KeyboardInterrupt):
        toy(tmp_path, *flags, epochs=2)
    monkeypatch.undo()
    saved = {3: None, 8: (0, 4), 12: (1, 0), 18: (1, 4), 22: (1, 8)}[death]
    if saved is None:
        assert not (tmp_path / "checkpoint.pth").exists()
    else:
        position = load_checkpoint(tmp_path / "checkpoint.pth")["position"]
        assert (position["epoch"], position["step"]) == saved
    torch.rand(7)
    np.random.rand(7)
    toy(tmp_path, *flags, "--resume", "auto", epochs=2)
    if saved and saved[1]:
        assert f"resumed from {tmp_path / 'checkpoint.pth'}, epoch {saved[0]}, step {saved[1]} of 11" in (
            capsys.readouterr().out
        )
    assert_same_run(tmp_path, stateful)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_the_run_goes_on_later(stateful, tmp_path, monkeypatch, number):
    before = signal.getsignal(number)
    dies_at(monkeypatch, 5, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Stopped, match="epoch 0, step 6 of 11"):
        toy(tmp_path, *STATEFUL, epochs=2)
    assert signal.getsignal(number) == before
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pth", "config.yaml", ".lock"}
    toy(tmp_path, *STATEFUL, "--resume", "auto", epochs=2)
    assert_same_run(tmp_path, stateful)


def test_saving_by_the_clock(stateful, tmp_path, monkeypatch):
    dies_at(monkeypatch, 3, interrupt)
    with pytest.raises(KeyboardInterrupt):
        toy(tmp_path, *STATEFUL, "--save-every-minutes", "1e-9", epochs=2)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "checkpoint.pth")["position"]["step"] == 2
    toy(tmp_path, *STATEFUL, "--resume", "auto", epochs=2)
    assert_same_run(tmp_path, stateful)


def test_resume_with_the_same_update_split_otherwise(unbroken, tmp_path):
    """Half the batch and twice as many per update make the same updates, but for dropped paths; others are refused."""
    output = shutil.copytree(unbroken, tmp_path / "copy")
    toy(output, "--resume", "auto", "--batch-size", "64", "--grad-accum-steps", "2", epochs=4)
    assert [record["epoch"] for record in read_log(output)] == [0, 1, 2, 3]
    with pytest.raises(CheckpointError, match="images per update: 128 in the checkpoint, 64 now"):
        toy(output, "--resume", "auto", "--batch-size", "64", epochs=5)


def test_another_number_of_updates_per_epoch_is_refused(tmp_path):
    """As many images per update, but what is left of an epoch counts as an update or not."""
    toy(tmp_path, "--batch-size", "64", "--grad-accum-steps", "3", epochs=1)
    with pytest.raises(CheckpointError, match="has 8 updates per epoch, this run would have 7"):
        toy(tmp_path, "--resume", "auto", "--batch-size", "192", epochs=2)


@pytest.mark.parametrize("writes", range(1, 8))
def test_death_between_any_two_writes_costs_nothing(unbroken, tmp_path, monkeypatch, writes):
    """First the configuration; an epoch writes log, best checkpoint (if it is), checkpoint. Any may be the last."""
    replace, done = os.replace, 0

    def replace_until_death(source, target):
        nonlocal done
        done += 1
        if done == writes:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(vim.checkpoint.os, "replace", replace_until_death)
    with pytest.raises(KeyboardInterrupt):
        toy(tmp_path)
    monkeypatch.undo()
    toy(tmp_path, "--resume", "auto")
    assert_same_run(tmp_path, unbroken)


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_from_pretraining_to_evaluation(tmp_path, method, capsys):
    """Pretrain, be killed in mid-epoch, go on, fine-tune at twice the resolution and half the stride, evaluate."""
    broken, whole, tuned = tmp_path / "broken", tmp_path / "whole", tmp_path / "tuned"
    common = [*DIGITS, "--discretization-method", method, "--batch-size", "64", "--drop-path", "0.1", "--unscale-lr"]
    pretrain = [*VIM, *common, "--lr", "8e-3", "--warmup-epochs", "1", "--epochs", "4", "--checkpoint-steps", "3"]
    resume = [*pretrain, "--resume", "auto", "--output_dir"]
    victim = subprocess.Popen(command(*resume, str(broken)), stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (broken / "log.txt").exists() and victim.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.1)
    finally:
        victim.kill()
    assert victim.wait() == -signal.SIGKILL
    assert 1 <= len(read_log(broken)) < 4
    main([*resume, str(broken)])
    pretrained = main([*resume, str(whole)])
    assert_same_run(broken, whole)

    finetune = [*VIM[:2], "--model-kwargs", "patch_size=4", "stride=2", "depth=2", "embed_dim=32", "channels=1"]
    finetune += [*common, "--input-size", "16", "--lr", "2e-3", "--warmup-epochs", "0", "--epochs", "1"]
    from_weights = [*finetune, "--finetune", str(broken / "checkpoint.pth"), "--output_dir", str(tuned)]
    record = main(from_weights)
    assert "position embedding resampled from 2×2 to 7×7 patches" in capsys.readouterr().out
    assert pretrained["test_acc1"] > 70 and record["test_acc1"] > 40  # chance is 10
    name = "layers.0.mixer.in_proj.weight"
    before, after = (load_checkpoint(folder / "checkpoint.pth")["model"][name].flatten() for folder in (broken, tuned))
    assert not torch.equal(before, after) and torch.cosine_similarity(before, after, dim=0) > 0.9
    scores = main([*finetune, "--eval", "--resume", str(tuned / "checkpoint.pth")])
    assert scores["test_acc1"] == pytest.approx(record["test_acc1"])
    # A fine-tuning run that died goes on from its own checkpoint, not from the weights it began with.
    assert main([*from_weights, "--resume", "auto"]) == record


def test_resume_auto_of_a_finished_run_changes_nothing(unbroken, tmp_path):
    output = shutil.copytree(unbroken, tmp_path / "copy")
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    assert toy(output, "--resume", "auto") == read_log(unbroken)[-1]
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before


def test_resume_for_more_epochs(unbroken, tmp_path):
    output = shutil.copytree(unbroken, tmp_path / "copy")
    toy(output, "--resume", "auto", epochs=4)
    assert [record["epoch"] for record in read_log(output)] == [0, 1, 2, 3]


def test_resume_from_elsewhere_starts_a_log_of_its_own(unbroken, tmp_path):
    toy(tmp_path, "--resume", str(unbroken / "checkpoint.pth"), epochs=4)
    assert [record["epoch"] for record in read_log(tmp_path)] == [3]


def test_an_earlier_run_is_not_overwritten(unbroken, tmp_path):
    output = shutil.copytree(unbroken, tmp_path / "copy")
    with pytest.raises(ConfigError, match=r"checkpoint.pth exists: go on with --resume auto, or choose another"):
        toy(output)
    assert_same_run(output, unbroken)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lr", "1"], "lr: 0.002 in the checkpoint, 1.0 now"),
        (["--seed", "5"], "seed: 0 in the checkpoint, 5 now"),
        (["--model", "vit_small_patch16_224"], "model: 'vit_tiny_patch16_224' in the checkpoint, 'vit_small"),
        (["--model-kwargs", "depth=1"], "model_kwargs: {'patch_size': 4,"),
        (["--input-size", "16"], "input_size: (8, 8) in the checkpoint, (16, 16) now"),
    ],
)
def test_resume_of_another_run_is_refused(unbroken, tmp_path, flags, said):
    output = shutil.copytree(unbroken, tmp_path / "copy")
    with pytest.raises(CheckpointError) as caught:
        toy(output, "--resume", "auto", *flags)
    assert said in str(caught.value)
    assert_same_run(output, unbroken)


def test_foreign_and_truncated_checkpoints_are_refused(unbroken, tmp_path):
    foreign = tmp_path / "foreign.pth"
    torch.save({"model": torch.nn.Linear(2, 2).state_dict()}, foreign)
    with pytest.raises(CheckpointError, match=r"(?s)missing: .*2 unexpected: weight, bias"):
        toy(tmp_path / "none", "--eval", "--resume", str(foreign))
    with pytest.raises(CheckpointError, match="has no optimizer"):
        toy(tmp_path / "none", "--resume", str(foreign))
    content = (unbroken / "checkpoint.pth").read_bytes()
    truncated = tmp_path / "run" / "checkpoint.pth"
    truncated.parent.mkdir()
    truncated.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"run/checkpoint.pth is truncated, corrupt or not a checkpoint"):
        toy(truncated.parent, "--resume", "auto")


def test_damaged_log_is_named(unbroken, tmp_path):
    output = shutil.copytree(unbroken, tmp_path / "copy")
    (output / "log.txt").write_text("no JSON\n")
    with pytest.raises(CheckpointError, match=r"log.txt is not a log of JSON lines"):
        toy(output, "--resume", "auto")


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    holder = "import fcntl, sys; f = open(sys.argv[1], 'wb'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    argv = [sys.executable, "-c", holder, tmp_path / ".lock"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ConfigError, match=r"--output_dir .* is in use by another run"):
            toy(tmp_path, epochs=1)
        other.kill()
    toy(tmp_path, epochs=1)  # though the file is still there


def test_an_output_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(ConfigError, match=r"--output_dir .* cannot be written: Is a directory"):
        toy(tmp_path, epochs=1)


def test_an_error_of_tensorboard_at_the_end_does_not_hide_what_ended_the_run(tmp_path, monkeypatch, capsys):
    from torch.utils.tensorboard import SummaryWriter

    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "close", full)
    with pytest.raises(NonFiniteLossError, match="in epoch 1, batch 1 of 11"):
        toy(tmp_path, *EXPLODES, "--tensorboard")
    assert "(--tensorboard): No space left on device" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"\(--tensorboard\): No space left on device"):
        toy(tmp_path / "ends well", "--tensorboard", epochs=1)


def test_disk_full_for_tensorboard(tmp_path):
    flags = toy_flags(tmp_path, "--tensorboard")
    program = (
        "import resource, sys, vim.main; resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10)); sys.exit(vim.main.cli())"
    )
    result = subprocess.run([sys.executable, "-c", program, *flags], capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    said = f"vim/main.py: error: cannot write {tmp_path / 'tensorboard'} (--tensorboard): File too large"
    assert said in result.stderr  # beside a traceback of TensorBoard's own thread


def test_disk_full_keeps_the_last_checkpoint(unbroken, tmp_path):
    """A limit on the file size stands in for the disk: the log still fits, the next checkpoint does not."""
    output = shutil.copytree(unbroken, tmp_path / "copy")
    flags = [*TOY, *DIGITS, *BRIEF, "--epochs", "4", "--output_dir", str(output), "--resume", "auto"]
    program = (
        "import resource, sys, vim.main; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
        "sys.exit(vim.main.cli())"
    )
    result = subprocess.run([sys.executable, "-c", program, *flags], capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert "cannot write" in result.stderr and "File too large" in result.stderr and "MiB free" in result.stderr
    assert "Traceback" not in result.stderr
    assert load_checkpoint(output / "checkpoint.pth")["epoch"] == 2
    toy(output, "--resume", "auto", epochs=4)
    assert [record["epoch"] for record in read_log(output)] == [0, 1, 2, 3]


# --- losses that are not finite ---


EXPLODES = ["--sched", "step", "--warmup-epochs", "0", "--decay-epochs", "1", "--decay-rate", "1e30"]


def test_nan_loss_stops_and_keeps_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    with pytest.raises(NonFiniteLossError, match=r"not saved after epoch 1, step 1: the first layer whose"):
        toy(tmp_path, *EXPLODES, "--checkpoint-steps", "1")
    position = load_checkpoint(tmp_path / "checkpoint.pth")["position"]
    assert (position["epoch"], position["step"]) == (1, 0)
    assert len(read_log(tmp_path)) == 1
    monkeypatch.setattr(sys, "argv", ["main.py", *toy_flags(tmp_path, *EXPLODES, "--resume", "auto")])
    assert vim.main.cli() == 3
    said = capsys.readouterr().err
    assert "error: the loss is" in said and said.count("\n  DIGITS, training image ") == 128


def test_weights_that_became_nan_in_the_last_step_are_not_saved(tmp_path, monkeypatch):
    def last_step_breaks_the_weights(self, position, wishes):
        yield from train(self, position, wishes)
        if position.epoch == 1:
            next(self.model.parameters()).data.fill_(math.nan)

    train = Trainer.train
    monkeypatch.setattr(Trainer, "train", last_step_breaks_the_weights)
    with pytest.raises(NonFiniteLossError, match=r"held-out images is nan after epoch 1; the epoch was not saved"):
        toy(tmp_path)
    assert load_checkpoint(tmp_path / "checkpoint.pth")["epoch"] == 0


# --- folders of images, from end to end ---


@pytest.fixture(scope="module")
def digit_files(tmp_path_factory) -> Path:
    return digit_folder(tmp_path_factory.mktemp("digits"))


def test_image_folder_run_resumes_with_workers(digit_files, tmp_path, monkeypatch):
    flags = [*FOLDER_TOY, "--data-path", str(digit_files), "--num_workers", "2"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    record = main([*flags, "--output_dir", str(whole)])
    assert record["test_acc5"] == pytest.approx(100)  # three classes: all of them
    dies_at(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match="epoch 1, step 3 of 3"):
        main([*flags, "--output_dir", str(broken)])
    monkeypatch.undo()
    main([*flags, "--num_workers", "1", "--output_dir", str(broken), "--resume", "auto"])
    assert_same_run(broken, whole)


def test_a_dead_worker_is_reported_with_its_image(digit_files, monkeypatch):
    def kill_a_worker() -> None:
        worker = next(child for child in multiprocessing.active_children() if child.name.startswith("Process"))
        worker.kill()
        time.sleep(5)  # until the news interrupts

    dies_at(monkeypatch, 2, kill_a_worker)
    flags = [*FOLDER_TOY, "--data-path", str(digit_files), "--num_workers", "1", "--batch-size", "8"]
    with pytest.raises(DataError, match=r"DataLoader worker .*killed.*; the image it took up last is .*\.png"):
        main(flags)


def test_an_unknown_augmentation_policy_is_named(digit_files):
    with pytest.raises(DataError, match="--aa 'nonsense' is not an augmentation policy"):
        main([*FOLDER_TOY, "--data-path", str(digit_files), "--num_workers", "0", "--aa", "nonsense"])


def test_classes_that_differ_are_named(digit_files, tmp_path):
    (tmp_path / "train").symlink_to(digit_files / "train")
    (tmp_path / "val").mkdir()
    for digit in range(2):
        (tmp_path / "val" / f"digit {digit}").symlink_to(digit_files / "val" / f"digit {digit}")
    with pytest.raises(DataError, match="differ in their classes: digit 2"):
        main([*FOLDER_TOY, "--data-path", str(tmp_path), "--num_workers", "0"])


def test_corrupt_image_ends_the_program_with_its_name(digit_files, tmp_path, monkeypatch, capsys):
    root = shutil.copytree(digit_files, tmp_path / "data")
    (root / "train" / "digit 1" / "7.png").write_bytes(b"damaged")
    monkeypatch.setattr(sys, "argv", ["main.py", *FOLDER_TOY, "--data-path", str(root), "--num_workers", "1"])
    assert vim.main.cli() == 2
    said = capsys.readouterr().err
    assert said.startswith(f"vim/main.py: error: cannot read image {root / 'train' / 'digit 1' / '7.png'}: ")
    assert "Traceback" not in said
