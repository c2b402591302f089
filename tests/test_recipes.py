"""The recipes of vim/configs and the scripts that start them.

The scripts call `$PYTHON`: mostly a stand-in here, which writes down what it is asked to run; once the real one.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vim.checkpoint import load_checkpoint
from vim.config import parse_args
from vim.main import create_model, create_optimizer, create_scheduler

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "vim" / "configs").glob("*.yaml"))
SCRIPTS = sorted([*(ROOT / "scripts").glob("*.sh"), *(ROOT / "scripts" / "slurm").iterdir()])

# What was published: GPUs × batch, lr, drop path, weight decay, epochs, patches a side; top-1 and top-5 in percent.
PUBLISHED = {
    "pretrain_tiny": (128, 5e-4, 0.0, 0.1, 300, 14, "76.1 % top-1, 93.0 % top-5"),
    "pretrain_small": (64, 1e-3, 0.05, 0.05, 300, 14, "80.5 % top-1, 95.1 % top-5"),
    "pretrain_base": (64, 1e-3, 0.1, 0.05, 300, 14, "81.9 % top-1, 95.8 % top-5"),
    "finetune_tiny": (128, 5e-6, 0.0, 1e-8, 30, 27, "78.3 % top-1, 94.2 % top-5"),
    "finetune_small": (128, 5e-6, 0.0, 1e-8, 30, 27, "81.6 % top-1, 95.4 % top-5"),
}
PARAMETERS = {"tiny": 7.15e6, "small": 25.80e6, "base": 97.60e6}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_builds_its_model_optimizer_and_schedule(path):
    batch_size, lr, drop_path, weight_decay, epochs, side, result = PUBLISHED[path.stem]
    assert result in path.read_text()
    args = parse_args(["--config", str(path), "--discretization-method", "rk4", "--data-path", "/images"])
    assert (args.batch_size, args.lr, args.epochs) == (batch_size, lr, epochs)
    assert args.repeated_aug and args.dist_eval and args.discretization_method == "rk4"
    with torch.device("meta"):
        model = create_model(args, 1000)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx(PARAMETERS[args.model.removeprefix("vim_")], rel=0.02)
    assert model.patch_embed.grid_size == (side, side) and model.norm_f.drop_path == drop_path
    optimizer = create_optimizer(args, model, processes=8)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, weight_decay}
    scheduler = create_scheduler(args, optimizer, updates_per_epoch=10)

    def rate(epoch: float) -> float:
        scheduler.step_update(round(10 * epoch))
        return optimizer.param_groups[0]["lr"]

    peak = lr * 8 * batch_size / 512
    if "finetune" in path.stem:
        assert [rate(epoch) for epoch in (0, 3, 15, 29.9)] == pytest.approx([1e-5] * 4)
    else:
        assert rate(0) == pytest.approx(1e-6) and rate(5) == pytest.approx(peak, rel=1e-2)
        assert rate(150) < 0.6 * peak and rate(299.9) == pytest.approx(1e-5, rel=1e-2)


def test_every_published_row_has_its_recipe():
    assert {path.stem for path in CONFIGS} == set(PUBLISHED)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_valid_bash_and_executable(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""
    assert os.access(path, os.X_OK) or path.name in ("setup_env.sh", "launch.sh", "dist_train.sh")  # only sourced


# A stand-in for Python: passes the check of the flags, writes down what it runs and what signals it gets.
STAND_IN = """#!/usr/bin/env bash
if [[ "$1" == - ]]; then cat >"$RECORD/check.py"; shift; printf '%s\\n' "$@" >"$RECORD/checked"; exit; fi
for argument in "$@"; do
    if [[ "$previous" == --output_dir ]]; then mkdir -p "$argument" && echo '{"epoch": 0}' >"$argument/log.txt"; fi
    previous="$argument"
done
printf '%s ' "$@" >>"$RECORD/ran"; echo >>"$RECORD/ran"
if [[ -n "${LONG:-}" ]]; then
    trap 'echo TERM >>"$RECORD/signals"; exit 0' TERM
    trap 'echo USR1 >>"$RECORD/signals"; exit 0' USR1
    trap 'echo INT >>"$RECORD/signals"; exit 130' INT
    trap 'echo HUP >>"$RECORD/signals"; exit 129' HUP
    touch "$RECORD/started"
    while :; do sleep 0.05; done
fi
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Path:
    """The folder of its records."""
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    record = tmp_path / "record"
    record.mkdir()
    monkeypatch.setenv("PYTHON", str(python))
    monkeypatch.setenv("RECORD", str(record))
    monkeypatch.chdir(tmp_path)
    return record


def script(name: str, *argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([ROOT / "scripts" / name, *argv], capture_output=True, text=True, timeout=60)


def ran(record: Path) -> list[str]:
    return (record / "ran").read_text().splitlines()


CHECKPOINT_ARGV = {"finetune.sh": ["some.pth"], "eval.sh": ["some.pth"]}


@pytest.mark.parametrize("name", ["pretrain.sh", "finetune.sh", "eval.sh"])
def test_a_script_starts_the_trainer(stand_in, name):
    Path("some.pth").touch()
    argv = ["tiny", "bilinear", "4", *CHECKPOINT_ARGV.get(name, []), "--data-path", "/my images"]
    config = "finetune" if name == "finetune.sh" else "pretrain"
    assert script(name, *argv).returncode == 0
    (line,) = ran(stand_in)
    assert line.startswith("-m torch.distributed.run --standalone --nproc_per_node=4 -m vim.main --config vim/configs/")
    assert f"{config}_tiny.yaml" in line and line.endswith("--data-path /my images --discretization-method bilinear ")
    if name == "eval.sh":
        assert f"--eval --resume {Path('some.pth').absolute()}" in line and "--output_dir" not in line
    else:
        assert f"--output_dir output/{config}_tiny_bilinear --resume auto" in line
    if name == "finetune.sh":
        assert f"--finetune {Path('some.pth').absolute()}" in line
    assert script(name, "tiny", "zoh", "0", *argv[3:]).returncode == 0  # no GPU: one process on the CPU
    assert ran(stand_in)[1].startswith("-m vim.main --config") and ran(stand_in)[1].endswith("zoh --device cpu ")


@pytest.mark.parametrize("name", ["pretrain.sh", "finetune.sh", "eval.sh"])
def test_a_dry_run_prints_the_command_and_starts_nothing(stand_in, name):
    Path("some.pth").touch()
    argv = ["tiny", "zoh", "2", *CHECKPOINT_ARGV.get(name, []), "--data-path", "/my images"]
    result = script(name, "--dry-run", *argv)
    assert result.returncode == 0 and not (stand_in / "ran").exists()
    command = shlex.split(result.stdout)
    assert command[:3] == [os.environ["PYTHON"], "-m", "torch.distributed.run"] and "/my images" in command


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_command_in_a_recipes_header_starts_that_recipe(stand_in, path):
    (line,) = (line for line in path.read_text().splitlines() if line.startswith("# Command"))
    name, *argv = shlex.split(line.removeprefix("# Command").partition("(")[0])
    if "finetune" in name:
        Path(argv[3]).parent.mkdir(parents=True)
        Path(argv[3]).touch()
    result = script(name.removeprefix("scripts/"), "--dry-run", *argv)
    assert result.returncode == 0, result.stderr
    assert f"--config vim/configs/{path.name} " in result.stdout


@pytest.mark.parametrize(
    ("name", "argv", "said"),
    [
        ("pretrain.sh", [], "SIZE, METHOD and GPUS are needed"),
        ("pretrain.sh", ["huge", "zoh", "8"], "SIZE 'huge' is not one of: base small tiny"),
        ("pretrain.sh", ["../tiny", "zoh", "8"], "SIZE '../tiny' is not one of"),
        ("pretrain.sh", ["tiny", "zoh", "all"], "GPUS 'all' is not a number"),
        ("finetune.sh", ["base", "zoh", "8", "some.pth"], "SIZE 'base' is not one of: small tiny"),
        ("finetune.sh", ["tiny", "zoh", "8"], "SIZE, METHOD, GPUS and CHECKPOINT are needed"),
        ("finetune.sh", ["tiny", "zoh", "8", "none.pth"], "no checkpoint at '"),
        ("eval.sh", ["tiny", "zoh", "8", "none.pth"], "no checkpoint at '"),
        ("sweep.sh", ["vim/none.yaml", "1"], "no recipe at '"),
        ("sweep.sh", ["--seed", "1"], "unknown option --seed"),
        ("sweep.sh", ["--seeds", "0 one", str(CONFIGS[0]), "1"], "seed 'one' is not a number"),
        ("sweep.sh", ["--seeds"], "--seeds needs a value"),
    ],
)
def test_bad_arguments_start_nothing(stand_in, name, argv, said):
    result = script(name, *argv)
    assert result.returncode == 2 and said in result.stderr and f"usage: scripts/{name}" in result.stderr
    assert not list(stand_in.iterdir())


def test_the_trainers_own_parser_checks_the_flags_first(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHON", sys.executable)
    result = script("pretrain.sh", "tiny", "euler", "2", "--output_dir", str(tmp_path / "run"))
    assert result.returncode == 2 and "invalid choice: 'euler' (choose from" in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_digits_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.chdir(ROOT)
    flags = "--data-set DIGITS --input-size 8 --mixup 0 --cutmix 0 --no-repeated-aug --amp-dtype none --batch-size 256"
    model = "--model-kwargs channels=1 depth=1 embed_dim=16 d_state=4 patch_size=4 stride=4 --epochs 1"
    result = script("pretrain.sh", "tiny", "rk4", "0", *f"{flags} {model} --output_dir {tmp_path}/run".split())
    assert result.returncode == 0, result.stderr
    assert "epoch 0/1" in result.stdout
    args = load_checkpoint(tmp_path / "run" / "checkpoint.pth")["args"]
    assert args["discretization_method"] == "rk4" and args["weight_decay"] == 0.1  # the recipe's


# --- methods × seeds ---


def test_a_sweep_runs_every_method_with_every_seed(stand_in, tmp_path):
    argv = ["--methods", "zoh rk4", "--seeds", "0 7", "--output", "sweep", str(CONFIGS[0]), "1", "--epochs", "3"]
    result = script("sweep.sh", "--dry-run", *argv)
    assert result.returncode == 0 and len(result.stdout.splitlines()) == 4 and not (tmp_path / "sweep").exists()
    assert (stand_in / "checked").read_text().splitlines()[:3] == ["1", "1", "zoh rk4"]
    result = script("sweep.sh", *argv)
    assert result.returncode == 0, result.stderr
    runs = [(method, seed) for seed in (0, 7) for method in ("zoh", "rk4")]
    for line, (method, seed) in zip(ran(stand_in), runs, strict=True):
        assert f"--output_dir {tmp_path}/sweep/{method}-seed{seed} --seed {seed}" in line and "--resume auto" in line
        assert line.endswith(f"--epochs 3 --discretization-method {method} ")
    assert result.stdout.splitlines() == [f'{method}-seed{seed}  {{"epoch": 0}}' for method, seed in runs]


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"{path} was not made")
        time.sleep(0.02)


@pytest.mark.parametrize("gpus", ["0", "1"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_an_interrupted_sweep_lets_the_run_save_and_starts_no_other(stand_in, monkeypatch, number, gpus):
    monkeypatch.setenv("LONG", "1")
    command = [ROOT / "scripts" / "sweep.sh", "--methods", "zoh rk4", "--output", "sweep", str(CONFIGS[0]), gpus]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as sweep:
        wait_for(stand_in / "started", sweep)
        if number in (signal.SIGINT, signal.SIGHUP):
            os.killpg(sweep.pid, number)  # as a terminal does
        else:
            sweep.send_signal(number)
        said, _ = sweep.communicate(timeout=30)
    assert sweep.returncode == 0 and said == "sweep: interrupted; the same command goes on\n"
    assert (stand_in / "signals").read_text() == "TERM\n" and len(ran(stand_in)) == 1


def test_a_sweep_goes_on_after_a_run_that_failed_and_says_which(stand_in, tmp_path):
    python = tmp_path / "python"
    python.write_text(STAND_IN + 'if [[ "$*" == *seed0* ]]; then exit 3; fi\n')
    result = script("sweep.sh", "--methods", "zoh", "--seeds", "0 1", "--output", "sweep", str(CONFIGS[0]), "1")
    assert result.returncode == 1 and len(ran(stand_in)) == 2
    assert result.stderr == "sweep: failed: zoh-seed0 (status 3)\n"


# --- Slurm, by stand-ins for its programs ---

SLURM = {
    "srun": 'shift; exec "$@"',  # the first argument is an option of its own
    "scancel": 'echo "$@" >>"$RECORD/scancel"; kill -s "${1#--signal=}" $(cat "$RECORD/processes")',
    "scontrol": """case "$1 $2" in
        "show hostnames") printf 'node1\\nnode2\\n' ;;
        "show job") echo "JobId=$4 JobName=vim JobState=${STATE:-RUNNING} Reason=None" ;;
        *) echo "$@" >>"$RECORD/scontrol" ;;
    esac""",
}
# torchrun and below it a trainer that saves when it gets SIGUSR1.
TORCHRUN = """#!{python}
import os, pathlib, signal, subprocess, sys
record = pathlib.Path(os.environ["RECORD"])
if sys.argv[1] == "trainer":
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(record.joinpath("saved").touch()))
    record.joinpath("started").touch()
    while True:
        signal.pause()
trainer = subprocess.Popen([sys.argv[0], "trainer"])
record.joinpath("processes").write_text(f"{{os.getpid()}} {{trainer.pid}}")
sys.exit(trainer.wait())
"""


@pytest.fixture
def slurm(stand_in, tmp_path, monkeypatch) -> Path:
    for name, body in SLURM.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in {"JOB_ID": "123456", "JOB_NODELIST": "node[1-2]", "NNODES": "2", "GPUS_ON_NODE": "4"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.chdir(ROOT)
    return stand_in


SBATCH = ROOT / "scripts" / "slurm" / "train.sbatch"


def test_a_slurm_job_starts_torchrun_on_every_machine(slurm):
    result = subprocess.run([SBATCH, "--resume", "auto", "--epochs", "3"], capture_output=True, text=True, timeout=30)
    assert result.returncode == 0, result.stderr
    assert ran(slurm) == [
        "-m torch.distributed.run --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=node1:23456 "
        "--rdzv_id=123456 -m vim.main --resume auto --epochs 3 "
    ]
    assert not (slurm / "scontrol").exists()


def test_a_slurm_job_without_resume_is_refused(slurm):
    result = subprocess.run([SBATCH, "--epochs", "3"], capture_output=True, text=True, timeout=30)
    assert result.returncode == 2 and "without --resume auto a requeued job would start anew" in result.stderr
    assert not (slurm / "ran").exists()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_slurm_job_saves_and_is_requeued(slurm, tmp_path, number):
    """Slurm sends SIGUSR1 to the batch shell; on preemption SIGTERM, after having told the steps itself."""
    (tmp_path / "python").write_text(TORCHRUN.format(python=sys.executable))
    with subprocess.Popen([SBATCH, "--resume", "auto"], stdout=subprocess.PIPE, text=True) as job:
        wait_for(slurm / "started", job)
        job.send_signal(number)
        if number == signal.SIGTERM:
            for process in (slurm / "processes").read_text().split():
                os.kill(int(process), signal.SIGUSR1)
        said, _ = job.communicate(timeout=30)
    assert job.returncode == 0 and (slurm / "saved").exists()
    assert said == "train.sbatch: stopped with status 0; back into the queue\n"
    assert (slurm / "scontrol").read_text() == "requeue 123456\n"
    assert (slurm / "scancel").exists() == (number == signal.SIGUSR1)


def test_a_cancelled_slurm_job_is_not_requeued(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("STATE", "CANCELLED")
    (tmp_path / "python").write_text(TORCHRUN.format(python=sys.executable))
    with subprocess.Popen([SBATCH, "--resume", "auto"], stdout=subprocess.PIPE, text=True) as job:
        wait_for(slurm / "started", job)
        job.send_signal(signal.SIGTERM)
        for process in (slurm / "processes").read_text().split():
            os.kill(int(process), signal.SIGUSR1)
        said, _ = job.communicate(timeout=30)
    assert job.returncode == 0 and (slurm / "saved").exists()
    assert said == "train.sbatch: stopped with status 0; cancelled, so it is not requeued\n"
    assert not (slurm / "scontrol").exists()
