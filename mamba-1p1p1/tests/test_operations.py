"""Properties of the operations that hold whatever backend runs: gradients, registration, symmetries, errors."""

import inspect

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from inputs import BF16, direction, mixer_inputs, needs_block, scan_inputs
from torch.utils.flop_counter import FlopCounterMode

from mamba_ssm import Mamba, selective_scan_fn
from mamba_ssm.ops import backend, bimamba_ops, reference, selective_scan_interface
from mamba_ssm.ops.bimamba import (
    DirectionParameters,
    _half_block_dtype,
    bimamba,
    bimamba_block,
    negative_exp,
    negative_exps,
)
from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn_no_out_proj, selective_scan_ref
from mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn, layer_norm_ref, rms_norm_fn, rms_norm_ref
from mamba_ssm.ops.triton.selective_state_update import selective_state_update

# --- references against each other


@given(length=st.integers(1, 70), seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_prefix_equals_loop(length, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(length, 3, 2, generator=generator, dtype=torch.float64)
    b = torch.randn(length, 3, 2, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(reference.recurrence_prefix(a, b), reference.recurrence_loop(a, b))


@pytest.mark.parametrize("form", ["constant", "token", "grouped"])
def test_function_equals_time_loop(form):
    inputs = scan_inputs(form=form, L=65)
    out, state = selective_scan_fn(*inputs, delta_softplus=True, return_last_state=True)
    out_ref, state_ref = selective_scan_ref(*inputs, delta_softplus=True, return_last_state=True)
    torch.testing.assert_close(out, out_ref)
    torch.testing.assert_close(state, state_ref)


# --- gradients


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("form", ["constant", "token", "grouped"])
@pytest.mark.parametrize("is_complex", [False, True])
def test_scan_gradients(form, is_complex, softplus):
    """Of the output and of the last state, for every argument."""

    def function(*inputs):
        return selective_scan_fn(*inputs, delta_softplus=softplus, return_last_state=True)

    assert torch.autograd.gradcheck(function, scan_inputs(form=form, is_complex=is_complex, L=4))


def test_gradients_of_a_real_constant_matrix_beside_a_complex_A():
    inputs = scan_inputs(form="constant", is_complex=True, L=4)
    inputs[3] = inputs[3].detach().real.clone().requires_grad_()
    assert torch.autograd.gradcheck(selective_scan_fn, inputs)


def test_gradients_where_torchs_softplus_is_a_line():
    """From 20 on."""
    inputs = scan_inputs(L=5)
    inputs[1] = torch.linspace(18, 23, inputs[1].numel(), dtype=torch.float64).view_as(inputs[1]).requires_grad_()
    pairs = [
        torch.autograd.grad(function(*inputs, delta_softplus=True).sum(), inputs)
        for function in (selective_scan_fn, selective_scan_ref)
    ]
    for grad, expected in zip(*pairs):
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("operation", ["scan", "mixer", "block", "norm"])
def test_the_gradient_of_a_sum(operation):
    """Expanded, of one number for all."""
    xz, ahead, behind = mixer_inputs(D=32, dtype=torch.float32)
    hidden, in_proj, out_proj = (torch.randn(s, requires_grad=True) for s in ((2, 5, 32), (64, 32), (32, 32)))
    scanned, weight = scan_inputs(dtype=torch.float32), torch.ones(64, requires_grad=True)
    out, inputs = {
        "scan": lambda: (selective_scan_fn(*scanned, True), scanned),
        "mixer": lambda: (bimamba(xz, ahead, behind), (xz, *ahead, *behind)),
        "block": lambda: (
            bimamba_block(hidden, in_proj, out_proj, ahead, behind), (hidden, in_proj, out_proj, *ahead, *behind)
        ),
        "norm": lambda: (rms_norm_fn(xz, weight, None), (xz, weight)),
    }[operation]()  # fmt: skip
    ones = torch.ones(()).expand_as(out)
    grads = [torch.autograd.grad(out, inputs, dout, retain_graph=True) for dout in (ones, ones.contiguous())]
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("default", [torch.float64, BF16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("operation", ["scan", "mixer", "block", "layer norm", "rms norm"])
def test_torchs_default_dtype_changes_nothing(operation, dtype, default, default_dtype):
    """Kernels write into buffers of their own dtype, not of the one that tensors are made in by default."""
    scanned, (_, *sides) = scan_inputs(D=32, dtype=torch.float32), mixer_inputs(D=32, dtype=torch.float32)
    draws = {shape: torch.randn(shape) for shape in ((2, 5, 64), (2, 5, 32), (64, 32), (32, 32), (64,))}

    def run():
        xz, hidden, in_proj, out_proj, weight = (draw.to(dtype).requires_grad_() for draw in draws.values())
        u = scanned[0].detach().to(dtype).requires_grad_()
        out, inputs = {
            "scan": lambda: (selective_scan_fn(u, *scanned[1:], True, return_last_state=True), (u, *scanned[1:])),
            "mixer": lambda: ([bimamba(xz, *sides)], (xz, *sides[0], *sides[1])),
            "block": lambda: ([bimamba_block(hidden, in_proj, out_proj, *sides)], (hidden, in_proj, out_proj)),
            "layer norm": lambda: (layer_norm_fn(xz, weight, weight, prenorm=True), (xz, weight)),
            "rms norm": lambda: (rms_norm_fn(xz, weight, None, prenorm=True), (xz, weight)),
        }[operation]()
        return *out, *torch.autograd.grad([one.float().square().sum() for one in out], inputs)

    right = run()
    default_dtype(default)
    found = run()
    for one, expected in zip(found, right):
        assert one.dtype == expected.dtype and torch.equal(one, expected)


@pytest.mark.parametrize("transformed", [False, True], ids=["autograd", "torch.func"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_block_of_logarithms_is_that_of_their_A(dtype, transformed):
    _, *sides = mixer_inputs(D=32, dtype=dtype)
    sides = [DirectionParameters(*(p.detach() for p in side)) for side in sides]
    projected = [torch.randn(s, dtype=dtype) for s in ((2, 5, 32), (64, 32), (32, 32))]

    def loss(A_log, A_b_log, decay):
        with_A = [A_log, A_b_log] if decay == "log" else [-torch.exp(A_log), -torch.exp(A_b_log)]
        directions = (side._replace(A=A) for side, A in zip(sides, with_A))
        return bimamba_block(*projected, *directions, decay=decay).square().sum()

    def gradients(decay):
        A_logs = [torch.log(-side.A).requires_grad_(not transformed) for side in sides]
        if transformed:
            return torch.func.grad(lambda both: loss(*both, decay))(A_logs)
        return torch.autograd.grad(loss(*A_logs, decay), A_logs)

    torch.testing.assert_close(gradients("log"), gradients("A"))
    with pytest.raises(ValueError, match="decay='A_log' is unknown: use one of 'A', 'log'"):
        bimamba_block(*projected, *sides, decay="A_log")


@pytest.mark.parametrize("operation", ["mixer", "block"])
def test_tensors_of_any_strides_are_read(operation):
    """Tokens side by side where channels are expected, and parameters that are views."""
    xz, ahead, behind = mixer_inputs(D=32, dtype=torch.float32)
    hidden, in_proj, out_proj = (torch.randn(s) for s in ((2, 5, 32), (64, 32), (32, 32)))

    def apart(tensor):
        return tensor.detach().transpose(-1, -2).contiguous().transpose(-1, -2) if tensor.dim() > 1 else tensor.detach()

    def run(form):
        sides = [DirectionParameters(*(form(p).requires_grad_() for p in side)) for side in (ahead, behind)]
        x = form(xz if operation == "mixer" else hidden).requires_grad_()
        y = bimamba(x, *sides) if operation == "mixer" else bimamba_block(x, form(in_proj), form(out_proj), *sides)
        return y, *torch.autograd.grad(y.square().sum(), (x, *sides[0], *sides[1]))

    for got, want in zip(run(apart), run(lambda tensor: tensor.detach().clone())):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("conv_bias", [True, False])
def test_mixer_gradients(conv_bias):
    xz, ahead, behind = mixer_inputs(conv_bias=conv_bias)
    tensors = [t for t in (xz, *ahead, *behind) if t is not None]

    def function(*tensors):
        given = iter(tensors[1:])
        sides = (DirectionParameters(*(None if p is None else next(given) for p in side)) for side in (ahead, behind))
        return bimamba(tensors[0], *sides, scale=0.5)

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("is_rms_norm", [True, False])
@pytest.mark.parametrize("prenorm", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_norm_gradients(is_rms_norm, prenorm, with_residual):
    torch.manual_seed(0)
    x, residual = (torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inputs = [x, weight, bias, *([residual] if with_residual else [])]

    def function(x, weight, bias, residual=None):
        return layer_norm_fn(x, weight, bias, residual, 1e-5, prenorm, is_rms_norm=is_rms_norm)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("operation", ["scan", "mixer", "norm", "block"])
def test_second_derivatives_are_refused_in_words(operation):
    """When they are asked for: a graph of the first ones alone is no harm."""
    xz, *sides = mixer_inputs(dtype=torch.float32)
    x, weight = torch.randn(3, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    if operation == "scan":
        out, given = selective_scan_fn(*(inputs := scan_inputs(dtype=torch.float32))), inputs[0]
    elif operation == "norm":
        out, given = rms_norm_fn(x, weight, None), x
    elif operation == "mixer":
        out, given = bimamba(xz, *sides), xz
    else:
        layer, given = Mamba(16, d_state=4, bimamba_type="v2"), torch.randn(1, 5, 16, requires_grad=True)
        out = layer(given)
    first = torch.autograd.grad(out.square().sum(), given, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match=r"first derivatives alone.* Mamba\(use_fast_path=False\)"):
        torch.autograd.grad(first.square().sum(), given)


# --- registration


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["constant", "token", "grouped"])
def test_scan_registration(form, dtype):
    inputs = scan_inputs(form=form, dtype=dtype)
    torch.library.opcheck(torch.ops.mamba_ssm.selective_scan.default, (*inputs, True, True))
    torch.library.opcheck(torch.ops.mamba_ssm.selective_scan.default, (*inputs[:5], None, None, None, False, True))
    plain = [t.detach() for t in inputs]
    saved = torch.ops.mamba_ssm.selective_scan(*plain, True, True)[2]
    arguments = (torch.randn_like(plain[0]), None, *plain, saved, True)
    torch.library.opcheck(torch.ops.mamba_ssm.selective_scan_backward.default, arguments)


@pytest.mark.parametrize("A_dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("dtype", [BF16, torch.float32, torch.float64], ids=str)
def test_scan_registration_of_mixed_dtypes(dtype, A_dtype):
    """The state is as wide as u, in float32 at least, and complex with A."""
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    u, delta, A, B, C, D, z, bias = (t.detach() for t in scan_inputs(is_complex=A_dtype.is_complex))
    plain = [u.to(dtype), delta.to(dtype), A.to(A_dtype), B.float(), C.float(), D.float(), z.to(dtype), bias.float()]
    inputs = [t.clone().requires_grad_() for t in plain]
    torch.library.opcheck(torch.ops.mamba_ssm.selective_scan.default, (*inputs, True, True), test_utils=tests)
    out, last_state, saved = torch.ops.mamba_ssm.selective_scan(*plain, True, True)
    arguments = (torch.randn_like(out), torch.randn_like(last_state), *plain, saved, True)
    torch.library.opcheck(torch.ops.mamba_ssm.selective_scan_backward.default, arguments, test_utils=tests)


@pytest.mark.parametrize("conv_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixer_registration(dtype, conv_bias):
    xz, ahead, behind = mixer_inputs(dtype=dtype, conv_bias=conv_bias)
    torch.library.opcheck(torch.ops.mamba_ssm.bimamba.default, (xz, *ahead, *behind, 0.5, True))
    xz, *plain = (None if t is None else t.detach() for t in (xz, *ahead, *behind))
    y, saved = torch.ops.mamba_ssm.bimamba(xz, *plain, 0.5, True)
    arguments = (torch.randn_like(y), xz, *plain, saved, 0.5)
    torch.library.opcheck(torch.ops.mamba_ssm.bimamba_backward.default, arguments)


@needs_block
@pytest.mark.parametrize("bf16_products", [False, True])
def test_block_registration(bf16_products):
    _, ahead, behind = mixer_inputs(D=32, dtype=torch.float32)
    hidden, in_proj, out_proj = (torch.randn(s, requires_grad=True) for s in ((2, 5, 32), (64, 32), (32, 32)))
    arguments = (hidden, in_proj, out_proj, *ahead, *behind, 0.5, bf16_products, True)
    torch.library.opcheck(torch.ops.mamba_ssm.bimamba_block.default, arguments)
    plain = [None if t is None else t.detach() for t in (hidden, in_proj, out_proj, *ahead, *behind)]
    out, xz, saved = torch.ops.mamba_ssm.bimamba_block(*plain, 0.5, bf16_products, True)
    arguments = (torch.randn_like(out), *plain, xz, saved, 0.5, bf16_products)
    torch.library.opcheck(torch.ops.mamba_ssm.bimamba_block_backward.default, arguments)


@pytest.mark.parametrize("save", [False, True])
def test_a_graph_of_the_cpu_kernels_runs_where_they_are_not(save, monkeypatch):
    """An exported model holds the operation for good; bfloat16 products are allowed there, not asked for."""
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "reference")
    _, ahead, behind = mixer_inputs(D=32, dtype=torch.float32)
    hidden, in_proj, out_proj = (torch.randn(s, requires_grad=True) for s in ((2, 5, 16), (64, 16), (16, 32)))
    leaves = [t for t in (hidden, in_proj, out_proj, *ahead, *behind) if t is not None]
    out, *_ = torch.ops.mamba_ssm.bimamba_block(hidden, in_proj, out_proj, *ahead, *behind, 0.5, True, save)
    expected = F.linear(bimamba(F.linear(hidden, in_proj), ahead, behind), out_proj)
    torch.testing.assert_close(out, expected)
    if save:
        dout = torch.randn_like(out)
        for got, want in zip(*(torch.autograd.grad(one, leaves, dout) for one in (out, expected))):
            torch.testing.assert_close(got, want)


def test_a_graph_for_a_gpu_in_16_bits_is_refused_elsewhere_in_words():
    _, ahead, behind = mixer_inputs(D=32, dtype=torch.float32)
    hidden, in_proj, out_proj = (torch.randn(s) for s in ((2, 5, 16), (64, 16), (16, 32)))
    with pytest.raises(RuntimeError, match=r"cannot run on cpu by .*: compile or export the model again"):
        torch.ops.mamba_ssm.bimamba_half_block(hidden, in_proj, out_proj, *ahead, *behind, 0.5, "A")


@needs_block
def test_block_counts_the_flops_of_its_parts():
    _, ahead, behind = mixer_inputs(D=32, dtype=torch.float32)
    hidden, in_proj, out_proj = (torch.randn(s, requires_grad=True) for s in ((2, 5, 16), (64, 16), (16, 32)))

    def flops(function):
        with FlopCounterMode(display=False) as counter:
            function().sum().backward()
        return counter.get_total_flops()

    whole = flops(lambda: bimamba_block(hidden, in_proj, out_proj, ahead, behind))
    parts = flops(lambda: F.linear(bimamba(F.linear(hidden, in_proj), ahead, behind), out_proj))
    assert whole == parts


@needs_block
@pytest.mark.parametrize(("dtype", "allowed"), [(BF16, True), (torch.float16, False)], ids=str)
def test_a_block_may_multiply_in_bfloat16_where_autocast_says_so(dtype, allowed, monkeypatch):
    given, block = [], bimamba_ops.block
    monkeypatch.setattr(bimamba_ops, "block", lambda *values: (given.append(values[-2]), block(*values))[1])
    _, ahead, behind = mixer_inputs(D=32, dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        bimamba_block(torch.randn(2, 5, 16), torch.randn(64, 16), torch.randn(16, 32), ahead, behind)
    assert given == [allowed]


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("with_residual", [True, False])
def test_norm_registration(kind, with_residual):
    x, residual = (torch.randn(5, 8, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(8, requires_grad=True) for _ in range(2))
    residual, bias = (residual if with_residual else None), (bias if kind == "layer" else None)
    arguments = (x, residual, weight, bias, 1e-5, kind, torch.float32)
    torch.library.opcheck(torch.ops.mamba_ssm.add_norm.default, arguments)
    out, total, mean, rstd = (t.detach() for t in torch.ops.mamba_ssm.add_norm(*arguments))
    residual_dtype = torch.float32 if with_residual else None
    arguments = (torch.randn_like(out), total, total, weight.detach(), bias, mean, rstd, kind, x.dtype, residual_dtype)
    arguments = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in arguments)
    torch.library.opcheck(torch.ops.mamba_ssm.add_norm_backward.default, arguments)


def test_flops_count_both_directions():
    B, L, D, N, R, W = 2, 50, 32, 16, 4, 4
    xz, ahead, behind = mixer_inputs(B, L, D, N, R, W, torch.float32)
    with FlopCounterMode(display=False) as counter:
        y = bimamba(xz, ahead, behind)
    one_direction = B * L * D * (2 * W + 2 * (R + 2 * N) + 2 * R + 9 * N)
    assert counter.get_total_flops() == 2 * one_direction
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 4 * one_direction


def test_flops_of_a_scan():
    B, L, D, N = 2, 50, 8, 4
    u = torch.randn(B, D, L, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = selective_scan_fn(u, torch.rand(B, D, L), -torch.rand(D, N), *torch.randn(2, B, N, L))
    assert counter.get_total_flops() == 9 * B * L * D * N
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 9 * B * L * D * N


# --- symmetries


@given(length=st.integers(1, 40), prefix=st.integers(1, 40), seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_a_prefix_of_the_output_depends_on_a_prefix_of_the_input(length, prefix, seed):
    prefix = min(prefix, length)
    torch.manual_seed(seed)
    u, delta, B, C = (
        torch.randn(1, 4, length),
        torch.randn(1, 4, length),
        torch.randn(1, 2, length),
        torch.randn(1, 2, length),
    )
    A = -torch.rand(4, 2)
    whole = selective_scan_fn(u, delta, A, B, C, delta_softplus=True)
    part = selective_scan_fn(
        *(t[..., :prefix] for t in (u, delta)), A, B[..., :prefix], C[..., :prefix], delta_softplus=True
    )
    torch.testing.assert_close(part, whole[..., :prefix], rtol=1e-4, atol=1e-5)


@given(batch=st.integers(1, 3), length=st.integers(1, 40), seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_exchanging_the_directions_reverses_time(batch, length, seed):
    torch.manual_seed(seed)
    xz = torch.randn(batch, length, 16)
    _, ahead, behind = mixer_inputs(D=8, dtype=torch.float32)
    with torch.no_grad():
        y = bimamba(xz, ahead, behind)
        mirrored = bimamba(xz.flip(1), behind, ahead).flip(1)
        shuffled = bimamba(xz.flip(0), ahead, behind).flip(0)
    torch.testing.assert_close(y, mirrored, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y, shuffled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_scans_result_of_one_token_may_be_changed_in_place(dtype):
    u = torch.randn(1, 6, 1, dtype=dtype, requires_grad=True)
    matrix, A = torch.ones(1, 4, 1, dtype=dtype), -torch.ones(6, 4, dtype=dtype)
    out = selective_scan_fn(u, u.detach().abs(), A, matrix, matrix)
    out += 1
    out.sum().backward()
    assert torch.isfinite(u.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_may_be_changed_in_place(dtype):
    """A result that is a view of what the kernel wrote would be refused by autograd."""
    inputs = scan_inputs(dtype=dtype)
    out = selective_scan_fn(*inputs, delta_softplus=True)
    out += inputs[0]
    xz, ahead, behind = mixer_inputs(dtype=dtype)
    y = bimamba(xz, ahead, behind)
    y += xz[..., : y.shape[-1]]
    in_proj, out_proj = torch.randn(12, 12, dtype=dtype), torch.randn(12, 6, dtype=dtype)
    block = bimamba_block(xz, in_proj, out_proj, ahead, behind)
    block += xz
    norm = rms_norm_fn(xz, torch.ones(xz.shape[-1], dtype=xz.dtype), None)
    norm += xz
    (out.sum() + y.sum() + block.sum() + norm.sum()).backward()
    assert torch.isfinite(inputs[0].grad).all() and torch.isfinite(xz.grad).all()


# --- precision


@pytest.mark.parametrize(("dtype", "wide"), [(BF16, torch.float32), (torch.float64, torch.float64)], ids=str)
def test_A_is_at_least_float32_whatever_its_logarithm_is(dtype, wide):
    A_log = torch.randn(4, 3).to(dtype)
    for A in (negative_exp(A_log), *negative_exps([A_log, A_log])):
        torch.testing.assert_close(A, -A_log.to(wide).exp(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_keep_a_float32_state(dtype):
    inputs = [t.detach() for t in scan_inputs(L=197, dtype=torch.float32)]
    low = [t.to(dtype) if i in (0, 1, 3, 4, 6) else t for i, t in enumerate(inputs)]
    out, state = selective_scan_fn(*low, delta_softplus=True, return_last_state=True)
    exact, exact_state = selective_scan_ref(*(t.double() for t in low), delta_softplus=True, return_last_state=True)
    assert out.dtype == dtype and state.dtype == torch.float32
    assert (out - exact).abs().max() <= 6e-3 * exact.abs().max()
    assert (state - exact_state).abs().max() <= 2e-5 * exact_state.abs().max()


def test_autocast_leaves_float64_alone(monkeypatch, emulated_cuda):
    """As on a GPU, whose block runs in autocast's 16 bits."""
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "cuda")
    _, ahead, _ = mixer_inputs(D=32, N=16, R=4, W=4, dtype=torch.float32)
    with torch.autocast("cpu", BF16):
        assert _half_block_dtype(torch.zeros(2, 5, 16), ahead) == BF16
        assert _half_block_dtype(torch.zeros(2, 5, 16, dtype=torch.float64), ahead) is None


def test_the_residual_stream_is_float32():
    norm = RMSNorm(16)
    x = torch.randn(2, 3, 16).bfloat16()
    out, residual = norm(x, prenorm=True, residual_in_fp32=True)
    assert out.dtype == torch.bfloat16 and residual.dtype == torch.float32
    out, residual = norm(out, residual, prenorm=True)
    assert out.dtype == torch.bfloat16 and residual.dtype == torch.float32


# --- errors


@pytest.mark.parametrize(
    "position, value, words",
    [
        (0, torch.zeros(2, 6, 0), "at least 1"),
        (0, torch.zeros(2, 6, 7, dtype=torch.int32), "int32"),
        (1, torch.zeros(2, 6, 8), "delta"),
        (2, torch.zeros(5, 4), "same D"),
        (1, torch.zeros(2, 6, 7, dtype=torch.complex64), "delta has dtype torch.complex64"),
        (3, torch.zeros(2, 4, 8), "B must be"),
        (3, torch.zeros(2, 0, 4, 7), "G dividing D"),
        (4, torch.zeros(2, 4, 7, dtype=torch.complex64), "C has dtype torch.complex64: .* or a complex A"),
        (6, torch.zeros(2, 6, 7, dtype=torch.int64), "z has dtype torch.int64"),
        (4, torch.zeros(2, 4, 4, 7), "G dividing D"),
        (5, torch.zeros(7), "D must have"),
        (7, torch.zeros(6, device="meta"), "meta"),
    ],
)
def test_bad_scan_arguments(position, value, words):
    inputs = [t.detach() for t in scan_inputs(dtype=torch.float32)]
    inputs[position] = value
    with pytest.raises(ValueError, match=words):
        selective_scan_fn(*inputs)


def test_a_scan_without_channels_is_refused():
    none = torch.zeros(2, 0, 7)
    with pytest.raises(ValueError, match=r"u \(2, 0, 7\) holds no channel: D must be at least 1"):
        selective_scan_fn(none, none, torch.zeros(0, 4), torch.zeros(2, 4, 7), torch.zeros(2, 4, 7))


@pytest.mark.parametrize("position, shape", [(3, (2, 4, 7)), (4, (2, 2, 4, 7)), (2, (6, 4, 1))])
def test_complex_per_token_matrices_are_refused(position, shape):
    inputs = [t.detach() for t in scan_inputs(is_complex=True)]
    inputs[position] = torch.zeros(shape, dtype=torch.complex64)
    words = "with the same D" if position == 2 else r"complex64: per token it is floating point \(..., 2 L\)"
    with pytest.raises(ValueError, match=words):
        selective_scan_fn(*inputs)


@pytest.mark.parametrize("name", ["B", "C"])
def test_a_bias_of_a_matrix_that_x_proj_does_not_give_is_refused(name):
    D, N, R = 4, 2, 1
    arguments = (torch.zeros(1, 2 * D, 5), torch.zeros(D, 3), None, torch.zeros(R + N, D), torch.zeros(D, R))
    options = {name: torch.zeros(D, N), f"{name}_proj_bias": torch.zeros(N)}
    with pytest.raises(ValueError, match=f"{name}_proj_bias .*: leave it out beside a constant {name}"):
        mamba_inner_fn_no_out_proj(*arguments, -torch.ones(D, N), **options)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"xz": torch.zeros(1, 15, 5)}, r"xz must be \(B, 2 D, L\), .* D = 8 as A, not \(1, 15, 5\)"),
        ({"xz": torch.zeros(1, 16, 0)}, "with L >= 1"),
        ({"xz": torch.zeros(1, 16, 5, dtype=torch.int64)}, "floating point, .* of torch.int64"),
        (
            {"conv1d_weight": torch.zeros(4, 2, 4)},
            r"conv1d_weight must be \(8, 1, W\) or \(8, W\) with W >= 1, not \(4, 2, 4\)",
        ),
        ({"x_proj_weight": torch.zeros(9, 8)}, r"x_proj_weight must be \(11, 8\), R = 3 rows .* not \(9, 8\)"),
        ({"x_proj_weight": torch.zeros(20, 8)}, r"x_proj_weight must be \(11, 8\)"),
        ({"x_proj_weight": torch.zeros(9, 8), "B": torch.zeros(8, 4)}, r"must be \(7 or 11, 8\)"),
        ({"delta_proj_weight": torch.zeros(3, 8)}, r"delta_proj_weight must be \(8, R\), not \(3, 8\)"),
        ({"A": -torch.ones(8)}, r"A must be \(D, N\), not \(8,\)"),
        ({"A_b": -torch.ones(8, 4, dtype=torch.complex64)}, r"A_b must be \(8, 4\) of torch.float32 as A, not"),
        ({"conv1d_weight": torch.zeros(8, 0)}, "with W >= 1"),
        ({"conv1d_weight": torch.zeros(8, 4, device="meta")}, "conv1d_weight is on meta and xz on cpu"),
        ({"conv1d_weight": torch.zeros(8, 4, dtype=torch.int64)}, "conv1d_weight has dtype torch.int64"),
        ({"conv1d_bias": torch.zeros(8, device="meta")}, "conv1d_bias is on meta"),
        ({"conv1d_bias": torch.zeros(7)}, r"conv1d_bias must be \(8,\), not \(7,\)"),
        ({"x_proj_weight": torch.zeros(11, 8, dtype=torch.complex64)}, "x_proj_weight has dtype torch.complex64"),
        ({"delta_proj_weight": torch.zeros(8, 3, device="meta")}, "delta_proj_weight is on meta"),
        ({"out_proj_weight": torch.zeros(6, 8, device="meta")}, "out_proj_weight is on meta"),
        ({"out_proj_weight": torch.zeros(8)}, r"out_proj_weight must be \(E, 8\), not \(8,\)"),
        ({"out_proj_weight": torch.zeros(6, 7)}, r"out_proj_weight must be \(E, 8\), not \(6, 7\)"),
        ({"B_proj_bias": torch.zeros(1)}, r"B_proj_bias must be \(4,\), not \(1,\)"),
        ({"out_proj_bias": torch.zeros(1)}, r"out_proj_bias must be \(6,\), not \(1,\)"),
        ({"out_proj_weight": None, "out_proj_bias": torch.zeros(6)}, "out_proj_bias is given without out_proj_weight"),
    ],
)
@pytest.mark.parametrize("name", ["bimamba_inner_fn", "bimamba_inner_ref"])
def test_bad_arguments_of_a_whole_mixer(name, change, words):
    arguments = {
        "xz": torch.zeros(1, 16, 5), "conv1d_weight": torch.zeros(8, 1, 4), "conv1d_bias": None,
        "x_proj_weight": torch.zeros(11, 8), "delta_proj_weight": torch.zeros(8, 3),
        "out_proj_weight": torch.zeros(6, 8), "out_proj_bias": None, "A": -torch.ones(8, 4), "A_b": -torch.ones(8, 4),
    }  # fmt: skip
    function = getattr(selective_scan_interface, name)
    assert function(**arguments).shape == (1, 5, 6)
    with pytest.raises(ValueError, match=words):
        function(**arguments | change)


def test_norms_of_falcon_mamba_are_refused_not_left_out():
    x = torch.zeros(1, 16, 5)
    with pytest.raises(NotImplementedError, match=r"^b_rms_weight, dt_rms_weight: this mixer has no norms"):
        selective_scan_interface.mamba_inner_fn(x, *(x,) * 4, None, None, x, b_rms_weight=x, dt_rms_weight=x)


@pytest.mark.parametrize("name", ["bimamba_inner_fn", "bimamba_inner_ref"])
def test_a_second_direction_needs_its_decay(name):
    """Without it there would be one direction alone."""
    x = torch.zeros(1, 16, 5)
    with pytest.raises(TypeError, match="A_b must be a tensor, not None"):
        getattr(selective_scan_interface, name)(x, *(x,) * 4, None, None, x, None)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x: selective_scan_fn(x.tolist(), x, x, x, x), "u must be a tensor, not list"),
        (lambda x: selective_scan_fn(x, x, x, None, x), "B must be a tensor, not None"),
        (lambda x: selective_scan_fn(x, x, x, x, x, D=1.0), "D must be a tensor or None, not float"),
        (lambda x: selective_state_update(x, x, x, x, x, x, z=x.numpy()), "z must be a tensor or None, not ndarray"),
        (lambda x: layer_norm_fn(x, "weight", None), "weight must be a tensor, not str"),
        (
            lambda x: selective_scan_interface.mamba_inner_fn(x, x, 0, x, x, None, None, x),
            "conv1d_bias must be a tensor",
        ),
        (
            lambda x: selective_scan_interface.mamba_inner_fn(x, None, x, x, x, None, None, x),
            "conv1d_weight .* not None",
        ),
    ],
)
def test_what_is_no_tensor_is_named(call, words):
    with pytest.raises(TypeError, match=words):
        call(torch.zeros(2, 2, 2))


@pytest.mark.parametrize("name", ["mamba_inner_no_out_proj_ref", "mamba_inner_ref", "bimamba_inner_ref"])
def test_references_have_the_signature_of_their_functions(name):
    reference = getattr(selective_scan_interface, name)
    function = name.replace("_ref", "_fn") if "no_out_proj" not in name else "mamba_inner_fn_no_out_proj"
    function = getattr(selective_scan_interface, function)
    assert reference.__name__ == name and function.__name__ in reference.__doc__
    assert inspect.signature(reference) == inspect.signature(function)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"conv_bias": None}, "conv_bias is given for one direction only: give it for both, or for neither"),
        ({"dt_bias": None}, "dt_bias is None: only conv_bias may be"),
        ({"conv_weight": torch.zeros(32, 1, 3)}, r"conv_weight must .*not \(32, 1, 3\)"),
        ({"x_proj_weight": torch.zeros(8)}, r"x_proj_weight must .*not \(8,\)"),
        ({"dt_weight": torch.zeros(32)}, r"dt_weight must .*not \(32,\)"),
        ({"A": torch.zeros(32)}, r"A must .*not \(32,\)"),
        ({"D": torch.zeros(())}, r"D must have shape \(32,\), not \(\)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("operation", ["mixer", "block"])
def test_bad_parameters_of_a_direction(operation, side, change, words):
    xz, *sides = mixer_inputs(D=32, dtype=torch.float32)
    sides[side] = sides[side]._replace(**change)
    with pytest.raises(ValueError, match=words):
        if operation == "mixer":
            bimamba(xz, *sides)
        else:
            bimamba_block(torch.zeros(2, 5, 16), torch.zeros(64, 16), torch.zeros(16, 32), *sides)


def update_arguments(heads=None):
    """state, x, dt, A, B, C, D, z, dt_bias: 2 sequences, 6 channels (of each head), 4 states, in 2 groups if any."""
    lead, groups = ((heads,), (2,)) if heads else ((), ())
    vector = (*lead, 6)
    shapes = ((2, *vector, 4), (2, *vector), (2, *vector), (*vector, 4), (2, *groups, 4), (2, *groups, 4), vector)
    names = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")
    return {name: torch.ones(shape) for name, shape in zip(names, (*shapes, (2, *vector), vector))}


@pytest.mark.parametrize("heads", [None, 4])
@pytest.mark.parametrize("name", ["state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias"])
@pytest.mark.parametrize("fault", ["shape", "dtype", "device"])
def test_bad_update_arguments(fault, name, heads):
    arguments = update_arguments(heads)
    right = arguments[name]
    arguments[name] = {"shape": right.flatten(), "dtype": right.int(), "device": right.to("meta")}[fault]
    if right.dim() == 1 and fault == "shape":
        arguments[name] = right[1:]
    with pytest.raises(ValueError, match=f"{name} "):
        selective_state_update(**arguments)


@pytest.mark.parametrize("groups", [0, 3, 8])
@pytest.mark.parametrize("name", ["B", "C"])
def test_groups_of_an_update_divide_its_heads(name, groups):
    arguments = update_arguments(heads=4) | {name: torch.ones(2, groups, 4)}
    with pytest.raises(ValueError, match=rf"{name} must be \(B, groups, N\) .*, not \(2, {groups}, 4\)"):
        selective_state_update(**arguments)


def test_an_update_is_computed_in_the_widest_dtype():
    torch.manual_seed(0)
    arguments = {name: torch.rand_like(tensor, dtype=torch.float64) for name, tensor in update_arguments().items()}
    narrow = {name: tensor if name == "state" else tensor.float() for name, tensor in arguments.items()}
    narrow["state"] = narrow["state"].clone()
    out = selective_state_update(**narrow)
    wide = {name: tensor if name == "state" else narrow[name].double() for name, tensor in arguments.items()}
    expected = selective_state_update(**wide)
    assert out.dtype == torch.float32 and torch.equal(narrow["state"], wide["state"])
    torch.testing.assert_close(out, expected.float())


def test_bad_mixer_arguments():
    xz, ahead, behind = mixer_inputs()
    with pytest.raises(ValueError, match="L >= 1"):
        bimamba(xz[:, :0], ahead, behind)
    with pytest.raises(ValueError, match="backward dt_bias"):
        bimamba(xz, ahead, behind._replace(dt_bias=behind.dt_bias[:-1]))
    with pytest.raises(ValueError, match="xz has dtype"):
        bimamba(xz.detach().int(), ahead, behind)
    with pytest.raises(ValueError, match="forward A has dtype"):
        bimamba(xz, ahead._replace(A=torch.complex(ahead.A, ahead.A)), behind)
    with pytest.raises(ValueError, match="forward D is on meta"):
        bimamba(xz, ahead._replace(D=ahead.D.to("meta")), behind)
    with pytest.raises(ValueError, match="'v3'"):
        Mamba(16, bimamba_type="v3")
    with pytest.raises(TypeError, match="d_stat"):
        Mamba(16, d_stat=4)
    with pytest.raises(NotImplementedError, match="bidirectional"):
        Mamba(16, bimamba_type="v2").allocate_inference_cache(1, 8)


@pytest.mark.parametrize(
    "position, value, words",
    [
        (0, torch.zeros(2, 0, 32), "L >= 1"),
        (0, torch.zeros(5, 32), "hidden must be"),
        (0, torch.zeros(2, 5, 32, dtype=torch.int32), "hidden has dtype torch.int32"),
        (1, torch.zeros(63, 32), "in_proj's weight must have shape"),
        (1, torch.zeros(64, 32, device="meta"), "in_proj's weight is on meta"),
        (2, torch.zeros(32, 32, device="meta"), "out_proj's weight is on meta"),
    ],
)
def test_bad_block_arguments(position, value, words):
    _, ahead, behind = mixer_inputs(D=32, dtype=torch.float32)
    arguments = [torch.zeros(2, 5, 32), torch.zeros(64, 32), torch.zeros(32, 32)]
    arguments[position] = value
    for autocast in (False, True):
        with torch.autocast("cpu", BF16, enabled=autocast), pytest.raises(ValueError, match=words):
            bimamba_block(*arguments, ahead, behind)


@pytest.mark.parametrize(
    "position, value, words",
    [
        (0, torch.zeros(3, 8, dtype=torch.int32), "x has dtype torch.int32"),
        (0, torch.zeros(3, 7), "must end in the width"),
        (1, torch.zeros(8, device="meta"), "weight is on meta"),
        (2, torch.zeros(7), r"bias must have shape \(8,\)"),
        (3, torch.zeros(2, 8), r"residual must have shape \(3, 8\)"),
        (3, torch.zeros(3, 8, device="meta"), "residual is on meta"),
    ],
)
def test_bad_norm_arguments(position, value, words):
    arguments = [torch.zeros(3, 8), torch.ones(8), torch.zeros(8), torch.zeros(3, 8)]
    arguments[position] = value
    for function in (layer_norm_fn, layer_norm_ref):
        with pytest.raises(ValueError, match=words):
            function(*arguments)


def test_an_empty_batch_gives_an_empty_result():
    xz, ahead, behind = mixer_inputs(D=32, dtype=torch.float32)
    y = bimamba(xz[:0], ahead, behind)
    y.sum().backward()
    assert y.shape == (0, 5, 32) and not ahead.A.grad.any()
    block = bimamba_block(torch.zeros(0, 5, 32), torch.zeros(64, 32), torch.zeros(32, 32), ahead, behind)
    assert block.shape == (0, 5, 32)
    inputs = [t.detach()[:0] if t.dim() == 3 else t.detach() for t in scan_inputs(dtype=torch.float32)]
    assert selective_scan_fn(*inputs).shape == (0, 6, 7)


def test_backward_without_saved_tensors():
    inputs = scan_inputs(dtype=torch.float32)
    out = torch.ops.mamba_ssm.selective_scan(*inputs, True, False)[0]
    kernels = backend.choose("selective_scan", out.device, out.dtype, d_state=4)
    if kernels.selective_scan_saved_bytes(2, 6, 7, 4, torch.float32) == 0:
        pytest.skip("this backend recomputes everything")
    with pytest.raises(RuntimeError, match="save=True"):
        out.sum().backward()


@needs_block
@pytest.mark.parametrize("operation", ["bimamba", "bimamba_block"])
def test_backward_of_a_mixer_without_saved_tensors(operation):
    """The kernels would read behind an empty tensor."""
    xz, ahead, behind = mixer_inputs(L=200, D=32, dtype=torch.float32)
    if operation == "bimamba":
        out = torch.ops.mamba_ssm.bimamba(xz, *ahead, *behind, 0.5, False)[0]
    else:
        projected = torch.randn(2, 200, 16), torch.randn(64, 16), torch.randn(16, 32)
        out = torch.ops.mamba_ssm.bimamba_block(*projected, *ahead, *behind, 0.5, False, False)[0]
    with pytest.raises(RuntimeError, match="save=True"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scan", [selective_scan_fn, selective_scan_ref])
def test_complex_matrices_from_anywhere_in_memory(scan, dtype):
    """Interleaved parts that begin at an odd element, and in 16 bits, of which torch has no complex form."""
    torch.manual_seed(0)
    B, D, N, L = 1, 4, 2, 1
    u, delta = torch.randn(2, B, D, L, dtype=dtype).unbind()
    A = torch.complex(-torch.rand(D, N), torch.randn(D, N))
    buffer = torch.randn(1 + B * N * 2 * L, dtype=dtype, requires_grad=True)
    C = torch.randn(B, N, 2 * L, dtype=dtype)
    out = scan(u, delta, A, buffer[1:].view(B, N, 2 * L), C)
    aligned = scan(u, delta, A, buffer[1:].detach().clone().view(B, N, 2 * L), C)
    assert torch.equal(out, aligned)
    out.float().sum().backward()
    assert buffer.grad[0] == 0 and buffer.grad[1:].abs().min() > 0


@pytest.mark.parametrize("rank", [2, 4])
def test_a_block_of_16_bits_takes_wider_weights_and_no_other_does(rank):
    generator = torch.Generator().manual_seed(0)
    projections = [torch.randn(shape, generator=generator) / 8 for shape in ((64, 16), (16, 32))]
    sides = [direction(32, 16, rank, 4, torch.float32, seed, True) for seed in (1, 2)]
    sides = [DirectionParameters(*(p.detach() for p in side)) for side in sides]
    hidden = torch.randn(2, 5, 16, generator=generator)
    out = bimamba_block(hidden.bfloat16(), *projections, *sides)
    right = bimamba_block(hidden, *projections, *sides)
    assert out.dtype == BF16 and (out - right).abs().max() <= 0.03 * right.abs().max()
    with pytest.raises(ValueError, match=r"in_proj's weight is torch.bfloat16, hidden torch.float32: cast one of them"):
        bimamba_block(hidden, *(weight.bfloat16() for weight in projections), *sides)


@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_norms_gradient_is_that_of_the_unrounded_sum(kind, prenorm):
    """A residual of 16 bits, far from zero: its rounded sum does not have the statistics that forward used."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((50, 64), (64,), (64,)))
    residual, incoming = (torch.randn(50, 64, generator=generator) for _ in range(2))
    residual = (30 + residual).bfloat16()
    norm, norm_ref = (layer_norm_fn, layer_norm_ref) if kind == "layer" else (rms_norm_fn, rms_norm_ref)

    def gradients(norm, *inputs):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        out = norm(*leaves[:3], residual=leaves[3], prenorm=prenorm)
        out = out[0] if prenorm else out
        return torch.autograd.grad((out * incoming.to(out.dtype)).sum(), leaves)

    found = gradients(norm, x, weight, bias, residual)
    right = gradients(norm_ref, *(t.double() for t in (x, weight, bias, residual)))
    for grad, expected in zip(found[:3], right[:3]):
        assert (grad.double() - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("norm", [rms_norm_ref, layer_norm_ref])
def test_a_norm_without_residual_does_not_give_back_its_input(norm):
    x = torch.randn(3, 8)
    before = x.clone()
    _, total = norm(x, torch.ones(8), None, prenorm=True)
    total += 1
    assert torch.equal(x, before)
