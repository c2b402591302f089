"""scripts/study.py --task seg|det: planning, the whole way in small, and what is put together from MMEngine's logs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
PACKAGE = {"seg": "mmseg", "det": "mmdet"}


@pytest.fixture(autouse=True)
def scripts_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture
def study():
    import study

    return study


@pytest.fixture
def dense():
    import study_dense

    return study_dense


@pytest.mark.parametrize("task", ["seg", "det"])
def test_default_is_the_paper(study, task):
    args, preset = study.parse(["--task", task])
    assert preset.methods == tuple(study.PAPER_METHODS) and preset.task == task
    assert args.output == Path(f"output/demo-{task}").resolve()
    jobs = study.training_jobs(args.output, preset) + study.timing_jobs(args.output, preset)
    assert len({job.folder for job in jobs}) == len(jobs) == 2 * len(preset.methods)
    for job in jobs:
        assert f"model.backbone.discretization_method={job.method}" in job.argv
        assert f"train_cfg.max_iters={job.epochs}" in job.argv
        assert job.task == task


def test_one_folder_holds_one_task(study, tmp_path):
    for task in ("cls", "seg"):
        _, preset = study.parse(["--task", task, "--preset", "smoke", "--epochs", "4"])
        if task == "cls":
            study.check_settings(tmp_path, preset)
        else:
            with pytest.raises(study.StudyError, match="asked: --task seg --epochs 4"):
                study.check_settings(tmp_path, preset)


def test_options_are_checked_before_anything_runs(study, tmp_path):
    pytest.importorskip("mmseg", reason="scripts/install_mm.sh seg installs it")
    for trainer, message in (
        (("depth",), "depth after --: options of the configuration are KEY=VALUE"),
        (("model.decode_head.num_classes=3",), "num_classes=3, but the training set has 11 classes"),
    ):
        _, preset = study.parse(["--task", "seg", "--preset", "smoke", "--", *trainer])
        with pytest.raises(study.StudyError, match=message):
            study.check_trainer(tmp_path, preset)


def test_history_is_that_of_all_sessions(dense, tmp_path):
    """A killed run's entries beyond its checkpoint give way to those of the run that went on."""

    def log(name: str, *records: dict) -> None:
        folder = tmp_path / name / "vis_data"
        folder.mkdir(parents=True)
        (folder / "scalars.json").write_text("".join(json.dumps(r) + "\n" for r in records))

    log(
        "20260101_000000",
        {"loss": 4.0, "step": 10},
        {"loss": 2.0, "step": 20},
        {"mIoU": 10.0, "aAcc": 50.0, "step": 20},
        {"loss": 9.0, "step": 30},
    )
    log(
        "20260101_000100",
        {"loss": 1.0, "step": 30},
        {"loss": 0.0, "step": 40},
        {"mIoU": 30.0, "aAcc": 70.0, "step": 40},
    )
    history = dense._history(tmp_path, "seg")
    assert history == [
        {"step": 20, "test_acc1": 10.0, "pixel_acc": 50.0, "train_loss": 3.0},
        {"step": 40, "test_acc1": 30.0, "pixel_acc": 70.0, "train_loss": 0.5},
    ]
    assert dense.updates_done(tmp_path) == 40
    metrics = {"coco/bbox_mAP_50": 0.5, "coco/bbox_mAP": 0.25, "coco/segm_mAP": 0.125}
    assert dense._metrics(metrics, "det") == {"test_acc1": 50.0, "box_ap": 25.0, "mask_ap": 12.5}


@pytest.mark.parametrize("task", ["seg", "det"])
def test_the_whole_study_in_small(task, tmp_path):
    pytest.importorskip(PACKAGE[task], reason=f"scripts/install_mm.sh {task} installs it")
    command = [sys.executable, SCRIPTS / "study.py", "--task", task, "--preset", "smoke", "--output", tmp_path]
    command += ["--methods", "bilinear"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["method"] for row in results["methods"]] == ["bilinear"] and results["failed"] == []
    for row in results["methods"]:
        assert 0 <= row["accuracy_mean"] <= 100 and row["epoch_time_s"] > 0 and row["parameters"] > 1000
        assert row["inference_images_per_s"] > 0 and row["peak_memory_mb"] > row["memory_before_mb"]
    for run in results["runs"]:
        assert [entry["step"] for entry in run["history"]] == [1, 2, 3, 4]
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png") == 5 and ("mIoU %" if task == "seg" else "box AP50 %") in page
    assert "accuracy" not in (tmp_path / "table.md").read_text()
    # Finished, the same command does nothing but write the report again.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/result.json")}
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/result.json")} == before


def test_benchmark_of_the_training_step(tmp_path):
    pytest.importorskip("mmseg", reason="scripts/install_mm.sh seg installs it")
    small = ["model.backbone.embed_dim=16", "model.backbone.depth=2", "model.backbone.out_indices=[1]",
             "model.backbone.img_size=64", "model.decode_head.in_channels=[16,16,16,16]",
             "model.decode_head.channels=8", "model.auxiliary_head.in_channels=16",
             "model.data_preprocessor.size=[64,64]"]  # fmt: skip
    command = [sys.executable, ROOT / "benchmarks/dense.py", "--task", "seg", "--methods", "zoh", "--steps", "3"]
    command += ["--batch", "2", "--image-size", "64", "--device", "cpu", "--json", tmp_path / "seg.json"]
    done = subprocess.run([*command, "--cfg-options", *small], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (row,) = json.loads((tmp_path / "seg.json").read_text())["rows"]
    assert row["losses_finite"] == 3 and row["batch"] == 2 and 0 < row["scan_share"] < 1
