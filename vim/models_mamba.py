"""Vision Mamba (Vim; Zhu et al., 2024): patches in, a stack of bidirectional Mamba mixers, class logits out.

The constructor, the state_dict and the forward are the published ones, so published checkpoints load and give the
published outputs. Activations are (B, L, D) in memory from the patch embedding to the head. Reading order:
`VisionMamba.forward`, `forward_features`, `_stage`, `Block.forward`, and then `mamba_ssm.modules.mamba_simple.Mamba`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import lecun_normal_, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.triton.layer_norm import layer_norm_fn
from vim.checkpoint import load_checkpoint, model_state
from vim.pos_embed import cls_indices, insert_tokens, remove_tokens, resize_pos_embed
from vim.rope import VisionRotaryEmbedding, rotate

POOL_TYPES = ("none", "mean", "max", "all")
FEATURE_KINDS = ("sum", "norm", "branch")

# Parameters without weight decay: those of the state space, the position embedding and class tokens.
NO_WEIGHT_DECAY = {"A_log", "A_b_log", "D", "D_b", "pos_embed", "cls_token", "cls_token_head", "cls_token_tail"}

_DEFAULT_CFG = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}
default_cfgs = generate_default_cfgs({name: _DEFAULT_CFG for name in ("vim_tiny", "vim_small", "vim_base")})


class PatchEmbed(nn.Module):
    """Image (B, C, H, W) -> patch tokens (B, rows · columns, D): a convolution with the patch as its kernel.

    Patches overlap where stride < patch_size. With `dynamic_img_size`, any H×W is padded with zeros at its right and
    lower border until patches cover it; otherwise H×W must be `img_size`, which patches must cover exactly.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        stride: int | tuple[int, int],
        channels: int,
        embed_dim: int,
        dynamic_img_size: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        self.img_size = to_2tuple(img_size)
        self.patch_size = to_2tuple(patch_size)
        self.stride = to_2tuple(stride)
        for name, size in (("img_size", self.img_size), ("patch_size", self.patch_size), ("stride", self.stride)):
            if min(size) < 1:
                raise ValueError(f"{name} must be at least 1; got {size}")
        self.channels = channels
        self.dynamic_img_size = dynamic_img_size
        self.proj = nn.Conv2d(channels, embed_dim, self.patch_size, self.stride, device=device, dtype=dtype)
        if self.stride != self.patch_size:
            self.proj.to(memory_format=torch.channels_last)  # gives channel-last tokens without a transpose
        if not dynamic_img_size and self._padding(self.img_size) != (0, 0):
            raise ValueError(
                f"img_size {self.img_size} is not covered by patches of {self.patch_size} with stride {self.stride}: "
                "use patch_size + a multiple of stride, or dynamic_img_size=True to pad"
            )
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def _padding(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns that an image lacks for patches to cover it."""
        return tuple(
            p - n if n < p else (p - n) % s for n, p, s in zip(size, self.patch_size, self.stride, strict=True)
        )

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches that cover an image (H, W); the name is timm's."""
        return tuple(
            (n + missing - p) // s + 1
            for n, missing, p, s in zip(img_size, self._padding(img_size), self.patch_size, self.stride, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Tokens in raster order."""
        self._check(x)
        if self.dynamic_img_size:
            bottom, right = self._padding(x.shape[-2:])
            x = F.pad(x, (0, right, 0, bottom))
        # The product's shapes would tie an exported program to some image sizes.
        if self.stride != self.patch_size or torch.compiler.is_exporting():
            return self.proj(x).flatten(2).transpose(1, 2)
        # The convolution as one matrix product: as such it takes a fifth of the time on a GPU.
        (height, width), (batch, channels) = self.patch_size, x.shape[:2]
        rows, columns = x.shape[2] // height, x.shape[3] // width
        patches = x.view(batch, channels, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
        if torch.is_autocast_enabled(x.device.type):
            patches = patches.to(torch.get_autocast_dtype(x.device.type))
        return F.linear(patches.flatten(3).flatten(1, 2), self.proj.weight.flatten(1), self.proj.bias)

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"images must have shape (B, {self.channels}, H, W); got {tuple(x.shape)}")
        if 0 in x.shape:
            raise ValueError(f"images must not be empty; got shape {tuple(x.shape)}: skip empty batches")
        if not x.is_floating_point():
            raise TypeError(f"images must be floating point; got {x.dtype}: convert, e.g. images.float() / 255")
        if not self.dynamic_img_size and x.shape[-2:] != self.img_size:
            raise ValueError(
                f"images of {tuple(x.shape[-2:])} do not match the model's img_size {self.img_size}: resize them, "
                "or build the model with that img_size or with dynamic_img_size=True"
            )


class AddNorm(nn.Module):
    """residual = residual + drop_path(hidden_states); returns (norm(residual), residual).

    One fused kernel with `fused`, otherwise PyTorch's own operators. `rms_norm` picks RMSNorm, which has no bias, or
    LayerNorm. `residual_in_fp32` keeps the sum in fp32 while the branches run in half precision.
    """

    def __init__(
        self,
        dim: int,
        eps: float,
        rms_norm: bool,
        drop_path: float,
        fused: bool,
        residual_in_fp32: bool,
        use_cuda_kernel: bool | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.bias = None if rms_norm else nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        self.eps = eps
        self.rms_norm = rms_norm
        self.drop_path = drop_path
        self.fused = fused
        self.residual_in_fp32 = residual_in_fp32
        self.use_cuda_kernel = use_cuda_kernel

    def forward(self, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """hidden_states (B, L, D), residual alike or None for 0."""
        keep = self._drop_path_scale(hidden_states)
        if self.fused:
            return layer_norm_fn(
                hidden_states,
                self.weight,
                self.bias,
                residual,
                self.eps,
                prenorm=True,
                residual_in_fp32=self.residual_in_fp32,
                is_rms_norm=self.rms_norm,
                drop_path_scale=keep,
                use_cuda_kernel=self.use_cuda_kernel,
            )
        if keep is not None:
            hidden_states = hidden_states * keep[:, None, None].to(hidden_states.dtype)
        residual = hidden_states if residual is None else residual + hidden_states
        normed = self._norm(residual.to(self.weight.dtype))
        at_least_fp32 = torch.promote_types(residual.dtype, torch.float32)
        return normed, residual.to(at_least_fp32) if self.residual_in_fp32 else residual

    def _norm(self, x: Tensor) -> Tensor:
        if self.rms_norm:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def _drop_path_scale(self, x: Tensor) -> Tensor | None:
        """(B,): 0 where a sample's branch is dropped, else 1 / keep (stochastic depth: Huang et al., 2016)."""
        if not self.training or self.drop_path == 0:
            return None
        keep = 1 - self.drop_path
        return torch.empty(x.shape[0], device=x.device).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, rms_norm={self.rms_norm}, drop_path={self.drop_path:.3f}"


class Block(nn.Module):
    """Add -> Norm -> Mixer: a block adds the branch that comes *in*, so that addition and norm are one kernel."""

    def __init__(self, norm: AddNorm, mixer: Mamba):
        super().__init__()
        self.norm = norm
        self.mixer = mixer

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None, inference_params: Any = None, reverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """hidden_states, residual (B, L, D) -> the mixer's output, and the residual that entered the norm."""
        hidden_states, residual = self.norm(hidden_states, residual)
        return self.mixer(hidden_states, inference_params, reverse=reverse), residual


class VisionMamba(nn.Module):
    """Vision Mamba backbone and classifier.

    Args:
        img_size, patch_size, stride: int, or (H, W), in pixels. Images must have `img_size` unless `dynamic_img_size`.
        depth, embed_dim, d_state: number of blocks, channels, states per channel.
        channels: of the image.
        num_classes: 0 for no head.
        ssm_cfg: more arguments of `Mamba`, over those given here.
        drop_rate: dropout after the position embedding.
        drop_path_rate: stochastic depth, below 1, of the last block's branch; it rises linearly from 0.
        norm_epsilon, rms_norm, fused_add_norm, residual_in_fp32: see `AddNorm`.
        initializer_cfg: `rescale_prenorm_residual` (True), `n_residuals_per_layer` (1); `initializer_range` is accepted
            as published, where it concerns token embeddings only.
        ft_seq_len: as published not needed: RoPE follows the patch grid. Given with RoPE, it must be the grid's side.
        pt_hw_seq_len: side of the grid that RoPE's positions are scaled to.
        if_bidirectional: blocks work in pairs, one from either end of the sequence, and their outputs are added.
        final_pool_type: without class token, "none" (last token), "mean", "max" (of the tokens' logits) or "all"
            (every token). A class token takes its place; double ones are averaged.
        if_abs_pos_embed, if_rope: position embeddings; if_rope_residual: rotate the residual too.
        flip_img_sequences_ratio: probability of reading the whole batch's sequences from their end, also in eval mode.
        if_bimamba: published shorthand for bimamba_type="v1".
        bimamba_type, if_divide_out, init_layer_scale, discretization_method, use_cuda_kernel: see `Mamba`.
        if_cls_token, use_double_cls_token, use_middle_cls_token: published flags for where class tokens stand; double
            wins over middle, neither means head.
        cls_token_position: "head", "middle", "tail" or "double", over those two flags.
        dynamic_img_size: take any H×W: pad to whole patches, resample the position embedding.

    Raises ValueError for an unknown option value and for options that contradict each other.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        stride: int | tuple[int, int] = 16,
        depth: int = 24,
        embed_dim: int = 192,
        d_state: int = 16,
        channels: int = 3,
        num_classes: int = 1000,
        ssm_cfg: Mapping[str, Any] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = True,
        initializer_cfg: Mapping[str, Any] | None = None,
        fused_add_norm: bool = True,
        residual_in_fp32: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        ft_seq_len: int | None = None,
        pt_hw_seq_len: int = 14,
        if_bidirectional: bool = False,
        final_pool_type: str = "none",
        if_abs_pos_embed: bool = True,
        if_rope: bool = False,
        if_rope_residual: bool = False,
        flip_img_sequences_ratio: float = -1.0,
        if_bimamba: bool = False,
        bimamba_type: str = "v2",
        if_cls_token: bool = True,
        if_divide_out: bool = True,
        init_layer_scale: float | None = None,
        use_double_cls_token: bool = False,
        use_middle_cls_token: bool = True,
        discretization_method: str = "zoh",
        use_cuda_kernel: bool | None = None,
        *,
        cls_token_position: str | None = None,
        dynamic_img_size: bool = False,
    ):
        super().__init__()
        for name, value, low in (("depth", depth, 1), ("embed_dim", embed_dim, 1), ("num_classes", num_classes, 0)):
            if value < low:
                raise ValueError(f"{name} must be at least {low}; got {value}")
        if if_bidirectional and depth % 2:
            raise ValueError(f"if_bidirectional runs blocks in pairs and needs an even depth; got {depth}")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be at least 0 and below 1; got {drop_path_rate}")
        if cls_token_position is not None and not if_cls_token:
            raise ValueError(f"cls_token_position={cls_token_position!r} needs if_cls_token=True")
        if if_cls_token and cls_token_position is None:
            cls_token_position = "double" if use_double_cls_token else "middle" if use_middle_cls_token else "head"
        factory = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.d_model = self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.if_bidirectional = if_bidirectional
        self.final_pool_type = _checked_pool_type(final_pool_type)
        self.if_rope_residual = if_rope_residual
        self.flip_img_sequences_ratio = flip_img_sequences_ratio
        self.cls_token_position = cls_token_position
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(img_size, patch_size, stride, channels, embed_dim, dynamic_img_size, **factory)
        grid = self.patch_embed.grid_size
        self.num_tokens = len(cls_indices(cls_token_position, self.patch_embed.num_patches))
        if if_rope and ft_seq_len is not None and grid != (ft_seq_len, ft_seq_len):
            raise ValueError(f"RoPE covers the patch grid, which is {grid}; got ft_seq_len={ft_seq_len}: leave it out")

        if cls_token_position == "double":
            self.cls_token_head = nn.Parameter(torch.zeros(1, 1, embed_dim, **factory))
            self.cls_token_tail = nn.Parameter(torch.zeros(1, 1, embed_dim, **factory))
        elif cls_token_position is not None:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim, **factory))
        self.pos_embed = None
        if if_abs_pos_embed:
            length = self.patch_embed.num_patches + self.num_tokens
            self.pos_embed = nn.Parameter(torch.zeros(1, length, embed_dim, **factory))
            self.pos_drop = nn.Dropout(drop_rate)
        self.rope = VisionRotaryEmbedding(embed_dim, grid, pt_hw_seq_len, device) if if_rope else None

        # Block i drops the branch of block i - 1, and the final norm that of the last block: 0, 0, …, drop_path_rate.
        drop_path = [0.0, *torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()][:depth]
        norm_options = {
            "eps": norm_epsilon,
            "rms_norm": rms_norm,
            "fused": fused_add_norm,
            "residual_in_fp32": residual_in_fp32,
            "use_cuda_kernel": use_cuda_kernel,
            **factory,
        }
        mixer_options = {
            "d_state": d_state,
            "bimamba_type": "v1" if if_bimamba else bimamba_type,
            "if_divide_out": if_divide_out,
            "init_layer_scale": init_layer_scale,
            "discretization_method": discretization_method,
            "use_cuda_kernel": use_cuda_kernel,
            **factory,
            **(ssm_cfg or {}),
        }
        self.layers = nn.ModuleList(
            Block(
                norm=AddNorm(embed_dim, drop_path=drop_path[i], **norm_options),
                mixer=Mamba(embed_dim, layer_idx=i, **mixer_options),
            )
            for i in range(depth)
        )
        self.norm_f = AddNorm(embed_dim, drop_path=drop_path_rate, **norm_options)
        self.head = _make_head(embed_dim, num_classes, **factory)
        reduction = self.patch_embed.stride[0]
        self.feature_info = [
            {"module": f"stages.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(self.num_stages)
        ]
        self._init_weights(**(initializer_cfg or {}))

    @torch.no_grad()
    def _init_weights(
        self, initializer_range: float = 0.02, rescale_prenorm_residual: bool = True, n_residuals_per_layer: int = 1
    ) -> None:
        """As published; Mamba's own initialization stands, but for its out_proj and biases other than Δ's."""
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)
        for name, parameter in self.named_parameters(recurse=False):
            if name in NO_WEIGHT_DECAY:  # position embedding and class tokens
                trunc_normal_(parameter, std=0.02)
        for block in self.layers:
            mixer = block.mixer
            for linear in (mixer.in_proj, mixer.out_proj):
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
            if rescale_prenorm_residual:  # GPT-2: scaled down by the root of the number of residual additions
                nn.init.kaiming_uniform_(mixer.out_proj.weight, a=math.sqrt(5))
                mixer.out_proj.weight /= math.sqrt(n_residuals_per_layer * len(self.layers))

    def forward(
        self,
        x: Tensor,
        return_features: bool = False,
        inference_params: Any = None,
        if_random_cls_token_position: bool = False,
        if_random_token_rank: bool = False,
    ) -> Tensor:
        """Images (B, channels, H, W) -> logits (B, num_classes); final_pool_type "all": (B, L, num_classes).

        The options are those of `forward_features`, whose result is returned with `return_features`.
        """
        features = self.forward_features(x, inference_params, if_random_cls_token_position, if_random_token_rank)
        return features if return_features else self.forward_head(features)

    def forward_features(
        self,
        x: Tensor,
        inference_params: Any = None,
        if_random_cls_token_position: bool = False,
        if_random_token_rank: bool = False,
    ) -> Tensor:
        """Images (B, channels, H, W) -> the features that the head sees: (B, D), or (B, L, D) for pooling "max", "all".

        Args:
            inference_params: passed to the mixers; needs bimamba_type="none".
            if_random_cls_token_position: put the class token of a "head" model at a random place, for an ablation;
                class tokens in the middle or at both ends keep theirs, as published.
            if_random_token_rank: shuffle the sequence, the same way for the whole batch.
        """
        x, grid, cls = self._embed(x, if_random_cls_token_position)
        if if_random_token_rank:
            order = torch.randperm(x.shape[1])
            x, cls = x[:, order.to(x.device)], tuple(order.argsort()[list(cls)].tolist())
        flipped = self.flip_img_sequences_ratio > 0 and random.random() < self.flip_img_sequences_ratio
        if flipped:
            x, cls = x.flip(1), tuple(x.shape[1] - 1 - i for i in cls)
        rope = self._rope_tables(grid, flipped)

        hidden_states, residual = x, None
        for stage in range(self.num_stages):
            hidden_states, residual = self._stage(stage, hidden_states, residual, rope, inference_params)
        x, _ = self.norm_f(hidden_states, residual)
        return self._pool(x, cls)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        *,
        kinds: Sequence[str] | None = None,
    ) -> list[Any] | tuple[Tensor, list[Any]]:
        """Feature maps of chosen blocks, as timm's models give them.

        A block's feature is the residual stream after it, class tokens taken out. Sequences are never flipped here.
        With `if_bidirectional`, a pair of blocks counts as one.

        Args:
            indices: the last n blocks if int, all if None, else their numbers (negative: from the end).
            return_prefix_tokens: each feature becomes (feature, class tokens (B, number of them, D)).
            norm: apply the final norm to every feature.
            stop_early: do not run the blocks after the last wanted one.
            output_fmt: "NCHW": (B, D, rows, columns), a view of channel-last memory; "NLC": (B, rows · columns, D).
            intermediates_only: return the list of features alone.
            kinds: what each feature is, one of `FEATURE_KINDS` per index, over `norm`: "sum" the residual stream,
                "norm" that after the final norm, "branch" what the block itself gives, before it is added.
        Returns:
            (all tokens after the final norm (B, L, D), features), or the features.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC'; got {output_fmt!r}")
        wanted, last = feature_take_indices(self.num_stages, indices)
        kind_of = self._feature_kinds(wanted, kinds, "norm" if norm else "sum")
        x, grid, cls = self._embed(x)
        rope = self._rope_tables(grid)

        features = []
        hidden_states, residual = x, None
        for stage in range(last + 1 if stop_early else self.num_stages):
            hidden_states, residual = self._stage(stage, hidden_states, residual, rope)
            if kind := kind_of.get(stage):
                tokens = hidden_states if kind == "branch" else self.norm_f(hidden_states, residual)[kind == "sum"]
                feature = remove_tokens(tokens, cls)
                if output_fmt == "NCHW":
                    feature = feature.transpose(1, 2).unflatten(2, grid)
                features.append((feature, tokens[:, list(cls)]) if return_prefix_tokens else feature)
        if intermediates_only:
            return features
        return self.norm_f(hidden_states, residual)[0], features

    @staticmethod
    def _feature_kinds(wanted: Sequence[int], kinds: Sequence[str] | None, default: str) -> dict[int, str]:
        """The kind of each wanted stage's feature."""
        kinds = [default] * len(wanted) if kinds is None else kinds
        if len(kinds) != len(wanted) or not set(kinds) <= set(FEATURE_KINDS):
            raise ValueError(f"kinds must be {len(wanted)} of {', '.join(FEATURE_KINDS)}, one per index; got {kinds!r}")
        return dict(zip(wanted, kinds, strict=True))

    def _embed(self, x: Tensor, random_cls: bool = False) -> tuple[Tensor, tuple[int, int], tuple[int, ...]]:
        """Images -> the sequence (B, L, D), the patch grid, and where in the sequence the class tokens stand."""
        height_width = x.shape[-2:]
        x = self.patch_embed(x)
        grid = self.patch_embed.dynamic_feat_size(height_width)
        cls = cls_indices(self.cls_token_position, x.shape[1])
        if random_cls and self.cls_token_position == "head":
            cls = (random.randint(0, x.shape[1]),)
        x = insert_tokens(x, self._cls_tokens(), cls)
        if self.pos_embed is not None:
            x = x + resize_pos_embed(self.pos_embed, grid, self.patch_embed.grid_size, self.cls_token_position)
            x = self.pos_drop(x)
        return x, grid, cls

    def _cls_tokens(self) -> tuple[Tensor, ...]:
        match self.cls_token_position:
            case None:
                return ()
            case "double":
                return self.cls_token_head, self.cls_token_tail
        return (self.cls_token,)

    def _rope_tables(self, grid: tuple[int, int], flipped: bool = False) -> tuple[Tensor, Tensor] | None:
        """cos and sin for every place of the sequence. As published, they turn with a flipped one, except for pairs."""
        if self.rope is None:
            return None
        cos, sin = self.rope.tables(grid, self.cls_token_position)
        return (cos.flip(0), sin.flip(0)) if flipped and not self.if_bidirectional else (cos, sin)

    @property
    def num_stages(self) -> int:
        """Steps of the forward: blocks, or pairs of blocks with `if_bidirectional`."""
        return len(self.layers) // 2 if self.if_bidirectional else len(self.layers)

    def _stage(
        self,
        stage: int,
        hidden_states: Tensor,
        residual: Tensor | None,
        rope: tuple[Tensor, Tensor] | None,
        inference_params: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """One block; or a pair, the second from the sequence's end, whose outputs and whose residuals add up."""
        if rope is not None:
            hidden_states = rotate(hidden_states, *rope)
            if residual is not None and self.if_rope_residual:
                residual = rotate(residual, *rope)
        if not self.if_bidirectional:
            return self._run(self.layers[stage], hidden_states, residual, inference_params)
        along, residual_along = self._run(self.layers[2 * stage], hidden_states, residual, inference_params)
        against, residual_against = self._run(
            self.layers[2 * stage + 1], hidden_states, residual, inference_params, reverse=True
        )
        return along + against, residual_along + residual_against

    def _run(self, block: Block, *args: Any, reverse: bool = False) -> tuple[Tensor, Tensor]:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, reverse, use_reentrant=False)
        return block(*args, reverse)

    def _pool(self, x: Tensor, cls: tuple[int, ...]) -> Tensor:
        if cls:
            return sum(x[:, place] for place in cls) / len(cls)  # no index tensor: CUDA graphs cannot take one along
        match self.final_pool_type:
            case "none":
                return x[:, -1]
            case "mean":
                return x.mean(dim=1)
        return x  # "all", and "max", which is taken over the tokens' logits

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Features of `forward_features` -> logits; `pre_logits` returns them as they are."""
        if pre_logits:
            return features
        logits = self.head(features)
        if self.final_pool_type == "max" and self.cls_token_position is None:
            logits = logits.max(dim=1).values
        return logits

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, num_classes 0 for none; `global_pool`, if given, becomes the final_pool_type."""
        if global_pool is not None:
            self.final_pool_type = _checked_pool_type(global_pool)
        self.num_classes = num_classes
        weight = self.norm_f.weight
        self.head = _make_head(self.embed_dim, num_classes, weight.device, weight.dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass rather than keep its activations."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that an optimizer should not decay."""
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in NO_WEIGHT_DECAY}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups from the image to the head, for layer-wise learning rates; see timm."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": r"^layers\.(\d+)" if coarse else [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))],
        }

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """The mixers' caches by block; see `Mamba.allocate_inference_cache`."""
        return {
            i: block.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype)
            for i, block in enumerate(self.layers)
        }

    def load_pretrained(self, checkpoint_path: str | PathLike[str], prefix: str = "") -> None:
        """Load a published checkpoint, or a state_dict file, through `checkpoint_filter_fn`.

        Only keys that begin with `prefix` are taken, without it. Raises RuntimeError that names keys that are missing,
        unexpected or of another shape, and CheckpointError, one too, for a file that is not such a checkpoint.
        """
        path = Path(checkpoint_path)
        state_dict = model_state(load_checkpoint(path), path)
        state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        self.load_state_dict(checkpoint_filter_fn(state_dict, self))


def _checked_pool_type(name: str) -> str:
    if name not in POOL_TYPES:
        raise ValueError(f"final_pool_type must be one of {', '.join(POOL_TYPES)}; got {name!r}")
    return name


def _make_head(
    embed_dim: int, num_classes: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Module:
    if num_classes == 0:
        return nn.Identity()
    head = nn.Linear(embed_dim, num_classes, device=device, dtype=dtype)
    trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: VisionMamba) -> dict[str, Tensor]:
    """A checkpoint of the same architecture at another image size, fitted to `model`; published {"model": …} or bare.

    The position embedding is resized around its class tokens, its patch grid being taken as square; RoPE tables of
    another grid give way to the model's. Everything else is left to `load_state_dict`.
    """
    state_dict = dict(state_dict.get("model", state_dict))
    own = model.state_dict()
    for key in ("rope.freqs_cos", "rope.freqs_sin"):
        if key in state_dict and key in own and state_dict[key].shape != own[key].shape:
            state_dict[key] = own[key]
    pos_embed = state_dict.get("pos_embed")
    if pos_embed is not None and model.pos_embed is not None and pos_embed.shape != model.pos_embed.shape:
        patches = pos_embed.shape[1] - model.num_tokens
        side = math.isqrt(patches)
        if side * side != patches:
            raise ValueError(
                f"pos_embed of the checkpoint has {patches} patch rows, which are not a square grid: resize it with "
                "vim.pos_embed.resize_pos_embed, which takes the grid"
            )
        state_dict["pos_embed"] = resize_pos_embed(
            pos_embed, model.patch_embed.grid_size, (side, side), model.cls_token_position
        )
    return state_dict


def _create(variant: str, pretrained: bool, defaults: Mapping[str, Any], overrides: Mapping[str, Any]) -> VisionMamba:
    def build(in_chans: int = 3, channels: int | None = None, **options: Any) -> VisionMamba:
        return VisionMamba(channels=in_chans if channels is None else channels, **options)  # timm says in_chans

    return build_model_with_cfg(
        build,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{"final_pool_type": "mean", **defaults, **overrides},
    )


@register_model
def vim_tiny(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti, 7.15 M parameters."""
    return _create("vim_tiny", pretrained, {"embed_dim": 192}, kwargs)


@register_model
def vim_small(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S, 25.80 M parameters."""
    return _create("vim_small", pretrained, {"embed_dim": 384}, kwargs)


@register_model
def vim_base(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-B, 97.60 M parameters."""
    return _create("vim_base", pretrained, {"embed_dim": 768}, kwargs)


# The published names.


@register_model
def vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2(
    pretrained: bool = False, **kwargs: Any
) -> VisionMamba:
    return vim_tiny(pretrained, **kwargs)


@register_model
def vim_tiny_patch16_stride8_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2(
    pretrained: bool = False, **kwargs: Any
) -> VisionMamba:
    return vim_tiny(pretrained, **{"stride": 8, **kwargs})


@register_model
def vim_small_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2(
    pretrained: bool = False, **kwargs: Any
) -> VisionMamba:
    return vim_small(pretrained, **kwargs)


@register_model
def vim_small_patch16_stride8_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2(
    pretrained: bool = False, **kwargs: Any
) -> VisionMamba:
    return vim_small(pretrained, **{"stride": 8, **kwargs})


@register_model
def vim_base_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_middle_cls_token_div2(
    pretrained: bool = False, **kwargs: Any
) -> VisionMamba:
    return vim_base(pretrained, **kwargs)
