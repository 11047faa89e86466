// Both selective scans of the bidirectional mixer, forward and backward (arXiv 2312.00752, sec. 3; 2401.09417, alg. 1).
//
// Compiled at run time with these macros: HALF_IS_BF16 (activations are bfloat16, else float16), RANK (of the time
// step's projection), FOR_BACKWARD (forward is run again by backward and writes what that needs), CH (channels of a
// thread, 2 or 4), WARPS (of a block; forward has as many for each direction) and RESIDENT (warps that a multiprocessor
// is to hold, from which the compiler derives the registers of a thread).
//
// A warp has 8 CH channels x 16 states and walks a sequence in tiles of eight tokens. Of a token's update
//   h = exp(delta A) h + (delta x) B,  y = sum over states of C h
// the decay is one product, one exp2 and one product a state. The rest is for the tensor cores, in TF32 with float32
// sums: a column times a row, (delta x) B, is added to h; C h is a product with columns of C. Activations are 16 bits
// wide; states, time steps and sums are float32. A backward direction is index arithmetic.
//
// Who has what. With g = lane / 4 and t = lane % 4, a lane has
//   of states: 4 t to 4 t + 3 of channels CH g + j (States),
//   of what there is once a token and channel: channels CH g + j of tokens t and t + 4 of a tile (Tokens).
// Both are places of mma.m16n8k8's sums, and nearly nothing moves between its products. As a sum, rows g and g + 8 of a
// state's matrix are first and second states of one channel; as the left factor of the next product, register by
// register, they are even and odd ones: a sum over states comes as two numbers, of two columns of C, each with one kind
// of state. The drives of four tokens are one left factor, a column of first and one of second states for each token:
// the right factor has zeros in the rows of all tokens but one. What is not finite in a token or state also shows in up
// to three tokens beside it, where it meets those zeros.

#include "device.cuh"

constexpr int N = 16;                     // states of a channel
constexpr int TILE = 8, HALF = TILE / 2;  // tokens between two saved states: the columns of one matrix product
constexpr int PADDED = (RANK + 7) / 8 * 8;  // columns of the time step; those behind RANK have no weights
constexpr int COLUMNS = PADDED + 2 * N;   // of a row of `projected`: time step, B, C
constexpr int STEPS = PADDED / 8;         // of the product over RANK, eight at a time
constexpr int PAIRS = CH / 2;             // of a thread's channels
constexpr int WIDTH = 8 * CH;             // channels of a warp
constexpr int THREADS = 32 * WARPS;       // of a block, or of one direction of it

// Of a factor the tensor cores take sign, exponent and ten bits. What they cut off, towards zero, is in the mean
// 0.72 / 2048 of a number whose logarithm is uniform, 0.69 / 2048 of one that is uniform itself; CUT puts it back.
constexpr float CUT = 1.0f + 0.71f / 2048, CUT2 = CUT * CUT, CUT3 = CUT2 * CUT, CUT4 = CUT2 * CUT2;

typedef long long int64;
typedef float Channels[CH];               // [j]
typedef float Tokens[CH][2];              // [j][late]: token t + 4 late
typedef float States[CH][4];              // [j][2 second + odd]: state 4 t + 2 odd + second

// f(j, late) for a lane's channels and tokens.
template <typename F>
__device__ __forceinline__ void for_tokens(F f) {
#pragma unroll
    for (int j = 0; j < CH; ++j)
#pragma unroll
        for (int late = 0; late < 2; ++late) f(j, late);
}

// ---- tiles in shared memory --------------------------------------------------------------------------------------

// A tile's rows lie in the order in which its scan walks, so that the loops over tokens know no direction.
struct Walk {
    int first, along, rows;  // the first row's token, 1 or -1, and how many there are

    __device__ __forceinline__ Walk(int tile, int length, bool behind)
        : first(tile * TILE), along(behind ? -1 : 1), rows(min(TILE, length - tile * TILE)) {
        if (behind) first += rows - 1;
    }
    __device__ __forceinline__ int token(int row) const { return first + along * row; }
};

// A tile of `projected`; a row ends with zeros.
constexpr int PITCH = COLUMNS + 4, PROJECTED = TILE * PITCH;

// What a thread reads or writes of an array (length, stride): some bytes of one row of each tile.
struct Stream {
    const char* base;  // with the tile's first row at token 0
    int bytes;         // from token to token

    __device__ __forceinline__ Stream() {}
    template <typename T>
    __device__ __forceinline__ Stream(const T* array, int stride, int along, int row, int column)
        : base(reinterpret_cast<const char*>(array + int64(along * row) * stride + column)),
          bytes(stride * static_cast<int>(sizeof(T))) {}

    __device__ __forceinline__ const char* at(Walk walk) const { return base + int64(walk.first) * bytes; }
};

// A thread's share of the copies of `projected` (length, COLUMNS), by WARPS warps.
struct ProjectedCopies {
    static constexpr int PARTS = COLUMNS / 4, ALL = TILE * PARTS, SHARES = (ALL + THREADS - 1) / THREADS;
    Stream from[SHARES];
    int to[SHARES];

    __device__ __forceinline__ ProjectedCopies(const float* projected, int along, int thread) {
#pragma unroll
        for (int k = 0; k < SHARES; ++k) {
            const int i = k * THREADS + thread, row = i / PARTS, part = i % PARTS;
            from[k] = Stream(projected, COLUMNS, along, row, 4 * part);
            hold(from[k].base);
            to[k] = row * PITCH + 4 * part;  // beyond the tile for a share that is none
            hold(to[k]);
        }
    }

    __device__ __forceinline__ void copy(float* tile, Walk walk) const {
#pragma unroll
        for (int k = 0; k < SHARES; ++k)
            if (to[k] < walk.rows * PITCH) cp_async16(tile + to[k], from[k].at(walk));
    }
};

// A tile of a warp's 16-bit channels. Rows lie 16 bytes farther apart than they are wide: fewer lanes meet in a bank.
struct Halves {
    static constexpr int ROW = WIDTH + 8, SIZE = TILE * ROW;
    scalar_t* memory;

    // What a lane copies, 16 bytes of a row.
    static __device__ __forceinline__ Stream part(const scalar_t* source, int stride, int along, int lane) {
        return Stream(source, stride, along, lane / CH, lane % CH * 8);
    }
    __device__ __forceinline__ void copy(const Stream& part, Walk walk, int lane) const {
        if (lane / CH < walk.rows) cp_async16(memory + lane / CH * ROW + lane % CH * 8, part.at(walk));
    }

    __device__ __forceinline__ void read(unsigned (&out)[2][PAIRS], int g, int t) const {
#pragma unroll
        for (int late = 0; late < 2; ++late) {
            const scalar_t* source = memory + (t + 4 * late) * ROW + CH * g;
            if (CH == 4) {
                const uint2 v = *reinterpret_cast<const uint2*>(source);
                out[late][0] = v.x, out[late][PAIRS - 1] = v.y;
            } else {
                out[late][0] = *reinterpret_cast<const unsigned*>(source);
            }
        }
    }

    static __device__ __forceinline__ void unpack(Tokens& out, const unsigned (&words)[2][PAIRS]) {
#pragma unroll
        for (int late = 0; late < 2; ++late)
#pragma unroll
            for (int pair = 0; pair < PAIRS; ++pair)
                widen2(words[late][pair], out[2 * pair][late], out[2 * pair + 1][late]);
    }

    __device__ __forceinline__ void read(Tokens& out, int g, int t) const {
        unsigned words[2][PAIRS];
        read(words, g, t);
        unpack(out, words);
    }
};

// Zeros: what rows behind a sequence's end hold, and the ends of the rows of `projected`.
__device__ __forceinline__ void clear(void* memory, int bytes, int thread, int threads) {
    for (int i = 16 * thread; i < bytes; i += 16 * threads)
        *reinterpret_cast<uint4*>(static_cast<char*>(memory) + i) = make_uint4(0, 0, 0, 0);
}

// Write a lane's tokens to an array of 16 bits; `to`: row t, this lane's channels.
__device__ __forceinline__ void store_tokens(const Stream& to, const Tokens& in, Walk walk, int t) {
    char* target = const_cast<char*>(to.at(walk));
#pragma unroll
    for (int late = 0; late < 2; ++late, target += int64(4 * walk.along) * to.bytes) {
        if (t + 4 * late >= walk.rows) break;
        const unsigned low = narrow2(in[0][late], in[1][late]), high = narrow2(in[CH - 2][late], in[CH - 1][late]);
        if (CH == 4) *reinterpret_cast<uint2*>(target) = make_uint2(low, high);
        else *reinterpret_cast<unsigned*>(target) = low;
    }
}

__device__ __forceinline__ void load_channels(Channels& out, const float* source) {
    if (CH == 4) {
        const float4 v = *reinterpret_cast<const float4*>(source);
        out[0] = v.x, out[1] = v.y, out[CH - 2] = v.z, out[CH - 1] = v.w;
    } else {
        const float2 v = *reinterpret_cast<const float2*>(source);
        out[0] = v.x, out[1] = v.y;
    }
}

// Numbers of a warp's tile, one a token and channel, on their way from their own lane to all that hold the channel's
// states. Rows lie farther apart than they are wide, so that writing lanes do not meet in a bank.
struct Exchange {
    static constexpr int ROW = WIDTH + 8, SIZE = TILE * ROW;
    float* memory;

    __device__ __forceinline__ float* at(int token, int g) const { return memory + token * ROW + CH * g; }

    __device__ __forceinline__ void write(const Tokens& in, int g, int t) const {
#pragma unroll
        for (int late = 0; late < 2; ++late) {
            float* target = at(t + 4 * late, g);
            if (CH == 4)
                *reinterpret_cast<float4*>(target) =
                    make_float4(in[0][late], in[1][late], in[CH - 2][late], in[CH - 1][late]);
            else
                *reinterpret_cast<float2*>(target) = make_float2(in[0][late], in[1][late]);
        }
    }

    __device__ __forceinline__ void read(Channels& out, int token, int g) const { load_channels(out, at(token, g)); }

    // What this lane has written.
    __device__ __forceinline__ void read(Tokens& out, int g, int t) const {
        Channels v;
#pragma unroll
        for (int late = 0; late < 2; ++late) {
            read(v, t + 4 * late, g);
#pragma unroll
            for (int j = 0; j < CH; ++j) out[j][late] = v[j];
        }
    }
};

// ---- the time step ---------------------------------------------------------------------------------------------

// What a warp reads once a tile, in shared memory: the time step's weights as left factors of the product, each lane's
// at its own place, its bias and the skips.
constexpr int WEIGHTS = PAIRS * STEPS * 32 * 4, PARAMETERS = WEIGHTS + 2 * WIDTH;  // words

__device__ __forceinline__ void stage_parameters(
    float* parameters, const float* weight, const float* bias, const float* skip, int lane) {
    const int g = lane >> 2, t = lane & 3;
    unsigned* memory = reinterpret_cast<unsigned*>(parameters);
    if (lane < WIDTH) parameters[WEIGHTS + lane] = bias[lane], parameters[WEIGHTS + WIDTH + lane] = skip[lane];
#pragma unroll 1
    for (int i = 0; i < PAIRS * STEPS; ++i) {
        const int pair = i / STEPS, step = i % STEPS;
        unsigned a[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int channel = CH * g + 2 * pair + k % 2, column = 8 * step + 2 * t + k / 2;
            a[k] = column < RANK ? to_tf32(weight[channel * RANK + column]) : 0u;
        }
        *reinterpret_cast<uint4*>(memory + (i * 32 + lane) * 4) = make_uint4(a[0], a[1], a[2], a[3]);
    }
}

// The time step before softplus: (WIDTH, RANK) x (RANK, TILE) + bias.
__device__ __forceinline__ void project_steps(
    Tokens& out, const float* projected, const float* parameters, int lane) {
    Channels bias;
    load_channels(bias, parameters + WEIGHTS + CH * (lane >> 2));
    float sums[PAIRS][4];
#pragma unroll
    for (int pair = 0; pair < PAIRS; ++pair)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[pair][i] = bias[2 * pair + i / 2];
    const int column = lane >> 2, token = column / 2 + 4 * (column % 2);
    projected += token * PITCH + 2 * (lane & 3);
    const unsigned* weights = reinterpret_cast<const unsigned*>(parameters) + 4 * lane;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const float2 v = *reinterpret_cast<const float2*>(projected + 8 * step);
        const unsigned b[2] = {to_tf32(v.x), to_tf32(v.y)};
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair) {
            const uint4 w = *reinterpret_cast<const uint4*>(weights + (pair * STEPS + step) * 32 * 4);
            const unsigned a[4] = {w.x, w.y, w.z, w.w};
            mma_tf32(sums[pair], a, b);
        }
    }
#pragma unroll
    for (int j = 0; j < CH; ++j) out[j][0] = sums[j / 2][j % 2 * 2], out[j][1] = sums[j / 2][j % 2 * 2 + 1];
}

// Zero for the rows behind a sequence's end. Without a time step such a token leaves the state as it is.
__device__ __forceinline__ void clear_rows(Tokens& v, int rows, int t) {
    for_tokens([&](int j, int late) { v[j][late] = t + 4 * late < rows ? v[j][late] : 0.0f; });
}

// ---- states ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ float4 in_order(const float (&v)[4]) { return make_float4(v[0], v[2], v[1], v[3]); }

// A in units of log2, so that exp(delta A) is one product and one exp2. `source`: (WIDTH, N) of this warp's channels.
__device__ __forceinline__ void load_A(States& A, const float* source, int g, int t) {
#pragma unroll
    for (int j = 0; j < CH; ++j) {
        const float4 v = *reinterpret_cast<const float4*>(source + (CH * g + j) * N + 4 * t);
        A[j][0] = LOG2_E * v.x, A[j][1] = LOG2_E * v.z, A[j][2] = LOG2_E * v.y, A[j][3] = LOG2_E * v.w;
    }
}

// Four numbers of one channel as they lie in registers, to and from memory of our own.
__device__ __forceinline__ void load_four(float (&out)[4], const float* source) {
    const float4 v = *reinterpret_cast<const float4*>(source);
    out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
}

__device__ __forceinline__ void store_four(float* target, const float (&in)[4]) {
    *reinterpret_cast<float4*>(target) = make_float4(in[0], in[1], in[2], in[3]);
}

// Saved states of a warp's channels: (WIDTH, N), a channel's in the order of the lanes and their registers.
__device__ __forceinline__ void save_states(float* target, const States& in, int g, int t) {
#pragma unroll
    for (int j = 0; j < CH; ++j) store_four(target + (CH * g + j) * N + 4 * t, in[j]);
}

// Where in a row of `projected` a lane finds its part of a right factor that has B or C (from `offset` on) for one of
// four tokens; for the others it takes the zeros at the row's end.
struct Places {
    int at[HALF];  // [token % 4]

    // B or C as a row: the token's rows t and t + 4 of the factor, column g with states 2 g and 2 g + 1.
    static __device__ __forceinline__ Places as_row(int offset, int g, int t) {
        Places places;
#pragma unroll
        for (int i = 0; i < HALF; ++i) places.at[i] = t == i ? offset + 2 * g : COLUMNS;
        return places;
    }
    // B or C as two columns, 2 i and 2 i + 1, of even and of odd states.
    static __device__ __forceinline__ Places as_columns(int offset, int g, int t) {
        Places places;
#pragma unroll
        for (int i = 0; i < HALF; ++i) places.at[i] = g / 2 == i ? offset + 4 * t + 2 * (g & 1) : COLUMNS;
        return places;
    }
};

__device__ __forceinline__ void load_factor(unsigned (&b)[2], const float* source) {
    const float2 v = *reinterpret_cast<const float2*>(source);
    b[0] = __float_as_uint(v.x), b[1] = __float_as_uint(v.y);
}

// A tile's columns of channels, to be multiplied by rows of states: left factors of four tokens each, (v, 0; 0, v) in a
// lane of the token. The lane reads what it has written itself; in memory because the zeros are written only once, and
// a product's factor has to lie in four registers side by side.
struct ColumnFactors {
    static constexpr int SIZE = 2 * CH * 32 * 4;
    float* memory;  // this lane's place in (2, CH, 32 lanes, 4)

    __device__ __forceinline__ void write(const Tokens& v) const {
        for_tokens([&](int j, int late) {
            float* target = memory + (late * CH + j) * 32 * 4;
            target[0] = target[3] = v[j][late];
        });
    }

    __device__ __forceinline__ void read(unsigned (&a)[CH][4], int late) const {
#pragma unroll
        for (int j = 0; j < CH; ++j) {
            float v[4];
            load_four(v, memory + (late * CH + j) * 32 * 4);
#pragma unroll
            for (int i = 0; i < 4; ++i) a[j][i] = __float_as_uint(v[i]);
        }
    }
};

// h += column x row, of one token
__device__ __forceinline__ void add_product(States& h, const unsigned (&columns)[CH][4], const float* row) {
    unsigned b[2];
    load_factor(b, row);
#pragma unroll
    for (int j = 0; j < CH; ++j) mma_tf32(h[j], columns[j], b);
}

// h *= exp2(delta A)
__device__ __forceinline__ void decay(States& h, const States& A, const Channels& delta) {
#pragma unroll
    for (int j = 0; j < CH; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) h[j][i] *= ex2(delta[j] * A[j][i]);
}

// Sums over the states of four tokens, in their places.
struct Sums {
    float places[CH][4];

    __device__ __forceinline__ Sums() : places{} {}

    // The sums of h times B or C, as columns, of one token
    __device__ __forceinline__ void add(const States& h, const float* columns) {
        unsigned b[2];
        load_factor(b, columns);
#pragma unroll
        for (int j = 0; j < CH; ++j) {
            const unsigned a[4] = {__float_as_uint(h[j][0]), __float_as_uint(h[j][1]), __float_as_uint(h[j][2]),
                                   __float_as_uint(h[j][3])};
            mma_tf32(places[j], a, b);
        }
    }

    __device__ __forceinline__ void finish(Tokens& out, int late) const {
#pragma unroll
        for (int j = 0; j < CH; ++j) out[j][late] = places[j][0] + places[j][3];
    }
};

// ---- forward ---------------------------------------------------------------------------------------------------

// y = scale silu(z) (scan ahead + scan behind), each scan with its skip D u. With FOR_BACKWARD also, for the gradient
// dy, those of the scans' sum (dscan) and of z (the second half of dxz), and `states` (2, batch, tiles, channels, N):
// what enters every tile of either scan.
//
// Grid (channel blocks, batch). Half of a block's warps walk ahead, half behind, tile by tile; in the first half of
// the way each leaves its scan in y, in the second half it finds the other's there and finishes the token. The one tile
// in the middle is left by the warps that walk ahead.
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
    const int warp = warp_of_both % WARPS, lane = threadIdx.x % 32, thread = 32 * warp + lane;
    const int g = lane >> 2, t = lane & 3;
    const int64 b = blockIdx.y;
    const int first_channel = (blockIdx.x * WARPS + warp) * WIDTH, own = first_channel + CH * g;
    const bool active = first_channel < channels;  // the last block may have idle warps

    // shared memory, per direction: three tiles of `projected`; per warp parameters, steps, factors, and tiles of u (2),
    // z, the other scan, dy
    constexpr int TILES = 4 + FOR_BACKWARD;
    constexpr int PER_WARP = PARAMETERS + Exchange::SIZE + ColumnFactors::SIZE + TILES * Halves::SIZE / 2;
    float* tile_projected = reinterpret_cast<float*>(shared) + behind * (3 * PROJECTED + WARPS * PER_WARP);
    float* mine = tile_projected + 3 * PROJECTED + warp * PER_WARP;
    const Exchange steps{mine + PARAMETERS};
    float* factors = steps.memory + Exchange::SIZE;
    const ColumnFactors drives{factors + 4 * lane};
    scalar_t* halves = reinterpret_cast<scalar_t*>(factors + ColumnFactors::SIZE);
    const Halves tile_z{halves + 2 * Halves::SIZE}, tile_other{halves + 3 * Halves::SIZE};
    const Halves tile_dy{halves + 4 * Halves::SIZE};

    const int tiles = (length + TILE - 1) / TILE;
    const int64 sequence = behind * int64(gridDim.y) + b;  // of (2, batch)
    u += sequence * length * channels + first_channel;
    projected += sequence * length * COLUMNS;
    const scalar_t* z = xz + b * xz_stride_b + channels + first_channel;
    y += b * length * channels;
    if (FOR_BACKWARD) {
        dy += b * length * channels + first_channel, dscan += b * length * channels + own;
        dxz += (2 * b * length + 1) * channels + own;
        states += (sequence * tiles * channels + first_channel) * N;
    }
    States A, h = {};
    clear(tile_projected, 3 * PROJECTED * 4, thread, THREADS);
    clear(factors, ColumnFactors::SIZE * 4, lane, 32);
    clear(halves, 2 * Halves::SIZE * 2, lane, 32);
    if (active) {
        stage_parameters(
            mine, (behind ? dt_weight_b : dt_weight) + int64(first_channel) * RANK,
            (behind ? dt_bias_b : dt_bias) + first_channel, (behind ? D_behind : D_ahead) + first_channel, lane);
        load_A(A, (behind ? A_behind : A_ahead) + first_channel * N, g, t);
    }
    const Places of_B = Places::as_row(PADDED, g, t), of_C = Places::as_columns(PADDED + N, g, t);
    const int along = behind ? -1 : 1;
    const ProjectedCopies copies(projected, along, thread);
    Stream u_part = Halves::part(u, channels, along, lane), z_part = Halves::part(z, xz_stride_l, along, lane);
    Stream y_part = Halves::part(y + first_channel, channels, along, lane), to_y(y + own, channels, along, t, 0);
    Stream dy_part, to_dscan, to_dz;
    if (FOR_BACKWARD) {
        dy_part = Halves::part(dy, channels, along, lane);
        to_dscan = Stream(dscan, channels, along, t, 0), to_dz = Stream(dxz, 2 * channels, along, t, 0);
        hold(dy_part.base);
    }
    hold(u_part.base), hold(y_part.base);

    const int left = behind ? tiles / 2 : (tiles + 1) / 2;  // tiles of the first half of the way
    auto tile_of = [&](int step) { return behind ? tiles - 1 - step : step; };
    auto sync_direction = [&] {
        if (WARPS > 1) sync_named(1 + behind, THREADS);
        else sync_warp();
    };
    // A tile's time steps and drives are made while the one before it is walked, from what was fetched during the one
    // before that.
    auto fetch = [&](int step, float* target) {
        if (step < tiles) {
            const Walk walk(tile_of(step), length, behind);
            copies.copy(target, walk);
            if (active) Halves{halves + step % 2 * Halves::SIZE}.copy(u_part, walk, lane);
        }
        cp_async_commit();
    };
    float *rows = tile_projected, *next_rows = rows + PROJECTED, *later_rows = next_rows + PROJECTED;
    unsigned packed_x[2][PAIRS];
    auto write_next = [&](Tokens& delta, int step) {
        Tokens drive;
        Halves{halves + step % 2 * Halves::SIZE}.read(packed_x, g, t);
        Halves::unpack(drive, packed_x);
        clear_rows(delta, length - tile_of(step) * TILE, t);
        for_tokens([&](int j, int late) { drive[j][late] *= delta[j][late]; });
        steps.write(delta, g, t);
        drives.write(drive);
    };
    sync_direction();  // cleared
    fetch(0, rows);
    fetch(1, next_rows);
    cp_async_wait<1>();
    sync_direction();
    if (active) {
        Tokens delta;
        project_steps(delta, rows, mine, lane);
        for_tokens([&](int j, int late) { delta[j][late] = softplus(delta[j][late]); });
        write_next(delta, 0);
    }
    for (int step = 0; step < tiles; ++step) {
        const int tile = tile_of(step);
        const Walk walk(tile, length, behind);
        const bool finish = step >= left;
        cp_async_wait<0>();
        // the next tile is there, and the one before has been read; half way, what the other scan has left is seen
        if (step == left) sync_block();
        else sync_direction();
        if (finish && active) {
            tile_z.copy(z_part, walk, lane);
            tile_other.copy(y_part, walk, lane);
            if (FOR_BACKWARD) tile_dy.copy(dy_part, walk, lane);
        }
        cp_async_commit();
        fetch(step + 2, later_rows);
        if (active) {
            if (FOR_BACKWARD) save_states(states + int64(tile) * channels * N, h, g, t);
            Tokens delta, result, x;
            project_steps(delta, next_rows, mine, lane);
#pragma unroll
            for (int late = 0; late < 2; ++late) {
                unsigned columns[CH][4];
                drives.read(columns, late);
                Sums sums;
#pragma unroll
                for (int i = 0; i < HALF; ++i) {
                    const int token = HALF * late + i;
                    const float* row = rows + token * PITCH;
                    Channels step_size;
                    steps.read(step_size, token, g);
                    decay(h, A, step_size);
                    add_product(h, columns, row + of_B.at[i]);
                    sums.add(h, row + of_C.at[i]);
                    if (i < CH) delta[i][late] = softplus(delta[i][late]);
                }
                sums.finish(result, late);
            }
            Halves::unpack(x, packed_x);
            sync_warp();
            write_next(delta, step + 1);
            Channels skip;
            load_channels(skip, mine + WEIGHTS + WIDTH + CH * g);
            for_tokens([&](int j, int late) { x[j][late] *= skip[j]; });
            if (finish) {
                cp_async_wait<1>();
                sync_warp();
                Tokens other, gate, incoming, slope;
                tile_other.read(other, g, t);
                tile_z.read(gate, g, t);
                if (FOR_BACKWARD) tile_dy.read(incoming, g, t);
                for_tokens([&](int j, int late) {
                    const float v = gate[j][late], s = sigmoid(v), scaled = scale * v * s;
                    const float total = CUT4 * result[j][late] + (x[j][late] + other[j][late]);
                    result[j][late] = scaled * total;
                    if (FOR_BACKWARD) {
                        const float dy_i = incoming[j][late];
                        slope[j][late] = scale * dy_i * total * s * (1.0f + v * (1.0f - s));
                        incoming[j][late] = scaled * dy_i;
                    }
                });
                if (FOR_BACKWARD) {
                    store_tokens(to_dscan, incoming, walk, t);
                    store_tokens(to_dz, slope, walk, t);
                }
            } else {
                for_tokens([&](int j, int late) { result[j][late] = CUT4 * result[j][late] + x[j][late]; });
            }
            store_tokens(to_y, result, walk, t);
        }
        float* free_rows = rows;
        rows = next_rows, next_rows = later_rows, later_rows = free_rows;
    }
    if (left == tiles) sync_block();  // a sequence of one tile: what walks ahead leaves it to the others
}

// ---- backward --------------------------------------------------------------------------------------------------

// Gradients of one direction's scan for dscan (batch, length, channels), the gradient of its output, from the states
// that forward left before every tile: du (through the drive and the skip alone) and ddelta (of the time step before
// bias and softplus), both (2, batch, length, channels), and partial sums: dBC (2, channel blocks, batch, length, 2 N)
// over a block's channels; dA (2, batch, channels, N), dD and dbias (2, batch, channels) over tokens.
//
// Grid (channel blocks, batch, directions). The tiles come from the scan's last to its first. Inside a tile the states
// before each token are made again and kept, the first half in shared memory, the second in registers; the places in
// shared memory then take the tokens' shares of dB and dC.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT / WARPS) scan_backward(
    const scalar_t* dscan, const scalar_t* u, const float* projected, const float* states,
    scalar_t* du, scalar_t* ddelta, float* dBC, float* dA_sum, float* dD_sum, float* dbias_sum,
    const float* dt_weight, const float* dt_weight_b, const float* dt_bias, const float* dt_bias_b,
    const float* A_ahead, const float* A_behind, const float* D_ahead, const float* D_behind,
    int64 length_, int64 channels_) {
    // floats of a warp's states of one token, of a token's shares of dB and dC, and of all that are kept of a tile
    constexpr int STATE = 32 * CH * 4, SHARE = 2 * 32 * 4, KEPT = HALF * (STATE + SHARE);
    DYNAMIC_SHARED(shared);
    const int length = static_cast<int>(length_), channels = static_cast<int>(channels_);  // 32 bits, as in forward
    const bool behind = blockIdx.z;
    const int warp = warp_of_block(), lane = threadIdx.x % 32, thread = 32 * warp + lane, g = lane >> 2, t = lane & 3;
    const int64 b = blockIdx.y, batch = gridDim.y;
    const int first_channel = (blockIdx.x * WARPS + warp) * WIDTH, own = first_channel + CH * g;
    const bool active = first_channel < channels;

    // shared memory: two tiles of `projected`; states and shares of all warps; per warp parameters, numbers on their
    // way between lanes, factors, tiles of u (2) and dscan (2)
    constexpr int PER_WARP = PARAMETERS + 3 * Exchange::SIZE + ColumnFactors::SIZE + 4 * Halves::SIZE / 2;
    float* tile_projected = reinterpret_cast<float*>(shared);
    float* all_kept = tile_projected + 2 * PROJECTED;
    float* mine = all_kept + WARPS * KEPT + warp * PER_WARP;
    float* exchanges = mine + PARAMETERS;
    const Exchange steps{exchanges}, drives{exchanges + Exchange::SIZE}, dscans{exchanges + 2 * Exchange::SIZE};
    float* factors = exchanges + 3 * Exchange::SIZE;
    const ColumnFactors column_factors{factors + 4 * lane};  // of the drives, then of dscan
    scalar_t* halves = reinterpret_cast<scalar_t*>(factors + ColumnFactors::SIZE);
    float* before = all_kept + warp * KEPT + 4 * lane;  // (HALF, CH, 32 lanes, 4), then shares (HALF, 2, 32, 4)

    const int64 sequence = behind * batch + b;  // of (2, batch)
    const int tiles = (length + TILE - 1) / TILE;
    u += sequence * length * channels + first_channel;
    du += sequence * length * channels + own;
    ddelta += sequence * length * channels + own;
    dscan += b * length * channels + first_channel;
    projected += sequence * length * COLUMNS;
    states += (sequence * tiles * channels + first_channel) * N;
    dBC += ((behind * int64(gridDim.x) + blockIdx.x) * batch + b) * length * (2 * N);
    States A, dA = {}, sent = {};  // sent: what later tokens send to the state
    Channels dD = {}, dbias = {};
    clear(tile_projected, 2 * PROJECTED * 4, thread, THREADS);
    clear(factors, ColumnFactors::SIZE * 4, lane, 32);
    clear(halves, 4 * Halves::SIZE * 2, lane, 32);
    if (!active) clear(all_kept + warp * KEPT, KEPT * 4, lane, 32);
    if (active) {
        stage_parameters(
            mine, (behind ? dt_weight_b : dt_weight) + int64(first_channel) * RANK,
            (behind ? dt_bias_b : dt_bias) + first_channel, (behind ? D_behind : D_ahead) + first_channel, lane);
        load_A(A, (behind ? A_behind : A_ahead) + first_channel * N, g, t);
    }
    const Places row_of_B = Places::as_row(PADDED, g, t), row_of_C = Places::as_row(PADDED + N, g, t);
    const Places columns_of_B = Places::as_columns(PADDED, g, t);
    const int along = behind ? -1 : 1;
    const ProjectedCopies copies(projected, along, thread);
    Stream u_part = Halves::part(u, channels, along, lane), dscan_part = Halves::part(dscan, channels, along, lane);
    hold(u_part.base), hold(dscan_part.base);
    const Stream to_du(du, channels, along, t, 0), to_ddelta(ddelta, channels, along, t, 0);
    auto fetch = [&](int step) {
        const Walk walk(behind ? step : tiles - 1 - step, length, behind);
        copies.copy(tile_projected + step % 2 * PROJECTED, walk);
        if (active) {
            Halves{halves + step % 2 * Halves::SIZE}.copy(u_part, walk, lane);
            Halves{halves + (2 + step % 2) * Halves::SIZE}.copy(dscan_part, walk, lane);
        }
    };
    sync_block();  // cleared
    fetch(0);
    cp_async_commit();
    for (int step = 0; step < tiles; ++step) {
        const int tile = behind ? step : tiles - 1 - step;
        const Walk walk(tile, length, behind);
        States h;
        if (active)
#pragma unroll
            for (int j = 0; j < CH; ++j) load_four(h[j], states + (int64(tile) * channels + CH * g + j) * N + 4 * t);
        cp_async_wait<0>();
        sync_block();  // this tile is there; the one before and its shares have been read
        if (step + 1 < tiles) fetch(step + 1);
        cp_async_commit();
        const float* rows = tile_projected + step % 2 * PROJECTED;
        if (active) {
            const Halves tile_u{halves + step % 2 * Halves::SIZE}, tile_dscan{halves + (2 + step % 2) * Halves::SIZE};
            Tokens slope;
            {
                Tokens raw, delta, x, drive, dy;
                project_steps(raw, rows, mine, lane);
                tile_u.read(x, g, t);
                tile_dscan.read(dy, g, t);
                for_tokens([&](int j, int late) { softplus_and_slope(raw[j][late], delta[j][late], slope[j][late]); });
                clear_rows(delta, walk.rows, t);
                clear_rows(dy, walk.rows, t);
                for_tokens([&](int j, int late) { drive[j][late] = delta[j][late] * x[j][late]; });
                steps.write(delta, g, t);
                drives.write(drive, g, t);
                dscans.write(dy, g, t);
                column_factors.write(drive);
            }
            sync_warp();
            States second[HALF];  // the states before each token of the second half
#pragma unroll
            for (int late = 0; late < 2; ++late) {
                unsigned columns[CH][4];
                column_factors.read(columns, late);
#pragma unroll
                for (int i = 0; i < HALF; ++i) {
#pragma unroll
                    for (int j = 0; j < CH; ++j) {
                        if (late)
#pragma unroll
                            for (int n = 0; n < 4; ++n) second[i][j][n] = h[j][n];
                        else store_four(before + i * STATE + j * 32 * 4, h[j]);
                    }
                    Channels step_size;
                    steps.read(step_size, HALF * late + i, g);
                    decay(h, A, step_size);
                    add_product(h, columns, rows + (HALF * late + i) * PITCH + row_of_B.at[i]);
                }
            }
            Tokens x, dy, product, exponent;
            tile_dscan.read(dy, g, t);  // again, here and below: fewer registers
            clear_rows(dy, walk.rows, t);
            column_factors.write(dy);
#pragma unroll
            for (int late = 1; late >= 0; --late) {
                unsigned columns[CH][4];
                column_factors.read(columns, late);
                Sums products;  // of sent and B
                float exponents[PAIRS][4] = {};  // sums of sent, decayed state and A, two channels in one
#pragma unroll
                for (int i = HALF - 1; i >= 0; --i) {  // h: the state after this token
                    sync_warp();  // keeps the compiler from reading ahead into more registers than there are
                    const int token = HALF * late + i;
                    const float* row = rows + token * PITCH;
                    float* state = before + (token < HALF ? token * STATE : HALF * STATE + i * SHARE);
                    Channels step_size, drive_of, dy_of;
                    float dB[4], dC[4], shares[CH];
                    add_product(sent, columns, row + row_of_C.at[i]);
                    products.add(sent, row + columns_of_B.at[i]);
                    drives.read(drive_of, token, g);
                    dscans.read(dy_of, token, g);
#pragma unroll
                    for (int j = 0; j < CH; ++j) {
#pragma unroll
                        for (int n = 0; n < 4; ++n) {
                            dC[n] = j ? dC[n] + dy_of[j] * h[j][n] : dy_of[j] * h[j][n];
                            dB[n] = j ? dB[n] + drive_of[j] * sent[j][n] : drive_of[j] * sent[j][n];
                        }
                        if (late)
#pragma unroll
                            for (int n = 0; n < 4; ++n) h[j][n] = second[i][j][n];
                        else load_four(h[j], state + j * 32 * 4);
                    }
                    steps.read(step_size, token, g);
                    decay(sent, A, step_size);
#pragma unroll
                    for (int j = 0; j < CH; ++j)
#pragma unroll
                        for (int n = 0; n < 4; ++n) {
                            const float w = sent[j][n] * h[j][n];
                            dA[j][n] += w * step_size[j];
                            shares[j] = n ? shares[j] + w * A[j][n] : w * A[j][n];
                        }
                    // the sums of four lanes' shares, of two channels in the places of row g, row g + 8
                    const unsigned one = __float_as_uint(g / 2 == i ? 1.0f : 0.0f);
#pragma unroll
                    for (int pair = 0; pair < PAIRS; ++pair) {
                        const unsigned a[2] = {
                            __float_as_uint(shares[2 * pair]), __float_as_uint(shares[2 * pair + 1])};
                        mma_tf32(exponents[pair], a, one);
                    }
                    store_four(state, dB);
                    store_four(state + 32 * 4, dC);
                }
                products.finish(product, late);
#pragma unroll
                for (int j = 0; j < CH; ++j) exponent[j][late] = exponents[j / 2][j % 2 * 3];
            }
            Tokens delta;
            steps.read(delta, g, t);
            tile_u.read(x, g, t);
            tile_dscan.read(dy, g, t);
            Channels skip;
            load_channels(skip, mine + WEIGHTS + WIDTH + CH * g);
            for_tokens([&](int j, int late) {
                const float through_drive = CUT3 * product[j][late];
                const float through_decay = LN_2 * CUT4 * exponent[j][late];
                const float rate = (x[j][late] * through_drive + through_decay) * slope[j][late];
                if (t + 4 * late < walk.rows) dbias[j] += rate, dD[j] += dy[j][late] * x[j][late];
                product[j][late] = delta[j][late] * through_drive + skip[j] * dy[j][late];  // du
                exponent[j][late] = rate;                                                   // ddelta
            });
            store_tokens(to_du, product, walk, t);
            store_tokens(to_ddelta, exponent, walk, t);
        }
        sync_block();
        // shares (row, dB or dC, lane t, 4 states) of all channels: the sum over warps and g
        static_assert(THREADS >= TILE * 8, "one sum a thread");
        if (thread < walk.rows * 8) {
            const int quarter = thread & 3, kind = (thread >> 2) & 1, row = thread >> 3;
            const float* shares = all_kept + (row < HALF ? row * STATE : HALF * STATE + (row - HALF) * SHARE);
            shares += kind * 32 * 4 + 4 * quarter;
            float sum[4] = {};
#pragma unroll
            for (int w = 0; w < WARPS; ++w)
#pragma unroll
                for (int q = 0; q < 8; ++q) {  // neighbours begin at different g, which lie in different banks
                    float share[4];
                    load_four(share, shares + w * KEPT + 16 * (q ^ kind));
#pragma unroll
                    for (int n = 0; n < 4; ++n) sum[n] += share[n];
                }
#pragma unroll
            for (int n = 0; n < 4; ++n) sum[n] *= kind ? CUT2 : CUT;  // of h, of what is sent
            float* target = dBC + int64(walk.token(row)) * (2 * N) + kind * N + 4 * quarter;
            *reinterpret_cast<float4*>(target) = in_order(sum);
        }
    }
    if (active) {
        const int64 at = sequence * channels + own;
#pragma unroll
        for (int j = 0; j < CH; ++j) {
#pragma unroll
            for (int n = 0; n < 4; ++n) dA[j][n] *= CUT3;  // of h and of what is sent
            *reinterpret_cast<float4*>(dA_sum + (at + j) * N + 4 * t) = in_order(dA[j]);
#pragma unroll
            for (int mask = 1; mask < 4; mask *= 2)
                dD[j] += shfl_xor(dD[j], mask), dbias[j] += shfl_xor(dbias[j], mask);
            if (t == 0) dD_sum[at + j] = dD[j], dbias_sum[at + j] = dbias[j];
        }
    }
}
