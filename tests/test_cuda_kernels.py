"""The compiled kernels on a GPU, against the float64 reference: what the CPU's are tested for, and what only a GPU has.

tests/test_cuda_on_cpu.py runs the same kernels' code without a GPU, in more forms.
"""

import itertools

import pytest
import test_causal_conv1d as conv
import test_mixer as mixer_tests
import torch
from gpu_accuracy import StepTests, aligned, floor_of
from test_selective_scan_cpu import (
    DTYPES,
    LAYOUTS,
    activation,
    assert_as_accurate,
    bidirectional_results,
    compare,
    make_inputs,
    results,
)
from torch import Tensor

from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from mamba_ssm import _backend
from mamba_ssm._backend import is_out_of_memory
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.discretization_ref import METHODS
from mamba_ssm.ops.selective_scan import bidirectional_scan_fn, selective_scan_fn
from mamba_ssm.ops.selective_scan_ref import bidirectional_scan_ref

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True, scope="module")
def gpu():
    """New tensors are made on the GPU."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    if _backend.unavailable["cuda"] is not None:
        pytest.fail(_backend.unavailable["cuda"], pytrace=False)
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


def check(inputs: dict[str, Tensor], method: str = "zoh", reverse: bool = False, **options) -> None:
    compare(inputs, method, reverse, **{"floor": floor_of(inputs["u"].dtype, method), **options})


# ---- scan ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method, dtype, reverse):
    inputs = aligned(make_inputs(batch=3, channels=200, length=197, states=16, dtype=dtype))
    check(inputs, method, reverse)
    inputs["A"] = -0.5 - 16 * torch.rand(200, 16)
    check(inputs, method, reverse)
    check(make_inputs(channels=19, length=65, states=6, dtype=dtype), method, reverse)


@pytest.mark.parametrize("lanes", ["0", "4", "8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_division(method, dtype, lanes, monkeypatch):
    """Whatever would be fastest: channels by threads, or their states spread over lanes."""
    monkeypatch.setenv("MAMBA_SSM_SCAN_LANES", lanes)
    for channels, length, states in ((200, 197, 16), (40, 61, 36)):
        inputs = aligned(make_inputs(batch=3, channels=channels, length=length, states=states, dtype=dtype))
        check(inputs, method, reverse=states == 36)
        inputs["A"] = -0.5 - 16 * torch.rand(channels, states)
        check(inputs, method)


class TestSteps(StepTests):
    check = staticmethod(check)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 7, 15, 16, 17, 63, 64, 65, 197, 1025])
def test_lengths(length, dtype):
    """From four chunks for each of three segments on, the sequence is split."""
    for method in ("zoh", "highorder") if length < 200 else ("zoh",):
        check(aligned(make_inputs(1, 64, length, 16, dtype)), method, reverse=dtype == torch.bfloat16)


@pytest.mark.parametrize("states", [1, 8, 16, 17, 64, 256])
def test_numbers_of_states(states):
    for channels, dtype in ((64, torch.float32), (16, torch.bfloat16), (5, torch.float16)):
        inputs = make_inputs(batch=1, channels=channels, length=35, states=states, dtype=dtype)
        check(aligned(inputs) if states % 2 == 0 else inputs, "bilinear", reverse=channels == 64)


FORMS = ("constant", "constant_in_dtype", "varying", "one_group", "two_groups", "six_groups")


@pytest.mark.parametrize("forms", list(itertools.product(FORMS, FORMS)), ids="-".join)
def test_forms_of_B_and_C(forms):
    for channels, dtype in ((48, torch.float32), (42, torch.bfloat16)):
        check(make_inputs(channels=channels, length=37, states=3, dtype=dtype, forms=forms), "foh", channels == 42)


def test_optional_arguments():
    optional = ("D", "z", "delta_bias", "initial_state")
    for absent in itertools.chain.from_iterable(itertools.combinations(optional, n) for n in range(5)):
        for softplus in (True, False):
            inputs = make_inputs(channels=24 if softplus else 21, length=37)
            if not softplus:
                inputs["delta"], inputs["delta_bias"] = inputs["delta"].abs(), inputs["delta_bias"].abs()
            check({k: v for k, v in inputs.items() if k not in absent}, reverse=softplus, delta_softplus=softplus)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, reverse):
    equal_steps = 3 if layout == "expanded" else 1  # their errors are equal too, and add up
    floor = floor_of(dtype, "zoh_exact") * equal_steps
    for channels in (21, 64):
        check(make_inputs(2, channels, 35, 2, dtype, layout=layout), "zoh_exact", reverse, floor=floor)


def test_delta_in_float32_beside_half_types_and_mixed_layouts():
    inputs = make_inputs(channels=24, dtype=torch.bfloat16)
    inputs["delta"] = inputs["delta"].float()
    inputs["z"] = activation("strided", 2, 24, 35, torch.bfloat16)
    check(inputs, "poly")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_bidirectional_scan(method, dtype):
    inputs = [aligned(make_inputs(channels=72, length=65, states=16, dtype=dtype)) for _ in range(2)]
    tensors = [t[name] for t in inputs for name in ("u", "delta", "A", "B", "C", "D", "delta_bias")]
    tensors.append(inputs[0]["z"])
    weight = torch.randn(2, 72, 65).to(dtype)
    options = {"scale": 0.5, "discretization_method": method}
    assert_as_accurate(
        bidirectional_results(bidirectional_scan_fn, tensors, weight, False, **options),
        bidirectional_results(bidirectional_scan_ref, tensors, weight, False, **options),
        bidirectional_results(bidirectional_scan_ref, tensors, weight, True, **options),
        floor=floor_of(dtype, method),
    )


@pytest.mark.parametrize("shape", [(3, 200, 197, 16), (1, 64, 1025, 16), (2, 21, 65, 17)], ids=str)
def test_repetition_changes_no_bit(shape):
    inputs = make_inputs(*shape, dtype=torch.bfloat16)
    weights = torch.randn(shape[:3]).bfloat16(), torch.randn(*shape[:2], shape[3])
    found = [results(selective_scan_fn, inputs, weights, delta_softplus=True) for _ in range(3)]
    for other in found[1:]:
        assert all(torch.equal(value, found[0][name]) for name, value in other.items())


@pytest.mark.parametrize("shape", [(3, 200, 197, 16), (1, 64, 1025, 16), (2, 21, 65, 17)], ids=str)
def test_every_element_is_written(shape):
    """Deterministic algorithms fill what torch.empty gives with NaN."""
    inputs = make_inputs(*shape, dtype=torch.bfloat16)
    weights = torch.randn(shape[:3]).bfloat16(), torch.randn(*shape[:2], shape[3])
    torch.use_deterministic_algorithms(True)
    try:
        found = results(selective_scan_fn, inputs, weights, delta_softplus=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [name for name, value in found.items() if not value.isfinite().all()] == []


# ---- convolution ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", conv.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convolution(dtype, layout):
    for seqlen, width, dim in itertools.product((1, 3, 17, 65, 197), (2, 3, 4), (5, 36, 200)):
        bias, name = (torch.randn(dim), "silu") if width != 3 else (None, None)
        x = conv.make_x(layout, 2, dim, seqlen, dtype)
        conv.compare(x, torch.randn(dim, width), bias, activation=name, reverse=seqlen == 17)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("layout", ["channel_last", "contiguous"])
def test_convolution_of_states_and_packed_sequences(layout, reverse):
    for seqlen, width in itertools.product((1, 3, 65, 130), (2, 4)):
        weight, bias = torch.randn(18, width), torch.randn(18).bfloat16()
        x, states = conv.make_x(layout, 2, 18, seqlen, torch.float16), torch.randn(2, 18, width - 1).half()
        conv.compare(x, weight, bias, states, reverse=reverse, final=True)
        for padding in (0, 1):
            index = conv.packed_index(2, seqlen, padding)
            conv.compare(conv.make_x(layout, 2, 18, seqlen), weight, bias, seq_idx=index, reverse=reverse)


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("step", [1, 3])
def test_convolution_updates_equal_the_whole_sequence(step, circular):
    x, weight, bias = torch.randn(3, 12, 6), torch.randn(6, 4), torch.randn(6)
    expected = causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu")
    state, outs = torch.zeros(3, 6, 5), []
    for t in range(0, 12, step):
        seen = torch.full((3,), t, dtype=torch.int32) if circular else None
        outs.append(causal_conv1d_update(x[:, t : t + step].transpose(1, 2), state, weight, bias, "silu", seen))
    torch.testing.assert_close(torch.cat(outs, dim=-1), expected)


# ---- the mixer, and how torch runs it ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_mixer(method, dtype):
    with torch.device("cpu"):
        inputs = mixer_tests.make_inputs(dtype)
    # Matrix products of the GPU stand between, in other orders than the reference's, and in float32 Δ is made of three
    # products of tf32 parts, good to 2^-22, of which the truncated methods take the fifth power. In half types they are
    # rounded between, which is one unit more.
    floor = max(3 * mixer_tests.FLOOR, floor_of(dtype, method), torch.finfo(dtype).eps / 2)
    mixer_tests.assert_right(inputs.map(Tensor.cuda), floor, scale=0.5, discretization_method=method)


def test_out_of_memory_is_recognized():
    mixer = Mamba(64, bimamba_type="v2")
    x = torch.randn(64, 2048, 64)  # x and z take 128 MiB
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved() + (32 << 20)
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(RuntimeError) as caught, torch.no_grad():
            mixer(x)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert is_out_of_memory(caught.value)


def make_mixer(length: int = 197, batch: int = 4, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    mixer = Mamba(64, bimamba_type="v2", if_divide_out=True).to(dtype)
    return mixer, torch.randn(batch, length, 64, dtype=dtype)


def outputs_and_gradients(function, mixer, x):
    leaf = x.detach().requires_grad_()
    out = function(leaf)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), [leaf, *mixer.parameters()])]


def test_compiled_mixer_is_the_eager_one():
    mixer, x = make_mixer()
    expected = outputs_and_gradients(mixer, mixer, x)
    found = outputs_and_gradients(torch.compile(mixer, fullgraph=True, backend="aot_eager"), mixer, x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    mixer, x = make_mixer()
    expected = outputs_and_gradients(mixer, mixer, x)
    with torch.autocast("cuda", dtype):
        found = outputs_and_gradients(mixer, mixer, x)
    assert found[0].dtype == dtype
    for value, target in zip(found, expected, strict=True):
        assert (value.float() - target).norm() < 0.03 * target.norm()


@pytest.mark.parametrize("length", [197, 1025])
def test_cuda_graph(length):
    """A captured training step, replayed on new inputs."""
    mixer, x = make_mixer(length, batch=1)
    static, side = x.clone(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            outputs_and_gradients(mixer, mixer, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outputs_and_gradients(mixer, mixer, static)
    for _ in range(2):
        static.copy_(torch.randn_like(static))
        graph.replay()
        expected = outputs_and_gradients(mixer, mixer, static)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_a_stream_of_its_own():
    """The kernels run on the current stream: behind what it still has to do, and not before."""
    inputs = aligned(make_inputs(batch=8, channels=256, length=197, states=16))
    del inputs["initial_state"]
    expected = selective_scan_fn(**inputs, delta_softplus=True)
    stream, source = torch.cuda.Stream(), inputs["u"].clone()
    inputs["u"] = torch.zeros_like(source)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        inputs["u"].copy_(source)
        out = selective_scan_fn(**inputs, delta_softplus=True)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_tensors_on_another_than_the_current_device():
    inputs = {name: t.to("cuda:1") for name, t in aligned(make_inputs(channels=64, states=16)).items()}
    assert torch.cuda.current_device() == 0
    out = selective_scan_fn(**inputs, delta_softplus=True)
    expected = selective_scan_fn(**inputs, delta_softplus=True, use_cuda_kernel=False)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("forms", [("varying", "varying"), ("constant", "six_groups")], ids="-".join)
def test_operators_keep_torch_library_rules(forms):
    inputs = make_inputs(channels=18, length=37, states=3, forms=forms)
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    tensors, options = [inputs[name] for name in names], (0.5, True, True, "poly")
    forward, backward = torch.ops.mamba_ssm.selective_scan_fwd, torch.ops.mamba_ssm.selective_scan_bwd
    leaves = [t.detach().requires_grad_() for t in tensors]
    torch.library.opcheck(forward, (*leaves, None, inputs["initial_state"], None, *options, False, 16))
    out, last, checkpoints = forward(*tensors, None, inputs["initial_state"], None, *options, False, 16)
    arguments = (torch.randn_like(out), torch.randn_like(last), *tensors, None, None, checkpoints, *options, True, 16)
    torch.library.opcheck(backward, arguments)


def test_a_loss_that_is_no_number_stops_nothing():
    """NaN stays where it belongs, as on the CPU."""
    inputs = make_inputs(channels=24, length=20)
    clean = selective_scan_fn(**inputs, delta_softplus=True)
    inputs["u"][1, 2, 11] = torch.nan
    dirty = selective_scan_fn(**inputs, delta_softplus=True)
    others = torch.ones(2, 24, dtype=torch.bool)
    others[1, 2] = False
    assert torch.equal(clean[others], dirty[others])
    assert dirty[1, 2, 11:].isnan().all() and torch.equal(dirty[1, 2, :11], clean[1, 2, :11])
