"""Vision Mamba in MMSegmentation's registry; a configuration imports this module by `custom_imports`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmseg.registry import MODELS

import vim.openmmlab.layer_decay  # noqa: F401, registers the optimizer's constructor
from vim.openmmlab.backbone import DenseVisionMamba


@MODELS.register_module()
class VisionMambaSeg(DenseVisionMamba):
    """Backbone of segmenters: by default a pyramid over four blocks' features, each what the block itself gives.

    Options, shapes and errors: see `DenseVisionMamba`.
    """

    def __init__(self, out_indices: Sequence[int] = (5, 11, 17, 23), **options: Any):
        super().__init__(out_indices=out_indices, **options)
