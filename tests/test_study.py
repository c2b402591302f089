"""scripts/study.py and scripts/study_report.py: planning, refusal, resumption after kill -9, tables, plots, report."""

import dataclasses
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mamba_ssm.ops.discretization_ref import METHODS, PAPER_METHODS
from vim.main import parse_args

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture(autouse=True)
def scripts_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture
def study():
    import study

    return study


@pytest.fixture
def report():
    import study_report

    return study_report


def make_results(accuracies: dict[str, dict[str, float]]) -> dict:
    """Results as `study.collect` makes them, with two epochs per run."""
    import study

    environment = {"revision": "0123abc", "python": "3", "packages": {}, "system": "s", "cpu": "a <cpu>", "cores": 2}
    methods, runs = [], []
    for i, (method, by_seed) in enumerate(accuracies.items()):
        timing = {"epoch_time_s": 1.5 + i, "images_per_s": 1000.0, "inference_images_per_s": 4321.0}
        memory = {"peak_memory_mb": 512.0, "memory_before_mb": 300.0}
        row = {"method": method, "accuracies": by_seed, **study.mean_and_std(list(by_seed.values()))}
        methods.append({**row, "parameters": 12345, **timing, **memory})
        for seed, accuracy in by_seed.items():
            history = [{"train_loss": 2.0, "test_acc1": 50.0}, {"train_loss": 0.1, "test_acc1": accuracy}]
            runs.append({"method": method, "seed": int(seed), "history": history, "environment": environment})
    return {
        "created": "2026-01-01T00:00:00+00:00",
        "command": "python scripts/study.py --output 'a & b'",
        "settings": {"epochs": 2, "trainer": "--data-set DIGITS", "seeds": [0, 1, 2]},
        "held_out_images": 360,
        "environment": environment,
        "methods": methods,
        "runs": runs,
        "failed": [],
    }


EPOCHS = 12
ARGUMENTS = ["--preset", "smoke", "--methods", "bilinear", "--seeds", "0", "--epochs", str(EPOCHS)]

TWO_METHODS = {"zoh": {"0": 98.0, "1": 97.0, "2": 99.0}, "rk4": {"0": 98.5, "1": 97.25, "2": 99.5}}


# ---- Planning ------------------------------------------------------------------------------------------------------


def test_default_is_the_paper_with_three_seeds(study):
    args, preset = study.parse([])
    assert preset.methods == tuple(PAPER_METHODS)
    assert preset.seeds == (0, 1, 2)
    assert args.output == Path("output/demo").resolve()


@pytest.mark.parametrize("name", ["smoke", "demo", "full"])
def test_the_trainer_accepts_every_job(study, tmp_path, name):
    preset = study.PRESETS[name]
    jobs = study.training_jobs(tmp_path, preset) + study.timing_jobs(tmp_path, preset)
    assert len({job.folder for job in jobs}) == len(preset.methods) * (len(preset.seeds) + 1)
    for job in jobs:
        args = parse_args(job.argv)
        assert (args.discretization_method, args.seed, args.epochs) == (job.method, job.seed, job.epochs)
        assert Path(args.output_dir) == job.folder
        assert args.data_set == "DIGITS"


def test_choices_from_the_command_line(study):
    argv = ["--preset", "smoke", "--methods", "all", "--seeds", "7", "7", "3", "--epochs", "5", "--", "--lr", "1e-4"]
    _, preset = study.parse(argv)
    assert preset.methods == tuple(METHODS)
    assert preset.seeds == (7, 3)
    assert preset.epochs == 5
    assert preset.trainer == (*study.PRESETS["smoke"].trainer, "--lr", "1e-4")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--methods", "all", "euler"], "unknown euler; known are paper, all, zoh, foh"),
        (["--epochs", "0"], "--epochs must be at least 1, not 0"),
        (["--workers", "0"], "--workers must be at least 1, not 0"),
    ],
)
def test_bad_arguments_are_named(study, capsys, argv, message):
    with pytest.raises(SystemExit) as stopped:
        study.parse(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_other_settings_are_refused_in_the_same_folder(study, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "study", lambda args, preset, command: study.check_settings(args.output, preset))
    base = ["--preset", "smoke", "--output", str(tmp_path)]
    assert not study.main(base)
    assert not study.main([*base, "--methods", "all", "--seeds", "5"])  # more of the same is welcome
    assert study.main([*base, "--epochs", "9"]) == 2
    message = capsys.readouterr().err
    assert "other settings" in message and "--epochs 9" in message and "--output" in message
    assert study.main([*base, "--", "--lr", "1"]) == 2
    assert not study.main(base)  # the refusals left no trace


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (["--lrr", "1"], "unrecognized arguments: --lrr 1"),
        (["--opt", "nonsense"], "--opt nonsense is not known"),
        (["--epochs", "3", "--seed=4"], "--epochs, --seed=4 after --: the study decides that"),
    ],
)
def test_trainer_arguments_are_checked_before_anything_is_written(study, tmp_path, capsys, trainer, message):
    assert study.main(["--preset", "smoke", "--output", str(tmp_path), "--", *trainer]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_folder_in_use_is_refused(study, tmp_path, capsys):
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert study.main(["--preset", "smoke", "--output", str(tmp_path)]) == 2
    assert "another study is writing" in capsys.readouterr().err


def test_peak_memory_follows_an_allocation():
    code = (
        "import study; before = study.peak_memory_mb(); block = bytearray(b'1') * (200 << 20); "
        "del block; print(study.peak_memory_mb() - before)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=SCRIPTS, capture_output=True, text=True, check=True
    ).stdout
    assert 150 < float(output) < 300


# ---- Running -------------------------------------------------------------------------------------------------------


def fake_start(study, monkeypatch, code: str) -> list:
    """Replace the trainer by `code`, which sees the job's folder as `folder` and its method as `method`."""
    started = []

    def start(job):
        started.append(job)
        job.folder.mkdir(parents=True, exist_ok=True)
        prefix = f"import sys, time, pathlib; folder = pathlib.Path({str(job.folder)!r}); method = {job.method!r}\n"
        with (job.folder / "output.txt").open("ab") as log:
            return subprocess.Popen([sys.executable, "-c", prefix + code], stdout=log, stderr=log)

    monkeypatch.setattr(study, "start", start)
    return started


def test_failed_runs_are_reported_and_only_they_run_again(study, tmp_path, monkeypatch):
    preset = dataclasses.replace(study.PRESETS["smoke"], seeds=(0,))
    jobs = study.training_jobs(tmp_path, preset)
    code = "sys.exit('boom [red]') if method == 'bilinear' else (folder / 'result.json').write_text('{}')"
    fake_start(study, monkeypatch, code)
    reported = []
    failed = study.run(jobs, 2, reported.append, lambda: None)
    assert [job.method for job in failed] == ["bilinear"]
    assert sorted(job.method for job in reported) == ["bilinear", "zoh"]

    started = fake_start(study, monkeypatch, "sys.exit('boom [red]')")
    console = Console(record=True, width=200, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    assert study.show(console, "training", jobs, 2) == failed
    assert started == failed
    text = console.export_text()
    assert "1 of 2 runs are finished already" in text
    assert "bilinear, seed 0: FAILED" in text and "boom [red]" in text


def test_no_more_workers_than_asked(study, tmp_path, monkeypatch):
    jobs = study.training_jobs(tmp_path, dataclasses.replace(study.PRESETS["smoke"], seeds=(0, 1)))
    fake_start(study, monkeypatch, "time.sleep(0.3); (folder / 'result.json').write_text('{}')")
    begin = study.start
    alive, most = [], 0

    def start(job):
        nonlocal most
        process = begin(job)
        alive.append(process)
        most = max(most, sum(other.poll() is None for other in alive))
        return process

    monkeypatch.setattr(study, "start", start)
    assert study.run(jobs, 2, lambda job: None, lambda: None) == []
    assert len(alive) == 4 and most == 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A real study of one method, killed (-9) while it trained and then called again; facts noted on the way."""
    output = tmp_path_factory.mktemp("study")
    command = [sys.executable, str(SCRIPTS / "study.py"), *ARGUMENTS, "--output", str(output)]
    folder = output / "runs" / "bilinear-seed0"

    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 300
    while not (folder / "checkpoint.pth").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    printed = process.communicate()[0].decode()
    assert (folder / "checkpoint.pth").exists(), printed
    time.sleep(0.5)  # for the worker to notice
    epochs = (folder / "log.txt").read_text().count("\n")
    time.sleep(1.0)
    facts = {"epochs_when_killed": epochs, "epochs_later": (folder / "log.txt").read_text().count("\n")}
    assert not (folder / "result.json").exists()

    again = subprocess.run(command, capture_output=True, text=True, timeout=400)
    return output, facts | {"status": again.returncode, "printed": again.stdout, "errors": again.stderr}


def test_a_killed_study_leaves_no_worker_behind(finished):
    _, facts = finished
    assert facts["epochs_later"] == facts["epochs_when_killed"] < EPOCHS


def test_a_killed_study_goes_on(finished):
    output, facts = finished
    assert facts["status"] == 0, facts["printed"] + facts["errors"]
    assert "resumed from" in (output / "runs" / "bilinear-seed0" / "output.txt").read_text()
    history = json.loads((output / "runs" / "bilinear-seed0" / "result.json").read_text())["history"]
    assert [epoch["epoch"] for epoch in history] == list(range(EPOCHS))


def test_workers_end_in_peace(finished):
    output, _ = finished
    logs = [path.read_text() for path in output.rglob("output.txt")]
    assert len(logs) == 2
    assert not any("Fatal" in log or "Traceback" in log for log in logs)


def test_results_of_a_real_study(finished):
    output, facts = finished
    results = json.loads((output / "results.json").read_text())
    assert [row["method"] for row in results["methods"]] == ["bilinear"]
    assert results["failed"] == [] and results["held_out_images"] == 360
    for row in results["methods"]:
        assert 10 < row["accuracy_mean"] <= 100 and row["accuracy_std"] is None
        assert row["parameters"] > 1000
        assert row["epoch_time_s"] > 0 and row["images_per_s"] > 0 and row["inference_images_per_s"] > 0
        assert row["peak_memory_mb"] > row["memory_before_mb"] > 50
        assert row["method"] in facts["printed"]
    assert results["environment"]["packages"]["torch"]
    assert facts["printed"].rstrip().endswith("report.html")
    for name in ("table.md", "report.html", "accuracy_cost.png", "curves.png", "coefficients.png", "stability.png"):
        assert (output / name).stat().st_size > 100, name


def test_nothing_runs_twice(finished, study, monkeypatch):
    output, _ = finished
    monkeypatch.setattr(study, "start", lambda job: pytest.fail(f"{job.name} was started again"))
    assert study.main([*ARGUMENTS, "--output", str(output)]) == 0


def test_timing_starts_afresh(finished, study, tmp_path):
    """What an interrupted measurement left would otherwise be resumed, or refused by the trainer."""
    output, _ = finished
    (job,) = study.timing_jobs(output, study.parse(ARGUMENTS)[1])
    folder = tmp_path / "timing"
    shutil.copytree(job.folder, folder)
    (folder / "result.json").unlink()
    assert (folder / "checkpoint.pth").exists() and (folder / "log.txt").exists()
    process = study.start(dataclasses.replace(job, folder=folder))
    process.kill()
    process.wait()
    assert not (folder / "checkpoint.pth").exists() and not (folder / "log.txt").exists()


# ---- Tables --------------------------------------------------------------------------------------------------------


def test_mean_and_sample_standard_deviation(study):
    assert study.mean_and_std([97.0, 98.0, 99.0]) == {"accuracy_mean": 98.0, "accuracy_std": 1.0}
    assert study.mean_and_std([97.0]) == {"accuracy_mean": 97.0, "accuracy_std": None}
    assert study.mean_and_std([]) == {"accuracy_mean": None, "accuracy_std": None}


def test_markdown_table(report):
    lines = report.markdown_table(make_results(TWO_METHODS)).splitlines()
    assert lines[0].startswith("| method | accuracy % | seeds | parameters |")
    assert lines[2] == "| `zoh` | 98.00 ± 1.00 | 3 | 12,345 | 1.50 | 1,000 | 4,321 | 512 |"
    assert "360 held-out images" in lines[-1] and "of which 300 MiB" in lines[-1]


def test_differences_are_paired_by_seed(report):
    assert report.differences(make_results(TWO_METHODS)) == [("rk4", "+0.42", "+0.25", "+0.50", "yes")]
    mixed = {"zoh": {"0": 98.0, "1": 97.0}, "foh": {"1": 98.0, "0": 97.5}, "rk4": {"5": 99.0}}
    assert report.differences(make_results(mixed)) == [("foh", "+0.25", "-0.50", "+1.00", "no")]


# ---- Plots ---------------------------------------------------------------------------------------------------------


def test_magnitudes_are_those_of_the_complex_formulas(report):
    re_part, im_part = np.linspace(-4, 1.5, 7)[None], np.linspace(-3, 3, 5)[:, None]
    x = re_part + 1j * im_part
    for method in METHODS:
        expected = (1 + x / 2) / (1 - x / 2) if method == "bilinear" else np.exp(x)
        np.testing.assert_allclose(report.magnitudes(method, re_part, im_part), np.abs(expected), rtol=1e-9)


def test_coefficients_of_a_scalar(report):
    x = -np.array([0.01, 0.5, 2.0, 30.0])
    A_bar, ratio = report.coefficients("zoh_exact", x, -16.0)
    np.testing.assert_allclose(A_bar, np.exp(x), rtol=1e-12)
    np.testing.assert_allclose(ratio, np.expm1(x) / x, rtol=1e-12)
    np.testing.assert_allclose(report.coefficients("bilinear", x, -1.0)[1], 1 / (1 - x / 2), rtol=1e-12)


def test_every_method_is_drawn_and_can_be_told_apart(report):
    figure = report.plot_coefficients()
    for axes in figure.axes[1:]:
        assert [line.get_label() for line in axes.lines[: len(METHODS)]] == list(METHODS)
    styles = {(report.line_style(method)["color"], report.line_style(method)["linestyle"]) for method in METHODS}
    assert len(styles) == len(METHODS)
    titles = " ".join(axes.get_title() for axes in report.plot_stability().axes)
    assert all(re.search(rf"\b{method}\b", titles) for method in METHODS)


def test_text_in_plots_does_not_overlap_or_leave_the_page(report):
    for figure in (report.plot_coefficients(), report.plot_stability(), report.plot_curves(make_results(TWO_METHODS))):
        figure.draw_without_rendering()
        page = figure.bbox.padded(1)
        titles = [axes.title.get_window_extent() for axes in figure.axes if axes.get_title()]
        boxes = titles + [legend.get_window_extent() for legend in figure.legends]
        for i, box in enumerate(boxes):
            assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
            assert not any(box.overlaps(other) for other in boxes[i + 1 :])
            assert i < len(titles) or not any(box.overlaps(axes.bbox) for axes in figure.axes)


# ---- Report --------------------------------------------------------------------------------------------------------


def test_report_is_self_contained_and_complete(report, tmp_path):
    report.write(make_results(TWO_METHODS), tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 4 and all(source.startswith("data:image/png;base64,") for source in sources)
    for text in (
        "98.00 ± 1.00",
        "&#x27;a &amp; b&#x27;",
        "0123abc",
        "a &lt;cpu&gt;",
        "--data-set DIGITS",
        "2026-01-01",
    ):
        assert text in page, text
    assert "not consistent" in page and "standard deviation over the seeds is up to" in page
    for name in ("accuracy_cost", "curves", "coefficients", "stability"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_report_of_a_study_where_everything_failed(report, tmp_path):
    results = make_results({"zoh": {}})
    results["methods"] = [{"method": "zoh", "accuracies": {}, "accuracy_mean": None, "accuracy_std": None}]
    results |= {"held_out_images": None, "failed": ["zoh, seed 0"]}
    report.write(results, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Failed runs, left out: zoh, seed 0" in page
    assert "| `zoh` | – | 0 | – | – | – | – | – |" in (tmp_path / "table.md").read_text(encoding="utf-8")
