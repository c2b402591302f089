"""The Mamba mixer: directions, inference cache, initialization, errors; and the mamba_inner functions behind it."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from mamba_ssm import _backend
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.discretization_ref import METHODS
from mamba_ssm.ops.mamba_inner import (
    bimamba_inner_fn,
    bimamba_inner_ref,
    mamba_inner_fn,
    mamba_inner_fn_no_out_proj,
    mamba_inner_ref,
)

BATCH, LENGTH, D_MODEL = 2, 9, 24
needs_kernel = pytest.mark.skipif(_backend.unavailable["cpu"] is not None, reason="the CPU library was not built")


def mixer(**options):
    torch.manual_seed(0)
    return Mamba(D_MODEL, d_state=5, layer_idx=0, **options)


def sequence(length=LENGTH, dtype=torch.float32):
    return torch.randn(BATCH, length, D_MODEL, generator=torch.Generator().manual_seed(1)).to(dtype)


def direction(model, x, suffix=""):
    """One direction of the equations, step by step on plain tensors, before out_proj; ZOH's simplified input rule."""
    conv, x_proj, dt_proj = (getattr(model, name + suffix) for name in ("conv1d", "x_proj", "dt_proj"))
    A = -torch.exp(getattr(model, f"A{suffix}_log"))
    u, z = model.in_proj(x).chunk(2, dim=-1)
    u = F.silu(conv(u.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
    dt, B, C = x_proj(u).split([model.dt_rank, model.d_state, model.d_state], dim=-1)
    delta = F.softplus(dt_proj(dt))
    state, ys = torch.zeros(BATCH, model.d_inner, model.d_state), []
    for t in range(x.shape[1]):
        step = delta[:, t, :, None]
        state = torch.exp(step * A) * state + step * B[:, t, None] * u[:, t, :, None]
        ys.append((state * C[:, t, None]).sum(-1) + getattr(model, f"D{suffix}") * u[:, t])
    return torch.stack(ys, dim=1) * F.silu(z)


def test_forward_is_the_recurrence():
    model = mixer()
    x = sequence()
    torch.testing.assert_close(model(x), model.out_proj(direction(model, x)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divide", [False, True])
def test_v2_adds_a_direction_of_its_own_on_the_flipped_sequence(divide):
    model = mixer(bimamba_type="v2", if_divide_out=divide)
    x = sequence()
    y = direction(model, x) + direction(model, x.flip(1), "_b").flip(1)
    torch.testing.assert_close(model(x), model.out_proj(y / 2 if divide else y), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divide", [False, True])
def test_v1_shares_everything_but_the_state_matrix_and_is_never_divided(divide):
    model = mixer(bimamba_type="v1", if_divide_out=divide)
    with torch.no_grad():
        model.A_b_log.add_(0.5)
    x = sequence()
    xz = model.in_proj(x).transpose(1, 2)
    weights = model.conv1d.weight, model.conv1d.bias, model.x_proj.weight, model.dt_proj.weight
    options = {"D": model.D, "delta_bias": model.dt_proj.bias}
    expected = bimamba_inner_ref(
        xz, *weights, model.out_proj.weight, None, -model.A_log.exp(), -model.A_b_log.exp(), **options
    )
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-6)
    # The convolution is causal for both scans: so the last token depends on the first only through the forward scan.
    forward_only = mamba_inner_ref(xz, *weights, model.out_proj.weight, None, -model.A_log.exp(), **options)
    assert not torch.allclose(expected, forward_only, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["none", "v1", "v2"])
def test_reverse_equals_flip_mixer_flip(kind, method):
    model = mixer(bimamba_type=kind, discretization_method=method)
    x = sequence()
    torch.testing.assert_close(model(x, reverse=True), model(x.flip(1)).flip(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_one_token_at_a_time_equals_the_whole_sequence(method):
    model = mixer(discretization_method=method, init_layer_scale=0.5)
    x = sequence()
    expected = model(x)
    with torch.no_grad():
        conv_state, ssm_state = model.allocate_inference_cache(BATCH, max_seqlen=LENGTH)
        steps = []
        for t in range(LENGTH):
            out, conv_state, ssm_state = model.step(x[:, t : t + 1], conv_state, ssm_state)
            steps.append(out)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prefill", [1, 2, 6])  # shorter than the convolution, and longer
def test_inference_params_continue_a_prefilled_sequence(prefill):
    model = mixer()
    x = sequence()
    expected = model(x)
    cache = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    with torch.no_grad():
        parts = [model(x[:, :prefill], inference_params=cache)]
        for t in range(prefill, LENGTH):
            cache.seqlen_offset = t
            parts.append(model(x[:, t : t + 1], inference_params=cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-6)


def test_inference_cache_dtypes_and_errors():
    model = mixer().to(torch.bfloat16)
    conv_state, ssm_state = model.allocate_inference_cache(3, max_seqlen=7)
    assert conv_state.shape == (3, model.d_inner, 4) and conv_state.dtype == torch.bfloat16
    assert ssm_state.shape == (3, model.d_inner, 5) and ssm_state.dtype == torch.float32
    model = mixer()
    cache = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    model(sequence(), inference_params=cache)
    with pytest.raises(ValueError, match=r"batch size 2, not 1"):
        model(sequence()[:1], inference_params=cache)
    with pytest.raises(ValueError, match="one token"):
        model.step(sequence(), *cache.key_value_memory_dict[0])
    with pytest.raises(ValueError, match="layer_idx"):
        Mamba(D_MODEL)(sequence(), inference_params=SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0))


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_bidirectional_mixers_refuse_steps(kind):
    model = mixer(bimamba_type=kind)
    cache = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    with pytest.raises(NotImplementedError, match=kind):
        model.step(sequence(1), *model.allocate_inference_cache(BATCH, 1))
    with pytest.raises(NotImplementedError, match=kind):
        model(sequence(), inference_params=cache)
    with pytest.raises(NotImplementedError, match="reverse=True"):
        mixer()(sequence(), inference_params=cache, reverse=True)


def test_step_honours_use_cuda_kernel(monkeypatch):
    monkeypatch.delenv("VIM_USE_CUDA_KERNEL", raising=False)
    model = mixer(use_cuda_kernel=True)
    with pytest.raises(RuntimeError, match="use_cuda_kernel=True"):
        model.step(sequence(1), *model.allocate_inference_cache(BATCH, 1))


@pytest.mark.parametrize("kind", ["none", "v2"])
def test_delta_starts_in_its_range_in_every_direction(kind):
    model = mixer(bimamba_type=kind, dt_min=0.002, dt_max=0.05)
    names = ["dt_proj", "dt_proj_b"] if kind == "v2" else ["dt_proj"]
    for name in names:
        projection = getattr(model, name)
        delta = F.softplus(projection.bias)
        assert delta.min() >= 0.002 * 0.999 and delta.max() <= 0.05 * 1.001 and delta.std() > 0.003
        assert projection.weight.abs().max() <= model.dt_rank**-0.5
        assert projection.bias._no_reinit


def test_state_space_parameters():
    model = mixer(bimamba_type="v2", dtype=torch.bfloat16, init_layer_scale=0.25)
    for parameter in (model.A_log, model.A_b_log, model.D, model.D_b):
        assert parameter.dtype == torch.float32 and parameter._no_weight_decay
    torch.testing.assert_close(model.A_log.exp(), torch.arange(1.0, 6.0).expand(model.d_inner, -1))
    assert model.gamma.shape == (D_MODEL,) and (model.gamma == 0.25).all()
    assert model.in_proj.weight.dtype == torch.bfloat16
    assert model(sequence(dtype=torch.bfloat16)).dtype == torch.bfloat16


class Adapted(nn.Module):
    """A linear layer with an adapter, as libraries for fine-tuning put it in the layer's place."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer
        self.adapter = nn.Linear(layer.in_features, layer.out_features, bias=False)

    @property
    def weight(self):
        return self.layer.weight

    def forward(self, x):
        return self.layer(x) + self.adapter(x)


@pytest.mark.parametrize("name", ["in_proj", "out_proj"])
@pytest.mark.parametrize("kind", ["none", "v2"])
def test_projections_may_be_replaced(kind, name):
    model = mixer(bimamba_type=kind)
    plain = model(sequence())
    setattr(model, name, Adapted(getattr(model, name)))
    adapter = getattr(model, name).adapter
    out = model(sequence())
    assert not torch.allclose(out, plain)
    out.sum().backward()
    assert adapter.weight.grad.abs().sum() > 0
    nn.init.zeros_(adapter.weight)
    torch.testing.assert_close(model(sequence()), plain)


@pytest.mark.parametrize("name", ["in_proj", "out_proj"])
def test_hooks_of_projections_are_called(name):
    model = mixer(bimamba_type="v2")
    plain, seen = model(sequence()), []
    with getattr(model, name).register_forward_hook(lambda layer, inputs, output: seen.append(output.shape)):
        torch.testing.assert_close(model(sequence()), plain)
    assert len(seen) == 1 and len(seen[0]) == 3
    prune.l1_unstructured(getattr(model, name), "weight", amount=0.5)
    for _ in range(2):
        model(sequence()).sum().backward()
    assert not torch.allclose(model(sequence()), plain)


class MixerCalls(TorchDispatchMode):
    """The arguments of every mixer, by the names of the operator's schema."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.mamba_ssm.mixer_fwd.default:
            names = [argument.name for argument in function._schema.arguments]
            self.seen.append(SimpleNamespace(**dict(zip(names, arguments, strict=True))))
        return function(*arguments, **(options or {}))

    def __enter__(self):
        self.seen = []
        return super().__enter__()


@needs_kernel
def test_autocast_keeps_the_state_space_in_fp32():
    model = mixer(bimamba_type="v2")
    exact = model(sequence())
    with MixerCalls() as calls, torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(sequence())
    (call,) = calls.seen
    assert call.hidden_states.dtype == torch.bfloat16
    for name in ("A_log", "D", "dt_weight", "dt_bias", "A_b_log", "D_b", "dt_weight_b", "dt_bias_b"):
        assert getattr(call, name).dtype == torch.float32
    torch.testing.assert_close(out.float(), exact, rtol=5e-2, atol=5e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["none", "v1", "v2"])
def test_gradients_reach_every_parameter_and_match_the_reference(kind, method, monkeypatch):
    model = mixer(bimamba_type=kind, discretization_method=method, init_layer_scale=0.5)
    reference = copy.deepcopy(model)
    weight = torch.randn(BATCH, LENGTH, D_MODEL, generator=torch.Generator().manual_seed(2))
    (model(sequence()) * weight).sum().backward()
    monkeypatch.setenv("VIM_USE_CUDA_KERNEL", "0")
    (reference(sequence()) * weight).sum().backward()
    for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        torch.testing.assert_close(
            parameter.grad, expected.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_gradcheck_of_a_mixer_in_double_precision():
    torch.manual_seed(0)
    model = Mamba(4, d_state=2, d_conv=3, bimamba_type="v2", if_divide_out=True, dtype=torch.float64).double()
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, (x,))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bimamba_type": "v3"}, "bimamba_type must be one of none, v1, v2; got 'v3'"),
        ({"dt_init": "zero"}, "dt_init"),
        ({"discretization_method": "zho"}, "zoh, foh, bilinear"),
    ],
)
def test_unknown_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        mixer(**options)


def test_misspelt_option_is_a_type_error():
    with pytest.raises(TypeError, match="if_devide_out"):
        Mamba(D_MODEL, if_devide_out=True)


def test_cuda_kernel_asked_for_on_the_cpu_is_an_error(monkeypatch):
    monkeypatch.delenv("VIM_USE_CUDA_KERNEL", raising=False)
    with pytest.raises(RuntimeError, match="use_cuda_kernel=True"):
        mixer(use_cuda_kernel=True)(sequence())


def test_nan_propagates():
    x = sequence()
    x[0, 4] = float("nan")
    y = mixer()(x)
    assert y[0, 4:].isnan().all() and y[0, :4].isfinite().all() and y[1].isfinite().all()


# --- mamba_inner_fn and its kin, as the public tests call them ---


def inner_arguments(variable_B, variable_C, width=3):
    torch.manual_seed(0)
    dim, d_state, rank = 12, 4, 3
    rows = rank + (variable_B + variable_C) * d_state
    return {
        "xz": torch.randn(BATCH, 2 * dim, LENGTH),
        "conv1d_weight": torch.randn(dim, 1, width),
        "conv1d_bias": torch.randn(dim),
        "x_proj_weight": torch.randn(rows, dim) / 4,
        "delta_proj_weight": torch.randn(dim, rank),
        "out_proj_weight": torch.randn(dim // 2, dim),
        "out_proj_bias": torch.randn(dim // 2),
        "A": -0.5 * torch.rand(dim, d_state),
        "B": None if variable_B else torch.randn(dim, d_state),
        "C": None if variable_C else torch.randn(dim, d_state),
        "D": torch.randn(dim),
        "delta_bias": 0.5 * torch.rand(dim),
    }


def with_gradients(function, arguments, **options):
    leaves = {k: None if v is None else v.clone().requires_grad_() for k, v in arguments.items()}
    out = function(*leaves.values(), **options)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
    return out.detach(), {k: v.grad for k, v in leaves.items() if v is not None}


@pytest.mark.parametrize("method", ["zoh", "bilinear", "highorder"])
@pytest.mark.parametrize("variable_C", [False, True])
@pytest.mark.parametrize("variable_B", [False, True])
@pytest.mark.parametrize("kind", ["mamba", "bimamba"])
def test_inner_functions_match_their_references(kind, variable_B, variable_C, method):
    arguments = inner_arguments(variable_B, variable_C)
    if kind == "bimamba":  # A_b follows A in the public order
        items = list(arguments.items())
        items.insert(8, ("A_b", arguments["A"] * 0.7))
        arguments = dict(items)
    functions = {"mamba": (mamba_inner_fn, mamba_inner_ref), "bimamba": (bimamba_inner_fn, bimamba_inner_ref)}[kind]
    (out, grads), (expected, expected_grads) = (
        with_gradients(function, arguments, discretization_method=method) for function in functions
    )
    assert out.shape == (BATCH, LENGTH, 6)
    torch.testing.assert_close(out, expected, rtol=6e-4, atol=2e-3)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-3, atol=2e-3)


def test_no_out_proj_and_projection_biases():
    arguments = inner_arguments(True, True)
    out_proj_weight, out_proj_bias = arguments.pop("out_proj_weight"), arguments.pop("out_proj_bias")
    biases = {"B_proj_bias": torch.randn(4), "C_proj_bias": torch.randn(4)}
    y = mamba_inner_fn_no_out_proj(**arguments, **biases)
    assert y.shape == (BATCH, 12, LENGTH)
    projected = {**arguments, "out_proj_weight": out_proj_weight, "out_proj_bias": out_proj_bias}
    expected = mamba_inner_ref(**projected, **biases)
    torch.testing.assert_close(F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias), expected)
    assert not torch.allclose(mamba_inner_ref(**projected), expected)
    with pytest.raises(ValueError, match="highorder"):
        mamba_inner_fn_no_out_proj(**arguments, discretization_method="nope")


def test_public_import_paths():
    from mamba_ssm.ops import selective_scan_interface as public

    assert public.mamba_inner_fn is mamba_inner_fn and public.mamba_inner_ref is mamba_inner_ref
    assert public.bimamba_inner_fn is bimamba_inner_fn and public.bimamba_inner_ref is bimamba_inner_ref
    assert public.mamba_inner_fn_no_out_proj is mamba_inner_fn_no_out_proj


def test_module_is_a_residual_citizen():
    """A Mamba block in a plain nn.Sequential trains: the public class is used so in third-party code."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(D_MODEL), mixer(), nn.Linear(D_MODEL, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(5):
        loss = (model(sequence()) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
