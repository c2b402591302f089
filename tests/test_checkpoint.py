"""Checkpoints: no failure costs the previous one, no file runs code, every misfit is named."""

import argparse
import decimal
import errno
import functools
import http.server
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import timm
import torch
from parity.parity import fill, image
from test_parity import GOLDEN, PARITY
from torch import nn

from vim.checkpoint import (
    CheckpointError,
    atomic_write,
    fit_to_model,
    load_checkpoint,
    load_model,
    load_weights,
    model_state,
    save_checkpoint,
    save_weights,
)
from vim.models_mamba import VisionMamba
from vim.pos_embed import resize_pos_embed


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint.pth"


def state(value: float) -> dict:
    return {"model": {"weight": torch.full((300, 300), value)}, "epoch": 3, "args": {"lr": 0.1, "opt_betas": None}}


def assert_holds(path, value: float) -> None:
    assert (load_checkpoint(path)["model"]["weight"] == value).all()
    assert os.listdir(path.parent) == [path.name]  # nothing left over


def test_save_and_load(path):
    save_checkpoint(path, state(1.0))
    assert_holds(path, 1.0)
    loaded = load_checkpoint(path)
    assert loaded["epoch"] == 3 and loaded["args"] == {"lr": 0.1, "opt_betas": None}


def test_save_replaces_the_previous(path):
    save_checkpoint(path, state(1.0))
    save_checkpoint(path, state(2.0))
    assert_holds(path, 2.0)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is always full")
def test_disk_full_keeps_the_previous(path):
    save_checkpoint(path, state(1.0))
    path.with_name(path.name + ".partial").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"cannot write .*checkpoint.pth: .*No space left on device \(.* free"):
        save_checkpoint(path, state(2.0))
    assert_holds(path, 1.0)


def test_disk_full_inside_torch_keeps_the_previous(path):
    """torch's zip writer hides the system's error behind one of its own."""

    class Full:
        def __init__(self, file):
            self.file, self.left = file, 10_000

        def write(self, data):
            self.left -= len(data)
            if self.left < 0:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

        def flush(self):
            self.file.flush()

    save_checkpoint(path, state(1.0))
    with pytest.raises(CheckpointError, match="No space left on device"):
        atomic_write(path, lambda file: torch.save(state(2.0), Full(file)))
    assert_holds(path, 1.0)


def test_interrupt_keeps_the_previous(path):
    def interrupted(file):
        file.write(b"half")
        raise KeyboardInterrupt

    save_checkpoint(path, state(1.0))
    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, interrupted)
    assert_holds(path, 1.0)


def test_kill_while_writing_keeps_the_previous(path):
    save_checkpoint(path, state(1.0))

    def killed(file):
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        atomic_write(path, killed)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert (load_checkpoint(path)["model"]["weight"] == 1).all()
    save_checkpoint(path, state(2.0))  # and the half file is no obstacle
    assert_holds(path, 2.0)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot write .*absent.*No such file"):
        save_checkpoint(tmp_path / "absent" / "checkpoint.pth", state(1.0))


def test_missing_file_is_named(path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*checkpoint.pth"):
        load_checkpoint(path)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.99])
def test_truncated(path, keep):
    save_checkpoint(path, state(1.0))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pth is truncated, corrupt"):
        load_checkpoint(path)


def test_a_disk_that_became_read_only_is_named(path, monkeypatch):
    save_checkpoint(path, state(1.0))
    refuse = functools.partial(_raise, OSError(errno.EROFS, "Read-only file system"))
    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(CheckpointError, match=r"cannot write .*Read-only file system.*the previous file is untouched"):
        save_checkpoint(path, state(2.0))


def _raise(error: Exception, *_: object, **__: object) -> None:
    raise error


@pytest.mark.parametrize("content", [b"not a checkpoint", b"\x80\x02]q\x00.", b"PK\x03\x04 and no more", bytes(1000)])
def test_not_a_checkpoint(path, content):
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pth"):
        load_checkpoint(path)


def test_loading_runs_no_code(path, tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model": Malicious()}, path)
    with pytest.raises(CheckpointError, match="tensors and plain types"):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_paths_among_the_arguments_are_plain_enough(path):
    torch.save({"model": {"weight": torch.ones(2)}, "args": argparse.Namespace(output_dir=Path("runs/one"))}, path)
    assert load_checkpoint(path)["args"].output_dir == Path("runs/one")


def test_what_is_not_plain_is_named(path):
    torch.save({"model": {}, "loss": decimal.Decimal("1.5")}, path)
    with pytest.raises(CheckpointError, match=r"checkpoint.pth holds a decimal.Decimal; only .* save its tensors anew"):
        load_checkpoint(path)


@pytest.mark.parametrize("function", [os.system, sys.exit], ids=["system", "exit"])
def test_what_could_run_code_is_named(path, function):
    torch.save({"model": {}, "hook": function}, path)
    with pytest.raises(CheckpointError, match=rf"holds a \w+\.{function.__name__}; only tensors and plain types"):
        load_checkpoint(path)


def test_not_a_dict(path):
    torch.save([torch.zeros(1)], path)
    with pytest.raises(CheckpointError, match="holds a list"):
        load_checkpoint(path)


def test_published_layout(path):
    """The published trainer stored its arguments as a Namespace, and more than the model."""
    model = nn.Linear(4, 3)
    published = {"model": model.state_dict(), "epoch": 299, "args": argparse.Namespace(lr=1e-3), "max_accuracy": 76.1}
    torch.save(published, path)
    checkpoint = load_checkpoint(path)
    other = nn.Linear(4, 3)
    load_model(other, model_state(checkpoint, path), path)
    assert torch.equal(other.weight, model.weight)


def test_moving_averages_are_taken_when_asked_for(path):
    checkpoint = {"model": {"weight": torch.zeros(2)}, "model_ema": {"weight": torch.ones(2)}}
    assert model_state(checkpoint, path)["weight"].sum() == 0
    assert model_state(checkpoint, path, ema=True)["weight"].sum() == 2
    for without in ({"model": {"weight": torch.zeros(2)}}, {**checkpoint, "model_ema": None}):
        with pytest.raises(CheckpointError, match=r"has no model_ema.*leave out --use-ema"):
            model_state(without, path, ema=True)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_wrappers_names_are_unwrapped(path, prefix):
    assert list(model_state({"model": {f"{prefix}head.weight": torch.zeros(2)}}, path)) == ["head.weight"]


def test_bare_state_dict(path):
    model = nn.Linear(4, 3)
    torch.save(model.state_dict(), path)
    other = nn.Linear(4, 3)
    load_model(other, model_state(load_checkpoint(path), path), path)
    assert torch.equal(other.bias, model.bias)


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"epoch": 3, "lr": 0.1}, {"model": {"depth": 3}}])
def test_no_weights(path, content):
    with pytest.raises(CheckpointError, match="has no model weights; its entries are"):
        model_state(content, path)


def test_foreign_names_and_shapes_are_listed(path):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    foreign = {f"block{index}.weight": torch.zeros(1) for index in range(7)}
    foreign |= {"0.weight": torch.zeros(4, 2), "0.bias": torch.zeros(4)}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_model(model, foreign, path)
    message = str(caught.value)
    assert "8 missing: 1.weight, 1.bias, 2.weight, 2.bias, 3.weight, … and 3 more" in message
    assert "7 unexpected: block0.weight, " in message and "… and 2 more" in message
    assert "1 mis-shaped: 0.weight (4, 2) instead of (4, 4)" in message
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# --- safetensors, addresses, the hub ---


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_weights_and_their_arguments_are_kept(tmp_path, name):
    shared = torch.arange(6.0).view(2, 3)
    state = {"a": shared, "b": shared.t(), "c": torch.ones(2, dtype=torch.bfloat16)}  # shared, strided, half
    args = {"model": "vim_tiny", "model_kwargs": {"depth": 2}, "seed": 3}
    save_weights(tmp_path / name, state, args)
    checkpoint = load_checkpoint(tmp_path / name)
    assert checkpoint["args"] == args
    assert all(torch.equal(checkpoint["model"][key], value) for key, value in state.items())
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("content", [b"", b"not a file of weights", b'\x10\0\0\0\0\0\0\0{"a": nothing  '])
def test_a_damaged_safetensors_file_is_named(tmp_path, content):
    (tmp_path / "weights.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is truncated, corrupt"):
        load_checkpoint(tmp_path / "weights.safetensors")


@pytest.fixture
def address(tmp_path, monkeypatch):
    """The address of a web server that serves `tmp_path / "served"`; downloads go to `tmp_path / "cache"`."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    (tmp_path / "served").mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=tmp_path / "served")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("name", ["vim.pth", "vim.safetensors"])
def test_an_address_is_downloaded_once(address, tmp_path, name):
    save_weights(tmp_path / "served" / name, {"weight": torch.ones(2)}, {"model": "vim_tiny"})
    assert load_checkpoint(f"{address}/{name}")["model"]["weight"].sum() == 2
    (tmp_path / "served" / name).unlink()
    assert load_checkpoint(f"{address}/{name}")["args"] == {"model": "vim_tiny"}


def test_an_address_without_a_file_is_named(address):
    with pytest.raises(CheckpointError, match=rf"cannot download {address}/none.pth: .*404"):
        load_checkpoint(f"{address}/none.pth")


def test_the_hub_is_asked_through_timm(monkeypatch):
    state = {"weight": torch.ones(2)}
    monkeypatch.setattr("vim.checkpoint.load_state_dict_from_hf", lambda name: {"owner/vim@v1": state}[name])
    assert load_checkpoint("hf-hub:owner/vim@v1") == {"model": state}
    with pytest.raises(CheckpointError, match="cannot load hf-hub:owner/other"):
        load_checkpoint("hf-hub:owner/other")


# --- weights of another image size, stride or number of classes ---

SMALL = {"depth": 2, "embed_dim": 32, "d_state": 4, "num_classes": 10}


def vim(img_size, *, seed: int = 7, **options) -> VisionMamba:
    return fill(VisionMamba(img_size=img_size, **{**SMALL, **options}).eval(), seed)


# As an early version of the published code called its vim_tiny, which timm does not know.
PUBLISHED_NAME = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_middle_cls_token_div2"


def published(model: nn.Module) -> dict:
    """What the published trainer wrote: more than the weights, and its arguments as a Namespace."""
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 3, *model.patch_embed.img_size)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    fill(model, seed=7)
    return {
        "model": model.state_dict(),
        "model_ema": {key: value + 1 for key, value in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"t_initial": 300, "base_values": [1e-3], "noise_pct": 0.67},
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0},
        "epoch": 299,
        "args": argparse.Namespace(model=PUBLISHED_NAME, input_size=224, lr=1e-3, opt_betas=None),
    }


@pytest.mark.parametrize("form", ["pth", "safetensors"])
@pytest.mark.parametrize("name", GOLDEN)
def test_a_published_file_gives_the_published_logits(tmp_path, name, form):
    golden = torch.load(PARITY / f"{name}.pt", weights_only=True)
    checkpoint = published(fill(VisionMamba(**GOLDEN[name]).eval(), seed=7))
    path = tmp_path / f"vim.{form}"
    if form == "pth":
        torch.save(checkpoint, path)
    else:
        save_weights(path, checkpoint["model"], {})
    model = VisionMamba(**GOLDEN[name]).eval()
    assert load_weights(model, load_checkpoint(path), path) == []
    with torch.no_grad():
        logits = model(image((2, 3, 64, 64), seed=5))
    torch.testing.assert_close(logits, golden["logits"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "stride", "grid"), [((384, 256), 16, (24, 16)), ((224, 224), 8, (27, 27)), (96, 16, (6, 6))]
)
@pytest.mark.parametrize("position", ["head", "middle", "tail", "double"])
def test_a_224_checkpoint_runs_at_other_sizes_and_strides(path, size, stride, grid, position):
    trained = vim(224, cls_token_position=position)
    model = vim(size, stride=stride, cls_token_position=position, seed=1)
    changes = load_weights(model, {"model": trained.state_dict()}, path)
    assert changes == ["position embedding resampled from 14×14 to {}×{} patches".format(*grid)]
    expected = resize_pos_embed(trained.pos_embed, grid, (14, 14), position)
    assert torch.equal(model.pos_embed, expected)
    others = {key: value for key, value in model.state_dict().items() if key != "pos_embed"}
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in others.items())
    height, width = model.patch_embed.img_size
    assert model(torch.zeros(1, 3, height, width)).shape == (1, 10)


def test_a_grid_that_is_not_square_comes_from_the_checkpoints_arguments(path):
    trained = timm.create_model("vim_tiny", img_size=(96, 64), stride=8, **SMALL)
    args = {"model": "vim_tiny", "input_size": (96, 64), "model_kwargs": {"stride": 8, **SMALL}}
    checkpoint = {"model": trained.state_dict(), "args": args}
    turned = timm.create_model("vim_tiny", img_size=(64, 96), stride=8, **SMALL)  # as many patches, but 7×11 not 11×7
    assert load_weights(turned, checkpoint, path) == ["position embedding resampled from 11×7 to 7×11 patches"]
    assert torch.equal(turned.pos_embed, resize_pos_embed(trained.pos_embed, (7, 11), (11, 7), "middle"))
    same = timm.create_model("vim_tiny", img_size=(96, 64), stride=8, **SMALL)
    assert load_weights(same, checkpoint, path) == []
    with pytest.raises(CheckpointError, match=r"77 patch rows, which are not a square grid"):
        fit_to_model(trained.state_dict(), vim(96), path)


@pytest.mark.parametrize(
    "args",
    [
        ["--model", "vim_tiny"],
        argparse.Namespace(model="resnet18", input_size=224),
        {"model": "vim_tiny", "input_size": 225, "model_kwargs": None},
        {"model": "vim_tiny", "input_size": 64, "model_kwargs": {"unknown": 1}},
    ],
)
def test_arguments_that_describe_no_model_are_passed_over(path, args):
    trained, model = vim(64), vim((128, 32), seed=1)
    (change,) = load_weights(model, {"model": trained.state_dict(), "args": args}, path)
    assert change == "position embedding resampled from 4×4 to 8×2 patches"


def test_a_stated_grid_that_the_tensor_contradicts_is_not_believed(path):
    trained, model = vim(64), vim((128, 32), seed=1)
    args = {"model": "vim_tiny", "input_size": (96, 64), "model_kwargs": {**SMALL}}
    assert load_weights(model, {"model": trained.state_dict(), "args": args}, path) == [
        "its arguments speak of 6×4 patches, its position embedding has 16",
        "position embedding resampled from 4×4 to 8×2 patches",
    ]
    assert torch.equal(model.pos_embed, resize_pos_embed(trained.pos_embed, (8, 2), (4, 4), "middle"))


def test_as_many_patches_in_another_arrangement_are_resampled(path):
    trained, model = vim(64), vim((128, 32), seed=1)
    assert load_weights(model, {"model": trained.state_dict()}, path) == [
        "position embedding resampled from 4×4 to 8×2 patches"
    ]
    assert torch.equal(model.pos_embed, resize_pos_embed(trained.pos_embed, (8, 2), (4, 4), "middle"))


def test_rope_tables_follow_the_models_grid(path):
    trained, model = vim(64, if_rope=True), vim(96, if_rope=True)
    tables = model.rope.freqs_cos.clone()
    load_weights(model, {"model": trained.state_dict()}, path)
    assert torch.equal(model.rope.freqs_cos, tables)


def test_a_head_for_other_classes_starts_anew(path):
    trained, model = vim(64), vim(64, num_classes=3, seed=1)
    head = model.head.weight.clone()
    changes = load_weights(model, {"model": trained.state_dict()}, path, replace_head=True)
    assert changes == ["head: 10 classes in the checkpoint, 3 here: it starts anew"]
    assert torch.equal(model.head.weight, head) and torch.equal(
        model.patch_embed.proj.weight, trained.patch_embed.proj.weight
    )
    with pytest.raises(CheckpointError, match=r"2 mis-shaped: head.weight \(10, 32\) instead of \(3, 32\)"):
        load_weights(model, {"model": trained.state_dict()}, path)


def test_a_head_for_the_same_classes_is_kept(path):
    trained, model = vim(64), vim(64, seed=1)
    assert load_weights(model, {"model": trained.state_dict()}, path, replace_head=True) == []
    assert torch.equal(model.head.weight, trained.head.weight)


def test_a_backbone_gets_the_models_head_and_gives_up_its_own(path):
    trained, backbone = vim(64), vim(64, num_classes=0, seed=1)
    state = backbone.state_dict()
    changes = load_weights(trained, {"model": state}, path, replace_head=True)
    assert changes == ["head: none in the checkpoint, 10 here: it starts anew"]
    assert load_weights(backbone, {"model": trained.state_dict()}, path, replace_head=True) == [
        "head: 10 classes in the checkpoint, 0 here: it starts anew"
    ]


def test_models_of_timm_are_fitted_their_own_way(path):
    options = {"depth": 1, "embed_dim": 16, "num_heads": 1, "num_classes": 4}
    trained, model = (timm.create_model("vit_tiny_patch16_224", img_size=size, **options) for size in (64, 96))
    model.reset_classifier(3)
    changes = load_weights(model, {"model": trained.state_dict()}, path, replace_head=True)
    assert changes == ["head: 4 classes in the checkpoint, 3 here: it starts anew"]
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 3)
