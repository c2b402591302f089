"""VisionMamba: published sizes and names, every option, feature maps, timm's interface, errors."""

import argparse
import copy
import random
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch.nn import functional as F

from mamba_ssm._backend import unavailable
from mamba_ssm.modules import mamba_simple
from mamba_ssm.ops.discretization_ref import METHODS
from vim import models_mamba
from vim.models_mamba import VisionMamba, checkpoint_filter_fn
from vim.pos_embed import cls_indices, insert_tokens, remove_tokens, resize_pos_embed
from vim.rope import VisionRotaryEmbedding, rotate

LONG = "vim_{}_patch16{}_224_bimambav2_final_pool_mean_abs_pos_embed_with_{}_div2"
SIZES = {
    "vim_tiny": 7_148_008,
    "vim_small": 25_796_584,
    "vim_base": 97_598_440,
    LONG.format("tiny", "", "midclstok"): 7_148_008,
    LONG.format("small", "", "midclstok"): 25_796_584,
    LONG.format("base", "", "middle_cls_token"): 97_598_440,
    LONG.format("tiny", "_stride8", "midclstok"): 7_250_344,
    LONG.format("small", "_stride8", "midclstok"): 26_001_256,
}
SMALL = {
    "img_size": 32,
    "patch_size": 8,
    "stride": 8,
    "depth": 4,
    "embed_dim": 32,
    "d_state": 4,
    "num_classes": 5,
    "drop_path_rate": 0.0,
}
PATCHES = 16


def build(**options):
    """A small model in eval mode with non-trivial weights everywhere."""
    torch.manual_seed(0)
    model = VisionMamba(**{**SMALL, **options}).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def images(height=32, width=32, channels=3, batch=2):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(2))


# --- sizes and names ---


@pytest.mark.parametrize("name", SIZES)
def test_registered_models_have_the_published_sizes(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == SIZES[name]
    assert len(model.state_dict()) == 415


def test_state_dict_keys_and_shapes_of_vim_tiny():
    with torch.device("meta"):
        model = timm.create_model("vim_tiny")
    mixer = {
        "A_log": (384, 16),
        "A_b_log": (384, 16),
        "D": (384,),
        "D_b": (384,),
        "in_proj.weight": (768, 192),
        "out_proj.weight": (192, 384),
    }
    for suffix in ("", "_b"):
        mixer |= {
            f"conv1d{suffix}.weight": (384, 1, 4),
            f"conv1d{suffix}.bias": (384,),
            f"x_proj{suffix}.weight": (44, 384),
            f"dt_proj{suffix}.weight": (384, 12),
            f"dt_proj{suffix}.bias": (384,),
        }
    expected = {
        "cls_token": (1, 1, 192),
        "pos_embed": (1, 197, 192),
        "patch_embed.proj.weight": (192, 3, 16, 16),
        "patch_embed.proj.bias": (192,),
        "norm_f.weight": (192,),
        "head.weight": (1000, 192),
        "head.bias": (1000,),
    }
    for i in range(24):
        expected[f"layers.{i}.norm.weight"] = (192,)
        expected |= {f"layers.{i}.mixer.{key}": shape for key, shape in mixer.items()}
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected


def test_optional_keys():
    keys = build(if_rope=True, use_double_cls_token=True, init_layer_scale=0.1, rms_norm=False).state_dict()
    assert {"rope.freqs_cos", "rope.freqs_sin", "cls_token_head", "cls_token_tail"} <= set(keys)
    assert {"layers.0.mixer.gamma", "layers.0.norm.bias", "norm_f.bias"} <= set(keys)
    assert "cls_token" not in keys and keys["rope.freqs_cos"].shape == (PATCHES, 32)


def test_initialization():
    model = timm.create_model("vim_tiny", depth=4, **{"img_size": 64})
    assert model.layers[0].mixer.out_proj.weight.abs().max() <= 384**-0.5 / 4**0.5 + 1e-6
    assert (model.head.bias == 0).all() and 0.015 < model.pos_embed.std() < 0.025
    bias = F.softplus(model.layers[3].mixer.dt_proj_b.bias)
    assert bias.min() > 0.00099 and bias.max() < 0.101  # Δ's initialization survives, backward direction included
    rescaled = VisionMamba(**SMALL, initializer_cfg={"rescale_prenorm_residual": False}).layers[0].mixer.out_proj.weight
    assert rescaled.abs().max() > 64**-0.5 / 4**0.5


# --- options ---


@pytest.mark.parametrize("method", METHODS)
def test_every_method_changes_the_output_and_trains(method):
    model = build(discretization_method=method).train()
    logits = model(images())
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if method != "zoh":
        assert not torch.allclose(logits, build()(images()), atol=1e-5)


OPTIONS = {
    "seed example": {
        "if_bidirectional": True,
        "if_rope": True,
        "use_middle_cls_token": True,
        "final_pool_type": "mean",
    },
    "head": {"use_middle_cls_token": False},
    "tail": {"cls_token_position": "tail"},
    "double": {"use_double_cls_token": True},
    "double rope": {"use_double_cls_token": True, "if_rope": True},
    "tail rope residual": {"cls_token_position": "tail", "if_rope": True, "if_rope_residual": True},
    "odd grid rope, no cls": {"img_size": 24, "if_rope": True, "if_cls_token": False},
    "rectangle": {"img_size": (16, 40), "if_rope": True},
    "overlap": {"stride": 4, "if_rope": True},
    "no position": {"if_abs_pos_embed": False},
    "v1": {"bimamba_type": "v1"},
    "if_bimamba": {"if_bimamba": True},
    "none": {"bimamba_type": "none"},
    "pairs of v1": {"bimamba_type": "v1", "if_bidirectional": True},
    "undivided": {"if_divide_out": False},
    "gamma": {"init_layer_scale": 1e-2},
    "layer norm": {"rms_norm": False},
    "unfused": {"fused_add_norm": False},
    "layer norm, unfused": {"rms_norm": False, "fused_add_norm": False},
    "residual in half": {"residual_in_fp32": False},
    "ssm_cfg": {"ssm_cfg": {"expand": 1, "d_conv": 3, "bias": True, "conv_bias": False, "dt_rank": 3}},
    "one channel": {"channels": 1},
    "dropout": {"drop_rate": 0.1, "drop_path_rate": 0.2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_run_forward_and_backward_under_autocast_too(name):
    options = OPTIONS[name]
    model = build(**options).train()
    size = options.get("img_size", 32)
    x = images(*(size if isinstance(size, tuple) else (size, size)), channels=options.get("channels", 3))
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = model(x)
        assert logits.shape == (2, 5)
        logits.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "dropout"])
def test_reference_and_kernel_agree(name, monkeypatch):
    model = build(**OPTIONS[name])
    size = OPTIONS[name].get("img_size", 32)
    x = images(*(size if isinstance(size, tuple) else (size, size)), channels=OPTIONS[name].get("channels", 3))
    automatic = model(x)
    monkeypatch.setenv("VIM_USE_CUDA_KERNEL", "0")
    torch.testing.assert_close(automatic, model(x), rtol=1e-4, atol=1e-5)


def test_use_cuda_kernel_reaches_every_op(monkeypatch):
    monkeypatch.delenv("VIM_USE_CUDA_KERNEL", raising=False)
    asked = []

    def spy_on(module, name):
        function = getattr(module, name)

        def spy(*args, **options):
            asked.append((name, options["use_cuda_kernel"]))
            return function(*args, **options)

        monkeypatch.setattr(module, name, spy)

    spy_on(mamba_simple, "mixer_fn")
    spy_on(models_mamba, "layer_norm_fn")
    build(use_cuda_kernel=False, depth=1)(images())
    assert asked == [("layer_norm_fn", False), ("mixer_fn", False), ("layer_norm_fn", False)]
    with pytest.raises(RuntimeError, match="use_cuda_kernel=True"):
        build(use_cuda_kernel=True)(images())


def test_pooling():
    x = images()
    options = {"if_cls_token": False}
    every = build(**options, final_pool_type="all")
    tokens = every(x, return_features=True)
    assert tokens.shape == (2, PATCHES, 32) and every(x).shape == (2, PATCHES, 5)
    head = every.head
    torch.testing.assert_close(build(**options, final_pool_type="none")(x), head(tokens[:, -1]))
    torch.testing.assert_close(build(**options, final_pool_type="mean")(x), head(tokens.mean(1)))
    torch.testing.assert_close(build(**options, final_pool_type="max")(x), head(tokens).amax(1))


def test_class_token_takes_the_place_of_pooling():
    x = images()
    expected = build()(x)
    for pool in ("none", "mean", "max", "all"):
        torch.testing.assert_close(build(final_pool_type=pool)(x), expected)


def test_double_class_tokens_are_averaged():
    model = build(use_double_cls_token=True)
    tokens, _ = model.forward_intermediates(images())
    features = model(images(), return_features=True)
    torch.testing.assert_close(features, (tokens[:, 0] + tokens[:, -1]) / 2)


@pytest.mark.parametrize(
    "position, flags",
    [
        ("head", {"use_middle_cls_token": False}),
        ("middle", {}),
        ("double", {"use_double_cls_token": True}),
    ],
)
def test_cls_token_position_overrides_the_flags(position, flags):
    torch.testing.assert_close(build(cls_token_position=position)(images()), build(**flags)(images()))


def test_pairs_read_the_sequence_from_both_ends():
    model = build(if_bidirectional=True, depth=2)
    x, _, cls = model._embed(images())
    along, residual = model.layers[0](x, None)
    against, residual_against = model.layers[1](x.flip(1), None)
    expected, _ = model.norm_f(along + against.flip(1), residual + residual_against.flip(1))
    torch.testing.assert_close(model.forward_features(images()), expected[:, cls[0]])


@pytest.mark.parametrize("position", ["head", "middle", "tail", "double"])
def test_flipped_sequences_keep_their_class_tokens(position):
    model = build(cls_token_position=position, flip_img_sequences_ratio=1.0, bimamba_type="none", depth=1)
    x, _, cls = model._embed(images())
    hidden_states, residual = model.layers[0](x.flip(1), None)
    tokens = model.norm_f(hidden_states, residual)[0].flip(1)
    torch.testing.assert_close(model.forward_features(images()), tokens[:, list(cls)].mean(1))


def test_random_class_token_position(monkeypatch):
    model = build(use_middle_cls_token=False)
    monkeypatch.setattr(random, "randint", lambda low, high: 5)
    moved = model(images(), if_random_cls_token_position=True)
    x = insert_tokens(model.patch_embed(images()), (model.cls_token,), (5,)) + model.pos_embed
    hidden_states, residual = x, None
    for block in model.layers:
        hidden_states, residual = block(hidden_states, residual)
    torch.testing.assert_close(moved, model.head(model.norm_f(hidden_states, residual)[0][:, 5]))
    middle = build()
    torch.testing.assert_close(middle(images(), if_random_cls_token_position=True), middle(images()))


@pytest.mark.parametrize("position", ["middle", "double"])
def test_shuffled_tokens_are_followed_by_their_class_token(position):
    model = build(cls_token_position=position)
    torch.manual_seed(4)
    shuffled = model(images(), if_random_token_rank=True)
    torch.manual_seed(4)
    x, _, cls = model._embed(images())
    order = torch.randperm(x.shape[1])
    hidden_states, residual = x[:, order], None
    for block in model.layers:
        hidden_states, residual = block(hidden_states, residual)
    tokens = model.norm_f(hidden_states, residual)[0][:, order.argsort()]
    torch.testing.assert_close(shuffled, model.head(tokens[:, list(cls)].mean(1)))
    assert not torch.allclose(shuffled, model(images()), atol=1e-4)


def test_drop_path_rates_and_effect():
    model = build(drop_path_rate=0.3)
    assert [block.norm.drop_path for block in model.layers] == pytest.approx([0.0, 0.0, 0.1, 0.2])
    assert model.norm_f.drop_path == pytest.approx(0.3)
    for fused in (True, False):
        norm = build(drop_path_rate=0.5, fused_add_norm=fused).norm_f.train()
        hidden_states, residual = torch.ones(4000, 1, 32), torch.zeros(4000, 1, 32)
        kept = norm(hidden_states, residual)[1][:, 0, 0]
        assert set(kept.unique().tolist()) == {0.0, 2.0} and abs(kept.mean() - 1) < 0.1
        assert (norm.eval()(hidden_states, residual)[1] == 1).all()


@pytest.mark.parametrize("fused", [True, False])
def test_residual_stays_fp32_under_autocast(fused):
    model = build(fused_add_norm=fused)
    seen = []
    for block in model.layers:
        block.register_forward_hook(lambda _module, _inputs, outputs: seen.append([o.dtype for o in outputs]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(images())
    assert seen == [[torch.bfloat16, torch.float32]] * 4


# --- rotary embedding ---


def test_rope_rotates_pairs_by_row_and_column():
    rope = VisionRotaryEmbedding(8, (2, 3), pt_hw_seq_len=6)
    x = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    y = rotate(x, *rope.tables((2, 3), None)).unflatten(1, (2, 3))
    pairs = torch.view_as_complex(x.view(1, 2, 3, 4, 2))
    for row in range(2):
        for column in range(3):
            position = torch.tensor([row / 2 * 6] * 2 + [column / 3 * 6] * 2)
            angle = position * torch.tensor([1.0, 0.01, 1.0, 0.01])
            expected = torch.view_as_real(pairs[0, row, column] * torch.polar(torch.ones(4), angle)).flatten()
            torch.testing.assert_close(y[0, row, column], expected)


@pytest.mark.parametrize(
    "position, still", [("head", [0]), ("middle", [0]), ("tail", [16]), ("double", [0, 17]), (None, [])]
)
def test_rope_leaves_the_published_places_alone(position, still):
    cos, sin = VisionRotaryEmbedding(32, (4, 4), 4).tables((4, 4), position)
    assert cos.shape == (16 + len(still), 32)
    assert (cos[still] == 1).all() and (sin[still] == 0).all()


def test_rope_errors():
    with pytest.raises(ValueError, match="divisible by 4"):
        build(if_rope=True, embed_dim=30)
    with pytest.raises(ValueError, match="ft_seq_len=5"):
        build(if_rope=True, ft_seq_len=5)
    build(if_rope=True, ft_seq_len=4)


# --- position embedding ---


@pytest.mark.parametrize("position", ["head", "middle", "tail", "double", None])
@pytest.mark.parametrize("patches", [6, 7])
def test_tokens_go_in_and_out_where_they_stand(position, patches):
    x = torch.arange(patches, dtype=torch.float32)[None, :, None].expand(2, -1, 3)
    indices = cls_indices(position, patches)
    tokens = tuple(torch.full((1, 1, 3), -1.0 - i) for i in range(len(indices)))
    inserted = insert_tokens(x, tokens, indices)
    expected = {
        "head": [-1, *range(patches)],
        "middle": [*range(patches // 2), -1, *range(patches // 2, patches)],
        "tail": [*range(patches), -1],
        "double": [-1, *range(patches), -2],
        None: list(range(patches)),
    }
    assert inserted[1, :, 0].tolist() == expected[position]
    torch.testing.assert_close(remove_tokens(inserted, indices), x)


@pytest.mark.parametrize("position", ["head", "middle", "tail", "double", None])
def test_resizing_keeps_class_rows_and_interpolates_the_grid(position):
    """A linear ramp over the grid stays one away from the border; the class rows are far off the ramp."""
    old, new = (8, 6), (16, 9)
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(6.0), indexing="ij")
    grid = torch.stack((rows, columns), dim=-1).reshape(1, 48, 2)
    old_cls, new_cls = cls_indices(position, 48), cls_indices(position, 144)
    tokens = tuple(torch.full((1, 1, 2), 1000.0 + i) for i in range(len(old_cls)))
    resized = resize_pos_embed(insert_tokens(grid, tokens, old_cls), new, old, position)
    assert resized.shape == (1, 144 + len(tokens), 2)
    for i, index in enumerate(new_cls):
        assert (resized[0, index] == 1000 + i).all()
    patches = remove_tokens(resized, new_cls).view(16, 9, 2)
    inner = patches[4:12, 3:6]
    torch.testing.assert_close(inner[..., 0], ((torch.arange(4.0, 12) + 0.5) / 2 - 0.5)[:, None].expand(8, 3))
    torch.testing.assert_close(inner[..., 1], ((torch.arange(3.0, 6) + 0.5) * 6 / 9 - 0.5).expand(8, 3))


def test_resizing_to_the_same_grid_is_the_identity_and_bad_shapes_are_named():
    pos_embed = torch.randn(1, 17, 8)
    assert resize_pos_embed(pos_embed, (4, 4), (4, 4), "middle") is pos_embed
    with pytest.raises(ValueError, match=r"\(1, 17, D\).*\(1, 16, 8\)"):
        resize_pos_embed(pos_embed[:, 1:], (2, 2), (4, 4), "middle")
    with pytest.raises(ValueError, match="head, middle, tail, double"):
        cls_indices("centre", 4)


# --- image sizes ---


@pytest.mark.parametrize("height, width", [(32, 32), (48, 16), (30, 43), (3, 8)])
@pytest.mark.parametrize("stride", [8, 4])
def test_dynamic_image_size_pads_and_resizes(height, width, stride):
    model = build(dynamic_img_size=True, stride=stride, if_rope=True)
    x = images(height, width)
    logits = model(x)
    assert logits.shape == (2, 5) and logits.isfinite().all()
    rows, columns = (max(0, -(-(n - 8) // stride)) + 1 for n in (height, width))
    padded = F.pad(x, (0, 8 + (columns - 1) * stride - width, 0, 8 + (rows - 1) * stride - height))
    torch.testing.assert_close(logits, model(padded))
    assert model.forward_intermediates(x, 1, intermediates_only=True)[0].shape == (2, 32, rows, columns)


def test_dynamic_image_size_changes_nothing_at_the_models_own_size():
    torch.testing.assert_close(build(dynamic_img_size=True)(images()), build()(images()))


def test_dynamic_model_equals_a_fixed_one_with_its_position_embedding_resized():
    dynamic = build(dynamic_img_size=True, if_rope=True)
    fixed = VisionMamba(**{**SMALL, "img_size": (48, 24)}, if_rope=True).eval()
    state = dynamic.state_dict()
    state["pos_embed"] = resize_pos_embed(state["pos_embed"], (6, 3), (4, 4), "middle")
    state |= {key: value for key, value in fixed.state_dict().items() if "freqs" in key}
    fixed.load_state_dict(state)
    torch.testing.assert_close(dynamic(images(48, 24)), fixed(images(48, 24)))


def test_image_errors():
    model = build()
    with pytest.raises(ValueError, match=r"\(32, 40\).*img_size \(32, 32\).*dynamic_img_size"):
        model(images(32, 40))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\); got \(2, 1, 32, 32\)"):
        model(images(channels=1))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\); got \(3, 32, 32\)"):
        model(images()[0])
    with pytest.raises(TypeError, match="uint8"):
        model(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="not covered by patches"):
        build(img_size=36)
    build(img_size=36, dynamic_img_size=True)(images(36, 36))
    with pytest.raises(ValueError, match="batch"):
        model(images(batch=0))


def test_nan_stays_in_its_image():
    x = images()
    x[0, 0, 3, 3] = float("nan")
    logits = build()(x)
    assert logits[0].isnan().all() and logits[1].isfinite().all()


# --- feature maps ---


@pytest.mark.parametrize("options", [{}, {"use_double_cls_token": True}, {"if_cls_token": False}, {"stride": 4}])
def test_feature_maps(options):
    model = build(**options)
    rows = 7 if "stride" in options else 4
    final, features = model.forward_intermediates(images())
    assert [tuple(f.shape) for f in features] == [(2, 32, rows, rows)] * 4
    assert final.shape == (2, rows * rows + model.num_tokens, 32)
    # The last block's features are what the final norm reads, and its normed ones what it gives.
    normed = model.forward_intermediates(images(), [-1], norm=True, output_fmt="NLC", intermediates_only=True)[0]
    cls = cls_indices(model.cls_token_position, rows * rows)
    torch.testing.assert_close(normed, remove_tokens(final, cls))
    last = features[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(
        normed, last * (last.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * model.norm_f.weight
    )


def test_feature_maps_are_in_raster_order():
    """With blocks that add nothing, a feature map is the patch embedding of its own image patch."""
    model = build(if_abs_pos_embed=False)
    for block in model.layers:
        torch.nn.init.zeros_(block.mixer.out_proj.weight)
    features = model.forward_intermediates(images(), 1, intermediates_only=True)[0]
    torch.testing.assert_close(features, model.patch_embed.proj(images()))


def test_chosen_feature_maps():
    model = build()
    _, every = model.forward_intermediates(images())
    for indices, expected in ((2, [2, 3]), ([0, -1], [0, 3]), ((1,), [1])):
        chosen = model.forward_intermediates(images(), indices, stop_early=True, intermediates_only=True)
        torch.testing.assert_close(chosen, [every[i] for i in expected])
    feature, cls = model.forward_intermediates(images(), 1, return_prefix_tokens=True, intermediates_only=True)[0]
    assert feature.shape == (2, 32, 4, 4) and cls.shape == (2, 1, 32)
    pairs = build(if_bidirectional=True).forward_intermediates(images(), intermediates_only=True)
    assert len(pairs) == 2
    with pytest.raises(ValueError, match="NHWC"):
        model.forward_intermediates(images(), output_fmt="NHWC")


def test_timm_features_only():
    model = timm.create_model("vim_tiny", features_only=True, out_indices=(1, 3), **small_for_timm()).eval()
    assert [tuple(f.shape) for f in model(images())] == [(2, 32, 4, 4)] * 2
    assert model.feature_info.channels() == [32, 32] and model.feature_info.reduction() == [8, 8]


# --- timm's interface ---


def small_for_timm():
    return {key: value for key, value in SMALL.items() if key != "num_classes"}


def test_factory_arguments():
    model = timm.create_model("vim_tiny", in_chans=1, num_classes=7, discretization_method="rk4", **small_for_timm())
    assert model.head.out_features == 7 and model.patch_embed.proj.in_channels == 1
    assert model.layers[0].mixer.discretization_method == "rk4"
    assert timm.create_model("vim_tiny", channels=2, **small_for_timm()).patch_embed.proj.in_channels == 2
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("vim_tiny", pretrained=True)
    with pytest.raises(TypeError, match="if_devide_out"):
        timm.create_model("vim_tiny", if_devide_out=True)
    with pytest.raises(TypeError, match="if_devide_out"):
        VisionMamba(if_devide_out=True)
    with pytest.raises(ValueError, match="zoh, foh, bilinear"):
        timm.create_model("vim_tiny", discretization_method="zho", **small_for_timm())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"final_pool_type": "avg"}, "final_pool_type must be one of none, mean, max, all; got 'avg'"),
        ({"if_bidirectional": True, "depth": 3}, "even depth; got 3"),
        ({"cls_token_position": "centre"}, "cls_token_position must be one of head, middle, tail, double"),
        ({"cls_token_position": "head", "if_cls_token": False}, "needs if_cls_token=True"),
        ({"bimamba_type": "v3"}, "bimamba_type must be one of none, v1, v2"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be at least 0 and below 1; got 1.0"),
        ({"depth": 0}, "depth must be at least 1; got 0"),
        ({"num_classes": -1}, "num_classes must be at least 0; got -1"),
        ({"patch_size": 0}, "patch_size must be at least 1"),
        ({"d_state": 257}, "d_state must be from 1 to 256; got 257"),
        ({"ssm_cfg": {"d_conv": 5}}, "d_conv must be from 2 to 4; got 5"),
        ({"ssm_cfg": {"dt_rank": 0}}, "dt_rank must be 'auto' or at least 1; got 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_an_empty_batch_is_refused():
    model = build()
    with pytest.raises(ValueError, match="images must not be empty"):
        model(torch.empty(0, 3, *model.patch_embed.img_size))


def test_classifier_interface():
    model = build()
    assert model.get_classifier() is model.head
    model.reset_classifier(3)
    assert model(images()).shape == (2, 3) and model.num_classes == 3
    model.reset_classifier(0)
    assert model(images()).shape == (2, 32)
    assert torch.equal(model(images()), model.forward_head(model.forward_features(images()), pre_logits=True))
    with pytest.raises(ValueError, match="avg"):
        model.reset_classifier(3, "avg")


def test_no_weight_decay_names_existing_parameters():
    for options in ({}, {"use_double_cls_token": True}, {"bimamba_type": "none", "if_cls_token": False}):
        model = build(**options)
        names = dict(model.named_parameters())
        expected = {
            name
            for name in names
            if name.split(".")[-1] in ("A_log", "A_b_log", "D", "D_b") or name.startswith(("pos_embed", "cls_token"))
        }
        assert model.no_weight_decay() == expected and expected


def test_timm_optimizers_honour_no_weight_decay():
    model = build()
    decay = {
        parameter: group["weight_decay"]
        for group in create_optimizer_v2(model, opt="adamw", weight_decay=0.05).param_groups
        for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        free = parameter.ndim == 1 or name in model.no_weight_decay()
        assert decay[parameter] == (0 if free else 0.05), name


def test_layer_wise_groups_follow_the_depth():
    model = build()
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups["cls_token"] == groups["pos_embed"] == groups["patch_embed.proj.weight"] == 0
    assert [groups[f"layers.{i}.mixer.A_log"] for i in range(4)] == [1, 2, 3, 4]
    assert groups["norm_f.weight"] >= 4 and groups["head.weight"] >= groups["norm_f.weight"]


def test_gradient_checkpointing_gives_the_same_gradients():
    plain = build(if_bidirectional=True, drop_path_rate=0.5).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    for model in (plain, saving):
        torch.manual_seed(3)
        model(images()).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda m, n=name: f"{n}: {m}")
    seen = []
    saving.layers[0].register_forward_pre_hook(lambda *_: seen.append(1))
    saving(images()).sum().backward()
    assert len(seen) == 2  # run again in the backward pass
    saving.set_grad_checkpointing(False)
    saving(images()).sum().backward()
    assert len(seen) == 3


def test_inference_params_reach_causal_mixers_only():
    cache = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    model = build(bimamba_type="none")
    torch.testing.assert_close(model(images(), inference_params=cache), model(images()))
    assert sorted(cache.key_value_memory_dict) == [0, 1, 2, 3]
    assert sorted(model.allocate_inference_cache(2, 17)) == [0, 1, 2, 3]
    with pytest.raises(NotImplementedError, match="v2"):
        build()(images(), inference_params=cache)


# --- checkpoints ---


def test_load_pretrained_at_another_size(tmp_path):
    source = build(if_rope=True, stride=4, img_size=24)
    published = {"model": source.state_dict(), "epoch": 3, "args": argparse.Namespace(lr=1e-3)}
    torch.save(published, tmp_path / "published.pth")
    target = build(if_rope=True, stride=4, img_size=(40, 24))
    rope = target.rope.freqs_cos.clone()
    target.load_pretrained(tmp_path / "published.pth")
    expected = resize_pos_embed(source.pos_embed, (9, 5), (5, 5), "middle")
    torch.testing.assert_close(target.pos_embed, expected)
    torch.testing.assert_close(target.rope.freqs_cos, rope)
    torch.testing.assert_close(target.layers[3].mixer.in_proj.weight, source.layers[3].mixer.in_proj.weight)
    with pytest.raises(RuntimeError, match="A_b_log"):
        build(bimamba_type="none", img_size=24, stride=4).load_pretrained(tmp_path / "published.pth")


def test_load_pretrained_with_a_prefix_and_through_timm(tmp_path):
    source = build()
    state = {f"backbone.{key}": value for key, value in source.state_dict().items()} | {"other": torch.ones(1)}
    torch.save(state, tmp_path / "wrapped.pth")
    target = VisionMamba(**SMALL).eval()
    target.load_pretrained(tmp_path / "wrapped.pth", prefix="backbone.")
    torch.testing.assert_close(target(images()), source(images()))
    torch.save({"model": source.state_dict()}, tmp_path / "published.pth")
    overlay = {"file": str(tmp_path / "published.pth"), "num_classes": 5}
    loaded = timm.create_model("vim_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL).eval()
    torch.testing.assert_close(loaded(images()), source(images()))


def test_a_checkpoint_whose_grid_is_unknown_is_refused():
    state = build(img_size=(16, 40)).state_dict()
    with pytest.raises(ValueError, match="10 patch rows"):
        checkpoint_filter_fn(state, build())


# --- torch.compile, dtypes ---


@pytest.mark.skipif(unavailable["cpu"] is not None, reason="the reference's unrolled loop takes minutes to compile")
@pytest.mark.parametrize(
    "backend, options",
    [
        ("aot_eager", {"depth": 2}),
        ("aot_eager", {"depth": 2, "if_bidirectional": True, "if_rope": True, "bimamba_type": "v1"}),
        ("inductor", {"depth": 1}),
    ],
)
def test_one_graph_forward_and_backward(backend, options, monkeypatch):
    """fullgraph: no break in the graph; outputs and every gradient equal eager's."""
    monkeypatch.delenv("VIM_USE_CUDA_KERNEL", raising=False)
    model = build(**options).train()
    eager = copy.deepcopy(model)
    torch._dynamo.reset()
    logits = torch.compile(model, fullgraph=True, backend=backend)(images())
    expected = eager(images())
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    for output in (logits, expected):
        output.square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype):
    exact = build()
    model = build(dtype=dtype)
    model.load_state_dict(exact.state_dict())
    logits = model(images().to(dtype))
    assert logits.dtype == dtype
    assert model.layers[0].mixer.A_log.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(logits.float(), exact(images()), rtol=tolerance, atol=tolerance)


def test_bf16_residual_in_fp32():
    seen = []
    model = build(dtype=torch.bfloat16)
    model.layers[2].register_forward_hook(lambda _m, _i, outputs: seen.append([o.dtype for o in outputs]))
    model(images().bfloat16())
    assert seen == [[torch.bfloat16, torch.float32]]
