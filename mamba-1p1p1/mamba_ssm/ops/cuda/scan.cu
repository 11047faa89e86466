// Both selective scans of the bidirectional mixer, forward and backward (arXiv 2312.00752, sec. 3; 2401.09417, alg. 1).
//
// Compiled at run time with these macros: HALF_IS_BF16 (activations are bfloat16, else float16), RANK (of the time
// step's projection), FOR_BACKWARD (forward is run again by backward and writes what that needs), CH (channels of a
// thread, 2 or 4), WARPS (of a block; forward has as many for each direction) and RESIDENT (warps that a multiprocessor
// is to hold, from which the compiler derives the registers of a thread).
//
// A thread owns CH channels x NS of their 16 states, so that one read of B and C serves CH channels and one read of
// the time step four states: the exponential, of which a multiprocessor makes 16 a clock, is what bounds the loop.
// Four threads hold all states of their channels, a warp 8 CH channels: with 4 a thread there are fewest instructions,
// with 2 twice as many threads, which long sequences in small batches need. Tokens come in tiles of TILE, copied to shared
// memory one tile ahead. The time step is a matrix product of its RANK low-rank columns, made once a tile. A backward
// direction is index arithmetic. Activations are 16 bits wide; states, time steps and sums are float32.

#include "device.cuh"

constexpr int N = 16, NS = 4;             // states of a channel, of a thread
constexpr int TILE = 16;                  // tokens of a staged tile: the rows of one matrix product
constexpr int GROUP = 8;                  // tokens between two saved states
constexpr int PADDED = (RANK + 7) / 8 * 8;  // columns of the time step, with zeros behind RANK
constexpr int COLUMNS = PADDED + 2 * N;   // of a row of `projected`: time step, B, C
constexpr int STEPS = PADDED / 8;         // of the product over RANK, eight at a time
constexpr int WIDTH = 8 * CH;             // channels of a warp
constexpr int PITCH = WIDTH + 8;          // floats between rows of WIDTH: the product's stores meet no bank twice
constexpr int THREADS = 32 * WARPS;       // of a block, or of one direction of it

typedef long long int64;

// ---- tiles -----------------------------------------------------------------------------------------------------

// A tile's rows lie in the order in which its scan walks, so that the loops over tokens know no direction.
struct Walk {
    int first, along;  // the first row's token, and 1 or -1
};

__device__ __forceinline__ Walk walk_of(int start, int rows, bool behind) {
    return behind ? Walk{start + rows - 1, -1} : Walk{start, 1};
}

// Copy `rows` of up to TILE_ROWS rows of WIDTH 16-bit channels, from `source` on and `stride` elements apart, to
// (TILE_ROWS, WIDTH), by one warp.
template <int TILE_ROWS>
__device__ __forceinline__ void copy_channels(scalar_t* tile, const scalar_t* source, int stride, int rows, int lane) {
    const int row = lane / CH, part = lane % CH * 8;
    constexpr int PASS = 32 / CH;  // rows at once
    tile += row * WIDTH + part, source += row * stride + part;
#pragma unroll
    for (int i = 0; i < TILE_ROWS; i += PASS)
        if (row + i < rows) cp_async16(tile + i * WIDTH, source + i * stride);
}

// Copy `rows` of up to TILE_ROWS rows of `projected`, `stride` elements apart, by WARPS warps.
template <int TILE_ROWS>
__device__ __forceinline__ void copy_projected(
    float* tile, const float* source, int stride, int rows, int warp, int lane) {
    constexpr int PARTS = COLUMNS / 4;
    const int part = lane & 7;
#pragma unroll
    for (int first = 0; first < TILE_ROWS; first += 4 * WARPS) {
        const int row = first + 4 * warp + (lane >> 3);
        if (row < rows)
#pragma unroll
            for (int i = 0; i < PARTS; i += 8)
                if (PARTS >= i + 8 || i + part < PARTS)
                    cp_async16(tile + row * COLUMNS + 4 * (i + part), source + row * stride + 4 * (i + part));
    }
}

// What this lane needs of the time step's weight (WIDTH, RANK) and bias, as operands of the matrix product. A small
// RANK's stays in registers; a large one's is read again for every tile.
constexpr bool HOLD_WEIGHTS = RANK <= 24 && !(FOR_BACKWARD && CH == 4);

struct StepWeights {
    unsigned b[CH][STEPS][2];
    float2 bias[CH];

    __device__ __forceinline__ void load(const float* weight, const float* source, int lane) {
        const int g = lane >> 2, t = lane & 3;
#pragma unroll
        for (int j = 0; j < CH; ++j) {
            bias[j] = *reinterpret_cast<const float2*>(source + 8 * j + 2 * t);
#pragma unroll
            for (int k = 0; k < STEPS; ++k)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int column = 8 * k + 4 * half;  // RANK is a multiple of 4
                    b[j][k][half] = column < RANK ? to_tf32(weight[(8 * j + g) * RANK + column + t]) : 0u;
                }
        }
    }
};

// The time step of 8 or 16 rows x WIDTH channels before softplus: (rows, RANK) x (RANK, WIDTH) + bias, in TF32.
// A lane gets, of channels 8 j + 2 (lane % 4) + {0, 1}, rows lane / 4 and lane / 4 + 8: raw[j][2 * late + odd].
template <int TILE_ROWS>
__device__ __forceinline__ void project_steps(
    float (&raw)[CH][4], const float* projected, const StepWeights& weights, int lane) {
    projected += (lane >> 2) * COLUMNS + (lane & 3);
    unsigned a[STEPS][4];
#pragma unroll
    for (int k = 0; k < STEPS; ++k)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int column = 8 * k + 4 * half;
            a[k][2 * half] = column < RANK ? to_tf32(projected[column]) : 0u;
            a[k][2 * half + 1] = column < RANK && TILE_ROWS > 8 ? to_tf32(projected[8 * COLUMNS + column]) : 0u;
        }
#pragma unroll
    for (int j = 0; j < CH; ++j) {
        raw[j][0] = raw[j][2] = weights.bias[j].x;
        raw[j][1] = raw[j][3] = weights.bias[j].y;
#pragma unroll
        for (int k = 0; k < STEPS; ++k) mma_tf32(raw[j], a[k], weights.b[j][k]);
    }
}

// ---- a thread's channels and states ------------------------------------------------------------------------------

// The channels of a thread, within its warp's. The four threads of CH channels order them differently, each its own
// first, so that sums over states, which end in the channel's own thread, need few selections: with 4 channels, own is
// the lane's number and among the first two; with 2, two threads own a channel and write the same to the same place.
struct Place {
    int first, second, own, m;  // of both halves of the channels; m: the thread's group of states

    __device__ __forceinline__ explicit Place(int lane) : m(lane & 3) {
        const int base = (lane >> 2) * CH, half = CH / 2 * (m >> 1);
        first = base + half, second = base + (CH / 2 - half);
        own = CH == 4 ? lane : first;
    }

    __device__ __forceinline__ int channel(int c) const { return c < CH / 2 ? first + c : second + c - CH / 2; }
};

__device__ __forceinline__ void load_channels(float (&out)[CH], const float* row, Place place) {
    if (CH == 4) {
        const float2 low = *reinterpret_cast<const float2*>(row + place.first);
        const float2 high = *reinterpret_cast<const float2*>(row + place.second);
        out[0] = low.x, out[1] = low.y, out[CH - 2] = high.x, out[CH - 1] = high.y;
    } else {
        out[0] = row[place.first], out[1] = row[place.second];
    }
}

__device__ __forceinline__ void load_channels(float (&out)[CH], const scalar_t* row, Place place) {
    if (CH == 4) {
        widen2(*reinterpret_cast<const unsigned*>(row + place.first), out[0], out[1]);
        widen2(*reinterpret_cast<const unsigned*>(row + place.second), out[CH - 2], out[CH - 1]);
    } else {
        out[0] = widen(row[place.first]), out[1] = widen(row[place.second]);
    }
}

__device__ __forceinline__ void load_states(float (&out)[NS], const float* source) {
    const float4 v = *reinterpret_cast<const float4*>(source);
    out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
}

__device__ __forceinline__ void store_states(float* target, const float (&in)[NS]) {
    *reinterpret_cast<float4*>(target) = make_float4(in[0], in[1], in[2], in[3]);
}

// A in units of log2, so that exp(delta A) is one product and one exp2. `source`: (WIDTH, N) of this warp's channels.
__device__ __forceinline__ void load_A(float (&A)[CH][NS], const float* source, Place place) {
#pragma unroll
    for (int c = 0; c < CH; ++c) {
        load_states(A[c], source + place.channel(c) * N + NS * place.m);
#pragma unroll
        for (int n = 0; n < NS; ++n) A[c][n] *= LOG2_E;
    }
}

// The sum over all states of one number a channel, for the lane's own channel; every lane gives CH channels' shares.
__device__ __forceinline__ float sum_over_states(const float (&v)[CH], int m) {
    const float even = v[0] + shfl_xor(v[CH / 2], 2);
    if (CH == 2) return even + shfl_xor(even, 1);
    const float odd = v[1] + shfl_xor(v[CH - 1], 2);
    return (m & 1 ? odd : even) + shfl_xor(m & 1 ? even : odd, 1);
}

// ---- forward ---------------------------------------------------------------------------------------------------

constexpr int ROWS = TILE * WIDTH;

// One direction's share of a tile of a warp in shared memory.
struct ForwardTile {
    const float *projected, *steps;
    const scalar_t *u, *z, *other, *dy;
    float* middle;
};

// Where results go: at this lane's channel of some token. dz is one half of rows of 2 channels.
struct Targets {
    scalar_t *y, *dscan, *dz;

    __device__ __forceinline__ void move(int stride) {
        y += stride;
        if (FOR_BACKWARD) dscan += stride, dz += 2 * stride;
    }

    // y = scale silu(z) total, and with FOR_BACKWARD the gradients of total and z for that of y.
    __device__ __forceinline__ void finish(float total, float z, float dy, float scale) const {
        const float s = sigmoid(z), gate = scale * z * s;
        *y = narrow(gate * total);
        if (FOR_BACKWARD) {
            *dscan = narrow(gate * dy);
            *dz = narrow(scale * dy * total * s * (1.0f + z * (1.0f - s)));
        }
    }
};

// Walk `rows` tokens. FINISH: the other scan has been here, and the tokens are finished; else this scan is left in y,
// or, for `keep`, in tile.middle. `stride`: from row to row of y.
template <bool FINISH>
__device__ __forceinline__ void walk_tile(
    float (&h)[CH][NS], const float (&A)[CH][NS], float skip, const ForwardTile& tile, int rows, bool behind, bool keep,
    Targets targets, int stride, float* states, int states_stride, float scale, Place place) {
    const float *projected = tile.projected + PADDED + NS * place.m, *steps = tile.steps;
    const scalar_t* u = tile.u;
    int own = place.own;
#pragma unroll 4
    for (int i = 0; i < rows; ++i) {
        if (FOR_BACKWARD && ((behind ? rows - i : i) % GROUP == 0 || i == 0)) {
#pragma unroll
            for (int c = 0; c < CH; ++c) store_states(states + place.channel(c) * N + NS * place.m, h[c]);
            states += states_stride;
        }
        float delta[CH], x[CH], B[NS], C[NS], sums[CH];
        load_channels(delta, steps, place);
        load_channels(x, u, place);
        load_states(B, projected);
        load_states(C, projected + N);
#pragma unroll
        for (int c = 0; c < CH; ++c) {
            const float drive = delta[c] * x[c];
#pragma unroll
            for (int n = 0; n < NS; ++n) {
                h[c][n] = ex2(delta[c] * A[c][n]) * h[c][n] + drive * B[n];
                sums[c] = n ? sums[c] + C[n] * h[c][n] : C[n] * h[c][n];
            }
        }
        float value = sum_over_states(sums, place.m) + skip * widen(u[place.own]);
        if (FINISH) {
            const float dy = FOR_BACKWARD ? widen(tile.dy[own]) : 0.0f;
            targets.finish(value + widen(tile.other[own]), widen(tile.z[own]), dy, scale);
        } else {
            if (keep) tile.middle[own] = value;
            else *targets.y = narrow(value);
        }
        projected += COLUMNS, steps += PITCH, u += WIDTH, own += WIDTH;
        targets.move(stride);
    }
}

// y = scale silu(z) (scan ahead + scan behind), each scan with its skip D u. With FOR_BACKWARD also, for the gradient
// dy, those of the scans' sum (dscan) and of z (the second half of dxz), and `states` (2, batch, groups, channels, N):
// what enters every GROUP tokens of either scan.
//
// Grid (channel blocks, batch). Half of a block's warps walk ahead, half behind, tile by tile; in the first half of
// the way each leaves its scan in y, in the second half it finds the other's there and finishes the token.
extern "C" __global__ void __launch_bounds__(2 * THREADS, RESIDENT / (2 * WARPS)) scan_forward(
    const scalar_t* u, const float* projected, const scalar_t* xz, scalar_t* y,
    const scalar_t* dy, scalar_t* dscan, scalar_t* dxz, float* states,
    const float* dt_weight, const float* dt_weight_b, const float* dt_bias, const float* dt_bias_b,
    const float* A_ahead, const float* A_behind, const float* D_ahead, const float* D_behind,
    int64 length_, int64 channels_, int64 xz_stride_b, int64 xz_stride_l_, float scale) {
    DYNAMIC_SHARED(shared);
    // 32 bits reach any token of a sequence
    const int length = static_cast<int>(length_), channels = static_cast<int>(channels_);
    const int xz_stride_l = static_cast<int>(xz_stride_l_);
    const int warp_of_both = warp_of_block();
    const bool behind = warp_of_both >= WARPS;
    const int warp = warp_of_both % WARPS, lane = threadIdx.x % 32, quad = lane >> 2;
    const Place place(lane);
    const int64 b = blockIdx.y;
    const int first_channel = (blockIdx.x * WARPS + warp) * WIDTH;
    const bool active = first_channel < channels;  // the last block may have idle warps

    // shared memory, per direction: two tiles of `projected`, then per warp steps, u (2), z, the other scan, dy
    constexpr int PROJECTED = TILE * COLUMNS;
    constexpr int PER_WARP = (4 + FOR_BACKWARD) * ROWS * 2 + TILE * PITCH * 4;
    char* mine = shared + behind * (2 * PROJECTED * 4 + WARPS * PER_WARP);
    float* tile_projected = reinterpret_cast<float*>(mine);
    float* steps = reinterpret_cast<float*>(mine + 2 * PROJECTED * 4 + warp * PER_WARP);  // (TILE, PITCH)
    scalar_t* tile_u = reinterpret_cast<scalar_t*>(steps + TILE * PITCH);
    scalar_t *tile_z = tile_u + 2 * ROWS, *tile_other = tile_z + ROWS, *tile_dy = tile_other + ROWS;
    float* middle = reinterpret_cast<float*>(tile_z);  // (TILE, WIDTH), in the step that needs neither z nor the other

    const int64 sequence = behind * int64(gridDim.y) + b;  // of (2, batch)
    u += sequence * length * channels + first_channel;
    projected += sequence * length * COLUMNS;
    const scalar_t* z = xz + b * xz_stride_b + channels + first_channel;
    const int64 out = b * length * channels + first_channel;
    y += out;
    const int states_stride = channels * N * (behind ? -1 : 1);
    if (FOR_BACKWARD) {
        dy += out;
        const int groups = (length + GROUP - 1) / GROUP;
        states += ((sequence * groups + (behind ? groups - 1 : 0)) * channels + first_channel) * N;
    }
    const float* weight = (behind ? dt_weight_b : dt_weight) + int64(first_channel) * RANK;
    const float* bias = (behind ? dt_bias_b : dt_bias) + first_channel;
    StepWeights weights;
    float A[CH][NS], h[CH][NS] = {};
    float skip = 0.0f;
    if (active) {
        if (HOLD_WEIGHTS) weights.load(weight, bias, lane);
        load_A(A, (behind ? A_behind : A_ahead) + first_channel * N, place);
        skip = (behind ? D_behind : D_ahead)[first_channel + place.own];
    }
    const int tiles = (length + TILE - 1) / TILE;

    // what is fetched next: its tile's first row
    const int along = behind ? -1 : 1;
    const float* next_projected = projected + int64(behind ? length - 1 : 0) * COLUMNS;
    const scalar_t* next_u = u + (behind ? length - 1 : 0) * channels;
    auto fetch = [&](int step) {
        const int rows = min(TILE, length - (behind ? tiles - 1 - step : step) * TILE);
        copy_projected<TILE>(tile_projected + (step & 1) * PROJECTED, next_projected, along * COLUMNS, rows, warp,
                                    lane);
        if (active) copy_channels<TILE>(tile_u + (step & 1) * ROWS, next_u, along * channels, rows, lane);
        next_projected += along * rows * COLUMNS, next_u += along * rows * channels;
    };
    fetch(0);
    cp_async_commit();
    for (int step = 0; step < tiles; ++step) {
        const int start = (behind ? tiles - 1 - step : step) * TILE, rows = min(TILE, length - start);
        const Walk walk = walk_of(start, rows, behind);
        const bool finish = 2 * step > tiles - 1, meet = 2 * step == tiles - 1;
        cp_async_wait<0>();
        // this tile is there, and the one before has been read; half way, what the other scan has left is seen
        if (2 * step == tiles) sync_block();
        else if (WARPS > 1) sync_named(1 + behind, THREADS);
        else sync_warp();
        if (finish && active) {
            copy_channels<TILE>(tile_z, z + walk.first * xz_stride_l, along * xz_stride_l, rows, lane);
            copy_channels<TILE>(tile_other, y + walk.first * channels, along * channels, rows, lane);
            if (FOR_BACKWARD) copy_channels<TILE>(tile_dy, dy + walk.first * channels, along * channels, rows, lane);
        }
        cp_async_commit();
        if (step + 1 < tiles) fetch(step + 1);
        cp_async_commit();
        const ForwardTile tile{
            tile_projected + (step & 1) * PROJECTED, steps, tile_u + (step & 1) * ROWS, tile_z, tile_other, tile_dy,
            middle};
        auto targets_at = [&](int token) {
            const int at = token * channels + place.own;
            if (!FOR_BACKWARD) return Targets{y + at, nullptr, nullptr};
            return Targets{
                y + at, dscan + out + at, dxz + 2 * (b * length + token) * channels + channels + first_channel + place.own};
        };
        if (active) {
            float raw[CH][4];
            if (!HOLD_WEIGHTS) weights.load(weight, bias, lane);
            project_steps<TILE>(raw, tile.projected, weights, lane);
#pragma unroll
            for (int j = 0; j < CH; ++j)
#pragma unroll
                for (int late = 0; late < 2; ++late)
                    *reinterpret_cast<float2*>(steps + (quad + 8 * late) * PITCH + 8 * j + 2 * place.m) =
                        make_float2(softplus(raw[j][2 * late]), softplus(raw[j][2 * late + 1]));
        }
        cp_async_wait<1>();
        sync_warp();
        if (active) {
            const int stride = walk.along * channels;
            if (finish)
                walk_tile<true>(h, A, skip, tile, rows, behind, false, targets_at(walk.first), stride, states,
                                states_stride, scale, place);
            else
                walk_tile<false>(h, A, skip, tile, rows, behind, meet && !behind, targets_at(walk.first), stride, states,
                                 states_stride, scale, place);
            if (FOR_BACKWARD) states += states_stride * ((rows + GROUP - 1) / GROUP);
        }
        if (meet) {  // both scans have this tile in the same step
            sync_block();
            if (active && !behind)
                for (int i = 0; i < rows; ++i) {
                    const Targets targets = targets_at(start + i);
                    const float dy_i = FOR_BACKWARD ? widen(dy[(start + i) * channels + place.own]) : 0.0f;
                    const float total = middle[i * WIDTH + place.own] + widen(*targets.y);
                    sync_warp();  // two threads may share a channel
                    targets.finish(total, widen(z[(start + i) * xz_stride_l + place.own]), dy_i, scale);
                }
        }
    }
}

// ---- backward --------------------------------------------------------------------------------------------------

// Gradients of one direction's scan for dscan (batch, length, channels), the gradient of its output, from the states
// that forward left at every GROUP tokens: du (through the drive and the skip alone) and ddelta (of the time step
// before bias and softplus), both (2, batch, length, channels), and partial sums: dBC (2, channel blocks, batch,
// length, 2 N) over a block's channels; dA (2, batch, channels, N), dD and dbias (2, batch, channels) over tokens.
//
// Grid (channel blocks, batch, directions). The groups come from the scan's last to its first. Inside a group the
// states before each token are made again and kept in shared memory, whose places then take the token's shares of
// dB and dC.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT / WARPS) scan_backward(
    const scalar_t* dscan, const scalar_t* u, const float* projected, const float* states,
    scalar_t* du, scalar_t* ddelta, float* dBC, float* dA_sum, float* dD_sum, float* dbias_sum,
    const float* dt_weight, const float* dt_weight_b, const float* dt_bias, const float* dt_bias_b,
    const float* A_ahead, const float* A_behind, const float* D_ahead, const float* D_behind,
    int64 length_, int64 channels_) {
    constexpr int GROUP_CHANNELS = GROUP * WIDTH, STATE = 32 * CH * NS;  // of a warp: a tile's scalars, one state
    DYNAMIC_SHARED(shared);
    const int length = static_cast<int>(length_), channels = static_cast<int>(channels_);  // 32 bits, as in forward
    const bool behind = blockIdx.z;
    const int warp = warp_of_block(), lane = threadIdx.x % 32, thread = 32 * warp + lane, quad = lane >> 2;
    const Place place(lane);
    const int64 b = blockIdx.y, batch = gridDim.y;
    const int first_channel = (blockIdx.x * WARPS + warp) * WIDTH;
    const bool active = first_channel < channels;
    const int active_warps = min(WARPS, channels / WIDTH - static_cast<int>(blockIdx.x) * WARPS);

    // shared memory: two tiles of `projected`; states of all warps; per warp steps, slopes, tiles of u (2), dscan (2)
    constexpr int PROJECTED = GROUP * COLUMNS;
    constexpr int PER_WARP = 2 * GROUP * PITCH * 4 + 4 * GROUP_CHANNELS * 2;
    float* tile_projected = reinterpret_cast<float*>(shared);
    float* all_states = tile_projected + 2 * PROJECTED;
    char* mine = reinterpret_cast<char*>(all_states + WARPS * GROUP * STATE) + warp * PER_WARP;
    float *steps = reinterpret_cast<float*>(mine), *slopes = steps + GROUP * PITCH;
    scalar_t* tile_u = reinterpret_cast<scalar_t*>(slopes + GROUP * PITCH);
    scalar_t* tile_dscan = tile_u + 2 * GROUP_CHANNELS;
    float* before = all_states + warp * GROUP * STATE + 4 * lane;  // (GROUP, CH, 32 lanes, NS)

    const int64 sequence = behind * batch + b;  // of (2, batch)
    const int groups = (length + GROUP - 1) / GROUP;
    u += sequence * length * channels + first_channel;
    du += sequence * length * channels + first_channel;
    ddelta += sequence * length * channels + first_channel;
    dscan += b * length * channels + first_channel;
    projected += sequence * length * COLUMNS;
    states += (sequence * groups * channels + first_channel) * N;
    dBC += ((behind * int64(gridDim.x) + blockIdx.x) * batch + b) * length * (2 * N);
    const float* weight = (behind ? dt_weight_b : dt_weight) + int64(first_channel) * RANK;
    const float* bias = (behind ? dt_bias_b : dt_bias) + first_channel;
    StepWeights weights;
    float A[CH][NS], dA[CH][NS] = {}, sent[CH][NS] = {};  // sent: what later tokens send to the state
    float skip = 0.0f, dD = 0.0f, dbias = 0.0f;
    if (active) {
        if (HOLD_WEIGHTS) weights.load(weight, bias, lane);
        load_A(A, (behind ? A_behind : A_ahead) + first_channel * N, place);
        skip = (behind ? D_behind : D_ahead)[first_channel + place.own];
    }

    auto fetch = [&](int step) {
        const int start = (behind ? step : groups - 1 - step) * GROUP, rows = min(GROUP, length - start);
        const Walk walk = walk_of(start, rows, behind);
        const int stride = walk.along * channels, first = walk.first * channels;
        copy_projected<GROUP>(tile_projected + (step & 1) * PROJECTED, projected + int64(walk.first) * COLUMNS,
                                     walk.along * COLUMNS, rows, warp, lane);
        if (active) {
            copy_channels<GROUP>(tile_u + (step & 1) * GROUP_CHANNELS, u + first, stride, rows, lane);
            copy_channels<GROUP>(tile_dscan + (step & 1) * GROUP_CHANNELS, dscan + first, stride, rows, lane);
        }
    };
    fetch(0);
    cp_async_commit();
    for (int step = 0; step < groups; ++step) {
        const int group = behind ? step : groups - 1 - step, start = group * GROUP, rows = min(GROUP, length - start);
        const Walk walk = walk_of(start, rows, behind);
        float h[CH][NS];
        if (active) {
#pragma unroll
            for (int c = 0; c < CH; ++c)
                load_states(h[c], states + int64(group * channels + place.channel(c)) * N + NS * place.m);
        }
        cp_async_wait<0>();
        sync_block();  // this tile is there; the one before and its shares have been read
        if (step + 1 < groups) fetch(step + 1);
        cp_async_commit();
        const float* projected_rows = tile_projected + (step & 1) * PROJECTED;
        const scalar_t* u_rows = tile_u + (step & 1) * GROUP_CHANNELS;
        const scalar_t* dscan_rows = tile_dscan + (step & 1) * GROUP_CHANNELS;
        if (active) {
            float raw[CH][4];
            if (!HOLD_WEIGHTS) weights.load(weight, bias, lane);
            project_steps<GROUP>(raw, projected_rows, weights, lane);
#pragma unroll
            for (int j = 0; j < CH; ++j) {
                float2 value, slope;
                softplus_and_slope(raw[j][0], value.x, slope.x);
                softplus_and_slope(raw[j][1], value.y, slope.y);
                *reinterpret_cast<float2*>(steps + quad * PITCH + 8 * j + 2 * place.m) = value;
                *reinterpret_cast<float2*>(slopes + quad * PITCH + 8 * j + 2 * place.m) = slope;
            }
            sync_warp();
            const float *step_row = steps, *slope_row = slopes + place.own, *row = projected_rows + PADDED + NS * place.m;
            const scalar_t *u_row = u_rows, *dscan_row = dscan_rows;
            float* state = before;
#pragma unroll 2
            for (int i = 0; i < rows; ++i) {
                float delta[CH], x[CH], B[NS];
                load_channels(delta, step_row, place);
                load_channels(x, u_row, place);
                load_states(B, row);
#pragma unroll
                for (int c = 0; c < CH; ++c) {
                    store_states(state + c * 32 * NS, h[c]);
                    const float drive = delta[c] * x[c];
#pragma unroll
                    for (int n = 0; n < NS; ++n) h[c][n] = ex2(delta[c] * A[c][n]) * h[c][n] + drive * B[n];
                }
                step_row += PITCH, u_row += WIDTH, row += COLUMNS, state += STATE;
            }
            slope_row += rows * PITCH, dscan_row += rows * WIDTH;
            const int at = (walk.first + walk.along * (rows - 1)) * channels + place.own, back = -walk.along * channels;
            scalar_t *du_row = du + at, *ddelta_row = ddelta + at;
#pragma unroll 2
            for (int i = rows; i > 0; --i) {  // h: the state after token i - 1
                step_row -= PITCH, slope_row -= PITCH, u_row -= WIDTH, dscan_row -= WIDTH, row -= COLUMNS;
                state -= STATE;
                float delta[CH], x[CH], dy[CH], B[NS], C[NS], product[CH], exponent[CH], dB[NS], dC[NS];
                load_channels(delta, step_row, place);
                load_channels(x, u_row, place);
                load_channels(dy, dscan_row, place);
                load_states(B, row);
                load_states(C, row + N);
#pragma unroll
                for (int c = 0; c < CH; ++c) {
                    float earlier[NS];
                    load_states(earlier, state + c * 32 * NS);
                    const float drive = delta[c] * x[c];
#pragma unroll
                    for (int n = 0; n < NS; ++n) {
                        float g = sent[c][n] + C[n] * dy[c];
                        dC[n] = c ? dC[n] + dy[c] * h[c][n] : dy[c] * h[c][n];
                        dB[n] = c ? dB[n] + g * drive : g * drive;
                        product[c] = n ? product[c] + g * B[n] : g * B[n];
                        g *= ex2(delta[c] * A[c][n]);
                        const float w = g * earlier[n];
                        dA[c][n] += w * delta[c];
                        exponent[c] = n ? exponent[c] + w * A[c][n] : w * A[c][n];
                        sent[c][n] = g;
                        h[c][n] = earlier[n];
                    }
                }
                store_states(state, dB);
                store_states(state + 32 * NS, dC);
                const float own_product = sum_over_states(product, place.m);
                const float own_exponent = sum_over_states(exponent, place.m);
                const float own_x = widen(u_row[place.own]), own_dy = widen(dscan_row[place.own]);
                const float rate = (own_x * own_product + LN_2 * own_exponent) * *slope_row;
                *du_row = narrow(step_row[place.own] * own_product + skip * own_dy);
                *ddelta_row = narrow(rate);
                dbias += rate;
                dD += own_dy * own_x;
                du_row += back, ddelta_row += back;
            }
        }
        sync_block();
        // shares (row, dB or dC, state group m, 4 states) of all channels: the sum over warps and quads
        for (int i = thread; i < rows * 8; i += THREADS) {
            const int m = i & 3, kind = (i >> 2) & 1, row = i >> 3;
            const float* shares = all_states + row * STATE + kind * 32 * NS + 4 * m;
            float sum[NS] = {};
            for (int w = 0; w < active_warps; ++w)
#pragma unroll
                for (int q = 0; q < 8; ++q) {  // neighbours begin at different quads, which lie in different banks
                    float share[NS];
                    load_states(share, shares + w * GROUP * STATE + 16 * (q ^ kind));
#pragma unroll
                    for (int n = 0; n < NS; ++n) sum[n] += share[n];
                }
            store_states(dBC + int64(walk.first + walk.along * row) * (2 * N) + kind * N + NS * m, sum);
        }
    }
    if (active) {
        const int64 at = sequence * channels + first_channel;
#pragma unroll
        for (int c = 0; c < CH; ++c) store_states(dA_sum + (at + place.channel(c)) * N + NS * place.m, dA[c]);
        dD_sum[at + place.own] = dD, dbias_sum[at + place.own] = dbias;
    }
}
