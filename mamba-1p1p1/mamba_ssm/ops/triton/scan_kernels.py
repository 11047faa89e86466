# ruff: noqa: RUF005 - Triton's compiler adds tuples but does not unpack them
"""The kernels of the selective scan in Triton, forward and backward, one or both directions in one launch.

arXiv 2312.00752, sec. 3.

A program is one warp. It owns BLOCK adjacent channels of one sequence, one direction and one segment of tokens,
and keeps the N states of its channels in registers, as N vectors. Positions i count tokens in scan order; a
backward direction reads token L-1-i at position i, so nothing is ever flipped.

- The time step comes in tiles of tokens: loaded, or projected from its R low-rank columns by a small matrix
  product; biased, put through softplus, and written to the program's scratch, from where the recurrence reads one
  row per token. A comes times log2(e): `exp(delta A)` is one product and one `exp2`.
- B and C of two neighbouring states are one 64-bit load where they are adjacent float32.
- Backward restarts from states that forward saved every CHUNK tokens. Inside a chunk one pass writes the state
  before every group of GROUP tokens to scratch, a second one walks the groups from last to first with the
  group's states in registers. The sums over channels that dB and dC need are products with a matrix of ones.
  Partial sums go to separate memory: no atomics, the same bits on every run.
- Few sequences fill a device when their tokens are split into segments: a first launch finds what every segment
  adds to a zero state, a second one chains the segments, the third is the ordinary kernel.
"""

import triton
import triton.language as tl

from mamba_ssm.ops.triton.common import (
    LN_2,
    LOG2_E,
    columns,
    int64,
    load_pair,
    sigmoid,
    softplus_and_slope,
    vectors,
)

# --- device functions


@triton.jit
def _place(channels, group_channels, BLOCK: tl.constexpr):
    """What this program owns: (sequence, first channel, number of channels, group, block, blocks in all)."""
    blocks_per_group = tl.cdiv(group_channels, BLOCK)
    blocks = channels // group_channels * blocks_per_group
    pid = tl.program_id(0)
    block = pid % blocks
    group = block // blocks_per_group
    start = block % blocks_per_group * BLOCK
    count = tl.minimum(BLOCK, group_channels - start)
    return int64(pid // blocks), int64(group * group_channels + start), count, group, block, blocks


@triton.jit
def _either(backward, ahead, behind):
    """The parameter of this program's direction."""
    if backward:
        chosen = behind
    else:
        chosen = ahead
    return chosen


@triton.jit
def _walk(length, stride, backward, WIDE: tl.constexpr):
    """(offset of position 0, step from one position to the next) of a tensor whose tokens are `stride` apart.

    32-bit offsets make one instruction of an address; WIDE where a sequence spans 2^31 elements.
    """
    if WIDE:
        step = int64(stride)
    else:
        step = tl.zeros([], tl.int32) + stride
    return tl.where(backward, step * (length - 1), 0), tl.where(backward, -step, step)


@triton.jit
def _sequence(base, strides, direction, b, d, length, WIDE: tl.constexpr):
    """(pointers to this program's channels at position 0, step); strides of (direction, batch, channel, token)."""
    start, step = _walk(length, strides[3], direction == 1, WIDE)
    return base + direction * strides[0] + b * strides[1] + d * strides[2] + start, step


@triton.jit
def _read_sequence(
    base, strides, direction, b, first_channel, lane, length, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    PAIRED: tl.constexpr,
):  # fmt: skip
    """`_sequence` of a tensor that is read; PAIRED bfloat16 as 32-bit words: one instruction per value."""
    if PAIRED:
        base, step = _sequence(base, strides, direction, b, first_channel, length, WIDE)
        words = base.to(tl.pointer_type(tl.int32)) + tl.arange(0, BLOCK // 2)
        return words, step // 2
    else:
        return _sequence(base, strides, direction, b, first_channel + lane, length, WIDE)


@triton.jit
def _read(pointer, mask):
    """In float32, zero where there is no channel; without a mask all are there."""
    if mask is None:
        return tl.load(pointer).to(tl.float32)
    else:
        return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _unless(repeated_row, lane, mask):
    """The mask of a row to be stored unless it belongs to the group before."""
    if mask is None:
        return tl.where(repeated_row, False, lane >= 0)
    else:
        return tl.where(repeated_row, False, mask)


@triton.jit
def _stage_piece(
    scratch, slopes, delta, dt_weight, bias, lane, first_channel, count, first, length, backward,
    delta_stride_d, delta_stride_l,
    R: tl.constexpr, R_PADDED: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, SOFTPLUS: tl.constexpr,
    PRECISION: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write softplus(delta + bias) of TILE positions from `first` on to scratch (TILE, BLOCK).

    `slopes`: where softplus' derivative goes, or None. Positions past the end repeat the last token, never read.
    """
    d = first_channel + lane
    if FULL:  # a mask of None: all channels are there
        mask = None
    else:
        mask = lane < count
    position = tl.minimum(first + tl.arange(0, TILE), length - 1)
    token = tl.where(backward, length - 1 - position, position)
    if WIDE:
        token = token.to(tl.int64)
    if R > 0:
        r = tl.arange(0, R_PADDED)
        dt_rows = delta + token[:, None] * delta_stride_l + r[None, :]
        if R == R_PADDED:
            dt = tl.load(dt_rows)  # (TILE, R)
        else:
            dt = tl.load(dt_rows, mask=(r < R)[None, :], other=0.0)
        live = (r < R)[:, None]
        if mask is not None:
            live = live & mask[None, :]
        weight = tl.load(dt_weight + d[None, :] * R + r[:, None], mask=live, other=0.0)  # (R, BLOCK)
        raw = tl.dot(dt.to(tl.float32), weight.to(tl.float32), input_precision=PRECISION)
    else:
        rows = delta + token[:, None] * delta_stride_l + d[None, :] * delta_stride_d
        raw = _read(rows, None if mask is None else mask[None, :])
    if bias is not None:
        raw += _read(bias + d, mask)[None, :]
    at = tl.arange(0, TILE)[:, None] * BLOCK + lane[None, :]
    if SOFTPLUS:
        value, slope = softplus_and_slope(raw)
        tl.store(scratch + at, value)
        if slopes is not None:
            tl.store(slopes + at, slope)
    else:
        tl.store(scratch + at, raw)


@triton.jit
def _stage(
    scratch, slopes, delta, dt_weight, bias, first_channel, count, first, length, backward,
    delta_stride_d, delta_stride_l,
    R: tl.constexpr, R_PADDED: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, SOFTPLUS: tl.constexpr,
    PRECISION: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`_stage_piece` for all channels, in pieces whose matrices fit the registers."""
    PIECE: tl.constexpr = min(BLOCK, 64 if R_PADDED <= 16 else 32)
    tl.debug_barrier()  # the rows of the tile before have been read
    for piece in range(0, BLOCK, PIECE):
        _stage_piece(
            scratch, slopes, delta, dt_weight, bias, piece + tl.arange(0, PIECE), first_channel, count, first, length,
            backward, delta_stride_d, delta_stride_l, R, R_PADDED, TILE, BLOCK, SOFTPLUS, PRECISION, FULL, WIDE,
        )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def _place_group(position, length, GROUP: tl.constexpr):
    """Where the group of `position` is read: (its first position, how many of it belong to the group before).

    The last group is moved back until it ends with the sequence, so that no load needs a mask; the positions
    that this repeats are given a step of zero, with which the recurrence stands still.
    """
    at = tl.minimum(position, length - GROUP)
    return at, position - at


@triton.jit
def _pointers(base, step, position, GROUP: tl.constexpr):
    """Pointers to GROUP positions."""
    first = position * step
    out = ()
    for k in tl.static_range(GROUP):
        out = out + (base + (first + k * step),)
    return out


@triton.jit
def _rows(pointers, mask, GROUP: tl.constexpr, PAIRED: tl.constexpr):
    """GROUP rows of this program's channels, in float32."""
    out = ()
    for k in tl.static_range(GROUP):
        if PAIRED:
            word = tl.load(pointers[k])
            low, high = (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
            out = out + (tl.reshape(tl.join(low, high), [2 * word.shape[0]]),)
        else:
            out = out + (_read(pointers[k], mask),)
    return out


@triton.jit
def _moved(pointers, offset, GROUP: tl.constexpr):
    out = ()
    for k in tl.static_range(GROUP):
        out = out + (pointers[k] + offset,)
    return out


@triton.jit
def _pairs(pointers, stride, n: tl.constexpr, N: tl.constexpr, PACKED: tl.constexpr, GROUP: tl.constexpr):
    """States n and n + 1 of B or C at GROUP positions."""
    out = ()
    for k in tl.static_range(GROUP):
        out = out + (load_pair(pointers[k], stride, n, N, PACKED),)
    return out


@triton.jit
def _staged(scratch, first, repeated, lane, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """GROUP rows of the staged time step; zero where the position is one of those `repeated`."""
    out = ()
    for k in tl.static_range(GROUP):
        row = tl.load(scratch + (first - repeated + k) * BLOCK + lane)
        out = out + (tl.where(k >= repeated, row, 0.0),)
    return out


@triton.jit
def _staged_once(scratch, first, repeated, lane, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """As `_staged`, where each row is read only once: repeated rows are first overwritten with zeros, so that the
    common case is a plain load.
    """
    rows = scratch + (first - repeated) * BLOCK + lane
    if repeated > 0:
        for k in tl.static_range(GROUP - 1):
            tl.store(rows + k * BLOCK, tl.zeros([BLOCK], tl.float32), mask=tl.where(k < repeated, lane >= 0, False))
        tl.debug_barrier()
    out = ()
    for k in tl.static_range(GROUP):
        out = out + (tl.load(rows + k * BLOCK),)
    return out


@triton.jit
def _staged_rows(rows, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """GROUP rows of scratch."""
    out = ()
    for k in tl.static_range(GROUP):
        out = out + (tl.load(rows + k * BLOCK),)
    return out


@triton.jit
def _shift_rows(rows, repeated, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """Move the staged rows of the sequence's last group to where it reads them, with zeros for what it repeats."""
    moved = _staged_rows(rows - repeated * BLOCK, BLOCK, GROUP)
    tl.debug_barrier()
    for k in tl.static_range(GROUP):
        tl.store(rows + k * BLOCK, tl.where(k >= repeated, moved[k], 0.0))
    tl.debug_barrier()


@triton.jit
def _drive(x, delta, GROUP: tl.constexpr):
    """delta * x of GROUP positions."""
    out = ()
    for k in tl.static_range(GROUP):
        out = out + (delta[k] * x[k],)
    return out


@triton.jit
def _load_states(pointer, stride, mask, N: tl.constexpr):
    return vectors(pointer, stride, mask, N, 1.0)


@triton.jit
def _store_states(pointer, stride, states, mask, N: tl.constexpr):
    for n in tl.static_range(N):
        tl.store(pointer + n * stride, states[n], mask=mask)


@triton.jit
def _zeros(N: tl.constexpr, BLOCK: tl.constexpr):
    out = ()
    for _ in tl.static_range(N):
        out = out + (tl.zeros([BLOCK], tl.float32),)
    return out


@triton.jit
def _matrix(base, strides, b, d, channels, group, direction, length, VARIABLE: tl.constexpr, WIDE: tl.constexpr):
    """(pointer at position 0, step, stride between states) of B or C.

    Per token: a scalar pointer. Constant: one pointer per channel, which stands still.
    """
    if VARIABLE:  # strides of (direction, batch, group, state, token)
        start, step = _walk(length, strides[4], direction == 1, WIDE)
        pointer = base + direction * strides[0] + b * strides[1] + group.to(tl.int64) * strides[2] + start
    else:
        step = 0
        pointer = base + tl.minimum(d, channels - 1) * strides[2]
    return pointer, step, strides[3]


@triton.jit
def _follow(
    h, A, delta, drive, B, B_stride, N: tl.constexpr, PACKED: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """The states after GROUP positions."""
    new = ()
    for n in tl.static_range(0, N, 2):
        b = _pairs(B, B_stride, n, N, PACKED, GROUP)
        for q in tl.static_range(2):
            if n + q < N:
                state = h[n + q]
                for k in tl.static_range(GROUP):
                    state = tl.exp2(delta[k] * A[n + q]) * state + b[k][q] * drive[k]
                new = new + (state,)
    return new


@triton.jit
def _retreat(
    g, A, delta, dy, C, C_stride, N: tl.constexpr, PACKED: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """The gradient of the state before GROUP positions, from `g`, that of the state after them."""
    new = ()
    for n in tl.static_range(0, N, 2):
        c = _pairs(C, C_stride, n, N, PACKED, GROUP)
        for q in tl.static_range(2):
            if n + q < N:
                state = g[n + q]
                for k in tl.static_range(GROUP - 1, -1, -1):
                    state = tl.exp2(delta[k] * A[n + q]) * (state + c[k][q] * dy[k])
                new = new + (state,)
    return new


@triton.jit
def _follow_and_read(
    h, y, A, delta, drive, B, B_stride, C, C_stride,
    N: tl.constexpr, B_PACKED: tl.constexpr, C_PACKED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`_follow`, adding <C, h> of every position to y."""
    new = ()
    for n in tl.static_range(0, N, 2):
        b = _pairs(B, B_stride, n, N, B_PACKED, GROUP)
        c = _pairs(C, C_stride, n, N, C_PACKED, GROUP)
        for q in tl.static_range(2):
            if n + q < N:
                state = h[n + q]
                sums = ()
                for k in tl.static_range(GROUP):
                    state = tl.exp2(delta[k] * A[n + q]) * state + b[k][q] * drive[k]
                    sums = sums + (y[k] + c[k][q] * state,)
                y = sums
                new = new + (state,)
    return new, y


# --- forward


@triton.jit
def scan_forward_kernel(
    u, u_strides, delta, delta_strides, z, z_strides, out, out_strides, B, B_strides, C, C_strides,
    dt_weight, dt_weight_b, bias, bias_b, A, A_b, D, D_b,
    scratch, states, carry, last_state,
    length, channels, group_channels, segment_chunks,
    N: tl.constexpr, R: tl.constexpr, R_PADDED: tl.constexpr, SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr,
    B_VARIABLE: tl.constexpr, B_PACKED: tl.constexpr, C_VARIABLE: tl.constexpr, C_PACKED: tl.constexpr,
    C_AFTER_B: tl.constexpr, SAME_STEPS: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr, PAIRED: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y = C h + D u, times silu(z) if there is a z; states after every chunk; the state after the last token.

    Grid: (batch * channel blocks, segments, directions). Strides: (direction, batch, channel, token).
    """
    b, first_channel, count, group, block, blocks = _place(channels, group_channels, BLOCK)
    lane = tl.arange(0, BLOCK)
    d = first_channel + lane
    if FULL:  # a mask of None: all channels are there
        mask = None
    else:
        mask = lane < count
    segment, direction = tl.program_id(1), tl.program_id(2).to(tl.int64)
    backward = direction == 1
    row = direction * (tl.num_programs(0) // blocks) + b  # of all directions' sequences
    program = (row * tl.num_programs(1) + segment) * blocks + block
    scratch += (program * (TILE + GROUP) + GROUP) * BLOCK
    if R > 0:
        dt_weight = _either(backward, dt_weight, dt_weight_b)
    if bias is not None:
        bias = _either(backward, bias, bias_b)
    A = vectors(_either(backward, A, A_b) + d * N, 1, mask, N, LOG2_E)
    if D is not None:
        skip = _read(_either(backward, D, D_b) + d, mask)

    first = segment * segment_chunks * CHUNK
    end = tl.minimum(length, first + segment_chunks * CHUNK)
    u, u_step = _read_sequence(u, u_strides, direction, b, first_channel, lane, length, BLOCK, WIDE, PAIRED)
    out, out_step = _sequence(out, out_strides, direction, b, d, length, WIDE)
    delta += direction * delta_strides[0] + b * delta_strides[1]
    B, B_step, B_stride = _matrix(B, B_strides, b, d, channels, group, direction, length, B_VARIABLE, WIDE)
    if C_AFTER_B > 0:
        C, C_step, C_stride = B + C_AFTER_B, B_step, B_stride
    else:
        C, C_step, C_stride = _matrix(C, C_strides, b, d, channels, group, direction, length, C_VARIABLE, WIDE)
    if SAME_STEPS:
        out_step = 2 * u_step if PAIRED else u_step  # the compiler then computes the offsets once
    if z is not None:
        z, z_step = _read_sequence(z, z_strides, direction, b, first_channel, lane, length, BLOCK, WIDE, PAIRED)

    if carry is not None:
        h = _load_states(carry + (row * tl.num_programs(1) + segment) * N * channels + d, channels, mask, N)
    else:
        h = _zeros(N, BLOCK)
    for tile in range(first, end, TILE):
        _stage(
            scratch, None, delta, dt_weight, bias, first_channel, count, tile, length, backward,
            delta_strides[2], delta_strides[3], R, R_PADDED, TILE, BLOCK, SOFTPLUS, PRECISION, FULL, WIDE,
        )  # fmt: skip
        for i in range(0, tl.minimum(TILE, length - tile), GROUP):
            at, repeated = _place_group(tile + i, length, GROUP)
            x = _rows(_pointers(u, u_step, at, GROUP), mask, GROUP, PAIRED)
            step = _staged_once(scratch, i, repeated, lane, BLOCK, GROUP)
            y = ()
            for k in tl.static_range(GROUP):
                if D is not None:
                    y = y + (skip * x[k],)
                else:
                    y = y + (tl.zeros([BLOCK], tl.float32),)
            h, y = _follow_and_read(
                h, y, A, step, _drive(x, step, GROUP),
                _pointers(B, B_step, at, GROUP), B_stride,
                _pointers(C, C_step, at, GROUP), C_stride,
                N, B_PACKED, C_PACKED, GROUP,
            )  # fmt: skip
            if z is not None:
                gate = _rows(_pointers(z, z_step, at, GROUP), mask, GROUP, PAIRED)
            rows = _pointers(out, out_step, at, GROUP)
            for k in tl.static_range(GROUP):
                value = y[k]
                if z is not None:
                    value = value * gate[k] * sigmoid(gate[k])
                tl.store(rows[k], value.to(out.dtype.element_ty), mask=_unless(k < repeated, lane, mask))
        if states is not None:  # noqa: SIM102 - known when compiled, unlike the next condition
            if ((tile + TILE) % CHUNK == 0) | (tile + TILE >= length):
                chunk = row * tl.cdiv(length, CHUNK) + tile // CHUNK
                _store_states(states + chunk * N * channels + d, channels, h, mask, N)
    if last_state is not None:  # noqa: SIM102
        if end == length:
            _store_states(last_state + (row * channels + d) * N, 1, h, mask, N)


# --- backward


@triton.jit
def _apart(value, PER_THREAD: tl.constexpr):
    """Split a vector into PER_THREAD vectors, one for each channel of a thread; no data moves between threads."""
    if PER_THREAD == 1:
        return (value,)
    elif PER_THREAD == 2:
        return tl.split(tl.reshape(value, [value.shape[0] // 2, 2]))
    else:
        even, odd = tl.split(tl.reshape(value, [value.shape[0] // 4, 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return first, second, third, fourth


@triton.jit
def _all_apart(values, PER_THREAD: tl.constexpr, GROUP: tl.constexpr):
    out = ()
    for k in tl.static_range(GROUP):
        out = out + (_apart(values[k], PER_THREAD),)
    return out


@triton.jit
def _inner(a, b, PER_THREAD: tl.constexpr):
    """Sum of the products of a thread's channels: one chain of fused multiply-adds."""
    total = a[0] * b[0]
    for i in tl.static_range(1, PER_THREAD):
        total += a[i] * b[i]
    return tl.sum(tl.reshape(total, [total.shape[0], 1]), 1)


@triton.jit
def _adjoint_of_state(
    g, a, around, A, delta, drive, dy, drive_apart, dy_apart, b, c, q: tl.constexpr, product, dexponent, dA,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, PER_THREAD: tl.constexpr,
):  # fmt: skip
    """One state's way back through GROUP positions.

    `g` is what later positions send to the state, `a` its decays, `around` the states around them (GROUP + 1).
    Returns g of the earlier positions, dA, the sums for a constant B and C, `product` (the gradient of delta x, per
    position) and `dexponent` (that of delta), each with this state's share added, and the columns of a per-token
    dB and dC. The compiler drops what the kernel does not use.
    """
    dB = tl.zeros([BLOCK], tl.float32)
    dC = tl.zeros([BLOCK], tl.float32)
    products = ()
    dexponents = ()
    dB_columns = ()
    dC_columns = ()
    for k in tl.static_range(GROUP - 1, -1, -1):
        g = g + c[k][q] * dy[k]
        dC += dy[k] * around[k + 1]
        dB += g * drive[k]
        dC_columns = (_inner(_apart(around[k + 1], PER_THREAD), dy_apart[k], PER_THREAD),) + dC_columns
        dB_columns = (_inner(_apart(g, PER_THREAD), drive_apart[k], PER_THREAD),) + dB_columns
        products = (product[k] + g * b[k][q],) + products
        g = g * a[k]
        w = g * around[k]
        dA += w * delta[k]
        dexponents = (dexponent[k] + w * A,) + dexponents
    return g, dA, dB, dC, products, dexponents, dB_columns + dC_columns


@triton.jit
def _accumulate(pointer, value, mask):
    """Add to memory that this program alone writes."""
    tl.store(pointer, tl.load(pointer, mask=mask) + value, mask=mask)


@triton.jit
def _matrix_gradient_offsets(
    backward, N: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr
):
    """Where (row: state of a pair, B or C, position k; column: pair) goes from the group's first token on."""
    row, n = tl.arange(0, ROWS), WIDTH * tl.arange(0, PAIRS)[None, :]
    k = row % GROUP
    n += (row // (2 * GROUP))[:, None]
    return (tl.where(backward, -k, k) * (2 * N) + row // GROUP % 2 * N)[:, None] + n


@triton.jit
def _store_matrix_gradient(
    pointer, total, offsets, repeated,
    N: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)
    mine = (row % GROUP >= repeated) & (row < 2 * WIDTH * GROUP)
    n = WIDTH * tl.arange(0, PAIRS)[None, :] + (row // (2 * GROUP))[:, None]
    tl.store(pointer + offsets, total, mask=mine[:, None] & (n < N))


@triton.jit
def _mark_groups(
    marks, A, staged, u, u_step, B, B_step, B_stride, start, groups, lane, mask,
    N: tl.constexpr, AT_A_TIME: tl.constexpr, B_PACKED: tl.constexpr, PAIRED: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write the state before each group of a chunk to `marks`, whose first entry is already there.

    A is already times log2(e).
    """
    for j in range(0, groups - 1):
        at = start + j * GROUP
        x = _rows(_pointers(u, u_step, at, GROUP), mask, GROUP, PAIRED)
        step = _staged_rows(staged + j * GROUP * BLOCK + lane, BLOCK, GROUP)
        drive = _drive(x, step, GROUP)
        B_rows = _pointers(B, B_step, at, GROUP)
        marks_j = marks + j * (N * BLOCK)
        for first_state in range(0, N, AT_A_TIME):
            B_at = _moved(B_rows, first_state * B_stride, GROUP)
            for n2 in tl.static_range(0, AT_A_TIME, 2):
                bs = _pairs(B_at, B_stride, n2, AT_A_TIME, B_PACKED, GROUP)
                for q in tl.static_range(2):
                    if n2 + q < AT_A_TIME:
                        n = first_state + n2 + q
                        A_n = tl.load(A + n * BLOCK + lane)
                        h = tl.load(marks_j + n * BLOCK)
                        for k in tl.static_range(GROUP):
                            h = tl.exp2(step[k] * A_n) * h + bs[k][q] * drive[k]
                        tl.store(marks_j + n * BLOCK + N * BLOCK, h)


@triton.jit
def _store_group(
    du, ddelta, gated, x_rows, slopes, step, dy, product, dexponent, D, sum_bias, sum_D, scale, repeated, lane, mask,
    SOFTPLUS: tl.constexpr, PAIRED: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A group's gradients of u, delta and z, and its shares of D's and the bias's.

    product, dexponent: of each token, the sums over states of what is sent times B, and of the decay's gradient.
    gated: (pointers of dz, y before the skip, z, dout), or None.
    """
    x = _rows(x_rows, mask, GROUP, PAIRED)  # read again, as D: registers are scarcer than loads
    bias_n = tl.load(sum_bias)
    if SOFTPLUS:
        slope = _staged_rows(slopes, BLOCK, GROUP)
    if D is not None:
        skip = _read(D, mask)
        D_n = tl.load(sum_D)
    for k in tl.static_range(GROUP):
        inside = _unless(k < repeated, lane, mask)
        rate = product[k] * x[k] + dexponent[k] * LN_2
        if SOFTPLUS:
            rate = rate * slope[k]
        else:
            rate = rate * tl.where(k >= repeated, 1.0, 0.0)
        bias_n += rate
        value = product[k] * step[k]
        if D is not None:
            value += skip * dy[k]
            D_n += dy[k] * x[k]
        tl.store(du[k], value.to(du[k].dtype.element_ty), mask=inside)
        tl.store(ddelta[k], rate.to(ddelta[k].dtype.element_ty), mask=inside)
        if gated is not None:
            dz, y, z, dout = gated
            read = y[k]
            if D is not None:
                read += skip * x[k]
            s = sigmoid(z[k])
            gate_slope = read * dout[k] * scale * s * (1 + z[k] * (1 - s))
            tl.store(dz[k], gate_slope.to(dz[k].dtype.element_ty), mask=inside)
    tl.store(sum_bias, bias_n)
    if D is not None:
        tl.store(sum_D, D_n)


@triton.jit
def scan_backward_kernel(
    dout, dout_strides, u, u_strides, delta, delta_strides, z, z_strides, B, B_strides, C, C_strides,
    dt_weight, dt_weight_b, bias, bias_b, A, A_b, D, D_b,
    scratch, states, carry,
    du, du_strides, ddelta, ddelta_strides, dz, dz_strides, dBC, dA, dB_constant, dC_constant, dD, dbias,
    length, channels, group_channels, segment_chunks, scale,
    N: tl.constexpr, R: tl.constexpr, R_PADDED: tl.constexpr, SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr,
    B_VARIABLE: tl.constexpr, B_PACKED: tl.constexpr, C_VARIABLE: tl.constexpr, C_PACKED: tl.constexpr,
    C_AFTER_B: tl.constexpr, SAME_STEPS: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr, PAIRED: tl.constexpr,
    SCRATCH_ROWS: tl.constexpr, PAIRS_PADDED: tl.constexpr, STATES_AT_A_TIME: tl.constexpr,
    BLOCK: tl.constexpr, PER_THREAD: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Gradients of `scan_forward_kernel` for dout, times `scale` and silu(z) if there is a z.

    Grid as forward. dBC (directions, blocks, batch, L, 2, N) and dA, dB_constant, dC_constant (directions, batch,
    segments, N, channels), dD, dbias (directions, batch, segments, channels) are partial sums; dB_constant and
    dC_constant come zeroed. `carry` is what tokens after each segment send to its last state.
    """
    WIDTH: tl.constexpr = STATES_AT_A_TIME if N % STATES_AT_A_TIME == 0 else 1
    PAIRS: tl.constexpr = N // WIDTH
    MARK: tl.constexpr = 4 if N % 4 == 0 else WIDTH  # states at a time of the first pass
    COLUMNS: tl.constexpr = PAIRS_PADDED
    ROWS: tl.constexpr = max(16, 2 * WIDTH * GROUP)
    b, first_channel, count, group, block, blocks = _place(channels, group_channels, BLOCK)
    if not WIDE:
        first_channel = first_channel.to(tl.int32)  # a channel's offset fits 32 bits: the kernel is short of registers
    lane = tl.arange(0, BLOCK)
    d = first_channel + lane
    if FULL:  # a mask of None: all channels are there
        mask = None
    else:
        mask = lane < count
    segment, direction = tl.program_id(1), tl.program_id(2).to(tl.int64)
    backward = direction == 1
    batch = tl.num_programs(0) // blocks
    row = (direction * batch + b).to(tl.int32)  # in 32 bits, as `part`: kept to the end, where registers are scarce
    part = row * tl.num_programs(1) + segment
    scratch += (int64(part) * blocks + block) * (SCRATCH_ROWS * BLOCK)
    sums_A = scratch + N * BLOCK + lane
    sent = sums_A + N * BLOCK  # what later positions send to the states
    sum_bias = sent + N * BLOCK
    sum_D = sum_bias + BLOCK
    staged = scratch + (3 * N + 2 + GROUP) * BLOCK
    slopes = staged + (CHUNK + GROUP) * BLOCK
    marks = slopes + CHUNK * BLOCK + lane  # the states around every group of the chunk
    zero = tl.zeros([BLOCK], tl.float32)
    tl.store(sum_bias, zero)
    tl.store(sum_D, zero)
    if R > 0:
        dt_weight = _either(backward, dt_weight, dt_weight_b)
    if bias is not None:
        bias = _either(backward, bias, bias_b)
    # A transposed: its N vectors would otherwise take the registers that hide latency
    _store_states(scratch + lane, BLOCK, vectors(_either(backward, A, A_b) + d * N, 1, mask, N, LOG2_E), None, N)
    _store_states(sums_A, BLOCK, _zeros(N, BLOCK), None, N)
    if D is not None:
        D = _either(backward, D, D_b) + d
    chunks = tl.cdiv(length, CHUNK)
    u, u_step = _read_sequence(u, u_strides, direction, b, first_channel, lane, length, BLOCK, WIDE, PAIRED)
    dout, dout_step = _read_sequence(dout, dout_strides, direction, b, first_channel, lane, length, BLOCK, WIDE, PAIRED)
    du, du_step = _sequence(du, du_strides, direction, b, d, length, WIDE)
    ddelta, ddelta_step = _sequence(ddelta, ddelta_strides, direction, b, d, length, WIDE)
    delta += direction * delta_strides[0] + b * delta_strides[1]
    B, B_step, B_stride = _matrix(B, B_strides, b, d, channels, group, direction, length, B_VARIABLE, WIDE)
    if C_AFTER_B > 0:
        C, C_step, C_stride = B + C_AFTER_B, B_step, B_stride
    else:
        C, C_step, C_stride = _matrix(C, C_strides, b, d, channels, group, direction, length, C_VARIABLE, WIDE)
    if SAME_STEPS:  # fewer offsets to keep in registers
        dout_step, ddelta_step = u_step, du_step
    if z is not None:
        z, z_step = _read_sequence(z, z_strides, direction, b, first_channel, lane, length, BLOCK, WIDE, PAIRED)
    if dz is not None:
        dz, dz_step = _sequence(dz, dz_strides, direction, b, d, length, WIDE)
    if dBC is not None:
        dBC += ((direction * blocks + block) * batch + b) * length * (2 * N)
    sums = int64(part) * N * channels + d
    ones = tl.full([BLOCK // PER_THREAD, COLUMNS], 1.0, tl.float32)
    result_column = tl.arange(0, COLUMNS)[None, :]
    offsets = _matrix_gradient_offsets(backward, N, GROUP, WIDTH, ROWS, COLUMNS)

    if carry is not None:
        _store_states(sent, BLOCK, _load_states(carry + sums, channels, mask, N), None, N)
    else:
        _store_states(sent, BLOCK, _zeros(N, BLOCK), None, N)
    first = segment * segment_chunks
    for chunk in range(tl.minimum(chunks, first + segment_chunks) - 1, first - 1, -1):
        start = chunk * CHUNK
        groups = tl.cdiv(tl.minimum(CHUNK, length - start), GROUP)
        for tile in range(0, CHUNK, TILE):
            _stage(
                staged + tile * BLOCK, slopes + tile * BLOCK, delta, dt_weight, bias, first_channel, count,
                start + tile, length, backward, delta_strides[2], delta_strides[3],
                R, R_PADDED, TILE, BLOCK, SOFTPLUS, PRECISION, FULL, WIDE,
            )  # fmt: skip
        _, repeated = _place_group(start + (groups - 1) * GROUP, length, GROUP)
        if repeated > 0:
            _shift_rows(staged + (groups - 1) * GROUP * BLOCK + lane, repeated, BLOCK, GROUP)
            if SOFTPLUS:
                _shift_rows(slopes + (groups - 1) * GROUP * BLOCK + lane, repeated, BLOCK, GROUP)

        saved = states + (int64(row) * chunks + chunk) * N * channels + d
        _store_states(marks + groups * (N * BLOCK), BLOCK, _load_states(saved, channels, mask, N), None, N)
        if chunk > 0:
            _store_states(marks, BLOCK, _load_states(saved - N * channels, channels, mask, N), None, N)
        else:
            _store_states(marks, BLOCK, _zeros(N, BLOCK), None, N)
        tl.debug_barrier()
        _mark_groups(
            marks, scratch, staged, u, u_step, B, B_step, B_stride, start, groups, lane, mask,
            N, MARK, B_PACKED, PAIRED, BLOCK, GROUP,
        )  # fmt: skip
        tl.debug_barrier()

        for j in range(groups - 1, -1, -1):
            at, repeated = _place_group(start + j * GROUP, length, GROUP)
            x_rows = _pointers(u, u_step, at, GROUP)
            x = _rows(x_rows, mask, GROUP, PAIRED)
            incoming = _rows(_pointers(dout, dout_step, at, GROUP), mask, GROUP, PAIRED)
            step = _staged_rows(staged + j * GROUP * BLOCK + lane, BLOCK, GROUP)
            drive = _drive(x, step, GROUP)
            if z is not None:
                gates = _rows(_pointers(z, z_step, at, GROUP), mask, GROUP, PAIRED)
            dy = ()
            for k in tl.static_range(GROUP):
                value = incoming[k] * tl.where(k >= repeated, scale, 0.0)
                if z is not None:
                    value = value * gates[k] * sigmoid(gates[k])
                dy = dy + (value,)
            dy_apart, drive_apart = _all_apart(dy, PER_THREAD, GROUP), _all_apart(drive, PER_THREAD, GROUP)
            y = _zeros(GROUP, BLOCK)
            product = _zeros(GROUP, BLOCK)
            dexponent = _zeros(GROUP, BLOCK)
            total = tl.zeros([ROWS, COLUMNS], tl.float32)
            B_rows = _pointers(B, B_step, at, GROUP)
            C_rows = _pointers(C, C_step, at, GROUP)
            marks_j = marks + j * (N * BLOCK)
            for pair in range(0, PAIRS):  # not unrolled: the code of all states would overrun the instruction cache
                B_at = _moved(B_rows, WIDTH * pair * B_stride, GROUP)
                C_at = _moved(C_rows, WIDTH * pair * C_stride, GROUP)
                wide = ()
                for n2 in tl.static_range(0, WIDTH, 2):
                    bs = _pairs(B_at, B_stride, n2, WIDTH, B_PACKED, GROUP)
                    cs = _pairs(C_at, C_stride, n2, WIDTH, C_PACKED, GROUP)
                    for q in tl.static_range(2):
                        if n2 + q < WIDTH:
                            n = WIDTH * pair + n2 + q
                            A_n = tl.load(scratch + n * BLOCK + lane)
                            g_n = tl.load(sent + n * BLOCK)
                            around = (tl.load(marks_j + n * BLOCK),)
                            a = ()
                            for k in tl.static_range(GROUP):
                                a = a + (tl.exp2(step[k] * A_n),)
                                if k + 1 < GROUP:
                                    around = around + (a[k] * around[k] + bs[k][q] * drive[k],)
                            around = around + (tl.load(marks_j + n * BLOCK + N * BLOCK),)  # known already
                            if dz is not None:
                                sums_y = ()
                                for k in tl.static_range(GROUP):
                                    sums_y = sums_y + (y[k] + cs[k][q] * around[k + 1],)
                                y = sums_y
                            g_n, dA_n, dB_n, dC_n, product, dexponent, shares = _adjoint_of_state(
                                g_n, a, around, A_n, step, drive, dy, drive_apart, dy_apart, bs, cs, q,
                                product, dexponent, tl.load(sums_A + n * BLOCK), GROUP, BLOCK, PER_THREAD,
                            )  # fmt: skip
                            tl.store(sent + n * BLOCK, g_n)
                            tl.store(sums_A + n * BLOCK, dA_n)
                            if not B_VARIABLE:
                                _accumulate(dB_constant + sums + n * channels, dB_n, mask)
                            if not C_VARIABLE:
                                _accumulate(dC_constant + sums + n * channels, dC_n, mask)
                            wide = wide + shares
                if dBC is not None:
                    wide = wide + _zeros(ROWS - WIDTH * 2 * GROUP, BLOCK // PER_THREAD)
                    values = tl.dot(tl.trans(columns(wide, ROWS)), ones, input_precision=PRECISION)
                    total = tl.where(result_column == pair, values, total)
            if dBC is not None:
                group_dBC = dBC + tl.where(backward, length - 1 - at, at).to(tl.int64) * (2 * N)
                _store_matrix_gradient(group_dBC, total, offsets, repeated, N, GROUP, WIDTH, ROWS, COLUMNS)
            if dz is not None:
                gated = (_pointers(dz, dz_step, at, GROUP), y, gates, incoming)
            else:
                gated = None
            slope_rows = slopes + j * GROUP * BLOCK + lane
            _store_group(
                _pointers(du, du_step, at, GROUP), _pointers(ddelta, ddelta_step, at, GROUP), gated, x_rows, slope_rows,
                step, dy, product, dexponent, D, sum_bias, sum_D, scale, repeated, lane, mask,
                SOFTPLUS, PAIRED, BLOCK, GROUP,
            )  # fmt: skip
            tl.debug_barrier()  # what this group wrote, whichever thread did, the next one reads
    tl.store(dbias + int64(part) * channels + d, tl.load(sum_bias), mask=mask)
    if D is not None:
        tl.store(dD + int64(part) * channels + d, tl.load(sum_D), mask=mask)
    _store_states(dA + sums, channels, _load_states(sums_A, BLOCK, None, N), mask, N)


# --- segments


@triton.jit
def segment_kernel(
    v, v_strides, delta, delta_strides, z, z_strides, M, M_strides,
    dt_weight, dt_weight_b, bias, bias_b, A, A_b, scratch, ends, decays,
    length, channels, group_channels, segment_chunks, scale,
    N: tl.constexpr, R: tl.constexpr, R_PADDED: tl.constexpr, SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr,
    M_VARIABLE: tl.constexpr, M_PACKED: tl.constexpr, ADJOINT: tl.constexpr,
    FULL: tl.constexpr, WIDE: tl.constexpr, PAIRED: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """What a segment adds to a zero state, and the log of its decay per unit of A: the sum of its time steps.

    Forward: h = a h + M (delta v) with v = u, M = B. ADJOINT: g = a (g + M v) from the last token to the first
    with v = dout, times scale and silu(z) if there is a z, and M = C. ends: (directions, batch, segments, N,
    channels); decays: (directions, batch, segments, channels).
    """
    b, first_channel, count, group, block, blocks = _place(channels, group_channels, BLOCK)
    lane = tl.arange(0, BLOCK)
    d = first_channel + lane
    if FULL:  # a mask of None: all channels are there
        mask = None
    else:
        mask = lane < count
    segment, direction = tl.program_id(1), tl.program_id(2).to(tl.int64)
    backward = direction == 1
    part = (direction * (tl.num_programs(0) // blocks) + b) * tl.num_programs(1) + segment
    scratch += ((part * blocks + block) * (TILE + GROUP) + GROUP) * BLOCK
    if R > 0:
        dt_weight = _either(backward, dt_weight, dt_weight_b)
    if bias is not None:
        bias = _either(backward, bias, bias_b)
    A = vectors(_either(backward, A, A_b) + d * N, 1, mask, N, LOG2_E)
    v, v_step = _read_sequence(v, v_strides, direction, b, first_channel, lane, length, BLOCK, WIDE, PAIRED)
    delta += direction * delta_strides[0] + b * delta_strides[1]
    M, M_step, M_stride = _matrix(M, M_strides, b, d, channels, group, direction, length, M_VARIABLE, WIDE)
    if z is not None:
        z, z_step = _read_sequence(z, z_strides, direction, b, first_channel, lane, length, BLOCK, WIDE, PAIRED)
    first = segment * segment_chunks * CHUNK
    tiles = tl.cdiv(tl.minimum(length - first, segment_chunks * CHUNK), TILE)
    state = _zeros(N, BLOCK)
    decay = tl.zeros([BLOCK], tl.float32)
    for t in range(0, tiles):
        tile = first + (tiles - 1 - t if ADJOINT else t) * TILE
        _stage(
            scratch, None, delta, dt_weight, bias, first_channel, count, tile, length, backward,
            delta_strides[2], delta_strides[3], R, R_PADDED, TILE, BLOCK, SOFTPLUS, PRECISION, FULL, WIDE,
        )  # fmt: skip
        groups = tl.cdiv(tl.minimum(TILE, length - tile), GROUP)
        for j in range(0, groups):
            i = (groups - 1 - j if ADJOINT else j) * GROUP
            at, repeated = _place_group(tile + i, length, GROUP)
            value = _rows(_pointers(v, v_step, at, GROUP), mask, GROUP, PAIRED)
            step = _staged(scratch, i, repeated, lane, BLOCK, GROUP)
            M_rows = _pointers(M, M_step, at, GROUP)
            for k in tl.static_range(GROUP):
                decay += step[k]
            if ADJOINT:
                drive = ()
                for k in tl.static_range(GROUP):
                    drive = drive + (tl.where(k >= repeated, value[k] * scale, 0.0),)
                if z is not None:
                    gates = _rows(_pointers(z, z_step, at, GROUP), mask, GROUP, PAIRED)
                    gated = ()
                    for k in tl.static_range(GROUP):
                        gated = gated + (drive[k] * gates[k] * sigmoid(gates[k]),)
                    drive = gated
                state = _retreat(state, A, step, drive, M_rows, M_stride, N, M_PACKED, GROUP)
            else:
                state = _follow(state, A, step, _drive(value, step, GROUP), M_rows, M_stride, N, M_PACKED, GROUP)
    _store_states(ends + part * N * channels + d, channels, state, mask, N)
    tl.store(decays + part * channels + d, decay, mask=mask)


@triton.jit
def chain_kernel(
    ends, decays, A, A_b, start, sequences, segments, channels,
    N: tl.constexpr, ADJOINT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Replace what every segment adds by the state it starts from (ADJOINT: by what later segments send to it).

    `start` (directions, batch, N, channels) or None: what comes before the first, or after the last.
    Grid: (directions * batch, channel blocks, N).
    """
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(2)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = d < channels
    A_n = _read(_either(row >= sequences, A, A_b) + d * N + n, mask) * LOG2_E
    if start is not None:
        state = tl.load(start + (row * N + n) * channels + d, mask=mask, other=0.0)
    else:
        state = tl.zeros([BLOCK], tl.float32)
    for s in range(0, segments):
        part = row * segments + (segments - 1 - s if ADJOINT else s)
        at = ends + (part * N + n) * channels + d
        added = tl.load(at, mask=mask, other=0.0)
        decay = tl.exp2(tl.load(decays + part * channels + d, mask=mask, other=0.0) * A_n)
        tl.store(at, state, mask=mask)
        state = decay * state + added
