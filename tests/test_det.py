"""Detection as it is used: the configurations, train, kill, resume, test, draw; and what is said of bad input."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from dense_runs import BRIEF, ROOT, TINY, call, check_resumption_after_kill, data_options, metric_options
from PIL import Image

pytest.importorskip("mmdet", reason="scripts/install_mm.sh det installs OpenMMLab's packages")

from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from det.neck import SimpleFeaturePyramid
from vim.openmmlab.runs import RunError, check_classes, check_data, load_config

DIGITS = "det/configs/mask_rcnn_vim_digits.py"
SHAPES = ["model.neck.in_channels=16"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("det") / "scenes"
    small = ["--train", "6", "--val", "2", "--size", "96", "120", "--vary", "0.2", "--digits", "1", "3"]
    call("tools/make_digit_scenes.py", "--out", folder, *small)
    return folder


@pytest.fixture(scope="module")
def options(scenes) -> list[str]:
    return [*TINY, *SHAPES, *BRIEF, *data_options(scenes), *metric_options(scenes)]


@pytest.fixture(scope="module")
def run(tmp_path_factory, options) -> Path:
    """A run of four updates that nothing disturbed: batches of two images of different sizes."""
    folder = tmp_path_factory.mktemp("det-run") / "run"
    output = call("det/train.py", DIGITS, "--work-dir", folder, options=options)
    assert "bbox_mAP_copypaste" in output and "segm_mAP_copypaste" in output
    return folder


def build(config: str, **changes):
    cfg = load_config(ROOT / config, changes)
    init_default_scope("mmdet")
    return MODELS.build(cfg.model)


# --- the configurations and the pyramid ---


@pytest.mark.parametrize("path", sorted((ROOT / "det/configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_configuration_builds(path):
    cfg = load_config(path)
    with torch.device("meta"):
        init_default_scope("mmdet")
        model = MODELS.build(cfg.model)
    assert model.neck.levels[-1][-1].normalized_shape == (256 if "coco" in path.stem else 64,)
    assert cfg.optim_wrapper.constructor == "VisionMambaLayerDecay"


def test_published_recipes():
    for head in ("mask_rcnn", "cascade_mask_rcnn"):
        for size, decay in (("tiny", 0.837), ("small", 0.837), ("base", 0.7)):
            cfg = Config.fromfile(ROOT / f"det/configs/{head}_vim_{size}_coco.py")
            assert cfg.optim_wrapper.paramwise_cfg.layer_decay_rate == decay
            assert (cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.optimizer.weight_decay) == (1e-4, 0.1)
            assert cfg.train_cfg.max_iters == 184_375 and cfg.train_dataloader.batch_size * 8 == 64
            assert cfg.param_scheduler[0].end == 250 and cfg.param_scheduler[1].milestones == [163_889, 177_546]
            assert cfg.model.backbone.img_size == 1024 and cfg.model.neck.out_channels == 256


def test_pyramid_of_one_map():
    pyramid = SimpleFeaturePyramid(in_channels=16, out_channels=8, num_outs=5)
    outs = pyramid([torch.randn(2, 16, 5, 7)])
    assert [tuple(o.shape) for o in outs] == [(2, 8, 20, 28), (2, 8, 10, 14), (2, 8, 5, 7), (2, 8, 3, 4), (2, 8, 2, 2)]
    # Every level ends with LayerNorm over the channels.
    torch.testing.assert_close(outs[0].mean(1), torch.zeros(2, 20, 28), atol=1e-5, rtol=0)
    for options, message in (
        ({"in_channels": 6}, "multiple of 4"),
        ({"in_channels": 8, "scales": (3.0,)}, "scales must be some of"),
        ({"in_channels": 8, "num_outs": 3}, "num_outs must be at least 4"),
    ):
        with pytest.raises(ValueError, match=message):
            SimpleFeaturePyramid(**options)
    with pytest.raises(ValueError, match="takes one map; got 2"):
        pyramid([torch.zeros(1, 16, 2, 2)] * 2)


def test_regions_are_cut_from_where_they_are():
    """mmcv's RoIAlign takes any map for a contiguous one, so that it must get no other."""
    cfg = Config.fromfile(str(ROOT / DIGITS))
    init_default_scope("mmdet")
    extractor = MODELS.build({**cfg.model.roi_head.bbox_roi_extractor, "out_channels": 8})
    backbone = MODELS.build({**cfg.model.backbone, "if_fpn": False})
    assert all(m.is_contiguous() for m in backbone(torch.randn(1, 3, 64, 64)))
    with_pyramid = MODELS.build({**cfg.model.backbone, "if_fpn": True, "out_indices": [0, 1, 2, 3]})
    assert all(m.is_contiguous() for m in with_pyramid(torch.randn(1, 3, 64, 64)))

    maps = SimpleFeaturePyramid(in_channels=16, out_channels=8, num_outs=3, scales=(2.0, 1.0, 0.5))(
        [torch.randn(2, 16, 8, 8)]
    )
    regions = torch.tensor([[0.0, 3.0, 5.0, 14.0, 16.0], [1.0, 10.0, 8.0, 50.0, 60.0]])
    levels = extractor.map_roi_levels(regions, len(maps))
    assert len(set(levels.tolist())) == 2
    for region, level, found in zip(regions, levels, extractor(maps, regions), strict=True):
        scale = 1 / cfg.model.roi_head.bbox_roi_extractor.featmap_strides[level]
        expected = torchvision.ops.roi_align(maps[level], region[None], 7, scale, sampling_ratio=-1, aligned=True)
        torch.testing.assert_close(found, expected[0])


def test_gradients_through_an_odd_rectangle_in_every_part():
    model = build(DIGITS, **{"model.backbone.embed_dim": 16, "model.backbone.depth": 2, "model.neck.in_channels": 16})
    sample = DetDataSample(metainfo={"img_shape": (97, 151), "pad_shape": (97, 151), "batch_input_shape": (97, 151)})
    from mmdet.structures.mask import BitmapMasks

    sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[10.0, 10, 50, 60], [80, 20, 140, 90]]),
        labels=torch.tensor([3, 7]),
        masks=BitmapMasks([np.ones((97, 151), np.uint8)] * 2, 97, 151),
    )
    losses = model.loss(torch.randn(1, 3, 97, 151), [sample])
    flat = [v for value in losses.values() for v in (value if isinstance(value, list) else [value])]
    sum(v for v in flat if v.requires_grad).backward()
    lacking = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert lacking == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# --- the command lines ---


def test_resumes_after_kill(options, tmp_path):
    check_resumption_after_kill("det/train.py", DIGITS, options, tmp_path / "killed")


def test_tests_a_checkpoint_and_draws_it(run, options, tmp_path):
    pictures = tmp_path / "pictures"
    arguments = [DIGITS, run / "iter_4.pth", "--work-dir", tmp_path / "log", "--show-dir", pictures]
    assert "bbox_mAP_copypaste" in call("det/test.py", *arguments, options=options)
    assert len(list(pictures.rglob("*.png"))) == 2


def test_draws_the_prediction_for_an_image(run, scenes, tmp_path):
    image = scenes / "images/validation/00000.png"
    call("det/infer.py", image, "--run", run, "--out", tmp_path / "overlay.png", "--score", "0")
    assert np.array(Image.open(tmp_path / "overlay.png").convert("RGB")).shape == np.array(Image.open(image)).shape


# --- bad input ---


def test_missing_data_is_named(options, tmp_path):
    nowhere = tmp_path / "nowhere"
    changes = [*options, f"train_dataloader.dataset.data_root={nowhere}"]
    output = call("det/train.py", DIGITS, "--work-dir", tmp_path, options=changes, status=2)
    assert f"det: the data set of train_dataloader is not there: no '{nowhere}'" in output
    with pytest.raises(RunError, match="download it"):
        check_data(Config.fromfile(ROOT / "det/configs/mask_rcnn_vim_tiny_coco.py"), ("train",))


def test_other_number_of_classes_is_named():
    cfg = Config.fromfile(ROOT / "det/configs/cascade_mask_rcnn_vim_tiny_coco.py")
    load_config(ROOT / "det/configs/cascade_mask_rcnn_vim_tiny_coco.py")  # as it is, it passes
    cfg.model.roi_head.bbox_head[1].num_classes = 10
    with pytest.raises(RunError, match=r"model.roi_head.bbox_head.1.num_classes=10, but the training set has 80"):
        check_classes(cfg)


def test_checkpoint_of_another_width_is_named(run, options, tmp_path):
    wide = ["model.backbone.embed_dim=32", "model.neck.in_channels=32"]
    arguments = [DIGITS, run / "iter_4.pth", "--work-dir", tmp_path]
    output = call("det/test.py", *arguments, options=[*options, *wide], status=2)
    assert "does not fit this model" in output and "(1, 256, 16) instead of (1, 256, 32)" in output
