"""A program of torch.export that holds this project's operators, as a model of standard ONNX: `to_onnx`.

Every operator becomes a function of the ONNX model, in the domain "mamba_ssm", once for each combination of shapes and
options, so that the 24 mixers of a model are 24 calls of one function. What a function computes is said by the
references in PyTorch, down to one recurrence, which is all of a selective scan that is not elementwise:

    h_t = a_t h_{t-1} + b_t        y_t = C_t · h_t        with a = Ā(Δ, A), b = c(Δ, A) B u of any discretization

Ā and c come from `discretize`, the same function as everywhere: its series near 0 need no expm1, which ONNX lacks. The
recurrence becomes ONNX's `Scan`, which runs in either direction of time (`mamba_ssm.ops.onnx_scan`).

Needs onnx, onnx_ir and onnxscript.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.onnx import ONNXProgram

from causal_conv1d import causal_conv1d_ref
from mamba_ssm.ops.discretization_ref import discretize
from mamba_ssm.ops.mamba_inner import (
    Projection,
    _directions,
    _linear,
    at_least_float32,
    direction_arguments,
    split_channels,
)
from mamba_ssm.ops.onnx_scan import OPSET, TRANSLATIONS, linear_recurrence
from mamba_ssm.ops.selective_scan_ref import ScanArgs
from mamba_ssm.ops.triton.layer_norm import _add_norm_ref

DOMAIN = "mamba_ssm"


def to_onnx(program: ExportedProgram, **options: Any) -> ONNXProgram:
    """The ONNX model of a program; options are those of `torch.onnx.export`, such as input_names.

    program: for inference, traced under torch.no_grad() with the compiled operators (traced on the PyTorch reference,
    its loops over time are unrolled, for the traced length only). Dynamic dimensions stay dynamic.
    Raises NotImplementedError for what the models of this project do not use: a scan with an initial state, with
    constant B or C or with several groups of them, a convolution of packed sequences, a program traced for training.
    """
    functions = _Functions()
    decomposed = program.run_decompositions({operator: partial(functions.call, operator) for operator in _OPERATORS})
    result = torch.onnx.export(decomposed, dynamo=True, opset_version=OPSET, verbose=False, **options)
    for call in functions.calls.values():
        function = call.function()
        result.model.functions[function.identifier()] = function
    result.model.opset_imports[DOMAIN] = 1
    return result


# ---- what the operators compute ------------------------------------------------------------------------------------


def _scan(args: ScanArgs, delta_softplus: bool, reverse: bool, method: str) -> Tensor:
    """The scan without gate, (B, D, L) in float32; B and C are (B, N, L)."""
    u, delta, A, B, C, D, delta_bias = (None if t is None else at_least_float32(t) for t in args)
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    A_bar, c = discretize(method, delta.permute(2, 0, 1), A)  # (L, B, D, N): Scan walks along the first axis
    b = c * B.permute(2, 0, 1)[:, :, None] * u.permute(2, 0, 1)[..., None]
    y = linear_recurrence(A_bar, b, C.permute(2, 0, 1)[..., None], reverse).squeeze(-1).permute(1, 2, 0)
    return y if D is None else y + D[:, None] * u


def _gate(y: Tensor, z: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    y = y if scale == 1.0 else scale * y
    return (y if z is None else y * F.silu(at_least_float32(z))).to(dtype)


def _refuse(what: str) -> None:
    raise NotImplementedError(f"ONNX export: {what}")


def _mixer(
    hidden_states: Tensor, in_weight: Tensor | None, in_bias: Tensor | None, out_weight: Tensor | None,
    out_bias: Tensor | None, *rest: Any,
) -> list[Tensor]:  # fmt: skip
    *parameters, scale, delta_softplus, method, steps = rest
    if steps:
        _refuse("the program was traced for training; trace it under torch.no_grad()")
    x, z = split_channels(_linear(hidden_states, _projection(in_weight, in_bias)).transpose(1, 2))
    y = None
    for direction, reverse in zip(_directions(parameters), (False, True), strict=True):
        if direction.conv_weight is None:
            continue
        args = direction_arguments(x, direction, conv_fn=partial(causal_conv1d_ref, reverse=reverse))
        y_direction = _scan(args, delta_softplus, reverse, method)
        y = y_direction if y is None else y + y_direction
    return [_linear(_gate(y, z, scale, x.dtype).transpose(1, 2), _projection(out_weight, out_bias))]


def _projection(weight: Tensor | None, bias: Tensor | None) -> Projection | None:
    return None if weight is None else Projection(weight, bias)


def _selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_weight: Tensor | None, initial_state: Tensor | None, addend: Tensor | None,
    scale: float, delta_softplus: bool, reverse: bool, method: str, float_out: bool, steps: int,
) -> list[Tensor]:  # fmt: skip
    if steps:
        _refuse("the program was traced for training; trace it under torch.no_grad()")
    if B.dim() != 3 or C.dim() != 3:
        _refuse("a scan's B and C must be (batch, N, length), one group that varies in time")
    if delta_weight is not None or initial_state is not None:
        _refuse("a scan with delta_weight or initial_state is not supported")
    y = _scan(ScanArgs(u, delta, A, B, C, D, delta_bias), delta_softplus, reverse, method)
    if addend is not None:
        y = y + addend
    return [_gate(y, z, scale, torch.float32 if float_out else u.dtype)]


def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, initial_states: Tensor | None,
    silu: bool, reverse: bool,
) -> list[Tensor]:  # fmt: skip
    if seq_idx is not None or initial_states is not None:
        _refuse("a convolution of packed sequences or with initial states is not supported")
    return [causal_conv1d_ref(x, weight, bias, activation="silu" if silu else None, reverse=reverse)]


def _add_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, scale: Tensor | None, eps: float,
    residual_in_fp32: bool, is_rms_norm: bool, keep_sum: bool,
) -> list[Tensor]:  # fmt: skip
    return list(_add_norm_ref(x, weight, bias, residual, eps, residual_in_fp32, is_rms_norm, scale))


def _mixer_outputs(
    x: Tensor, in_weight: Tensor | None, in_bias: Tensor | None, out_weight: Tensor | None, *rest: Any
) -> list[tuple[Sequence[int], torch.dtype]]:
    channels = (x.shape[2] if in_weight is None else in_weight.shape[0]) // 2
    return [((*x.shape[:2], channels if out_weight is None else out_weight.shape[0]), x.dtype)]


# What each computes of the outputs that inference reads, which come first.
_OPERATORS: dict[Any, Callable[..., list[Tensor]]] = {
    torch.ops.mamba_ssm.mixer_fwd.default: _mixer,
    torch.ops.mamba_ssm.selective_scan_fwd.default: _selective_scan,
    torch.ops.mamba_ssm.add_norm_fwd.default: _add_norm,
    torch.ops.causal_conv1d.conv_fwd.default: _conv,
}
# The shapes and dtypes of these outputs.
_OUTPUTS: dict[Any, Callable[..., list[tuple[Sequence[int], torch.dtype]]]] = {
    torch.ops.mamba_ssm.mixer_fwd.default: _mixer_outputs,
    torch.ops.mamba_ssm.selective_scan_fwd.default: lambda u, *rest: [
        (u.shape, torch.float32 if rest[-2] else u.dtype)
    ],
    torch.ops.mamba_ssm.add_norm_fwd.default: lambda x, *_: [(x.shape, x.dtype), (x.shape, torch.float32)],
    torch.ops.causal_conv1d.conv_fwd.default: lambda x, *_: [(x.shape, x.dtype)],
}


# ---- functions of the ONNX model ------------------------------------------------------------------------------------


class _Shape(NamedTuple):
    """Of a tensor that an operator is called with; a dynamic dimension is its expression, such as "s0*s1 + 1"."""

    dims: tuple[int | str, ...]
    dtype: torch.dtype


class _Call(NamedTuple):
    """One distinct call. arguments: in the operator's order, _Shape for a tensor, else the value."""

    name: str
    operator: Any
    arguments: tuple[Any, ...]

    def function(self) -> ir.Function:
        tensors = [a for a in self.arguments if isinstance(a, _Shape)]
        expressions = list(dict.fromkeys(d for t in tensors for d in t.dims if isinstance(d, str)))
        dims = {expression: Dim(f"dim{i}", min=1) for i, expression in enumerate(expressions)}
        sizes = {expression: 5 + 2 * i for i, expression in enumerate(expressions)}  # any, but all different
        examples = tuple(torch.ones([sizes.get(d, d) for d in t.dims], dtype=t.dtype) for t in tensors)
        dynamic = tuple({i: dims[d] for i, d in enumerate(t.dims) if d in dims} for t in tensors)
        with torch.no_grad():
            program = torch.export.export(_Body(self), examples, dynamic_shapes={"tensors": dynamic}, strict=False)
        model = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, verbose=False, custom_translation_table=TRANSLATIONS
        ).model
        _initializers_to_constants(model.graph)
        function = ir.Function(DOMAIN, self.name, graph=model.graph, attributes=[])
        function.opset_imports.update(model.opset_imports)
        return function


class _Body(nn.Module):
    def __init__(self, call: _Call):
        super().__init__()
        self.call = call

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        given = iter(tensors)
        arguments = [next(given) if isinstance(a, _Shape) else a for a in self.call.arguments]
        return _OPERATORS[self.call.operator](*arguments)


class _Functions:
    """The distinct calls that a program makes."""

    def __init__(self) -> None:
        self.calls: dict[tuple[Any, ...], _Call] = {}

    def call(self, operator: Any, *arguments: Any) -> tuple[Tensor, ...]:
        """In place of the operator, while it is decomposed: a node of ONNX that calls a function."""
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        shapes = tuple(_Shape(_dims(a), a.dtype) if isinstance(a, Tensor) else a for a in arguments)
        key = (operator, *shapes)
        if key not in self.calls:
            name = operator.name().split("::")[1].removesuffix("_fwd")
            count = sum(call.operator is operator for call in self.calls.values())
            self.calls[key] = _Call(f"{name}_{count}" if count else name, operator, shapes)
        outputs = _OUTPUTS[operator](*arguments)
        results = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{self.calls[key].name}",
            tensors,
            dtypes=[dtype for _, dtype in outputs],
            shapes=[shape for shape, _ in outputs],
            version=1,
        )
        unread = [tensors[0].new_empty(0)] * (len(operator._schema.returns) - len(outputs))
        return results[0] if len(operator._schema.returns) == 1 else (*results, *unread)


def _dims(tensor: Tensor) -> tuple[int | str, ...]:
    return tuple(d if isinstance(d, int) else str(d) for d in tensor.shape)


def _initializers_to_constants(graph: ir.Graph) -> None:
    """A function has nodes alone."""
    for value in list(graph.initializers.values()):
        constant = ir.node("Constant", [], attributes={"value": value.const_value})
        graph.insert_before(graph[0], constant)
        ir.convenience.replace_all_uses_with(value, constant.outputs[0])
    graph.initializers.clear()
