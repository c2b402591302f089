"""The ways of weights: published files and other sizes through --eval; train, be killed, go on, fine-tune, evaluate."""

import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from parity.parity import fill, image
from photographs import photograph_folder
from test_checkpoint import published
from test_parity import GOLDEN, PARITY
from trainer_runs import assert_same_run, command, read_log

import vim.main
from vim.convert import convert
from vim.main import main
from vim.models_mamba import VisionMamba


def key_values(options: dict) -> list[str]:
    return [f"{key}={value}" for key, value in options.items()]


# --- published checkpoints, through the command line ---


class Batches:
    """Two images as a held-out set of ten classes."""

    classes = tuple(map(str, range(10)))
    images, labels = image((2, 3, 64, 64), seed=5), torch.tensor([3, 8])

    def __len__(self) -> int:
        return 1

    def __iter__(self):
        yield self.images, self.labels

    def set_epoch(self, epoch, start_batch=0):
        pass

    def explain(self, error):
        pass


@pytest.mark.parametrize("form", ["pth", "safetensors"])
@pytest.mark.parametrize("name", GOLDEN)
def test_a_published_checkpoint_evaluates_to_the_published_logits(tmp_path, monkeypatch, name, form):
    golden = torch.load(PARITY / f"{name}.pt", weights_only=True)["logits"]
    path = tmp_path / "vim.pth"
    torch.save(published(fill(VisionMamba(**GOLDEN[name]).eval(), seed=7)), path)
    if form == "safetensors":
        path = tmp_path / "vim.safetensors"
        convert(tmp_path / "vim.pth", path)
    seen, forward = [], VisionMamba.forward
    monkeypatch.setattr(VisionMamba, "forward", lambda self, x: seen.append(forward(self, x)) or seen[-1])
    monkeypatch.setattr(vim.main, "build_loader", lambda *_, **__: Batches())
    options = {k: v for k, v in GOLDEN[name].items() if k not in ("img_size", "num_classes")}
    kwargs = key_values({**options, "final_pool_type": "none"})
    flags = ["--model", "vim_tiny", "--model-kwargs", *kwargs, "--input-size", "64", "--device", "cpu"]
    scores = main([*flags, "--eval", "--resume", str(path)])
    torch.testing.assert_close(torch.cat(seen), golden, rtol=1e-3, atol=1e-4)
    assert scores["test_loss"] == pytest.approx(F.cross_entropy(golden, Batches.labels).item(), rel=1e-3)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    return photograph_folder(tmp_path_factory.mktemp("photographs"), train=40, val=20)


def test_a_224_checkpoint_runs_at_384_by_256(photographs, tmp_path, capsys):
    options = {"depth": 2, "embed_dim": 32, "d_state": 4}
    path = tmp_path / "vim.pth"
    torch.save(published(fill(VisionMamba(**options, num_classes=2), seed=7)), path)
    flags = ["--model", "vim_tiny", "--model-kwargs", *key_values(options), "--data-path", str(photographs)]
    flags += ["--device", "cpu", "--num_workers", "0", "--batch-size", "6", "--eval", "--resume", str(path)]
    scores = main([*flags, "--input-size", "384", "256"])
    said = capsys.readouterr().out
    assert f"{path}: position embedding resampled from 14×14 to 24×16 patches" in said
    assert f"acc@1 {scores['test_acc1']:.2f} %" in said and scores["test_loss"] > 0
    averaged = main([*flags, "--input-size", "384", "256", "--use-ema"])
    assert averaged["test_loss"] != scores["test_loss"]


# --- a run's whole life ---


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_pretrain_be_killed_go_on_finetune_evaluate(photographs, tmp_path, capsys, method):
    """One command each; the run that was killed in mid-epoch equals the one that was not, bit for bit."""
    model = {"depth": 2, "embed_dim": 32, "d_state": 4, "patch_size": 8}
    common = ["--model", "vim_tiny", "--discretization-method", method, "--data-path", str(photographs)]
    common += ["--device", "cpu", "--batch-size", "8", "--num_workers", "1", "--warmup-epochs", "1", "--lr", "4e-3"]
    common += ["--unscale-lr", "--mixup", "0", "--cutmix", "0", "--no-model-ema", "--aa", "none", "--reprob", "0"]
    pretrain = [*common, "--model-kwargs", *key_values({**model, "stride": 8}), "--input-size", "32", "--epochs", "8"]

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    main([*pretrain, "--output_dir", str(whole)])
    argv = [*pretrain, "--output_dir", str(broken), "--checkpoint-steps", "1", "--resume", "auto"]
    with subprocess.Popen(command(*argv), stdout=subprocess.DEVNULL) as victim:
        deadline = time.monotonic() + 60
        while not (broken / "checkpoint.pth").exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        victim.kill()
    assert victim.returncode == -signal.SIGKILL
    main(argv)
    assert_same_run(broken, whole)

    checkpoint = str(broken / "checkpoint.pth")
    finetune = [*common, "--model-kwargs", *key_values({**model, "stride": 4}), "--input-size", "64"]
    tuned = tmp_path / "tuned"
    record = main([*finetune, "--finetune", checkpoint, "--epochs", "2", "--output_dir", str(tuned)])
    said = capsys.readouterr().out
    assert "position embedding resampled from 4×4 to 15×15 patches" in said
    scores = main([*finetune, "--eval", "--resume", str(tuned / "checkpoint.pth")])
    assert scores["test_acc1"] == record["test_acc1"]
    assert scores["test_loss"] == pytest.approx(record["test_loss"], rel=1e-5)
    before, after = (read_log(folder)[-1]["test_acc1"] for folder in (broken, tuned))
    print(f"{method}: acc@1 {before:.1f} % at 32×32, fine-tuned at 64×64 and stride 4 {after:.1f} %")
    assert before > 65 and after > 65  # chance: 50; many windows show little but sky or dark leaves
