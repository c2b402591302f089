"""Weights of a trained classifier for a backbone, which has no head and may have no class token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmengine.logging import print_log
from torch import Tensor

from vim.checkpoint import CheckpointError, load_checkpoint, load_model, model_state, trained_model
from vim.pos_embed import CLS_POSITIONS, cls_indices, remove_tokens, resize_pos_embed

if TYPE_CHECKING:
    from vim.openmmlab.backbone import DenseVisionMamba

CLS_TOKENS = ("cls_token", "cls_token_head", "cls_token_tail")


def load_backbone(model: DenseVisionMamba, source: str, cls_position: str | None = None) -> None:
    """Load a classifier's checkpoint (a file or an address: see `vim.checkpoint.load_checkpoint`) into a backbone.

    The head is left out, and so is the class token where the backbone has none: its row is taken out of the position
    embedding from where it stands, before that is resampled to the backbone's patch grid. The pyramid stays as it is.

    cls_position: "head", "middle", "tail" or "double"; by default what the checkpoint's own arguments say, and the
        middle, where the published models have it, if they say nothing.

    Raises CheckpointError for a file that is no such checkpoint, or one of another architecture or width.
    """
    checkpoint = load_checkpoint(source)
    state = {k: v for k, v in model_state(checkpoint, source).items() if not k.startswith("head.")}
    own = model.state_dict()
    _check_width(state, model, source)
    if "pos_embed" in state and "pos_embed" in own:
        state["pos_embed"] = _pos_embed(state, checkpoint, model, source, cls_position)
    if model.cls_token_position is None:
        state = {k: v for k, v in state.items() if k not in CLS_TOKENS}
    kept = ("fpn", "rope.freqs_")  # new here; and tables that follow from the grid
    state = {k: v for k, v in state.items() if not k.startswith(kept)} | {
        k: v for k, v in own.items() if k.startswith(kept)
    }
    load_model(model, state, source)
    print_log(f"backbone starts from {source}", logger="current")


def _check_width(state: Mapping[str, Tensor], model: DenseVisionMamba, source: str) -> None:
    bias = state.get("patch_embed.proj.bias")
    if bias is None:
        raise CheckpointError(f"{source} holds no Vision Mamba: it has no patch_embed.proj.bias")
    if len(bias) != model.embed_dim:
        raise CheckpointError(
            f"{source} is {len(bias)} channels wide, the backbone {model.embed_dim}: choose another checkpoint, or set "
            f"embed_dim={len(bias)} (and the heads' in_channels)"
        )


def _pos_embed(
    state: Mapping[str, Tensor],
    checkpoint: Mapping[str, Any],
    model: DenseVisionMamba,
    source: str,
    cls_position: str | None,
) -> Tensor:
    """The checkpoint's position embedding, fitted to the model's class tokens and patch grid."""
    trained = trained_model(checkpoint)
    there = _cls_position_there(state, trained, cls_position)
    pos_embed, new_grid = state["pos_embed"], model.patch_embed.grid_size
    patches = pos_embed.shape[1] - len(cls_indices(there, 0))
    side = math.isqrt(max(0, patches))
    grid = trained.patch_embed.grid_size if trained is not None else (side, side)
    if grid[0] * grid[1] != patches:
        raise CheckpointError(
            f"{source}: pos_embed has rows for {patches} patches, which are not a square grid, and the checkpoint does "
            "not say which: resample it with vim.pos_embed.resize_pos_embed, which takes the grid"
        )
    if model.cls_token_position is None:
        pos_embed, there = remove_tokens(pos_embed, cls_indices(there, patches)), None
    if there != model.cls_token_position:
        raise CheckpointError(
            f"{source} was trained with class tokens at {there!r}, the backbone has {model.cls_token_position!r}: set "
            "cls_token_position alike, or if_cls_token=False"
        )
    return resize_pos_embed(pos_embed, new_grid, grid, there)


def _cls_position_there(state: Mapping[str, Tensor], trained: Any, given: str | None) -> str | None:
    if given is not None and given not in CLS_POSITIONS:
        raise ValueError(f"pretrained_cls_position must be one of {', '.join(CLS_POSITIONS)}; got {given!r}")
    if "cls_token_head" in state:
        return "double"
    if "cls_token" not in state:
        return None
    if given is not None:
        return given
    return "middle" if trained is None else trained.cls_token_position
