"""Compare discretization methods: train the same small VisionMamba with each, over several seeds.

    python scripts/study.py --preset demo                         # the paper's six methods, three seeds, output/demo
    python scripts/study.py --preset demo --methods all --seeds 0 1 2 3 4
    python scripts/study.py --output output/lr -- --lr 3e-3       # what follows -- goes to vim/main.py
    python scripts/study.py --task seg                            # segmentation; det: detection, of scenes of digits
    python scripts/study.py --task ops                            # no training: problems with known answers

Every run is one call of `vim.main.main` in a process of its own with one thread, as many at a time as there are cores
(seg, det: of their training with MMEngine; see scripts/study_dense.py).
Time and memory are measured afterwards, one process at a time. The output folder receives

    runs/METHOD-seedN/    log.txt, checkpoints, output.txt (what the trainer printed), result.json once it is finished
    timing/METHOD/        the same for the measurement of time and memory
    results.json table.md report.html *.png

A study can be killed at any moment: the same command goes on with what is missing, unfinished runs from their last
checkpoint. More methods or seeds may be asked for later; other settings are refused, for the runs would not compare.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import fcntl
import importlib.util
import json
import os
import platform
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import study_dense
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mamba_ssm.ops.discretization_ref import METHODS, PAPER_METHODS
from vim.provenance import available_cores, environment


class StudyError(Exception):
    """Something the caller can mend; the message says how."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """What a study trains. `trainer` are arguments of vim/main.py, the same for every run; of the tasks seg and det,
    options of their configuration, and `epochs` are updates."""

    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    epochs: int
    trainer: tuple[str, ...]
    task: str = "cls"


def _digits(lr: float, warmup_epochs: int, model: str) -> tuple[str, ...]:
    """The trainer's arguments for DIGITS on the CPU."""
    recipe = f"--unscale-lr --lr {lr:g} --batch-size 64 --warmup-epochs {warmup_epochs} --drop-path 0"
    return tuple(f"--device cpu --data-set DIGITS {recipe} --model-kwargs channels=1 {model}".split())


# `demo` takes minutes with the C++ kernels, several times longer on the PyTorch reference. `full` takes hours, and its
# recipe has not been tuned.
PRESETS = {
    "smoke": Preset(
        ("zoh", "bilinear"), (0, 1), 2, _digits(6e-3, 1, "depth=2 embed_dim=32 d_state=8 patch_size=4 stride=4")
    ),
    "demo": Preset(
        tuple(PAPER_METHODS), (0, 1, 2), 20, _digits(6e-3, 2, "depth=2 embed_dim=48 d_state=8 patch_size=2 stride=2")
    ),
    "full": Preset(
        tuple(METHODS), (0, 1, 2, 3, 4), 60, _digits(3e-3, 5, "depth=6 embed_dim=96 d_state=16 patch_size=2 stride=1")
    ),
}

PAPER = tuple(PAPER_METHODS)
DENSE_PRESETS = {
    task: {
        "smoke": Preset(("zoh", "bilinear"), (0,), 4, study_dense.smoke_options(task), task),
        "demo": Preset(PAPER, (0,), updates, (), task),
        "full": Preset(tuple(METHODS), (0, 1, 2), 4 * updates, (), task),
    }
    for task, updates in (("seg", 4000), ("det", 1500))
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One process: the trainer's arguments and the folder that receives its files and, at the end, result.json."""

    method: str
    seed: int
    epochs: int
    folder: Path
    argv: tuple[str, ...]
    measure: bool = False  # time and memory instead of accuracy: starts afresh, alone on the machine
    task: str = "cls"

    @property
    def name(self) -> str:
        return f"{self.method}, timing" if self.measure else f"{self.method}, seed {self.seed}"

    def result(self) -> dict[str, Any] | None:
        """The finished run's result, None where it has to run (again)."""
        path = self.folder / "result.json"
        return json.loads(path.read_text()) if path.exists() else None


def write_atomically(path: Path, text: str) -> None:
    """Write aside, sync, rename: `path` holds the whole text or what it held before."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


# ---- One run, in its own process ---------------------------------------------------------------------------------


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, in MiB.

    Not ru_maxrss where it can be avoided: on Linux that starts from the parent's memory at the time of the fork.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def exit_with_parent() -> None:
    """Blocks until the parent is gone (its end of our standard input closes), then ends this process at once.

    Otherwise a killed study would leave trainers behind, and its successor would share their folders with them.
    """
    os.read(0, 1)  # not sys.stdin.read: a thread inside it would abort the interpreter's shutdown
    os._exit(1)


def work(job_file: Path) -> None:
    """Run the job described in `job_file` and leave result.json in its folder."""
    threading.Thread(target=exit_with_parent, daemon=True).start()
    job = json.loads(job_file.read_text())
    folder = Path(job["folder"])

    import torch

    torch.set_num_threads(1)
    if job["task"] != "cls":
        before_mb = peak_memory_mb()
        result = {"method": job["method"], "seed": job["seed"], **study_dense.run_job(job)}
        memory = {"peak_memory_mb": peak_memory_mb(), "memory_before_mb": before_mb}
        write_atomically(folder / "result.json", json.dumps({**result, **memory, "environment": environment()}))
        return
    from vim.main import main, parse_args

    before_mb = peak_memory_mb()
    final = main(job["argv"])
    on_gpu = parse_args(job["argv"]).device.startswith("cuda")
    result = {
        "method": job["method"],
        "seed": job["seed"],
        "final": final,
        "history": [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()],
        "peak_memory_mb": final["peak_memory_mb"] if on_gpu else peak_memory_mb(),
        "memory_before_mb": 0.0 if on_gpu else before_mb,
        "environment": environment(),
    }
    if job["measure"]:
        result |= measure_inference(job["argv"])
    write_atomically(folder / "result.json", json.dumps(result, indent=1))


def measure_inference(argv: Sequence[str], repetitions: int = 6) -> dict[str, float]:
    """Images per second of the trainer's evaluation (the fastest), and how many images are held out."""
    import torch
    from rich.console import Console

    from vim.data import build_loader
    from vim.distributed import World
    from vim.engine import evaluate
    from vim.main import create_model, parse_args

    args = parse_args(argv)
    loader = build_loader(args, train=False, channels=args.model_kwargs.get("channels", 3))
    count = sum(len(labels) for _, labels in loader)
    world = World(torch.device(args.device))
    model = create_model(args, len(loader.classes)).to(world.device)
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        evaluate(model, loader, world=world, console=Console(quiet=True))  # ends with .item(), hence synchronized
        seconds.append(time.perf_counter() - start)
    return {"inference_images_per_s": count / min(seconds), "held_out_images": count}


# ---- The study -----------------------------------------------------------------------------------------------------


def training_jobs(output: Path, preset: Preset) -> list[Job]:
    """Seed by seed, so that a study stopped half-way still compares like with like."""
    jobs = []
    for seed in preset.seeds:
        for method in preset.methods:
            folder = output / "runs" / f"{method}-seed{seed}"
            if preset.task == "cls":
                argv = [*preset.trainer, "--epochs", str(preset.epochs), "--resume", "auto"]
                argv = _with_run(argv, method, seed, folder)
            else:
                argv = study_dense.training_argv(preset.task, preset.trainer, method, seed, preset.epochs, folder)
            jobs.append(Job(method, seed, preset.epochs, folder, tuple(argv), task=preset.task))
    return jobs


def timing_jobs(output: Path, preset: Preset, epochs: int = 6) -> list[Job]:
    jobs = []
    for method in preset.methods:
        folder = output / "timing" / method
        if preset.task == "cls":
            argv = _with_run([*preset.trainer, "--epochs", str(epochs)], method, 0, folder)
        else:
            argv = study_dense.training_argv(preset.task, preset.trainer, method, 0, epochs, folder)
            argv = study_dense.timing_argv(argv, epochs)
        jobs.append(Job(method, 0, epochs, folder, tuple(argv), measure=True, task=preset.task))
    return jobs


def _with_run(argv: Sequence[str], method: str, seed: int, folder: Path) -> tuple[str, ...]:
    return (*argv, "--discretization-method", method, "--seed", str(seed), "--output_dir", str(folder))


def start(job: Job) -> subprocess.Popen[bytes]:
    job.folder.mkdir(parents=True, exist_ok=True)
    if job.measure:
        for leftover in (*job.folder.glob("*.pth"), *job.folder.glob("log.txt"), *job.folder.glob("last_checkpoint")):
            leftover.unlink()
        for leftover in job.folder.glob("*/vis_data"):
            shutil.rmtree(leftover.parent)
    job_file = job.folder / "job.json"
    fields = {
        "method": job.method,
        "seed": job.seed,
        "measure": job.measure,
        "task": job.task,
        "folder": str(job.folder),
        "argv": job.argv,
    }
    write_atomically(job_file, json.dumps(fields, indent=1))
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with (job.folder / "output.txt").open("ab") as log:
        command = [sys.executable, str(Path(__file__).resolve()), "--work", str(job_file)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=os.environ | threads)


def run(jobs: Sequence[Job], workers: int, report: Callable[[Job], None], progress: Callable[[], None]) -> list[Job]:
    """Run `jobs`, `workers` at a time; `report` each that ends, call `progress` in between; return the failed ones."""
    queue, running, failed = deque(jobs), {}, []
    try:
        while queue or running:
            while queue and len(running) < workers:
                job = queue.popleft()
                running[start(job)] = job
            time.sleep(0.1)
            for process, job in list(running.items()):
                if process.poll() is not None:
                    del running[process]
                    if job.result() is None:
                        failed.append(job)
                    report(job)
            progress()
    finally:
        for process in running:
            process.kill()
            process.wait()
    return failed


@contextmanager
def exclusive(output: Path) -> Iterator[None]:
    """Hold the folder; the lock ends with this process, however that ends."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StudyError(f"another study is writing to '{output}'; wait for it or give another --output") from None
        yield


def check_settings(output: Path, preset: Preset) -> None:
    """Refuse to mix runs of different settings in one folder."""
    path = output / "settings.json"
    asked = {"epochs": preset.epochs, "trainer": list(preset.trainer)}
    if preset.task != "cls":
        asked["task"] = preset.task
    if not path.exists():
        write_atomically(path, json.dumps(asked, indent=1))
        return
    there = json.loads(path.read_text())
    if there != asked:
        raise StudyError(
            f"'{output}' holds a study with other settings.\n"
            f"  there: {_task_of(there)}--epochs {there['epochs']} -- {shlex.join(there['trainer'])}\n"
            f"  asked: {_task_of(asked)}--epochs {asked['epochs']} -- {shlex.join(asked['trainer'])}\n"
            "Give the same settings, another --output, or remove that folder."
        )


def _task_of(settings: dict[str, Any]) -> str:
    return f"--task {settings['task']} " if "task" in settings else ""


def collect(output: Path, preset: Preset, command: str) -> dict[str, Any]:
    """Everything the report needs, from the finished runs of the methods and seeds asked for; also results.json."""
    trained = [result for job in training_jobs(output, preset) if (result := job.result())]
    timed = {job.method: result for job in timing_jobs(output, preset) if (result := job.result())}
    methods = []
    for method in preset.methods:
        runs = [run for run in trained if run["method"] == method]
        accuracies = {str(run["seed"]): run["final"]["test_acc1"] for run in runs}
        row: dict[str, Any] = {"method": method, "accuracies": accuracies, **mean_and_std(list(accuracies.values()))}
        if runs:
            row["parameters"] = runs[0]["final"]["n_parameters"]
            for key in study_dense.METRICS.get(preset.task, ()):
                row[key] = statistics.fmean(run["final"][key] for run in runs)
        if timing := timed.get(method):
            # The fastest epoch, for whatever else the machine does only ever makes one slower.
            fastest = min(timing["history"], key=lambda epoch: epoch["epoch_time_s"])
            row["epoch_time_s"], row["images_per_s"] = fastest["epoch_time_s"], fastest["images_per_s"]
            for key in ("inference_images_per_s", "peak_memory_mb", "memory_before_mb"):
                row[key] = timing[key]
        methods.append(row)
    return {
        "task": preset.task,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "settings": {"epochs": preset.epochs, "trainer": shlex.join(preset.trainer), "seeds": list(preset.seeds)},
        "held_out_images": max((timing["held_out_images"] for timing in timed.values()), default=None),
        "environment": environment(),
        "methods": methods,
        "runs": trained,
    }


def mean_and_std(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation (n - 1); None where there are too few values."""
    return {
        "accuracy_mean": statistics.fmean(values) if values else None,
        "accuracy_std": statistics.stdev(values) if len(values) > 1 else None,
    }


# ---- Command line --------------------------------------------------------------------------------------------------

TASKS = ("cls", "seg", "det", "ops")


def split_task(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The task, and the arguments without it; what follows -- is the trainer's and not looked at."""
    end = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task", choices=TASKS, default="cls")
    args, rest = parser.parse_known_args(argv[:end])
    return args.task, [*rest, *argv[end:]]


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Preset]:
    own, trainer = list(argv), []
    if "--" in own:
        split = own.index("--")
        own, trainer = own[:split], own[split + 1 :]
    parser = argparse.ArgumentParser(
        description="Train a small VisionMamba with each discretization method, over several seeds, and compare.",
        epilog="Arguments after -- are added to those of vim/main.py; --task seg, det: KEY=VALUE of the configuration.",
    )
    parser.add_argument(
        "--task",
        choices=TASKS,
        default="cls",
        help="cls: classification; seg: segmentation; det: detection; ops: see --task ops --help",
    )
    parser.add_argument("--preset", choices=PRESETS, default="demo", help="model, epochs, methods and seeds")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help=f"'paper', 'all' or any of {', '.join(METHODS)}")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="one run per method and seed")
    parser.add_argument("--epochs", type=int, help="epochs of each run; --task seg, det: updates")
    parser.add_argument(
        "--output", type=Path, help="folder for runs and report (default output/PRESET, output/PRESET-TASK)"
    )
    parser.add_argument("--workers", type=int, default=available_cores(), help="runs at a time, one thread each")
    args = parser.parse_args(own)

    preset = PRESETS[args.preset] if args.task == "cls" else DENSE_PRESETS[args.task][args.preset]
    groups = {"paper": PAPER_METHODS, "all": METHODS}
    methods = [name for given in args.methods or preset.methods for name in groups.get(given, [given])]
    if unknown := [name for name in methods if name not in METHODS]:
        parser.error(f"--methods: unknown {', '.join(unknown)}; known are paper, all, {', '.join(METHODS)}")
    for name in ("epochs", "workers"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, not {value}")
    name = args.preset if args.task == "cls" else f"{args.preset}-{args.task}"
    args.output = (args.output or Path("output") / name).resolve()
    preset = dataclasses.replace(
        preset,
        methods=tuple(dict.fromkeys(methods)),
        seeds=tuple(dict.fromkeys(args.seeds or preset.seeds)),
        epochs=args.epochs or preset.epochs,
        trainer=(*preset.trainer, *trainer),
    )
    return args, preset


def check_trainer(output: Path, preset: Preset) -> None:
    """Refuse what the trainer would refuse in every run, and flags that the study sets itself."""
    if preset.task != "cls":
        return _check_dense(output, preset)
    from vim.main import ConfigError, parse_args

    argv = training_jobs(output, preset)[0].argv
    own = ("--discretization-method", "--epochs", "--eval", "--output-dir", "--output_dir", "--resume", "--seed")
    if clash := [word for word in preset.trainer if word.split("=")[0] in own]:
        raise StudyError(f"{', '.join(clash)} after --: the study decides that; see its own options")
    try:
        parse_args(argv)
    except ConfigError as error:
        raise StudyError(f"vim/main.py does not take these arguments: {error}") from error


def _check_dense(output: Path, preset: Preset) -> None:
    package = {"seg": "mmseg", "det": "mmdet"}[preset.task]
    if importlib.util.find_spec(package) is None:
        raise StudyError(f"--task {preset.task} needs {package}: scripts/install_mm.sh {preset.task} installs it")
    if wrong := [word for word in preset.trainer if "=" not in word]:
        raise StudyError(f"{', '.join(wrong)} after --: options of the configuration are KEY=VALUE")
    from vim.openmmlab.runs import RunError

    study_dense.prepare()
    try:
        study_dense.check(preset.task, training_jobs(output, preset)[0].argv)
    except RunError as error:
        raise StudyError(f"{study_dense.CONFIGS[preset.task]} does not take these options: {error}") from error


def study(args: argparse.Namespace, preset: Preset, command: str) -> int:
    """Run what is missing, then write and print the report. Returns the exit status."""
    import study_report

    console = Console(highlight=False)
    check_trainer(args.output, preset)
    check_settings(args.output, preset)
    failed = show(console, "training", training_jobs(args.output, preset), args.workers)
    failed += show(console, "timing", timing_jobs(args.output, preset), workers=1)

    results = collect(args.output, preset, command)
    results["failed"] = [job.name for job in failed]
    write_atomically(args.output / "results.json", json.dumps(results, indent=1))
    if preset.task != "cls":
        folders = {job.method: job.folder for job in training_jobs(args.output, preset) if job.seed == preset.seeds[0]}
        study_dense.overlays(preset.task, folders, args.output)
    study_report.write(results, args.output)
    study_report.print_table(results, console)
    if failed:
        console.print(f"{len(failed)} runs failed: {', '.join(results['failed'])}", style="red", soft_wrap=True)
    console.print(f"Report: {args.output / 'report.html'}", soft_wrap=True)
    return 1 if failed else 0


def show(console: Console, stage: str, jobs: Sequence[Job], workers: int) -> list[Job]:
    """`run` those of `jobs` that are not finished, with a progress bar and a line for each that ends."""
    missing = [job for job in jobs if job.result() is None]
    if len(missing) < len(jobs):
        console.print(f"{stage}: {len(jobs) - len(missing)} of {len(jobs)} runs are finished already")
    unit = "epochs" if jobs[0].task == "cls" else "updates"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(stage, total=sum(job.epochs for job in missing))

        def report(job: Job) -> None:
            result = job.result()
            if result is None:
                log = job.folder / "output.txt"
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                bar.console.print(f"{job.name}: FAILED; {log} ends with", style="red", soft_wrap=True)
                bar.console.print(tail, markup=False, soft_wrap=True)
            elif job.measure:
                what = "for the last epoch" if job.task == "cls" else "an update"
                bar.console.print(f"{job.name}: {result['final']['epoch_time_s']:.2f} s {what}")
            else:
                bar.console.print(f"{job.name}: {result['final']['test_acc1']:.2f} %")

        def progress() -> None:
            bar.update(task, completed=sum(epochs_done(job) for job in missing))

        return run(missing, workers, report, progress)


def epochs_done(job: Job) -> int:
    if job.task != "cls":
        return study_dense.updates_done(job.folder)
    log = job.folder / "log.txt"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--work"]:
        work(Path(argv[1]))
        return 0
    task, arguments = split_task(argv)
    if task == "ops":
        import study_ops

        return study_ops.main(arguments)
    args, preset = parse(argv)
    try:
        with exclusive(args.output):
            return study(args, preset, shlex.join(["python", "scripts/study.py", *argv]))
    except StudyError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("study: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
