"""What happens in an update: precision, accumulation, averages, losses, what is frozen, and what is not finite."""

import math
import os
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from timm.data import Mixup
from torch import nn
from trainer_runs import BRIEF, DIGITS, TOY, VIM, dies_at, interrupt, read_log, toy

import vim.main
from vim.checkpoint import load_checkpoint
from vim.config import ConfigError, parse_args
from vim.data import build_loader
from vim.diagnosis import first_nonfinite
from vim.distributed import World
from vim.engine import NonFiniteLossError, Trainer, autocast, evaluate
from vim.losses import Criterion, create_criterion, create_mixup
from vim.main import create_model, create_optimizer, create_scheduler, main

CPU = torch.device("cpu")
CALM = ["--drop-path", "0"]  # nothing random in the model


def settings(*flags: str):
    return parse_args([*TOY, *DIGITS, *flags])


def saved(output: Path, part: str = "model"):
    return load_checkpoint(output / "checkpoint.pth")[part]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """One epoch, 11 updates, without anything special."""
    output = tmp_path_factory.mktemp("plain")
    toy(output, *CALM, epochs=1)
    return output


# --- the same updates by other ways ---


def test_accumulated_batches_are_one_large_batch(plain, tmp_path):
    toy(tmp_path, *CALM, "--batch-size", "32", "--grad-accum-steps", "4", epochs=1)
    one, other = read_log(tmp_path)[0], read_log(plain)[0]
    assert one["train_loss"] == pytest.approx(other["train_loss"], abs=1e-5) and one["train_lr"] == other["train_lr"]
    torch.testing.assert_close(saved(tmp_path), saved(plain), rtol=0, atol=1e-4)


def test_the_last_update_of_an_epoch_may_have_fewer_batches(tmp_path, monkeypatch):
    calls, backward = [], Trainer._backward

    def noted(self, images, labels, batches, sync):
        calls.append((batches, sync))
        return backward(self, images, labels, batches, sync)

    monkeypatch.setattr(Trainer, "_backward", noted)
    toy(tmp_path, "--batch-size", "256", "--grad-accum-steps", "3", epochs=1)  # 5 batches
    assert calls == [(3, False), (3, False), (3, True), (2, False), (2, True)]


def test_recomputed_activations_change_nothing():
    flags = [*VIM, *DIGITS, *BRIEF, *CALM, "--epochs", "1"]
    record, again = main(flags), main([*flags, "--grad-checkpointing"])
    assert again["test_loss"] == pytest.approx(record["test_loss"], rel=1e-6)
    with pytest.raises(ConfigError, match=r"cannot be built with these options: .*checkpointing"):
        create_model(parse_args(["--model", "selecsls42", "--grad-checkpointing"]), 10)


def test_compiled_model_is_the_same_model(plain, tmp_path):
    toy(tmp_path, *CALM, "--compile", "eager", epochs=1)
    torch.testing.assert_close(saved(tmp_path), saved(plain), rtol=0, atol=1e-6)
    scores = main([*TOY, *DIGITS, "--compile", "eager", "--eval", "--resume", str(tmp_path / "checkpoint.pth")])
    assert scores["test_loss"] == pytest.approx(read_log(plain)[0]["test_loss"], rel=1e-5)


@pytest.mark.parametrize("flag", [["--amp-dtype", "bfloat16"], ["--if_amp"]])
def test_mixed_precision(plain, tmp_path, monkeypatch, flag):
    seen, forward = set(), Criterion.forward

    def noted(self, images, outputs, labels):
        seen.add(outputs.dtype)
        return forward(self, images, outputs, labels)

    monkeypatch.setattr(Criterion, "forward", noted)
    record = toy(tmp_path, *CALM, *flag, epochs=1)
    half = torch.bfloat16 if len(flag) == 2 else torch.float16
    assert seen == {half}
    exact = read_log(plain)[0]["train_loss"]
    assert record["train_loss"] != exact and record["train_loss"] == pytest.approx(exact, abs=0.02)
    assert all(value.dtype == torch.float32 for value in saved(tmp_path).values())
    assert bool(saved(tmp_path, "scaler")) == (half == torch.float16)  # only float16 needs one


def test_no_train_mode_drops_no_paths(plain, tmp_path):
    toy(tmp_path, "--drop-path", "0.5", "--drop", "0.5", "--no-train-mode", epochs=1)
    torch.testing.assert_close(saved(tmp_path), saved(plain), rtol=0, atol=0)


def test_drop_reaches_the_model():
    model = create_model(settings("--drop", "0.3", "--drop-path", "0.4"), 10)
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} >= {0.3}
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.4)


# --- averaged weights ---


def test_moving_average(tmp_path, monkeypatch):
    expected, update = {}, Trainer._update

    def averaged(self, position):
        if not expected:
            expected.update({name: value.clone() for name, value in self.model.state_dict().items()})
        problem = update(self, position)
        for name, value in self.model.state_dict().items():
            expected[name].mul_(0.8).add_(value, alpha=0.2)
        return problem

    monkeypatch.setattr(Trainer, "_update", averaged)
    record = toy(tmp_path, "--model-ema", "--model-ema-decay", "0.8", epochs=1)
    torch.testing.assert_close(saved(tmp_path, "model_ema"), expected, rtol=1e-5, atol=1e-6)
    assert record["ema_test_loss"] != record["test_loss"]
    flags = [*TOY, *DIGITS, "--eval", "--resume", str(tmp_path / "checkpoint.pth")]
    assert main([*flags, "--use-ema"])["test_loss"] == pytest.approx(record["ema_test_loss"], rel=1e-5)
    assert main(flags)["test_loss"] == pytest.approx(record["test_loss"], rel=1e-5)


def test_moving_average_off_the_gpu_is_not_evaluated(tmp_path):
    record = toy(tmp_path, "--model-ema", "--model-ema-force-cpu", epochs=1)
    assert "ema_test_loss" not in record and saved(tmp_path, "model_ema")


# --- optimizer and schedule ---


def test_options_reach_the_optimizer():
    args = settings("--opt", "adamw", "--opt-eps", "1e-5", "--opt-betas", "0.7", "0.8", "--weight-decay", "0.2")
    group = create_optimizer(args, create_model(args, 10)).param_groups[-1]
    assert (group["eps"], group["betas"], group["weight_decay"]) == (1e-5, (0.7, 0.8), 0.2)
    args = settings("--opt", "sgd", "--momentum", "0.7")
    assert create_optimizer(args, create_model(args, 10)).param_groups[0]["momentum"] == 0.7
    args = settings("--opt", "adamw", "--opt-betas", "1", "0.8")
    with pytest.raises(ConfigError, match="--opt adamw cannot be made with these options"):
        create_optimizer(args, create_model(args, 10))


def test_images_of_an_update_scale_the_learning_rate():
    args = settings("--batch-size", "32", "--grad-accum-steps", "4", "--lr", "1e-3")
    assert create_optimizer(args, create_model(args, 10), processes=8).param_groups[0]["lr"] == pytest.approx(2e-3)


def test_layer_decay_follows_the_blocks():
    args = parse_args([*VIM, *DIGITS, "--layer-decay", "0.5"])
    model = create_model(args, 10)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scales = {
        names[id(parameter)]: group["lr_scale"]
        for group in create_optimizer(args, model).param_groups
        for parameter in group["params"]
    }
    for name, scale in scales.items():
        expected = {"layers.0": 1 / 4, "layers.1": 1 / 2, "norm_f.w": 1 / 2, "head.wei": 1, "head.bia": 1}
        assert scale == expected.get(name[:8], 1 / 8), name  # 1/8: patch and position embedding, class token


def rates(*flags: str, epochs: int = 10) -> list[float]:
    args = settings("--epochs", "10", "--unscale-lr", "--lr", "1e-2", *flags)
    optimizer = create_optimizer(args, create_model(args, 10))
    scheduler = create_scheduler(args, optimizer, updates_per_epoch=5)
    found = []
    for update in range(5 * epochs):
        scheduler.step_update(update)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_schedule_options():
    found = rates("--sched", "step", "--decay-epochs", "99", "--warmup-epochs", "2", "--warmup-lr", "1e-4")
    assert (
        found[0] == pytest.approx(1e-4) and found[5] == pytest.approx((1e-4 + 1e-2) / 2) and found[10:] == [1e-2] * 40
    )
    found = rates("--sched", "step", "--warmup-epochs", "0", "--decay-epochs", "4", "--decay-rate", "0.5")
    assert found[::20] == pytest.approx([1e-2, 5e-3, 2.5e-3])
    assert rates("--sched", "poly", "--dr", "1", "--warmup-epochs", "0")[25] == pytest.approx((1e-2 + 1e-5) / 2)
    assert rates("--min-lr", "1e-3", epochs=12)[50:] == [1e-3] * 10


def test_noise_of_the_learning_rate():
    plain = rates()
    noisy = rates("--lr-noise", "0.2", "0.8", "--lr-noise-pct", "0.3", "--lr-noise-std", "0.2")
    assert noisy[:10] == plain[:10] and noisy[40:] == plain[40:]
    changes = [abs(new / old - 1) for new, old in zip(noisy[10:40], plain[10:40], strict=True)]
    assert min(changes) > 0 and max(changes) < 0.3
    assert noisy == rates("--lr-noise", "0.2", "0.8", "--lr-noise-pct", "0.3", "--lr-noise-std", "0.2")
    assert noisy != rates("--lr-noise", "0.2", "0.8", "--lr-noise-pct", "0.3", "--lr-noise-std", "0.1")


def test_cooldown_adds_epochs_at_the_lowest_rate(tmp_path):
    toy(tmp_path, "--cooldown-epochs", "2", "--min-lr", "1e-4", epochs=2)
    assert [record["train_lr"] for record in read_log(tmp_path)][2:] == pytest.approx([1e-4] * 2)


def test_attn_only_trains_mixers_position_embedding_and_head(tmp_path):
    for flags, mixer in ((TOY, ".attn."), (VIM, ".mixer.")):
        folder = tmp_path / mixer.strip(".")
        main([*flags, *DIGITS, *BRIEF, "--epochs", "1", "--attn-only", "--output_dir", str(folder)])
        torch.manual_seed(0)
        start = create_model(parse_args([*flags, *DIGITS]), 10).state_dict()
        changed = {name for name, value in saved(folder).items() if not torch.equal(value, start[name])}
        allowed = {name for name in start if mixer in name or name.startswith(("pos_embed", "head."))}
        assert changed <= allowed and len(changed) > 0.8 * len(allowed)


def test_random_tokens_are_for_training(monkeypatch):
    from vim.models_mamba import VisionMamba

    seen, forward = [], VisionMamba.forward

    def noted(self, x, **options):
        seen.append((self.training, *options))
        return forward(self, x, **options)

    monkeypatch.setattr(VisionMamba, "forward", noted)
    flags = ["--if_random_cls_token_position", "--if_random_token_rank"]
    main([*VIM, "use_middle_cls_token=False", *DIGITS, *BRIEF, "--epochs", "1", *flags])
    assert set(seen) == {(True, "if_random_cls_token_position", "if_random_token_rank"), (False,)}


# --- losses ---


def test_bce_counts_every_class_mixed_in():
    args = settings("--bce-loss", "--smoothing", "0", "--mixup", "0.8")
    mixup = create_mixup(args, 10)
    criterion = create_criterion(args, mixup, None)
    logits, labels = torch.randn(4, 10), torch.tensor([1, 2, 3, 1])
    _, mixed = mixup(torch.rand(4, 1, 8, 8), labels)
    present = F.one_hot(labels, 10) | F.one_hot(labels.flip(0), 10)
    expected = F.binary_cross_entropy_with_logits(logits, present.float())
    torch.testing.assert_close(criterion(None, logits, mixed), expected)
    hard = create_criterion(args, None, None)(None, logits, labels)
    torch.testing.assert_close(hard, F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, 10).float()))


def test_mixup_options_reach_timm():
    flags = ["--mixup", "0.3", "--cutmix", "0.4", "--mixup-prob", "0.5", "--mixup-switch-prob", "0.6"]
    mixup = create_mixup(settings(*flags, "--mixup-mode", "elem", "--smoothing", "0.2"), 7)
    assert isinstance(mixup, Mixup) and mixup.num_classes == 7 and mixup.mode == "elem"
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.mix_prob, mixup.switch_prob) == (0.3, 0.4, 0.5, 0.6)
    assert mixup.label_smoothing == 0.2
    mixup = create_mixup(settings("--cutmix-minmax", "0.2", "0.3"), 7)
    assert mixup.cutmix_minmax == [0.2, 0.3] and mixup.cutmix_alpha == 1.0
    assert create_mixup(settings(), 7) is None


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("token", [False, True])
def test_distillation(kind, token):
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(4, 5))
    images, logits, distilled = torch.randn(3, 1, 2, 2), torch.randn(3, 5), torch.randn(3, 5)
    labels = torch.tensor([0, 1, 4])
    outputs = (logits, distilled) if token else logits
    loss = Criterion(nn.CrossEntropyLoss(), teacher, kind, alpha=0.3, tau=2.0)(images, outputs, labels)
    student, taught = distilled if token else logits, teacher(images)
    if kind == "hard":
        expected = F.cross_entropy(student, taught.argmax(1))
    else:
        p, q = (taught / 2).softmax(1), (student / 2).log_softmax(1)
        expected = (p * (p.log() - q)).sum() * 4 / 15
    torch.testing.assert_close(loss, 0.7 * F.cross_entropy(logits, labels) + 0.3 * expected)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_distillation_from_a_checkpoint(plain, tmp_path):
    torch.manual_seed(1)
    teacher = timm.create_model("test_efficientnet_ln", num_classes=10, in_chans=1)
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    flags = ["--teacher-model", "test_efficientnet_ln", "--teacher-path", str(tmp_path / "teacher.pth")]
    losses = {read_log(plain)[0]["train_loss"]}
    for kind in (["hard"], ["soft"], ["soft", "--distillation-tau", "3"], ["soft", "--distillation-alpha", "0.9"]):
        name = "-".join(kind)
        losses.add(toy(tmp_path / name, *CALM, *flags, "--distillation-type", *kind, epochs=1)["train_loss"])
        assert not any("teacher" in key for key in saved(tmp_path / name))
    assert len(losses) == 5


# --- evaluation ---


@pytest.mark.parametrize("batch", ["50", "360", "7"])
def test_evaluation_counts_every_image_once(batch):
    args = settings("--batch-size", batch, "--smoothing", "0")
    model = create_model(args, 10).eval()
    loader = build_loader(args, train=False, channels=1)
    scores = evaluate(model, loader, world=World(CPU), console=Console(quiet=True))
    images, labels = map(torch.cat, zip(*loader, strict=True))
    with torch.no_grad():
        logits = model(images)
    best = logits.topk(5).indices == labels[:, None]
    assert scores["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert scores["test_acc1"] == pytest.approx(100 * best[:, 0].sum().item() / 360)
    assert scores["test_acc5"] == pytest.approx(100 * best.sum().item() / 360)


@pytest.mark.parametrize("processes", [2, 7])
def test_shares_of_the_held_out_images_add_up(processes, monkeypatch):
    """As with --dist-eval: shares of unequal size, and no image in two of them."""
    args = settings("--batch-size", "50")
    model = create_model(args, 10).eval()
    whole = evaluate(model, build_loader(args, train=False, channels=1), world=World(CPU), console=Console(quiet=True))
    sums = []
    monkeypatch.setattr(World, "sum", lambda self, values: sums.append(values) or [1.0] * 4)
    for rank in range(processes):
        share = build_loader(args, train=False, channels=1, rank=rank, world_size=processes)
        evaluate(model, share, world=World(CPU, rank, processes), console=Console(quiet=True))
    total = [sum(values) for values in zip(*sums, strict=True)]
    assert total[3] == 360 and total[0] / 360 == pytest.approx(whole["test_loss"], rel=1e-5)
    assert [100 * count / 360 for count in total[1:3]] == pytest.approx([whole["test_acc1"], whole["test_acc5"]])


# --- numbers that are not finite ---


def spoil(monkeypatch, batch: int) -> None:
    """Make the images of one batch infinite."""
    backward, done = Trainer._backward, 0

    def spoiled(self, images, labels, batches, sync):
        nonlocal done
        done += 1
        return backward(self, images * math.inf if done == batch else images, labels, batches, sync)

    monkeypatch.setattr(Trainer, "_backward", spoiled)


def test_the_first_layer_is_named():
    model = create_model(settings(), 10)
    images = torch.rand(2, 1, 8, 8)
    everything = autocast(CPU, "none")
    assert "every layer's output is finite" in first_nonfinite(model, images, everything, {})
    assert "the images themselves" in first_nonfinite(model, images / 0, everything, {})
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight.fill_(3e38)
    model.compile(backend="eager")
    model(images)
    assert "blocks.1.mlp.fc1 (Linear)" in first_nonfinite(model, images, everything, {})
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        model.blocks[0].norm1.bias.fill_(math.nan)
    assert "1 weights are not finite, the first is blocks.0.norm1.bias" in first_nonfinite(
        model, images, everything, {}
    )


def test_a_layer_within_a_mixer_is_named():
    model = create_model(parse_args([*VIM, *DIGITS]), 10)
    with torch.no_grad():
        model.layers[1].mixer.in_proj.weight.fill_(3e38)
    assert "layers.1.mixer.in_proj (Linear)" in first_nonfinite(
        model, torch.rand(2, 1, 8, 8), autocast(CPU, "none"), {}
    )


def test_a_batch_is_skipped(tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, 4)
    record = toy(tmp_path, "--if_continue_inf", epochs=1)
    assert record["skipped_steps"] == 1 and math.isfinite(record["train_loss"]) and math.isfinite(record["test_loss"])
    said = capsys.readouterr().err
    assert "the loss is nan in epoch 0, batch 3 of 11: the images themselves are not finite" in said
    assert "\n  DIGITS, training image " in said and "skipped" in said


class Overflow(torch.autograd.Function):
    """The identity, with an infinite gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


@pytest.mark.parametrize("flags", [[], ["--clip-grad", "1"]])
def test_an_infinite_gradient_of_a_finite_loss_is_no_update(plain, tmp_path, monkeypatch, flags):
    forward, calls = Criterion.forward, []

    def overflowing(self, images, outputs, labels):
        calls.append(0)
        return forward(self, images, Overflow.apply(outputs) if len(calls) == 4 else outputs, labels)

    monkeypatch.setattr(Criterion, "forward", overflowing)
    said = r"the gradient of head.bias is not finite in epoch 0, step 3, though the loss is"
    with pytest.raises(NonFiniteLossError, match=said):
        toy(tmp_path / "ends", *CALM, *flags, "--checkpoint-steps", "1", epochs=1)
    assert saved(tmp_path / "ends", "position")["step"] == 3
    calls.clear()
    record = toy(tmp_path / "goes on", *CALM, *flags, "--if_continue_inf", epochs=1)
    assert record["skipped_steps"] == 1 and math.isfinite(record["test_loss"])


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    update = Trainer._update

    def breaking(self, position):
        problem = update(self, position)
        if position.step == 4:
            self.model.head.bias.data[3] = math.inf
        return problem

    monkeypatch.setattr(Trainer, "_update", breaking)
    said = r"not saved after epoch 0, step 5: 1 weights are not finite, the first is head.bias; the last checkpoint"
    with pytest.raises(NonFiniteLossError, match=said):
        toy(tmp_path, "--checkpoint-steps", "1", epochs=1)
    assert saved(tmp_path, "position")["step"] == 4


def make_head_huge(monkeypatch, at: int) -> None:
    """Weights after step `at` are finite, and their loss is not; they are good again before the next step."""
    update, backward, kept = Trainer._update, Trainer._backward, []

    def diverging(self, position):
        problem = update(self, position)
        if position.step == at - 1:
            weight = self.model.head.weight.data
            kept.append(weight.clone())
            weight.fill_(3e38)
        return problem

    def recovering(self, *args, **kwargs):
        if kept:
            self.model.head.weight.data.copy_(kept.pop())
        return backward(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_update", diverging)
    monkeypatch.setattr(Trainer, "_backward", recovering)


def test_finite_weights_whose_loss_is_not_are_not_saved(tmp_path, monkeypatch):
    make_head_huge(monkeypatch, 5)
    said = r"not saved after epoch 0, step 5: the first layer whose output is not finite is head \(Linear\); the last"
    with pytest.raises(NonFiniteLossError, match=said):
        toy(tmp_path, "--checkpoint-steps", "1", epochs=1)
    assert saved(tmp_path, "position")["step"] == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_does_not_save_them_either(tmp_path, monkeypatch, number):
    make_head_huge(monkeypatch, 5)
    dies_at(monkeypatch, 4, lambda: os.kill(os.getpid(), number))  # noticed in the next one
    with pytest.raises(NonFiniteLossError, match="not saved after epoch 0, step 5"):
        toy(tmp_path, epochs=1)
    assert not (tmp_path / "checkpoint.pth").exists()


def test_going_on_past_them_is_not_saving_them(tmp_path, monkeypatch, capsys):
    make_head_huge(monkeypatch, 5)
    saves, save = [], vim.main.save_checkpoint
    monkeypatch.setattr(
        vim.main, "save_checkpoint", lambda path, state: (saves.append(state["position"]["step"]), save(path, state))
    )
    toy(tmp_path, "--checkpoint-steps", "1", "--if_continue_inf", epochs=1)
    assert [step for step in saves if step] == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert "not saved after epoch 0, step 5: the first layer" in capsys.readouterr().err


def test_weights_that_do_not_show_in_the_outputs_are_judged_too(tmp_path, monkeypatch, capsys):
    update = Trainer._update

    def breaking(self, position):
        problem = update(self, position)
        self.model.layers[0].mixer.dt_proj.bias.data[0] = -math.inf if position.step == 0 else -3.0  # softplus: 0
        return problem

    monkeypatch.setattr(Trainer, "_update", breaking)
    flags = [*VIM, *DIGITS, *BRIEF, "--output_dir", str(tmp_path), "--checkpoint-steps", "1", "--if_continue_inf"]
    main([*flags, "--epochs", "1"])
    said = capsys.readouterr().err
    assert "not saved after epoch 0, step 1: 1 weights are not finite, the first is layers.0.mixer.dt_proj.bias" in said


def test_judging_weights_draws_no_random_numbers(tmp_path):
    """A run that is saved, and so judged, at every step is the run that is not."""
    random_in_evaluation = [*VIM, "flip_img_sequences_ratio=0.5"]
    for name, flags in {"once": [], "often": ["--checkpoint-steps", "1"]}.items():
        main([*random_in_evaluation, *DIGITS, *BRIEF, "--output_dir", str(tmp_path / name), "--epochs", "1", *flags])
    torch.testing.assert_close(saved(tmp_path / "often"), saved(tmp_path / "once"), rtol=0, atol=0)


def test_bad_images_are_not_the_weights_fault():
    model = create_model(settings(), 10)
    trainer = object.__new__(Trainer)
    trainer.model, trainer.world, trainer.autocast, trainer.train_mode = model, World(CPU), autocast(CPU, "none"), True
    images = torch.rand(2, 1, 8, 8)
    images[0, 0, 3, 3], images[1, 0, 0, 0] = math.inf, math.nan
    assert trainer.explain_divergence(images) == "" and model.training


def test_an_epoch_of_skipped_batches_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(NonFiniteLossError, match="not finite in any update of epoch 0"):
        monkeypatch.setattr(Criterion, "forward", lambda self, images, outputs, labels: outputs.sum() * math.nan)
        toy(tmp_path, "--if_continue_inf", epochs=1)


def test_a_batch_counts_as_zero(tmp_path, monkeypatch):
    spoil(monkeypatch, 4)
    record = toy(tmp_path, "--if_nan2num", epochs=1)
    assert math.isfinite(record["train_loss"]) and math.isfinite(record["test_loss"])
    assert all(value.isfinite().all() for value in saved(tmp_path).values())


# --- where the numbers go ---


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    toy(tmp_path, "--tensorboard", epochs=2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 23))
    accuracies = [event.value for event in events.Scalars("epoch/test_acc1")]
    assert accuracies == pytest.approx([record["test_acc1"] for record in read_log(tmp_path)])
    assert [event.step for event in events.Scalars("epoch/test_acc1")] == [11, 22]


def test_tensorboard_goes_on_where_it_was(tmp_path, monkeypatch):
    """Also from the very end of an epoch, when only its evaluation is missing."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--tensorboard", "--checkpoint-steps", "11"]
    monkeypatch.setattr(vim.main, "evaluate", lambda *args, **options: interrupt())
    with pytest.raises(KeyboardInterrupt):
        toy(tmp_path, *flags, epochs=1)
    monkeypatch.undo()
    toy(tmp_path, *flags, "--resume", "auto", epochs=1)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 12))
    assert [event.step for event in events.Scalars("epoch/train_loss")] == [11]
    assert read_log(tmp_path)[0]["train_loss"] == pytest.approx(events.Scalars("epoch/train_loss")[0].value)


class Recorder(ModuleType):
    """Stands in for a package that is not installed here: notes what is called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple] = []

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **options):
            self.calls.append((name, args, options))
            return self

        return call


def test_weights_and_biases(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", recorder := Recorder("wandb"))
    record = toy(tmp_path, "--log-wandb", "--project", "mine", epochs=1)
    names = [name for name, *_ in recorder.calls]
    assert names == ["init", *["log"] * 12, "finish"]
    init = recorder.calls[0][2]
    assert (init["project"], init["name"], init["config"]["epochs"]) == ("mine", tmp_path.name, 1)
    _, (numbers,), options = recorder.calls[-2]
    assert numbers["epoch/test_acc1"] == record["test_acc1"] and options == {"step": 11}


def test_mlflow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", recorder := Recorder("mlflow"))
    toy(tmp_path, "--log-mlflow", "--project", "mine", epochs=1)
    names = [name for name, *_ in recorder.calls]
    assert names == ["set_experiment", "start_run", "log_params", *["log_metrics"] * 12, "end_run"]
    assert recorder.calls[0][1] == ("mine",) and recorder.calls[1][2] == {"run_name": tmp_path.name}
