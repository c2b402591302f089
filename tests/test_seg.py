"""Segmentation as it is used: the configurations, train, kill, resume, test, draw; and what is said of bad input."""

import shlex
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_runs import BRIEF, ROOT, TINY, call, check_resumption_after_kill, data_options, weights
from PIL import Image

pytest.importorskip("mmseg", reason="scripts/install_mm.sh seg installs OpenMMLab's packages")

from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import init_default_scope
from mmengine.runner import load_checkpoint
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from mmseg.utils import register_all_modules

from mamba_ssm.ops.discretization_ref import METHODS
from vim.checkpoint import CheckpointError
from vim.openmmlab.runs import RunError, check_classes, check_data, check_weights, load_config, training_parser

DIGITS = "seg/configs/upernet_vim_digits.py"
SHAPES = ["model.backbone.out_indices=[0]", "model.backbone.last_layer_process=none", "model.decode_head.channels=8",
          "model.decode_head.in_channels=[16,16,16,16]", "model.auxiliary_head.in_channels=16"]  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("seg") / "scenes"
    small = ["--train", "6", "--val", "2", "--size", "96", "120", "--vary", "0.2", "--digits", "1", "3"]
    call("tools/make_digit_scenes.py", "--out", folder, *small)
    return folder


@pytest.fixture(scope="module")
def options(scenes) -> list[str]:
    return [*TINY, *SHAPES, *BRIEF, *data_options(scenes)]


@pytest.fixture(scope="module")
def run(tmp_path_factory, options) -> Path:
    """A run of four updates that nothing disturbed."""
    folder = tmp_path_factory.mktemp("seg-run") / "run"
    output = call("seg/train.py", DIGITS, "--work-dir", folder, options=options)
    assert "mIoU" in output
    return folder


def build(config: str, **changes):
    register_all_modules()
    cfg = load_config(ROOT / config, changes)
    init_default_scope("mmseg")
    return MODELS.build(cfg.model)


def samples(batch: int, height: int, width: int, classes: int = 11) -> list[SegDataSample]:
    found = []
    for _ in range(batch):
        sample = SegDataSample()
        sample.gt_sem_seg = PixelData(data=torch.randint(classes, (1, height, width)))
        sample.set_metainfo({"img_shape": (height, width), "ori_shape": (height, width), "pad_shape": (height, width)})
        found.append(sample)
    return found


# --- the configurations ---


def test_published_parameter_count():
    """12,901,100 is the published count of UPerNet with Vim-Ti, auxiliary head included, made for 1024×1024 pixels."""
    model = build("seg/configs/upernet_vim_tiny_ade20k.py", **{"model.backbone.img_size": 1024})
    assert sum(p.numel() for p in model.parameters()) == 12_901_100
    # For 512×512 the position embedding has 3,072 rows less.
    at_512 = build("seg/configs/upernet_vim_tiny_ade20k.py")
    assert sum(p.numel() for p in at_512.parameters()) == 12_901_100 - 3072 * 192


@pytest.mark.parametrize("path", sorted((ROOT / "seg/configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_configuration_builds(path):
    cfg = load_config(path)
    with torch.device("meta"):
        init_default_scope("mmseg")
        model = MODELS.build(cfg.model)
    assert model.backbone.layers[0].mixer.discretization_method == "zoh"
    assert cfg.optim_wrapper.constructor == "VisionMambaLayerDecay"


def test_published_recipes():
    tiny, small = (Config.fromfile(ROOT / f"seg/configs/upernet_vim_{size}_ade20k.py") for size in ("tiny", "small"))
    assert (tiny.optim_wrapper.optimizer.lr, tiny.optim_wrapper.optimizer.weight_decay) == (2e-4, 0.1)
    assert (small.optim_wrapper.optimizer.lr, small.optim_wrapper.optimizer.weight_decay) == (1e-4, 0.05)
    assert [c.optim_wrapper.paramwise_cfg.layer_decay_rate for c in (tiny, small)] == [0.92, 0.95]
    assert small.model.backbone.if_rope and small.model.backbone.use_residual_as_feature
    for cfg in (tiny, small):
        assert cfg.train_cfg.max_iters == 60_000 and cfg.train_dataloader.batch_size * 4 == 32
        assert cfg.param_scheduler[0].end == 1500 and cfg.model.test_cfg.mode == "slide"


def test_the_method_is_one_variable():
    model = build(DIGITS, **{"model.backbone.discretization_method": "bilinear"})
    assert {block.mixer.discretization_method for block in model.backbone.layers} == {"bilinear"}


def test_documented_commands_parse():
    text = (ROOT / "documentation/segmentation_detection.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith(("python ", "scripts/"))]
    trained = [words[2:] for words in lines if words[:1] == ["python"] and words[1].endswith("/train.py")]
    trained += [[words[1], *words[3:]] for words in lines if words[0].startswith("scripts/dist_train_")]
    assert len(trained) == 4
    for argv in trained:
        args = training_parser("seg").parse_args(argv)
        cfg = Config.fromfile(ROOT / args.config)
        cfg.merge_from_dict(args.cfg_options or {})
        assert cfg.model.backbone.discretization_method in METHODS


# --- odd sizes ---


def test_odd_rectangles_through_training_and_sliding_windows():
    changes = dict(option.split("=") for option in TINY)
    model = build(
        DIGITS,
        **{k: int(v) for k, v in changes.items()},
        **{
            "model.backbone.out_indices": [0],
            "model.backbone.last_layer_process": "none",
            "model.decode_head.channels": 8,
            "model.decode_head.in_channels": [16] * 4,
            "model.auxiliary_head.in_channels": 16,
            "model.test_cfg": {"mode": "slide", "crop_size": (256, 256), "stride": (171, 171)},
        },
    )
    images = torch.randn(2, 3, 513, 767)  # two: batch norm over a pooled 1×1 map
    losses = model.train().loss(images, samples(2, 513, 767))
    sum(v for k, v in losses.items() if "loss" in k).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        (result,) = model.eval().predict(images[:1], samples(1, 513, 767))
    assert result.pred_sem_seg.data.shape == (1, 513, 767)
    assert result.seg_logits.data.isfinite().all()


# --- the command lines ---


def test_resumes_after_kill(options, tmp_path):
    check_resumption_after_kill("seg/train.py", DIGITS, options, tmp_path / "killed")


def test_a_resumed_run_goes_on_from_the_weights_of_the_stopped_one(run, options, tmp_path):
    call("seg/train.py", DIGITS, "--work-dir", tmp_path, options=[*options, "train_cfg.max_iters=2"])
    before = weights(tmp_path / "iter_2.pth")
    call("seg/train.py", DIGITS, "--work-dir", tmp_path, "--resume", options=options)
    after, expected = weights(tmp_path / "iter_4.pth"), weights(run / "iter_4.pth")
    assert after.keys() == expected.keys()
    assert any(not torch.equal(after[name], before[name]) for name in after)
    torch.testing.assert_close(before, weights(run / "iter_2.pth"), rtol=0, atol=0)


def test_tests_a_checkpoint_and_draws_it(run, options, tmp_path):
    pictures = tmp_path / "pictures"
    arguments = [DIGITS, run / "iter_4.pth", "--work-dir", tmp_path / "log", "--show-dir", pictures]
    output = call("seg/test.py", *arguments, options=options)
    assert "mIoU" in output and "weights_only=False" not in output  # loads as a file that cannot run code
    assert len(list(pictures.rglob("*.png"))) == 2


def test_draws_the_prediction_for_an_image(run, scenes, tmp_path):
    image = scenes / "images/validation/00000.png"
    call("seg/infer.py", image, "--run", run, "--out", tmp_path / "overlay.png")
    overlay = np.array(Image.open(tmp_path / "overlay.png").convert("RGB"))
    original = np.array(Image.open(image))
    assert overlay.shape == original.shape and not np.array_equal(overlay, original)


# --- bad input ---


def test_missing_data_is_named(options, tmp_path):
    changes = [*options, f"train_dataloader.dataset.data_root={tmp_path / 'nowhere'}"]
    output = call("seg/train.py", DIGITS, "--work-dir", tmp_path, options=changes, status=2)
    assert f"seg: the data set of train_dataloader is not there: no '{tmp_path / 'nowhere'}'" in output
    assert "--cfg-options train_dataloader.dataset.data_root=FOLDER" in output and "Traceback" not in output
    with pytest.raises(RunError, match="download it"):
        check_data(Config.fromfile(ROOT / "seg/configs/upernet_vim_tiny_ade20k.py"), ("train",))


def test_other_number_of_classes_is_named():
    cfg = Config.fromfile(ROOT / DIGITS)
    cfg.model.auxiliary_head.num_classes = 10
    with pytest.raises(RunError, match=r"model.auxiliary_head.num_classes=10, but the training set has 11 classes"):
        check_classes(cfg)


def test_checkpoint_of_another_width_is_named(run, options, tmp_path):
    wide = ["model.backbone.embed_dim=32", "model.decode_head.in_channels=[32,32,32,32]",
            "model.auxiliary_head.in_channels=32"]  # fmt: skip
    arguments = [DIGITS, run / "iter_4.pth", "--work-dir", tmp_path]
    output = call("seg/test.py", *arguments, options=[*options, *wide], status=2)
    assert "does not fit this model" in output and "patch_embed.proj.bias (16,) instead of (32,)" in output
    output = call("seg/test.py", DIGITS, tmp_path / "no.pth", "--work-dir", tmp_path, options=options, status=2)
    assert "no checkpoint at" in output


def test_what_a_checkpoint_may_hold(tmp_path):
    model = torch.nn.Linear(2, 2)
    logged = HistoryBuffer()
    logged.update(0.5)
    hub = {"loss": logged, "numbers": [np.float32(1), np.float64(2), np.int64(3)], "array": np.ones(3)}
    path = tmp_path / "iter_1.pth"
    torch.save({"state_dict": model.state_dict(), "message_hub": hub}, path)
    for _ in range(2):  # MMEngine loads it in between
        assert torch.equal(check_weights(model, path)["weight"], model.weight)
        load_checkpoint(model, str(path), "cpu")
    with zipfile.ZipFile(path) as file, zipfile.ZipFile(tmp_path / "numpy1.pth", "w") as old:
        for entry in file.infolist():
            old.writestr(entry.filename, file.read(entry).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    check_weights(model, tmp_path / "numpy1.pth")
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(CheckpointError, match="truncated, corrupt or not a checkpoint"):
        check_weights(model, path)
    torch.save({"state_dict": model.state_dict(), "ratio": Fraction(1, 2)}, path)
    with pytest.raises(CheckpointError, match=r"holds a fractions\.Fraction; only tensors and plain types"):
        check_weights(model, path)


def test_out_of_range_blocks_are_named(options, tmp_path):
    changes = [*options, "model.backbone.out_indices=[7]"]
    output = call("seg/train.py", DIGITS, "--work-dir", tmp_path, options=changes, status=1)
    assert "out_indices must be ascending numbers from 0 to 1; got (7,)" in output


def test_other_mistakes_are_named(tmp_path, capsys):
    with pytest.raises(RunError, match="no configuration at"):
        load_config(tmp_path / "none.py")
    assert "give --run FOLDER" in call("seg/infer.py", tmp_path / "x.png", status=2)
    if not torch.cuda.is_available():
        assert "--amp needs a GPU" in call("seg/train.py", DIGITS, "--amp", "--work-dir", tmp_path, status=2)
