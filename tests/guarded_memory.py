"""Run as a program: call the CPU kernels on tensors between pages that must not be touched. What strays, crashes."""

import ctypes
import mmap
from math import prod

import torch

import causal_conv1d.ops  # noqa: F401  defines torch.ops.causal_conv1d
import mamba_ssm.ops.selective_scan  # noqa: F401  defines torch.ops.mamba_ssm

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(*shape: int, at_end: bool) -> torch.Tensor:
    """Random float32 numbers that end, or begin, where an inaccessible page begins, or ends."""
    page, size = mmap.PAGESIZE, 4 * prod(shape)
    room = -(-size // page) * page
    start = _libc.mmap(None, room + 2 * page, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    for outside in (start, start + page + room):
        assert _libc.mprotect(outside, page, 0) == 0
    address = start + page + (room - size if at_end else 0)
    numbers = torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=torch.float32)
    return numbers.copy_(torch.randn(prod(shape))).view(shape)


def call_kernels(channels: int, length: int, states: int, reverse: bool, at_end: bool) -> None:
    def activation() -> torch.Tensor:
        return guarded(1, length, channels, at_end=at_end).transpose(1, 2)

    x, dout, addend, weight = activation(), activation(), activation(), guarded(channels, 4, at_end=at_end)
    bias = guarded(channels, at_end=at_end)
    torch.ops.causal_conv1d.conv_fwd(x, weight, bias, None, None, True, reverse)
    torch.ops.causal_conv1d.conv_bwd(dout, x, weight, bias, None, None, True, reverse, addend)

    A = guarded(channels, states, at_end=at_end).abs_().neg_()
    dt, B, C = (guarded(1, length, n, at_end=at_end).transpose(1, 2) for n in (3, states, states))
    dt_weight = guarded(channels, 3, at_end=at_end)
    tensors = (x, dt, A, B, C, bias, dout, bias, dt_weight)
    options = (0.5, True, reverse, "poly")
    scan = torch.ops.mamba_ssm.selective_scan_fwd
    _, _, checkpoints = scan(*tensors, None, addend, *options, False, 32)
    torch.ops.mamba_ssm.selective_scan_bwd(dout, None, *tensors, addend, checkpoints, *options, True, 32)
    scan(x, dout, *tensors[2:8], None, None, addend, *options, False, 0)


if __name__ == "__main__":
    torch.manual_seed(0)
    for at_end in (False, True):
        for reverse in (False, True):
            for length in (*range(1, 19), 31, 32, 33, 63, 64, 65, 254, 255, 256, 257, 258):
                call_kernels(32, length, 16, reverse, at_end)
            for channels, states in ((1, 1), (17, 5), (40, 17)):
                call_kernels(channels, 38, states, reverse, at_end)
    print("nothing outside was touched")
