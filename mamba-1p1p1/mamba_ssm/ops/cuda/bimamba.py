"""The bidirectional mixer in CUDA C++ for NVIDIA GPUs (Vision Mamba, arXiv 2401.09417, algorithm 1).

Forward is four launches: the weights as the others read them (weights.cu), both convolutions (conv.cu), both x
projections (one batched matrix product), and both scans with gate and sum (scan_forward.cu). Backward keeps nothing of
forward: it runs it again, this time writing the states at every eighth token and the gradients of the gate, and walks
back (scan_backward.cu). Activations are 16 bits wide, states, time steps and sums float32. No atomics: the same bits
on every run.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_ssm.ops.bimamba import with_A
from mamba_ssm.ops.cuda import runtime
from mamba_ssm.ops.triton import bimamba as triton_bimamba
from mamba_ssm.ops.triton.bimamba import Parameters, product_in_float32
from mamba_ssm.ops.triton.common import ceil_div, on_its_device

DTYPES = (torch.bfloat16, torch.float16)
STATES = 16
WARP_CHANNELS = 32  # of threads of four channels; a multiple of it is served
TILE = 8  # tokens between two saved states
CONV_THREADS = 64  # of two channels each
CONV_STEP = 8  # tokens that a thread has in registers
CONV_SEGMENT, CONV_BACKWARD_SEGMENT = 32, 64  # tokens that a thread walks, at least
CONV_RESIDENT = 16  # blocks of the forward convolution that a multiprocessor holds
PIECE = 16  # bytes of one in scan_forward.cu
TILES_OF_A_SLOT = 45  # that a block of scan_forward walks, at least, where sequences are cut (docs/LOG.md, 2026-11-28)
FEW_WARPS = 8  # of a multiprocessor
SUM_COLUMNS = 32
TOKEN_GROUPS = 32  # parts in which products over all tokens are made
NARROW_ARRAYS, WEIGHT_THREADS = 8, 256
MAX_RANK = 64
SHARED_MEMORY = 128 * 1024  # bytes of a multiprocessor, at least
RESERVED = 1024  # of them for each block
MAX_GRID = 65535  # blocks in a grid's second and third place


def serves_block(dtype: torch.dtype, channels: int, d_state: int, rank: int, d_conv: int) -> bool:
    """Whether these kernels serve a mixer of such sizes; Triton's serve the others."""
    fits = dtype in DTYPES and d_state == STATES and channels % WARP_CHANNELS == 0
    return fits and rank % 4 == 0 and rank <= MAX_RANK and 2 <= d_conv <= 4


def serves(dtype: torch.dtype, batch: int, length: int, channels: int, d_state: int, rank: int, d_conv: int) -> bool:
    """Whether they serve this batch of it, too.

    A warp walks a whole sequence: where there is less than one of either direction for each multiprocessor, Triton's
    kernels, which split sequences, are the better choice. So they are where a multiprocessor has 100 KB of shared
    memory (compute capability 8.6, 8.9, 12): it would hold two to four warps, for four schedulers.
    """
    if not serves_block(dtype, channels, d_state, rank, d_conv) or length * 2 * channels >= 2**31:
        return False
    if batch > MAX_GRID or length > CONV_SEGMENT * MAX_GRID:
        return False
    device = _device()
    return batch * channels >= WARP_CHANNELS * device.multiprocessors and device.shared_memory >= SHARED_MEMORY


class Device(NamedTuple):
    """What of a GPU decides between kernels."""

    multiprocessors: int
    shared_memory: int = SHARED_MEMORY  # bytes of a multiprocessor


def _device() -> Device:
    if runtime.emulation():
        return Device(1)
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Device(found.multi_processor_count, found.shared_memory_per_multiprocessor)


class Shape(NamedTuple):
    """How a scan's kernel is cut (scan.cuh)."""

    channels: int  # of a thread
    warps: int  # of a block, of one direction
    resident: int  # warps that a multiprocessor is to hold

    @property
    def width(self) -> int:
        """Channels of a warp."""
        return 8 * self.channels

    @property
    def block(self) -> int:
        """Channels of a block."""
        return self.width * self.warps

    def shared(self, columns: int, padded: int, tiles: int, exchanges: int, halves: int) -> int:
        """Bytes of `warps` and what they share: `tiles` of `projected`; each warp's parameters, and tiles of numbers on
        their way between lanes (`exchanges`) and of 16-bit channels (`halves`)."""
        row = self.width + (16 if self.channels == 4 else 0)  # scan.cuh's Halves::ROW
        pitch = columns if columns % 16 else columns + 8  # its PITCH
        warp = 4 * self.width * (padded + 2) + TILE * (4 * exchanges * (self.width + 8) + 2 * halves * row)
        return tiles * TILE * pitch * 4 + self.warps * warp


class Shapes(NamedTuple):
    """The scans' kernels' cuts."""

    forward: Shape
    again: Shape  # forward, run for backward: of as many channels a thread, for states lie as threads hold them
    backward: Shape


def _shapes(batch: int, channels: int, rank: int) -> Shapes:
    """The fastest cuts that spill no register, by how many warps of four channels a thread there are for a
    multiprocessor. Few: twice as many of two channels hide more latency. Measured for ranks 12 and 24 (docs/LOG.md,
    2026-11-27); for larger ones, which have fewer registers to spare, chosen by their machine code.
    """
    warps = 2 * batch * channels / WARP_CHANNELS / _device().multiprocessors
    if warps <= FEW_WARPS:
        return Shapes(Shape(2, 2, 16), Shape(2, 2, 16), Shape(2, 2, 12 if rank <= 16 else 8))
    return Shapes(Shape(4, 4, 16) if rank <= 24 else Shape(4, 2, 12), Shape(4, 2, 12), Shape(4, 2, 8))


def _serves(like: Tensor, channels: int, parameters) -> bool:
    """Whether these kernels serve sequences like those of `like` (batch, length, ...)."""
    conv_weight, _, x_proj, dt_weight = parameters[:4]
    rank, width = dt_weight.shape[1], conv_weight.shape[1]
    return serves(like.dtype, *like.shape[:2], channels, (x_proj.shape[0] - rank) // 2, rank, width)


def _contiguous(tensor: Tensor) -> Tensor:
    """The tensor where 16 bytes at a time can be read of it: itself, if that is so."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


class Gradients(NamedTuple):
    """Of parameters, in the order in which `sum_rows` takes them: shares (2, rows, ...), or sums, a pair each."""

    A: Tensor | tuple[Tensor, Tensor]
    D: Tensor | tuple[Tensor, Tensor]
    dt_bias: Tensor | tuple[Tensor, Tensor]
    conv_weight: Tensor | tuple[Tensor, Tensor]
    conv_bias: Tensor | tuple[Tensor, Tensor]
    x_proj_weight: Tensor | tuple[Tensor, Tensor]
    dt_weight: Tensor | tuple[Tensor, Tensor]


def _parameters(forward_params, backward_params) -> Parameters:
    """As pairs of contiguous float32 tensors; no copies where the model keeps them so."""
    pairs = zip(forward_params, backward_params)
    return Parameters(*(tuple(None if p is None else _contiguous(p.float()) for p in pair) for pair in pairs))


def _aligned(xz: Tensor) -> Tensor:
    """xz with rows of adjacent channels that 16-byte copies can read."""
    whole = xz.stride(2) == 1 and xz.stride(0) % 8 == 0 and xz.stride(1) % 8 == 0 and xz.data_ptr() % 16 == 0
    whole = whole and xz.shape[1] * xz.stride(1) < 2**31  # 32 bits reach any token of a sequence
    return xz if whole else xz.clone(memory_format=torch.contiguous_format)


def _half(dtype: torch.dtype) -> tuple[str, int]:
    return "HALF_IS_BF16", int(dtype == torch.bfloat16)


def _scan_kernel(name: str, dtype: torch.dtype, rank: int, shape: Shape, *more: tuple[str, int]):
    sizes = (("RANK", rank), ("CH", shape.channels), ("WARPS", shape.warps), ("RESIDENT", shape.resident))
    return runtime.load(f"{name}.cu", name, (_half(dtype), *sizes, *more))


# --- projections


def _padded(rank: int) -> int:
    """Columns of the time step in `projected`: more than `rank`, so that rows are aligned for the matrix products."""
    return ceil_div(rank, 8) * 8


class Weights(NamedTuple):
    """What a call makes of its parameters."""

    x_proj: Tensor  # (2, columns, D) in 16 bits: rows of the time step, some of them again as padding, of B, of C
    others: tuple[Tensor, ...]  # in 16 bits
    parameters: Parameters
    dt_weight: Tensor | None  # (2, D, padded rank) in 16 bits, the padding zero


class Task(NamedTuple):
    """An array that weights.cu makes of another."""

    source: Tensor  # contiguous float32
    target: Tensor

    @property
    def fours(self) -> int:
        """Of its elements."""
        return self.source.numel() // 4


def _prepare(
    parameters: Parameters, dtype: torch.dtype, *others: Tensor, decay: str = "A", backward: bool = False
) -> Weights:
    """Weights of matrix products in 16 bits, with up to two `others`, and A where log(-A) is given, by one launch.

    The time step's are for `backward` alone. The padding of x_proj's products meets zeros.
    """
    dt_weight = parameters.dt_weight
    channels, rank = dt_weight[0].shape
    padded_rank = _padded(rank)
    x_proj, narrowed = _narrowed_x_proj(parameters.x_proj_weight, rank, dtype)
    converted = []
    for weight in others:
        if weight.dtype == torch.float32:
            converted.append(torch.empty(weight.shape, dtype=dtype, device=weight.device))
            narrowed.append(Task(_contiguous(weight), converted[-1]))
        else:
            converted.append(weight.to(dtype))
    made_A = [Task(A_log, torch.empty_like(A_log)) for A_log in (parameters.A if decay == "log" else ())]
    padded = torch.empty((2, channels, padded_rank), dtype=dtype, device=x_proj.device) if backward else None

    fours = max(task.fours for task in (*narrowed, *made_A))
    if backward:
        fours = max(fours, channels * padded_rank // 4)
    arrays = NARROW_ARRAYS + (4 if backward else len(made_A))  # those that there are not are empty, or behind the last
    runtime.load("weights.cu", "make_weights", (_half(dtype),))(
        (ceil_div(fours, WEIGHT_THREADS), arrays, 1), WEIGHT_THREADS, 0,
        *_task_arguments(narrowed, NARROW_ARRAYS), *_task_arguments(made_A, 2),
        *dt_weight, padded, channels, rank, padded_rank // 4,
    )  # fmt: skip
    if made_A:
        parameters = parameters._replace(A=tuple(task.target for task in made_A))
    return Weights(x_proj, tuple(converted), parameters, padded)


def _narrowed_x_proj(pair: tuple[Tensor, Tensor], rank: int, dtype: torch.dtype) -> tuple[Tensor, list[Task]]:
    """`Weights.x_proj`, and what is to be written there."""
    rows, channels = pair[0].shape
    padding = _padded(rank) - rank
    x_proj = torch.empty((2, rows + padding, channels), dtype=dtype, device=pair[0].device)
    if not padding:
        return x_proj, [Task(weight, both) for weight, both in zip(pair, x_proj)]
    tasks = []
    for weight, both in zip(pair, x_proj):
        parts = weight[:rank], weight[:padding], weight[rank:]
        tasks += map(Task, parts, both.split([rank, padding, rows - rank]))
    return x_proj, tasks


def _task_arguments(tasks: list[Task], count: int) -> list:
    """A kernel's arguments for `count` tasks: those that there are not are empty."""
    given = [argument for task in tasks for argument in (*task, task.fours)]
    return given + [None, None, 0] * (count - len(tasks))


def _projections_backward(ddelta, dBC, u, projected, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """(du through the projections; shares of the gradients of their weights: x projection (2, groups, columns, D), time
    step (2, groups, padded rank, D))."""
    padded, columns = _padded(weights.parameters.dt_weight[0].shape[1]), projected.shape[-1]
    rows = u.shape[1] * u.shape[2]
    flat_u, flat_ddelta = u.flatten(1, 2), ddelta.flatten(1, 2)  # (2, B L, D)
    dprojected = torch.empty((2, rows, columns), dtype=u.dtype, device=u.device)
    torch.bmm(flat_ddelta, weights.dt_weight, out=dprojected[..., :padded])
    runtime.load("sums.cu", "sum_blocks", (_half(u.dtype),))(
        (ceil_div(rows * STATES // 2, 256), 1, 2), 256, 0, dBC, dprojected, rows, 2 * STATES, dBC.shape[1], columns
    )
    du = torch.bmm(dprojected, weights.x_proj)
    dt = projected[..., :padded].to(u.dtype)
    return du, _over_tokens(dprojected, flat_u, u.shape[1]), _over_tokens(dt, flat_ddelta, u.shape[1])


def _over_tokens(left: Tensor, right: Tensor, batch: int) -> Tensor:
    """Shares, by groups of sequences, of sums over tokens (2, rows, M), (2, rows, N) -> (2, groups, M, N) float32.

    A gradient of M N numbers alone would keep a few multiprocessors busy with all tokens.
    """
    groups = next(count for count in range(min(batch, TOKEN_GROUPS), 0, -1) if batch % count == 0)
    left, right = (one.view(2 * groups, -1, one.shape[-1]) for one in (left, right))
    return product_in_float32(left.transpose(1, 2), right).unflatten(0, (2, groups))


# --- launches


def _conv(name: str, xz: Tensor, parameters, segment: int, before: tuple, after: tuple) -> None:
    conv_weight, conv_bias = parameters.conv_weight, parameters.conv_bias
    batch, length, double = xz.shape
    channels = double // 2
    kernel = runtime.load("conv.cu", name, (_half(xz.dtype), ("WIDTH", conv_weight[0].shape[1])))
    grid = (ceil_div(channels, 2 * CONV_THREADS), ceil_div(length, segment), batch)
    sizes = (length, channels, xz.stride(0), xz.stride(1), segment)
    kernel(grid, CONV_THREADS, 0, xz, *before, *conv_weight, *conv_bias, *after, *sizes)


def _conv_segment(batch: int, length: int, channels: int) -> int:
    """Tokens that a thread of the forward convolution walks: so many that all blocks are whole waves of those that
    the GPU holds, since a last wave of a few blocks takes as long as a full one.
    """
    blocks = ceil_div(channels, 2 * CONV_THREADS) * batch  # of one segment
    resident = CONV_RESIDENT * _device().multiprocessors
    waves = max(1, blocks * ceil_div(length, CONV_SEGMENT) // resident)
    segments = max(1, waves * resident // blocks)
    return max(CONV_SEGMENT, ceil_div(ceil_div(length, segments), CONV_STEP) * CONV_STEP)


class Pieces(NamedTuple):
    """How scan_forward's jobs, a block's channels of one sequence each, are cut (its `Piece`)."""

    blocks: int
    slots: int  # blocks that run at once
    period: int  # slots over the greatest common divisor of jobs and slots; 1: nothing is cut
    inverse: int  # of jobs over that divisor, modulo period


def _forward_shared(shape: Shape, rank: int, again: bool) -> int:
    """Bytes of shared memory of scan_forward's blocks."""
    padded = _padded(rank)
    halves = 5 if again else 4
    return 2 * (PIECE + shape.shared(padded + 2 * STATES, padded, 3, exchanges=2, halves=halves))


def _pieces(batch: int, length: int, channels: int, shape: Shape, shared: int) -> Pieces:
    """Jobs that are no whole waves of blocks are cut so that all blocks end together, where each has enough to walk:
    the pieces' beginnings take time, too. `shared`: bytes of a block.
    """
    device = _device()
    jobs = batch * ceil_div(channels, shape.block)
    together = min(shape.resident // (2 * shape.warps), device.shared_memory // (shared + RESERVED))
    slots = together * device.multiprocessors
    if jobs <= slots or jobs % slots == 0 or jobs * ceil_div(length, TILE) < TILES_OF_A_SLOT * slots:
        return Pieces(jobs, 0, 1, 0)
    alike = math.gcd(jobs, slots)
    period = slots // alike
    return Pieces(slots * (jobs // slots + 1) + slots - alike, slots, period, pow(jobs // alike, -1, period))


class ScanInputs(NamedTuple):
    """What the scans read of x, and how scan_forward is cut."""

    u: Tensor  # (2, B, L, D): the convolution and SiLU of both directions
    projected: Tensor  # (2, B L, columns) float32: their projections: time step, padding, B and C
    arrived: Tensor  # (slots,) zeros
    shape: Shape
    shared: int  # bytes of a block
    pieces: Pieces


def _scan_inputs(xz: Tensor, weights: Weights, again: bool = False) -> ScanInputs:
    (batch, length, _), (channels, rank) = xz.shape, weights.parameters.dt_weight[0].shape
    shapes = _shapes(batch, channels, rank)
    shape = shapes.again if again else shapes.forward
    shared = _forward_shared(shape, rank, again)
    pieces = _pieces(batch, length, channels, shape, shared)
    u = torch.empty((2, batch, length, channels), dtype=xz.dtype, device=xz.device)
    arrived = torch.empty(pieces.slots, dtype=torch.int32, device=xz.device)
    after = u, arrived, pieces.slots
    _conv("conv_forward", xz, weights.parameters, _conv_segment(batch, length, channels), (), after)
    projected = product_in_float32(u.flatten(1, 2), weights.x_proj.transpose(1, 2))
    return ScanInputs(u, projected, arrived, shape, shared, pieces)


def _scan_forward(
    xz: Tensor, inputs: ScanInputs, parameters, scale: float, dy: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, and for a gradient dy: those of the scans' sum and of z side by side (B, L, 2 D), states)."""
    batch, length, double = xz.shape
    channels = double // 2
    rank = parameters.dt_weight[0].shape[1]
    y = torch.empty((batch, length, channels), dtype=xz.dtype, device=xz.device)
    gradients = states = None
    if dy is not None:
        gradients = torch.empty((batch, length, double), dtype=xz.dtype, device=xz.device)
        groups = ceil_div(length, TILE)
        states = torch.empty((2, batch, groups, channels, STATES), dtype=torch.float32, device=xz.device)
    shape, pieces = inputs.shape, inputs.pieces
    carried = torch.empty((pieces.slots, 2, shape.block, STATES), dtype=torch.float32, device=xz.device)
    _scan_kernel("scan_forward", xz.dtype, rank, shape, ("FOR_BACKWARD", int(dy is not None)))(
        (pieces.blocks, 1, 1), 2 * 32 * shape.warps, inputs.shared,
        inputs.u, inputs.projected, xz, y, dy, gradients, states, carried, inputs.arrived,
        *parameters.dt_weight, *parameters.dt_bias, *parameters.A, *parameters.D,
        batch, *pieces[1:], length, channels, xz.stride(0), xz.stride(1), scale,
    )  # fmt: skip
    return y, gradients, states


def _scan_backward(gradients: Tensor, u: Tensor, projected: Tensor, states: Tensor, parameters):
    """(du, ddelta, shares of dB and dC, of dA, of dD, of the time step's bias)."""
    _, batch, length, channels = u.shape
    rank = parameters.dt_weight[0].shape[1]
    shape = _shapes(batch, channels, rank).backward
    blocks = ceil_div(channels, shape.block)
    du, ddelta = torch.empty_like(u), torch.empty_like(u)

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=u.device)

    dBC = new(2, blocks, batch * length, 2 * STATES)
    dA, dD, dbias = new(2, batch, channels, STATES), new(2, batch, channels), new(2, batch, channels)
    shared = shape.shared(projected.shape[-1], _padded(rank), 2, exchanges=5, halves=4)
    shared += shape.warps * TILE // 2 * (shape.width * STATES + 2 * 128) * 4  # states and shares of a tile's halves
    _scan_kernel("scan_backward", u.dtype, rank, shape)(
        (blocks, batch, 2), 32 * shape.warps, shared,
        gradients, u, projected, states, du, ddelta, dBC, dA, dD, dbias,
        *parameters.dt_weight, *parameters.dt_bias, *parameters.A, *parameters.D, length, channels,
    )  # fmt: skip
    return du, ddelta, dBC, dA, dD, dbias


def _conv_backward(xz: Tensor, du_scan: Tensor, du_projected: Tensor, parameters, dxz: Tensor) -> tuple[Tensor, Tensor]:
    """Write dx into dxz for both parts of du. Returns shares of the filters' gradients and of the biases'."""
    batch, length, double = xz.shape
    parts = (2, batch * ceil_div(length, CONV_BACKWARD_SEGMENT), double // 2)
    dbias = torch.empty(parts, dtype=torch.float32, device=xz.device)
    dweight = torch.empty((*parts, parameters.conv_weight[0].shape[1]), dtype=torch.float32, device=xz.device)
    _conv("conv_backward", xz, parameters, CONV_BACKWARD_SEGMENT, (du_scan, du_projected), (dxz, dweight, dbias))
    return dweight, dbias


def _sums(shares: Gradients, parameters: Parameters, dtype: torch.dtype, decay: str) -> Gradients:
    """Sums over rows of shares (2, rows, ...), a pair each: gradients without padding, of A or of log(-A)."""
    channels, rank = parameters.dt_weight[0].shape
    sizes = Gradients(*(share[0, 0].numel() for share in shares))
    sizes = sizes._replace(  # without their shares' padding
        x_proj_weight=parameters.x_proj_weight[0].numel(), dt_weight=parameters.dt_weight[0].numel()
    )
    shares = [share.flatten(2) for share in shares]
    pairs = [tuple(share.new_empty(size) for _ in range(2)) for share, size in zip(shares, sizes)]
    arguments = [
        argument for share, pair in zip(shares, pairs) for argument in (share, *pair, share.shape[1], share.shape[2])
    ]
    widest = max(share.shape[2] for share in shares)
    runtime.load("sums.cu", "sum_rows", (_half(dtype),))(
        (ceil_div(widest, SUM_COLUMNS), len(shares), 2), 256, 256 * 4,
        *arguments, *(parameters.A if decay == "log" else (None, None)), channels, rank,
    )  # fmt: skip
    return Gradients(*pairs)


# --- backend form


@on_its_device
def bimamba_forward(xz, forward_params, backward_params, scale, save):
    """(y (B, L, D), saved): nothing is saved."""
    if not _serves(xz, xz.shape[2] // 2, forward_params):
        return triton_bimamba.bimamba_forward(xz, forward_params, backward_params, scale, save)
    weights = _prepare(_parameters(forward_params, backward_params), xz.dtype)
    return _forward(xz, weights, scale), xz.new_empty(0, dtype=torch.uint8)


def _forward(xz: Tensor, weights: Weights, scale: float) -> Tensor:
    xz = _aligned(xz)
    return _scan_forward(xz, _scan_inputs(xz, weights), weights.parameters, scale)[0]


def bimamba_saved_bytes(
    batch: int, length: int, channels: int, d_state: int, dt_rank: int, d_conv: int, dtype: torch.dtype
) -> int:
    """Size of what forward saves for backward: nothing, where these kernels serve."""
    if serves(dtype, batch, length, channels, d_state, dt_rank, d_conv):
        return 0
    return triton_bimamba.bimamba_saved_bytes(batch, length, channels, d_state, dt_rank, d_conv, dtype)


@on_its_device
def bimamba_backward(dy, xz, forward_params, backward_params, scale, saved):
    """Gradients: (dxz, those of the forward direction's parameters in order, those of the backward one's)."""
    if not _serves(xz, xz.shape[2] // 2, forward_params):
        return triton_bimamba.bimamba_backward(dy, xz, forward_params, backward_params, scale, saved)
    weights = _prepare(_parameters(forward_params, backward_params), xz.dtype, backward=True)
    return _backward(dy, xz, forward_params, backward_params, weights, scale, lambda y: None)


def _backward(
    dy, xz, forward_params, backward_params, weights: Weights, scale, use_y: Callable[[Tensor], None],
    decay: str = "A",
):  # fmt: skip
    """bimamba_backward, which gives y, made again, to `use_y` before the peak of memory."""
    xz, parameters = _aligned(xz), weights.parameters
    inputs = _scan_inputs(xz, weights, again=True)
    u, projected = inputs.u, inputs.projected
    y, dxz, states = _scan_forward(xz, inputs, parameters, scale, _contiguous(dy))
    use_y(y)
    del y, dy
    du_scan, ddelta, dBC, *shares = _scan_backward(dxz, u, projected, states, parameters)
    del states
    du_projected, *of_projections = _projections_backward(ddelta, dBC, u, projected, weights)
    shares += _conv_backward(xz, du_scan, du_projected, parameters, dxz)
    sums = _sums(Gradients(*shares, *of_projections), parameters, xz.dtype, decay)
    in_order = zip(*(getattr(sums, name) for name in Parameters._fields))
    grads = [
        tuple(None if p is None else grad.view(p.shape).to(p.dtype) for grad, p in zip(of_direction, params))
        for of_direction, params in zip(in_order, (forward_params, backward_params))
    ]
    return dxz, *grads


# --- with both projections


def _block_weights(
    dtype: torch.dtype, in_proj, out_proj, forward_params, backward_params, decay: str, backward: bool = False
) -> Weights:
    """What a block makes of its parameters; `others`: in_proj's and out_proj's."""
    parameters = _parameters(forward_params, backward_params)
    return _prepare(parameters, dtype, in_proj, out_proj, decay=decay, backward=backward)


@on_its_device
def half_block_forward(hidden, in_proj, out_proj, forward_params, backward_params, scale, decay):
    """out_proj(mixer(in_proj(hidden))), (B, L, E). The parameters hold what `decay` says, A or log(-A)."""
    if not _serves(hidden, in_proj.shape[0] // 2, forward_params):
        both = with_A(forward_params, backward_params, decay)
        xz = F.linear(hidden, in_proj.to(hidden.dtype))
        y, _ = triton_bimamba.bimamba_forward(xz, *both, scale, False)
        return F.linear(y, out_proj.to(hidden.dtype))
    weights = _block_weights(hidden.dtype, in_proj, out_proj, forward_params, backward_params, decay)
    weight_in, weight_out = weights.others
    return F.linear(_forward(F.linear(hidden, weight_in), weights, scale), weight_out)


@on_its_device
def half_block_backward(dout, hidden, in_proj, out_proj, forward_params, backward_params, scale, decay):
    """Gradients: (dhidden, din_proj, dout_proj, those of both directions, of A or of log(-A))."""
    if _serves(hidden, in_proj.shape[0] // 2, forward_params):
        return _block_backward(dout, hidden, in_proj, out_proj, forward_params, backward_params, scale, decay)
    both = with_A(forward_params, backward_params, decay)
    weight_in, weight_out = in_proj.to(hidden.dtype), out_proj.to(hidden.dtype)
    xz = F.linear(hidden, weight_in)
    y, saved = triton_bimamba.bimamba_forward(xz, *both, scale, True)
    dout_proj = _weight_gradient(dout, y, out_proj)
    dxz, *grads = triton_bimamba.bimamba_backward(dout @ weight_out, xz, *both, scale, saved)
    if decay == "log":
        grads = [_of_log(*three) for three in zip(grads, both, (forward_params, backward_params))]
    return dxz @ weight_in, _weight_gradient(dxz, hidden, in_proj), dout_proj, *grads


def _block_backward(dout, hidden, in_proj, out_proj, forward_params, backward_params, scale, decay):
    """half_block_backward by these kernels."""
    weights = _block_weights(hidden.dtype, in_proj, out_proj, forward_params, backward_params, decay, backward=True)
    weight_in, weight_out = weights.others
    dout_proj = None

    def use_y(y: Tensor) -> None:
        nonlocal dout_proj
        dout_proj = _weight_gradient(dout, y, out_proj)

    dxz, *grads = _backward(  # no name and no tuple holds dy: _backward frees it
        dout @ weight_out, F.linear(hidden, weight_in), forward_params, backward_params, weights, scale, use_y, decay
    )
    return dxz @ weight_in, _weight_gradient(dxz, hidden, in_proj), dout_proj, *grads


def _weight_gradient(dout: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Of a projection x (B, L, E) -> (B, L, F) for dout (B, L, F), in weight's dtype."""
    return product_in_float32(dout.flatten(0, 1).T, x.flatten(0, 1)).to(weight.dtype)


def _of_log(grads, with_A, given):
    """Gradients of one direction's parameters as given, with log(-A), from those of the same with A."""
    grads = type(given)(*grads)
    return grads._replace(A=(grads.A * with_A.A).to(given.A.dtype))
