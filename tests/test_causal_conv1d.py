"""causal_conv1d: the CPU kernel and the reference against float64, in every layout, dtype and option."""

import pytest
import torch
import torch.nn.functional as F

from causal_conv1d import causal_conv1d_fn, causal_conv1d_ref, causal_conv1d_update, causal_conv1d_update_ref

LENGTHS = (1, 2, 3, 7, 63, 64, 65, 197)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("channel_last", "contiguous", "channel_last_slice", "strided")

needs_kernel = pytest.mark.needs_kernel


def make_x(layout: str, batch: int, dim: int, seqlen: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random (batch, dim, seqlen) in the given memory layout."""
    if layout == "channel_last":
        return torch.randn(batch, seqlen, dim, dtype=dtype).transpose(1, 2)
    if layout == "channel_last_slice":  # one half of what an input projection gives
        return torch.randn(batch, seqlen, 2 * dim + 1, dtype=dtype)[..., dim : 2 * dim].transpose(1, 2)
    if layout == "strided":
        return torch.randn(batch, 2 * dim, 3 * seqlen, dtype=dtype)[:, ::2, ::3]
    return torch.randn(batch, dim, seqlen, dtype=dtype)


def packed_index(batch: int, seqlen: int, padding: int = 0) -> torch.Tensor:
    index = (torch.rand(batch, seqlen) < 0.2).cumsum(1).int()
    if padding:
        index[:, -padding:] = -1
    return index


def in_double(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def gradients(function, inputs, dtype=torch.float32) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(outputs, gradients of the inputs) under a fixed random linear loss with coefficients representable in dtype."""
    outputs = function()
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    torch.manual_seed(1)
    grads = [torch.randn(o.shape).to(dtype).to(o.dtype) for o in outputs]
    return outputs, list(torch.autograd.grad(outputs, inputs, grads))


def assert_as_good(kernel: torch.Tensor, reference: torch.Tensor, exact: torch.Tensor, name: str) -> None:
    """The kernel's largest error is at most twice that of the same-dtype reference, or the last bits of float32."""
    assert kernel.dtype == reference.dtype and kernel.shape == reference.shape, name
    error = (kernel.double() - exact).abs().max().item()
    allowed = 2 * (reference.double() - exact).abs().max().item() + 1e-6 * exact.abs().max().item() + 1e-7
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def compare(x, weight, bias=None, initial_states=None, seq_idx=None, activation="silu", reverse=False, final=False):
    """Kernel against the same-dtype reference and float64: outputs, final states, every gradient."""

    def call(function, x, weight, bias, initial_states, **options):
        return function(
            x,
            weight,
            bias,
            seq_idx=seq_idx,
            initial_states=initial_states,
            return_final_states=final,
            activation=activation,
            reverse=reverse,
            **options,
        )

    arguments = [
        None if t is None else t.detach().as_strided(t.shape, t.stride(), t.storage_offset()).requires_grad_()
        for t in (x, weight, bias, initial_states)
    ]
    wide = in_double(*arguments)
    given = [t for t in arguments if t is not None]
    results = gradients(lambda: call(causal_conv1d_fn, *arguments), given, x.dtype)
    same_dtype = gradients(lambda: call(causal_conv1d_ref, *arguments), given, x.dtype)
    exact = gradients(lambda: call(causal_conv1d_ref, *wide), [t for t in wide if t is not None], x.dtype)
    names = [n for n, t in zip(("x", "weight", "bias", "initial_states"), arguments, strict=True) if t is not None]
    for i, name in enumerate(["out", "final_states"][: len(results[0])]):
        assert_as_good(results[0][i], same_dtype[0][i], exact[0][i], name)
    for i, name in enumerate(names):
        assert_as_good(results[1][i], same_dtype[1][i], exact[1][i], f"gradient of {name}")


def test_reference_is_the_padded_convolution():
    x, weight, bias = make_x("contiguous", 2, 5, 9, torch.float64), torch.randn(5, 4).double(), torch.randn(5).double()
    expected = F.silu(F.conv1d(x, weight[:, None], bias, padding=3, groups=5)[..., :9])
    torch.testing.assert_close(causal_conv1d_ref(x, weight, bias, activation="silu"), expected)
    torch.testing.assert_close(causal_conv1d_fn(x, weight, bias, activation="swish"), expected)


def test_reference_gradients():
    x, weight, bias, states = in_double(torch.randn(2, 3, 5), torch.randn(3, 3), torch.randn(3), torch.randn(2, 3, 2))
    for reverse in (False, True):
        assert torch.autograd.gradcheck(
            lambda *a, reverse=reverse: causal_conv1d_ref(*a, True, activation="silu", reverse=reverse),
            (x, weight, bias, states),
        )


@needs_kernel
@pytest.mark.parametrize("seqlen", LENGTHS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_against_float64(dtype, layout, seqlen):
    torch.manual_seed(0)
    for width in (2, 3, 4):
        for dim in (5, 37):
            for bias, activation in ((None, "silu" if dim == 5 else None), (torch.randn(dim), "silu")):
                x = make_x(layout, 2, dim, seqlen, dtype)
                compare(x, torch.randn(dim, width), bias, activation=activation, reverse=dim == 5)


@needs_kernel
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_states_and_packed_sequences(dtype, layout, reverse):
    torch.manual_seed(0)
    for seqlen in (1, 2, 3, 7, 65):
        for width in (2, 4):
            weight, bias = torch.randn(19, width), torch.randn(19)
            for states in (None, torch.randn(2, 19, width - 1, dtype=dtype)):
                compare(make_x(layout, 2, 19, seqlen, dtype), weight, bias, states, reverse=reverse, final=True)
            for padding in (0, 1):
                index = packed_index(2, seqlen, padding)
                compare(make_x(layout, 2, 19, seqlen, dtype), weight, bias, seq_idx=index, reverse=reverse)


@needs_kernel
@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_chunks_of_time_and_blocks_of_channels(layout):
    torch.manual_seed(0)
    for seqlen in (255, 256, 257, 515):
        compare(make_x(layout, 1, 140, seqlen), torch.randn(140, 4), torch.randn(140), torch.randn(1, 140, 3))
        compare(make_x(layout, 1, 140, seqlen), torch.randn(140, 3), seq_idx=packed_index(1, seqlen), reverse=True)


@pytest.mark.parametrize("use_cuda_kernel", [None, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reverse_is_flip_convolve_flip(layout, use_cuda_kernel):
    torch.manual_seed(0)
    for seqlen in (1, 3, 65, 300):
        x, weight, states = make_x(layout, 2, 20, seqlen), torch.randn(20, 4), torch.randn(2, 20, 3)
        options = {"use_cuda_kernel": use_cuda_kernel, "activation": "silu"}
        out, last = causal_conv1d_fn(
            x, weight, initial_states=states, return_final_states=True, reverse=True, **options
        )
        flipped, last_flipped = causal_conv1d_fn(
            x.flip(-1), weight, initial_states=states, return_final_states=True, **options
        )
        torch.testing.assert_close(out, flipped.flip(-1))
        torch.testing.assert_close(last, last_flipped, rtol=0, atol=0)
        index = packed_index(2, seqlen)
        out = causal_conv1d_fn(x, weight, seq_idx=index, reverse=True, **options)
        flipped = causal_conv1d_fn(x.flip(-1), weight, seq_idx=index.flip(-1), **options)
        torch.testing.assert_close(out, flipped.flip(-1))


@pytest.mark.parametrize("use_cuda_kernel", [None, False])
def test_packed_sequences_are_independent(use_cuda_kernel):
    torch.manual_seed(0)
    weight, bias, lengths = torch.randn(6, 4), torch.randn(6), (1, 2, 9, 4)
    parts = [make_x("channel_last", 1, 6, n) for n in lengths]
    index = torch.cat([torch.full((1, n), i) for i, n in enumerate(lengths)], dim=1)
    options = {"activation": "silu", "use_cuda_kernel": use_cuda_kernel}
    packed = causal_conv1d_fn(torch.cat(parts, dim=-1), weight, bias, seq_idx=index, **options)
    separate = torch.cat([causal_conv1d_fn(p, weight, bias, **options) for p in parts], dim=-1)
    torch.testing.assert_close(packed, separate)


@pytest.mark.parametrize("use_cuda_kernel", [None, False])
@pytest.mark.parametrize("first", [1, 2, 3, 30])
def test_states_continue_a_sequence(first, use_cuda_kernel):
    torch.manual_seed(0)
    x, weight, bias = make_x("channel_last", 2, 6, 40), torch.randn(6, 4), torch.randn(6)
    options = {"activation": "silu", "use_cuda_kernel": use_cuda_kernel}
    head, states = causal_conv1d_fn(x[..., :first], weight, bias, return_final_states=True, **options)
    given = torch.full((2, 6, 3), torch.nan)
    tail, last = causal_conv1d_fn(
        x[..., first:], weight, bias, None, states, return_final_states=True, final_states_out=given, **options
    )
    torch.testing.assert_close(torch.cat([head, tail], dim=-1), causal_conv1d_fn(x, weight, bias, **options))
    assert last is given
    torch.testing.assert_close(given, x[..., -3:], rtol=0, atol=0)


@pytest.mark.parametrize("gradient", [False, True])  # with a gradient the differentiable reference runs
@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("step", [1, 2, 5])
def test_updates_equal_the_whole_sequence(step, circular, gradient):
    torch.manual_seed(0)
    x, weight, bias = make_x("channel_last", 3, 6, 20), torch.randn(6, 4), torch.randn(6)
    weight.requires_grad_(gradient)
    expected = causal_conv1d_ref(x, weight, bias, activation="silu")
    for state_len in (3, 4, 9):
        state, outs = torch.zeros(3, 6, state_len), []
        for t in range(0, 20, step):
            new = x[..., t] if step == 1 else x[..., t : t + step]
            seen = torch.full((3,), t, dtype=torch.int32) if circular else None
            out = causal_conv1d_update(new, state, weight, bias, "silu", seen)
            assert out.shape == new.shape
            outs.append(out.view(3, 6, -1))
        torch.testing.assert_close(torch.cat(outs, dim=-1), expected)
        latest = state if not circular else state.roll(-(20 % state_len), dims=-1)
        torch.testing.assert_close(latest, x[..., -state_len:], rtol=0, atol=0)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("gather", [False, True])
def test_update_kernel_against_reference(gather, circular, dtype):
    torch.manual_seed(0)
    for width, seqlen, state_len in ((2, 1, 1), (3, 4, 7), (4, 5, 3), (4, 1, 12)):
        x = make_x("channel_last", 4, 7, seqlen, dtype)
        rows = 9 if gather else 4
        state = torch.randn(rows, state_len, 7, dtype=dtype).transpose(1, 2)
        indices = torch.tensor([5, -1, 0, 8], dtype=torch.int32) if gather else None
        seen = torch.randint(0, 1000, (4,), dtype=torch.int32) if circular else None
        weight, bias = torch.randn(7, width), torch.randn(7)
        state_ref, state_exact = state.clone(), state.double()
        out = causal_conv1d_update(x, state, weight, bias, "silu", seen, indices)
        out_ref = causal_conv1d_update_ref(x, state_ref, weight, bias, "silu", seen, indices)
        exact = causal_conv1d_update_ref(x.double(), state_exact, weight.double(), bias.double(), "silu", seen, indices)
        assert_as_good(out, out_ref, exact, "out")
        assert torch.equal(state, state_ref)
        if gather:
            assert torch.equal(out[1], torch.zeros_like(out[1]))


@pytest.mark.parametrize("use_cuda_kernel", [None, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_stay_where_they_belong(poison, layout, use_cuda_kernel):
    torch.manual_seed(0)
    x, weight = make_x(layout, 2, 20, 70).requires_grad_(), torch.randn(20, 4)
    with torch.no_grad():
        x[1, 3, 40] = poison
    out = causal_conv1d_fn(x, weight, activation="silu", use_cuda_kernel=use_cuda_kernel)
    bad = torch.zeros_like(out, dtype=torch.bool)
    bad[1, 3, 40:44] = True
    assert torch.isfinite(out[~bad]).all()
    if poison != poison:
        assert torch.isnan(out[bad]).all()
    (gradient,) = torch.autograd.grad(out[~bad].sum(), x)
    assert torch.isfinite(gradient[:, :3]).all() and torch.isfinite(gradient[0]).all()


@needs_kernel
@pytest.mark.parametrize("layout", LAYOUTS)
def test_silu_of_extreme_values(layout):
    values = torch.cat([torch.linspace(-130, 130, 521), torch.tensor([-1e30, -3e4, 3e4, 1e30])])
    x = make_x(layout, 1, 20, len(values)).copy_(values).requires_grad_()
    weight = torch.tensor([0.0, 1.0]).expand(20, 2)
    out = causal_conv1d_fn(x, weight, activation="silu")
    (gradient,) = torch.autograd.grad(out.sum(), x)
    exact = x.detach().double().requires_grad_()
    expected = F.silu(exact)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
    moderate = x.abs() < 1e4  # beyond, torch's own formula and ours round 0 times a huge x
    torch.testing.assert_close(gradient[moderate].double(), expected_gradient[moderate], rtol=1e-6, atol=1e-6)
    assert torch.isfinite(gradient).all()


@needs_kernel
@pytest.mark.parametrize("layout", ["channel_last", "contiguous"])
def test_thread_count_changes_nothing(layout):
    torch.manual_seed(0)
    x, weight, bias = make_x(layout, 3, 150, 300), torch.randn(150, 4), torch.randn(150)
    arguments = [t.detach().requires_grad_() for t in (x, weight, bias)]
    results = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        outs, grads = gradients(lambda: causal_conv1d_fn(*arguments, activation="silu"), arguments)
        results.append([*outs, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_kernel
def test_operators_keep_torch_library_rules():
    torch.manual_seed(0)
    weight, bias = torch.randn(6, 4, requires_grad=True), torch.randn(6, requires_grad=True)
    for layout in ("channel_last", "contiguous"):
        x = make_x(layout, 2, 6, 9).requires_grad_()
        for index, states in ((None, None), (packed_index(2, 9), None), (None, torch.randn(2, 6, 3).requires_grad_())):
            arguments = (x, weight, bias, index, states, True, False)
            torch.library.opcheck(torch.ops.causal_conv1d.conv_fwd, arguments)
            detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
            for addend in (None, make_x(layout, 2, 6, 9)):
                torch.library.opcheck(torch.ops.causal_conv1d.conv_bwd, (torch.randn(2, 6, 9), *detached, addend))
        state = torch.randn(2, 6, 5)
        arguments = (x.detach(), state, weight.detach(), None, None, None, True)
        torch.library.opcheck(torch.ops.causal_conv1d.conv_update, arguments)


@needs_kernel
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("layout", ["channel_last", "contiguous"])
@pytest.mark.parametrize("addend_layout", ["channel_last", "contiguous"])
def test_a_gradient_from_elsewhere_is_added(addend_layout, layout, reverse):
    torch.manual_seed(0)
    x, dout, addend = make_x(layout, 2, 35, 300), torch.randn(2, 35, 300), make_x(addend_layout, 2, 35, 300)
    arguments = (dout, x, torch.randn(35, 4), torch.randn(35), None, torch.randn(2, 35, 3), True, reverse)
    plain = torch.ops.causal_conv1d.conv_bwd(*arguments, None)
    summed = torch.ops.causal_conv1d.conv_bwd(*arguments, addend)
    torch.testing.assert_close(summed, (plain[0] + addend, *plain[1:]))


@needs_kernel
def test_compiles_without_graph_breaks():
    x, weight = make_x("channel_last", 2, 6, 9).requires_grad_(), torch.randn(6, 4, requires_grad=True)

    def function(x, weight):
        return causal_conv1d_fn(x, weight, activation="silu", reverse=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = gradients(lambda: function(x, weight), [x, weight])
    found = gradients(lambda: compiled(x, weight), [x, weight])
    torch.testing.assert_close(found, expected)


def test_empty_batch_and_float64():
    out = causal_conv1d_fn(torch.empty(0, 6, 9), torch.randn(6, 4))
    assert out.shape == (0, 6, 9)
    x = torch.randn(2, 6, 9, dtype=torch.float64)
    assert causal_conv1d_fn(x, torch.randn(6, 4)).dtype == torch.float64


def test_use_cuda_kernel_on_cpu_tensors_is_an_error(monkeypatch):
    x, weight = torch.randn(2, 6, 9), torch.randn(6, 4)
    with pytest.raises(RuntimeError, match="CUDA"):
        causal_conv1d_fn(x, weight, use_cuda_kernel=True)
    monkeypatch.setenv("VIM_USE_CUDA_KERNEL", "1")
    with pytest.raises(RuntimeError, match="CUDA"):
        causal_conv1d_fn(x, weight)
    with pytest.raises(RuntimeError, match="CUDA"):
        causal_conv1d_update(x, torch.zeros(2, 6, 4), weight)


X, W = torch.randn(2, 6, 9), torch.randn(6, 4)


@pytest.mark.parametrize("function", [causal_conv1d_fn, causal_conv1d_ref])
@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"^x has shape \(6, 9\).*\(batch, dim, seqlen\)", {"x": X[0]}),
        (ValueError, r"^x has shape \(2, 6, 0\).*seqlen >= 1", {"x": X[..., :0]}),
        (TypeError, r"^x has dtype torch.int64.*convert", {"x": X.long()}),
        (ValueError, r"^weight has shape \(6, 5\).*width in \(2, 3, 4\)", {"weight": torch.randn(6, 5)}),
        (ValueError, r"^weight has shape \(6, 1, 4\).*squeeze\(1\)", {"weight": W[:, None]}),
        (ValueError, r"^weight has shape \(5, 4\).*\(6, 4\)", {"weight": W[:5]}),
        (ValueError, r"^bias has shape \(5,\).*\(6,\)", {"bias": torch.randn(5)}),
        (ValueError, r"^bias is on meta.*x is on cpu.*\.to", {"bias": torch.randn(6, device="meta")}),
        (ValueError, r"^seq_idx has shape \(2, 8\).*\(2, 9\)", {"seq_idx": torch.zeros(2, 8).int()}),
        (TypeError, r"^seq_idx has dtype torch.float32.*int32", {"seq_idx": torch.zeros(2, 9)}),
        (
            ValueError,
            r"^seq_idx packs .*leave seq_idx out",
            {"seq_idx": torch.zeros(2, 9).int(), "initial_states": torch.zeros(2, 6, 3)},
        ),
        (ValueError, r"^initial_states has shape \(2, 6, 4\).*\(2, 6, 3\)", {"initial_states": torch.zeros(2, 6, 4)}),
        (ValueError, r"^final_states_out is given.*pass True", {"final_states_out": torch.zeros(2, 6, 3)}),
        (ValueError, r"^activation is 'relu'.*'silu'", {"activation": "relu"}),
    ],
)
def test_bad_arguments(function, error, message, arguments):
    with pytest.raises(error, match=message):
        function(**{"x": X, "weight": W, **arguments})


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"^x has shape \(2, 6, 0\)", {"x": X[..., :0]}),
        (ValueError, r"^conv_state has shape \(2, 6, 2\).*width - 1 = 3", {"conv_state": torch.zeros(2, 6, 2)}),
        (ValueError, r"^conv_state has shape \(3, 6, 4\).*\(2, 6, 4\)", {"conv_state": torch.zeros(3, 6, 4)}),
        (ValueError, r"^cache_seqlens has shape \(3,\)", {"cache_seqlens": torch.zeros(3).int()}),
        (TypeError, r"^conv_state_indices has dtype torch.float32", {"conv_state_indices": torch.zeros(2)}),
        (ValueError, r"^activation is 'gelu'", {"activation": "gelu"}),
    ],
)
def test_bad_update_arguments(error, message, arguments):
    with pytest.raises(error, match=message):
        causal_conv1d_update(**{"x": X[..., 0], "conv_state": torch.zeros(2, 6, 4), "weight": W, **arguments})


@needs_kernel
def test_update_kernel_refuses_rows_that_do_not_exist():
    state = torch.zeros(3, 6, 4)
    with pytest.raises(RuntimeError, match=r"conv_state_indices\[1\] is 3, but conv_state has 3 rows"):
        causal_conv1d_update(X, state, W, conv_state_indices=torch.tensor([0, 3]))
    with pytest.raises(RuntimeError, match=r"cache_seqlens\[0\] is -1"):
        causal_conv1d_update(X, state[:2], W, cache_seqlens=torch.tensor([-1, 0]))


@needs_kernel
def test_every_instruction_set(rerun_on_instruction_set):
    rerun_on_instruction_set("test_kernel_against_float64 and 65 or test_several_chunks or test_update_kernel_against")


@needs_kernel
def test_second_derivatives_are_refused():
    x = torch.randn(2, 6, 9, requires_grad=True)
    (gradient,) = torch.autograd.grad(causal_conv1d_fn(x, W).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no derivative of its own"):
        gradient.sum().backward()
