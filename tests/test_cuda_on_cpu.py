"""The CUDA kernels, compiled as host C++ and run by csrc/tests/cuda_on_cpu.h, against the float64 reference.

This shows that the kernels compute the right thing, without races, deadlocks or accesses outside of shared memory,
where there is no GPU; tests/test_cuda_*.py marked `cuda` show the same, and everything about launches, on a GPU.
"""

import itertools
import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import test_causal_conv1d as conv
import test_layer_norm as norm
import test_mixer
import torch
from gpu_accuracy import FLOOR, StepTests, aligned, floor_of
from test_selective_scan_cpu import (
    DTYPES,
    activation,
    assert_as_accurate,
    bidirectional_results,
    compare,
    make_inputs,
    results,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from causal_conv1d import causal_conv1d_update
from mamba_ssm.ops.discretization_ref import METHODS
from mamba_ssm.ops.selective_scan import bidirectional_scan_fn, selective_scan_fn
from mamba_ssm.ops.selective_scan_ref import bidirectional_scan_ref

ROOT = Path(__file__).resolve().parent.parent
CXX = shlex.split(os.environ.get("CXX", "")) or [n for n in ("c++", "g++", "clang++") if shutil.which(n)][:1]
LARGEST = ("scan_fwd", "scan_bwd", "scan_spread")
OPERATORS = {
    "mamba_ssm": ("selective_scan_fwd", "selective_scan_bwd", "mixer_fwd", "mixer_bwd", "add_norm_fwd", "add_norm_bwd"),
    "causal_conv1d": ("conv_fwd", "conv_bwd", "conv_update"),
}

pytestmark = [
    pytest.mark.needs_kernel,
    pytest.mark.skipif(not CXX, reason="there is no C++ compiler here"),
]


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory) -> Path:
    """The library with the operators' implementations for CUDA, as host code for CPU tensors."""
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    torch_folder = Path(torch.__file__).parent
    flags = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Wno-unknown-pragmas"]
    if "fma" in Path("/proc/cpuinfo").read_text().split():  # as the device does
        flags.append("-mfma")
    flags += ["-DMAMBA_SSM_CUDA_ON_CPU", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    flags += [f"-I{ROOT / 'csrc' / 'common'}", f"-isystem{torch_folder / 'include'}"]

    def compile_source(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        optimization = "-O1" if source.name.startswith(LARGEST) else "-O0"  # compiling takes longer than running
        subprocess.run([*CXX, *flags, optimization, "-x", "c++", "-c", source, "-o", target], check=True)
        return str(target)

    folders = [ROOT / "csrc" / name for name in ("common", "selective_scan", "causal_conv1d", "layer_norm", "mixer")]
    sources = [p for folder in folders for pattern in ("*.cu", "*_cuda.cpp") for p in folder.glob(pattern)]
    sources.sort(key=lambda path: not path.name.startswith(LARGEST))
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_source, sources))
    library = folder / "cuda_on_cpu.so"
    link = ["-shared", f"-L{torch_folder / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    subprocess.run([*CXX, *objects, *link, "-o", library], check=True)
    return library


class OnEmulatedKernels(TorchDispatchMode):
    """Sends the operators to the library's instead of the CPU's, and counts them."""

    calls = 0

    def __init__(self, table):
        super().__init__()
        self.table = table

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        OnEmulatedKernels.calls += function in self.table
        return self.table.get(function, function)(*arguments, **(options or {}))


@pytest.fixture(scope="session")
def emulated_operators(emulated_library):
    for namespace, operators in OPERATORS.items():
        for name in operators:
            schema = str(getattr(getattr(torch.ops, namespace), name).default._schema)
            torch.library.define(f"{namespace}_on_cpu::{name}", schema.split(name, 1)[1])
    torch.ops.load_library(str(emulated_library))
    return {
        getattr(getattr(torch.ops, namespace), name).default: getattr(
            getattr(torch.ops, f"{namespace}_on_cpu"), name
        ).default
        for namespace, operators in OPERATORS.items()
        for name in operators
    }


@pytest.fixture(autouse=True)
def on_emulated_kernels(emulated_operators):
    with OnEmulatedKernels(emulated_operators):
        yield


@pytest.fixture(autouse=True)
def channels_by_threads(monkeypatch):
    """Most tests are small, and would all be scanned with the states of a channel spread over lanes."""
    monkeypatch.setenv("MAMBA_SSM_SCAN_LANES", "0")


def at_offset(t: Tensor, offset: int) -> Tensor:
    """The same, its memory beginning `offset` elements behind a multiple of 16 bytes."""
    memory = torch.empty(t.numel() + offset, dtype=t.dtype)[offset:].view(t.shape).copy_(t)
    return memory.requires_grad_(t.requires_grad)


def check(inputs: dict[str, Tensor], method: str = "zoh", reverse: bool = False, **options) -> None:
    before = OnEmulatedKernels.calls
    compare(inputs, method, reverse, **{"floor": floor_of(inputs["u"].dtype, method), **options})
    assert OnEmulatedKernels.calls == before + 2  # forward and backward


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method, dtype):
    """The fast path, where all |A| >= 0.5 and where not; several tiles of channels and chunks of time."""
    inputs = aligned(make_inputs(batch=1, channels=72, length=37, states=16, dtype=dtype))
    check(inputs, method, reverse=dtype == torch.bfloat16)
    inputs["A"] = -0.5 - 16 * torch.rand(72, 16)
    check(inputs, method, reverse=dtype != torch.bfloat16)


@pytest.mark.parametrize("length", [1, 21])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_alignment(offset, dtype, length):
    """Tensors anywhere in memory, and strides of any size where there is one step: the emulation checks every copy."""
    inputs = make_inputs(batch=1, channels=32, length=length, states=8, dtype=dtype)
    for name in ("u", "delta", "z"):
        inputs[name] = at_offset(inputs[name].transpose(1, 2), offset).transpose(1, 2)
    for name in "BC":
        rows = at_offset(inputs[name].transpose(1, 2).repeat(1, 1, 3), offset)
        inputs[name] = rows[..., 8:16].transpose(1, 2)
    for method in ("zoh", "rk4"):
        check(inputs, method)
    inputs["B"] = at_offset(inputs["B"].transpose(1, 2), offset).transpose(1, 2)
    check(inputs, reverse=True)


class TestSteps(StepTests):
    check = staticmethod(check)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_in_the_general_way(method):
    for dtype in (torch.float32, torch.bfloat16):
        check(make_inputs(channels=19, length=21, states=6, dtype=dtype), method, reverse=dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 7, 15, 16, 17, 63, 64, 65, 197])
def test_lengths(length, dtype):
    inputs = aligned(make_inputs(batch=1, channels=8, length=length, states=4, dtype=dtype))
    check(inputs, "highorder" if length < 64 else "zoh", reverse=dtype == torch.bfloat16)


@pytest.mark.parametrize(("method", "states"), [("zoh", 36), ("zoh", 4), ("bilinear", 4), ("highorder", 4)])
def test_sequences_in_segments(method, states, monkeypatch):
    """The emulated device has two multiprocessors: 25 chunks of one tile are four segments."""
    if states == 36:
        monkeypatch.setenv("CUDA_ON_CPU_REVERSE_ORDER", "1")
    inputs = aligned(make_inputs(batch=1, channels=8, length=197, states=states))
    check(inputs, method, reverse=states == 4)


@pytest.mark.parametrize("lanes", ["4", "8"])
@pytest.mark.parametrize("method", METHODS)
def test_states_spread_over_lanes(method, lanes, monkeypatch):
    """A tile of channels that is not full; chunks of all lengths; where all |A| >= 0.5 and where not."""
    monkeypatch.setenv("MAMBA_SSM_SCAN_LANES", lanes)
    for dtype, length in ((torch.float32, 13), (torch.float16, 65), (torch.bfloat16, 37)):
        inputs = aligned(make_inputs(batch=2, channels=24, length=length, states=16, dtype=dtype))
        check(inputs, method, reverse=dtype == torch.bfloat16)
        inputs["A"] = -0.5 - 16 * torch.rand(24, 16)
        check(inputs, method, reverse=dtype != torch.bfloat16)


@pytest.mark.parametrize("lanes", ["4", "8"])
def test_states_spread_over_lanes_in_every_form(lanes, monkeypatch):
    monkeypatch.setenv("MAMBA_SSM_SCAN_LANES", lanes)
    monkeypatch.setenv("CUDA_ON_CPU_REVERSE_ORDER", "1")
    for states in (4, 12, 36):
        check(aligned(make_inputs(batch=1, channels=8, length=18, states=states)), "highorder", reverse=states == 4)
    for absent in ("D", "z", "delta_bias", "initial_state"):
        inputs = aligned(make_inputs(batch=1, channels=16, length=33, states=16, dtype=torch.bfloat16))
        del inputs[absent]
        check(inputs, "zoh")
    groups = make_inputs(channels=48, length=9, states=4, dtype=torch.float16, forms=("two_groups", "varying"))
    check(groups, "poly", reverse=True)
    test_mixer.assert_right(test_mixer.make_inputs(torch.bfloat16, channels=40, length=300))


def test_lanes_are_chosen(monkeypatch):
    """The emulated device has two multiprocessors: two tiles of 16 channels are scanned by 8 lanes each."""
    monkeypatch.delenv("MAMBA_SSM_SCAN_LANES")
    check(aligned(make_inputs(batch=1, channels=24, length=37, states=16)), "zoh")
    test_mixer.assert_right(test_mixer.make_inputs())


def test_an_unknown_number_of_lanes_is_refused(monkeypatch):
    monkeypatch.setenv("MAMBA_SSM_SCAN_LANES", "5")
    with pytest.raises(RuntimeError, match="MAMBA_SSM_SCAN_LANES: got '5'; expected 0, 4, 8 or nothing"):
        check(aligned(make_inputs(batch=1, channels=8, length=7, states=4)))


def test_how_the_work_is_divided(tmp_path):
    """On an H200: segments, and lanes of a channel forward.

    The first shapes: Vim-Ti at 224², 512², 1024² (batch 128, 16, 8), 1 × 384 × 16385, and 1248² (batch 2)."""
    program = """
        #include <cstdio>
        #include <initializer_list>
        #include <utility>
        #include "launch_config.h"
        using namespace mamba_ssm;
        int main() {
          for (auto [blocks, chunks] :
               {std::pair{384, 25}, {48, 129}, {24, 513}, {3, 2049}, {12, 761}, {99, 129}, {100, 129}, {3, 15}})
            std::printf("%d ", tile::segment_count(blocks, chunks, 132));
          for (auto [batch, length] : {std::pair{128, 197}, {16, 1025}, {8, 4097}, {1, 16385}, {2, 6085}, {64, 197},
                                       {32, 197}, {8, 197}, {1, 197}, {32, 1025}, {8, 1025}, {4, 1025}}) {
            std::printf("%d ", forward_lanes(batch, 384, length, 132));
          }
          for (auto [batch, channels] : {std::pair{4096, 96}, {4096, 16}, {1, 96}}) {
            std::printf("%d ", forward_lanes(batch, channels, 197, 132));
          }
        }"""
    source = tmp_path / "divide.cpp"
    source.write_text(program)
    include = f"-I{ROOT / 'csrc' / 'selective_scan'}"
    subprocess.run([*CXX, "-std=c++20", include, source, "-o", tmp_path / "divide"], check=True)
    found = subprocess.run([tmp_path / "divide"], check=True, capture_output=True, text=True).stdout.split()
    assert found[:8] == ["1", "8", "11", "88", "22", "4", "1", "1"]
    assert found[8:20] == ["0", "8", "0", "0", "0", "4", "4", "8", "8", "4", "8", "0"]
    assert found[20:] == ["0", "4", "8"]  # many sequences of few channels, and one


@pytest.mark.parametrize("states", [1, 8, 16, 17, 64, 256])
def test_numbers_of_states(states):
    for channels, dtype in ((8, torch.float32), (16, torch.bfloat16), (5, torch.float16)):
        inputs = make_inputs(batch=1, channels=channels, length=18, states=states, dtype=dtype)
        check(aligned(inputs) if states % 4 == 0 else inputs, "bilinear", reverse=channels == 8)


FORMS = ("constant", "constant_in_dtype", "varying", "two_groups", "six_groups")


@pytest.mark.parametrize("forms", list(itertools.product(FORMS, FORMS)), ids="-".join)
def test_forms_of_B_and_C(forms):
    if "two_groups" in forms and "six_groups" in forms:
        forms = forms[0], forms[0]
    for channels, dtype in ((48, torch.float32), (42, torch.bfloat16)):
        check(make_inputs(channels=channels, length=9, states=3, dtype=dtype, forms=forms), "foh", channels == 42)


def test_optional_arguments():
    optional = ("D", "z", "delta_bias", "initial_state")
    for absent in itertools.chain.from_iterable(itertools.combinations(optional, n) for n in range(5)):
        for softplus, channels in ((True, 24), (False, 24), (False, 21)):
            inputs = make_inputs(channels=channels, length=7, states=4)
            if not softplus:
                inputs["delta"], inputs["delta_bias"] = inputs["delta"].abs(), inputs["delta_bias"].abs()
            check({k: v for k, v in inputs.items() if k not in absent}, reverse=softplus, delta_softplus=softplus)


@pytest.mark.parametrize("layout", ["channel_last_slice", "contiguous", "strided", "reversed_dimensions", "expanded"])
@pytest.mark.parametrize("reverse", [False, True])
def test_layouts(layout, reverse):
    equal_steps = 3 if layout == "expanded" else 1  # their errors are equal too, and add up
    for dtype, channels in ((torch.float32, 24), (torch.bfloat16, 21)):
        floor = floor_of(dtype, "zoh_exact") * equal_steps
        check(make_inputs(2, channels, 19, 4, dtype, layout=layout), "zoh_exact", reverse, floor=floor)


def test_layouts_and_dtypes_may_differ_from_tensor_to_tensor():
    for layouts in (("channel_last", "contiguous", "strided"), ("contiguous", "channel_last_slice", "channel_last")):
        inputs = make_inputs(channels=24, dtype=torch.bfloat16)
        for name, layout in zip(("u", "delta", "z"), layouts, strict=True):
            inputs[name] = activation(layout, 2, 24, 35, torch.bfloat16)
        inputs["delta"] = inputs["delta"].float()
        inputs["initial_state"] = torch.randn(5, 24, 2).permute(2, 1, 0)
        check(inputs, "poly")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bidirectional_scan(dtype):
    inputs = [aligned(make_inputs(channels=24, length=33, dtype=dtype, states=4)) for _ in range(2)]
    tensors = [t[name] for t in inputs for name in ("u", "delta", "A", "B", "C", "D", "delta_bias")]
    tensors.append(inputs[0]["z"])
    weight = torch.randn(2, 24, 33).to(dtype)
    options = {"scale": 0.5, "discretization_method": "zoh"}
    assert_as_accurate(
        bidirectional_results(bidirectional_scan_fn, tensors, weight, False, **options),
        bidirectional_results(bidirectional_scan_ref, tensors, weight, False, **options),
        bidirectional_results(bidirectional_scan_ref, tensors, weight, True, **options),
        floor=FLOOR,
    )


@pytest.mark.parametrize("ways", ["f", "fb"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixer_with_the_projection_of_delta_inside(dtype, ways, monkeypatch):
    if ways == "fb":  # see test_no_races_and_every_element_written
        monkeypatch.setenv("CUDA_ON_CPU_REVERSE_ORDER", "1")
    test_mixer.assert_right(test_mixer.make_inputs(dtype).only(ways), scale=0.5)


@pytest.mark.parametrize(("width", "channels", "length"), [(2, 132, 9), (3, 4, 1), (3, 8, 130), (4, 12, 3)])
def test_mixer_convolves_both_ways_at_once(width, channels, length):
    test_mixer.assert_right(test_mixer.make_inputs(channels=channels, length=length, width=width))


def in_both_orders(function, monkeypatch) -> list:
    """What the function gives, and gives again with the threads in reverse order. Deterministic algorithms fill what
    torch.empty gives with NaN."""
    found = []
    torch.use_deterministic_algorithms(True)
    try:
        for reverse_order in (False, True):
            if reverse_order:
                monkeypatch.setenv("CUDA_ON_CPU_REVERSE_ORDER", "1")
            found.append(function())
    finally:
        torch.use_deterministic_algorithms(False)
    return found


@pytest.mark.parametrize("lanes", ["0", "4", "8"])
@pytest.mark.parametrize("channels", [21, 72])
@pytest.mark.parametrize("forms", [("varying", "varying"), ("constant", "two_groups")], ids="-".join)
def test_no_races_and_every_element_written(forms, channels, lanes, monkeypatch):
    """The same bits whichever thread runs first and whenever copies arrive."""
    monkeypatch.setenv("MAMBA_SSM_SCAN_LANES", lanes)
    states = 17 if channels == 21 else 20  # the general kernels and the fast ones
    inputs = make_inputs(channels=channels // 3 * 2, length=37, states=states, forms=forms, dtype=torch.bfloat16)
    weights = torch.randn(inputs["u"].shape).bfloat16(), torch.randn(inputs["initial_state"].shape)
    found = in_both_orders(lambda: results(selective_scan_fn, inputs, weights, delta_softplus=True), monkeypatch)
    for name, value in found[0].items():
        assert value.isfinite().all(), name
        assert torch.equal(value, found[1][name]), name


@pytest.mark.parametrize("place", ["u", "delta", "z", "A", "B", "C", "D", "delta_bias", "initial_state"])
def test_nan_reaches_only_what_depends_on_it(place):
    """Other batch elements and channels keep their bits, in the output and in the gradients of u, delta and z."""

    def run():
        leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
        out, last = selective_scan_fn(**leaves, delta_softplus=True, return_last_state=True)
        return [out, last, *torch.autograd.grad(out.sum() + last.sum(), [leaves[name] for name in ("u", "delta", "z")])]

    inputs = make_inputs(channels=24, length=20, states=4)
    clean = run()
    touched = torch.zeros(2, 24, dtype=torch.bool)
    if place in ("u", "delta", "z", "B", "C"):
        inputs[place][1, 2, 11] = torch.nan
        touched[1, 2 if place in ("u", "delta", "z") else slice(None)] = True
    elif place == "initial_state":
        inputs[place][1, 3, 2] = torch.nan
        touched[1, 3] = True
    else:
        inputs[place][(3, 2) if place == "A" else 3] = torch.nan
        touched[:, 3] = True
    dirty = run()
    for before, after in zip(clean, dirty, strict=True):
        assert torch.equal(before[~touched], after[~touched])
    assert dirty[0][touched].isnan().any(-1).all()


# ---- convolution ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", conv.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convolution(dtype, layout):
    for seqlen, width, dim in itertools.product((1, 3, 17, 65), (2, 3, 4), (5, 36)):
        bias, activation_name = (torch.randn(dim), "silu") if width != 3 else (None, None)
        x = conv.make_x(layout, 2, dim, seqlen, dtype)
        conv.compare(x, torch.randn(dim, width), bias, activation=activation_name, reverse=seqlen == 17)


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
@pytest.mark.parametrize("gather", [False, True])
def test_convolution_update(gather, circular):
    conv.test_update_kernel_against_reference(gather, circular, torch.bfloat16)


def test_convolution_update_refuses_rows_that_do_not_exist():
    x, weight, state = torch.randn(2, 6, 9), torch.randn(6, 4), torch.zeros(3, 6, 4)
    with pytest.raises(RuntimeError, match="a kernel's check failed"):
        causal_conv1d_update(x, state, weight, conv_state_indices=torch.tensor([0, 3]))


# ---- residual add + norm -------------------------------------------------------------------------------------------


def check_norm(*arguments, **options) -> None:
    before = OnEmulatedKernels.calls
    norm.compare(*arguments, **options)
    assert OnEmulatedKernels.calls == before + 2  # forward and backward


@pytest.mark.parametrize("is_rms_norm", [True, False])
@pytest.mark.parametrize(
    ("dim", "rows"),
    # the emulated device takes up to 64 rows at once in the backward kernel
    [(1, 66), (7, 5), (64, 0), (64, 1), (192, 131), (384, 67), (768, 37), (1000, 4), (1024, 5), (1025, 5), (2048, 9)],
)
def test_add_norm(dim, rows, is_rms_norm):
    # the gradient of a row of one element is what rounding leaves of 0
    streams = (None, torch.float32) if dim == 1 else (None, *DTYPES)
    for number, (dtype, stream, parameter) in enumerate(itertools.product(DTYPES, streams, DTYPES)):
        scale = torch.rand(rows).to(DTYPES[number // 4 % 3]) if number % 2 else None
        bias = torch.randn(dim).to(parameter) if number // 2 % 2 else None
        residual = None if stream is None else torch.randn(rows, dim).to(stream)
        x, weight = torch.randn(rows, dim).to(dtype), torch.randn(dim).to(parameter)
        check_norm(x, weight, bias, residual, scale, is_rms_norm)


@pytest.mark.parametrize("dim", [5000, 6148, 32768])
def test_add_norm_of_wide_rows(dim):
    x, residual, weight = torch.randn(3, dim).bfloat16(), torch.randn(3, dim), torch.randn(dim)
    check_norm(x, weight, torch.randn(dim), residual, torch.rand(3), is_rms_norm=False)
    check_norm(x, weight, None, residual, None, is_rms_norm=True)


def test_add_norm_of_rows_too_wide():
    with pytest.raises(RuntimeError, match=r"x has 32769 columns.*1 to 32768.*use_cuda_kernel=False"):
        norm.rms_norm_fn(torch.randn(1, 32769), torch.ones(32769), None)


@pytest.mark.parametrize("is_rms_norm", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", ["x", "residual", "weight", "bias", "rows", "gradient"])
def test_add_norm_anywhere_in_memory(place, dtype, is_rms_norm):
    """The emulation checks the address of every vector."""
    for dim, offset in itertools.product((8, 192, 776), (1, 2, 4)):
        tensors = {"x": torch.randn(9, dim).to(dtype), "residual": torch.randn(9, dim)}
        tensors |= {"weight": torch.randn(dim).to(dtype), "bias": torch.randn(dim)}
        gradient_stride = None
        if place == "rows":
            tensors["x"] = torch.randn(9, dim + offset).to(dtype)[:, :dim]
            tensors["residual"] = torch.randn(9, dim + offset)[:, offset:]
        elif place == "gradient":
            gradient_stride = dim + offset
        else:
            tensors[place] = at_offset(tensors[place], offset)
        check_norm(**tensors, scale=None, is_rms_norm=is_rms_norm, gradient_stride=gradient_stride)


@pytest.mark.parametrize("used", ["y", "h"])
def test_add_norm_gradient_of_one_output_alone(used):
    norm.test_gradient_of_one_output_alone(used, None)


def test_add_norm_of_layouts_offsets_and_infinities():
    norm.test_layouts(None)
    norm.test_large_rows_and_offsets(None)
    norm.test_nan_and_inf_stay_in_their_row(torch.nan, None)
    for is_rms_norm in (True, False):
        norm.test_without_prenorm_or_gradient(is_rms_norm, None)


@pytest.mark.parametrize("dim", [33, 192, 384, 1536])
def test_add_norm_without_races_and_every_element_written(dim, monkeypatch):
    """See test_no_races_and_every_element_written."""
    tensors = [torch.randn(70, dim).bfloat16(), torch.randn(dim), torch.randn(dim), torch.randn(70, dim)]
    tensors = [t.requires_grad_() for t in tensors]

    def outputs_and_gradients():
        outputs = norm.layer_norm_fn(*tensors, prenorm=True, drop_path_scale=torch.arange(70.0))
        return [*outputs, *torch.autograd.grad(sum(o.float().square().sum() for o in outputs), tensors)]

    for first, second in zip(*in_both_orders(outputs_and_gradients, monkeypatch), strict=True):
        assert first.isfinite().all()
        assert torch.equal(first, second)
