"""Where class tokens stand among the M patch tokens, and position embeddings resized around them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CLS_POSITIONS = ("head", "middle", "tail", "double")


def cls_indices(position: str | None, num_patches: int) -> tuple[int, ...]:
    """Indices of the class tokens in the whole sequence: "double" has two, None has none.

    Raises ValueError for an unknown position.
    """
    match position:
        case None:
            return ()
        case "head":
            return (0,)
        case "middle":
            return (num_patches // 2,)
        case "tail":
            return (num_patches,)
        case "double":
            return (0, num_patches + 1)
    raise ValueError(f"cls_token_position must be one of {', '.join(CLS_POSITIONS)} or None; got {position!r}")


def remove_tokens(x: Tensor, indices: tuple[int, ...]) -> Tensor:
    """(B, M + len(indices), D) -> (B, M, D); `indices` ascending. No copy where they stand at the ends."""
    starts = [0, *(i + 1 for i in indices)]
    ends = [*indices, x.shape[1]]
    parts = [x[:, start:end] for start, end in zip(starts, ends, strict=True) if end > start]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def insert_tokens(x: Tensor, tokens: tuple[Tensor, ...], indices: tuple[int, ...]) -> Tensor:
    """Inverse of `remove_tokens`: x (B, M, D), tokens (B or 1, 1, D) each, which will stand at `indices`, ascending."""
    parts, start = [], 0
    for inserted, (token, index) in enumerate(zip(tokens, indices, strict=True)):
        end = index - inserted
        parts += [x[:, start:end], token.expand(x.shape[0], -1, -1)]
        start = end
    return torch.cat([*parts, x[:, start:]], dim=1) if parts else x


def resize_pos_embed(
    pos_embed: Tensor, new_grid: tuple[int, int], old_grid: tuple[int, int], cls_position: str | None
) -> Tensor:
    """Position embedding of a (rows, columns) patch grid, resampled to another one.

    pos_embed (1, M + number of class tokens, D), in raster order around the class tokens' rows. These are taken out
    from where they stand (the middle is M // 2, not row 0), kept as they are, and put where they stand in the new
    sequence. Bicubic with antialiasing, in fp32; differentiable; the dtype is kept.

    Raises ValueError if pos_embed does not belong to `old_grid`, or for an unknown `cls_position`.
    """
    old_patches, new_patches = old_grid[0] * old_grid[1], new_grid[0] * new_grid[1]
    old_cls = cls_indices(cls_position, old_patches)
    if pos_embed.shape[:2] != (1, old_patches + len(old_cls)):
        raise ValueError(
            f"pos_embed must have shape (1, {old_patches + len(old_cls)}, D) for the grid {tuple(old_grid)} with "
            f"cls_position={cls_position!r}; got {tuple(pos_embed.shape)}"
        )
    # A symbolic size stands for every size, this one too: resampled to its own grid, the embedding stays as it is.
    if not any(isinstance(n, torch.SymInt) for n in new_grid) and tuple(new_grid) == tuple(old_grid):
        return pos_embed
    patches = remove_tokens(pos_embed, old_cls).float().unflatten(1, old_grid).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=new_grid, mode="bicubic", antialias=True)
    patches = patches.flatten(2).transpose(1, 2).to(pos_embed.dtype)
    cls_rows = tuple(pos_embed[:, i : i + 1] for i in old_cls)
    return insert_tokens(patches, cls_rows, cls_indices(cls_position, new_patches))
