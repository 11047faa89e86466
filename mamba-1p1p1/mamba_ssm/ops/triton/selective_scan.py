"""The selective scan in Triton: how the kernels of `scan_kernels.py` are cut and launched, and the public operation."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mamba_ssm.ops.reference import collapsed_groups, common_groups, expanded_groups, matrix_groups
from mamba_ssm.ops.triton.common import (
    backward_block,
    ceil_div,
    dot_precision,
    on_its_device,
    options,
    own_memory,
    parallel_programs,
)
from mamba_ssm.ops.triton.scan_kernels import chain_kernel, scan_backward_kernel, scan_forward_kernel, segment_kernel

CHUNK = 64  # tokens between saved states
TILE = 16  # tokens of one staged piece of the time step; divides CHUNK
GROUP = 4  # tokens unrolled together; divides TILE
STATES_AT_A_TIME = 2  # of backward
MIN_COLUMNS = 8
FORWARD_BLOCK = 64  # channels per program of forward: two per thread on NVIDIA, one on AMD
MAX_STATES = 32


class ScanInputs(NamedTuple):
    """The tensors of one launch: views with a leading axis of directions, parameters once per direction."""

    u: Tensor  # (directions, B, D, L)
    delta: Tensor  # the same, or (directions, B, R, L) with dt_weight
    z: Tensor | None  # (directions, B, D, L)
    B: Tensor  # (directions, B, groups, N, L), or (directions, D, N)
    C: Tensor  # likewise
    A: tuple[Tensor, Tensor]  # (D, N), contiguous, as all parameters
    D: tuple[Tensor | None, Tensor | None]  # (D,)
    dt_weight: tuple[Tensor | None, Tensor | None]  # (D, R)
    bias: tuple[Tensor | None, Tensor | None]  # (D,)
    softplus: bool

    @property
    def groups(self) -> int:
        return max(m.shape[2] if m.dim() == 5 else 1 for m in (self.B, self.C))


class Grid(NamedTuple):
    """How the work is cut."""

    directions: int
    batch: int
    channels: int
    length: int
    block: int  # channels per program
    blocks: int  # programs across the channels
    segments: int
    segment_chunks: int
    group: int  # tokens unrolled together
    full: bool  # every program has `block` channels

    @property
    def launch(self) -> tuple[int, int, int]:
        return self.batch * self.blocks, self.segments, self.directions

    @property
    def programs(self) -> int:
        return self.batch * self.blocks * self.segments * self.directions


def _grid(inputs: ScanInputs, block: int, segments: int | None) -> Grid:
    """Blocks of one warp's channels; `segments` None lets the size decide."""
    directions, batch, channels, length = inputs.u.shape
    blocks = inputs.groups * ceil_div(channels // inputs.groups, block)
    chunks = ceil_div(length, CHUNK)
    if segments is None:
        segments = choose_segments(directions * batch * blocks, chunks, parallel_programs(inputs.u.device))
    segment_chunks = ceil_div(chunks, min(segments, chunks))
    return Grid(
        directions, batch, channels, length, block, blocks, ceil_div(chunks, segment_chunks), segment_chunks,
        group=GROUP if length >= GROUP else 2 if length >= 2 else 1, full=channels // inputs.groups % block == 0,
    )  # fmt: skip


def choose_segments(programs: int, chunks: int, wanted: int) -> int:
    """Segments of a sequence. A split computes the recurrence twice, so it must at least triple the programs."""
    segments = min(wanted // max(programs, 1), chunks // 2)
    return segments if segments >= 3 else 1


def _matrix_arguments(matrix: Tensor) -> tuple[tuple[int, ...], bool, bool]:
    """(strides of (direction, batch, group, state, token), is it per token, can two states be one load)."""
    if matrix.dim() == 3:  # (directions, D, N): the channel's stride takes the group's place
        return (matrix.stride(0), 0, matrix.stride(1), matrix.stride(2), 0), False, False
    strides = list(matrix.stride())
    if matrix.shape[2] == 1:
        strides[2] = 0
    others = [strides[i] for i in (0, 1, 2, 4) if matrix.shape[i] > 1]
    packed = (
        matrix.dtype == torch.float32
        and strides[3] == 1
        and matrix.shape[3] % 2 == 0
        and matrix.data_ptr() % 8 == 0
        and all(stride % 2 == 0 for stride in others)
    )
    return tuple(strides), True, packed


def _distance(B: Tensor, C: Tensor) -> int:
    """How many elements after B's C lies, if both are columns of one matrix side by side; else 0."""
    elements = (C.data_ptr() - B.data_ptr()) // B.element_size()
    alike = B.dim() == 5 and B.dtype == C.dtype and B.shape == C.shape and B.stride() == C.stride()
    return elements if alike and elements == B.shape[3] else 0


def _common(inputs: ScanInputs, grid: Grid, read: tuple[Tensor, ...] = (), written: tuple = ()) -> dict:
    """Arguments that every scan kernel takes. `read`, `written`: what the kernel reads and writes beside `inputs`."""
    rank = 0 if inputs.dt_weight[0] is None else inputs.dt_weight[0].shape[1]
    return {
        "delta": inputs.delta,
        "delta_strides": inputs.delta.stride(),
        "z": inputs.z,
        "z_strides": (0, 0, 0, 0) if inputs.z is None else inputs.z.stride(),
        "dt_weight": inputs.dt_weight[0],
        "dt_weight_b": inputs.dt_weight[1],
        "bias": inputs.bias[0],
        "bias_b": inputs.bias[1],
        "A": inputs.A[0],
        "A_b": inputs.A[1],
        "length": grid.length,
        "channels": grid.channels,
        "group_channels": grid.channels // inputs.groups,
        "segment_chunks": grid.segment_chunks,
        "N": inputs.A[0].shape[1],
        "R": rank,
        "R_PADDED": max(16, triton.next_power_of_2(rank)),
        "SOFTPLUS": inputs.softplus,
        "FULL": grid.full,
        "PAIRED": _is_paired(grid, inputs.u, inputs.z, *read),
        "WIDE": _is_wide(inputs, grid.length, *read, *written),
        "PRECISION": dot_precision(inputs.u.dtype),
        "BLOCK": grid.block,
        "CHUNK": CHUNK,
        "TILE": TILE,
        "GROUP": grid.group,
    }


def _is_wide(inputs: ScanInputs, length: int, *others: Tensor | None) -> bool:
    """Whether one sequence spans 2^31 elements of any tensor, from token to token or from channel to channel."""
    tensors = [t for t in (inputs.u, inputs.delta, inputs.z, inputs.B, inputs.C, *others) if t is not None]
    spans = [max(abs(length * t.stride(-1)), abs(t.shape[-2] * t.stride(-2))) for t in tensors]
    return max(spans) >= 2**31


def _is_paired(grid: Grid, *tensors: Tensor | None) -> bool:
    """Whether two neighbouring channels of every tensor are one aligned 32-bit word."""
    there = [t for t in tensors if t is not None]
    return grid.full and all(
        t.dtype == torch.bfloat16 and t.stride(2) == 1 and t.data_ptr() % 4 == 0
        and all(t.stride(i) % 2 == 0 for i in (0, 1, 3) if t.shape[i] > 1)
        for t in there
    )  # fmt: skip


def _new(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _carry(
    inputs: ScanInputs, grid: Grid, v: Tensor, matrix: Tensor, start: Tensor | None, scale: float, adjoint: bool
) -> Tensor | None:
    """What every segment starts from, (directions, batch, segments, N, D): two launches, none for one segment."""
    if grid.segments == 1:
        return start
    states = inputs.A[0].shape[1]
    strides, variable, packed = _matrix_arguments(matrix)
    ends = _new(v, grid.directions, grid.batch, grid.segments, states, grid.channels)
    decays = _new(v, grid.directions, grid.batch, grid.segments, grid.channels)
    arguments = _common(inputs, grid, read=(v,))
    if not adjoint:
        arguments |= {"z": None}
    segment_kernel[grid.launch](
        v=v, v_strides=v.stride(), M=matrix, M_strides=strides, M_VARIABLE=variable, M_PACKED=packed,
        scratch=_new(v, grid.programs * (TILE + grid.group) * grid.block), ends=ends, decays=decays, scale=scale,
        ADJOINT=adjoint, **arguments, **options(),
    )  # fmt: skip
    block = 128
    chain_kernel[(grid.directions * grid.batch, ceil_div(grid.channels, block), states)](
        ends, decays, inputs.A[0], inputs.A[1], start, grid.batch, grid.segments, grid.channels,
        N=states, ADJOINT=adjoint, BLOCK=block, **options(),
    )  # fmt: skip
    return ends


def states_shape(directions: int, batch: int, channels: int, length: int, states: int) -> tuple[int, ...]:
    """Shape of the float32 states that forward saves for backward."""
    return directions, batch, ceil_div(length, CHUNK), states, channels


def scan_forward(
    inputs: ScanInputs, out: Tensor, states: Tensor | None, last_state: Tensor | None, segments: int | None = None
) -> None:
    """Run the scan. Writes out (directions, B, D, L), states (`states_shape`), last_state (directions, B, D, N)."""
    grid = _grid(inputs, FORWARD_BLOCK, segments)
    carry = _carry(inputs, grid, inputs.u, inputs.B, None, 1.0, adjoint=False)
    B_strides, B_variable, B_packed = _matrix_arguments(inputs.B)
    C_strides, C_variable, C_packed = _matrix_arguments(inputs.C)
    scan_forward_kernel[grid.launch](
        u=inputs.u, u_strides=inputs.u.stride(), out=out, out_strides=out.stride(),
        B=inputs.B, B_strides=B_strides, B_VARIABLE=B_variable, B_PACKED=B_packed,
        C=inputs.C, C_strides=C_strides, C_VARIABLE=C_variable, C_PACKED=C_packed,
        D=inputs.D[0], D_b=inputs.D[1], scratch=_new(out, grid.programs * (TILE + grid.group) * grid.block),
        C_AFTER_B=_distance(inputs.B, inputs.C), SAME_STEPS=out.stride(3) == inputs.u.stride(3),
        states=states, carry=carry, last_state=last_state,
        **_common(inputs, grid, written=(out,)), **options(),
    )  # fmt: skip


class ScanGradients(NamedTuple):
    """Float32 sums over batch (parameters) or channels (B, C); None where there was no such input."""

    A: Tensor  # (directions, D, N)
    B: Tensor  # (directions, B, groups, N, L), or (directions, D, N)
    C: Tensor
    D: Tensor | None  # (directions, D)
    bias: Tensor  # (directions, D)


def scan_backward(
    inputs: ScanInputs, dout: Tensor, carry: Tensor | None, states: Tensor,
    du: Tensor, ddelta: Tensor, dz: Tensor | None, scale: float = 1.0, segments: int | None = None,
) -> ScanGradients:  # fmt: skip
    """Gradients of `scan_forward` for dout (directions, B, D, L) times scale, and silu(z) if there is a z.

    carry: (directions, B, 1, N, D), the gradient of the last state, or None. Writes du, ddelta (of the time step
    before bias and softplus, D channels wide) and dz, if they are wanted, all (directions, B, D, L).
    """
    block, per_thread = backward_block()
    grid = _grid(inputs, block, segments)
    states_count = inputs.A[0].shape[1]
    carry = _carry(inputs, grid, dout, inputs.C, carry, scale, adjoint=True)
    B_strides, B_variable, B_packed = _matrix_arguments(inputs.B)
    C_strides, C_variable, C_packed = _matrix_arguments(inputs.C)
    partial = (grid.directions, grid.batch, grid.segments, states_count, grid.channels)
    dA = _new(dout, *partial)
    dB_constant = None if B_variable else torch.zeros_like(dA)
    dC_constant = None if C_variable else torch.zeros_like(dA)
    dBC = None
    if B_variable or C_variable:
        dBC = _new(dout, grid.directions, grid.blocks, grid.batch, grid.length, 2, states_count)
    dbias = _new(dout, *partial[:3], grid.channels)
    dD = None if inputs.D[0] is None else torch.empty_like(dbias)
    rows = _backward_scratch_rows(states_count, grid.group)
    scan_backward_kernel[grid.launch](
        dout=dout, dout_strides=dout.stride(), u=inputs.u, u_strides=inputs.u.stride(),
        B=inputs.B, B_strides=B_strides, B_VARIABLE=B_variable, B_PACKED=B_packed,
        C=inputs.C, C_strides=C_strides, C_VARIABLE=C_variable, C_PACKED=C_packed,
        D=inputs.D[0], D_b=inputs.D[1], C_AFTER_B=_distance(inputs.B, inputs.C),
        SAME_STEPS=len({t.stride(3) for t in (inputs.u, dout, du, ddelta)}) == 1,
        scratch=_new(dout, grid.programs * rows * grid.block),
        states=states, carry=carry, du=du, du_strides=du.stride(), ddelta=ddelta, ddelta_strides=ddelta.stride(),
        dz=dz, dz_strides=(0, 0, 0, 0) if dz is None else dz.stride(), dBC=dBC, dA=dA,
        dB_constant=dB_constant, dC_constant=dC_constant, dD=dD, dbias=dbias, scale=scale,
        PER_THREAD=per_thread, SCRATCH_ROWS=rows, PAIRS_PADDED=_padded_pairs(states_count),
        STATES_AT_A_TIME=STATES_AT_A_TIME,
        **_common(inputs, grid, read=(dout,), written=(du, ddelta, dz)), **options(),
    )  # fmt: skip
    dB, dC = _matrix_gradients(dBC, inputs.groups)
    return ScanGradients(
        _sum_parts(dA), dB if B_variable else _sum_parts(dB_constant), dC if C_variable else _sum_parts(dC_constant),
        None if dD is None else dD.sum((1, 2)), dbias.sum((1, 2)),
    )  # fmt: skip


def _padded_pairs(states: int) -> int:
    """Columns of the matrix of sums over channels: a power of two that the matrix unit takes."""
    width = STATES_AT_A_TIME if states % STATES_AT_A_TIME == 0 else 1
    return max(MIN_COLUMNS, triton.next_power_of_2(states // width))


def _backward_scratch_rows(states: int, group: int) -> int:
    """Rows of BLOCK numbers: A, its gradient, what is sent back; two sums; steps, slopes and marked states."""
    return 3 * states + 2 + 2 * (group + CHUNK) + (CHUNK // group + 1) * states


def _sum_parts(parts: Tensor) -> Tensor:
    """(directions, batch, segments, N, D) -> (directions, D, N)."""
    return parts.sum((1, 2)).transpose(1, 2)


def _matrix_gradients(parts: Tensor | None, groups: int) -> tuple[Tensor | None, Tensor | None]:
    """(directions, blocks, B, L, 2, N) -> dB and dC, each (directions, B, groups, N, L)."""
    if parts is None:
        return None, None
    summed = parts.unflatten(1, (groups, -1)).sum(2)  # (directions, groups, B, L, 2, N)
    dB, dC = summed.permute(0, 2, 1, 5, 3, 4).unbind(-1)
    return dB, dC


# --- the public operation


def _float32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _with_direction(matrix: Tensor, groups: int) -> Tensor:
    """A public form of B or C with the axes that `ScanInputs` wants; several groups as those of both, `groups`."""
    if matrix.dim() == 3:
        matrix = matrix.unsqueeze(1)  # (B, 1, N, L)
    elif matrix_groups(matrix) > 1:  # one is read for all groups as it is
        matrix = expanded_groups(matrix, groups)
    return matrix.unsqueeze(0)


def _of_groups(gradient: Tensor, matrix: Tensor) -> Tensor:
    """What the kernel found for (1, B, groups, N, L), or (1, D, N), as the gradient of B or C in its public form."""
    gradient = collapsed_groups(gradient[0], matrix_groups(matrix))
    return own_memory(gradient.reshape(matrix.shape), matrix.dtype)


def _inputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> ScanInputs:
    groups = common_groups(B, C)
    return ScanInputs(
        u.unsqueeze(0), delta.unsqueeze(0), None if z is None else z.unsqueeze(0), _with_direction(B, groups),
        _with_direction(C, groups), (_float32(A),) * 2, (_float32(D),) * 2, (None, None), (_float32(delta_bias),) * 2,
        delta_softplus,
    )  # fmt: skip


@on_its_device
def selective_scan_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, save, segments=None):
    """Backend form of the selective scan: (out, last_state, saved)."""
    batch, channels, length = u.shape
    d_state = A.shape[1]
    out = torch.empty((batch, channels, length), dtype=u.dtype, device=u.device)
    last_state = _new(u, batch, channels, d_state)
    shape = states_shape(1, batch, channels, length, d_state)
    states = _new(u, *shape) if save else None
    inputs = _inputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    scan_forward(inputs, out.unsqueeze(0), states, last_state.unsqueeze(0), segments)
    saved = states.view(-1).view(torch.uint8) if save else u.new_empty(0, dtype=torch.uint8)
    return out, last_state, saved


@on_its_device
def selective_scan_backward(
    dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, saved, segments=None
):
    """Gradients of the selective scan in the order of its arguments, None for an argument that was None."""
    batch, channels, length = u.shape
    inputs = _inputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    states = saved.view(torch.float32).view(states_shape(1, batch, channels, length, A.shape[1]))
    carry = None
    if dlast_state is not None:
        carry = dlast_state.float().transpose(1, 2).contiguous()[None, :, None]  # (1, B, 1, N, D)
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dz = None if z is None else torch.empty_like(z)
    grads = scan_backward(
        inputs, dout.unsqueeze(0), carry, states, du.unsqueeze(0), ddelta.unsqueeze(0),
        None if dz is None else dz.unsqueeze(0), segments=segments,
    )  # fmt: skip
    return (
        du, ddelta, grads.A[0].to(A.dtype), _of_groups(grads.B, B), _of_groups(grads.C, C),
        None if D is None else grads.D[0].to(D.dtype), dz,
        None if delta_bias is None else grads.bias[0].to(delta_bias.dtype),
    )  # fmt: skip


def selective_scan_saved_bytes(batch: int, channels: int, length: int, d_state: int, dtype: torch.dtype) -> int:
    """Size of what forward saves for backward: the states before every chunk."""
    return 4 * batch * ceil_div(length, CHUNK) * d_state * channels
