"""README.md holds: its table, its paths, its figures, its Python and its commands."""

import importlib.util
import math
import os
import re
import shlex
from pathlib import Path

import pytest
import torch

from mamba_ssm._backend import use_kernel
from mamba_ssm.ops.discretization_ref import METHODS, discretize
from vim.main import main, parse_args

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def commands(start: str) -> list[list[str]]:
    """The arguments after `start` of every shell command that begins with it."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[len(start.split()) :] for line in lines if line.startswith(start)]


def test_method_table_is_the_code_s():
    order = {None: "none", math.inf: "exact"}
    expected = [
        [f"`{method.name}`", method.A_bar, method.c, order.get(method.held_order, f"{method.held_order}")]
        for method in METHODS.values()
    ]
    table = TEXT[TEXT.index("| `discretization_method` | Ā | c | order |") :].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert rows == expected


def test_truncated_coefficients_are_as_stated():
    stated = {"poly": "0.08", "highorder": "0.11", "foh": "0.04"}
    stated |= {"poly_taylor": "-27.4", "highorder_taylor": "-26.5", "foh_taylor": "-3.6"}
    for method, figure in stated.items():
        _, c = discretize(method, torch.tensor([0.693], dtype=torch.float64), torch.tensor([[-16.0]]))
        assert f"{c.item():.{len(figure.split('.')[1])}f}" == figure
        assert figure in TEXT


def test_every_path_named_exists():
    text = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    names = re.findall(r"`([\w.-]+(?:/[\w.-]+)*)`", text) + re.findall(r"\]\((?!http)([^)]+)\)", text)
    made_by_running = ("output", ".venv")
    paths = [name for name in names if "/" in name or (ROOT / name).suffix in (".md", ".txt", ".sh", ".py")]
    paths = [name for name in paths if not name.startswith(made_by_running) and name != "log.txt"]
    paths = [name for name in paths if not any(part.isupper() for part in name.split("/"))]  # such as wds/NAME
    assert len(paths) > 15
    assert [name for name in paths if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.split("\n")[0])
def test_python_block_runs(code):
    namespace: dict = {}
    exec(compile(code, "README.md", "exec"), namespace)
    if "logits" in namespace:
        shape = re.search(r"logits = .*# (\(.*\))", code).group(1)
        assert str(tuple(namespace["logits"].shape)) == shape
        assert namespace["logits"].isfinite().all()
    else:
        assert namespace["u"].grad.isfinite().all() and namespace["u"].grad.abs().sum() > 0


def test_digits_commands_run(tmp_path):
    """Training, resuming and evaluating in the README's order, with one epoch and two narrow layers."""
    shorter = {"20": "1", "depth=4": "depth=2", "embed_dim=64": "embed_dim=32"}
    digits = [argv for argv in commands("python vim/main.py") if "DIGITS" in argv]
    assert len(digits) == 3
    records = [
        main([shorter.get(argument, argument.replace("output/digits", str(tmp_path))) for argument in argv])
        for argv in digits
    ]
    assert records[0]["epoch"] == 0
    assert records[1] == records[0]  # nothing was missing
    assert records[2]["test_acc1"] == records[0]["test_acc1"]


def test_trainer_commands_parse():
    for argv in commands("python vim/main.py"):
        if "--help" not in argv:
            parse_args(argv)


def test_study_commands_parse(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import study

    trained = [argv for argv in commands("python scripts/study.py") if "ops" not in argv]
    assert len(trained) == 2
    for argv in trained:
        _, preset = study.parse(argv)
        for job in study.training_jobs(Path("output"), preset):
            parse_args(job.argv)

    import study_ops

    for argv in commands("python scripts/study.py --task ops"):
        study_ops.parse(argv)


def test_benchmark_command_parses():
    import vim.benchmark

    (argv,) = commands("python -m vim.benchmark")
    assert vim.benchmark._parser().parse_args(argv).models[0] == "vim_tiny"


def test_set_up_commands_name_what_there_is():
    for script in ("scripts/demo.sh", "scripts/test.sh"):
        assert script in "\n".join(blocks("bash"))
        assert os.access(ROOT / script, os.X_OK)
    assert importlib.util.find_spec("mamba_ssm.doctor") is not None
    project = (ROOT / "pyproject.toml").read_text()
    (extras,) = re.findall(r'-e "\.\[(.*?)\]"', TEXT)
    for extra in extras.split(","):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE)
    for script in ("scripts/setup_env.sh",):
        assert f'-e ".[{extras}]"' in (ROOT / script).read_text()  # the scripts install what the README says


def test_environment_variable_as_in_the_table(monkeypatch):
    x = torch.zeros(1)
    monkeypatch.setenv("VIM_USE_CUDA_KERNEL", "0")
    assert use_kernel(x) is False and use_kernel(x, True) is False  # it wins over the argument
    monkeypatch.setenv("VIM_USE_CUDA_KERNEL", "1")
    with pytest.raises(RuntimeError):
        use_kernel(x)
    monkeypatch.delenv("VIM_USE_CUDA_KERNEL")
    assert use_kernel(x, False) is False
    assert use_kernel(x.double()) is False
    with pytest.raises(RuntimeError):
        use_kernel(x, True)
