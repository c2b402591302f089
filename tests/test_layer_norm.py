"""Residual add + norm: the fused kernels (C++ on the CPU, CUDA on the GPU) and the references against float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn, layer_norm_ref, rms_norm_fn, rms_norm_ref

needs_kernel = pytest.mark.needs_kernel
EPS = 1e-5


@pytest.fixture(
    params=[
        pytest.param(("cpu", None), marks=needs_kernel, id="cpu"),
        pytest.param(("cpu", False), id="reference"),
        pytest.param(("cuda", True), marks=pytest.mark.cuda, id="cuda"),
    ]
)
def use_cuda_kernel(request):
    """The switch; tensors made meanwhile are on its device."""
    device, switch = request.param
    with torch.device(device):
        yield switch


def formula(x, weight, bias, residual, scale, is_rms_norm):
    """y and h, written with torch's own norms."""
    h = x if scale is None else x * scale.view(-1, *[1] * (x.dim() - 1)).to(x.dtype)
    h = h if residual is None else h + residual
    shape = h.shape[-1:]
    if is_rms_norm:
        y = F.rms_norm(h, shape, weight, EPS)
        return (y if bias is None else y + bias), h
    return F.layer_norm(h, shape, weight, bias, EPS), h


def outputs_and_gradients(function, tensors, gradients):
    outputs = function(*tensors)
    gradients = [g.to(o.dtype) for o, g in zip(outputs, gradients, strict=True)]
    return [*outputs, *torch.autograd.grad(outputs, [t for t in tensors if t is not None], gradients)]


def compare(x, weight, bias, residual, scale, is_rms_norm, use_cuda_kernel=None, gradient_stride=None):
    """Outputs and every gradient against float64, beside torch's norms in the residual's dtype."""
    tensors = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias, residual)]
    stream_dtype = torch.float32 if residual is None else residual.dtype
    stride = gradient_stride or x.shape[-1]
    gradients = [torch.randn(*x.shape[:-1], stride).to(dtype)[..., : x.shape[-1]] for dtype in (x.dtype, stream_dtype)]

    def call(x, weight, bias, residual):
        return layer_norm_fn(
            x,
            weight,
            bias,
            residual,
            EPS,
            prenorm=True,
            residual_in_fp32=True,
            is_rms_norm=is_rms_norm,
            drop_path_scale=scale,
            use_cuda_kernel=use_cuda_kernel,
        )

    def torch_in_this_dtype(*tensors):
        y, h = formula(*(None if t is None else t.to(stream_dtype) for t in tensors), scale, is_rms_norm)
        return y.to(x.dtype), h

    wide = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    found = outputs_and_gradients(call, tensors, gradients)
    same = outputs_and_gradients(torch_in_this_dtype, tensors, gradients)
    exact = outputs_and_gradients(lambda *tensors: formula(*tensors, scale, is_rms_norm), wide, gradients)
    most = 2 if stream_dtype == torch.float32 else 4  # the gradient sees h as it was rounded
    names = ["y", "h"]
    names += [n for n, t in zip(("x", "weight", "bias", "residual"), tensors, strict=True) if t is not None]
    for name, a, b, c in zip(names, found, same, exact, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        if a.numel() == 0:
            continue
        error = (a.double() - c).abs().max().item()
        allowed = most * (b.double() - c).abs().max().item() + 1e-6 * c.abs().max().item() + 1e-6
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("is_rms_norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_against_float64(dtype, is_rms_norm, use_cuda_kernel):
    """For a residual in fp32 or in x's dtype, or none; with and without bias and scale."""
    torch.manual_seed(0)
    for dim, stream, bias, scale in itertools.product(
        (9, 16, 37, 192, 384, 1000), (None, torch.float32, dtype), (False, True), (False, True)
    ):
        compare(
            torch.randn(2, 3, 11, dim).to(dtype),
            torch.randn(dim),
            torch.randn(dim) if bias else None,
            None if stream is None else torch.randn(2, 3, 11, dim).to(stream),
            torch.tensor([0.0, 1.5]) if scale else None,
            is_rms_norm,
            use_cuda_kernel,
        )


@pytest.mark.parametrize("is_rms_norm", [True, False])
def test_without_prenorm_or_gradient(is_rms_norm, use_cuda_kernel):
    torch.manual_seed(0)
    x, weight, bias, residual = torch.randn(2, 7, 20), torch.randn(20), torch.randn(20), torch.randn(2, 7, 20)
    options = {"eps": EPS, "is_rms_norm": is_rms_norm, "use_cuda_kernel": use_cuda_kernel}
    torch.testing.assert_close(
        layer_norm_fn(x, weight, bias, residual, **options), formula(x, weight, bias, residual, None, is_rms_norm)[0]
    )
    y, h = layer_norm_fn(x, weight, bias, prenorm=True, **options)
    torch.testing.assert_close(y, formula(x, weight, bias, None, None, is_rms_norm)[0])
    assert torch.equal(h, x)


@pytest.mark.parametrize("used", ["y", "h"])
def test_gradient_of_one_output_alone(used, use_cuda_kernel):
    torch.manual_seed(0)
    x, weight, residual = torch.randn(2, 7, 20), torch.randn(20), torch.randn(2, 7, 20)
    tensors = [t.requires_grad_() for t in (x, weight, residual)]
    pairs = []
    for y, h in (
        rms_norm_fn(x, weight, None, residual, True, eps=EPS, use_cuda_kernel=use_cuda_kernel),
        formula(x, weight, None, residual, None, True),
    ):
        loss = (y if used == "y" else h).square().sum()
        pairs.append(
            [
                torch.zeros_like(t) if g is None else g
                for t, g in zip(tensors, torch.autograd.grad(loss, tensors, allow_unused=True), strict=True)
            ]
        )
    torch.testing.assert_close(*pairs)


def test_layouts(use_cuda_kernel):
    torch.manual_seed(0)
    weight = torch.randn(20)
    for x in (
        torch.randn(20),
        torch.randn(3, 40)[:, 10:30],
        torch.randn(3, 60)[:, ::3],
        torch.randn(20, 5, 3).transpose(0, 2),
        torch.randn(2, 3, 4, 20)[:, 1:],
        torch.randn(1, 20).expand(6, 20),
    ):
        y = rms_norm_fn(x, weight, None, eps=EPS, use_cuda_kernel=use_cuda_kernel)
        torch.testing.assert_close(y, F.rms_norm(x, (20,), weight, EPS))
    one = rms_norm_fn(torch.tensor([[3.0], [-2.0]]), torch.ones(1), None, use_cuda_kernel=use_cuda_kernel)
    torch.testing.assert_close(one, torch.tensor([[1.0], [-1.0]]))
    assert rms_norm_fn(torch.empty(0, 4, 20), weight, None, use_cuda_kernel=use_cuda_kernel).shape == (0, 4, 20)


def test_large_rows_and_offsets(use_cuda_kernel):
    """The variance is computed from centred values: a large mean does not swamp it."""
    x = torch.randn(4, 100) + 1000.0
    found = layer_norm_fn(x, torch.ones(100), None, eps=0.0, use_cuda_kernel=use_cuda_kernel)
    exact = F.layer_norm(x.double(), (100,), eps=0.0)
    assert (found.double() - exact).abs().max() < 5e-4


@pytest.mark.parametrize("dim", [1, 2049, 32768])
def test_short_and_long_rows(dim, use_cuda_kernel):
    torch.manual_seed(0)
    tensors = [torch.randn(s, requires_grad=True) for s in ((5, dim), (dim,), (dim,))]
    x, weight, bias = tensors
    found = layer_norm_fn(x, weight, bias, eps=EPS, use_cuda_kernel=use_cuda_kernel)
    exact = F.layer_norm(x.double(), (dim,), weight.double(), bias.double(), EPS)
    dy = torch.randn(5, dim)
    gradients = torch.autograd.grad(found, tensors, dy), torch.autograd.grad(exact, tensors, dy.double())
    torch.testing.assert_close(found, exact.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nan_and_inf_stay_in_their_row(poison, use_cuda_kernel):
    x, residual = torch.randn(3, 50), torch.randn(3, 50)
    x[1, 7] = poison
    y = rms_norm_fn(x, torch.ones(50), None, residual, use_cuda_kernel=use_cuda_kernel)
    assert torch.isnan(y[1, 7]) and torch.isfinite(y[[0, 2]]).all()


def test_module_and_references():
    torch.manual_seed(0)
    x, residual = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    norm = RMSNorm(16, eps=EPS)
    assert list(norm.state_dict()) == ["weight"] and norm.bias is None
    y, h = norm(x, residual, prenorm=True, residual_in_fp32=True)
    torch.testing.assert_close(h, x + residual)
    torch.testing.assert_close(y, F.rms_norm(x + residual, (16,), eps=EPS))
    bias = torch.randn(16)
    torch.testing.assert_close((y + bias, h), rms_norm_ref(x, norm.weight, bias, residual, eps=EPS, prenorm=True))
    torch.testing.assert_close(
        layer_norm_ref(x, norm.weight, bias, residual, eps=EPS), F.layer_norm(h, (16,), norm.weight, bias, EPS)
    )
    low, stream = layer_norm_ref(x.bfloat16(), norm.weight, bias, residual, EPS, prenorm=True, upcast=True)
    assert low.dtype == torch.bfloat16 and stream.dtype == torch.float32
    half = RMSNorm(16, dtype=torch.bfloat16)(x.bfloat16(), prenorm=True, residual_in_fp32=True)
    assert [t.dtype for t in half] == [torch.bfloat16, torch.float32]


def test_import_path_of_mamba_ssm_1():
    from mamba_ssm.ops.triton import layernorm

    assert layernorm.RMSNorm is RMSNorm and layernorm.rms_norm_fn is rms_norm_fn
    assert layernorm.layer_norm_fn is layer_norm_fn


@needs_kernel
def test_thread_count_changes_nothing():
    torch.manual_seed(0)
    tensors = [torch.randn(5, 203, 70), torch.randn(70), torch.randn(70), torch.randn(5, 203, 70)]
    tensors = [t.requires_grad_() for t in tensors]
    results = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        x, weight, bias, residual = tensors
        outputs = layer_norm_fn(x, weight, bias, residual, prenorm=True)
        results.append([*outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), tensors)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_kernel
@pytest.mark.parametrize("is_rms_norm", [True, False])
def test_operators_keep_torch_library_rules(is_rms_norm):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((6, 20), (20,), (20,)))
    residual, scale = torch.randn(6, 20, requires_grad=True), torch.rand(3)
    forward, backward = torch.ops.mamba_ssm.add_norm_fwd, torch.ops.mamba_ssm.add_norm_bwd
    for arguments in (
        (x, weight, bias, residual, scale, EPS, True, is_rms_norm, True),
        (x, weight, None, None, None, EPS, False, is_rms_norm, False),
        (x.detach().bfloat16().requires_grad_(), weight, None, residual, None, EPS, True, is_rms_norm, True),
        (
            x.detach().view(3, 2, 20),
            weight,
            bias,
            residual.detach().view(3, 2, 20),
            scale,
            EPS,
            True,
            is_rms_norm,
            True,
        ),
        (x[0], weight, bias, residual[0], None, EPS, True, is_rms_norm, True),
        (torch.randn(3, 0, 20), weight, None, None, None, EPS, True, is_rms_norm, True),
    ):
        # mean and rstd are by-products without a gradient of their own
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(forward, arguments, test_utils=tests)
    h, mean, rstd = torch.randn(6, 20), torch.randn(6), torch.rand(6)
    for dh, separate in ((torch.randn(6, 20), True), (None, False)):
        torch.library.opcheck(
            backward,
            (torch.randn(6, 20), dh, h, weight.detach(), scale, mean, rstd, is_rms_norm, True, separate),
        )
    expanded = torch.randn(3, 1, 20).expand(3, 2, 20)  # whose rows are not at equal distances
    torch.library.opcheck(
        backward,
        (expanded, None, h.view(3, 2, 20), weight.detach(), scale, mean, rstd, is_rms_norm, True, True),
    )


@needs_kernel
def test_compiles_without_graph_breaks():
    torch.manual_seed(0)
    tensors = [torch.randn(2, 7, 20), torch.randn(20), torch.randn(2, 7, 20)]
    tensors = [t.requires_grad_() for t in tensors]

    def function(x, weight, residual):
        return rms_norm_fn(x, weight, None, residual, prenorm=True)

    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        outputs = f(*tensors)
        results.append([*outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), tensors)])
    torch.testing.assert_close(*results)


def test_use_cuda_kernel_on_cpu_tensors_is_an_error():
    with pytest.raises(RuntimeError, match="CUDA"):
        rms_norm_fn(torch.randn(2, 4), torch.ones(4), None, use_cuda_kernel=True)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"^x has shape \(3, 0\).*dim >= 1", {"x": torch.randn(3, 0)}),
        (TypeError, r"^x has dtype torch.int64.*convert", {"x": torch.zeros(3, 8).long()}),
        (ValueError, r"^weight has shape \(7,\).*\(8,\)", {"weight": torch.ones(7)}),
        (ValueError, r"^bias has shape \(8, 1\).*\(8,\)", {"bias": torch.ones(8, 1)}),
        (ValueError, r"^residual has shape \(2, 8\).*\(3, 8\)", {"residual": torch.ones(2, 8)}),
        (ValueError, r"^residual is on meta, but x is on cpu", {"residual": torch.ones(3, 8, device="meta")}),
        (ValueError, r"^drop_path_scale has shape \(2,\).*\(3,\)", {"drop_path_scale": torch.ones(2)}),
    ],
)
def test_bad_arguments(error, message, arguments):
    with pytest.raises(error, match=message):
        layer_norm_fn(**{"x": torch.randn(3, 8), "weight": torch.ones(8), "bias": None, **arguments})


@needs_kernel
def test_every_instruction_set(rerun_on_instruction_set):
    rerun_on_instruction_set("against_float64 and cpu")


@needs_kernel
def test_second_derivatives_are_refused():
    x = torch.randn(2, 6, 9, requires_grad=True)
    (gradient,) = torch.autograd.grad(rms_norm_fn(x, torch.ones(9), None).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=needs_kernel), pytest.param("cuda", marks=pytest.mark.cuda)]
)
def test_kernels_say_what_they_cannot_take(device):
    operator = torch.ops.mamba_ssm.add_norm_fwd
    x, weight, options = torch.zeros(6, 8, device=device), torch.ones(8, device=device), (EPS, True, True, True)
    for message, arguments in (
        (r"x must be float32, float16 or bfloat16", (x.double(), weight, None, None, None)),
        (r"weight must have 8 elements", (x, x.new_ones(9), None, None, None)),
        (r"bias must have 8 elements", (x, weight, x.new_ones(7), None, None)),
        (r"residual must have the shape of x", (x, weight, None, x[:5], None)),
        (r"scale has 4 elements.*6 rows", (x, weight, None, None, x.new_ones(4))),
    ):
        with pytest.raises(RuntimeError, match=message):
            operator(*arguments, *options)


# ---- GPU -----------------------------------------------------------------------------------------------------------


def add_and_norm(x, weight, bias, residual, scale):
    return layer_norm_fn(x, weight, bias, residual, EPS, prenorm=True, drop_path_scale=scale, use_cuda_kernel=True)


def on_gpu(device="cuda"):
    """Arguments of add_and_norm: enough rows that every thread of the backward kernel has several."""
    torch.manual_seed(0)
    x, residual = torch.randn(64, 197, 384, dtype=torch.bfloat16), torch.randn(64, 197, 384)
    tensors = (x, torch.randn(384), torch.randn(384), residual)
    return [*(t.to(device).requires_grad_() for t in tensors), torch.rand(64).to(device)]


def results_of(function, arguments):
    outputs = function(*arguments)
    return [*outputs, *torch.autograd.grad(sum(o.float().square().sum() for o in outputs), arguments[:4])]


@pytest.mark.cuda
def test_same_bits_twice_and_on_another_stream():
    arguments = on_gpu()
    first, second = results_of(add_and_norm, arguments), results_of(add_and_norm, arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        third = results_of(add_and_norm, arguments)
    torch.cuda.current_stream().wait_stream(stream)
    for other in (second, third):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.cuda
def test_replays_in_a_cuda_graph():
    arguments = on_gpu()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # allocates, which a capture may not
        results_of(add_and_norm, arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results_of(add_and_norm, arguments)
    with torch.no_grad():
        for tensor in arguments:
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    fresh = results_of(add_and_norm, arguments)
    assert all(torch.equal(a, b) for a, b in zip(captured, fresh, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiles_with_inductor(mode):
    arguments = on_gpu()
    compiled = torch.compile(add_and_norm, fullgraph=True, mode=mode)
    for _ in range(3):  # a CUDA graph is recorded with the second call
        found = [t.clone() for t in results_of(compiled, arguments)]
    torch.testing.assert_close(found, results_of(add_and_norm, arguments))


@pytest.mark.cuda
def test_runs_on_the_device_of_its_tensors():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    here, there = results_of(add_and_norm, on_gpu("cuda:0")), results_of(add_and_norm, on_gpu("cuda:1"))
    for a, b in zip(here, there, strict=True):
        assert b.device.index == 1
        torch.testing.assert_close(a, b.to("cuda:0"))


@pytest.mark.cuda
def test_rows_of_more_than_32768_elements_are_refused():
    with pytest.raises(RuntimeError, match=r"x has 40000 columns.*1 to 32768.*use_cuda_kernel=False"):
        rms_norm_fn(torch.zeros(1, 40000, device="cuda"), torch.ones(40000, device="cuda"), None)


@pytest.mark.cuda
def test_more_elements_than_32_bits_count():
    rows, dim = 6_000_000, 384
    if torch.cuda.get_device_properties("cuda").total_memory < 40 * 2**30:
        pytest.skip("needs a GPU of 40 GiB")
    x = torch.randn(rows, dim, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    weight = torch.randn(dim, device="cuda")
    y = rms_norm_fn(x, weight, None, eps=EPS)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    last = x.detach()[-7:].requires_grad_()
    expected = rms_norm_fn(last, weight, None, eps=EPS)
    assert torch.equal(y[-7:], expected)
    assert torch.equal(dx[-7:], torch.autograd.grad(expected, last, torch.ones_like(expected))[0])
