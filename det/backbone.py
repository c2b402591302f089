"""Vision Mamba in MMDetection's registry; a configuration imports this module by `custom_imports`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmdet.registry import MODELS
from torch import Tensor

import vim.openmmlab.layer_decay  # noqa: F401, registers the optimizer's constructor
from vim.openmmlab.backbone import DenseVisionMamba


@MODELS.register_module()
class VisionMambaDet(DenseVisionMamba):
    """Backbone of detectors: by default one map, the last block's residual stream, for `SimpleFeaturePyramid`.

    out_indices None: the last block alone. Other options, shapes and errors: see `DenseVisionMamba`.
    """

    def __init__(
        self,
        out_indices: Sequence[int] | None = None,
        if_fpn: bool = False,
        use_residual_as_feature: bool = True,
        last_layer_process: str = "add",
        **options: Any,
    ):
        if out_indices is None:
            depth = options.get("depth", 24)
            out_indices = (depth // (2 if options.get("if_bidirectional") else 1) - 1,)
        super().__init__(
            out_indices=out_indices,
            if_fpn=if_fpn,
            use_residual_as_feature=use_residual_as_feature,
            last_layer_process=last_layer_process,
            **options,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """As `DenseVisionMamba.forward`, the maps contiguous: mmcv's RoIAlign takes any map for a contiguous one.

        Its maps, tokens in their order, and what convolutions make of such maps, have the channels last in memory.
        """
        return tuple(m.contiguous() for m in super().forward(x))
