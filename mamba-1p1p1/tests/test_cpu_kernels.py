"""The C++ kernels against the reference in float64: outputs and every gradient, over the sizes that hurt, for each
instruction set that this processor has. Tolerances: shared rule for all kernels, see `limit`.
"""

import ctypes
import re
import shutil

import pytest
import torch

from mamba_ssm.ops import cpu, reference
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

pytestmark = [
    pytest.mark.skipif(bool(cpu.unavailable_reason()), reason=str(cpu.unavailable_reason())),
    pytest.mark.usefixtures("poisoned"),
]

ISAS = cpu.available_isas() if not cpu.unavailable_reason() else ()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv(cpu.ISA_VARIABLE, request.param)
    return request.param


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def limit(io_dtype, is_activation=True):
    """Largest max|x - r| / max|r| against float64: above every right candidate, far below any wrong one."""
    return 6e-3 if is_activation and io_dtype == torch.bfloat16 else 2e-5


def check(name, actual, expected, tolerance):
    assert (actual is None) == (expected is None), name
    if expected is None:
        return
    assert actual.shape == expected.shape, name
    scale = expected.abs().max().item() or 1.0
    error = (actual.double() - expected.double()).abs().max().item() / scale
    assert error <= tolerance, f"{name}: {error:.2e} > {tolerance:.0e}"


def widened(tensors):
    return [None if t is None else t.double() for t in tensors]


# --- bidirectional mixer


def direction(D, N, R, W, seed, conv_bias):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator)

    A = -torch.arange(1.0, N + 1).repeat(D, 1) * torch.exp(normal(D, N, scale=0.1))
    return [
        normal(D, W, scale=0.5), normal(D) if conv_bias else None, normal(R + 2 * N, D, scale=D**-0.5),
        normal(D, R, scale=R**-0.5), normal(D) - 2, A, normal(D),
    ]  # fmt: skip


def check_mixer(B, L, D, N, R, W, dtype, conv_bias=True, scale=0.5):
    torch.manual_seed(0)
    wide = torch.randn(B, L + 1, 2 * D + 3).to(dtype)
    xz, dy = wide[:, 1:, 3:], torch.randn(B, L, D).to(dtype)  # rows neither dense nor aligned
    params = [direction(D, N, R, W, seed, conv_bias) for seed in (1, 2)]
    wide_params = [widened(p) for p in params]
    y, _ = reference.bimamba_forward(xz.double(), *wide_params, scale, False)
    dxz, *grads = reference.bimamba_backward(dy.double(), xz.double(), *wide_params, scale, None)
    for save in (False, True):
        mine, saved = cpu.bimamba_forward(xz, *params, scale, save)
        check(f"y, save={save}", mine, y, limit(dtype))
    assert saved.numel() == cpu.bimamba_saved_bytes(B, L, D, N, R, W, dtype)
    mine = cpu.bimamba_backward(dy, xz, *params, scale, saved)
    check("dxz", mine[0], dxz, limit(dtype))
    names = ("conv_weight", "conv_bias", "x_proj_weight", "dt_weight", "dt_bias", "A", "D")
    for side, actual, expected in zip(("forward", "backward"), mine[1:], grads):
        for name, got, want in zip(names, actual, expected):
            check(f"{side} d{name}", got, want, limit(dtype, is_activation=False))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("L", [1, 2, 63, 64, 65, 197])
def test_mixer_lengths(isa, L, dtype):
    check_mixer(B=3, L=L, D=40, N=16, R=12, W=4, dtype=dtype)


@pytest.mark.parametrize("L", [730, 1000])
def test_mixer_long(isa, L):
    check_mixer(B=1, L=L, D=48, N=16, R=12, W=4, dtype=torch.float32)


@pytest.mark.parametrize(
    "case",
    [
        {"D": 16, "N": 8, "R": 1, "W": 2},
        {"D": 37, "N": 5, "R": 2, "W": 3, "conv_bias": False},
        {"D": 20, "N": 33, "R": 70, "W": 4, "scale": 1.0},
        {"D": 1, "N": 1, "R": 1, "W": 4},
    ],
    ids=str,
)
def test_mixer_shapes(isa, case):
    check_mixer(B=2, L=70, dtype=torch.float32, **case)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("B", [1, 2, 3])
def test_mixer_threads(B, threads, dtype):
    """Whole items, directions that meet in the middle, and channel groups: however the work is dealt out."""
    torch.set_num_threads(threads)
    check_mixer(B=B, L=131, D=72, N=16, R=5, W=4, dtype=dtype)


def test_mixer_backward_repeats_bit_for_bit():
    torch.manual_seed(0)
    torch.set_num_threads(2)
    xz, dy = torch.randn(3, 100, 64), torch.randn(3, 100, 32)
    params = [direction(32, 16, 4, 4, seed, True) for seed in (1, 2)]
    saved = cpu.bimamba_forward(xz, *params, 0.5, True)[1]
    first, second = (cpu.bimamba_backward(dy, xz, *params, 0.5, saved) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for side in (1, 2) for a, b in zip(first[side], second[side]))


def test_workspace_left_by_another_call_does_not_matter():
    params = [direction(24, 16, 4, 4, seed, True) for seed in (1, 2)]
    poison = torch.full((2, 300, 48), float("nan"))
    cpu.bimamba_backward(poison[..., :24], poison, *params, 0.5, cpu.bimamba_forward(poison, *params, 0.5, True)[1])
    check_mixer(B=2, L=100, D=24, N=16, R=4, W=4, dtype=torch.float32)


# --- the mixer with its projections


def block_inputs(B, L, E, D):
    """hidden, dout, in_proj, out_proj."""
    torch.manual_seed(0)
    in_proj, out_proj = torch.randn(2 * D, E) * E**-0.5, torch.randn(E, D) * D**-0.5
    return torch.randn(B, L, E), torch.randn(B, L, E), in_proj, out_proj


def check_block(B, L, E, D, N=16, R=4, W=4, conv_bias=True, bf16_products=False):
    """With bf16_products on inputs that bfloat16 can hold, so that nothing but what is computed on the way is rounded:
    dxz where it is multiplied for dhidden and din_proj, y for dout_proj. All else must be as exact as float32."""
    hidden, dout, in_proj, out_proj = block_inputs(B, L, E, D)
    if bf16_products:
        hidden, dout, in_proj, out_proj = (t.bfloat16().float() for t in (hidden, dout, in_proj, out_proj))
    rounded = limit(torch.bfloat16 if bf16_products else torch.float32)
    params = [direction(D, N, R, W, seed, conv_bias) for seed in (1, 2)]
    wide_params = [widened(p) for p in params]
    wide_hidden, wide_dout, wide_in, wide_out = widened((hidden, dout, in_proj, out_proj))
    xz = wide_hidden @ wide_in.t()
    y, _ = reference.bimamba_forward(xz, *wide_params, 0.5, False)
    dxz, *grads = reference.bimamba_backward(wide_dout @ wide_out, xz, *wide_params, 0.5, None)
    for save in (False, True):
        out, mine_xz, saved = cpu.block_forward(hidden, in_proj, out_proj, *params, 0.5, save, bf16_products)
        check(f"out, save={save}", out, y @ wide_out.t(), limit(torch.float32))
    check("xz", mine_xz, xz, limit(torch.float32))
    mine = cpu.block_backward(dout, hidden, in_proj, out_proj, *params, 0.5, mine_xz, saved, bf16_products)
    expected = {
        "hidden": dxz @ wide_in,
        "in_proj": dxz.flatten(0, 1).t() @ wide_hidden.flatten(0, 1),
        "out_proj": wide_dout.flatten(0, 1).t() @ y.flatten(0, 1),
    }
    for (name, want), got in zip(expected.items(), mine):
        check(f"d{name}", got, want, rounded)
    names = ("conv_weight", "conv_bias", "x_proj_weight", "dt_weight", "dt_bias", "A", "D")
    for side, actual, wanted in zip(("forward", "backward"), mine[3:], grads):
        for name, got, want in zip(names, actual, wanted):
            check(f"{side} d{name}", got, want, limit(torch.float32))


@pytest.mark.parametrize("L", [1, 2, 63, 64, 65, 197])
def test_block_lengths(isa, L):
    check_block(B=3, L=L, E=16, D=48)


def test_block_long(isa):
    check_block(B=1, L=730, E=32, D=64)


@pytest.mark.parametrize(
    "case",
    [{"E": 80, "D": 16}, {"E": 64, "D": 112, "N": 5, "W": 2, "conv_bias": False}, {"E": 16, "D": 400}],
    ids=str,
)
def test_block_widths(isa, case):
    """Panels of three vectors, the one or two that are left over, and more columns than are multiplied at once."""
    check_block(B=2, L=37, **case)


@pytest.mark.parametrize("bf16_products", [False, True])
def test_block_backward_repeats_its_bits_and_leaves_its_arguments(isa, bf16_products):
    """Backward writes to nothing that it is given, and twice the same bits, after other calls with other shapes too."""
    hidden, dout, in_proj, out_proj = block_inputs(2, 300, 32, 64)
    params = [direction(64, 16, 4, 4, seed, True) for seed in (1, 2)]
    _, xz, saved = cpu.block_forward(hidden, in_proj, out_proj, *params, 0.5, True, bf16_products)
    given = [dout, hidden, in_proj, out_proj, *params[0], *params[1], xz, saved]
    before = [tensor.clone() for tensor in given]

    def backward():
        grads = cpu.block_backward(dout, hidden, in_proj, out_proj, *params, 0.5, xz, saved, bf16_products)
        return [*grads[:3], *grads[3], *grads[4]]

    first = backward()
    check_block(B=1, L=700, E=32, D=64, bf16_products=bf16_products)
    assert all(torch.equal(a, b) for a, b in zip(first, backward()))
    assert all(torch.equal(a, b) for a, b in zip(given, before))


def test_block_saves_the_same_in_large_pages():
    """What is saved of a long sequence is large enough for them: the same bits as of one that is not."""
    hidden, _, in_proj, out_proj = block_inputs(1, 4096, 16, 320)
    params = [direction(320, 16, 4, 4, seed, True) for seed in (1, 2)]
    out, xz, saved = cpu.block_forward(hidden.repeat(2, 1, 1), in_proj, out_proj, *params, 0.5, True)
    assert min(xz.nbytes, saved.nbytes) >= 10 << 20
    alone, xz_alone, _ = cpu.block_forward(hidden, in_proj, out_proj, *params, 0.5, False)
    check("xz", xz[0], hidden[0].double() @ in_proj.double().t(), limit(torch.float32))
    assert torch.equal(xz[0], xz[1]) and torch.equal(out[0], out[1]) and xz_alone.numel() == 0
    check("out", out[0], alone[0], limit(torch.float32))


def test_block_sums_the_weights_gradients_in_one_order_for_any_number_of_threads():
    """Of a batch that is dealt out by items, so that what is summed is the same bits."""
    hidden, dout, in_proj, out_proj = block_inputs(6, 100, 48, 80)
    params = [direction(80, 16, 4, 4, seed, True) for seed in (1, 2)]
    grads = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        _, xz, saved = cpu.block_forward(hidden, in_proj, out_proj, *params, 0.5, True)
        grads.append(cpu.block_backward(dout, hidden, in_proj, out_proj, *params, 0.5, xz, saved)[:3])
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other))


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("B", [1, 2, 3])
def test_block_threads(B, threads):
    torch.set_num_threads(threads)
    check_block(B=B, L=131, E=32, D=80)


needs_bf16_products = pytest.mark.skipif(
    not (ISAS and cpu.block_multiplies_bfloat16(32, 32)), reason="this processor does not multiply pairs of bfloat16"
)


@needs_bf16_products
@pytest.mark.parametrize("L", [1, 2, 63, 64, 65, 197])
def test_block_of_bfloat16_products_lengths(L):
    check_block(B=3, L=L, E=32, D=96, bf16_products=True)


@needs_bf16_products
@pytest.mark.parametrize(
    "case", [{"E": 160, "D": 32}, {"E": 64, "D": 224, "N": 5, "W": 2, "conv_bias": False}], ids=str
)
def test_block_of_bfloat16_products_widths(case):
    check_block(B=2, L=37, bf16_products=True, **case)


@needs_bf16_products
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("B", [1, 2, 3])
def test_block_of_bfloat16_products_threads(B, threads):
    torch.set_num_threads(threads)
    check_block(B=B, L=131, E=32, D=64, bf16_products=True)


@needs_bf16_products
def test_bfloat16_products_round_to_nearest_what_they_multiply():
    """The same as float32 products of operands rounded by torch, which differ from products of unrounded ones."""
    hidden, dout, in_proj, out_proj = block_inputs(2, 70, 64, 96)
    low_hidden, low_dout, low_in, low_out = (t.bfloat16().float() for t in (hidden, dout, in_proj, out_proj))
    params = [direction(96, 16, 4, 4, seed, True) for seed in (1, 2)]
    out, xz, saved = cpu.block_forward(hidden, in_proj, out_proj, *params, 0.5, True, True)
    expected = cpu.block_forward(low_hidden, low_in, out_proj, *params, 0.5, True)
    check("out", out, expected[0], 2e-6)
    check("xz", xz, expected[1], 2e-6)
    exact = cpu.block_forward(hidden, in_proj, out_proj, *params, 0.5, True)[1]
    assert (xz - exact).abs().max() > 1e-3 * exact.abs().max()
    mine = cpu.block_backward(dout, hidden, in_proj, out_proj, *params, 0.5, xz, saved, True)
    wanted = cpu.block_backward(low_dout, low_hidden, low_in, low_out, *params, 0.5, *expected[1:])
    for side in (3, 4):
        for got, want in zip(mine[side], wanted[side]):
            check("gradients of a direction", got, want, 2e-5)


@pytest.mark.parametrize("E, D", [(32, 64), (48, 80)])
def test_bfloat16_products_that_cannot_be_had_are_float32(monkeypatch, E, D):
    """Another instruction set, or half a pair of vectors."""
    if E == 32:
        monkeypatch.setenv(cpu.ISA_VARIABLE, "avx2" if "avx2" in ISAS else "portable")
    hidden, dout, in_proj, out_proj = block_inputs(2, 37, E, D)
    params = [direction(D, 16, 4, 4, seed, True) for seed in (1, 2)]
    results = []
    for allowed in (False, True):
        out, xz, saved = cpu.block_forward(hidden, in_proj, out_proj, *params, 0.5, True, allowed)
        grads = cpu.block_backward(dout, hidden, in_proj, out_proj, *params, 0.5, xz, saved, allowed)
        results.append([out, xz, *grads[:3], *grads[3], *grads[4]])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@needs_bf16_products
def test_bfloat16_products_take_widths_of_whole_pairs():
    assert cpu.block_multiplies_bfloat16(192, 384)
    assert not cpu.block_multiplies_bfloat16(48, 96) and not cpu.block_multiplies_bfloat16(64, 80)


def test_widths_that_the_block_does_not_serve_are_named(monkeypatch):
    monkeypatch.setenv(cpu.ISA_VARIABLE, "portable")
    assert "portable" in cpu.block_unsupported(192, 384)
    if "avx2" in ISAS:
        monkeypatch.setenv(cpu.ISA_VARIABLE, "avx2")
        assert cpu.block_unsupported(192, 384) is None
        assert "multiples of 8" in cpu.block_unsupported(190, 380)


# --- selective scan


def sequence(B, D, L, dtype, layout):
    if layout == "tokens":
        return torch.randn(B, D, L).to(dtype)
    if layout == "channels":
        return torch.randn(B, L, D).to(dtype).transpose(1, 2)
    return torch.randn(B, 2 * D, 3 * L).to(dtype)[:, ::2, ::3]


def matrix(form, B, D, L, N, dtype):
    """B or C: "constant", "token", or the number of groups."""
    if form == "constant":
        return torch.randn(D, N)
    if form == "token":
        return torch.randn(B, N, L).to(dtype)
    return torch.randn(B, form, N, L).to(dtype)


def check_scan(
    B=2,
    D=40,
    L=65,
    N=16,
    B_form="token",
    C_form="token",
    layout="tokens",
    dtype=torch.float32,
    softplus=True,
    optional=True,
):
    torch.manual_seed(0)
    u, z, dout = (sequence(B, D, L, dtype, layout) for _ in range(3))
    delta = sequence(B, D, L, dtype, layout)
    delta = delta if softplus else (0.5 * delta.abs()).to(dtype)
    inputs = [u, delta, -0.1 - torch.rand(D, N), matrix(B_form, B, D, L, N, dtype), matrix(C_form, B, D, L, N, dtype)]
    inputs += [torch.randn(D), z, 0.3 * torch.randn(D)] if optional else [None, None, None]
    out, last_state, _ = reference.selective_scan_forward(*widened(inputs), softplus, False)
    for save in (False, True):
        mine = cpu.selective_scan_forward(*inputs, softplus, save)
        check("out", mine[0], out, limit(dtype))
        check("last_state", mine[1], last_state, limit(dtype, is_activation=False))
    assert mine[2].numel() == cpu.selective_scan_saved_bytes(B, D, L, N, dtype)
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    for dlast in (None, torch.randn(B, D, N)):
        expected = reference.selective_scan_backward(
            *widened([dout, dlast, *inputs]), softplus, torch.empty(0, dtype=torch.uint8)
        )
        actual = cpu.selective_scan_backward(dout, dlast, *inputs, softplus, mine[2])
        for name, got, want in zip(names, actual, expected):
            check(f"d{name}", got, want, limit(dtype, name not in ("A", "D", "delta_bias")))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", ["tokens", "channels", "neither"])
@pytest.mark.parametrize("L", [1, 2, 63, 64, 65, 197])
def test_scan_lengths(isa, L, layout, dtype):
    check_scan(D=20, L=L, layout=layout, dtype=dtype)


@pytest.mark.parametrize("L", [730, 1000])
def test_scan_long(isa, L):
    check_scan(B=1, L=L)


@pytest.mark.parametrize("B_form", ["constant", "token", 1, 4])
@pytest.mark.parametrize("C_form", ["constant", "token", 2])
def test_scan_forms_of_B_and_C(isa, B_form, C_form):
    check_scan(D=36, B_form=B_form, C_form=C_form)


@pytest.mark.parametrize("N", [1, 4, 8, 24, 33])
def test_scan_state_sizes(isa, N):
    check_scan(B=1, D=18, L=40, N=N)


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("layout", ["tokens", "channels"])
def test_scan_without_optional_inputs(isa, softplus, layout):
    check_scan(B=3, D=17, optional=False, softplus=softplus, layout=layout)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_scan_threads(threads):
    torch.set_num_threads(threads)
    check_scan(B=1, D=100, B_form=2)


def test_scan_mixed_dtypes_keep_each_inputs_dtype():
    torch.manual_seed(0)
    u, delta = torch.randn(1, 8, 9).bfloat16(), torch.rand(1, 8, 9)
    A, B = -torch.rand(8, 4), torch.randn(1, 4, 9).half()
    inputs = (u, delta, A, B, B, None, None, None)
    out, _, saved = cpu.selective_scan_forward(*inputs, True, True)
    grads = cpu.selective_scan_backward(torch.ones_like(out), None, *inputs, True, saved)
    assert out.dtype == torch.bfloat16
    assert [g.dtype for g in grads if g is not None] == [t.dtype for t in inputs if t is not None]
    expected = reference.selective_scan_backward(*widened([torch.ones_like(out), None, *inputs]), True, None)
    # delta is not rounded to u's 16 bits
    torch.testing.assert_close(grads[1].double(), expected[1], rtol=1e-4, atol=1e-5)


def test_slow_and_fast_states(isa):
    """Decay rates from 1e-6 to 1e3 a token over 4000 tokens: a biased exponential would drift, an overflow break."""
    torch.manual_seed(0)
    D, N, L = 4, 16, 4000
    A = -torch.logspace(-6, 3, N).repeat(D, 1)
    u, B, C = torch.rand(1, D, L), torch.rand(1, N, L), torch.rand(1, N, L)
    inputs = (u, torch.rand(1, D, L), A, B, C, None, None, None)
    out, state, _ = cpu.selective_scan_forward(*inputs, False, False)
    want, want_state = reference.selective_scan(*widened(inputs), False)
    check("out", out, want, 2e-5)
    relative = ((state - want_state) / want_state).abs().max().item()
    assert relative <= 2e-5


def test_subnormal_numbers_are_flushed_inside_and_left_alone_outside(isa):
    """A state that decays below the normal range becomes zero, and the caller's arithmetic keeps its subnormals."""
    A, one = torch.full((1, 1), -1.0), torch.ones(1, 1, 95)
    u = torch.zeros(1, 1, 95)
    u[..., 0] = 1.0
    _, state, _ = cpu.selective_scan_forward(u, one, A, one, one, None, None, None, False, False)  # e^-94 is subnormal
    assert state.item() == 0.0
    assert (torch.tensor([1e-38]) / 8).item() > 0.0


# --- numbers of any size


@pytest.mark.parametrize("delta, A", [(0.7, -3.6e9), (0.7, -4.3e15), (1e8, -1.0), (1e4, -1e6), (0.7, -float("inf"))])
def test_a_state_that_decays_at_once_is_gone(isa, delta, A):
    """The exponential of any negative product is 0 and not what its polynomial gives far outside of it."""
    u, step = torch.ones(1, 16, 5), torch.full((1, 16, 5), delta, requires_grad=True)
    ones = torch.ones(1, 16, 5)
    out = selective_scan_fn(u, step, torch.full((16, 16), A), ones, ones)
    torch.testing.assert_close(out, 16 * step)
    if A >= -1e30:  # the derivative of an infinite rate has no value
        (grad,) = torch.autograd.grad(out.sum(), step)
        torch.testing.assert_close(grad, torch.full_like(grad, 16.0))


def test_not_a_number_shows_from_its_token_on(isa):
    step, A, ones = torch.ones(1, 16, 7), -torch.ones(16, 16), torch.ones(1, 16, 7)
    step[0, 3, 4] = float("nan")
    out = selective_scan_fn(ones, step, A, ones, ones)
    assert out[0, 3, 4:].isnan().all() and out[0, 3, :4].isfinite().all()
    assert out[0, [i for i in range(16) if i != 3]].isfinite().all()
    A[5, 2] = float("nan")
    assert selective_scan_fn(ones, ones, A, ones, ones)[0, 5, 1:].isnan().all()


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6, 1e18, 3e38])
def test_the_gate_of_large_numbers(isa, size):
    """silu is z or 0, its slope 1 or 0: 1 - sigmoid must be 0 exactly, for it is multiplied by z."""
    z = torch.tensor([size, -size]).repeat(8)[None, :, None].repeat(1, 1, 3).requires_grad_()
    u, step, A, ones = torch.ones(1, 16, 3), torch.ones(1, 16, 3), -torch.ones(16, 16), torch.ones(1, 16, 3)
    y = selective_scan_fn(u, step, A, ones, ones)
    out = selective_scan_fn(u, step, A, ones, 1e-2 * ones, z=z)
    positive = z.detach() > 0
    torch.testing.assert_close(out[positive], (1e-2 * y.double() * z.double())[positive].float())
    assert out[~positive].abs().max() <= 1e-30
    (slope,) = torch.autograd.grad(out.sum(), z)
    torch.testing.assert_close(slope, torch.where(positive, 1e-2 * y, 0.0), rtol=1e-5, atol=1e-30)


def test_sums_over_many_tokens_do_not_drift(isa):
    """Terms of one size, which a single running sum of float32 loses a thousandth of."""
    length = 100_000
    inputs = [torch.ones(1, 16, length), torch.full((1, 16, length), 0.5), -torch.ones(16, 1)]
    inputs += [torch.ones(1, 1, length), torch.ones(1, 1, length), torch.ones(16), None, torch.zeros(16)]

    def gradients(dtype):
        u, step, A, B, C, D, z, bias = (None if t is None else t.to(dtype) for t in inputs)
        leaves = [t.requires_grad_() for t in (A, D, bias)]
        return torch.autograd.grad(selective_scan_fn(u, step, A, B, C, D, z, bias).sum(), leaves)

    for name, found, right in zip(("A", "D", "bias"), gradients(torch.float32), gradients(torch.float64)):
        check(name, found, right, 1e-4)


# --- add and norm


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("residual_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("rows, width", [(50, 192), (7, 37), (1, 5)])
def test_add_norm(isa, rows, width, dtype, residual_dtype, kind):
    check_add_norm(rows, width, dtype, residual_dtype, kind)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("threads", [2, 3, 5])
def test_add_norm_threads(threads, dtype, kind):
    """Each sums the weights' gradients over its own rows."""
    torch.set_num_threads(threads)
    check_add_norm(500, 37, dtype, torch.float32, kind)


def check_add_norm(rows, width, dtype, residual_dtype, kind):
    torch.manual_seed(0)
    x = torch.randn(rows, width).to(dtype)
    residual = None if residual_dtype is None else torch.randn(rows, width).to(residual_dtype)
    weight, bias = 1 + 0.1 * torch.randn(width), torch.randn(width) if kind == "layer" else None
    out_dtype = residual_dtype or torch.float32
    expected = reference.add_norm_forward(*widened([x, residual, weight, bias]), 1e-5, kind, torch.float64)
    actual = cpu.add_norm_forward(x, residual, weight, bias, 1e-5, kind, out_dtype)
    assert actual[0].dtype == dtype and actual[1].dtype == out_dtype
    tolerance = limit(torch.bfloat16 if torch.bfloat16 in (dtype, residual_dtype) else torch.float32)
    for name, got, want in zip(("out", "sum", "mean", "rstd"), actual, expected):
        check(name, got, want, tolerance)
    total, mean, rstd = actual[1:]
    dout = torch.randn(rows, width).to(dtype)
    for dsum in (None, torch.randn(rows, width).to(out_dtype)):
        tensors = [dout, dsum, total, weight, bias, mean, rstd]
        wide_residual = None if residual is None else torch.float64
        expected = reference.add_norm_backward(*widened(tensors), kind, torch.float64, wide_residual)
        actual = cpu.add_norm_backward(*tensors, kind, dtype, residual_dtype)
        for name, got, want in zip(("dx", "dresidual", "dweight", "dbias"), actual, expected):
            check(name, got, want, tolerance)


# --- choice of code


def test_unknown_instruction_set_raises(monkeypatch):
    monkeypatch.setenv(cpu.ISA_VARIABLE, "sse9")
    with pytest.raises(ValueError, match="'sse9' is unknown: use avx512, avx2, portable"):
        cpu.bimamba_saved_bytes(1, 1, 1, 1, 1, 1, torch.float32)


def test_instruction_set_that_the_processor_lacks_raises(monkeypatch):
    monkeypatch.setattr(cpu, "available_isas", lambda: ("portable",))
    monkeypatch.setenv(cpu.ISA_VARIABLE, "avx512")
    with pytest.raises(ValueError, match="cannot run here"):
        cpu.bimamba_saved_bytes(1, 1, 1, 1, 1, 1, torch.float32)


def test_the_best_instruction_set_is_the_default(monkeypatch):
    monkeypatch.delenv(cpu.ISA_VARIABLE, raising=False)
    monkeypatch.setattr(cpu, "available_isas", lambda: ("avx2", "portable"))
    assert cpu._isa() == "avx2"


def test_without_a_compiled_library_the_reason_says_how_to_mend_it(monkeypatch):
    monkeypatch.setattr(cpu, "_library_path", lambda: None)
    assert "g++" in cpu.unavailable_reason()


def test_a_library_that_cannot_be_loaded_is_no_reason_to_fail(monkeypatch, tmp_path):
    """Such as one whose OpenMP is not there: the reference runs, and the reason tells the loader's words."""
    damaged = tmp_path / "_cpu_kernels.so"
    damaged.write_bytes(b"no library")
    monkeypatch.setattr(cpu, "_library_path", lambda: damaged)
    monkeypatch.setattr(cpu, "_library", cpu._library.__wrapped__)  # which knows none from before
    assert re.search(rf"cannot be loaded \({damaged}: .+\): `pip install` the package again", cpu.unavailable_reason())


def test_on_macos_openmp_is_that_of_torch(monkeypatch):
    """Whose functions the kernels find only if every library may use them."""
    loaded = []
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda *arguments, **options: loaded.append((arguments, options)))
    monkeypatch.setattr(cpu.sys, "platform", "darwin")
    cpu._library.__wrapped__()
    (openmp, options), (kernels, _) = loaded
    assert openmp[0].endswith("libomp.dylib") and options == {"mode": ctypes.RTLD_GLOBAL}
    assert kernels == (str(cpu._library_path()),)


def test_a_library_of_other_sources_is_refused(monkeypatch, tmp_path):
    """As after `git pull` without an install: its argument blocks may differ, and it would read rubbish."""
    shutil.copytree(cpu._ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(cpu._ROOT / "setup.py", tmp_path)
    monkeypatch.setattr(cpu, "_ROOT", tmp_path)
    monkeypatch.setattr(cpu, "_sources_digest", cpu._sources_digest.__wrapped__)
    assert cpu.unavailable_reason() is None
    with open(tmp_path / "csrc" / "kernels.cpp", "a") as file:
        file.write("// changed\n")
    assert "csrc changed: `pip install` the package again" in cpu.unavailable_reason()
    shutil.rmtree(tmp_path / "csrc")  # as beside a wheel, whose files belong together
    assert cpu.unavailable_reason() is None


@pytest.mark.parametrize(
    "arguments, word",
    [
        (("bimamba", torch.float16, 16, 4), "float16"),
        (("selective_scan", torch.complex64, 16, None), "complex64"),
        (("selective_scan", torch.float32, 257, None), "257"),
        (("bimamba", torch.float32, 16, 5), "d_conv=5"),
    ],
    ids=str,
)
def test_what_the_kernels_do_not_serve_is_named(arguments, word):
    assert word in cpu.unsupported(*arguments)
    assert cpu.unsupported("bimamba", torch.bfloat16, 16, 4) is None
    assert cpu.unsupported("selective_scan", torch.float32, 256) is None
