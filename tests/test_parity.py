"""Keys, parameter counts and logits of the published Vim model, kept in tests/parity (fp32, its reference scan)."""

from pathlib import Path

import pytest
import torch
from parity.parity import fill, image

from vim.models_mamba import VisionMamba

PARITY = Path(__file__).parent / "parity"
COMMON = {"img_size": 64, "depth": 4, "num_classes": 10, "drop_path_rate": 0.0}
GOLDEN = {
    "golden_tiny_stride8_64": {**COMMON, "stride": 8, "embed_dim": 96},
    "golden_layernorm_nofuse_nodiv_gamma": {
        **COMMON,
        "patch_size": 8,
        "stride": 8,
        "embed_dim": 64,
        "rms_norm": False,
        "fused_add_norm": False,
        "if_divide_out": False,
        "init_layer_scale": 0.1,
        "if_cls_token": False,
    },
}


@pytest.mark.parametrize("backend", ["reference", "automatic"])
@pytest.mark.parametrize("name", GOLDEN)
def test_published_logits(name, backend, monkeypatch):
    if backend == "reference":
        monkeypatch.setenv("VIM_USE_CUDA_KERNEL", "0")
    else:
        monkeypatch.delenv("VIM_USE_CUDA_KERNEL", raising=False)
    golden = torch.load(PARITY / f"{name}.pt", weights_only=True)
    model = fill(VisionMamba(**GOLDEN[name]).eval(), seed=7)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == {
        key: list(shape) for key, shape in golden["keys"].items()
    }
    assert sum(parameter.numel() for parameter in model.parameters()) == golden["params"]
    with torch.no_grad():
        logits = model(image((2, 3, 64, 64), seed=5))
    torch.testing.assert_close(logits, golden["logits"], rtol=1e-3, atol=1e-4)
