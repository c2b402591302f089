"""The Mamba mixer (Gu and Dao, 2023) and its bidirectional forms v1 and v2 (Vim: Zhu et al., 2024).

Signature and parameter names are the published ones, so published checkpoints load. (B, L, d_model) in and out, and
channel-last in between: `in_proj` gives (B, L, 2·d_inner), of which convolution and scan read transposed views.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from mamba_ssm.ops.discretization_ref import get_method
from mamba_ssm.ops.mamba_inner import (
    Direction,
    Projection,
    at_least_float32,
    gated_scan,
    mixer_fn,
    scan_arguments,
    split_channels,
)
from mamba_ssm.ops.selective_scan_interface import ScanArgs, bidirectional_scan_fn
from mamba_ssm.ops.selective_scan_ref import MAX_STATES
from mamba_ssm.ops.selective_state_update import selective_state_update

BIMAMBA_TYPES = ("none", "v1", "v2")


class Mamba(nn.Module):
    """Selective state space mixer: in_proj -> causal conv -> scan, gated -> out_proj.

    Arguments beyond the public 1.x class:
        bimamba_type: "none" scans forward; "v1" adds a backward scan that differs only in its state matrix (A_b_log);
            "v2" adds a backward direction with its own conv, x_proj, dt_proj, A and D.
        if_divide_out: with "v2", half the sum of both directions; "v1" adds them undivided, as published.
        init_layer_scale: initial value of a learned per-channel scale of the output, `gamma`; None for no scale.
        discretization_method: a row of `mamba_ssm.ops.discretization_ref.METHODS`.
        use_cuda_kernel: True, False or None (automatic); see `mamba_ssm._backend.use_kernel`.
    `dt_rank="auto"` is ceil(d_model / 16). `use_fast_path` is accepted for compatibility: there is one path.

    Raises ValueError for an unknown `dt_init`, `bimamba_type` or `discretization_method`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        bimamba_type: str = "none",
        if_divide_out: bool = False,
        init_layer_scale: float | None = None,
        discretization_method: str = "zoh",
        use_cuda_kernel: bool | None = None,
    ):
        super().__init__()
        if bimamba_type not in BIMAMBA_TYPES:
            raise ValueError(f"bimamba_type must be one of {', '.join(BIMAMBA_TYPES)}; got {bimamba_type!r}")
        get_method(discretization_method)  # unknown: ValueError that lists the known
        factory = {"device": device, "dtype": dtype}
        for name, value, low, high in (("d_state", d_state, 1, MAX_STATES), ("d_conv", d_conv, 2, 4)):
            if not low <= value <= high:
                raise ValueError(f"{name} must be from {low} to {high}; got {value}")
        if dt_rank != "auto" and dt_rank < 1:
            raise ValueError(f"dt_rank must be 'auto' or at least 1; got {dt_rank}")
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.expand = expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.use_fast_path = use_fast_path
        self.layer_idx = layer_idx
        self.bimamba_type = bimamba_type
        self.if_divide_out = if_divide_out
        self.init_layer_scale = init_layer_scale
        self.discretization_method = discretization_method
        self.use_cuda_kernel = use_cuda_kernel

        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        make_direction = partial(
            self._make_direction, conv_bias, dt_min, dt_max, dt_init, dt_scale, dt_init_floor, **factory
        )
        self.conv1d, self.x_proj, self.dt_proj, self.D = make_direction()
        if bimamba_type == "v2":
            self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.D_b = make_direction()
        self.A_log = self._init_A_log(device)
        if bimamba_type != "none":
            self.A_b_log = self._init_A_log(device)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)
        self.gamma = None
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((d_model,), float(init_layer_scale), **factory))

    def _make_direction(
        self,
        conv_bias: bool,
        dt_min: float,
        dt_max: float,
        dt_init: str,
        dt_scale: float,
        dt_init_floor: float,
        **factory: Any,
    ) -> tuple[nn.Conv1d, nn.Linear, nn.Linear, nn.Parameter]:
        """conv1d, x_proj, dt_proj and D of one direction."""
        conv1d = nn.Conv1d(
            self.d_inner,
            self.d_inner,
            self.d_conv,
            groups=self.d_inner,
            padding=self.d_conv - 1,
            bias=conv_bias,
            **factory,
        )
        x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * self.d_state, bias=False, **factory)
        dt_proj = nn.Linear(self.dt_rank, self.d_inner, **factory)
        _init_dt_proj(dt_proj, dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        return conv1d, x_proj, dt_proj, _without_weight_decay(torch.ones(self.d_inner, device=factory["device"]))

    def _init_A_log(self, device: torch.device | str | None) -> nn.Parameter:
        """S4D-real: A = -1, -2, …, -N in every channel, kept as log(-A) in fp32."""
        A = torch.arange(1, self.d_state + 1, dtype=torch.float32, device=device)
        return _without_weight_decay(A.log().repeat(self.d_inner, 1))

    def forward(self, hidden_states: Tensor, inference_params: Any = None, *, reverse: bool = False) -> Tensor:
        """(B, L, d_model) -> (B, L, d_model).

        Args:
            inference_params: the public `InferenceParams`, or any object with `key_value_memory_dict` and
                `seqlen_offset`. At offset 0 the sequence fills this layer's cache; later calls take one token each.
            reverse: read the sequence from its end; equals flip, mixer, flip.
        Raises NotImplementedError for `inference_params` with a bidirectional or reversed mixer, which is not causal.
        """
        cache = None
        if inference_params is not None:
            self._require_causal(reverse)
            cache = self._get_states_from_cache(inference_params, hidden_states.shape[0])
            if inference_params.seqlen_offset > 0:
                return self.step(hidden_states, *cache)[0]

        if cache is None and self.bimamba_type != "v1":
            along = self._direction()
            against = self._direction("_b") if self.bimamba_type == "v2" else None
            # What is more than a plain layer, or watched, is called as a module.
            in_proj, out_proj = _plain_projection(self.in_proj), _plain_projection(self.out_proj)
            out = mixer_fn(
                hidden_states if in_proj else self.in_proj(hidden_states),
                in_proj,
                out_proj,
                *((against, along) if reverse else (along, against)),
                scale=0.5 if self.if_divide_out and against is not None else 1.0,
                discretization_method=self.discretization_method,
                use_cuda_kernel=self.use_cuda_kernel,
            )
            return self._scale(out if out_proj else self.out_proj(out))
        x, z = split_channels(self.in_proj(hidden_states).transpose(1, 2))
        y = self._scan_both_ways(x, z, reverse) if cache is None else self._prefill(x, z, cache)
        return self._scale(self.out_proj(y.transpose(1, 2)))

    def _direction(self, suffix: str = "") -> Direction:
        """The parameters of the direction that reads as written, or with "_b" of the one against it."""
        conv1d, x_proj, dt_proj = (self._modules[name + suffix] for name in ("conv1d", "x_proj", "dt_proj"))
        return Direction(
            _parameter(conv1d, "weight"),
            _parameter(conv1d, "bias"),
            _parameter(x_proj, "weight"),
            _parameter(dt_proj, "weight"),
            _parameter(dt_proj, "bias"),
            _parameter(self, "A_b_log" if suffix else "A_log"),
            _parameter(self, "D" + suffix),
        )

    def _prefill(self, x: Tensor, z: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        """The scan of a whole sequence; leaves the last inputs and the last state in `cache` for `step`."""
        y, last_state = gated_scan(
            self._scan_arguments(x),
            z,
            return_last_state=True,
            discretization_method=self.discretization_method,
            use_cuda_kernel=self.use_cuda_kernel,
        )
        conv_state, ssm_state = cache  # the last d_conv inputs, zeros before the first
        conv_state.copy_(F.pad(x.detach(), (self.d_conv - x.shape[-1], 0)))
        ssm_state.copy_(last_state.detach())
        return y

    def _scan_both_ways(self, x: Tensor, z: Tensor, reverse: bool) -> Tensor:
        """v1: two scans of the same inputs that differ in A."""
        along = self._scan_arguments(x, reverse)
        against = along._replace(A=-torch.exp(at_least_float32(self.A_b_log)))
        return bidirectional_scan_fn(
            *((against, along) if reverse else (along, against)),
            z,
            discretization_method=self.discretization_method,
            use_cuda_kernel=self.use_cuda_kernel,
        )

    def _scan_arguments(self, x: Tensor, reverse: bool = False) -> ScanArgs:
        return scan_arguments(
            x,
            self.conv1d.weight,
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            -torch.exp(at_least_float32(self.A_log)),
            D=at_least_float32(self.D),
            delta_bias=at_least_float32(self.dt_proj.bias),
            conv_fn=partial(causal_conv1d_fn, reverse=reverse, use_cuda_kernel=self.use_cuda_kernel),
        )

    def _scale(self, out: Tensor) -> Tensor:
        return out if self.gamma is None else out * self.gamma

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token: hidden_states (B, 1, d_model) -> (out (B, 1, d_model), conv_state, ssm_state).

        The states, conv (B, d_inner, d_conv) and ssm (B, d_inner, d_state), are updated in place.
        Raises ValueError for more than one token, NotImplementedError for a bidirectional mixer.
        """
        self._require_causal()
        if hidden_states.shape[1] != 1:
            raise ValueError(f"step takes one token, hidden_states (B, 1, d_model); got {tuple(hidden_states.shape)}")
        x, z = self.in_proj(hidden_states.squeeze(1)).chunk(2, dim=-1)
        x = causal_conv1d_update(
            x,
            conv_state,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu",
            use_cuda_kernel=self.use_cuda_kernel,
        )
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y = selective_state_update(
            ssm_state,
            x,
            F.linear(dt, self.dt_proj.weight),  # the bias is added inside, before softplus
            -torch.exp(at_least_float32(self.A_log)),
            B,
            C,
            D=at_least_float32(self.D),
            z=z,
            dt_bias=at_least_float32(self.dt_proj.bias),
            dt_softplus=True,
            discretization_method=self.discretization_method,
        )
        return self._scale(self.out_proj(y)).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Zeros: conv_state (B, d_inner, d_conv) in `dtype`, ssm_state (B, d_inner, d_state) in fp32 or fp64.

        `max_seqlen` is there for the public signature: the cache does not grow with the sequence.
        """
        weight = self.conv1d.weight
        conv_state = weight.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype or weight.dtype)
        ssm_dtype = torch.promote_types(conv_state.dtype, torch.float32)
        return conv_state, weight.new_zeros(batch_size, self.d_inner, self.d_state, dtype=ssm_dtype)

    def _get_states_from_cache(self, inference_params: Any, batch_size: int) -> tuple[Tensor, Tensor]:
        """This layer's states in `inference_params.key_value_memory_dict`, allocated at the first call."""
        if self.layer_idx is None:
            raise ValueError("inference_params needs a mixer with a layer_idx: Mamba(..., layer_idx=i)")
        memory = inference_params.key_value_memory_dict
        if self.layer_idx not in memory:
            memory[self.layer_idx] = self.allocate_inference_cache(batch_size, max_seqlen=0)
        states = memory[self.layer_idx]
        if states[0].shape[0] != batch_size:
            raise ValueError(
                f"the cache of layer {self.layer_idx} is for batch size {states[0].shape[0]}, not {batch_size}: "
                "start new sequences with new inference_params"
            )
        return states

    def _require_causal(self, reverse: bool = False) -> None:
        if self.bimamba_type != "none" or reverse:
            what = "reverse=True" if reverse else f"bimamba_type={self.bimamba_type!r}"
            raise NotImplementedError(
                f"step and inference_params need a causal mixer, but {what} reads the sequence from its end; "
                "run the whole sequence through forward, or use bimamba_type='none'"
            )


def _plain_projection(layer: nn.Module) -> Projection | None:
    """The parameters of a linear layer of which nothing but those matters; None for other layers, such as an adapter's
    or a quantized one, and where there are hooks, as pruning has them."""
    if type(layer) is not nn.Linear:
        return None
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return None
    return Projection(_parameter(layer, "weight"), _parameter(layer, "bias"))


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    """The module's attribute, which as a parameter is not an attribute of Python's, and takes ten times as long to find
    as one: a mixer has eighteen."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def _without_weight_decay(value: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(value)
    parameter._no_weight_decay = True
    return parameter


@torch.no_grad()
def _init_dt_proj(
    dt_proj: nn.Linear, dt_min: float, dt_max: float, dt_init: str, dt_scale: float, dt_init_floor: float
) -> None:
    """Weights that preserve variance, and a bias with softplus(bias) log-uniform in [dt_min, dt_max]."""
    std = dt_scale * dt_proj.in_features**-0.5
    if dt_init == "constant":
        nn.init.constant_(dt_proj.weight, std)
    elif dt_init == "random":
        nn.init.uniform_(dt_proj.weight, -std, std)
    else:
        raise ValueError(f"dt_init must be 'random' or 'constant'; got {dt_init!r}")
    log_dt = torch.empty_like(dt_proj.bias, dtype=torch.float32).uniform_(math.log(dt_min), math.log(dt_max))
    dt = log_dt.exp().clamp(min=dt_init_floor)
    dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
    dt_proj.bias._no_reinit = True  # tells a model's weight initialization to leave it
