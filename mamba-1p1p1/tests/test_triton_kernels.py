"""The Triton kernels against the float64 reference: outputs, states and every gradient.

Without a GPU `test_triton_interpreter.py` runs this file in a process of its own, where Triton interprets the
kernels on CPU tensors. On a GPU the same cases run there: `-m gpu`. Tolerances: CONTRIBUTING.md's for every kernel,
max|x - r| / max|r| <= 2e-5 with float32 tensors, 6e-3 for 16-bit activations.
"""

import dataclasses
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mamba_ssm.ops import bimamba, reference
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

pytest.importorskip("triton")
from mamba_ssm.ops.triton import kernels, selective_scan
from mamba_ssm.ops.triton.layer_norm import layer_norm_fn

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no GPU here"),
]
slow = pytest.mark.slow
SUMS = ("A", "D", "delta_bias")  # float32 whatever the activations


def tolerance(dtype):
    """The interpreter cuts bfloat16 off instead of rounding it: up to 2^-7 of a value."""
    if dtype == torch.bfloat16 and INTERPRETED:
        return 1e-2
    return 2e-5 if dtype == torch.float32 else 6e-3


def relative_error(actual, expected):
    assert actual.shape == expected.shape
    scale = expected.abs().max().clamp_min(1e-30)
    return ((actual.double().cpu() - expected).abs().max() / scale).nan_to_num(float("inf")).item()


def in_float64(tensors):
    return [None if t is None else t.cpu().double() for t in tensors]


class Draw:
    """Seeded tensors on the device."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape, dtype=torch.float32):
        return torch.randn(shape, generator=self.generator).to(DEVICE, dtype)


@pytest.fixture(autouse=True)
def the_same_gradients():
    """torch begins with another seed in every process; one in some hundred gradients comes close to zero."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def interpreter_without_repeated_work(monkeypatch):
    """Triton's interpreter patches its language again wherever a kernel calls a function: half of its time. Of the rest
    two fifths go into overflows of integers, computed and then not looked at, and into tables of types.
    """
    if INTERPRETED:
        from triton import language
        from triton.runtime import interpreter

        options = interpreter.interpreter_builder.options
        if not options.debug:  # which alone looks at them
            unchecked = dataclasses.replace(options, sanitize_overflow=False)
            monkeypatch.setattr(interpreter.interpreter_builder, "options", unchecked)
        numpy_type, known = interpreter._get_np_dtype, {}

        def known_numpy_type(dtype):
            if dtype.name not in known:
                known[dtype.name] = numpy_type(dtype)
            return known[dtype.name]

        monkeypatch.setattr(interpreter, "_get_np_dtype", known_numpy_type)
        patch = interpreter._patch_lang

        def patch_once(function):
            modules = [value for value in function.__globals__.values() if value is language or value is language.core]
            if any(language.core.is_builtin(module.load) for module in modules):  # so it is not patched
                return patch(function)

        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)


# --- selective scan

ARGUMENTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def scan_case(
    batch=1, channels=3, length=33, states=2, matrices="token", groups=1, z=True, D=True, bias=True, softplus=True,
    last=True, channels_last=True, dtype=torch.float32, segments=1, C_groups=None,
):  # fmt: skip
    return locals()


SCANS = {
    "one-token": scan_case(length=1, batch=2),
    "two-tokens": scan_case(length=2, states=3),
    "three-tokens": scan_case(length=3, z=False),
    "chunk-less-one": scan_case(length=63),
    "chunk": scan_case(length=64, batch=2),
    "chunk-and-one": scan_case(length=65, D=False),
    "vim-length": scan_case(length=197, z=False, channels=2),
    "vim-states": scan_case(length=37, states=16, z=False),
    "many-states": scan_case(length=9, states=32, z=False, channels=2),
    "odd-states": scan_case(length=21, states=5),
    "two-channel-blocks": scan_case(channels=130, length=18),
    "whole-blocks": scan_case(channels=128, length=70, states=4),
    "whole-blocks-bf16": scan_case(channels=128, length=7, states=8, dtype=torch.bfloat16, z=True),
    "groups": scan_case(matrices="group", groups=2, channels=6),
    "groups-of-B-in-one-of-C": scan_case(matrices="group", groups=4, C_groups=2, channels=8, batch=2, length=9),
    "groups-that-do-not-divide": scan_case(matrices="group", groups=2, C_groups=3, channels=6, length=9, segments=2),
    "one-group-of-B": scan_case(matrices="group C", groups=3, channels=6, length=9),
    "grouped-blocks": scan_case(matrices="group", groups=2, channels=140, length=5),
    "constant": scan_case(matrices="constant", batch=2),
    "constant-B": scan_case(matrices="constant B", batch=2, states=3),
    "plain": scan_case(z=False, D=False, bias=False, softplus=False, last=False),
    "channels-first": scan_case(channels_last=False, batch=3),
    "bf16": scan_case(dtype=torch.bfloat16, length=40, batch=2),
    "fp16": scan_case(dtype=torch.float16, length=40, channels_last=False),
    "segments": scan_case(length=100, segments=2),
    "segments-constant": scan_case(length=130, segments=3, matrices="constant", z=False, channels=2),
    "segments-groups": scan_case(length=70, segments=3, matrices="group", groups=3, channels=3),
    "stride-8": scan_case(length=730, states=1, channels=2, z=False),
    "long": scan_case(length=1000, states=1, channels=2, segments=4),
}
SLOW = {"stride-8", "long"}


def scan_arguments(case):
    draw, (batch, channels, length, states) = Draw(), (case[k] for k in ("batch", "channels", "length", "states"))

    def sequence():
        tensor = draw(batch, length, channels, dtype=case["dtype"]).transpose(1, 2)
        return tensor if case["channels_last"] else tensor.contiguous()

    def matrix(name):
        if case["matrices"] in ("constant", f"constant {name}"):
            return draw(channels, states)
        if case["matrices"] in ("group", f"group {name}"):
            groups = case["C_groups"] or case["groups"] if name == "C" else case["groups"]
            return draw(batch, groups, states, length, dtype=case["dtype"])
        return draw(batch, states, length, dtype=case["dtype"])

    u, delta = sequence(), sequence()
    return (
        u, delta if case["softplus"] else 0.3 * delta.abs(), -torch.exp(0.3 * draw(channels, states)), matrix("B"),
        matrix("C"), draw(channels) if case["D"] else None, sequence() if case["z"] else None,
        0.3 * draw(channels) - 1 if case["bias"] else None,
    )  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=name, marks=[slow] * (name in SLOW)) for name, case in SCANS.items()]
)
def test_scan(case):
    arguments, dtype = scan_arguments(case), case["dtype"]
    out, last_state, saved = kernels.selective_scan_forward(
        *arguments, case["softplus"], True, segments=case["segments"]
    )
    sizes = (case[k] for k in ("batch", "channels", "length", "states"))
    assert saved.numel() == kernels.selective_scan_saved_bytes(*sizes, dtype)
    right, right_state, _ = reference.selective_scan_forward(*in_float64(arguments), case["softplus"], True)
    assert relative_error(out, right) <= tolerance(dtype)
    assert relative_error(last_state, right_state) <= 2e-5

    dout, dlast = torch.randn_like(out), torch.randn_like(last_state) if case["last"] else None
    grads = kernels.selective_scan_backward(dout, dlast, *arguments, case["softplus"], saved, segments=case["segments"])
    expected = reference.selective_scan_backward(
        *in_float64((dout, dlast)), *in_float64(arguments), case["softplus"], None
    )
    for name, grad, right, argument in zip(ARGUMENTS, grads, expected, arguments):
        assert (grad is None) == (argument is None), name
        if grad is not None:
            assert grad.dtype == argument.dtype
            assert relative_error(grad, right) <= (2e-5 if name in SUMS else tolerance(argument.dtype)), name


@pytest.mark.parametrize("segments", [1, 2])
def test_64_bit_offsets_give_the_same_bits(monkeypatch, segments):
    """What a sequence that spans 2^31 elements takes, on a short one."""
    arguments = scan_arguments(scan_case(length=70 if segments == 2 else 5, batch=2))

    def both_ways():
        out, _, saved = kernels.selective_scan_forward(*arguments, True, True, segments=segments)
        return out, *kernels.selective_scan_backward(torch.ones_like(out), None, *arguments, True, saved, segments)

    narrow = both_ways()
    monkeypatch.setattr(selective_scan, "_is_wide", lambda *_: True)
    assert all(torch.equal(a, b) for a, b in zip(narrow, both_ways()))


def test_long_strides_take_64_bit_offsets():
    u = torch.empty(1, 1, 2, 3, device="meta").as_strided((1, 1, 2, 3), (0, 0, 1, 2**30))
    inputs = selective_scan.ScanInputs(u, u, None, u[..., :1], u[..., :1], *[(None, None)] * 4, False)
    assert selective_scan._is_wide(inputs, length=3)
    assert not selective_scan._is_wide(inputs, length=1)


def test_channels_far_apart_take_64_bit_offsets():
    """Of a channels-first sequence: 2^31 elements between its first and its last channel."""
    for stride, wide in ((2**29, True), (2**28, False)):
        u = torch.empty(1, 1, 4, 3, device="meta").as_strided((1, 1, 4, 3), (0, 0, stride, 1))
        inputs = selective_scan.ScanInputs(u, u, None, u[..., :1], u[..., :1], *[(None, None)] * 4, False)
        assert selective_scan._is_wide(inputs, length=3) == wide


@pytest.mark.parametrize("case", ["whole-blocks-bf16", "groups", "odd-states"])
@pytest.mark.parametrize("cut", [(64, 2), (64, 1)], ids=["sm_80", "amd"])
def test_scan_backward_cut_for_other_devices(cut, case, monkeypatch):
    """Channels of a program and of a thread: elsewhere the interpreter takes those of sm_90."""
    monkeypatch.setattr(selective_scan, "backward_block", lambda: cut)
    test_scan(SCANS[case])


def test_small_steps_keep_their_digits():
    """delta = softplus(-7): about 1e-3, where log2(1 + e^v) computed from a rounded sum would err by 6e-5."""
    draw = Draw()
    u, delta = draw(1, 3, 8), -7 + 0.1 * draw(1, 3, 8)
    arguments = (u, delta, -torch.exp(draw(3, 2)), draw(1, 2, 8), draw(1, 2, 8), None, None, None)
    out, _, saved = kernels.selective_scan_forward(*arguments, True, True)
    right, _, _ = reference.selective_scan_forward(*in_float64(arguments), True, True)
    assert relative_error(out, right) <= 2e-6
    grads = kernels.selective_scan_backward(torch.ones_like(out), None, *arguments, True, saved)
    expected = reference.selective_scan_backward(
        torch.ones(1, 3, 8, dtype=torch.float64), None, *in_float64(arguments), True, None
    )
    assert relative_error(grads[1], expected[1]) <= 2e-6


def test_scan_backward_gives_the_same_bits_twice():
    arguments = scan_arguments(scan_case(length=40, batch=2))
    out, _, saved = kernels.selective_scan_forward(*arguments, True, True)
    dout = torch.randn_like(out)
    first, second = (kernels.selective_scan_backward(dout, None, *arguments, True, saved) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_segments_are_chosen_by_size():
    choose = selective_scan.choose_segments
    assert choose(programs=1536, chunks=7, wanted=1056) == 1  # enough sequences: none
    assert choose(programs=12, chunks=191, wanted=1056) == 88  # one long sequence: as many as fill the device
    assert choose(programs=1000, chunks=191, wanted=1056) == 1  # a split that would not pay


# --- bidirectional mixer

NAMES = ("conv_weight", "conv_bias", "x_proj_weight", "dt_weight", "dt_bias", "A", "D")


def mixer_case(batch=1, length=11, channels=5, states=2, rank=3, width=4, bias=True, dtype=torch.float32, segments=1):
    return locals()


MIXERS = {
    "one-token": mixer_case(length=1),
    "small": mixer_case(batch=3),
    "width-2": mixer_case(length=2, width=2, bias=False),
    "width-3": mixer_case(length=33, width=3, rank=1),
    "odd-states": mixer_case(length=18, states=3, rank=2),
    "two-channel-blocks": mixer_case(length=6, channels=130, rank=17),
    "vim-length": mixer_case(length=197, channels=2, rank=1),
    "vim-states": mixer_case(length=20, channels=24, states=16, rank=12),
    "segments": mixer_case(length=70, segments=2, channels=2),
    "whole-blocks-bf16": mixer_case(length=7, channels=128, dtype=torch.bfloat16),
    "bf16": mixer_case(length=37, dtype=torch.bfloat16),
    "fp16": mixer_case(length=37, dtype=torch.float16),
    "stride-8": mixer_case(length=730, states=1, channels=2, rank=1),
}


def mixer_arguments(case):
    draw = Draw()
    D, N, R, W = (case[k] for k in ("channels", "states", "rank", "width"))

    def direction():
        return (
            0.5 * draw(D, W), 0.2 * draw(D) if case["bias"] else None, draw(R + 2 * N, D) / D**0.5,
            draw(D, R) / R**0.5, draw(D) - 2, -torch.exp(0.3 * draw(D, N)), draw(D),
        )  # fmt: skip

    return draw(case["batch"], case["length"], 2 * D, dtype=case["dtype"]), direction(), direction()


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=name, marks=[slow] * (name in SLOW)) for name, case in MIXERS.items()]
)
def test_bidirectional_mixer(case):
    """In 16 bits the convolution's output and the weights are rounded as under autocast, hence the limits.

    Rounding to nearest at the same places of a float64 mixer gives 4e-3 and 1e-2; the interpreter truncates.
    """
    xz, ahead, behind = mixer_arguments(case)
    output_limit, gradient_limit = {
        torch.float32: (2e-5, 2e-5), torch.float16: (2.5e-3, 6e-3),
        torch.bfloat16: (2e-2, 5e-2) if INTERPRETED else (6e-3, 1.5e-2),
    }[case["dtype"]]  # fmt: skip
    y, saved = kernels.bimamba_forward(xz, ahead, behind, 0.5, True, segments=case["segments"])
    sizes = (case[k] for k in ("batch", "length", "channels", "states", "rank", "width", "dtype"))
    assert saved.numel() == kernels.bimamba_saved_bytes(*sizes)
    wide = (xz.cpu().double(), in_float64(ahead), in_float64(behind))
    right, _ = reference.bimamba_forward(*wide, 0.5, True)
    assert y.dtype == xz.dtype and relative_error(y, right) <= output_limit

    dy = torch.randn_like(y)
    dxz, *grads = kernels.bimamba_backward(dy, xz, ahead, behind, 0.5, saved, segments=case["segments"])
    right_dxz, *expected = reference.bimamba_backward(dy.cpu().double(), *wide, 0.5, None)
    assert dxz.dtype == xz.dtype and relative_error(dxz, right_dxz) <= gradient_limit
    for side, side_grads, side_expected in zip(("forward", "backward"), grads, expected):
        for name, grad, right in zip(NAMES, side_grads, side_expected):
            assert (grad is None) == (right is None), (side, name)
            if grad is not None:
                assert relative_error(grad, right) <= gradient_limit, (side, name)


def strided(tensor):
    """The same numbers, every second of a wider tensor's along the last axis."""
    return torch.stack([tensor, torch.full_like(tensor, float("nan"))], dim=-1).flatten(-2)[..., ::2]


STRIDES = {
    "rows-apart": lambda xz: torch.cat([xz, xz], dim=-1)[..., : xz.shape[-1]],
    "tokens-first": lambda xz: xz.transpose(1, 2).contiguous().transpose(1, 2),
}


def test_mixer_reads_a_strided_xz_and_saves_nothing_unasked():
    """A gradient of one number for all too, as that of a sum."""
    xz, ahead, behind = mixer_arguments(mixer_case(batch=2, length=5, width=2))
    right, right_saved = kernels.bimamba_forward(xz, ahead, behind, 1.0, True)
    expected = kernels.bimamba_backward(torch.ones_like(right), xz, ahead, behind, 1.0, right_saved)
    for name, layout in STRIDES.items():
        apart = layout(xz)
        assert apart.stride() != xz.stride() and torch.equal(apart, xz), name
        y, saved = kernels.bimamba_forward(apart, ahead, behind, 1.0, False)
        assert saved.numel() == 0 and torch.equal(y, right), name
        dy = torch.ones((), device=DEVICE).expand_as(y)
        dxz, *grads = kernels.bimamba_backward(dy, apart, ahead, behind, 1.0, right_saved)
        assert torch.equal(dxz, expected[0]), name
        for side, wanted in zip(grads, expected[1:]):
            assert all(torch.equal(a, b) for a, b in zip(side, wanted)), name


def test_the_scan_reads_tensors_of_any_strides():
    """Every second number of wider ones, one for all of a row, and a gradient of one number for all."""
    arguments = scan_arguments(scan_case(batch=2, channels=4, length=5))
    u, delta, A, B, C, D, z, bias = arguments
    arguments = (u, delta, A, B, C[:1, :, :1].expand_as(C), D, z[..., :1].expand_as(z), bias)
    apart = [strided(t) if 0 not in t.stride() else t for t in arguments]
    plain = [t.contiguous() for t in arguments]
    results = []
    for tensors, expand in ((apart, True), (plain, False)):
        out, last, saved = kernels.selective_scan_forward(*tensors, True, True)
        douts = [torch.ones((), device=DEVICE).expand_as(t) for t in (out, last)]
        douts = douts if expand else [d.contiguous() for d in douts]
        results.append([out, last, *kernels.selective_scan_backward(*douts, *tensors, True, saved)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_read_tensors_of_any_strides(kind):
    draw = Draw()
    x, residual, weight, bias = draw(5, 6), draw(5, 6), draw(6), draw(6)
    results = []
    for form in (strided, torch.Tensor.contiguous):
        given = [form(t) for t in (x, residual, weight, bias)]
        out, total, mean, rstd = kernels.add_norm_forward(*given, 1e-5, kind, torch.float32)
        ones = [form(torch.ones_like(out)) for _ in range(2)]
        grads = kernels.add_norm_backward(
            *ones, form(total), *given[2:], mean, rstd, kind, torch.float32, torch.float32
        )
        results.append([out, total, rstd, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_parameters_of_any_dtype_are_read_as_they_are():
    """A model cast to bfloat16: the same numbers as from float32 parameters of the same values.

    Not the same bits on a GPU: a matrix product whose operand was widened from 16 bits meets the matrix unit in
    another order than one loaded in 32 bits, so float32 sums differ in their last digits, and a gradient may round
    to the neighbouring bfloat16.
    """
    xz, ahead, behind = mixer_arguments(mixer_case(length=5, channels=3, states=2, rank=1))

    def cast(parameters, dtype):
        return [None if p is None else p.to(dtype) for p in parameters]

    narrow = [cast(parameters, torch.bfloat16) for parameters in (ahead, behind)]
    wide = [cast(parameters, torch.float32) for parameters in narrow]
    y, saved = kernels.bimamba_forward(xz, *narrow, 0.5, True)
    right, right_saved = kernels.bimamba_forward(xz, *wide, 0.5, True)
    assert relative_error(y, right.double().cpu()) <= tolerance(torch.float32)
    dxz, *grads = kernels.bimamba_backward(torch.ones_like(y), xz, *narrow, 0.5, saved)
    right_dxz, *expected = kernels.bimamba_backward(torch.ones_like(y), xz, *wide, 0.5, right_saved)
    assert relative_error(dxz, right_dxz.double().cpu()) <= tolerance(torch.float32)
    for grad, right in zip(grads[0] + grads[1], expected[0] + expected[1]):
        assert grad.dtype == torch.bfloat16
        assert relative_error(grad, right.double().cpu()) <= tolerance(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_directions_A_at_once_is_the_same(dtype):
    A_logs = [Draw()(6, 4, dtype=dtype).requires_grad_() for _ in range(2)]
    together, alone = bimamba._negative_exps_together(A_logs), [bimamba.negative_exp(A) for A in A_logs]
    incoming = [Draw()(6, 4) for _ in range(2)]
    grads, expected = (torch.autograd.grad(As, A_logs, incoming) for As in (together, alone))
    for actual, right in zip((*together, *grads), (*alone, *expected)):
        torch.testing.assert_close(actual, right)


class DeviceWork(TorchDispatchMode):
    """Names of what a GPU would run: Triton's launches, and torch's operations that are no view or allocation."""

    FREE = ("empty", "view", "as_strided", "split_with_sizes", "transpose", "unsqueeze", "expand", "slice", "select",
            "detach", "permute", "t", "alias", "_unsafe_view", "new_empty", "empty_like", "unbind")  # fmt: skip

    def __init__(self, monkeypatch):
        from triton.runtime.interpreter import GridExecutor

        super().__init__()
        self.names = []

        def launch(executor, *args, **kwargs):
            self.names.append(executor.fn.__name__)

        monkeypatch.setattr(GridExecutor, "__call__", launch)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.partition("::")[2]
        if name.rstrip("_") not in self.FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(not INTERPRETED, reason="counts the interpreter's launches")
@pytest.mark.parametrize("save", [False, True], ids=["inference", "training"])
def test_a_blocks_forward_is_a_norm_and_six_launches_and_no_copy(monkeypatch, save):
    """In_proj, convolutions, x projections, scans, merge, out_proj: no flip or transpose of a sequence.

    The copy is of parameters: both x projections' weights in one tensor of the activations' dtype.
    """
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    xz, ahead, behind = mixer_arguments(mixer_case(batch=2, channels=8))
    rows, residual, weight = torch.randn(22, 4), torch.randn(22, 4), torch.ones(4)
    in_proj, out_proj = torch.randn(16, 4), torch.randn(4, 8)
    with DeviceWork(monkeypatch) as work:
        hidden = kernels.add_norm_forward(rows, residual, weight, None, 1e-5, "rms", torch.float32)[0]
        xz = torch.nn.functional.linear(hidden.view(2, 11, 4), in_proj)
        y, _ = kernels.bimamba_forward(xz, ahead, behind, 0.5, save)
        torch.nn.functional.linear(y, out_proj)
    assert work.names == [
        "add_norm_forward_kernel", "mm", "conv_both_kernel", "_foreach_copy_", "bmm", "scan_forward_kernel",
        "merge_kernel", "mm",
    ]  # fmt: skip


def check_gradients_through_the_op(monkeypatch, arguments, run):
    """Registered ops refuse results that share memory; the backend's functions alone would not."""
    monkeypatch.setenv("MAMBA_SSM_BACKEND", "triton")
    leaves = [None if t is None else t.detach().requires_grad_() for t in arguments]
    outputs = run(*leaves)
    wanted = [t for t in leaves if t is not None]
    grads = torch.autograd.grad([out.float().sum() for out in outputs], wanted)
    for grad, leaf in zip(grads, wanted):
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape and grad.isfinite().all()
    assert len({grad.untyped_storage().data_ptr() for grad in grads}) == len(grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 5])
def test_the_mixers_gradients_share_no_memory(monkeypatch, length, dtype):
    xz, ahead, behind = mixer_arguments(mixer_case(length=length, channels=3, rank=1, dtype=dtype))

    def run(xz, *parameters):
        sides = (bimamba.DirectionParameters(*parameters[i : i + len(NAMES)]) for i in (0, len(NAMES)))
        return (bimamba.bimamba(xz, *sides),)

    check_gradients_through_the_op(monkeypatch, (xz, *ahead, *behind), run)


@pytest.mark.parametrize("matrices, states", [("token", 1), ("token", 2), ("group", 2), ("constant", 2)])
def test_the_scans_gradients_share_no_memory(monkeypatch, matrices, states):
    """Of one token: then even a transposed slice is contiguous."""
    arguments = scan_arguments(scan_case(length=1, matrices=matrices, states=states))
    check_gradients_through_the_op(
        monkeypatch, arguments, lambda *leaves: selective_scan_fn(*leaves, True, return_last_state=True)
    )


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_the_norms_gradients_share_no_memory(monkeypatch, kind):
    draw = Draw()
    arguments = (draw(3, 5), draw(5), draw(5) if kind == "layer" else None, draw(3, 5))
    check_gradients_through_the_op(
        monkeypatch, arguments, lambda *leaves: layer_norm_fn(*leaves, prenorm=True, is_rms_norm=kind == "rms")
    )


# --- norms


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("rows, width", [(1, 1), (5, 12), (3, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("full", [True, False], ids=["residual-bias", "plain"])
def test_add_norm(kind, rows, width, dtype, full):
    draw = Draw()
    x, weight = draw(rows, width, dtype=dtype), 1 + 0.1 * draw(width)
    residual, bias = (draw(rows, width), draw(width)) if full else (None, None)
    forward = kernels.add_norm_forward(x, residual, weight, bias, 1e-5, kind, torch.float32)
    wide = in_float64((x, residual, weight, bias))
    right = reference.add_norm_forward(*wide, 1e-5, kind, torch.float64)
    for name, actual, expected in zip(("out", "residual_out", "mean", "rstd"), forward, right):
        assert (actual is None) == (expected is None), name
        if actual is not None and (kind, width, name) != ("layer", 1, "out"):  # x - mean(x) of one number is 0
            assert relative_error(actual, expected) <= tolerance(actual.dtype), name
    if width == 1:
        return
    dout, dresidual_out = draw(rows, width, dtype=dtype), draw(rows, width) if full else None
    dtypes = (dtype, torch.float32 if full else None)
    grads = kernels.add_norm_backward(
        dout, dresidual_out, forward[1], weight, bias, forward[2], forward[3], kind, *dtypes
    )
    expected = reference.add_norm_backward(
        *in_float64((dout, dresidual_out)), right[1], wide[2], wide[3], right[2], right[3], kind,
        torch.float64, torch.float64 if full else None,
    )  # fmt: skip
    for name, grad, right_grad in zip(("x", "residual", "weight", "bias"), grads, expected):
        assert (grad is None) == (right_grad is None), name
        if grad is not None:
            assert relative_error(grad, right_grad) <= tolerance(grad.dtype), name


# --- sizes only a GPU holds


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU's memory")
def test_scan_of_more_than_2_to_the_31_elements():
    """The last row of a batch whose tensor passes 2^31 elements equals that row alone."""
    torch.use_deterministic_algorithms(False)
    batch, channels, length = 3, 768, 2**20
    u = torch.randn(batch, length, channels, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    assert u.numel() > 2**31
    A, B = -torch.ones(channels, 2, device="cuda"), torch.randn(batch, 2, length, device="cuda")
    out, _, _ = kernels.selective_scan_forward(u, u, A, B, B, None, None, None, True, False, segments=64)
    alone, _, _ = kernels.selective_scan_forward(
        u[2:], u[2:], A, B[2:], B[2:], None, None, None, True, False, segments=64
    )
    assert torch.equal(out[2:], alone)
