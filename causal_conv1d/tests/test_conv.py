"""The convolution's public functions: the published numbers, gradients, registration, states, errors, backends."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

import causal_conv1d as package
from causal_conv1d import backend, causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_states
from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref, causal_conv1d_update_ref
from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states_ref
from oracle_cases import argument, load_json, op_arrays, rounded

CASES = {name: case for name, case in load_json("ops.json").items() if case["op"].startswith("causal_conv1d")}


def cases(op):
    return [name for name, case in CASES.items() if case["op"] == op]


def expect(case, name, actual):
    expected = op_arrays()[f"{case}/{name}"]
    torch.testing.assert_close(actual.detach(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("function", [causal_conv1d_fn, causal_conv1d_ref])
@pytest.mark.parametrize("name", cases("causal_conv1d_ref"))
def test_against_the_published_numbers(name, function):
    case = CASES[name]
    B, D, L, W = (case[key] for key in ("B", "D", "L", "width"))
    shapes = {"x": (B, D, L), "weight": (D, W)}
    shapes |= {"bias": (D,)} if case["has_bias"] else {}
    shapes |= {"initial_states": (B, D, W - 1)} if case["has_initial_states"] else {}
    inputs = {key: rounded(argument(name, key, *shape)).requires_grad_() for key, shape in shapes.items()}
    out, final_states = function(**inputs, activation=case["activation"], return_final_states=True)
    expect(name, "out", out)
    expect(name, "final_states", final_states)
    if f"{name}/dx" not in op_arrays():
        return  # a case of one token, recorded without gradients
    loss = (out * rounded(argument(name, "g", *out.shape))).sum()
    for key, grad in zip(inputs, torch.autograd.grad(loss, list(inputs.values()))):
        expect(name, "d" + key, grad)


@pytest.mark.parametrize("function", [causal_conv1d_update, causal_conv1d_update_ref])
@pytest.mark.parametrize("name", cases("causal_conv1d_update_ref"))
def test_update_against_the_published_numbers(name, function):
    case = CASES[name]
    B, D, S, W = (case[key] for key in ("B", "D", "seqlen", "width"))
    x = rounded(argument(name, "x", B, D, S))
    state = rounded(argument(name, "conv_state", B, D, case["state_len"]))
    weight, bias = rounded(argument(name, "weight", D, W)), rounded(argument(name, "bias", D))
    lengths = case["cache_seqlens"]
    lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    out = function(x, state, weight, bias, activation=case["activation"], cache_seqlens=lengths)
    expect(name, "out", out)
    expect(name, "conv_state", state)


def random_inputs(B=2, D=6, L=9, W=4, dtype=torch.float64, channels_last=False):
    torch.manual_seed(0)
    x = torch.randn(B, L, D).transpose(1, 2) if channels_last else torch.randn(B, D, L)
    inputs = [x, torch.randn(D, W), torch.randn(D), torch.randn(B, D, W - 1)]
    return [t.to(dtype).requires_grad_() for t in inputs]


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("width, length", [(2, 1), (3, 2), (4, 9)])
def test_gradients(width, length, channels_last, activation):
    inputs = random_inputs(L=length, W=width, channels_last=channels_last)

    def function(x, weight, bias, initial_states):
        return causal_conv1d_fn(x, weight, bias, initial_states=initial_states, activation=activation)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("channels_last", [False, True])
def test_operator_registration(channels_last):
    x, weight, bias, _ = random_inputs(dtype=torch.float32, channels_last=channels_last)
    torch.library.opcheck(torch.ops.causal_conv1d.forward.default, (x, weight, bias, None, True))
    torch.library.opcheck(torch.ops.causal_conv1d.forward.default, (x, weight, None, None, False))
    arguments = [t.detach() for t in (torch.randn_like(x), x, weight, bias)]
    torch.library.opcheck(torch.ops.causal_conv1d.backward.default, (*arguments, None, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("D", [1, 6])
def test_gradients_have_a_known_layout(D, dtype):
    """dx that of x, the others contiguous, whatever their inputs' is."""
    inputs = [t.detach() for t in random_inputs(D=D, dtype=dtype, channels_last=True)]
    x, weight, bias, states = inputs
    weight, states = (t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (weight, states))
    arguments = (torch.randn_like(x), x, weight, bias.expand(2, -1)[0], states, True)
    torch.library.opcheck(torch.ops.causal_conv1d.backward.default, arguments)
    dx, *others = torch.ops.causal_conv1d.backward(*arguments)
    assert dx.stride() == x.stride() and all(grad.is_contiguous() for grad in others)


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_gradient_of_a_sum(channels_last):
    """Expanded, of one number for all."""
    inputs = random_inputs(dtype=torch.float32, channels_last=channels_last)
    out = causal_conv1d_fn(*inputs[:3], initial_states=inputs[3], activation="silu")
    ones = torch.ones(()).expand_as(out)
    grads = [torch.autograd.grad(out, inputs, dout, retain_graph=True) for dout in (ones, ones.contiguous())]
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_memory_layout_follows_the_input():
    x, weight, bias, _ = random_inputs(dtype=torch.float32, channels_last=True)
    out = causal_conv1d_fn(x, weight, bias)
    assert out.stride() == x.stride() and not out.is_contiguous()


@pytest.mark.parametrize("shape", [{}, {"L": 1}, {"channels_last": True}, {"channels_last": True, "L": 1}])
def test_result_may_be_changed_in_place(shape):
    x, weight, bias, _ = random_inputs(**shape, dtype=torch.float32)
    out = causal_conv1d_fn(x, weight, bias, activation="silu")
    out += x
    out.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_a_split_sequence_equals_the_whole():
    x, weight, bias, _ = random_inputs(L=20)
    whole = causal_conv1d_fn(x, weight, bias, activation="silu")
    first, states = causal_conv1d_fn(x[..., :7], weight, bias, return_final_states=True, activation="silu")
    second = causal_conv1d_fn(x[..., 7:], weight, bias, initial_states=states, activation="silu")
    torch.testing.assert_close(torch.cat([first, second], -1), whole)
    buffer = torch.empty_like(states)
    assert causal_conv1d_fn(x, weight, return_final_states=True, final_states_out=buffer)[1] is buffer
    torch.testing.assert_close(buffer, x[..., -3:].detach())


def test_pieces_shorter_than_the_filter_equal_the_whole():
    x, weight, bias, _ = random_inputs(L=7)
    outs, states = [], None
    for piece in x.split(2, dim=-1):
        out, states = causal_conv1d_fn(piece, weight, bias, initial_states=states, return_final_states=True)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, -1), causal_conv1d_fn(x, weight, bias))


def test_packed_sequences_equal_separate_ones():
    x, weight, bias, _ = random_inputs(B=1, L=12)
    lengths = [1, 4, 7]
    seq_idx = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    packed = causal_conv1d_fn(x, weight, bias, seq_idx=seq_idx, activation="silu")
    separate = [causal_conv1d_fn(part, weight, bias, activation="silu") for part in x.split(lengths, -1)]
    torch.testing.assert_close(packed, torch.cat(separate, -1))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_packed_sequences_keep_what_is_not_finite_to_themselves(poison):
    x, weight, bias, _ = (t.detach() for t in random_inputs(B=1, L=12))
    seq_idx = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, -1, -1, -1, -1]])
    right = causal_conv1d_fn(x, weight, bias, seq_idx=seq_idx)
    x[..., :4] = x[..., 8:] = poison
    out = causal_conv1d_fn(x, weight, bias, seq_idx=seq_idx)
    assert torch.equal(out[..., 4:8], right[..., 4:8]) and not out[..., 8:].any()
    states = causal_conv1d_varlen_states(x[0].T, torch.tensor([0, 4, 6, 12]), 3)
    assert torch.equal(states[1, :, 1:], x[0, :, 4:6]) and not states[1, :, 0].any()


def test_one_token_at_a_time_equals_the_whole():
    x, weight, bias, _ = random_inputs(L=7)
    whole = causal_conv1d_fn(x, weight, bias, activation="silu")
    state = x.new_zeros(2, 6, 5)
    outs = [causal_conv1d_update(x[..., t].detach(), state, weight, bias, activation="silu") for t in range(7)]
    torch.testing.assert_close(torch.stack(outs, -1), whole)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"conv_state": torch.zeros(3, 4, 5)}, "x has 2 rows, and there are states of 3"),
        ({"cache_seqlens": torch.tensor([1, 2]), "conv_state": torch.zeros(3, 4, 5)}, "there are states of 3"),
        ({"conv_state_indices": torch.tensor([0, 1, 0])}, r"conv_state_indices must be .* \(B,\) = \(2,\)"),
        ({"conv_state_indices": torch.tensor([True, True])}, "conv_state_indices must be .* not torch.bool"),
        ({"cache_seqlens": torch.tensor([1.0, 2.0])}, "cache_seqlens must be signed integers .* not torch.float32"),
        ({"cache_seqlens": torch.tensor([[1, 2]])}, r"cache_seqlens must be .* not torch.int64 \(1, 2\)"),
        ({"cache_seqlens": torch.zeros(2, dtype=torch.int32, device="meta")}, "cache_seqlens .* on meta"),
        ({"conv_state": torch.zeros(2, 4, 5, device="meta")}, "conv_state is on meta"),
        ({"conv_state": torch.zeros(2, 4, 5, dtype=torch.int32)}, "conv_state has dtype torch.int32"),
        ({"cache_seqlens": torch.tensor([1, 2]), "conv_state": torch.zeros(2, 4, 3)}, "a ring of 3 tokens cannot take"),
    ],
)
def test_an_update_that_does_not_fit_is_refused(arguments, words):
    arguments = {"conv_state": torch.zeros(2, 4, 5)} | arguments
    with pytest.raises(ValueError, match=words):
        causal_conv1d_update(torch.randn(2, 4, 4), weight=torch.randn(4, 4), **arguments)


@pytest.mark.parametrize("seqlens", [None, torch.tensor([0, 2])], ids=["shifted", "ring"])
def test_a_cache_stays_out_of_the_graph(seqlens):
    """Each token's backward pass ends at the cache, whatever came before it."""
    x, state = torch.randn(2, 4, 3, requires_grad=True), torch.zeros(2, 4, 5)
    weight = torch.randn(4, 4, requires_grad=True)
    for t in range(3):
        seen = None if seqlens is None else seqlens + t
        causal_conv1d_update(x[..., t], state, weight, cache_seqlens=seen).sum().backward()
        assert not state.requires_grad
    torch.testing.assert_close(x.grad, weight[:, -1].detach()[None, :, None].expand(2, 4, 3))


@pytest.mark.parametrize("function", [causal_conv1d_update, causal_conv1d_update_ref])
@pytest.mark.parametrize("slots", [0, 1, 3])
def test_an_update_of_width_one_needs_no_cache(slots, function):
    x, weight = torch.randn(2, 4, 3), torch.randn(4, 1)
    state = torch.zeros(2, 4, slots)
    torch.testing.assert_close(function(x, state, weight), x * weight[:, 0, None].expand(4, 3))
    assert torch.equal(state, x[..., 3 - slots :])


def test_an_update_names_what_is_no_tensor():
    with pytest.raises(TypeError, match="conv_state must be a tensor, not None"):
        causal_conv1d_update(torch.zeros(2, 4), None, torch.zeros(4, 4))


def test_the_reference_refuses_states_that_do_not_fit():
    x, weight, _, states = random_inputs()
    with pytest.raises(ValueError, match="initial_states must have shape"):
        causal_conv1d_ref(x, weight, initial_states=torch.cat([states, states], dim=-1))


def test_a_buffer_that_would_not_be_written_is_refused():
    x, weight, _, states = random_inputs()
    with pytest.raises(ValueError, match="final_states_out is written with return_final_states=True only"):
        causal_conv1d_fn(x, weight, final_states_out=torch.empty_like(states))


@pytest.mark.parametrize("integers", [torch.int16, torch.int32, torch.int64], ids=str)
def test_update_of_chosen_cache_rows(integers):
    x, weight, bias, _ = random_inputs(B=2, L=1)
    cache = torch.randn(5, 6, 3, dtype=torch.float64)
    rows, untouched = torch.tensor([4, 1]), cache.clone()
    expected_state = cache[rows].clone()
    expected = causal_conv1d_update(x.detach(), expected_state, weight, bias)
    out = causal_conv1d_update(x.detach(), cache, weight, bias, conv_state_indices=rows.to(integers))
    assert torch.equal(out, expected) and torch.equal(cache[rows], expected_state)
    assert torch.equal(cache[[0, 2, 3]], untouched[[0, 2, 3]])


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_changes_nothing(default, default_dtype):
    """Kernels write into buffers of their own dtype, not of the one that tensors are made in by default."""
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((2, 64, 50), (64, 4), (64,)))
    initial = torch.randn(2, 64, 3, requires_grad=True)

    def run():
        out, state = causal_conv1d_fn(x, weight, bias, initial_states=initial, return_final_states=True)
        return out, state, *torch.autograd.grad((out.square().sum() + state.sum()), (x, weight, bias, initial))

    right = run()
    default_dtype(default)
    found = run()
    assert all(one.dtype == torch.float32 and torch.equal(one, expected) for one, expected in zip(found, right))


def test_torch_func_differentiates_forwards_and_backwards():
    """Registered operations know autograd alone; jvp would silently take their derivatives for zero."""
    x, weight, bias, _ = (t.detach() for t in random_inputs())
    tangent, g = torch.randn_like(x), torch.randn_like(x)

    def loss(x):
        return (causal_conv1d_fn(x, weight, bias, activation="silu") * g).sum()

    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.jvp(loss, (x,), (tangent,))[1], (grad * tangent).sum())
    torch.testing.assert_close(torch.func.grad(loss)(x), grad)
    with torch.no_grad(), forward_ad.dual_level():
        found = forward_ad.unpack_dual(loss(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(found, (grad * tangent).sum())


def test_torch_func_does_not_leave_a_forced_backend(monkeypatch):
    x, weight, bias, _ = (t.detach() for t in random_inputs())
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "cpu")
    with pytest.raises(NotImplementedError, match=r"=cpu: autograd alone has derivatives of it; unset it, or use ref"):
        torch.func.grad(lambda x: causal_conv1d_fn(x, weight, bias).sum())(x)


def test_states_of_packed_sequences():
    x, offsets = torch.randn(11, 4), torch.tensor([0, 2, 2, 11], dtype=torch.int32)
    states = causal_conv1d_varlen_states(x, offsets, 3)
    assert torch.equal(states, causal_conv1d_varlen_states_ref(x, offsets, 3))
    assert torch.equal(states[2], x[8:].T) and not states[1].any()
    none, nothing = torch.randn(0, 4), torch.tensor([0, 0])
    assert torch.equal(causal_conv1d_varlen_states(none, nothing, 3), torch.zeros(1, 4, 3))
    for arguments, words in (
        ((x, torch.tensor([0.0, 7.9, 11.0]), 3), "cu_seqlens must be integers, not torch.float32"),
        ((x, offsets, -2), "state_len=-2 is invalid: use 0 or a positive number"),
    ):
        with pytest.raises(ValueError, match=words):
            causal_conv1d_varlen_states(*arguments)
    for offsets in ([0, 12], [-5, 2]):
        with pytest.raises(IndexError, match=rf"cu_seqlens goes from {offsets[0]} to {offsets[1]}; x has 11 tokens"):
            causal_conv1d_varlen_states(x, torch.tensor(offsets), 3)
    with pytest.raises(IndexError):
        causal_conv1d_varlen_states(none, torch.tensor([0, 5]), 3)
    with pytest.raises(IndexError, match=r"cu_seqlens \[0, 5, 2, 11\] falls: give where each sequence starts"):
        causal_conv1d_varlen_states(x, torch.tensor([0, 5, 2, 11]), 3)


def test_a_cache_has_no_row_before_its_first():
    """-1, elsewhere the mark of padding, would write the last row."""
    cache, before = torch.zeros(5, 4, 3), torch.zeros(5, 4, 3)
    with pytest.raises(IndexError):
        causal_conv1d_update(torch.ones(2, 4), cache, torch.ones(4, 3), conv_state_indices=torch.tensor([4, -1]))
    assert torch.equal(cache, before)
    many = torch.zeros(200, 4, 3)
    row = torch.tensor([5], dtype=torch.int8)
    causal_conv1d_update(torch.ones(1, 4), many, torch.ones(4, 3), conv_state_indices=row)
    assert many[5].any() and not many[:5].any() and not many[6:].any()


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"activation": "relu"}, NotImplementedError, "relu"),
        ({"x": [[[0.0]]]}, TypeError, "x must be a tensor, not list"),
        ({"weight": None}, TypeError, "weight must be a tensor, not None"),
        ({"bias": 0.0}, TypeError, "bias must be a tensor or None, not float"),
        ({"seq_idx": "silu"}, ValueError, r"seq_idx must be signed integers \(B, L\), not 'silu'"),
        ({"x": torch.zeros(2, 6, 0)}, ValueError, "at least 1"),
        ({"weight": torch.zeros(6, 0)}, ValueError, "at least 1"),
        ({"x": torch.zeros(2, 6, 9, dtype=torch.int32)}, ValueError, "x has dtype torch.int32"),
        ({"weight": torch.zeros(6, 4, dtype=torch.complex64)}, ValueError, "weight has dtype torch.complex64"),
        ({"x": torch.zeros(2, 5, 9)}, ValueError, "same D"),
        ({"bias": torch.zeros(5)}, ValueError, "bias"),
        ({"initial_states": torch.zeros(2, 6, 4)}, ValueError, "initial_states"),
        ({"bias": torch.zeros(6, device="meta")}, ValueError, "meta"),
        (
            {"final_states_out": torch.zeros(2, 6, 4), "return_final_states": True},
            ValueError,
            r"final_states_out must have shape \(2, 6, 3\)",
        ),
        ({"seq_idx": torch.zeros(1, 9, dtype=torch.int32)}, ValueError, "seq_idx must be signed integers"),
        ({"seq_idx": torch.zeros(2, 8, dtype=torch.int32)}, ValueError, "seq_idx must be signed integers"),
        ({"seq_idx": torch.zeros(2, 9)}, ValueError, "seq_idx must be signed integers"),
        (
            {"seq_idx": torch.zeros(2, 9, dtype=torch.int32), "return_final_states": True},
            NotImplementedError,
            "seq_idx",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(change, error, words):
    good = {"x": torch.zeros(2, 6, 9), "weight": torch.zeros(6, 4)}
    with pytest.raises(error, match=words):
        causal_conv1d_fn(**good | change)


def test_kernels_are_launched_on_their_tensors_gpu(enters_the_gpu):
    """Triton launches on the current one, whatever the tensors are on."""
    pytest.importorskip("triton")
    from causal_conv1d import triton_kernels

    assert all(hasattr(form, "__wrapped__") for form in (triton_kernels.conv_forward, triton_kernels.conv_backward))
    enters_the_gpu(triton_kernels._on_its_device)


def test_unknown_backend(monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "cuda")
    with pytest.raises(ValueError, match="reference, cpu, triton"):
        causal_conv1d_fn(torch.zeros(1, 2, 3), torch.zeros(2, 4))


def test_forced_backend_that_cannot_serve(monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="triton"):
        causal_conv1d_fn(torch.zeros(1, 2, 3), torch.zeros(2, 4))


def test_the_backend_of_a_device_is_said(caplog):
    caplog.set_level("INFO", logger="causal_conv1d")
    assert backend._automatic.__wrapped__("xpu")[0] == "reference"
    assert caplog.messages == ["xpu tensors: reference backend"]


def test_report_of_backends(tmp_path):
    """From a folder where nothing of ours is."""
    command = [sys.executable, "-m", "causal_conv1d"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, env=dict(os.environ))
    assert package.__version__ in run.stdout
    assert all(name in run.stdout for name in ("reference  available", "cpu", "triton", backend.ENVIRONMENT_VARIABLE))


@pytest.mark.parametrize("value", ["1", "true", "ON", "0", ""])
def test_the_interpreter_is_switched_on_as_triton_reads_it(value, monkeypatch):
    knobs = pytest.importorskip("triton.knobs")
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert backend._interpreted() == knobs.runtime.interpret


def test_report_of_a_forced_backend_that_cannot_run(monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "cpu tensors -> an error: CAUSAL_CONV1D_BACKEND=triton " in backend.report()


@pytest.mark.parametrize("variable", [backend.ENVIRONMENT_VARIABLE, "CAUSAL_CONV1D_CPU_ISA"])
def test_report_of_an_unknown_choice_is_one_line(variable):
    environment = dict(os.environ) | {variable: "fastest"}
    run = subprocess.run([sys.executable, "-m", "causal_conv1d"], capture_output=True, text=True, env=environment)
    assert run.returncode == 1 and run.stderr.count("\n") == 1
    assert run.stderr.startswith(f"{variable}='fastest' is unknown: use ")


def test_the_report_tells_what_tensors_of_another_gpu_get(monkeypatch):
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert backend.report().endswith("mps tensors -> reference")


@pytest.mark.slow
def test_without_a_compiler_the_install_works_and_says_so_once(tmp_path):
    tools = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++", "PYTHONPATH": str(tmp_path / "lib")}
    environment = {k: v for k, v in os.environ.items() if k != backend.ENVIRONMENT_VARIABLE} | tools
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=True, env=environment)
    build = ["setup.py", "-q", "build", "--build-base", str(tmp_path / "build"), "--build-lib", str(tmp_path / "lib")]
    said = run([sys.executable, *build], cwd=Path(__file__).parents[1]).stderr
    assert "'/nonexistent/c++'" in said
    script = (
        "import pathlib, torch, causal_conv1d as p; x, w = torch.ones(1, 2, 3), torch.ones(2, 4);"
        "out = p.causal_conv1d_fn(x, w) + p.causal_conv1d_fn(x, w);"
        "print(pathlib.Path(p.__file__).parents[1], out.isfinite().all().item())"
    )
    used = run([sys.executable, "-c", script], cwd=tmp_path)
    assert used.stdout == f"{tmp_path / 'lib'} True\n"
    assert used.stderr.count("reference backend, slow") == used.stderr.count("install a C++ compiler") == 1


def test_second_derivatives_are_refused_in_words():
    x, weight = torch.randn(1, 4, 9, requires_grad=True), torch.randn(4, 3)
    first = torch.autograd.grad(causal_conv1d_fn(x, weight).square().sum(), x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="first derivatives alone; for second ones use causal_conv1d_ref"):
        torch.autograd.grad(first.square().sum(), x)
