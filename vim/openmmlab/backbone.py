"""Vision Mamba as a backbone of dense predictors: an image of any size in, feature maps out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vim.models_mamba import VisionMamba
from vim.openmmlab.pretrained import load_backbone

LAST_LAYER_KINDS = {"none": "branch", "add": "sum", "add & norm": "norm"}
PYRAMID_STRIDES = (4, 8, 16, 32)


class DenseVisionMamba(VisionMamba):
    """Feature maps of chosen blocks; parameter names are those of the published backbones.

    Args:
        out_indices: blocks whose features are wanted, ascending (pairs of blocks with `if_bidirectional`).
        pretrained: checkpoint of a classifier to start from; or init_cfg=dict(type="Pretrained", checkpoint=…).
        pretrained_cls_position: where the class token stood in it; see `load_backbone`.
        if_fpn: turn the features into maps of strides 4, 8, 16, 32. Needs four out_indices, or one, used four times.
        use_residual_as_feature: a feature is the residual stream after its block, else what the block itself gives.
        last_layer_process: what the last block's feature is with `use_residual_as_feature`: "none" what the block
            itself gives, "add" the residual stream, "add & norm" that after the final norm.
        frozen_stages: 0: the embeddings are not trained, n: nor the first n blocks; -1: everything is trained.
        with_cp: gradient checkpointing: recompute the blocks in the backward pass, to save memory.
        options: those of `VisionMamba`. `img_size` is the size that the position embedding is made for; images of
            other sizes resample it. Without class token, unlike the classifier, unless if_cls_token=True.

    Raises ValueError for options out of range or at odds with each other, TypeError for an unknown one.
    """

    def __init__(
        self,
        *,
        out_indices: Sequence[int],
        pretrained: str | None = None,
        init_cfg: Mapping[str, Any] | None = None,
        pretrained_cls_position: str | None = None,
        if_fpn: bool = True,
        use_residual_as_feature: bool = False,
        last_layer_process: str = "none",
        frozen_stages: int = -1,
        with_cp: bool = False,
        **options: Any,
    ):
        super().__init__(**{"if_cls_token": False, **options}, num_classes=0, dynamic_img_size=True)
        self.pretrained = _checkpoint_of(pretrained, init_cfg)
        self.pretrained_cls_position = pretrained_cls_position
        self.out_indices = tuple(out_indices)
        self._check(if_fpn, use_residual_as_feature, last_layer_process, frozen_stages)
        self.frozen_stages = frozen_stages
        last = self.num_stages - 1
        last_kind = LAST_LAYER_KINDS[last_layer_process]
        self.kinds = [
            "branch" if not use_residual_as_feature else last_kind if i == last else "sum" for i in self.out_indices
        ]
        self.set_grad_checkpointing(with_cp)
        stride = self.patch_embed.stride[0]
        self.scales = (1.0,) * len(self.out_indices)  # of the maps, against the patch grid
        self.if_fpn = if_fpn
        if if_fpn:
            self.scales = tuple(stride / s for s in PYRAMID_STRIDES)
            self.fpn1, self.fpn2, self.fpn3, self.fpn4 = (_level(self.embed_dim, scale) for scale in self.scales)
        self._freeze()

    def init_weights(self) -> None:
        """Called by MMEngine once the whole model is built. Raises CheckpointError."""
        if self.pretrained is not None:
            load_backbone(self, self.pretrained, self.pretrained_cls_position)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (B, channels, H, W) -> a map (B, D, ⌈H·scale/stride⌉, ⌈W·scale/stride⌉) per level, fine to coarse.

        Raises ValueError for an image smaller than a patch.
        """
        size, patch = x.shape[-2:], self.patch_embed.patch_size
        if any(n < p for n, p in zip(size, patch, strict=True)):
            raise ValueError(f"images of {tuple(size)} pixels are smaller than a patch of {patch}: resize or pad them")
        maps = self.forward_intermediates(
            x, self.out_indices, stop_early=True, intermediates_only=True, kinds=self.kinds
        )
        if self.if_fpn:
            levels = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
            maps = [level(m) for level, m in zip(levels, maps * (4 // len(maps)), strict=True)]
        # The border that was padded to whole patches has no counterpart in the image.
        strides = self.patch_embed.stride
        cropped = []
        for m, scale in zip(maps, self.scales, strict=True):
            rows, columns = (math.ceil(n * scale / s) for n, s in zip(size, strides, strict=True))
            cropped.append(m[..., :rows, :columns])
        return tuple(cropped)

    def train(self, mode: bool = True) -> DenseVisionMamba:
        """As usual, but frozen blocks stay in eval mode."""
        super().train(mode)
        for block in self.layers[: max(0, self.frozen_stages)]:
            block.eval()
        return self

    def _freeze(self) -> None:
        """Parameters that are frozen, or that no feature depends on (which distributed training would wait for)."""
        blocks_per_stage = 2 if self.if_bidirectional else 1
        idle = [*self.layers[(self.out_indices[-1] + 1) * blocks_per_stage :]]
        if "norm" not in self.kinds:
            idle.append(self.norm_f)
        if self.frozen_stages >= 0:
            idle += [self.patch_embed, *self.layers[: self.frozen_stages]]
            for _, parameter in self.named_parameters(recurse=False):  # position embedding and class tokens
                parameter.requires_grad_(False)
        for module in idle:
            module.requires_grad_(False)

    def _check(self, if_fpn: bool, residual: bool, last_layer_process: str, frozen_stages: int) -> None:
        wanted, stages = self.out_indices, self.num_stages
        if not wanted or any(not 0 <= i < stages for i in wanted) or list(wanted) != sorted(set(wanted)):
            raise ValueError(f"out_indices must be ascending numbers from 0 to {stages - 1}; got {wanted}")
        if if_fpn and len(wanted) not in (1, 4):
            raise ValueError(f"if_fpn needs four out_indices, or one; got {wanted}: give so many, or if_fpn=False")
        if if_fpn and self.patch_embed.stride not in ((4, 4), (8, 8), (16, 16)):
            raise ValueError(f"if_fpn needs stride 4, 8 or 16; got {self.patch_embed.stride}: or give if_fpn=False")
        if last_layer_process not in LAST_LAYER_KINDS:
            names = ", ".join(map(repr, LAST_LAYER_KINDS))
            raise ValueError(f"last_layer_process must be one of {names}; got {last_layer_process!r}")
        if last_layer_process != "none" and (not residual or wanted[-1] != stages - 1):
            raise ValueError(
                f"last_layer_process={last_layer_process!r} concerns the last block's residual stream; it needs "
                f"use_residual_as_feature=True and {stages - 1} among out_indices; got {residual} and {wanted}"
            )
        if not -1 <= frozen_stages <= len(self.layers):
            raise ValueError(f"frozen_stages must be from -1 (none) to {len(self.layers)}; got {frozen_stages}")


def _checkpoint_of(pretrained: str | None, init_cfg: Mapping[str, Any] | None) -> str | None:
    if init_cfg is None:
        return pretrained
    if pretrained is not None:
        raise ValueError("pretrained and init_cfg both name a checkpoint: give one of them")
    if set(init_cfg) != {"type", "checkpoint"} or init_cfg["type"] != "Pretrained":
        raise ValueError(f"init_cfg must be dict(type='Pretrained', checkpoint=…); got {dict(init_cfg)}")
    return init_cfg["checkpoint"]


def _level(dim: int, scale: float) -> nn.Module:
    """(B, D, h, w) -> (B, D, h·scale, w·scale): deconvolutions up, the largest value of each window down."""
    if scale == 4:
        return nn.Sequential(
            nn.ConvTranspose2d(dim, dim, 2, 2), nn.BatchNorm2d(dim), nn.GELU(), nn.ConvTranspose2d(dim, dim, 2, 2)
        )
    if scale == 2:
        return nn.Sequential(nn.ConvTranspose2d(dim, dim, 2, 2))
    if scale == 1:
        return nn.Identity()
    window = round(1 / scale)
    return nn.MaxPool2d(window, window, ceil_mode=True)  # a window that sticks out counts: no row of patches is lost
