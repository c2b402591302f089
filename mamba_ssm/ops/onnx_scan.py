"""The operator `mamba_ssm::linear_recurrence`, and the same by ONNX's standard operator `Scan`; see `onnx_export`."""

# Not from __future__ import annotations: onnxscript reads the annotations themselves.
from collections.abc import Callable

import torch
from onnxscript import FLOAT, graph, script
from onnxscript import opset18 as op
from torch import Tensor

OPSET = 18


@torch.library.custom_op("mamba_ssm::linear_recurrence", mutates_args=())
def linear_recurrence(a: Tensor, b: Tensor, C: Tensor, reverse: bool) -> Tensor:
    """h = a[t] h + b[t] from h = 0, over t upwards or, with reverse, downwards; y[t] = h C[t].

    a, b: (L, B, D, N); C: (L, B, N, 1). Returns y, (L, B, D, 1), in their dtype.
    """
    h, y = torch.zeros_like(a[0]), a.new_empty(*a.shape[:3], 1)
    for t in reversed(range(len(a))) if reverse else range(len(a)):
        h = a[t] * h + b[t]
        y[t] = h @ C[t]
    return y


@linear_recurrence.register_fake
def _(a: Tensor, b: Tensor, C: Tensor, reverse: bool) -> Tensor:
    return a.new_empty(*a.shape[:3], 1)


@script(default_opset=op)
def scan_along(a: FLOAT, b: FLOAT, C: FLOAT) -> FLOAT:
    @graph()
    def step(h, a_t, b_t, C_t):
        state = op.Add(op.Mul(a_t, h), b_t)
        y = op.MatMul(state, C_t)
        return state, y

    zero = op.Sub(op.Gather(b, 0), op.Gather(b, 0))
    _, y = op.Scan(zero, a, b, C, body=step, num_scan_inputs=3)
    return y


@script(default_opset=op)
def scan_against(a: FLOAT, b: FLOAT, C: FLOAT) -> FLOAT:
    @graph()
    def step(h, a_t, b_t, C_t):
        state = op.Add(op.Mul(a_t, h), b_t)
        y = op.MatMul(state, C_t)
        return state, y

    zero = op.Sub(op.Gather(b, 0), op.Gather(b, 0))
    _, y = op.Scan(
        zero, a, b, C, body=step, num_scan_inputs=3, scan_input_directions=[1, 1, 1], scan_output_directions=[1]
    )
    return y


def scan(a, b, C, reverse: bool):
    return scan_against(a, b, C) if reverse else scan_along(a, b, C)


TRANSLATIONS: dict[Callable, Callable] = {torch.ops.mamba_ssm.linear_recurrence.default: scan}
