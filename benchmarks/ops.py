"""The kernels against their peers: selective scan, short convolution, bidirectional mixer.

Peers: this project's references (`selective_scan_ref` is the plain loop over time, "prefix" the
vectorised reference that runs where no kernel does), `mambapy`'s parallel scan, transformers' Mamba block
on its plain torch path, and timm's attention of the same width. Peers that are not installed are left out
and named.

    python benchmarks/ops.py [--device cuda] [--dtype bfloat16] [--seconds 6]
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import harness
from causal_conv1d import causal_conv1d_fn
from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref

EMBED, INNER, STATE, RANK, WIDTH = 192, 384, 16, 12, 4  # Vim-Ti
SHORT, LONG = "B 8 x L 197", "B 1 x L 6085"  # 224 px, 1248 px
SHAPES = {SHORT: (8, 197), LONG: (1, 6085)}
# Back through a loop over thousands of tokens takes minutes: timed at the short shape alone, and not in a
# quick run.
SLOW_BACKWARD = ("prefix", "selective_scan_ref", "mambapy", "transformers, one direction")
BACKEND_VARIABLES = ("MAMBA_SSM_BACKEND", "CAUSAL_CONV1D_BACKEND")


# --- peers


@contextlib.contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """Make imports of these packages fail, as where they are not installed."""
    saved = {name: sys.modules.get(name) for name in packages}
    sys.modules.update(dict.fromkeys(packages))
    try:
        yield
    finally:
        for name, module in saved.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def mambapy_scan() -> Callable | None:
    """mambapy's parallel scan (arguments (B, L, D, N)), or None without it."""
    try:
        from mambapy.pscan import pscan
    except ImportError:
        return None
    return pscan


def transformers_mixer() -> torch.nn.Module | None:
    """transformers' Mamba block (one direction) without kernels, or None without transformers."""
    try:
        with hidden("mamba_ssm", "causal_conv1d"):  # or it would find ours
            from transformers import MambaConfig
            from transformers.models.mamba.modeling_mamba import MambaMixer
    except ImportError:
        return None
    sizes = {"hidden_size": EMBED, "state_size": STATE, "conv_kernel": WIDTH, "time_step_rank": RANK}
    config = MambaConfig(**sizes, expand=2, use_mambapy=False)
    return MambaMixer(config, layer_idx=0)


@contextlib.contextmanager
def reference_backends() -> Iterator[None]:
    saved = {name: os.environ.get(name) for name in BACKEND_VARIABLES}
    os.environ.update(dict.fromkeys(BACKEND_VARIABLES, "reference"))
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# --- rivals of one op at one shape


@dataclass(frozen=True)
class Rival:
    """One implementation: its forward, what its backward reaches, and the context that both run in."""

    forward: Callable[[], torch.Tensor]
    leaves: Sequence[torch.Tensor]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def run_forward(self) -> torch.Tensor:
        with torch.no_grad(), self.context():
            return self.forward()

    def run_both(self) -> tuple[torch.Tensor, ...]:
        with self.context():
            out = self.forward()
            return torch.autograd.grad(out, self.leaves, torch.ones_like(out))


def scan_inputs(batch: int, length: int, device, dtype) -> dict[str, torch.Tensor]:
    """Vim-Ti's scan in the block's own layout: (B, D, L) views of channels-last memory."""
    torch.manual_seed(0)

    def channels_last(scale=1.0, shift=0.0):
        data = torch.randn(batch, length, INNER, device=device) * scale + shift
        return data.to(dtype).requires_grad_().transpose(1, 2)  # (B, L, D) -> (B, D, L)

    A = -torch.arange(1.0, STATE + 1, device=device).repeat(INNER, 1)  # (D, N)
    B, C = (torch.randn(batch, length, STATE, device=device).to(dtype).requires_grad_() for _ in range(2))
    return {
        "u": channels_last(),
        "delta": channels_last(0.5, -3.0),
        "A": A.requires_grad_(),
        "B": B.transpose(1, 2),  # (B, L, N) -> (B, N, L)
        "C": C.transpose(1, 2),
        "D": torch.ones(INNER, device=device, requires_grad=True),
        "delta_bias": torch.zeros(INNER, device=device, requires_grad=True),
    }


def mambapy_forward(pscan: Callable, x: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same function on mambapy's pscan (Mamba, arXiv 2312.00752, eq. 2). Result (B, L, D)."""
    u, delta = (x[name].transpose(1, 2) for name in ("u", "delta"))  # (B, L, D)
    B, C = (x[name].transpose(1, 2) for name in ("B", "C"))  # (B, L, N)
    delta = torch.nn.functional.softplus(delta + x["delta_bias"])
    decay = torch.exp(delta.unsqueeze(-1) * x["A"])  # (B, L, D, N)
    states = pscan(decay, (delta * u).unsqueeze(-1) * B.unsqueeze(2))  # (B, L, D, N)
    return (states @ C.unsqueeze(-1)).squeeze(-1) + x["D"] * u


def scan_rivals(batch: int, length: int, device, dtype) -> dict[str, Rival]:
    x = scan_inputs(batch, length, device, dtype)
    leaves = list(x.values())

    def ours():
        return selective_scan_fn(**x, delta_softplus=True)

    rivals = {
        "ours": Rival(ours, leaves),
        "prefix": Rival(ours, leaves, reference_backends),
        "selective_scan_ref": Rival(lambda: selective_scan_ref(**x, delta_softplus=True), leaves),
    }
    pscan = mambapy_scan()
    if pscan:
        rivals["mambapy"] = Rival(lambda: mambapy_forward(pscan, x), leaves)
    return rivals


def conv_rivals(batch: int, length: int, device, dtype) -> dict[str, Rival]:
    torch.manual_seed(0)
    x = torch.randn(batch, length, INNER, device=device).to(dtype).requires_grad_()
    x = x.transpose(1, 2)  # (B, L, D) -> (B, D, L)
    weight = torch.randn(INNER, WIDTH, device=device, requires_grad=True)
    bias = torch.randn(INNER, device=device, requires_grad=True)

    def rival(function):
        return Rival(lambda: function(x, weight, bias, activation="silu"), [x, weight, bias])

    return {"ours": rival(causal_conv1d_fn), "causal_conv1d_ref": rival(causal_conv1d_ref)}


def mixer_rivals(batch: int, length: int, device, dtype) -> dict[str, Rival]:
    """Blocks of width 192: ours (both directions), the reference, transformers' (one), timm's attention."""
    from timm.layers import Attention

    torch.manual_seed(0)
    tokens = torch.randn(batch, length, EMBED, device=device, requires_grad=True)  # (B, L, E)

    def rival(module, context=contextlib.nullcontext):
        def forward():
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return module(tokens)

        return Rival(forward, [tokens, *module.to(device).parameters()], context)

    ours = Mamba(EMBED, d_state=STATE, bimamba_type="v2", if_divide_out=True)
    rivals = {
        "ours": rival(ours),
        "prefix": rival(ours, reference_backends),
        "timm attention": rival(Attention(EMBED, num_heads=3, qkv_bias=True)),
    }
    single = transformers_mixer()
    if single is not None:
        rivals["transformers, one direction"] = rival(single)
    return rivals


# --- measuring

OPS = {"scan": scan_rivals, "conv": conv_rivals, "mixer": mixer_rivals}


def work_per_call(op: str, batch: int, length: int) -> int:
    """State updates of one forward (scan: one direction, mixer: both); tokens x channels for conv."""
    elements = batch * length * INNER
    return elements if op == "conv" else elements * STATE * (2 if op == "mixer" else 1)


def measure_op(
    op: str, shape: str, device, dtype, seconds: float, slow_backward: bool, launch: str = "graph"
) -> list[dict]:
    """Both passes of all rivals in one set of turns; without `slow_backward` slow ones go forward only."""
    batch, length = SHAPES[shape]
    rivals = OPS[op](batch, length, device, dtype)
    calls = {}
    for name, rival in rivals.items():
        calls["forward", name] = rival.run_forward
        if slow_backward or name not in SLOW_BACKWARD:
            calls["forward + backward", name] = rival.run_both
    how = {}
    for key, call in calls.items():
        calls[key], how[key] = harness.launched(call, launch, device)
    timings = harness.interleave(calls, device, seconds=seconds)
    records = []
    for (phase, name), timing in timings.items():
        low, high = timing.quartiles
        records.append(
            {
                "op": op,
                "shape": shape,
                "pass": phase,
                "rival": name,
                "seconds": timing.median,
                "seconds_q1": low,
                "seconds_q3": high,
                "turns": len(timing.samples),
                "launch": how[phase, name],
                "work_per_second": work_per_call(op, batch, length) / timing.median,
                "ours_faster_by": harness.ratio(timing, timings[phase, "ours"]),
                "times_own_forward": harness.ratio(timing, timings["forward", name]),
            }
        )
    return records


def check_agreement(device, dtype) -> None:
    """The rivals of an op compute the same function: compare their outputs before timing them."""
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    for op in ("scan", "conv"):
        rivals = OPS[op](2, 197, device, dtype)
        outputs = {name: rival.run_forward().float() for name, rival in rivals.items()}
        expected = outputs["ours"]
        for name, out in outputs.items():
            out = out.transpose(1, 2) if out.shape != expected.shape else out
            error = ((out - expected).abs().max() / expected.abs().max()).item()
            if not error <= tolerance:
                sys.exit(f"{op}: {name} differs from ours by {error:.1e}: they are not the same function.")


def table(records: list[dict]) -> str:
    rows = []
    for record in records:
        rate, spread = record["work_per_second"] / 1e9, record["ours_faster_by"]
        rows.append(
            [
                record["op"],
                record["shape"],
                record["pass"],
                record["rival"],
                f"{1e3 * record['seconds']:.2f}",
                f"{1e3 * record['seconds_q1']:.2f} to {1e3 * record['seconds_q3']:.2f}",
                f"{rate:.2f}" if record["pass"] == "forward" else "",
                f"{spread['median']:.2f}x",
                f"{record['times_own_forward']['median']:.2f}",
            ]
        )
    header = ["op", "shape", "pass", "rival", "ms", "quartiles", "G/s", "ours faster by", "times its forward"]
    note = (
        "G/s: state updates (scan: one direction, mixer: both), for conv tokens x channels. Vim-Ti's widths: "
        f"E {EMBED}, D {INNER}, N {STATE}, R {RANK}, W {WIDTH}."
    )
    return f"{harness.markdown_table(header, rows)}\n\n{note}"


def run(
    device: torch.device, dtype: torch.dtype, seconds: float, out: Path, quick: bool = False, launch: str = "graph"
) -> dict:
    """Measure all ops and write ops_DEVICE.json and .md. The gate is the caller's."""
    check_agreement(device, dtype)
    records = []
    for op in OPS:
        for shape in SHAPES:
            print(f"  {op}, {shape}", flush=True)
            slow_backward = shape == SHORT and not quick
            records += measure_op(op, shape, device, dtype, seconds, slow_backward, launch)
    peers = {"mambapy": mambapy_scan(), "transformers": transformers_mixer()}
    missing = [name for name, peer in peers.items() if peer is None]
    result = {
        "environment": harness.environment(device, str(dtype).removeprefix("torch."))
        | {"peers not installed": ", ".join(missing) or "none"},
        "measurements": records,
    }
    harness.write_results(out, f"ops_{device.type}", result, table(records))
    return result


def main() -> None:
    parser = harness.command_line(__doc__, 6.0, "time for one op at one shape")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the inputs")
    parser.add_argument("--quick", action="store_true", help="the slow peers' forward only")
    args = parser.parse_args()
    harness.set_threads(args.threads)
    device = torch.device(args.device)
    harness.require_green_tests(device)
    run(device, getattr(torch, args.dtype), args.seconds, args.out.resolve(), args.quick, args.launch)


if __name__ == "__main__":
    main()
