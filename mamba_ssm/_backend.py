"""Loads the compiled operator libraries and decides, call by call, whether a kernel or the PyTorch reference runs."""

import os
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ENVIRONMENT_VARIABLE = "VIM_USE_CUDA_KERNEL"

LIBRARIES = {"cpu": "_C_cpu.so", "cuda": "_C_cuda.so"}
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Schemas live in Python, so that the operators, their fakes and their autograd exist without a library too.
torch.library.define("mamba_ssm::cpu_isa", "() -> str")
torch.library.define("mamba_ssm::discretization_names", "() -> str")


def _load(name: str) -> str | None:
    """None once the library is loaded, else why it is not."""
    path = Path(__file__).with_name(name)
    if not path.exists():
        return f"{name} was not built when the package was installed (setup.py said why)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{name} could not be loaded: {error}"
    return None


# Why there is no kernel for a device type; None where there is one.
unavailable: dict[str, str | None] = {"cpu": _load(LIBRARIES["cpu"])}
if torch.cuda.is_available():
    unavailable["cuda"] = _load(LIBRARIES["cuda"])
else:
    unavailable["cuda"] = "torch sees no CUDA device"


@cache
def _warn_once(device_type: str, reason: str) -> None:
    warnings.warn(
        f"mamba_ssm: no kernel for {device_type} tensors, the slow PyTorch reference runs instead: {reason}. "
        f"`python -m mamba_ssm.doctor` shows the details; {ENVIRONMENT_VARIABLE}=0 asks for the reference and "
        "silences this warning.",
        RuntimeWarning,
        stacklevel=3,
    )


@torch.compiler.assume_constant_result
def _choose(device_type: str, dtype: torch.dtype, use_cuda_kernel: bool | None) -> bool:
    value = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}: got {value!r}; expected 1 (CUDA kernel or an error), 0 (PyTorch reference) "
            "or unset (automatic)"
        )
    wish = bool(int(value)) if value else use_cuda_kernel
    if wish is False or (wish is None and dtype not in KERNEL_DTYPES):
        return False  # float64 asks for precision: the reference is its path, not a fallback
    reason = unavailable.get(device_type, f"there are none for device type {device_type!r}")
    if reason is None and dtype not in KERNEL_DTYPES:
        reason = f"kernels compute in float32 and take float32, float16 and bfloat16, not {dtype}"
    if wish is True:
        if device_type != "cuda":
            reason = f"the tensors are on {device_type!r}; move them to a CUDA device"
        if reason is not None:
            source = f"{ENVIRONMENT_VARIABLE}=1" if value else "use_cuda_kernel=True"
            raise RuntimeError(
                f"{source} asks for the CUDA kernel, but {reason}. Unset it to choose automatically (a C++ kernel runs "
                "on CPU tensors), or set it to 0/False for the PyTorch reference."
            )
        return True
    if reason is not None:
        _warn_once(device_type, reason)
        return False
    return True


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether it is torch.OutOfMemoryError or what the compiled operators raise instead: torch's C interface, by which
    they make tensors, keeps no types."""
    return isinstance(error, torch.OutOfMemoryError) or "CUDA out of memory" in str(error)


def use_kernel(tensor: Tensor, use_cuda_kernel: bool | None = None) -> bool:
    """Whether the compiled operators run for `tensor`'s device and dtype; else the PyTorch reference does.

    The environment variable VIM_USE_CUDA_KERNEL, read at every call, wins over `use_cuda_kernel`: 1 or True = the CUDA
    kernel or a RuntimeError that says what is missing; 0 or False = the reference everywhere; unset and None = the CUDA
    kernel on CUDA tensors, the C++ kernel on CPU tensors, and where a library is missing the reference with one warning
    per process. float64 tensors run on the reference. torch.compile takes the answer as a constant.
    """
    return _choose(tensor.device.type, tensor.dtype, use_cuda_kernel)
