"""Rotary position embedding over a 2-D patch grid (RoPE: Su et al., 2021; in two axes: EVA-02, Fang et al., 2023).

Channels are pairs (x₂ᵢ, x₂ᵢ₊₁), rotated by the angle position · ωᵢ; the first half of the pairs by the row, the second
half by the column.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

THETA = 10_000.0


def _angles(grid: tuple[int, int], dim: int, pt_hw_seq_len: int, device: torch.device | str | None) -> Tensor:
    """(rows · columns, dim): each pair's angle twice. Positions are scaled to a grid with side `pt_hw_seq_len`."""
    half = dim // 2
    omega = THETA ** (-torch.arange(0, half, 2, device=device).float() / half)
    rows, columns = (
        (torch.arange(n, device=device) / n * pt_hw_seq_len).outer(omega).repeat_interleave(2, dim=1) for n in grid
    )
    return torch.cat(
        (rows[:, None].expand(*grid, half), columns[None].expand(*grid, half)), dim=-1
    ).flatten(0, 1)  # fmt: skip


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, L, D); cos, sin (L, D)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-odd, even), dim=-1).flatten(-2) * sin


class VisionRotaryEmbedding(nn.Module):
    """The tables of one grid as buffers `freqs_cos` and `freqs_sin`, (rows · columns, dim).

    Args:
        dim: channels, a multiple of 4.
        grid: patches (rows, columns).
        pt_hw_seq_len: side of the grid that positions are scaled to, so that a fine-tuned larger grid spans the
            pretrained range.
    """

    def __init__(
        self, dim: int, grid: tuple[int, int], pt_hw_seq_len: int = 14, device: torch.device | str | None = None
    ):
        super().__init__()
        if dim % 4:
            raise ValueError(f"RoPE needs embed_dim divisible by 4 (pairs of channels for two axes); got {dim}")
        self.dim = dim
        self.grid = grid
        self.pt_hw_seq_len = pt_hw_seq_len
        angles = _angles(grid, dim, pt_hw_seq_len, device)
        self.register_buffer("freqs_cos", angles.cos())
        self.register_buffer("freqs_sin", angles.sin())

    def tables(self, grid: tuple[int, int], cls_position: str | None) -> tuple[Tensor, Tensor]:
        """cos and sin, (L, dim), for a whole sequence; its class tokens are left unrotated ("middle": see below)."""
        cos, sin = self.freqs_cos, self.freqs_sin
        if grid != self.grid:
            angles = _angles(grid, self.dim, self.pt_hw_seq_len, cos.device)
            cos, sin = angles.cos().to(cos.dtype), angles.sin().to(sin.dtype)
        # As published, a single class token costs the sequence its first place wherever it stands: in the middle, the
        # patches before it are rotated by their predecessor's position and the class token by the last one's of them.
        # Checkpoints are trained with that.
        before = 0 if cls_position in (None, "tail") else 1
        after = 1 if cls_position in ("tail", "double") else 0
        pad = (0, 0, before, after)
        return nn.functional.pad(cos, pad, value=1.0), nn.functional.pad(sin, pad)
