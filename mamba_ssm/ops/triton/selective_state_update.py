"""The import path of mamba_ssm 1.x."""

from mamba_ssm.ops.selective_state_update import selective_state_update, selective_state_update_ref

__all__ = ["selective_state_update", "selective_state_update_ref"]
