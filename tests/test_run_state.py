"""What a run keeps: which checkpoints it may go on from, its random numbers, and its answer to signals."""

import argparse
import os
import random
import signal
import threading

import numpy as np
import pytest
import torch

from vim.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from vim.run_state import Wishes, check_same_architecture, check_same_run, rng_state, set_rng_state

CPU = torch.device("cpu")
PARTS = {"model": {}, "optimizer": {}, "epoch": 0, "position": {}, "rng": [], "best_acc1": 0.0, "images_per_update": 64}


def refusal(check, *args) -> str:
    with pytest.raises(CheckpointError) as caught:
        check(*args, "run.pth")
    return str(caught.value)


def test_a_resumed_run_may_last_longer_but_not_learn_otherwise():
    stored = {**PARTS, "args": {"lr": 0.1, "epochs": 3, "seed": 1, "data_path": "/there"}}
    check_same_run(stored, {"lr": 0.1, "epochs": 5, "seed": 1, "data_path": "/here", "new_flag": 1}, 64, "run.pth")
    said = refusal(check_same_run, stored, {"lr": 0.2, "epochs": 3, "seed": 1, "data_path": "/there"}, 64)
    assert said == "run.pth belongs to a run with other settings:\n  lr: 0.1 in the checkpoint, 0.2 now"
    assert "images per update: 64 in the checkpoint, 32 now" in refusal(check_same_run, stored, {"lr": 0.1}, 32)


def test_weights_alone_cannot_be_resumed():
    said = refusal(check_same_run, {"model": {}}, {}, 64)
    assert "has no optimizer, epoch, position, args, rng, best_acc1, images_per_update" in said and "--finetune" in said


def architecture(**changes) -> dict:
    return {"model": "vim_tiny", "model_kwargs": {"depth": 2}, "discretization_method": "zoh", **changes}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"discretization_method": "bilinear"}, "discretization_method: 'zoh' in the checkpoint, 'bilinear' now"),
        ({"model_kwargs": {"depth": 3}}, "model_kwargs: {'depth': 2} in the checkpoint, {'depth': 3} now"),
        ({"model": "resnet18"}, "model: 'vim_tiny' in the checkpoint, 'resnet18' now"),
    ],
)
def test_another_architecture_is_named(changes, said):
    now = architecture(**changes)
    assert refusal(check_same_architecture, {"args": architecture()}, now).splitlines()[1:] == [f"  {said}"]


@pytest.mark.parametrize(
    ("stored", "now"),
    [
        ({"args": architecture()}, architecture(model_kwargs={"depth": 2, "stride": 8})),
        ({"args": architecture(model="vim_small")}, architecture()),  # sizes show in the shapes
        ({"args": argparse.Namespace(model="something", lr=1e-3)}, architecture(discretization_method="rk4")),
        ({}, architecture()),
    ],
)
def test_what_is_resampled_or_unknown_may_differ(stored, now):
    check_same_architecture(stored, now, "run.pth")


def test_random_generators_go_on_where_they_were(tmp_path):
    def draw():
        return random.random(), np.random.normal(), torch.rand(3).tolist(), random.gauss(0, 1)

    np.random.normal()  # leaves a second normal number waiting: part of the state
    save_checkpoint(tmp_path / "run.pth", {"rng": rng_state(CPU)})
    expected = draw()
    assert draw() != expected
    set_rng_state(load_checkpoint(tmp_path / "run.pth")["rng"], CPU)
    assert draw() == expected


@pytest.mark.parametrize("number", Wishes.SIGNALS)
def test_signals_are_wishes_while_listening(number):
    heard = []
    before = signal.signal(number, lambda *_: heard.append(number))
    try:
        wishes = Wishes(None)
        with wishes.listening():
            assert wishes() == (False, False)
            for _ in range(2):  # launchers send more than one
                os.kill(os.getpid(), number)
                assert wishes() == (True, False)
        assert heard == []
        os.kill(os.getpid(), number)
        assert heard == [number]
    finally:
        signal.signal(number, before)


def test_threads_do_not_listen():
    """Only the main thread may set handlers; a trainer in another one must still run."""
    ran = []

    def run():
        with Wishes(None).listening():
            ran.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert ran == [signal.getsignal(signal.SIGTERM)]


def test_saving_is_due_after_the_interval():
    wishes = Wishes(save_every_minutes=10)
    assert wishes() == (False, False)
    wishes.saved_at -= 601
    assert wishes() == (False, True)
    wishes.saved()
    assert wishes() == (False, False)
