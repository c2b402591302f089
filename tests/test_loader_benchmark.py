"""`benchmarks/loader.py` runs, and measures what it says."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("loader_benchmark", BENCHMARKS / "loader.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(BENCHMARKS))


def test_files_are_photographs_of_imagenets_usual_size(benchmark, tmp_path):
    benchmark.write_jpegs(tmp_path, 8)
    files = sorted(tmp_path.glob("*/*/*.jpg"))
    assert len(files) == 10
    for file in files:
        image = Image.open(file)
        assert image.format == "JPEG" and image.size == (500, 375)
        assert len(image.getcolors(500 * 375)) > 5_000  # no test pattern


def test_the_loader_is_measured_and_reported(benchmark, tmp_path, capsys):
    argv = ["--images", "256", "--workers", "1", "--seconds", "0.5", "--output", str(tmp_path)]
    benchmark.main([*argv, "--", "--input-size", "64", "--reprob", "0"])
    figures = json.loads((tmp_path / "loader.json").read_text())["figures"]
    assert 5 < figures["rates"]["1"]["training"] < 20_000
    stages = figures["stages_ms"]
    assert next(iter(stages)) == "read and decode" and "RandAugment" in stages and "RandomErasing" not in stages
    together = 1000 / sum(stages.values())
    assert figures["rates"]["1"]["training"] < 2 * together  # one worker is no faster than its stages
    assert "images/s" in capsys.readouterr().out and "read and decode" in (tmp_path / "loader.md").read_text()


@pytest.mark.parametrize("argv", [["--workers", "0"], ["--images", "10"]])
def test_bad_arguments(benchmark, capsys, argv):
    with pytest.raises(SystemExit):
        benchmark.main(argv)
    assert "expected at least" in capsys.readouterr().err
