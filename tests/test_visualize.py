"""`vim.inspection`: what is shown is what the model does; `python -m vim.visualize`: files, and what is refused."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image
from trainer_runs import BRIEF, DIGITS, VIM
from trainer_runs import main as train

from mamba_ssm.ops.discretization_ref import METHODS
from mamba_ssm.ops.mamba_inner import split_channels
from mamba_ssm.ops.selective_scan_interface import ScanArgs, selective_scan_fn
from vim.inspection import (
    Scan,
    class_activation,
    effective_receptive_field,
    hidden_attention,
    layer_scans,
    mean_attention,
    patch_places,
    patches,
    scans,
    steps,
)
from vim.models_mamba import VisionMamba
from vim.trained import load_trained
from vim.visualize import look, main, read_image


def tiny(**options):
    defaults = {"img_size": 16, "patch_size": 4, "stride": 4, "depth": 2, "embed_dim": 16, "num_classes": 5}
    return VisionMamba(**{**defaults, **options}).eval()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_rows_of_hidden_attention_times_inputs_are_the_scan(method, reverse):
    batch, channels, states, length = 2, 3, 4, 37
    A = -torch.tensor([0.01, 1.0, 3.0, 16.0]).expand(channels, states)
    u, delta = torch.randn(2, batch, channels, length)
    args = ScanArgs(u, delta, A, *torch.randn(2, batch, states, length), torch.randn(channels), torch.randn(channels))
    alpha = hidden_attention(Scan(args, reverse, method))
    y = torch.einsum("bdts,bds->bdt", alpha, u) + args.D[:, None] * u
    expected = selective_scan_fn(
        *args[:6], delta_bias=args.delta_bias, delta_softplus=True, discretization_method=method, reverse=reverse
    )
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    future = torch.ones(length, length).tril(-1).T if not reverse else torch.ones(length, length).tril(-1)
    assert (alpha * future).abs().max() == 0 and alpha.abs().amax() > 0  # causal
    torch.testing.assert_close(mean_attention(Scan(args, reverse, method), chunk=2), alpha.abs().mean(1))


@pytest.mark.parametrize(
    "options",
    [
        {"discretization_method": "bilinear"},
        {"if_bimamba": True, "if_divide_out": False},
        {"bimamba_type": "none", "if_bidirectional": True, "if_divide_out": False},  # the second block reads backwards
    ],
)
@torch.no_grad()
def test_attention_of_a_model_gives_its_mixers_outputs(options):
    model = tiny(**options)
    images, read = torch.randn(2, 3, 16, 16), {}
    for i, block in enumerate(model.layers):
        block.mixer.register_forward_hook(lambda _, args, out, i=i: read.update({i: (args[0], out)}))
    found = layer_scans(model, images, [0, 1])
    assert [len(found[i]) for i in (0, 1)] == [1, 1] if options.get("bimamba_type") else [2, 2]
    for i, block in enumerate(model.layers):
        hidden_states, expected = read[i]
        y = sum(
            torch.einsum("bdts,bds->bdt", hidden_attention(scan), scan.args.u) + scan.args.D[:, None] * scan.args.u
            for scan in found[i]
        )
        _, z = split_channels(block.mixer.in_proj(hidden_states).transpose(1, 2))
        y = y * torch.nn.functional.silu(z) * (0.5 if block.mixer.if_divide_out else 1)
        torch.testing.assert_close(block.mixer.out_proj(y.transpose(1, 2)), expected, rtol=1e-4, atol=1e-5)


def test_steps_are_what_the_scan_takes():
    mixer = tiny().layers[0].mixer
    (along, against) = scans(mixer, torch.randn(1, 7, 16))
    assert not along.reverse and against.reverse
    assert steps(along).shape == (1, 32, 7) and steps(along).min() > 0
    bias = mixer.dt_proj.bias.detach()
    zero = along._replace(args=along.args._replace(delta=torch.zeros(1, 32, 7)))
    torch.testing.assert_close(steps(zero)[0, :, 0].detach(), torch.nn.functional.softplus(bias))


def test_patches_leave_the_class_token_out():
    model, images = tiny(), torch.zeros(1, 3, 16, 16)
    assert patch_places(model, images) == [*range(8), *range(9, 17)]
    grid = patches(model, images, torch.arange(17))
    assert grid.shape == (4, 4) and grid[2, 0] == 9


def test_class_activation_is_its_definition():
    model = tiny(depth=3)
    images = torch.randn(2, 3, 16, 16)
    maps, logits = class_activation(model, images, [0, 2], target=3)
    torch.testing.assert_close(logits, model(images).detach())
    for layer in (0, 2):  # the gradient by differences, along random directions of what the mixer reads
        read = {}

        def replace(_, args, added=None, read=read):
            read["tokens"] = args[0].detach()
            return (args[0] + (0 if added is None else added), *args[1:])

        def score(added=None, layer=layer, replace=replace):
            hook = model.layers[layer].mixer.register_forward_pre_hook(lambda m, a: replace(m, a, added))
            with torch.no_grad():
                result = model(images)[:, 3].double()
            hook.remove()
            return result

        score()
        tokens = patches(model, images, read["tokens"].transpose(1, 2))
        weights = torch.empty(2, 16, dtype=torch.float64)
        for channel in range(16):
            step = torch.zeros_like(read["tokens"])
            step[:, patch_places(model, images), channel] = 0.05
            weights[:, channel] = (score(step) - score(-step)) / 0.1 / 16  # the mean over 16 patches
        expected = torch.einsum("bd,bdhw->bhw", weights.float(), tokens).relu()
        torch.testing.assert_close(maps[layer], expected, rtol=2e-2, atol=2e-2 * expected.max().item())
        assert maps[layer].max() > 0


def test_receptive_field_is_the_influence_of_pixels():
    model = tiny(depth=3, bimamba_type="none")
    images = torch.randn(1, 3, 16, 16)
    fields = effective_receptive_field(model, images, [0, 1], place=(1, 2))
    token = patch_places(model, images)[1 * 4 + 2]
    read = {}
    model.layers[1].register_forward_hook(lambda _, args, out: read.update(feature=(out[0] + out[1])[0, token].sum()))
    for row, column in ((5, 9), (0, 0)):
        influence = 0.0
        for channel in range(3):
            values = []
            for sign in (1, -1):
                moved = images.clone()
                moved[0, channel, row, column] += sign * 0.05
                with torch.no_grad():
                    model(moved)
                values.append(read["feature"].double())
            influence += abs((values[0] - values[1]) / 0.1)
        assert fields[1][0, row, column].item() == pytest.approx(influence.item(), rel=0.05, abs=1e-4)
    assert fields[0].shape == (1, 16, 16)
    assert fields[1][0, 4:8, 8:12].min() > 0 and fields[1][0, 8:].max() == 0  # causal: nothing from later patches


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A checkpoint of a short training, and an image of the data set."""
    folder = tmp_path_factory.mktemp("digits")
    train([*VIM, *DIGITS, *BRIEF, "--discretization-method", "poly", "--epochs", "1", "--output_dir", str(folder)])
    data = load_digits()
    Image.fromarray((data.images[5] * 255 / 16).astype(np.uint8)).save(folder / "image.png")
    return folder / "checkpoint.pth", folder / "image.png"


def test_image_is_read_as_the_trainer_reads_it(digits):
    images, shown = read_image(digits[1], load_trained(digits[0]))
    pixels = torch.from_numpy(load_digits().images[5] / 16).float()
    torch.testing.assert_close(images[0, 0], (pixels - 0.305) / 0.376, rtol=0, atol=0.02)
    assert shown.shape == (8, 8, 3)


def test_pictures_and_page_of_a_trained_model(tmp_path, capsys, digits):
    checkpoint, image = digits
    output = tmp_path / "looked at"
    assert main([str(image), "--resume", str(checkpoint), "--layers", "0", "-1", "--output", str(output)]) == 0
    names = ["attention.png", "delta.png", "activation.png", "receptive_field.png", "index.html"]
    assert capsys.readouterr().out.splitlines() == [str(output / name) for name in names]
    for name in names[:-1]:
        picture = np.asarray(Image.open(output / name))
        assert picture.std() > 10  # something is on it
    page = (output / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "http" not in page  # one file, nothing from elsewhere
    trained = load_trained(checkpoint)
    probabilities = trained.model(read_image(image, trained)[0]).softmax(-1)[0]
    assert f"<td>{probabilities.argmax()}</td><td>{probabilities.max():.4f}</td>" in page
    assert "vim_tiny, poly" in page and "epoch 0" in page


@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_a_photograph(tmp_path, method):
    path = tmp_path / "photograph.jpg"
    Image.fromarray(load_sample_image("china.jpg")).save(path)
    small = {"depth": 2, "embed_dim": 16, "patch_size": 16}
    trained = load_trained(None, name="vim_tiny", method=method, input_size=[64, 48], model_kwargs=small)
    images, shown = read_image(path, trained)
    assert images.shape == (1, 3, 64, 48) and shown.shape == (64, 48, 3)
    found = look(trained, images, [1])
    assert found["attention"][1].keys() == {"along", "against"} and found["attention"][1]["along"].shape == (13, 13)
    assert found["delta"][1]["against"].shape == found["taken"][1].shape == found["activation"][1].shape == (4, 3)
    assert found["receptive_field"][1].shape == (64, 48)
    assert all(value.isfinite().all() and value.max() > 0 for value in (found["taken"][1], found["receptive_field"][1]))


@pytest.mark.cuda
def test_on_a_gpu(tmp_path, digits):
    checkpoint, image = digits
    for device in ("cpu", "cuda"):
        argv = [str(image), "--resume", str(checkpoint), "--device", device, "--output", str(tmp_path / device)]
        assert main(argv) == 0
    one, other = (np.asarray(Image.open(tmp_path / d / "delta.png"), dtype=float) for d in ("cpu", "cuda"))
    assert abs(one - other).mean() < 1


SMALL = ["--model", "vim_tiny", "--model-kwargs", "depth=2", "embed_dim=16", "--input-size", "32"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nowhere.png", *SMALL], "IMAGE nowhere.png cannot be read: .*No such file"),
        (["text.png", *SMALL], "IMAGE text.png cannot be read: cannot identify image"),
        ([".", *SMALL], "IMAGE . cannot be read"),
        (["image.png", *SMALL, "--layers", "2"], "--layers: got 2; the model has 2: expected -2 to 1"),
        (["image.png", *SMALL, "--layers", "0", "-3"], "--layers: got -3"),
        (["image.png", *SMALL, "--class", "1000"], "--class: got 1000; the model has classes 0 to 999"),
        (["image.png", *SMALL, "--device", "cuda:63"], "torch sees . GPUs; use --device cpu"),
        (["image.png", *SMALL, "--device", "abacus"], "expected cpu, cuda or cuda:N"),
        (["image.png", *SMALL, "--discretization-method", "euler"], "unknown method 'euler'"),
        (["image.png", *SMALL, "num_classes=0"], "--input-size|no classes"),
        (["image.png", "--model", "vim_tinny"], "timm knows no model 'vim_tinny'"),
        (["image.png", "--model", "resnet18"], "resnet18 has no state space to look into"),
        (["image.png", "--resume", "text.png"], "text.png is not a checkpoint|text.png is truncated"),
        (["image.png", *SMALL, "--output", "text.png"], "there is a file of that name; expected a folder"),
    ],
)
def test_refused(argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no image")
    Image.new("RGB", (40, 40)).save("image.png")
    try:
        status = main(["--output", "out", *argv])
    except SystemExit as exit:  # argparse's own
        status = exit.code
    assert status == 2
    errors = capsys.readouterr().err
    assert "vim.visualize: error: " in errors and re.search(said, errors), errors
    assert not (tmp_path / "out").exists()
