"""Every public operation against the numbers of the published implementation, outputs and gradients in float64."""

import pytest
import torch

from mamba_ssm import Mamba
from mamba_ssm.ops import selective_scan_interface as ssi
from mamba_ssm.ops.reference import selective_scan
from mamba_ssm.ops.triton.layer_norm import layer_norm_fn, layer_norm_ref, rms_norm_fn, rms_norm_ref
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from oracle_cases import argument, fill, load_json, op_arrays, rounded

CASES = load_json("ops.json")


def cases(*ops):
    return [name for name, case in CASES.items() if case["op"] in ops]


def expect(case, name, actual):
    expected = op_arrays()[f"{case}/{name}"]
    torch.testing.assert_close(actual.detach(), expected, rtol=1e-9, atol=1e-9)


def expect_gradients(case, out, inputs, extra_loss=0.0):
    """Compare the gradients of (out * g).sum() + extra_loss with those recorded."""
    recorded = {key.split("/")[1] for key in op_arrays() if key.startswith(case + "/d")}
    names = [name for name in inputs if "d" + name in recorded]
    assert names, f"no gradient recorded for {case}"
    loss = (out * rounded(argument(case, "g", *out.shape))).sum() + extra_loss
    for name, grad in zip(names, torch.autograd.grad(loss, [inputs[n] for n in names])):
        expect(case, "d" + name, grad)


def leaves(inputs):
    """The arguments as the recorded runs received them, as leaves of autograd."""
    return {name: None if value is None else rounded(value).requires_grad_() for name, value in inputs.items()}


def scan_arguments(name):
    case = CASES[name]
    B, D, N, L = (case[key] for key in "BDNL")
    is_complex = case["complex"]

    def matrix(kind, which):
        columns = 2 * L if is_complex else L
        if kind == "const":
            value = argument(name, which, D, N)
            return torch.complex(value, argument(name, which + "_im", D, N)) if is_complex else value
        shape = (B, N, columns) if kind == "3d" else (B, int(kind[1:]), N, columns)
        return argument(name, which, *shape)

    A = -(0.1 + argument(name, "A", D, N).abs())
    inputs = {
        "u": argument(name, "u", B, D, L),
        "delta": 0.5 * argument(name, "delta", B, D, L).abs(),
        "A": torch.complex(A, argument(name, "A_im", D, N)) if is_complex else A,
        "B": matrix(case["Bm"], "B"),
        "C": matrix(case["Cm"], "C"),
        "D": argument(name, "D", D) if case["has_D"] else None,
        "z": argument(name, "z", B, D, L) if case["has_z"] else None,
        "delta_bias": 0.3 * argument(name, "delta_bias", D) if case["has_delta_bias"] else None,
    }
    return leaves(inputs), case["delta_softplus"]


@pytest.mark.parametrize("recurrence", ["op", "loop", "prefix"])
@pytest.mark.parametrize("name", cases("selective_scan_ref"))
def test_selective_scan(name, recurrence):
    inputs, softplus = scan_arguments(name)
    if recurrence == "op":
        out, last_state = ssi.selective_scan_fn(**inputs, delta_softplus=softplus, return_last_state=True)
    else:
        out, last_state = selective_scan(**inputs, delta_softplus=softplus, recurrence=recurrence)
    expect(name, "out", out)
    expect(name, "last_state", last_state)
    expect_gradients(name, out, inputs)


def mixer_arguments(name):
    case = CASES[name]
    B, D, R, N, L, E, W = (case[key] for key in ("B", "D", "R", "N", "L", "E", "width"))
    is_complex = case["complex"]
    columns = 2 * N if is_complex else N
    rows = R + columns * (case["variable_B"] + case["variable_C"])

    def state_matrix(key, imaginary, transform=lambda value: value):
        value = transform(argument(name, key, D, N))
        return torch.complex(value, argument(name, imaginary, D, N)) if is_complex else value

    def decay(value):
        return -(0.1 + value.abs())

    inputs = {
        "xz": argument(name, "xz", B, 2 * D, L),
        "conv1d_weight": argument(name, "conv1d_weight", D, 1, W),
        "conv1d_bias": argument(name, "conv1d_bias", D),
        "x_proj_weight": argument(name, "x_proj_weight", rows, D) / D**0.5,
        "delta_proj_weight": argument(name, "delta_proj_weight", D, R) / R**0.5,
        "out_proj_weight": argument(name, "out_proj_weight", E, D) / D**0.5,
        "out_proj_bias": argument(name, "out_proj_bias", E) if case["proj_biases"] else None,
        "A": state_matrix("A", "A_im", decay),
        "A_b": state_matrix("A_b", "A_b_im", decay),
        "B": None if case["variable_B"] else state_matrix("B", "B_im"),
        "C": None if case["variable_C"] else state_matrix("C", "C_im"),
        "D": argument(name, "D", D),
        "delta_bias": -1 + 0.3 * argument(name, "delta_bias", D),
        "B_proj_bias": argument(name, "B_proj_bias", columns) if case["proj_biases"] else None,
        "C_proj_bias": argument(name, "C_proj_bias", columns) if case["proj_biases"] else None,
    }
    if not case["op"].startswith("bimamba"):
        del inputs["A_b"]
    if "no_out_proj" in case["op"]:
        del inputs["out_proj_weight"], inputs["out_proj_bias"]
    return leaves(inputs)


MIXERS = {
    "mamba_inner_ref": (ssi.mamba_inner_fn, ssi.mamba_inner_ref),
    "bimamba_inner_ref": (ssi.bimamba_inner_fn, ssi.bimamba_inner_ref),
    "mamba_inner_no_out_proj_ref": (ssi.mamba_inner_fn_no_out_proj, ssi.mamba_inner_no_out_proj_ref),
}


@pytest.mark.parametrize("form", ["function", "reference"])
@pytest.mark.parametrize("name", cases(*MIXERS))
def test_mixers(name, form):
    function, reference = MIXERS[CASES[name]["op"]]
    inputs = mixer_arguments(name)
    out = (function if form == "function" else reference)(**inputs, delta_softplus=True)
    expect(name, "out", out)
    expect_gradients(name, out, inputs)


NORMS = {"rms_norm_ref": (rms_norm_fn, rms_norm_ref), "layer_norm_ref": (layer_norm_fn, layer_norm_ref)}


@pytest.mark.parametrize("form", ["function", "reference"])
@pytest.mark.parametrize("name", cases(*NORMS))
def test_norms(name, form):
    case = CASES[name]
    function, reference = NORMS[case["op"]]
    inputs = {
        "x": argument(name, "x", 2, 7, 12),
        "weight": 1 + 0.1 * argument(name, "weight", 12),
        "bias": argument(name, "bias", 12) if case["has_bias"] else None,
        "residual": argument(name, "residual", 2, 7, 12) if case["has_residual"] else None,
    }
    inputs = leaves(inputs)
    function = function if form == "function" else reference
    out, residual_out = function(**inputs, eps=case["eps"], prenorm=True)
    expect(name, "out", out)
    expect(name, "residual_out", residual_out)
    expect_gradients(name, out, inputs, (residual_out * rounded(argument(name, "g2", 2, 7, 12))).sum())


@pytest.mark.parametrize("name", cases("selective_state_update_ref"))
def test_selective_state_update(name):
    case = CASES[name]
    B, D, N, heads, groups = (case[key] for key in ("B", "D", "N", "nheads", "ngroups"))
    lead = (heads,) if heads else ()
    shared = (B, groups, N) if heads else (B, N)
    inputs = {
        "state": argument(name, "state", B, *lead, D, N),
        "x": argument(name, "x", B, *lead, D),
        "dt": argument(name, "dt", B, *lead, D),
        "A": -1 - argument(name, "A", *lead, D, N).abs(),
        "B": argument(name, "B", *shared),
        "C": argument(name, "C", *shared),
        "D": argument(name, "D", *lead, D),
        "z": argument(name, "z", B, *lead, D) if case["has_z"] else None,
        "dt_bias": -4 + argument(name, "dt_bias", *lead, D),
    }
    inputs = {key: None if value is None else rounded(value) for key, value in inputs.items()}
    state = inputs["state"]
    out = selective_state_update(**inputs, dt_softplus=True)
    expect(name, "out", out)
    expect(name, "state", state)


@pytest.mark.parametrize("use_fast_path", [True, False])
@pytest.mark.parametrize("name", cases("Mamba"))
def test_module(name, use_fast_path):
    case = CASES[name]
    module = Mamba(**case["kwargs"] | {"use_fast_path": use_fast_path}).double()
    assert [[key, list(value.shape)] for key, value in module.state_dict().items()] == case["state_dict"]
    fill(module, "mixer.")
    expect(name, "out", module(rounded(argument(name, "h", *case["input"]))))


def test_module_token_by_token():
    name = "mamba_none_step"
    case = CASES[name]
    module = fill(Mamba(**case["kwargs"], layer_idx=0).double(), "mixer.")
    tokens = rounded(argument(name, "h", *case["input"]))
    expect(name, "whole", module(tokens))
    cache = module.allocate_inference_cache(tokens.shape[0], tokens.shape[1])
    outs = []
    for i in range(tokens.shape[1]):
        if i == case["prefill"]:
            expect(name, "conv_state", cache.conv_state)
            expect(name, "ssm_state", cache.ssm_state)
        outs.append(module.step(tokens[:, i : i + 1], *cache)[0])
    expect(name, "prefill", torch.cat(outs[: case["prefill"]], 1))
    expect(name, "steps", torch.cat(outs[case["prefill"] :], 1))
    expect(name, "conv_state_end", cache.conv_state)
    expect(name, "ssm_state_end", cache.ssm_state)
