"""`python -m vim.convert`: what a stripped checkpoint keeps, and what is said when it cannot be made."""

import json
import re

import pytest
import safetensors
import timm
import torch

from vim.checkpoint import load_checkpoint, load_weights, save_checkpoint
from vim.convert import main

SMALL = {"img_size": 32, "depth": 2, "embed_dim": 16, "d_state": 4, "num_classes": 3}


@pytest.fixture
def trained():
    return timm.create_model("vim_tiny", **SMALL)


@pytest.fixture
def checkpoint(trained, tmp_path):
    """A checkpoint as the trainer writes it, with moving averages that are the weights plus one."""
    path = tmp_path / "checkpoint.pth"
    kwargs = {name: SMALL[name] for name in ("depth", "embed_dim", "d_state")}
    args = {"model": "vim_tiny", "model_kwargs": kwargs, "discretization_method": "rk4", "input_size": (32, 32)}
    state = {
        "model": trained.state_dict(),
        "model_ema": {key: value + 1 for key, value in trained.state_dict().items()},
        "optimizer": torch.optim.AdamW(trained.parameters()).state_dict(),
        "epoch": 7,
        "args": {**args, "data_path": "/home/someone/imagenet", "lr": 1e-3},
    }
    save_checkpoint(path, state)
    return path


@pytest.mark.parametrize("name", ["vim.safetensors", "vim.pth"])
@pytest.mark.parametrize("ema", [False, True])
def test_weights_are_kept_and_the_rest_is_stripped(checkpoint, trained, tmp_path, capsys, name, ema):
    target = tmp_path / name
    assert main([str(checkpoint), str(target), *(["--ema"] if ema else [])]) == 0
    assert f"{name}: {len(trained.state_dict())} tensors" in capsys.readouterr().out
    converted = load_checkpoint(target)
    assert set(converted) == {"model", "args"}
    assert set(converted["args"]) == {"model", "model_kwargs", "discretization_method", "input_size", "epoch"}
    model = timm.create_model("vim_tiny", **SMALL)
    assert load_weights(model, converted, target) == []
    for key, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[key], value + ema)


def test_there_and_back(checkpoint, trained, tmp_path):
    there, back = tmp_path / "vim.safetensors", tmp_path / "vim.pth"
    assert main([str(checkpoint), str(there)]) == main([str(there), str(back)]) == 0
    state = load_checkpoint(back)["model"]
    assert all(torch.equal(state[key], value) for key, value in trained.state_dict().items())
    assert load_checkpoint(back)["args"] == load_checkpoint(there)["args"]


def test_metadata_can_be_read_by_others_and_timm_loads_the_file(checkpoint, trained, tmp_path):
    target = tmp_path / "vim.safetensors"
    main([str(checkpoint), str(target)])
    with safetensors.safe_open(target, framework="np") as file:
        metadata = file.metadata()
    assert json.loads(metadata["discretization_method"]) == "rk4" and json.loads(metadata["epoch"]) == 7
    assert json.loads(metadata["model"]) == "vim_tiny" and "someone" not in str(metadata)
    model = timm.create_model("vim_tiny", checkpoint_path=str(target), **SMALL)
    assert torch.equal(model.head.weight, trained.head.weight)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["absent.pth", "vim.safetensors"], "no checkpoint at absent.pth"),
        (["checkpoint.pth", "vim.onnx"], "cannot write vim.onnx: its name must end in .safetensors or .pth"),
        (["checkpoint.pth", "nowhere/vim.pth"], "cannot write nowhere/vim.pth: .*No such file"),
        (["bare.pth", "vim.pth", "--ema"], "bare.pth has no model_ema"),
        (["other.pth", "vim.pth"], "other.pth has no model weights"),
    ],
)
def test_errors(checkpoint, tmp_path, monkeypatch, capsys, argv, said):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.zeros(1)}, "bare.pth")
    torch.save({"epoch": 3}, "other.pth")
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("vim.convert: error: ") and captured.out == ""
    assert re.search(said, captured.err)
