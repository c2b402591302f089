"""scripts/study.py --task ops: observed orders, known answers, parts of the error, conclusions, page, bad arguments."""

import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mamba_ssm.ops.discretization_ref import METHODS

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import study  # noqa: E402
import study_ops  # noqa: E402
import study_ops_report  # noqa: E402

FIRST_ORDER = {"zoh", "poly", "highorder", "poly_taylor", "highorder_taylor"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The small study, by the command line."""
    output = tmp_path_factory.mktemp("ops")
    assert study.main(["--task", "ops", "--small", "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "ops.json").read_text())


def expected_held(method):
    """The normative orders, in words of this test: not taken from the table that the study uses."""
    known = {"zoh_exact": "exact", "rk4": 4, "bilinear": 2, "foh": "none", "foh_taylor": "none"}
    return 1 if method in FIRST_ORDER else known[method]


@pytest.mark.parametrize("method", METHODS)
def test_observed_orders(results, method):
    orders = {name: rows[method]["order"] for name, rows in results["parts"]["bank"]["inputs"].items()}
    orders["exponentials"] = results["parts"]["exponentials"]["inputs"]["smooth"][method]["order"]
    orders["image"] = results["parts"]["image"]["inputs"]["end"][method]["order"]
    held = expected_held(method)
    assert orders.pop("held") == (held if isinstance(held, str) else pytest.approx(held, abs=0.1))
    for name, order in orders.items():
        assert order == ("none" if held == "none" else pytest.approx(1, abs=0.1)), name


def test_solutions_agree_with_a_fine_integration():
    """Heun's rule with 2¹⁵ steps, for a constant and for two complex exponents."""
    rates = torch.tensor([-0.5, -3.0], dtype=torch.float64)
    weights, s = torch.tensor([0.4, 1.0, -0.7j]), torch.tensor([0.0, 2.0j, -0.3 + 1.0j])
    weights, s = weights.to(torch.complex128), s.to(torch.complex128)
    steps, end = 2**15, 1.5
    times = torch.linspace(0, end, steps + 1, dtype=torch.float64)
    u = (weights * torch.exp(s * times[:, None])).sum(-1).real.tolist()
    for i, rate in enumerate(rates.tolist()):
        state, dt = 0.0, end / steps
        for before, after in itertools.pairwise(u):
            slope = rate * state + before
            state += dt / 2 * (slope + rate * (state + dt * slope) + after)
        exact = study_ops.exponential_response(rates, weights, s, torch.tensor([end], dtype=torch.float64))
        assert exact[i, 0].item() == pytest.approx(state, rel=1e-7)


def test_held_solution():
    """One state by hand: h = (1 - e^(-Δ)) u, then decay."""
    u = torch.tensor([[[2.0, 0.0]]], dtype=torch.float64)
    delta = torch.tensor([[[0.5, 1.5]]], dtype=torch.float64)
    states = study_ops.held_response(-torch.ones(1, dtype=torch.float64), u, delta)
    first = 2 * (1 - math.exp(-0.5))
    assert states.flatten().tolist() == pytest.approx([first, first * math.exp(-1.5)], rel=1e-14)


def test_parts_of_the_error():
    exact = torch.tensor([[3.0, 4.0]])
    # Truncation adds (0, 5); the definition is twice the solution and a part (4, -3) at right angles to it.
    definition = 2 * exact + torch.tensor([[4.0, -3.0]])
    parts = study_ops.error_parts(definition + torch.tensor([[0.0, 5.0]]), definition, exact)
    factor = 50 / 125  # <definition, exact> / <definition, definition>
    assert parts["truncation"] == pytest.approx(1.0)
    assert parts["gain"] == pytest.approx((1 - factor) * math.sqrt(125) / 5)
    assert parts["rest"] == pytest.approx(math.hypot(2 * factor - 1, factor))
    assert parts["error"] == pytest.approx(math.hypot(3 + 4, 4 - 3 + 5) / 5)


@pytest.mark.parametrize(
    ("errors", "order"),
    [([1e-15, 3e-14], "exact"), ([0.9, 0.99], "none"), ([0.5, 0.49], "none"), ([8e-4, 1e-4], 3.0)],
)
def test_order_of_a_list_of_errors(errors, order):
    assert study_ops.observed_order(errors) == (order if isinstance(order, str) else pytest.approx(order))


def test_a_wrong_method_would_be_noticed(results):
    """The conclusion on the orders fails when one of them is off."""
    wrong = json.loads(json.dumps(results))
    wrong["parts"]["bank"]["inputs"]["held"]["rk4"]["order"] = 3.0
    assert not study_ops_report.conclusions(wrong)[0].holds
    assert study_ops_report.conclusions(results)[0].holds


def test_known_figures(results):
    """Figures that the mathematics gives without this code."""
    parts = results["parts"]
    x = -16.0
    far = parts["gain"]["points"]["A = -16, Δ = 1"]
    assert far["zoh"] == pytest.approx(-x / (1 - math.exp(x)))
    assert far["bilinear"] == pytest.approx(1) and far["zoh_exact"] == pytest.approx(1)
    curve = parts["gain"]["curves"]["rate"]["zoh"]
    grid = np.array(parts["gain"]["minus_x"])
    np.testing.assert_allclose(curve, grid / -np.expm1(-grid), rtol=1e-9)
    assert parts["gain"]["input_at_short_step"]["foh"] == pytest.approx(1 / 200, rel=0.01)
    assert parts["truncation"]["anchor"]["poly_taylor"] == pytest.approx(-27.4, abs=0.05)
    assert parts["truncation"]["anchor"]["poly"] == pytest.approx(0.08, abs=0.005)
    assert parts["stability"]["methods"]["bilinear"]["at_80"] == pytest.approx(-39 / 41)
    assert all(max(row["difference"]) < 1e-6 for row in parts["gradients"]["methods"].values())
    assert max(parts["gradients"]["methods"]["zoh_exact"]["A"]) < 1e-10


def test_output_is_complete_and_self_contained(folder, results):
    page = (folder / "ops.html").read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == len(study_ops.PARTS)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    for part in study_ops.PARTS:
        assert (folder / f"ops_{part}.png").read_bytes().startswith(b"\x89PNG")
        assert f"python scripts/study.py --task ops --parts {part} --small" in page
    assert len(results["conclusions"]) == page.count("<li>") - 3  # three causes in the introduction
    assert "Does not hold" not in page
    text = (folder / "ops.txt").read_text(encoding="utf-8")
    assert "Observed order of accuracy" in text and all(method in text for method in METHODS)


def test_a_part_can_be_repeated_alone_with_the_same_result(folder, results, tmp_path):
    assert study.main(["--task=ops", "--parts", "copy", "gain", "--small", "--output", str(tmp_path)]) == 0
    again = json.loads((tmp_path / "ops.json").read_text())
    assert list(again["parts"]) == ["copy", "gain"]
    assert all(again["parts"][part] == results["parts"][part] for part in again["parts"])
    assert not (tmp_path / "ops_bank.png").exists()


def test_exit_status_tells_when_a_conclusion_fails(monkeypatch, tmp_path, capsys):
    part = study_ops.gain(study_ops.SMALL)
    part["input_at_short_step"]["foh"] = 0.5
    monkeypatch.setitem(study_ops.PARTS, "gain", lambda sizes: part)
    assert study.main(["--task", "ops", "--parts", "gain", "--output", str(tmp_path)]) == 1
    assert "does not hold in this run: With short steps foh" in re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "Does not hold in this run" in (tmp_path / "ops.html").read_text(encoding="utf-8")


def test_text_in_plots_does_not_overlap_or_leave_the_page(results):
    for part, values in results["parts"].items():
        figure = study_ops_report.PLOTS[part][0](values)
        figure.draw_without_rendering()
        page = figure.bbox.padded(1)
        boxes = [axes.title.get_window_extent() for axes in figure.axes]
        boxes += [legend.get_window_extent() for legend in figure.legends]
        for i, box in enumerate(boxes):
            assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, part
            assert not any(box.overlaps(other) for other in boxes[i + 1 :]), part


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--task", "nonsense"], "argument --task: invalid choice: 'nonsense'"),
        (["--task", "ops", "--parts", "nonsense"], "argument --parts: invalid choice: 'nonsense'"),
        (["--task", "ops", "--seeds", "1"], "unrecognized arguments: --seeds 1"),
        (["--task", "ops", "--", "--lr", "1"], "unrecognized arguments"),
    ],
)
def test_bad_arguments_are_named(capsys, argv, message):
    with pytest.raises(SystemExit) as stopped:
        study.main(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_an_output_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert study.main(["--task", "ops", "--output", str(tmp_path / "file")]) == 2
    assert "--output" in (message := capsys.readouterr().err) and "give a folder" in message


def test_the_default_task_is_the_one_that_trains():
    assert study.split_task(["--preset", "smoke", "--", "--task", "ops"]) == (
        "cls",
        ["--preset", "smoke", "--", "--task", "ops"],
    )
    assert study.split_task(["--task", "ops", "--small"]) == ("ops", ["--small"])


def test_as_a_script():
    help_text = subprocess.run(
        [sys.executable, str(SCRIPTS / "study.py"), "--task", "ops", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert all(part in help_text for part in study_ops.PARTS)
