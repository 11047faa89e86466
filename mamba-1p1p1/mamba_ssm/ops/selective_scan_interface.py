"""Selective scan and the one-direction mixers built on it: public functions and registration with torch.library.

`torch.ops.mamba_ssm.selective_scan` and `.selective_scan_backward` carry fake kernels, autograd and a FLOP
formula, so that `torch.compile(fullgraph=True)`, `torch.export` and `torch.utils.flop_counter` see through
them. Which code runs inside is decided in `backend.py`. Layout of this module: (B, D, L), any strides.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mamba_ssm.ops import backend, reference
from mamba_ssm.ops.checks import check_kinds, check_tensors


def _kernels(u: Tensor, A: Tensor):
    dtype = torch.complex64 if A.is_complex() else u.dtype
    return backend.choose("selective_scan", u.device, dtype, d_state=A.shape[1])


@torch.library.custom_op("mamba_ssm::selective_scan", mutates_args=())
def _selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(u.device.type, enabled=False):
        out, last_state, saved = _kernels(u, A).selective_scan_forward(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, save
        )
    out = out.contiguous()
    return out.clone() if out._is_view() else out, last_state, saved  # a view could not be changed in place


@_selective_scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, save):
    batch, channels, length = u.shape
    state_dtype = torch.promote_types(u.dtype, torch.complex64 if A.is_complex() else torch.float32)
    size = _kernels(u, A).selective_scan_saved_bytes(batch, channels, length, A.shape[1], u.dtype) if save else 0
    return (
        u.new_empty(u.shape),
        u.new_empty(batch, channels, A.shape[1], dtype=state_dtype),
        u.new_empty(size, dtype=torch.uint8),
    )


def check_saved(saved: Tensor, expected: int) -> None:
    """Refuse a backward pass whose forward pass saved nothing, or ran on another backend."""
    if saved.numel() != expected:
        raise RuntimeError(
            f"backward needs {expected} saved bytes and has {saved.numel()}: trace or export with gradients enabled "
            "what is to be trained, call the forward op with save=True, and both on the same backend"
        )


@torch.library.custom_op("mamba_ssm::selective_scan_backward", mutates_args=())
def _selective_scan_backward(
    dout: Tensor,
    dlast_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    saved: Tensor,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    kernels = _kernels(u, A)
    check_saved(saved, kernels.selective_scan_saved_bytes(*u.shape, A.shape[1], u.dtype))
    with torch.autocast(u.device.type, enabled=False):
        grads = kernels.selective_scan_backward(
            dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, saved
        )
    # An op returns tensors only, of a known layout: an input that was None has an empty gradient.
    return tuple(u.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


@_selective_scan_backward.register_fake
def _(dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, saved, delta_softplus):
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    return tuple(u.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


backend.differentiable_once(_selective_scan_backward)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, dlast_state, _):
    *inputs, saved = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(inputs[0])
    grads = _selective_scan_backward(dout, dlast_state, *inputs, saved, ctx.delta_softplus)
    return *(None if t is None else grad for t, grad in zip(inputs, grads)), None, None


_selective_scan.register_autograd(_autograd, setup_context=_setup_context)


def scan_flops(batch: int, channels: int, length: int, d_state: int) -> int:
    """Operations of one scan: a state update costs 9 (delta A, exp, decay, drive 2, add, C h, sum, delta u)."""
    return 9 * batch * channels * length * d_state


@register_flop_formula(torch.ops.mamba_ssm.selective_scan)
def _forward_flops(u_shape, delta_shape, A_shape, *args, out_shape=None, **kwargs) -> int:
    return scan_flops(*u_shape, A_shape[1])


@register_flop_formula(torch.ops.mamba_ssm.selective_scan_backward)
def _backward_flops(dout_shape, dlast_shape, u_shape, delta_shape, A_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * scan_flops(*u_shape, A_shape[1])


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward pass can follow, so that forward should save what it needs."""
    return torch.is_grad_enabled() and any(t is not None and _requires_grad(t) for t in tensors)


def _requires_grad(tensor: Tensor) -> bool:
    """Of what `torch.func` has wrapped, too: a batched tensor says no, whatever it is a batch of."""
    if not torch.compiler.is_compiling():
        functorch = torch._C._functorch
        while not tensor.requires_grad and functorch.is_functorch_wrapped_tensor(tensor):
            tensor = functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def _check_scan(u, delta, A, B, C, D, z, delta_bias) -> None:
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    check_tensors(given, optional=("D", "z", "delta_bias"))
    if u.dim() != 3 or A.dim() != 2 or A.shape[0] != u.shape[1]:
        raise ValueError(f"u must be (B, D, L) and A (D, N) with the same D, not {tuple(u.shape)}, {tuple(A.shape)}")
    if u.shape[1] == 0:
        raise ValueError(f"u {tuple(u.shape)} holds no channel: D must be at least 1")
    if u.shape[-1] == 0:
        raise ValueError(f"u {tuple(u.shape)} holds no token: the length must be at least 1")
    check_kinds("the scan", "u", u, {"delta": delta, "z": z, "D": D, "delta_bias": delta_bias})
    for name, tensor in {"A": A, "B": B, "C": C}.items():
        if tensor.is_complex() and A.is_complex() and tensor.dim() != 2:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} has dtype {tensor.dtype}: per token it is floating point (..., 2 L), "
                "real and imaginary parts interleaved, as torch.view_as_real(...).flatten(-2) gives"
            )
        if not (tensor.is_floating_point() or (tensor.is_complex() and A.is_complex())):
            raise ValueError(f"{name} has dtype {tensor.dtype}: use floating point, or a complex A")
    (batch, channels, length), d_state = u.shape, A.shape[1]
    for name, tensor, shape in (
        ("delta", delta, u.shape),
        ("z", z, u.shape),
        ("D", D, (channels,)),
        ("delta_bias", delta_bias, (channels,)),
    ):
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name} must have shape {tuple(shape)}, not {tuple(tensor.shape)}")
    columns = 2 * length if A.is_complex() else length
    for name, matrix in (("B", B), ("C", C)):
        shape = tuple(matrix.shape)
        groups = shape[1] if len(shape) == 4 else 1
        # By the number of dimensions: comparing a traced batch with D would keep an export from batches of D.
        accepted = {2: (channels, d_state), 3: (batch, d_state, columns), 4: (batch, groups, d_state, columns)}
        if shape != accepted.get(len(shape)) or groups == 0 or channels % groups:
            raise ValueError(
                f"{name} must be (D, N), (B, N, L) or (B, G, N, L) with G dividing D = {channels} "
                f"(L = {columns} here), not {shape}"
            )
    for name, matrix in (("A", A), ("B", B), ("C", C)):  # which may be complex
        if matrix.device != u.device:
            raise ValueError(f"{name} is on {matrix.device} and u on {u.device}: move them to one device")


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan (Mamba, arXiv 2312.00752, section 3): a linear recurrence whose weights depend on the token.

        h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t],    y[t] = <C[t], h[t]> + D u[t],    out = y silu(z)

    Args:
        u, delta, z: (B, D, L), any strides; float32, bfloat16, float16 or float64, each its own.
        A: (D, N), real, or complex (reference backend; y is then twice the real part). All real tensors: floating
            point of any dtype.
        B, C: (D, N) constant, (B, N, L) per token, or (B, G, N, L) shared by D / G channels each; with a complex
            A the constant forms are complex and the per-token ones (..., 2 L), real and imaginary interleaved.
        D, delta_bias: (D,). delta_softplus: softplus of delta + delta_bias.
        return_last_state: also return h after the last token, (B, D, N), at least float32.

    Returns out (B, D, L) in u's dtype, or (out, last_state). State and delta are float32 at least.

    Raises TypeError for what is no tensor, ValueError for shapes, dtypes or devices that do not fit,
    NotImplementedError for what a backend that MAMBA_SSM_BACKEND forces does not serve.
    """
    _check_scan(u, delta, A, B, C, D, z, delta_bias)
    if backend.differentiated_beyond_autograd():
        out, last_state = reference.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        return (out, last_state) if return_last_state else out
    save = needs_grad(u, delta, A, B, C, D, z, delta_bias)
    out, last_state, _ = _selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, save)
    return (out, last_state) if return_last_state else out


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan_fn` as the obvious loop over tokens in plain torch operations, for comparison."""
    _check_scan(u, delta, A, B, C, D, z, delta_bias)
    out, last_state = reference.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, recurrence="loop")
    return (out, last_state) if return_last_state else out


# --- the mixer of one direction, from the input projection's output


def _projected_matrix(projected: Tensor, bias: Tensor | None, is_complex: bool) -> Tensor:
    """Columns of x_proj as a per-token B or C: (B, L, N) -> (B, 1, N, L), complex (B, L, 2 N) -> (B, 1, N, 2 L)."""
    if bias is not None:
        projected = projected + bias.to(projected.dtype)
    if is_complex:  # column 2 n + c is part c of state n
        projected = projected.unflatten(-1, (-1, 2)).permute(0, 2, 1, 3).flatten(2)  # (B, N, 2 L)
        return projected.unsqueeze(1).contiguous()
    return projected.transpose(1, 2).unsqueeze(1)


def scan_inputs(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B=None, C=None, B_proj_bias=None,
    C_proj_bias=None,
):  # fmt: skip
    """Convolve and project: (x (B, D, L), z, delta (B, D, L), B, C), whatever of B and C is not given per token."""
    x, z = xz.chunk(2, dim=1)
    width = conv1d_weight.shape[-1]
    weight = conv1d_weight.reshape(-1, 1, width)  # (D, W) and (D, 1, W) are both accepted
    x = F.silu(F.conv1d(F.pad(x, (width - 1, 0)), weight.to(x.dtype), _to(conv1d_bias, x), groups=len(weight)))
    projected = F.linear(x.transpose(1, 2), x_proj_weight.to(x.dtype))  # (B, L, R + ...)
    is_complex, dt_rank = A.is_complex(), delta_proj_weight.shape[1]
    state_columns = A.shape[1] * (2 if is_complex else 1)
    delta = F.linear(projected[..., :dt_rank], delta_proj_weight.to(x.dtype)).transpose(1, 2)
    if B is None:
        B = _projected_matrix(projected[..., dt_rank : dt_rank + state_columns], B_proj_bias, is_complex)
    if C is None:
        C = _projected_matrix(projected[..., -state_columns:], C_proj_bias, is_complex)
    return x, z, delta, B, C


def _check_inner(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, A_b, B, C, B_proj_bias, C_proj_bias,
) -> None:  # fmt: skip
    """What the scan that follows does not see of the arguments of the functions below."""
    weights = {"conv1d_weight": conv1d_weight, "x_proj_weight": x_proj_weight, "delta_proj_weight": delta_proj_weight}
    biases = {"conv1d_bias": conv1d_bias, "B_proj_bias": B_proj_bias, "C_proj_bias": C_proj_bias}
    matrices = {"A_b": A_b, "B": B, "C": C}
    check_tensors({"xz": xz, "A": A} | weights | biases | matrices, optional=biases | matrices)
    if A.dim() != 2:
        raise ValueError(f"A must be (D, N), not {tuple(A.shape)}")
    if A_b is not None and (A_b.shape != A.shape or A_b.is_complex() != A.is_complex()):
        raise ValueError(f"A_b must be {tuple(A.shape)} of {A.dtype} as A, not {tuple(A_b.shape)} of {A_b.dtype}")
    channels, states = A.shape[0], A.shape[1] * (2 if A.is_complex() else 1)
    if xz.dim() != 3 or xz.shape[1] != 2 * channels or xz.shape[2] == 0 or not xz.is_floating_point():
        raise ValueError(
            f"xz must be (B, 2 D, L), floating point, with L >= 1 and D = {channels} as A, not {tuple(xz.shape)} "
            f"of {xz.dtype}"
        )
    check_kinds("the mixer", "xz", xz, weights | biases)
    width = conv1d_weight.shape[-1] if conv1d_weight.dim() else 0
    if tuple(conv1d_weight.shape) not in ((channels, 1, width), (channels, width)) or width == 0:
        form = f"({channels}, 1, W) or ({channels}, W)"
        raise ValueError(f"conv1d_weight must be {form} with W >= 1, not {tuple(conv1d_weight.shape)}")
    if delta_proj_weight.dim() != 2 or len(delta_proj_weight) != channels:
        raise ValueError(f"delta_proj_weight must be ({channels}, R), not {tuple(delta_proj_weight.shape)}")
    rank = delta_proj_weight.shape[1]
    rows = {rank + 2 * states, rank + states * ((B is None) + (C is None))}  # those of a constant B or C may be there
    if x_proj_weight.dim() != 2 or len(x_proj_weight) not in rows or x_proj_weight.shape[1] != channels:
        counts = " or ".join(map(str, sorted(rows)))
        raise ValueError(
            f"x_proj_weight must be ({counts}, {channels}), R = {rank} rows of the time step and {states} each of B "
            f"and C, not {tuple(x_proj_weight.shape)}"
        )
    for name, vector in biases.items():
        size = channels if name == "conv1d_bias" else states
        if vector is not None and tuple(vector.shape) != (size,):
            raise ValueError(f"{name} must be ({size},), not {tuple(vector.shape)}")
    for name, matrix, bias in (("B", B, B_proj_bias), ("C", C, C_proj_bias)):
        if bias is not None and matrix is not None:
            raise ValueError(f"{name}_proj_bias is added to a {name} of x_proj: leave it out beside a constant {name}")


def _to(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(like.dtype)


def _project_out(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """(B, D, L) -> (B, L, E), or (B, L, D) without a weight."""
    y = y.transpose(1, 2)
    return y if weight is None else F.linear(y, weight.to(y.dtype), _to(bias, y))


def _refuse_norms(**weights: Tensor | None) -> None:
    """Transformers calls with them, and would leave them out without a word if the signature had not their names."""
    given = [name for name, weight in weights.items() if weight is not None]
    if given:
        raise NotImplementedError(
            f"{', '.join(given)}: this mixer has no norms of B, C and the time step; norm, project and call "
            "selective_scan_fn, or, to let transformers do so, set sys.modules['mamba_ssm'] = None before its import"
        )


def _check_projection(xz: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    given = {"out_proj_weight": weight, "out_proj_bias": bias}
    check_tensors(given, optional=given)
    if weight is None and bias is not None:
        raise ValueError("out_proj_bias is given without out_proj_weight: give both, or neither")
    if weight is not None and (weight.dim() != 2 or 2 * weight.shape[1] != xz.shape[1]):
        raise ValueError(f"out_proj_weight must be (E, {xz.shape[1] // 2}), not {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"out_proj_bias must be ({len(weight)},), not {tuple(bias.shape)}")
    check_kinds("the mixer", "xz", xz, given)


def _inner(
    scan, xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, A_b, B, C, D, delta_bias, B_proj_bias,
    C_proj_bias, delta_softplus, out_proj: tuple[Tensor | None, Tensor | None] | None = None,
) -> Tensor:  # fmt: skip
    """The mixers below, scan: `selective_scan_fn` or `selective_scan_ref`.

    With A_b both directions of "v1" added up, without it one direction. out_proj: weight and bias, which give
    (B, L, E); without the pair (B, D, L).
    """
    inputs = xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A
    _check_inner(*inputs, A_b, B, C, B_proj_bias, C_proj_bias)
    if out_proj is not None:
        _check_projection(xz, *out_proj)
    x, z, delta, B, C = scan_inputs(*inputs, B, C, B_proj_bias, C_proj_bias)
    y = scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    if A_b is not None:
        B_b, C_b = (_reverse_time(matrix, A_b.is_complex()) for matrix in (B, C))
        y_b = scan(x.flip(-1), delta.flip(-1), A_b, B_b, C_b, D, z.flip(-1), delta_bias, delta_softplus)
        y = y + y_b.flip(-1)
    return y if out_proj is None else _project_out(y, *out_proj)


def _reverse_time(matrix: Tensor, is_complex: bool) -> Tensor:
    """A per-token B or C backwards in time, interleaved complex parts in order.

    The published code reverses the last axis whatever it is, so a constant (D, N) matrix gets its states
    reversed; kept, since results of its users depend on it.
    """
    if is_complex and matrix.dim() > 2:
        return matrix.unflatten(-1, (-1, 2)).flip(-2).flatten(-2)
    return matrix.flip(-1)


def mamba_inner_fn_no_out_proj(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """One direction of the mixer without the output projection (Mamba, arXiv 2312.00752, figure 3).

    Args:
        xz: (B, 2 D, L), x in the first half, the gate z in the second; floating point, as all but a complex A, B, C.
        conv1d_weight: (D, 1, W) or (D, W); conv1d_bias: (D,) or None.
        x_proj_weight: (R + columns of B and C, D); delta_proj_weight: (D, R).
        A: (D, N) real or complex. B, C: (D, N) constant, or None: then x_proj gives them for each token.
        D, delta_bias: (D,). B_proj_bias, C_proj_bias: (N,), (2 N,) if complex, of a B or C that x_proj gives.

    Returns (B, D, L) in xz's dtype. Raises as `selective_scan_fn`, and ValueError for a bias beside a constant B or C.
    """
    return _inner(
        selective_scan_fn, xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, None, B, C, D,
        delta_bias, B_proj_bias, C_proj_bias, delta_softplus,
    )  # fmt: skip


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor | None,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    *,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
) -> Tensor:
    """`mamba_inner_fn_no_out_proj`, then the output projection (E, D) with its bias (E,): (B, L, E).

    Without a weight there is no projection: (B, L, D). b_rms_weight, c_rms_weight, dt_rms_weight: norms of B, C and the
    time step (FalconMamba, arXiv 2410.05355), which this mixer has not; given, they raise NotImplementedError.
    """
    _refuse_norms(b_rms_weight=b_rms_weight, c_rms_weight=c_rms_weight, dt_rms_weight=dt_rms_weight)
    return _inner(
        selective_scan_fn, xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, None, B, C, D,
        delta_bias, B_proj_bias, C_proj_bias, delta_softplus, (out_proj_weight, out_proj_bias),
    )  # fmt: skip


def bimamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor | None,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """The "v1" mixer (Vision Mamba, arXiv 2401.09417, table 4): one convolution and one set of projections, then
    a second scan of the same inputs over reversed time with `A_b` (D, N). Other arguments as `mamba_inner_fn`.
    """
    check_tensors({"A_b": A_b})
    return _inner(
        selective_scan_fn, xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, A_b, B, C, D,
        delta_bias, B_proj_bias, C_proj_bias, delta_softplus, (out_proj_weight, out_proj_bias),
    )  # fmt: skip


def mamba_inner_no_out_proj_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """`mamba_inner_fn_no_out_proj` with `selective_scan_ref`, the loop over tokens, for comparison."""
    return _inner(
        selective_scan_ref, xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, None, B, C, D,
        delta_bias, B_proj_bias, C_proj_bias, delta_softplus,
    )  # fmt: skip


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor | None,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    *,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
) -> Tensor:
    """`mamba_inner_fn` with `selective_scan_ref`, the loop over tokens, for comparison."""
    _refuse_norms(b_rms_weight=b_rms_weight, c_rms_weight=c_rms_weight, dt_rms_weight=dt_rms_weight)
    return _inner(
        selective_scan_ref, xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, None, B, C, D,
        delta_bias, B_proj_bias, C_proj_bias, delta_softplus, (out_proj_weight, out_proj_bias),
    )  # fmt: skip


def bimamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor | None,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """`bimamba_inner_fn` with `selective_scan_ref`, the loop over tokens, for comparison."""
    check_tensors({"A_b": A_b})
    return _inner(
        selective_scan_ref, xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, A_b, B, C, D,
        delta_bias, B_proj_bias, C_proj_bias, delta_softplus, (out_proj_weight, out_proj_bias),
    )  # fmt: skip
