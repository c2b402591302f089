"""What a Vision Mamba does with an image: hidden attention, steps, class activation, receptive field.

A selective scan is linear in its input, so that it is attention with an implicit matrix (Ali et al., 2024,
arXiv 2403.01590): without the skip D u, and for one channel,

    y_t = Σ_{s ≤ t} α_ts u_s        α_ts = C_t · (Ā_t ⋯ Ā_{s+1}) c_s B_s,

under any discretization; against time, s ≥ t. Class activation is Grad-CAM (Selvaraju et al., 2017), the effective
receptive field that of Luo et al., 2016. `python -m vim.visualize` draws them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from causal_conv1d import causal_conv1d_fn
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.discretization_ref import discretize
from mamba_ssm.ops.mamba_inner import at_least_float32, direction_arguments, split_channels
from mamba_ssm.ops.selective_scan_ref import ScanArgs
from vim.models_mamba import VisionMamba
from vim.pos_embed import cls_indices


class Scan(NamedTuple):
    """One of the scans of a mixer, with the inputs that it had. reverse: against time."""

    args: ScanArgs
    reverse: bool
    method: str


def scans(mixer: Mamba, hidden_states: Tensor, reverse: bool = False) -> list[Scan]:
    """The scans of `mixer(hidden_states, reverse=reverse)`: one, or two with "v1" and "v2".

    hidden_states: (B, L, d_model).

    The mixer's output is out_proj(scale · (sum of the scans' outputs) · silu(z)).
    """
    x, _ = split_channels(mixer.in_proj(hidden_states).transpose(1, 2))
    if mixer.bimamba_type == "v1":
        args = mixer._scan_arguments(x, reverse)
        against = args._replace(A=-torch.exp(at_least_float32(mixer.A_b_log)))
        both = [(args, reverse), (against, not reverse)]
    else:
        both = []
        for suffix in ("", "_b") if mixer.bimamba_type == "v2" else ("",):
            runs_back = reverse != (suffix == "_b")
            conv_fn = partial(causal_conv1d_fn, reverse=runs_back, use_cuda_kernel=mixer.use_cuda_kernel)
            both.append((direction_arguments(x, mixer._direction(suffix), conv_fn=conv_fn), runs_back))
    return [Scan(args, runs_back, mixer.discretization_method) for args, runs_back in both]


def steps(scan: Scan) -> Tensor:
    """Δ = softplus(delta + delta_bias), (B, D, L), float32."""
    delta = at_least_float32(scan.args.delta)
    if scan.args.delta_bias is not None:
        delta = delta + at_least_float32(scan.args.delta_bias)[:, None]
    return F.softplus(delta)


def hidden_attention(scan: Scan, channels: slice = slice(None)) -> Tensor:
    """α of some channels, (B, channels, L, L): row t says what the scan's output at t takes from its input at each s.

    A matrix of L·L numbers a channel and, meanwhile, L·N more: mind the memory, or use `mean_attention`.
    Raises ValueError for B and C other than (B, N, L).
    """
    args = scan.args
    if args.B.dim() != 3 or args.C.dim() != 3:
        raise ValueError(
            f"B and C: got shapes {tuple(args.B.shape)}, {tuple(args.C.shape)}; expected (batch, N, length)"
        )
    delta, A = steps(scan)[:, channels], at_least_float32(args.A)[channels]
    A_bar, c = discretize(scan.method, delta.permute(2, 0, 1), A)  # (L, B, D, N)
    B, C = (at_least_float32(t).permute(2, 0, 1)[:, :, None] for t in (args.B, args.C))
    drive = c * B
    length, batch, width, _ = drive.shape
    alpha = drive.new_zeros(length, length, batch, width)
    carried = torch.empty_like(drive)  # (Ā_t ⋯ Ā_{s+1}) c_s B_s, the s in the order of the scan
    order = list(range(length))[:: -1 if scan.reverse else 1]
    for i, t in enumerate(order):
        carried[:i] *= A_bar[t]
        carried[i] = drive[t]
        alpha[t, order[: i + 1]] = (carried[: i + 1] * C[t]).sum(-1)
    return alpha.permute(2, 3, 0, 1)


def mean_attention(scan: Scan, chunk: int = 64) -> Tensor:
    """The mean of |α| over all channels, (B, L, L), computed `chunk` channels at a time."""
    count = scan.args.u.shape[1]
    parts = (hidden_attention(scan, slice(i, i + chunk)).abs().sum(1) for i in range(0, count, chunk))
    return sum(parts) / count


@contextmanager
def _watched(model: VisionMamba, layers: Sequence[int]) -> Iterator[dict[int, dict[str, Any]]]:
    """While it lasts, what these blocks read and give: "read" (B, L, D), the mixer's input, "reverse", its option, and
    "given", the residual stream after it."""
    seen: dict[int, dict[str, Any]] = {layer: {} for layer in layers}

    def before(layer: int, _module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        seen[layer].update(read=args[0], reverse=kwargs.get("reverse", False))

    def after(layer: int, _module: Any, _args: tuple, output: tuple[Tensor, Tensor]) -> None:
        seen[layer]["given"] = output[0] + output[1]

    hooks = []
    for layer in layers:
        block = model.layers[layer]
        hooks.append(block.mixer.register_forward_pre_hook(partial(before, layer), with_kwargs=True))
        hooks.append(block.register_forward_hook(partial(after, layer)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def layer_scans(model: VisionMamba, images: Tensor, layers: Sequence[int]) -> dict[int, list[Scan]]:
    """The scans of these blocks' mixers on images (B, C, H, W)."""
    with _watched(model, layers) as seen:
        model(images)
    return {layer: scans(model.layers[layer].mixer, seen[layer]["read"], seen[layer]["reverse"]) for layer in layers}


def class_activation(
    model: VisionMamba, images: Tensor, layers: Sequence[int], target: int | None = None
) -> tuple[dict[int, Tensor], Tensor]:
    """Grad-CAM of a class (None: the one predicted for each image) on what each layer's mixer reads.

    On a mixer's input, not on its output: behind the last mixer a class token alone has an influence. Returns the maps
    (B, rows, columns) by layer, at least 0, and the logits (B, classes).
    """
    with torch.enable_grad(), _watched(model, layers) as seen:
        logits = model(images)
        chosen = logits.argmax(-1) if target is None else torch.full_like(logits[:, 0], target, dtype=torch.long)
        score = logits.gather(1, chosen[:, None]).sum()
        read = [seen[layer]["read"] for layer in layers]
        gradients = torch.autograd.grad(score, read)
    maps = {}
    for layer, tokens, gradient in zip(layers, read, gradients, strict=True):
        tokens, gradient = (patches(model, images, t.detach().transpose(1, 2)) for t in (tokens, gradient))
        weights = gradient.mean(dim=(2, 3), keepdim=True)
        maps[layer] = (weights * tokens).sum(1).relu()
    return maps, logits.detach()


def effective_receptive_field(
    model: VisionMamba, images: Tensor, layers: Sequence[int], place: tuple[int, int] | None = None
) -> dict[int, Tensor]:
    """|∂ (sum over channels of the residual stream after a layer, at one patch) / ∂ pixel|, (B, H, W) by layer.

    place: row and column of the patch; None: the central one. Summed over the image's channels.
    """
    rows, columns = model.patch_embed.dynamic_feat_size(images.shape[-2:])
    row, column = place or (rows // 2, columns // 2)
    token = patch_places(model, images)[row * columns + column]
    images = images.detach().requires_grad_()
    with torch.enable_grad(), _watched(model, layers) as seen:
        model(images)
        return {
            layer: torch.autograd.grad(seen[layer]["given"][:, token].sum(), images, retain_graph=True)[0].abs().sum(1)
            for layer in layers
        }


def patch_places(model: VisionMamba, images: Tensor) -> list[int]:
    """Where in the sequence the patches stand, in raster order."""
    rows, columns = model.patch_embed.dynamic_feat_size(images.shape[-2:])
    cls = class_places(model, images)
    return [t for t in range(rows * columns + len(cls)) if t not in cls]


def class_places(model: VisionMamba, images: Tensor) -> tuple[int, ...]:
    """Where in the sequence the class tokens stand."""
    rows, columns = model.patch_embed.dynamic_feat_size(images.shape[-2:])
    return cls_indices(model.cls_token_position, rows * columns)


def patches(model: VisionMamba, images: Tensor, values: Tensor) -> Tensor:
    """Values of the sequence (…, L) without the class tokens, on the patch grid: (…, rows, columns)."""
    grid = model.patch_embed.dynamic_feat_size(images.shape[-2:])
    return values[..., patch_places(model, images)].unflatten(-1, grid)
