"""`mixer_fn`, whose backward pass is written by hand, against a plain composition."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from test_selective_scan_cpu import assert_as_accurate, decay_rates, needs_kernel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.discretization_ref import METHODS
from mamba_ssm.ops.mamba_inner import Direction, Projection, mixer_fn

# float32: eight units in the last place, as a gradient here passes four matrix products besides the scan.
FLOOR = 1e-6
BATCH, CHANNELS, LENGTH, STATES, RANK, INPUTS, OUTPUTS = 2, 36, 41, 5, 3, 20, 28


class Inputs(NamedTuple):
    """What `mixer_fn` takes."""

    hidden_states: Tensor
    in_proj: Projection | None
    out_proj: Projection | None
    forward: Direction | None
    backward: Direction | None

    def map(self, function) -> "Inputs":
        """function(t) in the place of every tensor t."""
        hidden_states, *groups = self
        changed = (g if g is None else type(g)(*(t if t is None else function(t) for t in g)) for g in groups)
        return Inputs(function(hidden_states), *changed)

    def tensors(self) -> dict[str, Tensor]:
        named = {"hidden_states": self.hidden_states}
        for group, name in zip(self[1:], self._fields[1:], strict=True):
            named |= {f"{name}.{field}": t for field, t in (group._asdict() if group else {}).items() if t is not None}
        return named

    def only(self, ways: str) -> "Inputs":
        """Without the directions whose letter, f or b, is not among `ways`."""
        absent = {name: None for name in ("forward", "backward") if name[0] not in ways}
        return self._replace(**absent)


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
    layout: str = "contiguous",
    bias: bool = True,
    channels: int = CHANNELS,
    length: int = LENGTH,
    width: int = 4,
) -> Inputs:
    """All of float32 but for hidden_states."""
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(4)

    def projection(inputs: int, outputs: int) -> Projection:
        weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        return Projection(weight, torch.randn(outputs, generator=generator) * 0.5 if bias else None)

    hidden_states = torch.randn(BATCH, length, INPUTS, generator=generator).to(dtype)
    if layout == "time innermost":
        hidden_states = hidden_states.mT.contiguous().mT
    directions = (make_direction(generator, bias, channels, width) for _ in range(2))
    return Inputs(hidden_states, projection(INPUTS, 2 * channels), projection(channels, OUTPUTS), *directions)


def results(inputs: Inputs, *, double: bool = False, **options) -> dict[str, Tensor]:
    """The output and the gradient of every tensor under a fixed linear loss."""
    dtype = inputs.hidden_states.dtype
    inputs = inputs.map(lambda t: (t.detach().double() if double else t.detach()).requires_grad_())
    out = mixer_fn(*inputs, **options)
    named = inputs.tensors()
    weight = torch.randn(out.shape, generator=torch.Generator(out.device).manual_seed(5), device=out.device)
    gradients = torch.autograd.grad(out, named.values(), weight.to(dtype).to(out.dtype))
    for gradient, tensor in zip(gradients, named.values(), strict=True):
        assert gradient.shape == tensor.shape and gradient.dtype == tensor.dtype
    return {"out": out.detach(), **dict(zip(named, gradients, strict=True))}


def assert_right(inputs: Inputs, floor: float = FLOOR, **options) -> None:
    """The kernels' results are as near to float64's as the reference's."""
    kernel, reference = results(inputs, **options), results(inputs, use_cuda_kernel=False, **options)
    assert_as_accurate(kernel, reference, results(inputs, double=True, **options), floor=floor)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_both_directions_and_every_gradient(method, dtype):
    assert_right(make_inputs(dtype), scale=0.5, discretization_method=method)


@needs_kernel
@pytest.mark.parametrize("ways", ["f", "b", "fb"])
@pytest.mark.parametrize("layout", ["contiguous", "time innermost"])
@pytest.mark.parametrize("bias", [True, False], ids=["", "no biases"])
def test_single_directions_layouts_and_absent_tensors(ways, layout, bias):
    assert_right(make_inputs(layout=layout, bias=bias).only(ways), scale=0.7)


@needs_kernel
@pytest.mark.parametrize("channels", [CHANNELS, 1])
@pytest.mark.parametrize("absent", [("in_proj",), ("out_proj",), ("in_proj", "out_proj")], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_outer_projections(dtype, absent, channels):
    inputs = make_inputs(dtype, channels=channels)._replace(**dict.fromkeys(absent))
    if "in_proj" in absent:
        inputs = inputs._replace(hidden_states=torch.randn(BATCH, LENGTH, 2 * channels).to(dtype))
    assert_right(inputs, scale=0.5)


@needs_kernel
def test_one_channel():
    assert_right(make_inputs(channels=1))


@needs_kernel
def test_no_gradient_no_checkpoints():
    """Inference keeps nothing; what it returns is what training returns."""
    inputs = make_inputs()
    with torch.no_grad():
        plain = mixer_fn(*inputs)
    trained = mixer_fn(*inputs.map(Tensor.requires_grad_))
    assert not plain.requires_grad and trained.requires_grad
    assert torch.equal(plain, trained)


@needs_kernel
def test_second_derivatives_are_refused():
    inputs = make_inputs().map(Tensor.requires_grad_)
    (gradient,) = torch.autograd.grad(mixer_fn(*inputs).square().sum(), inputs.hidden_states, create_graph=True)
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
        (
            {"A_log": torch.zeros(CHANNELS, 257), "x_proj_weight": torch.zeros(RANK + 514, CHANNELS)},
            "backward.A_log: got 257 states",
        ),
        (
            {"A_log": torch.zeros(CHANNELS, 0), "x_proj_weight": torch.zeros(RANK, CHANNELS)},
            "backward.A_log: got 0 states; expected 1 to 256",
        ),
        ({"conv_weight": None}, "backward.conv_weight: got None; expected a tensor, or None for the whole direction"),
        ({"dt_weight": None}, "backward.dt_weight: got None"),
        ({"conv_weight": torch.zeros(CHANNELS, 1, 4).double()}, "backward.conv_weight: got torch.float64 beside"),
        ({"conv_bias": torch.zeros(CHANNELS, dtype=torch.int8)}, "backward.conv_bias: got torch.int8 beside"),
        ({"D": torch.zeros(3)}, "backward.D: got shape"),
        ({"conv_weight": torch.zeros(CHANNELS, 1, 5)}, "backward.conv_weight: got width 5; expected 2, 3 or 4"),
        ({"D": torch.zeros(CHANNELS, device="meta")}, "backward.D: got a tensor on meta; expected cpu"),
        ({"D": torch.zeros(CHANNELS, dtype=torch.int8)}, "backward.D: got torch.int8 beside hidden_states in torch.fl"),
        ({"D": torch.zeros(CHANNELS).double()}, "backward.D: got torch.float64 beside hidden_states in torch.float32"),
    ],
)
def test_wrong_parameters_are_named(change, message):
    inputs = make_inputs()
    with pytest.raises(ValueError, match=message):
        mixer_fn(*inputs._replace(backward=inputs.backward._replace(**change)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_states": torch.zeros(72, 41)}, r"hidden_states: got shape \(72, 41\); expected \(B, L, E\)"),
        ({"hidden_states": torch.zeros(2, 41, 19)}, r"in_proj.weight: got shape \(72, 20\); expected \(72, 19\)"),
        ({"in_proj": Projection(torch.zeros(71, INPUTS), None)}, "in_proj.weight: got shape"),
        ({"in_proj": Projection(torch.zeros(72, INPUTS), torch.zeros(36))}, "in_proj.bias: got shape"),
        (
            {"out_proj": Projection(torch.zeros(OUTPUTS), None)},
            r"out_proj.weight: got shape \(28,\); expected \(28, 36\)",
        ),
        ({"out_proj": Projection(torch.zeros(OUTPUTS, CHANNELS), torch.zeros(1))}, "out_proj.bias: got shape"),
        ({"hidden_states": torch.zeros(0, 41, 20)}, r"got shape \(0, 41, 20\); expected \(B, L, E\), each at least 1"),
        (
            {"hidden_states": torch.zeros(2, 41, 20, dtype=torch.int64)},
            "hidden_states: got torch.int64; expected",
        ),
        ({"in_proj": None}, r"hidden_states: got shape \(2, 41, 20\); expected \(B, L, 72\): in_proj is None"),
        ({"forward": None, "backward": None}, "expected a Direction for at least one"),
    ],
)
def test_wrong_inputs_and_projections_are_named(change, message):
    inputs = make_inputs()._replace(**change)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled), pytest.raises(ValueError, match=message):
            mixer_fn(*inputs)


@needs_kernel
def test_wrong_parameters_are_named_of_fake_tensors():
    with FakeTensorMode():
        inputs = make_inputs()
        with pytest.raises(ValueError, match=r"backward\.dt_weight: got shape"):
            mixer_fn(*inputs._replace(backward=inputs.backward._replace(dt_weight=torch.zeros(3, RANK))))


@needs_kernel
@pytest.mark.parametrize("ways", ["fb", "f", "b"])
@pytest.mark.parametrize("bias", [True, False], ids=["", "no biases"])
def test_operators_keep_their_promises(bias, ways):
    """Schemas and fake implementations, against the real ones."""
    inputs = make_inputs(bias=bias).only(ways)
    if ways == "b":
        inputs = inputs._replace(in_proj=None, out_proj=None, hidden_states=torch.randn(BATCH, LENGTH, 2 * CHANNELS))
    sizes = (len(Projection._fields),) * 2 + (len(Direction._fields),) * 2
    groups = (group or (None,) * size for group, size in zip(inputs[1:], sizes, strict=True))
    tensors = (inputs.hidden_states, *(t for group in groups for t in group))
    options = (0.5, True, "poly", 32)
    torch.library.opcheck(torch.ops.mamba_ssm.mixer_fwd.default, (*tensors, *options))
    out, *kept = torch.ops.mamba_ssm.mixer_fwd(*tensors, *options)
    for needed in (-1, 0, 0b101):
        arguments = (torch.randn_like(out), *tensors, *kept, *options, needed)
        torch.library.opcheck(torch.ops.mamba_ssm.mixer_bwd.default, arguments)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("outer", [True, False], ids=["", "no projections"])
@pytest.mark.parametrize("ways", ["fb", "b"])
def test_gradients_of_some_tensors_alone(ways, outer, dtype):
    """As of a frozen model with one trained part: each is what it is beside all the others, which are not made."""
    inputs = make_inputs().only(ways)
    if not outer:
        inputs = inputs._replace(in_proj=None, out_proj=None, hidden_states=torch.randn(BATCH, LENGTH, 2 * CHANNELS))
    inputs = inputs._replace(hidden_states=inputs.hidden_states.to(dtype))

    def gradients(wanted: Callable[[Inputs], list[Tensor]], leaves: Inputs) -> tuple[tuple[Tensor, ...], int]:
        tensors = wanted(leaves)
        for t in tensors:
            t.requires_grad_()
        with FlopCounterMode(display=False) as counter:
            out = mixer_fn(*leaves)
            found = torch.autograd.grad(out, tensors, torch.ones_like(out))
        return found, counter.get_total_flops()

    expected, most = gradients(lambda leaves: list(leaves.tensors().values()), inputs.map(torch.clone))
    for index, name in enumerate(inputs.tensors()):
        (gradient,), operations = gradients(lambda leaves, n=name: [leaves.tensors()[n]], inputs.map(torch.clone))
        torch.testing.assert_close(gradient, expected[index], rtol=0, atol=0)
        assert operations < most


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parameters_in_half_precision(dtype):
    """A module in bfloat16: its parameters are taken as they are, and so are their gradients."""
    hidden_states = make_inputs(dtype).hidden_states
    assert_right(make_inputs().map(Tensor.bfloat16)._replace(hidden_states=hidden_states))


@needs_kernel
def test_autocast_decides_the_dtype_of_activations():
    inputs = make_inputs()
    halved = results(inputs._replace(hidden_states=inputs.hidden_states.bfloat16()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for options in ({}, {"use_cuda_kernel": False}):
            found = results(inputs, **options)
            assert found["out"].dtype == torch.bfloat16
            for name, value in found.items():
                assert (value - halved[name]).norm() < 0.05 * halved[name].norm(), name


@needs_kernel
def test_backward_inside_of_autocast():
    inputs = make_inputs().map(Tensor.requires_grad_)
    leaves = list(inputs.tensors().values())
    out = mixer_fn(*inputs)
    expected = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(out, leaves, torch.ones_like(out))
    torch.testing.assert_close(found, expected)


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
@pytest.mark.parametrize("frozen", [False, True], ids=["", "mostly frozen"])
def test_one_graph(frozen):
    inputs = make_inputs()
    leaves = [t for name, t in inputs.tensors().items() if not frozen or name in ("forward.D", "in_proj.weight")]
    for leaf in leaves:
        leaf.requires_grad_()

    def loss(inputs):
        return mixer_fn(*inputs, discretization_method="foh").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = compiled(inputs), loss(inputs)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)
