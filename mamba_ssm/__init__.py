"""Selective-scan operators for state space models under ten discretizations, and the Mamba mixer built on them."""

__version__ = "0.1.0"

from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.selective_scan_interface import (
    bimamba_inner_fn,
    mamba_inner_fn,
    selective_scan_fn,
    selective_scan_ref,
)

__all__ = ["Mamba", "bimamba_inner_fn", "mamba_inner_fn", "selective_scan_fn", "selective_scan_ref"]
