"""Checkpoints: no failure costs the previous one, no file runs code, every misfit is named."""

import argparse
import os
import random
import signal

import numpy as np
import pytest
import torch
from torch import nn

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
    check_same_architecture(checkpoint, {"model": "vim_tiny", "model_kwargs": {}}, path)
    other = nn.Linear(4, 3)
    load_model(other, model_state(checkpoint, path), path)
    assert torch.equal(other.weight, model.weight)


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


def test_other_architecture_is_named(path):
    stored = {"args": {"model": "vim_tiny", "model_kwargs": {"depth": 2}, "discretization_method": "zoh"}}
    now = {"model": "vim_tiny", "model_kwargs": {"depth": 3}, "discretization_method": "bilinear"}
    with pytest.raises(CheckpointError) as caught:
        check_same_architecture(stored, now, path)
    assert "model_kwargs: {'depth': 2} in the checkpoint, {'depth': 3} now" in str(caught.value)
    assert "discretization_method: 'zoh' in the checkpoint, 'bilinear' now" in str(caught.value)
    assert "model:" not in str(caught.value)


def test_a_resumed_run_may_last_longer_but_not_learn_otherwise(path):
    stored = {"model": {}, "optimizer": {}, "epoch": 0, "rng": {}, "best_acc1": 0.0}
    stored["args"] = {"lr": 0.1, "epochs": 3, "seed": 1, "data_path": "/there"}
    check_same_run(stored, {"lr": 0.1, "epochs": 5, "seed": 1, "data_path": "/here", "new_flag": 1}, path)
    with pytest.raises(CheckpointError, match=r"(?s)other settings:\n  lr: 0.1 in the checkpoint, 0.2 now$"):
        check_same_run(stored, {"lr": 0.2, "epochs": 3, "seed": 1, "data_path": "/there"}, path)


def test_weights_alone_cannot_be_resumed(path):
    with pytest.raises(CheckpointError, match="has no optimizer, epoch, args, rng, best_acc1"):
        check_same_run({"model": {}}, {}, path)


def test_random_generators_go_on_where_they_were(path):
    def draw():
        return random.random(), np.random.normal(), torch.rand(3).tolist(), random.gauss(0, 1)

    np.random.normal()  # leaves a second normal number waiting: part of the state
    save_checkpoint(path, {"rng": rng_state()})
    expected = draw()
    assert draw() != expected
    set_rng_state(load_checkpoint(path)["rng"])
    assert draw() == expected
