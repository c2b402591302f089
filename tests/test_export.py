"""`python -m vim.export` and the ONNX form of the operators: equal to ours, at other sizes too, or refused."""

import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim
from trainer_runs import BRIEF, DIGITS, VIM
from trainer_runs import main as train

from mamba_ssm.ops.discretization_ref import METHODS
from mamba_ssm.ops.onnx_export import DOMAIN, _scan, to_onnx
from mamba_ssm.ops.onnx_scan import OPSET, TRANSLATIONS, linear_recurrence
from mamba_ssm.ops.selective_scan_interface import ScanArgs, selective_scan_fn
from vim.export import largest_difference, main, open_onnx, open_torch
from vim.models_mamba import VisionMamba
from vim.trained import load_trained

pytestmark = pytest.mark.needs_kernel

SMALL = ["--model", "vim_tiny", "--model-kwargs", "depth=1", "embed_dim=16", "patch_size=4", "stride=4"]


def opened(program):
    """In onnxruntime: tensors in, arrays out."""
    model = program.model_proto
    names = [value.name for value in model.graph.input]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda *tensors: session.run(None, {name: t.numpy() for name, t in zip(names, tensors, strict=True)})


def exported(module, *inputs):
    """The module in onnxruntime; the first dimension of every input is dynamic."""
    shapes = tuple({0: Dim("batch", min=1)} for _ in inputs)
    with torch.no_grad():
        return opened(to_onnx(torch.export.export(module.eval(), inputs, dynamic_shapes=shapes, strict=False)))


class EveryScan(nn.Module):
    """What the ONNX functions make of a scan, for each method and direction."""

    def forward(self, u, delta, A, B, C):
        args = ScanArgs(u, delta, A, B, C)
        return [_scan(args, True, reverse, method) for method in METHODS for reverse in (False, True)]


def test_every_method_in_both_directions():
    batch, channels, states, length = 2, 3, 4, 9
    A = -torch.tensor([0.01, 1.0, 3.0, 16.0]).expand(channels, states)

    def tensors(batch):
        delta = (
            torch.linspace(-5, 3, channels * length).view(channels, length).expand(batch, -1, -1)
        )  # Δ to 3: x to -49
        return torch.randn(batch, channels, length), delta, A, *torch.randn(2, batch, states, length)

    dynamic = {0: Dim("batch", min=1)}
    with torch.no_grad():
        shapes = (dynamic, dynamic, {}, dynamic, dynamic)
        program = torch.export.export(EveryScan(), tensors(batch), dynamic_shapes=shapes, strict=False)
    run = opened(torch.onnx.export(program, opset_version=OPSET, verbose=False, custom_translation_table=TRANSLATIONS))
    for batch in (1, 3):
        inputs = tensors(batch)
        found = iter(run(*inputs))
        for method in METHODS:
            for reverse in (False, True):
                ours = selective_scan_fn(*inputs, delta_softplus=True, discretization_method=method, reverse=reverse)
                error = np.abs(next(found) - ours.numpy()).max() / ours.abs().max()
                assert error < 1e-5, (method, reverse, error)


@pytest.mark.parametrize(
    "options",
    [
        {"if_bimamba": True, "rms_norm": False, "final_pool_type": "mean", "if_cls_token": False},
        {"if_bidirectional": True, "if_rope": True, "fused_add_norm": False, "init_layer_scale": 0.1},
    ],
)
def test_other_architectures(options):
    model = VisionMamba(img_size=16, patch_size=4, stride=4, depth=2, embed_dim=16, num_classes=5, **options)
    run = exported(model, torch.randn(2, 3, 16, 16))
    for batch in (1, 3):
        images = torch.randn(batch, 3, 16, 16)
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(run(images)[0]), model(images), rtol=1e-4, atol=1e-4)


def test_layers_of_one_shape_share_a_function(tmp_path):
    model = VisionMamba(img_size=8, patch_size=4, stride=4, depth=3, embed_dim=16)
    with torch.no_grad():
        program = torch.export.export(model.eval(), (torch.randn(1, 3, 8, 8),), strict=False)
    graph = to_onnx(program).model_proto
    onnx.checker.check_model(graph, full_check=True)
    assert [node.op_type for node in graph.graph.node].count("mixer") == 3
    names = [function.name for function in graph.functions if function.domain == DOMAIN]
    assert sorted(names) == ["add_norm", "add_norm_1", "mixer"]  # the first norm has no residual
    assert {node.domain for function in graph.functions for node in function.node} == {""}  # standard ONNX


def test_recurrence_is_the_sum_it_stands_for():
    a, b = torch.rand(2, 5, 1, 2, 3, dtype=torch.float64)
    C = torch.randn(5, 1, 3, 1, dtype=torch.float64)
    for reverse in (False, True):
        y = linear_recurrence(a, b, C, reverse)
        for t in range(5):
            past = range(t, 5) if reverse else range(t + 1)
            terms = [b[s] * torch.prod(a[t:s] if reverse else a[s + 1 : t + 1], dim=0) for s in past]
            torch.testing.assert_close(y[t], sum(terms) @ C[t])


def test_what_cannot_be_exported_is_refused():
    class Scan(nn.Module):
        def forward(self, u):
            channels, A = u.shape[1], -torch.ones(4, 2)
            return torch.ops.mamba_ssm.selective_scan_fwd(
                u, u, A, torch.ones(channels, 2), torch.ones(channels, 2), None, None, None, None, None, None,
                1.0, True, False, "zoh", False, 0,
            )[0]  # fmt: skip

    with pytest.raises(NotImplementedError, match="B and C must be"):
        exported(Scan(), torch.randn(2, 4, 5))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a short training on handwritten digits."""
    output = tmp_path_factory.mktemp("digits")
    flags = ["--discretization-method", "bilinear", "--epochs", "1", "--output_dir", str(output)]
    train([*VIM, *DIGITS, *BRIEF, *flags])
    return output / "checkpoint.pth"


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_trained_model_of_any_size(tmp_path, capsys, checkpoint, suffix):
    path = tmp_path / f"digits.{suffix}"
    assert main(["--resume", str(checkpoint), "--output", str(path), "--dynamic-size"]) == 0
    out = capsys.readouterr().out
    assert f"{path}: " in out and "differs from the model by" in out and "epoch 0" in out
    model = load_trained(checkpoint, model_kwargs={"dynamic_img_size": True}).model
    run = open_onnx(path, threads=1) if suffix == "onnx" else open_torch(path)
    assert largest_difference(model, run, [(1, 1, 8, 8), (5, 1, 8, 8), (2, 1, 21, 14)]) < 1e-5
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # nothing left beside it
    if suffix == "onnx":
        about = {p.key: p.value for p in onnx.load(path).metadata_props}
        assert about["model"] == "vim_tiny" and about["discretization_method"] == "bilinear"


def test_other_models_of_timm(tmp_path):
    path = tmp_path / "vit.onnx"
    flags = ["--model", "vit_tiny_patch16_224", "--input-size", "32", "--model-kwargs", "depth=1"]
    assert main([*flags, "--output", str(path)]) == 0


def test_a_file_that_differs_is_removed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vim.export.largest_difference", lambda *_: 0.5)
    path = tmp_path / "model.pt2"
    assert main([*SMALL, "--input-size", "8", "--output", str(path)]) == 1
    assert "differ from the model's by 5.0e-01; removed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--model", "vim_tinny"], "--model: timm knows no model 'vim_tinny'; is it one of vim_tiny"),
        ([], "--model: give a name, or a checkpoint that knows its own"),
        (["--resume", "nowhere.pth"], "no checkpoint at nowhere.pth"),
        ([*SMALL, "--discretization-method", "euler"], "unknown method 'euler'; choose of zoh, foh"),
        (["--model", "resnet18", "--discretization-method", "zoh"], "resnet18 has no state space"),
        (["--model", "resnet18", "--dynamic-size"], "vim_tiny|resnet18.*(one image size|cannot be built)"),
        ([*SMALL, "--input-size", "9"], "cannot be built with .*not covered"),
        ([*SMALL, "--input-size", "8", "8", "8"], "--input-size: got 3 numbers"),
        ([*SMALL, "--use-ema"], "--use-ema needs --resume"),
        ([*SMALL, "--output", "model.pth"], "its name must end in .onnx"),
        ([*SMALL, "--format", "torch", "--output", "model.onnx"], "its name must end in .onnx .*or .pt2"),
        ([*SMALL, "--output", "nowhere/model.onnx"], "there is no folder nowhere"),
    ],
)
def test_refused(argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--output", "model.onnx", *argv]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("vim.export: error: ") and re.search(said, errors), errors


def test_reference_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("VIM_USE_CUDA_KERNEL", "0")
    assert main([*SMALL, "--input-size", "8", "--output", str(tmp_path / "model.onnx")]) == 2
    assert "unset VIM_USE_CUDA_KERNEL" in capsys.readouterr().err


def test_missing_packages_are_named(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("vim.export.find_spec", lambda name: None if name == "onnxscript" else True)
    assert main([*SMALL, "--output", str(tmp_path / "model.onnx")]) == 2
    assert "--format onnx needs onnxscript: pip install" in capsys.readouterr().err
