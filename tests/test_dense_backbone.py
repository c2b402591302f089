"""Vision Mamba as a backbone: which maps it gives, from which weights it starts, what of it is trained and how."""

import argparse

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("mmengine", reason="scripts/install_mm.sh installs OpenMMLab's packages")

from mmengine.optim import build_optim_wrapper

import vim.openmmlab.layer_decay  # noqa: F401, registers the constructor
from mamba_ssm.ops.discretization_ref import METHODS
from vim.checkpoint import CheckpointError
from vim.models_mamba import VisionMamba
from vim.openmmlab.backbone import DenseVisionMamba
from vim.pos_embed import remove_tokens, resize_pos_embed

SMALL = {"img_size": 32, "patch_size": 8, "stride": 8, "embed_dim": 16, "depth": 4, "d_state": 4, "drop_path_rate": 0.0}


def build(**options) -> DenseVisionMamba:
    torch.manual_seed(0)
    return DenseVisionMamba(**{**SMALL, "out_indices": (0, 1, 2, 3), "if_fpn": False, **options})


def classifier(path, **options) -> VisionMamba:
    """A classifier with its class token in the middle, and its checkpoint at `path`, as they are published."""
    torch.manual_seed(1)
    model = VisionMamba(**{**SMALL, "num_classes": 5, **options})
    torch.save({"model": model.state_dict()}, path)
    return model


# --- the maps ---


def test_maps_are_the_model_s_features():
    x = torch.randn(2, 3, 32, 40)
    for residual, last, kinds in (
        (False, "none", ["branch"] * 4),
        (True, "none", ["sum", "sum", "sum", "branch"]),
        (True, "add", ["sum"] * 4),
        (True, "add & norm", ["sum", "sum", "sum", "norm"]),
    ):
        model = build(use_residual_as_feature=residual, last_layer_process=last).eval()
        outputs = []

        def note(block, inputs, output, outputs=outputs):
            outputs.append(output)

        for block in model.layers:
            block.register_forward_hook(note)
        maps = model(x)
        for (branch, stream), kind, m in zip(outputs, kinds, maps, strict=True):
            expected = branch if kind == "branch" else branch + stream
            if kind == "norm":
                expected = F.rms_norm(expected, (16,), model.norm_f.weight, model.norm_f.eps)
            torch.testing.assert_close(m.flatten(2).transpose(1, 2), expected)


def test_class_token_is_no_part_of_the_maps():
    model = build(if_cls_token=True, out_indices=(3,)).eval()
    assert model.cls_token_position == "middle"
    assert [tuple(m.shape) for m in model(torch.randn(1, 3, 32, 32))] == [(1, 16, 4, 4)]


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (8, 8), (9, 64), (31, 200)])
def test_any_size_is_padded_to_patches_and_cropped_back(size):
    for stride, strides in ((8, (4, 8, 16, 32)), (16, (4, 8, 16, 32)), (4, (4, 8, 16, 32))):
        model = build(patch_size=stride, stride=stride, if_fpn=True).eval()
        if min(size) < stride:
            continue
        with torch.no_grad():
            maps = model(torch.randn(1, 3, *size))
        assert [m.shape[-2:] for m in maps] == [tuple(-(-n // s) for n in size) for s in strides]


def test_padding_is_that_of_zeros_to_whole_patches():
    model = build().eval()
    x = torch.randn(1, 3, 27, 35)
    torch.testing.assert_close(model(x), model(F.pad(x, (0, 5, 0, 5))))


def test_one_feature_makes_the_whole_pyramid():
    model = build(out_indices=(2,), if_fpn=True, if_bidirectional=False).eval()
    maps = model(torch.randn(1, 3, 32, 32))
    assert [m.shape[-1] for m in maps] == [8, 4, 2, 1]
    torch.testing.assert_close(maps[2], F.max_pool2d(maps[1], 2))
    assert {name.split(".")[0] for name, _ in model.named_parameters() if "fpn" in name} == {"fpn1"}


def test_blocks_in_pairs_count_as_one():
    model = build(if_bidirectional=True, out_indices=(0, 1)).eval()
    assert len(model(torch.randn(1, 3, 32, 32))) == 2
    with pytest.raises(ValueError, match=r"out_indices must be ascending numbers from 0 to 1; got \(0, 2\)"):
        build(if_bidirectional=True, out_indices=(0, 2))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method):
    model = build(discretization_method=method, if_fpn=True, use_residual_as_feature=True, last_layer_process="add")
    sum(m.square().mean() for m in model(torch.randn(2, 3, 24, 40))).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


# --- options ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_indices": (0, 4)}, r"out_indices must be ascending numbers from 0 to 3; got \(0, 4\)"),
        ({"out_indices": (-1,)}, "out_indices must be ascending numbers from 0 to 3"),
        ({"out_indices": (2, 1)}, "out_indices must be ascending"),
        ({"out_indices": ()}, "out_indices must be ascending"),
        ({"if_fpn": True, "out_indices": (0, 1)}, "if_fpn needs four out_indices, or one"),
        ({"if_fpn": True, "patch_size": 32, "stride": 32}, "if_fpn needs stride 4, 8 or 16"),
        ({"last_layer_process": "sum"}, "last_layer_process must be one of 'none', 'add', 'add & norm'; got 'sum'"),
        ({"last_layer_process": "add"}, "it needs use_residual_as_feature=True"),
        ({"last_layer_process": "add", "use_residual_as_feature": True, "out_indices": (0,)}, "3 among out_indices"),
        ({"frozen_stages": 5}, r"frozen_stages must be from -1 \(none\) to 4; got 5"),
        ({"init_cfg": {"type": "Xavier"}}, "init_cfg must be dict"),
        ({"init_cfg": {"type": "Pretrained", "checkpoint": "a"}, "pretrained": "b"}, "both name a checkpoint"),
        ({"discretization_method": "euler"}, "euler"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_unknown_option_is_refused():
    with pytest.raises(TypeError, match="out_indexes"):
        build(out_indexes=(1,))


def test_image_smaller_than_a_patch_is_refused():
    with pytest.raises(ValueError, match=r"images of \(7, 32\) pixels are smaller than a patch of \(8, 8\)"):
        build()(torch.randn(1, 3, 7, 32))


# --- training ---


def test_frozen_stages_neither_learn_nor_drop():
    model = build(frozen_stages=2, drop_path_rate=0.5).train()
    model(torch.randn(2, 3, 32, 32))[-1].sum().backward()
    trained = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None and "layers" in name}
    assert trained == {"2", "3"} and model.pos_embed.grad is None and model.patch_embed.proj.weight.grad is None
    assert [block.training for block in model.layers] == [False, False, True, True]
    assert build(frozen_stages=0).layers[0].mixer.D.requires_grad
    assert not build(frozen_stages=0).patch_embed.proj.weight.requires_grad


def test_nothing_that_is_trained_is_without_gradient():
    """Else training in several processes would wait for it for ever."""
    for options in ({"out_indices": (1,)}, {"use_residual_as_feature": True, "last_layer_process": "add & norm"}):
        model = build(**options)
        sum(m.sum() for m in model(torch.randn(1, 3, 32, 32))).backward()
        assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_gradient_checkpointing_keeps_less_and_gives_the_same():
    x = torch.randn(2, 3, 64, 64)
    kept, gradients = [], []
    for with_cp in (False, True):
        model = build(with_cp=with_cp, depth=8, out_indices=(3, 7))
        storages = {}

        def keep(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = sum(m.square().sum() for m in model(x))
        kept.append(sum(storages.values()))
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert kept[1] < 0.5 * kept[0]
    torch.testing.assert_close(gradients[0], gradients[1])


class Dense(nn.Module):
    """A model as the frameworks build them: a backbone and something above."""

    def __init__(self, **options):
        super().__init__()
        self.backbone = build(if_fpn=True, use_residual_as_feature=True, last_layer_process="add & norm", **options)
        self.decode_head = nn.Conv2d(16, 2, 1)


def optimizer_groups(model: nn.Module, **paramwise) -> dict[int, dict]:
    """Each parameter's group, by its id."""
    cfg = {
        "constructor": "VisionMambaLayerDecay",
        "optimizer": {"type": "AdamW", "lr": 1.0, "weight_decay": 0.1},
        "paramwise_cfg": paramwise,
    }
    return {id(p): group for group in build_optim_wrapper(model, cfg).optimizer.param_groups for p in group["params"]}


def test_each_block_learns_at_its_own_rate():
    model = Dense()
    groups = optimizer_groups(model, layer_decay_rate=0.5)
    assert len(groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        if name.startswith("backbone.layers."):
            scale = 0.5 ** (4 - int(name.split(".")[2]))
        else:
            embedding = name in ("backbone.pos_embed",) or name.startswith("backbone.patch_embed")
            scale = 0.5**5 if embedding else 1.0
        assert groups[id(parameter)]["lr"] == pytest.approx(scale), name


def test_state_space_norms_and_embeddings_do_not_decay():
    model = Dense(if_cls_token=True, cls_token_position="double")
    groups = optimizer_groups(model, layer_decay_rate=0.9)
    spared = {n for n, p in model.named_parameters() if groups[id(p)]["weight_decay"] == 0}
    assert {f"backbone.layers.{i}.mixer.{n}" for i in range(4) for n in ("A_log", "A_b_log", "D", "D_b")} <= spared
    assert {f"backbone.layers.{i}.mixer.{n}.bias" for i in range(4) for n in ("dt_proj", "dt_proj_b")} <= spared
    assert {f"backbone.layers.{i}.norm.weight" for i in range(4)} | {"backbone.norm_f.weight"} <= spared
    assert {"backbone.pos_embed", "backbone.cls_token_head", "backbone.cls_token_tail"} <= spared
    decayed = {n.removeprefix("backbone.layers.0.mixer.") for n, _ in model.named_parameters() if n not in spared}
    assert {"in_proj.weight", "x_proj.weight", "dt_proj.weight", "conv1d.weight", "decode_head.weight"} <= decayed


def test_frozen_parameters_are_not_optimized():
    model = Dense(frozen_stages=1)
    groups = optimizer_groups(model, layer_decay_rate=0.5)
    assert {n for n, p in model.named_parameters() if id(p) not in groups} == {
        n for n, p in model.named_parameters() if not p.requires_grad
    }


@pytest.mark.parametrize("paramwise", [{"layer_decay_rate": 0.0}, {"layer_decay_rate": 0.9, "num_layer": 4}])
def test_other_settings_of_the_optimizer_are_refused(paramwise):
    with pytest.raises(ValueError, match="layer_decay_rate"):
        optimizer_groups(Dense(), **paramwise)


def test_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="backbone is a Vision Mamba"):
        optimizer_groups(nn.Linear(2, 2), layer_decay_rate=0.9)


# --- a classifier's weights ---


def test_starts_from_a_classifier_at_another_size(tmp_path):
    source = classifier(tmp_path / "cls.pth")
    model = build(img_size=(32, 48), if_fpn=True, pretrained=str(tmp_path / "cls.pth"))
    model.init_weights()
    torch.testing.assert_close(model.layers[3].mixer.A_log, source.layers[3].mixer.A_log, rtol=0, atol=0)
    # The class token stood in the middle, in row 8 of 17: that row is gone, not row 0.
    patches = remove_tokens(source.pos_embed, (8,))
    torch.testing.assert_close(model.pos_embed, resize_pos_embed(patches, (4, 6), (4, 4), None))


def test_same_size_gives_the_classifier_s_own_features(tmp_path):
    source = classifier(tmp_path / "cls.pth").eval()
    options = {"init_cfg": {"type": "Pretrained", "checkpoint": str(tmp_path / "cls.pth")}, "if_cls_token": True}
    model = build(use_residual_as_feature=True, last_layer_process="add", **options)
    model.init_weights()
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(list(model.eval()(x)), source.forward_intermediates(x, intermediates_only=True))


def test_where_the_class_token_stood_is_read_or_given(tmp_path):
    path = tmp_path / "cls.pth"
    for position, row in (("head", 0), ("tail", 16)):
        source = classifier(path, cls_token_position=position)
        model = build(pretrained=str(path), pretrained_cls_position=position)
        model.init_weights()
        torch.testing.assert_close(model.pos_embed, remove_tokens(source.pos_embed, (row,)), rtol=0, atol=0)
    args = {"model": "vim_tiny", "input_size": 32}
    args["model_kwargs"] = {k: v for k, v in SMALL.items() if k != "img_size"} | {"cls_token_position": "tail"}
    torch.save({"model": source.state_dict(), "args": argparse.Namespace(**args)}, path)
    model = build(pretrained=str(path))
    model.init_weights()
    torch.testing.assert_close(model.pos_embed, remove_tokens(source.pos_embed, (16,)), rtol=0, atol=0)


def test_both_ends_class_tokens_are_recognized(tmp_path):
    source = classifier(tmp_path / "cls.pth", cls_token_position="double")
    model = build(pretrained=str(tmp_path / "cls.pth"))
    model.init_weights()
    torch.testing.assert_close(model.pos_embed, source.pos_embed[:, 1:-1], rtol=0, atol=0)


def test_rotary_tables_follow_the_new_grid(tmp_path):
    classifier(tmp_path / "cls.pth", if_rope=True)
    model = build(img_size=64, if_rope=True, pretrained=str(tmp_path / "cls.pth"))
    before = model.rope.freqs_cos.clone()
    model.init_weights()
    torch.testing.assert_close(model.rope.freqs_cos, before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({"embed_dim": 24}, {}, "is 24 channels wide, the backbone 16: choose another checkpoint, or set embed_dim=24"),
        ({"depth": 2}, {}, "does not fit this model"),
        ({}, {"if_cls_token": True, "cls_token_position": "head"}, "class tokens at 'middle', the backbone has 'head'"),
        ({"img_size": (32, 40)}, {}, "rows for 20 patches, which are not a square grid"),
    ],
)
def test_weights_of_another_architecture_are_refused(tmp_path, options, given, message):
    classifier(tmp_path / "cls.pth", **options)
    with pytest.raises(CheckpointError, match=message):
        build(pretrained=str(tmp_path / "cls.pth"), **given).init_weights()


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        build(pretrained=str(tmp_path / "missing.pth")).init_weights()
    torch.save({"model": nn.Linear(2, 2).state_dict()}, tmp_path / "linear.pth")
    with pytest.raises(CheckpointError, match="holds no Vision Mamba"):
        build(pretrained=str(tmp_path / "linear.pth")).init_weights()
