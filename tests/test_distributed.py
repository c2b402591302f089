"""Several processes (gloo, on the CPU) do what one does with as many images per update."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from trainer_runs import DIGITS, FOLDER_TOY, TOY, VIM, assert_same_run, digit_folder, read_log

from vim.checkpoint import CheckpointError, load_checkpoint
from vim.config import ConfigError
from vim.distributed import World, join
from vim.main import main

WORKER = Path(__file__).with_name("distributed_worker.py")
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
# No dropped paths: each process draws its own.
SAME = [*DIGITS, "--epochs", "2", "--warmup-epochs", "1", "--lr", "2e-3", "--unscale-lr", "--drop-path", "0"]
STATEFUL = [*TOY, *DIGITS, "--epochs", "2", "--batch-size", "64", "--mixup", "0.4", "--model-ema", "--output_dir"]


def results(folder: Path, processes: int, jobs: list[dict]) -> list[list[dict]]:
    """For every process, what became of each job."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [str(WORKER), str(folder), str(folder / "jobs.json")]
    launch = [sys.executable] if processes == 1 else [*LAUNCH, str(processes)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*launch, *command], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def two(folder) -> dict[str, tuple[dict, dict]]:
    """All jobs of two processes, by name; per job the results of both."""
    jobs = {
        "two": [*VIM, *SAME, "--batch-size", "32", "--dist-eval"],
        "accumulated": [*VIM, *SAME, "--batch-size", "16", "--grad-accum-steps", "2", "--output_dir", "accumulated"],
        "whole": [*STATEFUL, "whole"],
        "stopped": {"flags": [*STATEFUL, "broken", "--checkpoint-steps", "4"], "signal": [1, 14]},
        "resumed": [*STATEFUL, "broken", "--resume", "auto"],
        "nan": {"flags": [*STATEFUL, "nan"], "nan": [1, 5]},
        "skipped": {"flags": [*STATEFUL, "skipped", "--if_continue_inf"], "nan": [1, 5]},
        "world size": [*TOY, *DIGITS, "--world_size", "3"],
    }
    for name, job in jobs.items():
        jobs[name] = job = job if isinstance(job, dict) else {"flags": job}
        flags = job["flags"]
        if "--output_dir" in flags:
            place = flags.index("--output_dir") + 1
            flags[place] = str(folder / flags[place])
        # A meeting place for each job: torchrun's own serves one meeting per start.
        flags += ["--dist_url", f"file://{folder}/meeting for {name}"]
    by_process = results(folder, 2, list(jobs.values()))
    return dict(zip(jobs, zip(*by_process, strict=True), strict=True))


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> dict:
    """The job "two", done by one process with twice the batch."""
    return results(tmp_path_factory.mktemp("one"), 1, [{"flags": [*VIM, *SAME, "--batch-size", "64"]}])[0][0]


@pytest.mark.parametrize("job", ["two", "accumulated"])
def test_two_processes_are_one_with_twice_the_batch(two, one, job):
    assert len(one["losses"]) == 44 and one["losses"][-1] < one["losses"][0] - 0.2  # 22 updates per epoch; it learns
    for result in two[job]:
        assert result["losses"] == pytest.approx(one["losses"], abs=1e-5)
        assert result["record"]["train_loss"] == pytest.approx(one["record"]["train_loss"], abs=1e-5)
        assert result["record"]["test_loss"] == pytest.approx(one["record"]["test_loss"], abs=1e-5)
        for name in ("test_acc1", "test_acc5", "train_lr", "n_parameters"):
            assert result["record"][name] == one["record"][name]


def test_all_processes_agree(two):
    for job in ("two", "accumulated", "whole", "resumed"):
        first, second = (
            {name: value for name, value in result["record"].items() if name.startswith(("test", "train", "ema"))}
            for result in two[job]
        )
        assert first == second and two[job][0]["losses"] == two[job][1]["losses"]


def test_only_the_first_process_writes(two, folder):
    assert [record["epoch"] for record in read_log(folder / "accumulated")] == [0, 1]
    assert len(load_checkpoint(folder / "whole" / "checkpoint.pth")["rng"]) == 2
    seeds = [state["torch"] for state in load_checkpoint(folder / "whole" / "checkpoint.pth")["rng"]]
    assert not torch.equal(*seeds)


def test_a_signal_to_one_process_stops_all_and_the_resumed_run_is_the_unbroken_one(two, folder):
    for result in two["stopped"]:
        assert result["error"] == "Stopped: epoch 1, step 3 of 11"
    assert_same_run(folder / "broken", folder / "whole")
    stopped, resumed, whole = (two[name][0]["losses"] for name in ("stopped", "resumed", "whole"))
    assert stopped + resumed == whole


def test_one_process_goes_on_with_the_run_of_two(two, folder, tmp_path, capsys):
    output = shutil.copytree(folder / "whole", tmp_path / "run")
    flags = [*STATEFUL, str(output), "--resume", "auto", "--epochs", "3"]
    main([*flags, "--batch-size", "128"])
    assert "is of 2 processes, now there are 1: random numbers start anew" in capsys.readouterr().out
    assert [record["epoch"] for record in read_log(output)] == [0, 1, 2]
    with pytest.raises(CheckpointError, match="images per update: 128 in the checkpoint, 64 now"):
        main([*flags, "--batch-size", "64"])


def test_a_loss_that_is_not_finite_on_one_process_ends_all(two, folder):
    errors = [result["error"] for result in two["nan"]]
    assert errors[0] == "NonFiniteLossError: the loss is not finite in another process, which says where"
    assert "the loss is nan in epoch 0, batch 4 of 11: the images themselves are not finite" in errors[1]
    assert not (folder / "nan" / "checkpoint.pth").exists()


def test_or_is_skipped_by_all(two):
    for result in two["skipped"]:
        assert math.isnan(result["losses"][4]) and sum(map(math.isnan, result["losses"])) == 1
        assert math.isfinite(result["record"]["test_loss"])


def test_the_number_of_processes_is_checked(two):
    for result in two["world size"]:
        assert result["error"].startswith("ConfigError: --world_size 3, but 2 were started")


def test_a_signal_to_torchrun_saves(tmp_path):
    """It passes the signal on to every trainer and to every process that reads images for it."""
    data, output = digit_folder(tmp_path / "data"), tmp_path / "run"
    flags = [*FOLDER_TOY, "--data-path", str(data), "--num_workers", "1", "--batch-size", "16", "--output_dir"]
    command = [*LAUNCH, "2", "-m", "vim.main", *flags, str(output), "--epochs", "1000", "--resume", "auto"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while not (output / "log.txt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=60)
    assert said.count("stopped by a signal at") == 2 and "error" not in errors.replace(
        "elastic/multiprocessing/err", ""
    )
    position = load_checkpoint(output / "checkpoint.pth")["position"]
    assert f"at epoch {position['epoch']}, step {position['step']} of 3" in said


# --- by themselves ---


def test_one_process_needs_no_start():
    with join("cpu", "env://", None) as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert world.sum([1, 2.5]) == [1.0, 2.5] and world.gather("x") == ["x"]
        model = torch.nn.Linear(1, 1)
        assert world.parallel(model) is model


def test_meeting_at_another_url(tmp_path):
    """Without torchrun: the environment says who one is, --dist_url where the others are."""
    script = (
        "import sys; from vim.distributed import join\n"
        f"with join('cpu', 'file://{tmp_path}/meeting', 2) as world: print(world.sum([world.rank + 1]))"
    )
    environments = [{**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]
    processes = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
        for environment in environments
    ]
    assert [process.communicate(timeout=120)[0].strip() for process in processes] == ["[3.0]"] * 2


@pytest.mark.parametrize(
    ("environment", "device", "said"),
    [
        ({"RANK": "0", "WORLD_SIZE": "two"}, "cpu", "must be numbers: .*'two'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "cuda:1", "--device cuda:1 with 2 processes: use --device cuda"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "cuda", "process 1 of this machine has no GPU"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": ""}, "cpu", "process 0 of 2 cannot meet the others at env://"),
    ],
)
def test_what_does_not_fit_is_named(environment, device, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if not environment.get("MASTER_ADDR"):
        monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match=said), join(device, "env://", None):
        pass


def test_a_world_is_what_a_process_sees():
    assert World(torch.device("cpu"), rank=1, size=2).is_main is False
