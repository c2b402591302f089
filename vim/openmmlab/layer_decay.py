"""Optimizer whose learning rate falls from the head to the image, block by block, and which spares some weights."""

from __future__ import annotations

import re

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from vim.models_mamba import NO_WEIGHT_DECAY

_BLOCK = re.compile(r"backbone\.layers\.(\d+)\.")
_EMBEDDINGS = ("backbone.patch_embed.", "backbone.pos_embed", "backbone.cls_token")


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class VisionMambaLayerDecay(DefaultOptimWrapperConstructor):
    """optim_wrapper.constructor for a model whose `backbone` is a Vision Mamba; serves every OpenMMLab framework.

    paramwise_cfg=dict(layer_decay_rate=r), 0 < r ≤ 1, is all it takes. With n blocks, block i of 0 … n - 1 learns with
    lr · r^(n - i), the embeddings with lr · r^(n + 1), everything above the blocks with lr. No weight decay for the
    state space (A_log, D), biases, Δ's among them, norms, position embedding and class tokens.

    Raises ValueError for another paramwise_cfg and for a model without such a backbone.
    """

    def __call__(self, model: nn.Module):
        blocks = getattr(getattr(getattr(model, "module", model), "backbone", None), "layers", None)
        if blocks is None:
            raise ValueError("VisionMambaLayerDecay needs a model whose backbone is a Vision Mamba, with layers")
        self.num_blocks = len(blocks)
        return super().__call__(model)

    def _validate_cfg(self) -> None:
        cfg = self.paramwise_cfg
        rate = cfg.get("layer_decay_rate")
        if set(cfg) != {"layer_decay_rate"} or not isinstance(rate, int | float) or not 0 < rate <= 1:
            raise ValueError(f"paramwise_cfg must be dict(layer_decay_rate=r) with 0 < r <= 1; got {dict(cfg)}")
        if self.base_lr is None or self.base_wd is None:
            raise ValueError(f"the optimizer needs lr and weight_decay; got {dict(self.optimizer_cfg)}")

    def add_params(self, params: list[dict], module: nn.Module, **_: object) -> None:
        """One group per learning rate and weight decay, named by `layer` and `decayed`."""
        groups: dict[tuple[int, bool], dict] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            layer, decayed = self._layer(name), _is_decayed(name, parameter)
            if (layer, decayed) not in groups:
                scale = self.paramwise_cfg["layer_decay_rate"] ** (self.num_blocks + 1 - layer)
                groups[layer, decayed] = {
                    "params": [],
                    "lr": self.base_lr * scale,
                    "weight_decay": self.base_wd if decayed else 0.0,
                    "layer": layer,
                    "decayed": decayed,
                }
            groups[layer, decayed]["params"].append(parameter)
        params += (groups[key] for key in sorted(groups))

    def _layer(self, name: str) -> int:
        """0: the embeddings, i + 1: block i, number of blocks + 1: everything above."""
        if name.startswith(_EMBEDDINGS):
            return 0
        block = _BLOCK.match(name)
        return int(block[1]) + 1 if block else self.num_blocks + 1


def _is_decayed(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and name.rpartition(".")[2] not in NO_WEIGHT_DECAY
