"""`python -m vim.benchmark`: what it measures, writes and refuses."""

import gc
import json
import re
import weakref

import pytest
import torch

from mamba_ssm.ops.discretization_ref import PAPER_METHODS
from vim import benchmark
from vim.benchmark import count_flops, create, main

CPU = torch.device("cpu")
FAST = ["--device", "cpu", "--input-size", "32", "--batch-size", "2", "--seconds", "0.01"]


@pytest.mark.needs_kernel
@pytest.mark.parametrize("train", [False, True])
def test_table_json_and_plot(tmp_path, capsys, monkeypatch, train):
    monkeypatch.setenv("COLUMNS", "160")
    models = ["vim_tiny", "vit_tiny_patch16_224", "resnet18"]
    command = ["--models", *models, "--methods", "zoh", "rk4", *FAST, "--amp-dtype", "bfloat16"]
    command += ["--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "rows.png")]
    command += ["--markdown", str(tmp_path / "rows.md")]
    assert main(command + ["--train"] * train) == 0
    record = json.loads((tmp_path / "rows.json").read_text())
    rows = record["rows"]
    cases = [("vim_tiny", "zoh"), ("vim_tiny", "rk4"), ("vit_tiny_patch16_224", None), ("resnet18", None)]
    assert [(row["model"], row["method"]) for row in rows] == cases
    for (name, method), row in zip(cases, rows, strict=True):
        model = create(name, method, 32, CPU, torch.float32)
        assert row["parameters"] == sum(p.numel() for p in model.parameters())
        assert row["flops"] == count_flops(model, torch.randn(2, 3, 32, 32), train) // 2
        first, third = row["quartiles_s"]
        assert 0 < first <= row["latency_s"] <= third and row["calls"] >= 1
        assert row["images_per_s"] == pytest.approx(2 / row["latency_s"])
        assert row["memory_bytes"] is None or row["memory_bytes"] > 4 * row["parameters"]
        assert row["note"] is None
    lines = (tmp_path / "rows.md").read_text().splitlines()
    assert lines[0] == f"**{record['title']}**" and "32×32 pixels, batch 2:" in lines
    for (name, method), row in zip(cases, rows, strict=True):
        (line,) = (line for line in lines if line.startswith(f"| {name} | {method or ''} |"))
        assert f"| {row['images_per_s']:.1f} | {row['latency_s'] * 1e3:.2f} |" in line
    assert record["settings"]["train"] is train and record["environment"]["packages"]["torch"]
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert ("training step" if train else "inference") in out and "autocast to bfloat16" in out
    for name, method in cases:
        assert any(name in line and (method or "") in line for line in out.splitlines())


@pytest.mark.needs_kernel
def test_sizes_and_batches_are_all_combined(tmp_path):
    path = tmp_path / "rows.json"
    sizes = ["--input-size", "32", "48", "--batch-size", "1", "2"]
    assert main(["--models", "vit_tiny_patch16_224", *FAST, *sizes, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["input_size"], row["batch_size"]) for row in rows] == [(32, 1), (32, 2), (48, 1), (48, 2)]
    assert rows[0]["flops"] == rows[1]["flops"] < rows[2]["flops"]


def test_paired_sizes_and_the_paper_s_methods(tmp_path, monkeypatch):
    monkeypatch.setattr(
        benchmark, "measure", lambda *case, **_: benchmark.Row(*case, parameters=1)
    )  # which rows there are, not what they hold
    path, text = tmp_path / "rows.json", tmp_path / "rows.md"
    command = [*FAST, "--models", "vim_tiny", "vit_tiny_patch16_224", "--methods", "paper", "zoh"]
    command += ["--input-size", "32", "48", "32", "--batch-size", "2", "1", "1", "--pair"]
    assert main([*command, "--json", str(path), "--markdown", str(text)]) == 0
    rows = json.loads(path.read_text())["rows"]
    pairs = [(32, 2), (48, 1), (32, 1)]
    models = [("vim_tiny", method) for method in PAPER_METHODS] + [("vit_tiny_patch16_224", None)]
    assert [(row["model"], row["method"], row["input_size"], row["batch_size"]) for row in rows] == [
        (*model, *pair) for model in models for pair in pairs
    ]
    titles = [line for line in text.read_text().splitlines() if line.endswith(":")]
    assert titles == [f"{size}×{size} pixels, batch {batch}:" for size, batch in pairs]


def test_models_of_earlier_rows_are_freed():
    model = create("vit_tiny_patch16_224", None, 32, CPU, torch.float32)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)  # refers to itself
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is not None
        benchmark.measure("vit_tiny_patch16_224", None, 32, 1, device=CPU, seconds=0.001)
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.cuda
@pytest.mark.parametrize("train", [False, True])
def test_cuda_graph(tmp_path, train):
    path = tmp_path / "rows.json"
    models = ["vim_base", "deit_tiny_patch16_224", "vim_tiny", "deit_tiny_patch16_224"]
    command = ["--models", *models, "--input-size", "224", "--batch-size", "8", "--device", "cuda", "--seconds", "0.1"]
    command += ["--amp-dtype", "bfloat16", "--cuda-graph", "--json", str(path)]
    assert main(command + ["--train"] * train) == 0
    record = json.loads(path.read_text())
    rows = record["rows"]
    assert "CUDA graphs" in record["title"] and all(row["images_per_s"] > 0 for row in rows)
    assert rows[0]["memory_bytes"] > 4 * rows[0]["parameters"]
    first, again = rows[1]["memory_bytes"], rows[3]["memory_bytes"]  # each alone: what ran before does not count
    assert abs(first - again) <= 0.02 * first


def test_reference_has_a_speed_but_no_flops(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VIM_USE_CUDA_KERNEL", "0")
    path = tmp_path / "rows.json"
    assert main(["--models", "vim_tiny", *FAST, "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["images_per_s"] > 0 and row["flops"] is None and "PyTorch reference" in row["note"]
    assert "PyTorch reference" in capsys.readouterr().out


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no more"), RuntimeError("new_tensor, CUDA out of memory.")])
def test_out_of_memory_is_a_row_and_the_others_go_on(error, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "inference", out_of_memory_at(2, benchmark.inference, error))
    path = tmp_path / "rows.json"
    command = ["--models", "vit_tiny_patch16_224", *FAST, "--batch-size", "2", "1", "--json", str(path)]
    assert main(command) == 0
    large, small = json.loads(path.read_text())["rows"]
    assert large["images_per_s"] is None and small["images_per_s"] > 0
    assert "2 images of 32² pixels: out of memory on cpu" in capsys.readouterr().out


def out_of_memory_at(batch, step, error):
    def run(model, images):
        if len(images) == batch:
            raise error
        step(model, images)

    return run


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--models", "vim_tinny"], "timm knows no model 'vim_tinny'; is it one of vim_tiny"),
        (["--models", "Qqqqqq"], "timm knows no model 'Qqqqqq'; timm.list_models"),
        (["--methods", "euler"], "unknown method 'euler'; choose of zoh, foh.*or paper"),
        (["--pair", "--input-size", "32", "48"], "--pair: got 2 image sizes and 1 batch sizes; give as many"),
        (["--cuda-graph"], "--cuda-graph: the device is cpu; expected a GPU"),
        (["--markdown", "nowhere/rows.md"], "--markdown nowhere/rows.md: there is no folder nowhere"),
        (["--device", "cuda:63"], "GPUs; use --device cpu"),
        (["--device", "meta"], "got 'meta'; expected cpu, cuda or cuda:N"),
        (["--device", "abacus"], "got 'abacus'; expected cpu, cuda or cuda:N"),
        (["--input-size", "33"], "vim_tiny cannot be built for --input-size 33: .*not covered"),
        (["--json", "nowhere/rows.json"], "there is no folder nowhere"),
        (["--plot", "rows.pdf"], "its name must end in .png"),
    ],
)
def test_refused(argv, said, capsys):
    assert main([*FAST, *argv]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("vim.benchmark: error: ")
    assert re.search(said, errors)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--input-size", "0"], "argument --input-size: got '0'; expected a whole number of at least 1"),
        (["--batch-size", "-1"], "batch-size"),
        (["--batch-size", "two"], "got 'two'"),
        (["--seconds", "nan"], "expected a number above 0"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_refused_by_the_parser(argv, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert said in capsys.readouterr().err
