"""The import path of the public `mamba_ssm` 1.x: everything of it that concerns the selective scan."""

from mamba_ssm.ops.mamba_inner import (
    bimamba_inner_fn,
    bimamba_inner_ref,
    mamba_inner_fn,
    mamba_inner_fn_no_out_proj,
    mamba_inner_ref,
)
from mamba_ssm.ops.selective_scan import ScanArgs, bidirectional_scan_fn, selective_scan_fn
from mamba_ssm.ops.selective_scan_ref import bidirectional_scan_ref, selective_scan_ref

__all__ = [
    "ScanArgs",
    "bidirectional_scan_fn",
    "bidirectional_scan_ref",
    "bimamba_inner_fn",
    "bimamba_inner_ref",
    "mamba_inner_fn",
    "mamba_inner_fn_no_out_proj",
    "mamba_inner_ref",
    "selective_scan_fn",
    "selective_scan_ref",
]
