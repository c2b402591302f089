"""The simple feature pyramid of plain backbones (Li et al., 2022: Exploring Plain Vision Transformer Backbones)."""

from __future__ import annotations

from collections.abc import Sequence

from mmdet.registry import MODELS
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn import functional as F

SCALES = (4.0, 2.0, 1.0, 0.5)


@MODELS.register_module()
class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W); norm_cfg=dict(type="LayerNorm2d") in heads."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """One map in, `num_outs` maps out, each with `out_channels`.

    The first have the map's size times `scales`: deconvolutions or max pooling, then 1×1 and 3×3 convolutions, each
    with LayerNorm. The others take every second pixel of the one before.

    Raises ValueError for in_channels not divisible by 4, a scale other than 4, 2, 1, 0.5, or too few num_outs.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        num_outs: int = 5,
        scales: Sequence[float] = SCALES,
        init_cfg: dict | None = None,
    ):
        super().__init__(init_cfg)
        if in_channels < 4 or in_channels % 4:
            raise ValueError(f"in_channels must be a multiple of 4, to be halved twice; got {in_channels}")
        if not scales or not set(scales) <= set(SCALES):
            raise ValueError(f"scales must be some of {SCALES}; got {tuple(scales)}")
        if num_outs < len(scales):
            raise ValueError(f"num_outs must be at least {len(scales)}, one per scale; got {num_outs}")
        self.num_outs = num_outs
        self.levels = nn.ModuleList()
        for scale in scales:
            resample, dim = _resample(in_channels, scale)
            self.levels.append(
                nn.Sequential(
                    *resample,
                    nn.Conv2d(dim, out_channels, 1, bias=False),
                    LayerNorm2d(out_channels),
                    nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                    LayerNorm2d(out_channels),
                )
            )

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """[(B, in_channels, H, W)] -> (B, out_channels, H·scale, W·scale) per level, halves rounded up."""
        if len(maps) != 1:
            raise ValueError(f"the pyramid takes one map; got {len(maps)}: give the backbone one number as out_indices")
        # mmcv's RoIAlign takes any map for a contiguous one, and LayerNorm2d leaves the channels last in memory.
        outs = [level(maps[0]).contiguous() for level in self.levels]
        while len(outs) < self.num_outs:
            outs.append(F.max_pool2d(outs[-1], kernel_size=1, stride=2))
        return tuple(outs)


def _resample(dim: int, scale: float) -> tuple[list[nn.Module], int]:
    """The modules that scale a map, and the number of channels they leave."""
    if scale == 4:
        up = nn.ConvTranspose2d(dim, dim // 2, 2, 2)
        return [up, LayerNorm2d(dim // 2), nn.GELU(), nn.ConvTranspose2d(dim // 2, dim // 4, 2, 2)], dim // 4
    if scale == 2:
        return [nn.ConvTranspose2d(dim, dim // 2, 2, 2)], dim // 2
    return ([nn.MaxPool2d(2, 2, ceil_mode=True)] if scale == 0.5 else []), dim
