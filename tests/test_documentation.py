"""The README and documentation/: every path exists, every command runs (shortened) or parses, every figure holds."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

import vim.benchmark
import vim.convert
import vim.export
import vim.visualize
from mamba_ssm.ops.discretization_ref import METHODS, discretize
from mamba_ssm.ops.selective_scan import selective_scan_backward_flops, selective_scan_flops
from vim.checkpoint import save_weights
from vim.main import main as train
from vim.main import parse_args
from vim.models_mamba import VisionMamba

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "documentation"
PAGES = [ROOT / "README.md", *sorted(FOLDER.glob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}


def module(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def commands():
    """Every line of every shell block, once."""
    found = []
    for text in TEXTS.values():
        blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        found += [" ".join(shlex.split(line, comments=True)) for line in lines]
    return list(dict.fromkeys(line for line in found if line))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with what the commands speak of: trained digits, an image of one, a photograph, a checkpoint."""
    folder = tmp_path_factory.mktemp("workplace")
    tiny = ["depth=2", "embed_dim=16", "patch_size=2", "stride=2", "channels=1"]
    digits = ["--data-set", "DIGITS", "--device", "cpu", "--model", "vim_tiny", "--model-kwargs", *tiny]
    train([*digits, "--epochs", "1", "--batch-size", "256", "--output_dir", str(folder / "output/digits")])
    Image.fromarray((load_digits().images[3] * 255 / 16).astype(np.uint8)).save(folder / "digit.png")
    Image.fromarray(load_sample_image("flower.jpg")).save(folder / "photograph.jpg")
    model = VisionMamba(img_size=32, depth=2, embed_dim=16, final_pool_type="mean")
    save_weights(folder / "checkpoint.pth", model.state_dict(), {})
    return folder


def shortened(argv, **replaced):
    """The arguments with other values of some options; None leaves an option out."""
    result = list(argv)
    for option, values in replaced.items():
        option = "--" + option.replace("_", "-")
        if option in result:
            start = result.index(option)
            end = next((i for i in range(start + 1, len(result)) if result[i].startswith("--")), len(result))
            result[start:end] = [] if values is None else [option, *values]
    return result


def of_a_small_model(argv):
    """With the options of the workplace's checkpoint where the command does not take those of trained digits."""
    return argv if "output/digits" in " ".join(argv) else [*argv, "--model-kwargs", "depth=2", "embed_dim=16"]


def run_export(argv):
    assert vim.export.main(of_a_small_model(shortened(argv, input_size=["32"]))) == 0


def run_visualize(argv):
    argv = of_a_small_model(shortened(argv, layers=["0", "-1"]))
    assert vim.visualize.main([*argv, *([] if "output/digits" in " ".join(argv) else ["--input-size", "32"])]) == 0


def run_convert(argv):
    assert vim.convert.main(["checkpoint.pth", *argv[1:]]) == 0


def run_benchmark(argv):
    vim.benchmark._parser().parse_args(argv)
    sizes = {"input_size": ["32"], "batch_size": ["1"], "seconds": ["0.01"], "methods": ["zoh"], "cuda_graph": None}
    peer = next(name for name in argv if name.startswith("deit"))
    assert vim.benchmark.main([*shortened(argv, models=["vim_tiny", peer], **sizes), "--device", "cpu"]) == 0


def run_trainer(argv):
    if "--help" not in argv:
        parse_args([part for part in argv if part != "--dry-run"])


def run_study(argv):
    import study
    import study_ops

    if "ops" in argv:
        study_ops.parse(argv[2:])
    else:
        study.parse(argv)


def run_insert_table(argv):
    page = Path("performance.md")
    shutil.copy(FOLDER / page, page)
    row = vim.benchmark.Row("vim_tiny", "zoh", 32, 1, parameters=1)
    Path("gpu.md").write_text(vim.benchmark.markdown([row], "a title"))
    insert = [os.fspath(FOLDER / "insert_table.py"), *argv, "--page", str(page)]
    assert subprocess.run([sys.executable, *insert]).returncode == 0
    assert "<!-- table gpu -->\n\n**a title**" in page.read_text()


def run_recipe(script):
    def run(argv):
        command = ["bash", str(ROOT / "scripts" / script), "--dry-run", *argv]
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        # What does not exist here is the data; the message is that of the trainer, which has read all flags.
        assert result.returncode == 0 or "/path/to/imagenet" in result.stderr + result.stdout, result.stderr

    return run


def exists(argv):
    pass


HANDLERS = {
    "python vim/main.py": run_trainer,
    "torchrun --nproc_per_node 8 vim/main.py": run_trainer,
    "sbatch --nodes 2 --gpus-per-node 8 scripts/slurm/train.sbatch": run_trainer,
    "python scripts/study.py": run_study,
    "python -m vim.benchmark": run_benchmark,
    "python -m vim.export": run_export,
    "python -m vim.visualize": run_visualize,
    "python -m vim.convert": run_convert,
    "python documentation/insert_table.py": run_insert_table,
}
# Run by tests of their own, or by whoever runs these tests.
ELSEWHERE = (
    "scripts/demo.sh", "scripts/test.sh", "python3 -m venv", "pip install", "python -m mamba_ssm.doctor",
    "scripts/pretrain.sh", "scripts/finetune.sh", "scripts/eval.sh", "scripts/sweep.sh", "scripts/dist_train",
    "scripts/install_mm.sh", "python seg/", "python det/",
    "python tools/make_digit_scenes.py",
)  # fmt: skip


@pytest.mark.needs_kernel
@pytest.mark.parametrize("line", commands())
def test_command(line, workplace, monkeypatch):
    if line.startswith(ELSEWHERE):
        path = line.split()[0]
        assert not path.startswith("scripts/") or os.access(ROOT / path, os.X_OK) or "*" in path
        return
    start = next((start for start in HANDLERS if line.startswith(start)), None)
    assert start is not None, f"no test runs this command: {line}"
    monkeypatch.chdir(
        ROOT if start in ("python vim/main.py",) or "main.py" in start or "sbatch" in start else workplace
    )
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    HANDLERS[start](shlex.split(line)[len(start.split()) :])


def test_python_block_of_the_tools_page(workplace, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```$", TEXTS[FOLDER / "tools.md"], re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(workplace)
    if not Path("digits.onnx").exists():
        run_export(["--resume", "output/digits/best_checkpoint.pth", "--output", "digits.onnx"])
    namespace = {}
    exec(compile(code, "tools.md", "exec"), namespace)
    assert namespace["logits"].shape == (5, 10)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_and_links(page):
    text = re.sub(r"^```.*?^```$", "", TEXTS[page], flags=re.MULTILINE | re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    for link in links:
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], link
    named = [name for name in re.findall(r"`([\w.-]+(?:/[\w.-]+)+)`", text) if not name.startswith("output/")]
    named = [name for name in named if not any(part.isupper() for part in name.split("/"))]  # such as wds/NAME
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_page_is_in_the_index():
    index = TEXTS[FOLDER / "README.md"]
    assert [page.name for page in PAGES[1:] if page.name != "README.md" and f"({page.name})" not in index] == []


def test_every_tool_has_its_picture():
    pictures = module("make_pictures")
    shown = re.findall(r"\(pictures/(\w+)\.png\)", TEXTS[FOLDER / "tools.md"])
    assert sorted(shown) == sorted(pictures.MAKERS)
    for name in shown:
        path = FOLDER / "pictures" / f"{name}.png"
        assert path.stat().st_size <= pictures.LARGEST and np.asarray(Image.open(path).convert("L")).std() > 5


def test_a_picture_is_made(tmp_path, monkeypatch):
    pictures = module("make_pictures")
    monkeypatch.setattr("sys.argv", ["make_pictures.py", "doctor", "--output", str(tmp_path)])
    pictures.main()
    assert Image.open(tmp_path / "doctor.png").width == pictures.WIDTH
    monkeypatch.setattr("sys.argv", ["make_pictures.py", "nothing"])
    with pytest.raises(SystemExit):
        pictures.main()


def test_table_of_an_unknown_name_is_refused():
    insert = module("insert_table").insert
    page = "a\n<!-- table one -->\nold\n<!-- end one -->\nb\n"
    assert insert(page, "one", "new\n") == "a\n<!-- table one -->\n\nnew\n\n<!-- end one -->\nb\n"
    with pytest.raises(ValueError, match="no place for a table 'two'; there are one"):
        insert(page, "two", "new")


def phi(x):
    p1 = (x.exp() - 1) / x
    p2 = (p1 - 1) / x
    p3 = (p2 - 1 / 2) / x
    return p1, p2, p3, (x.exp() - p1) / x, (p1 - 2 * p2) / x, (p2 - 3 * p3) / x


# As documentation/methods.md has them: Δ, A -> c_Δ, c_A.
DERIVATIVES = {
    "zoh": lambda d, A: (1 + 0 * d, 0 * d),
    "zoh_exact": lambda d, A: ((d * A).exp(), d**2 * phi(d * A)[3]),
    "foh": lambda d, A: (d * phi(d * A)[0], d**3 * phi(d * A)[4]),
    "bilinear": lambda d, A: ((1 - d * A / 2) ** -2, (d / (1 - d * A / 2)) ** 2 / 2),
    "poly": lambda d, A: (
        (d * A).exp() + d * phi(d * A)[0] / 2,
        d**2 * phi(d * A)[3] + d**3 * phi(d * A)[4] / 2,
    ),
    "highorder": lambda d, A: (
        (d * A).exp() + d * phi(d * A)[0] + d**2 * phi(d * A)[1] / 2,
        d**2 * phi(d * A)[3] + d**3 * phi(d * A)[4] + d**4 * phi(d * A)[5] / 2,
    ),
    "rk4": lambda d, A: (
        1 + d * A + (d * A) ** 2 / 2 + (d * A) ** 3 / 6,
        d**2 * (1 / 2 + d * A / 3 + (d * A) ** 2 / 8),
    ),
    "foh_taylor": lambda d, A: (
        d + A * d**2 / 2 + A**2 * d**3 / 6 + A**3 * d**4 / 24,
        d**3 / 6 + A * d**4 / 12 + A**2 * d**5 / 40,
    ),
    "poly_taylor": lambda d, A: (
        1 + (A + 1 / 2) * d + (A**2 / 2 + A / 4) * d**2 + (A**3 / 6 + A**2 / 12) * d**3,
        d**2 / 2 + (A / 3 + 1 / 12) * d**3 + (A**2 / 8 + A / 24) * d**4,
    ),
    "highorder_taylor": lambda d, A: (
        1 + (A + 1) * d + (A**2 / 2 + A / 2 + 1 / 4) * d**2 + (A**3 / 6 + A**2 / 6 + A / 12) * d**3,
        d**2 / 2 + (A / 3 + 1 / 6) * d**3 + (A**2 / 8 + A / 12 + 1 / 48) * d**4,
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_derivatives_of_the_methods_page(method):
    assert f"\n| `{method}` | " in TEXTS[FOLDER / "methods.md"]
    delta = torch.tensor([0.1, 0.5, 1.3], dtype=torch.float64, requires_grad=True)
    A = torch.tensor([[-0.4], [-1.0], [-3.0]], dtype=torch.float64, requires_grad=True)
    _, c = discretize(method, delta, A)
    found = torch.autograd.grad(c.sum(), (delta, A), materialize_grads=True)
    for one, other in zip(found, DERIVATIVES[method](delta, A[:, 0]), strict=True):
        torch.testing.assert_close(one.flatten(), other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_operations_of_the_performance_page(method):
    _, flops = TEXTS[FOLDER / "performance.md"].split("## FLOPs\n")
    row = re.search(rf"^\| `{method}` \| (\d+) \| (\d+) \|", flops, re.MULTILINE)
    one = (1, 1, 1)  # a single state and step
    options = (1.0, True, False, method, False, 0)
    forward = selective_scan_flops(one, one, (1, 1), one, one, None, None, None, None, None, None, *options)
    backward = selective_scan_backward_flops(
        one, None, one, one, (1, 1), one, one, None, None, None, None, None, one, *options
    )
    assert (forward, backward) == (int(row[1]), int(row[2]))
