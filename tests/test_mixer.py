"""`mixer_scan`, whose backward pass is written by hand, against a plain composition."""

import pytest
import torch
from test_selective_scan_cpu import assert_as_accurate, decay_rates, needs_kernel
from torch import Tensor

from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.discretization_ref import METHODS
from mamba_ssm.ops.mamba_inner import Direction, mixer_scan

# float32: eight units in the last place, as a gradient here passes two matrix products besides the scan.
FLOOR = 1e-6
BATCH, CHANNELS, LENGTH, STATES, RANK = 2, 36, 41, 5, 3


def make_direction(
    generator: torch.Generator, bias: bool = True, channels: int = CHANNELS, width: int = 4
) -> Direction:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return Direction(
        randn(channels, 1, width) * 0.5,
        randn(channels) if bias else None,
        randn(RANK + 2 * STATES, channels) / channels**0.5,
        randn(channels, RANK) * 0.3,
        randn(channels) * 0.3 - 0.5 if bias else None,
        (-decay_rates(channels, STATES)).log(),
        randn(channels) if bias else None,
    )


def make_inputs(
    dtype: torch.dtype = torch.float32,
    layout: str = "channel_last",
    bias: bool = True,
    channels: int = CHANNELS,
    length: int = LENGTH,
    width: int = 4,
):
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(4)
    xz = torch.randn(BATCH, length, 2 * channels, generator=generator).to(dtype).transpose(1, 2)
    if layout == "contiguous":
        xz = xz.contiguous()
    directions = [make_direction(generator, bias, channels, width) for _ in range(2)]
    return xz, [d._replace(x_proj_weight=d.x_proj_weight.to(dtype)) for d in directions]


def results(xz, directions, ways: str, *, double: bool = False, **options) -> dict[str, Tensor]:
    """The output and the gradient of every tensor under a fixed linear loss."""

    def leaf(t: Tensor | None) -> Tensor | None:
        return None if t is None else (t.detach().double() if double else t.detach()).requires_grad_()

    xz = leaf(xz)
    directions = [Direction(*map(leaf, d)) for d in directions]
    out = mixer_scan(xz, *(d if way in ways else None for d, way in zip(directions, "fb", strict=True)), **options)
    used = [d for d, way in zip(directions, "fb", strict=True) if way in ways]
    names = ["xz", *(f"{name} {i}" for i, d in enumerate(used) for name, t in d._asdict().items() if t is not None)]
    leaves = [xz, *(t for d in used for t in d if t is not None)]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    gradients = torch.autograd.grad(out, leaves, weight.to(xz.dtype).to(out.dtype))
    for gradient, tensor in zip(gradients, leaves, strict=True):
        assert gradient.shape == tensor.shape and gradient.dtype == tensor.dtype
    return {"out": out.detach(), **dict(zip(names, gradients, strict=True))}


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_both_directions_and_every_gradient(method, dtype):
    inputs = make_inputs(dtype)
    options = {"scale": 0.5, "discretization_method": method}
    kernel = results(*inputs, "fb", **options)
    reference = results(*inputs, "fb", use_cuda_kernel=False, **options)
    truth = results(*inputs, "fb", double=True, **options)
    assert_as_accurate(kernel, reference, truth, floor=FLOOR)


@needs_kernel
@pytest.mark.parametrize("ways", ["f", "b", "fb"])
@pytest.mark.parametrize("layout", ["channel_last", "contiguous"])
@pytest.mark.parametrize("bias", [True, False], ids=["", "no biases"])
def test_single_directions_layouts_and_absent_tensors(ways, layout, bias):
    inputs = make_inputs(layout=layout, bias=bias)
    options = {"scale": 0.7}
    kernel = results(*inputs, ways, **options)
    reference = results(*inputs, ways, use_cuda_kernel=False, **options)
    truth = results(*inputs, ways, double=True, **options)
    assert_as_accurate(kernel, reference, truth, floor=FLOOR)


@needs_kernel
def test_no_gradient_no_checkpoints():
    """Inference keeps nothing; what it returns is what training returns."""
    xz, directions = make_inputs()
    with torch.no_grad():
        plain = mixer_scan(xz, *directions)
    trained = mixer_scan(xz.requires_grad_(), *directions)
    assert not plain.requires_grad and trained.requires_grad
    assert torch.equal(plain, trained)


@needs_kernel
def test_second_derivatives_are_refused():
    xz, directions = make_inputs()
    (gradient,) = torch.autograd.grad(
        mixer_scan(xz.requires_grad_(), *directions).square().sum(), xz, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@needs_kernel
@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"x_proj_weight": torch.zeros(9, CHANNELS)},
            r"backward.x_proj_weight: got shape \(9, 36\); expected \(13, 36\)",
        ),
        ({"dt_weight": torch.zeros(CHANNELS - 1, RANK)}, "backward.dt_weight: got shape"),
        ({"A_log": torch.zeros(CHANNELS - 1, STATES)}, "backward.A_log: got shape"),
        ({"A_log": torch.zeros(CHANNELS, 257)}, "backward.A_log: got 257 states; expected 1 to 256"),
        ({"D": torch.zeros(3)}, "backward.D: got shape"),
        ({"conv_weight": torch.zeros(CHANNELS, 1, 5)}, "backward.conv_weight: got width 5; expected 2, 3 or 4"),
        ({"D": torch.zeros(CHANNELS, device="meta")}, "backward.D: got a tensor on meta; expected cpu"),
    ],
)
def test_wrong_parameters_are_named(change, message):
    xz, (forward, backward) = make_inputs()
    with pytest.raises(ValueError, match=message):
        mixer_scan(xz, forward, backward._replace(**change))


@pytest.mark.parametrize("shape", [(2, 35, 41), (72, 41)])
def test_shape_of_xz(shape):
    _, directions = make_inputs()
    with pytest.raises(ValueError, match=r"xz: got shape .*; expected \(B, 2D, L\)"):
        mixer_scan(torch.zeros(shape), *directions)


@needs_kernel
@pytest.mark.parametrize("ways", ["fb", "f", "b"])
def test_operators_keep_their_promises(ways):
    """Schemas and fake implementations, against the real ones."""
    xz, directions = make_inputs()
    x, z = xz.chunk(2, dim=1)
    parameters = [t if way in ways else None for d, way in zip(directions, "fb", strict=True) for t in d]
    options = (0.5, True, "poly", 32)
    torch.library.opcheck(torch.ops.mamba_ssm.mixer_fwd.default, (x, z, *parameters, *options))
    out, *kept = torch.ops.mamba_ssm.mixer_fwd(x, z, *parameters, *options)
    arguments = (torch.randn_like(out), x, z, *parameters, *kept, *options)
    torch.library.opcheck(torch.ops.mamba_ssm.mixer_bwd.default, arguments)


@needs_kernel
def test_parameters_in_half_precision():
    """A module in bfloat16: its parameters are taken as they are, and so are their gradients."""
    xz, directions = make_inputs(torch.bfloat16)
    halves = [Direction(*(t.bfloat16() for t in d)) for d in directions]
    kernel, reference = results(xz, halves, "fb"), results(xz, halves, "fb", use_cuda_kernel=False)
    assert_as_accurate(kernel, reference, results(xz, halves, "fb", double=True), floor=FLOOR)


@needs_kernel
def test_backward_inside_of_autocast():
    xz, directions = make_inputs()
    leaves = [xz.requires_grad_(), *(t.requires_grad_() for d in directions for t in d)]
    out = mixer_scan(xz, *directions)
    expected = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(out, leaves, torch.ones_like(out))
    torch.testing.assert_close(found, expected)


def test_a_direction_is_needed():
    xz, _ = make_inputs()
    with pytest.raises(ValueError, match="expected a Direction for at least one"):
        mixer_scan(xz, None, None)


def test_the_reference_keeps_every_derivative(monkeypatch):
    monkeypatch.setenv("VIM_USE_CUDA_KERNEL", "0")
    mixer = Mamba(8, d_state=3, bimamba_type="v2").double()
    h = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixer(h).square().sum(), h, create_graph=True)
    assert torch.autograd.grad(gradient.sum(), h)[0].isfinite().all()
    assert torch.func.grad(lambda t: mixer(t).sum())(h.detach()).shape == h.shape
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mixer(h).isfinite().all()


@needs_kernel
def test_one_graph():
    xz, directions = make_inputs()
    leaves = [xz.requires_grad_(), *(t.requires_grad_() for d in directions for t in d)]

    def loss(xz, directions):
        return mixer_scan(xz, *directions, discretization_method="foh").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = compiled(xz, directions), loss(xz, directions)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)
