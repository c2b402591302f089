"""FLOPs of our operators in torch's counter: model totals against a count by hand, for every method and both passes."""

import pytest
import timm
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import vim.models_mamba  # noqa: F401, registers the Vision Mamba models with timm
from mamba_ssm.ops.discretization_ref import METHODS
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from vim.benchmark import FlopsUnknown, count_flops

pytestmark = pytest.mark.needs_kernel

# Operations per state and step of the whole scan, forward and backward, counted by hand from the equations.
STATE_STEP = {
    "zoh": (8, 24),
    "foh": (11, 36),
    "bilinear": (12, 34),
    "poly": (12, 38),
    "highorder": (14, 44),
    "rk4": (15, 46),
    "foh_taylor": (16, 49),
    "poly_taylor": (15, 46),
    "highorder_taylor": (15, 46),
    "zoh_exact": (10, 32),
}
WIDTHS = {"vim_tiny": 192, "vim_small": 384, "vim_base": 768}


def by_hand(method, width, depth, batch, train, pixels=224, classes=1000, states=16, conv_width=4):
    """Multiply-adds as two. Matrix products of the weights: once forward, twice backward, for inputs and weights."""
    patches = (pixels // 16) ** 2
    tokens, inner, rank = patches + 1, 2 * width, width // 16
    forward_step, backward_step = STATE_STEP[method]

    embed = 2 * patches * width * 3 * 16 * 16  # images have no gradient: once forward, once backward
    in_proj, out_proj = 2 * tokens * width * 2 * inner, 2 * tokens * inner * width
    conv = 2 * tokens * inner * conv_width
    x_proj = 2 * tokens * inner * (rank + 2 * states)
    dt_proj = 2 * tokens * rank * inner
    head = 2 * width * classes

    scan = tokens * inner * (states * forward_step + 2)
    direction = conv + x_proj + dt_proj + scan
    total = embed + head + depth * (in_proj + out_proj + 2 * direction)
    if train:
        scan = tokens * inner * (states * (backward_step + 2) + 4)  # 2: the gate's gradient reads C h again
        # again: convolution (in the mixer, and for silu's slope) and Δ
        direction = (1 + 3) * conv + 2 * x_proj + (1 + 2) * dt_proj + scan
        total += embed + 2 * head + depth * (2 * (in_proj + out_proj) + 2 * direction)
    return batch * total


def counted(model, batch, train, pixels=224):
    """Through torch's counter alone, on tensors that hold no numbers."""
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        images = torch.empty(batch, 3, pixels, pixels)
        if train:
            model(images).sum().backward()
        else:
            with torch.inference_mode():
                model(images)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", WIDTHS)
def test_models_of_full_depth(name):
    model = timm.create_model(name)
    assert counted(model.eval(), 1, False) == by_hand("zoh", WIDTHS[name], 24, 1, False)
    assert counted(model.train(), 2, True) == by_hand("zoh", WIDTHS[name], 24, 2, True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", WIDTHS)
def test_every_method(name, method):
    model = timm.create_model(name, depth=2, discretization_method=method)
    assert counted(model, 1, False) == by_hand(method, WIDTHS[name], 2, 1, False)
    assert counted(model, 1, True) == by_hand(method, WIDTHS[name], 2, 1, True)


@pytest.mark.parametrize("train", [False, True])
def test_real_tensors_and_fake_ones_count_alike(train):
    model = timm.create_model("vim_tiny", img_size=32, depth=2, discretization_method="rk4")
    assert count_flops(model, torch.randn(2, 3, 32, 32), train) == by_hand("rk4", 192, 2, 2, train, pixels=32)


def test_gradient_checkpointing_counts_what_it_computes_again():
    model = timm.create_model("vim_tiny", img_size=32, depth=2)
    model.set_grad_checkpointing()
    again = by_hand("zoh", 192, 2, 1, False, pixels=32) - by_hand("zoh", 192, 0, 1, False, pixels=32)
    assert count_flops(model, torch.randn(1, 3, 32, 32), True) == by_hand("zoh", 192, 2, 1, True, pixels=32) + again


def test_scan_alone_is_near_the_figure_of_the_literature():
    batch, channels, length, states = 2, 8, 5, 4
    u, delta = torch.randn(2, batch, channels, length)
    B, C = torch.randn(2, batch, states, length)
    A, D = -torch.rand(channels, states), torch.ones(channels)
    with FlopCounterMode(display=False) as counter:
        selective_scan_fn(u, delta, A, B, C, D)
    steps = batch * channels * length
    quoted = 9 * steps * states + steps
    assert counter.get_total_flops() == quoted - steps * states + steps  # recurrence, not parallel scan; D u as two
    counts = counter.get_flop_counts()["Global"]
    assert list(counts) == [torch.ops.mamba_ssm.selective_scan_fwd]


def test_every_method_states_what_it_costs():
    assert STATE_STEP.keys() == METHODS.keys()
    for name, row in METHODS.items():
        assert (row.forward_operations + 6, row.backward_operations + 18) == STATE_STEP[name]


@pytest.mark.parametrize("switch", ["environment", "argument"])
def test_reference_is_refused(switch, monkeypatch):
    """Its elementwise operations are nothing to torch's counter: the total would lack the scan."""
    model = timm.create_model("vim_tiny", img_size=32, depth=2, use_cuda_kernel=False if switch == "argument" else None)
    if switch == "environment":
        monkeypatch.setenv("VIM_USE_CUDA_KERNEL", "0")
    with pytest.raises(FlopsUnknown, match=r"layers\.0\.mixer ran on the PyTorch reference.*VIM_USE_CUDA_KERNEL"):
        count_flops(model, torch.randn(1, 3, 32, 32))


def test_attention_is_counted_on_the_cpu():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0)
    tokens, width = 5, 192
    linear = 2 * tokens * width * (3 + 1 + 4 + 4) * width
    attention = 2 * 2 * tokens * tokens * width
    assert count_flops(model, torch.randn(1, 3, 32, 32)) == linear + attention + 2 * 4 * width * 3 * 16 * 16
