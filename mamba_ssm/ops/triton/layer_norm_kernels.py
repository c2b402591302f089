"""The GPU implementation of ``mamba_ssm::add_norm_fwd`` and ``add_norm_bwd``, in Triton.

    h = scale x + residual        y = (h - mean) rstd weight + bias        (RMSNorm: mean = 0)

Schemas and gradient: mamba_ssm/ops/triton/layer_norm.py. x, residual, y, h and their gradients are (rows, dim) with
adjacent elements; inputs may have any row stride. A program works on tiles of whole rows; statistics and sums are
float32. The gradients of weight and bias are summed within each program in a fixed order, then over the programs.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_DIM = 32768  # a row has to fit into the registers of one program
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TILE_ELEMENTS = 2048
_ELEMENTS_PER_THREAD = 16
_PROGRAMS_PER_SM = 2  # of the backward kernel, each with its own partial sums
_STAGES = 3  # of the backward kernel: tiles in flight, in shared memory, where they are no larger than _TILE_ELEMENTS


@triton.jit
def _load_tile(base, stride, row, column, mask):
    return tl.load(base + row.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_tile(base, stride, row, column, mask, value):
    pointer = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(pointer, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _load_row(base, column, dim):
    return tl.load(base + column, mask=column < dim, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _load_column(base, index, in_range):
    return tl.load(base + index, mask=in_range, other=0.0).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["rows", "rows_per_scale"])
def forward_kernel(
    x,
    x_stride,
    residual,
    residual_stride,
    weight,
    bias,
    scale,
    rows_per_scale,
    y,
    h,
    mean,
    rstd,
    rows,
    dim,
    eps,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.arange(0, TILE_COLUMNS)
    mask = (row < rows)[:, None] & (column < dim)[None, :]
    v = _load_tile(x, x_stride, row, column, mask)
    if scale is not None:
        v *= _load_column(scale, row // rows_per_scale, row < rows)
    if residual is not None:
        v += _load_tile(residual, residual_stride, row, column, mask)
    if h is not None:
        _store_tile(h, dim, row, column, mask, v)
    if mean is not None:
        row_mean = tl.sum(v, axis=1) / dim
        tl.store(mean + row, row_mean, mask=row < rows)
        v = tl.where(mask, v - row_mean[:, None], 0.0)
    row_rstd = 1.0 / tl.sqrt_rn(tl.sum(v * v, axis=1) / dim + eps)
    tl.store(rstd + row, row_rstd, mask=row < rows)
    v = v * row_rstd[:, None] * _load_row(weight, column, dim)
    if bias is not None:
        v += _load_row(bias, column, dim)
    _store_tile(y, dim, row, column, mask, v)


# With n = (h - mean) rstd and w = weight dy:   dh += rstd (w - mean(w n) n - mean(w)),  without mean(w) for RMSNorm.
@triton.jit(do_not_specialize=["rows", "rows_per_scale"])
def backward_kernel(
    dy,
    dy_stride,
    dh,
    dh_stride,
    h,
    h_stride,
    weight,
    scale,
    rows_per_scale,
    mean,
    rstd,
    dx,
    dresidual,
    dweight,
    dbias,
    rows,
    dim,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = tl.arange(0, TILE_COLUMNS)
    weights = _load_row(weight, column, dim)
    dweights = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    dbiases = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, TILE_ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
        mask = (row < rows)[:, None] & (column < dim)[None, :]
        dys = _load_tile(dy, dy_stride, row, column, mask)
        n = _load_tile(h, h_stride, row, column, mask)
        if mean is not None:
            n = tl.where(mask, n - _load_column(mean, row, row < rows), 0.0)
        row_rstd = _load_column(rstd, row, row < rows)
        n *= row_rstd
        dweights += dys * n
        if dbias is not None:
            dbiases += dys
        w = weights * dys
        v = w - n * (tl.sum(w * n, axis=1)[:, None] / dim)
        if mean is not None:
            v -= tl.sum(w, axis=1)[:, None] / dim
        v *= row_rstd
        if dh is not None:
            v += _load_tile(dh, dh_stride, row, column, mask)
        if dresidual is not None:
            _store_tile(dresidual, dim, row, column, mask, v)
        if scale is not None:
            v *= _load_column(scale, row // rows_per_scale, row < rows)
        _store_tile(dx, dim, row, column, mask, v)
    partial = tl.program_id(0) * dim + column
    tl.store(dweight + partial, tl.sum(dweights, axis=0), mask=column < dim)
    if dbias is not None:
        tl.store(dbias + partial, tl.sum(dbiases, axis=0), mask=column < dim)


# ---- launch --------------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """Compile-time shape of a program."""

    tile_rows: int
    tile_columns: int
    num_warps: int
    stages: int  # of the backward kernel of RMSNorm; LayerNorm's has no registers to spare for more than one


@cache
def launch_for(dim: int) -> Launch:
    columns = triton.next_power_of_2(dim)
    rows = max(1, min(32, _TILE_ELEMENTS // columns))
    warps = rows * columns // (32 * _ELEMENTS_PER_THREAD)
    return Launch(rows, columns, max(1, min(32, warps)), _STAGES if columns <= _TILE_ELEMENTS else 1)


@cache
def _backward_programs(device: torch.device) -> int:
    """As many as are resident at once; two on the CPU, where only Triton's interpreter runs."""
    if device.type != "cuda":
        return 2
    return _PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


def _on(device: torch.device) -> AbstractContextManager:
    """Makes the device current, to which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _input(name: str, tensor: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    """The tensor with adjacent elements, if it is what the kernels can read."""
    if tensor is None:
        return None
    if tensor.shape != shape or tensor.dtype not in _DTYPES or tensor.device != device:
        raise ValueError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}, but must be float32, float16 "
            f"or bfloat16 of shape {tuple(shape)} on {device}"
        )
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _check_dim(dim: int) -> None:
    if not 1 <= dim <= MAX_DIM:
        raise ValueError(
            f"the last dimension has {dim} elements, but the Triton kernel takes 1 to {MAX_DIM}: use the PyTorch "
            "reference, with VIM_USE_CUDA_KERNEL=0 or use_cuda_kernel=False"
        )


def _scale_input(scale: Tensor | None, x: Tensor) -> tuple[Tensor | None, int]:
    """`scale` and the number of rows that share one of its elements."""
    if scale is None:
        return None, 1
    rows, count = x.shape[0], scale.numel()
    if rows > 0 and (count == 0 or rows % count):
        raise ValueError(f"scale has {count} elements, which does not divide the {rows} rows of x")
    return _input("scale", scale, (count,), x.device), rows // max(1, count)


def _row_stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def add_norm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    eps: float,
    residual_in_fp32: bool,
    is_rms_norm: bool,
    keep_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, dim = x.shape
    _check_dim(dim)
    x = _input("x", x, x.shape, x.device)
    residual = _input("residual", residual, x.shape, x.device)
    weight, bias = _input("weight", weight, (dim,), x.device), _input("bias", bias, (dim,), x.device)
    scale, rows_per_scale = _scale_input(scale, x)
    stream = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype
    y = x.new_empty(rows, dim)
    h = x.new_empty(rows if keep_sum else 0, dim, dtype=stream)
    mean = x.new_empty(0 if is_rms_norm else rows, dtype=torch.float32)
    rstd = x.new_empty(rows, dtype=torch.float32)
    launch = launch_for(dim)
    with _on(x.device):
        forward_kernel[(triton.cdiv(rows, launch.tile_rows),)](
            x,
            x.stride(0),
            residual,
            _row_stride(residual),
            weight,
            bias,
            scale,
            rows_per_scale,
            y,
            h if keep_sum else None,
            None if is_rms_norm else mean,
            rstd,
            rows,
            dim,
            eps,
            launch.tile_rows,
            launch.tile_columns,
            num_warps=launch.num_warps,
        )
    return y, h, mean, rstd


def add_norm_bwd(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    is_rms_norm: bool,
    has_bias: bool,
    separate_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, dim = dy.shape
    _check_dim(dim)
    dy = _input("dy", dy, dy.shape, dy.device)
    dh, h = _input("dh", dh, dy.shape, dy.device), _input("h", h, dy.shape, dy.device)
    weight, rstd = _input("weight", weight, (dim,), dy.device), _input("rstd", rstd, (rows,), dy.device)
    mean = None if is_rms_norm else _input("mean", mean, (rows,), dy.device)
    scale, rows_per_scale = _scale_input(scale, dy)
    launch = launch_for(dim)
    tiles = triton.cdiv(rows, launch.tile_rows)
    programs = min(tiles, _backward_programs(dy.device))
    dx = dy.new_empty(rows, dim)
    dresidual = h.new_empty(rows if separate_dresidual else 0, dim)
    dweight = dy.new_empty(programs, dim, dtype=torch.float32)
    dbias = dy.new_empty(programs, dim if has_bias else 0, dtype=torch.float32)
    with _on(dy.device):
        backward_kernel[(programs,)](
            dy,
            dy.stride(0),
            dh,
            _row_stride(dh),
            h,
            h.stride(0),
            weight,
            scale,
            rows_per_scale,
            mean,
            rstd,
            dx,
            dresidual if separate_dresidual else None,
            dweight,
            dbias if has_bias else None,
            rows,
            dim,
            launch.tile_rows,
            launch.tile_columns,
            launch.stages if is_rms_norm else 1,
            num_warps=launch.num_warps,
        )
    return dx, dresidual, dweight.sum(0), dbias.sum(0)
