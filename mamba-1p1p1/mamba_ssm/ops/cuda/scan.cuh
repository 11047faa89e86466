// What both passes of the bidirectional mixer's scans share, forward and backward (scan_forward.cu, scan_backward.cu;
// arXiv 2312.00752, sec. 3; 2401.09417, alg. 1): who has what, tiles in shared memory, a token's update.
//
// Compiled at run time with these macros: HALF_IS_BF16 (activations are bfloat16, else float16), RANK (of the time
// step's projection), CH (channels of a thread, 2 or 4), WARPS (of a block; forward has as many for each direction) and
// RESIDENT (warps that a multiprocessor is to hold, from which the compiler derives the registers of a thread).
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
// A pair of channels has rows g and g + 8 of two matrices, of its even and of its odd states, which are sums of
// mma.m16n8k4. That product's left factor, channels by four tokens, is Tokens as they lie in registers; its right factor is
// a row of B for one token, zeros for the others. For sums over states the matrix's four registers are a left factor of
// mma.m16n8k8: register by register, rows g and g + 8 are then its even and odd columns, and t and t + 4 the pair's first
// and second channel. So a sum comes as two numbers, of two columns of C that have zeros in the other channel's rows, and
// goes through shared memory to the lane that has the token. What is not finite in a token or state also shows in up to
// three tokens beside it and in the other channel of its pair, where it meets those zeros.
//
// What shared memory does not do is worth instructions: its accesses and the exponentials wait for each other
// (docs/LOG.md, 2026-11-27).

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
typedef float States[CH][4];              // [2 pair + second][2 row + odd]: states 4 t + 2 odd + second of channel
                                          // CH g + pair + PAIRS row

// State n = 2 second + odd of channel j.
template <typename T>
__device__ __forceinline__ auto& state_of(T& states, int j, int n) {
    return states[2 * (j % PAIRS) + n / 2][2 * (j / PAIRS) + n % 2];
}

// A bool that is known where a lambda is compiled.
template <bool VALUE>
struct Constant {
    __device__ constexpr operator bool() const { return VALUE; }
};

// f(j, late) for a lane's channels and tokens.
template <typename F>
__device__ __forceinline__ void for_tokens(F f) {
#pragma unroll
    for (int j = 0; j < CH; ++j)
#pragma unroll
        for (int late = 0; late < 2; ++late) f(j, late);
}

// --- tiles in shared memory

// A tile's rows lie in the order in which its scan walks, so that the loops over tokens know no direction.
struct Walk {
    int first, along, rows;  // the first row's token, 1 or -1, and how many there are

    __device__ __forceinline__ Walk(int tile, int length, bool behind)
        : first(tile * TILE), along(behind ? -1 : 1), rows(min(TILE, length - tile * TILE)) {
        if (behind) first += rows - 1;
    }
    __device__ __forceinline__ int token(int row) const { return first + along * row; }
};

// A tile of `projected`. Rows are an odd number of eights apart: what a half of a warp reads of four adjacent rows, eight
// columns of each, lies in all banks.
constexpr int PITCH = COLUMNS % 16 ? COLUMNS : COLUMNS + 8, PROJECTED = TILE * PITCH;

// What a thread reads or writes of an array (length, stride): some bytes of one row of each tile.
struct Stream {
    const char* base;  // with the tile's first row at token 0
    int bytes;         // from token to token

    __device__ __forceinline__ Stream() {}
    template <typename T>
    __device__ __forceinline__ Stream(const T* array, int stride, int along, int row, int column)
        : base(reinterpret_cast<const char*>(array + int64(along * row) * stride + column)),
          bytes(stride * static_cast<int>(sizeof(T))) {}

    __device__ __forceinline__ const char* at(Walk walk) const { return advance(base, walk.first, bytes); }
};

// 16 bytes where `wanted`. BRANCHLESS: other work can go on meanwhile; costs registers.
template <bool BRANCHLESS>
__device__ __forceinline__ void copy16(bool wanted, void* to, const Stream& from, Walk walk) {
    if (BRANCHLESS) cp_async16_if(wanted, to, from.at(walk));
    else if (wanted) cp_async16(to, from.at(walk));
}

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

    template <bool BRANCHLESS>
    __device__ __forceinline__ void copy(float* tile, Walk walk) const {
#pragma unroll
        for (int k = 0; k < SHARES; ++k) copy16<BRANCHLESS>(to[k] < walk.rows * PITCH, tile + to[k], from[k], walk);
    }
};

// A tile of a warp's 16-bit channels. Rows lie so far apart that reading lanes do not meet in a bank.
struct Halves {
    static constexpr int ROW = CH == 4 ? WIDTH + 16 : WIDTH, SIZE = TILE * ROW;
    scalar_t* memory;

    // What a lane copies, 16 bytes of a row.
    static __device__ __forceinline__ Stream part(const scalar_t* source, int stride, int along, int lane) {
        return Stream(source, stride, along, lane / CH, lane % CH * 8);
    }
    template <bool BRANCHLESS>
    __device__ __forceinline__ void copy(const Stream& part, Walk walk, int lane) const {
        copy16<BRANCHLESS>(lane / CH < walk.rows, memory + lane / CH * ROW + lane % CH * 8, part, walk);
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

// Zeros: what rows behind a sequence's end hold.
__device__ __forceinline__ void clear(void* memory, int bytes, int thread, int threads) {
    for (int i = 16 * thread; i < bytes; i += 16 * threads)
        *reinterpret_cast<uint4*>(static_cast<char*>(memory) + i) = make_uint4(0, 0, 0, 0);
}

// Write a lane's tokens to an array of 16 bits; `to`: row t, this lane's channels, or those `columns` behind them.
__device__ __forceinline__ void store_tokens(const Stream& to, const Tokens& in, Walk walk, int t, int columns = 0) {
    char* target = const_cast<char*>(to.at(walk)) + 2 * columns;
#pragma unroll
    for (int late = 0; late < 2; ++late, target = const_cast<char*>(advance(target, 4 * walk.along, to.bytes))) {
        const unsigned low = narrow2(in[0][late], in[1][late]), high = narrow2(in[CH - 2][late], in[CH - 1][late]);
        if (t + 4 * late >= walk.rows) continue;
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

// --- the time step

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
        if (STEPS <= 3 && step % 2 == 0) sync_warp();  // keeps the compiler from reading ahead into too many registers
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

// --- states

__device__ __forceinline__ float4 in_order(const float (&v)[4]) { return make_float4(v[0], v[2], v[1], v[3]); }

// A in units of log2, so that exp(delta A) is one product and one exp2. `source`: (WIDTH, N) of this warp's channels.
__device__ __forceinline__ void load_A(States& A, const float* source, int g, int t) {
#pragma unroll
    for (int j = 0; j < CH; ++j) {
        const float4 v = *reinterpret_cast<const float4*>(source + (CH * g + j) * N + 4 * t);
        state_of(A, j, 0) = LOG2_E * v.x, state_of(A, j, 1) = LOG2_E * v.z;
        state_of(A, j, 2) = LOG2_E * v.y, state_of(A, j, 3) = LOG2_E * v.w;
    }
}

// Four numbers as they lie in registers, to and from memory of our own.
__device__ __forceinline__ void load_four(float (&out)[4], const float* source) {
    const float4 v = *reinterpret_cast<const float4*>(source);
    out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
}

__device__ __forceinline__ void store_four(float* target, const float (&in)[4]) {
    *reinterpret_cast<float4*>(target) = make_float4(in[0], in[1], in[2], in[3]);
}

// Saved states of a warp's channels: (WIDTH, N), those of every CH channels in the order of registers and lanes.
__device__ __forceinline__ void save_states(float* target, const States& in, int g, int t) {
#pragma unroll
    for (int i = 0; i < CH; ++i) store_four(target + (CH * g + i) * N + 4 * t, in[i]);
}

__device__ __forceinline__ void load_states(States& out, const float* source, int g, int t) {
#pragma unroll
    for (int i = 0; i < CH; ++i) load_four(out[i], source + (CH * g + i) * N + 4 * t);
}

// B or C of four tokens, right factors of products: a factor has one token's and zeros in the places of the others. A
// lane's places are one token's in all of them, so that it reads its numbers once.

// As rows, one a token: column g of factor `second` has state 2 g + second.
struct Rows {
    unsigned own[2];  // [second], of token t

    // `rows`: of `projected`, the four tokens', from the first state's column on.
    __device__ __forceinline__ Rows(const float* rows, int g, int t) { read_pair(own, rows + t * PITCH + 2 * g); }
    __device__ __forceinline__ unsigned of(int token, int second, int t) const { return t == token ? own[second] : 0u; }

    static __device__ __forceinline__ void read_pair(unsigned (&out)[2], const float* source) {
        const float2 v = *reinterpret_cast<const float2*>(source);
        out[0] = __float_as_uint(v.x), out[1] = __float_as_uint(v.y);
    }
};

// As columns, four a token, those of two tokens: for the rows t of a pair's first channel those of the matrix's even and of
// its odd columns, then the same for the rows t + 4 of its second.
struct Columns {
    unsigned own[2];  // [second], of the token whose column is g

    __device__ __forceinline__ void read(const float* rows, int g, int t) {
        Rows::read_pair(own, rows + g / 4 * PITCH + 4 * t + 2 * (g & 1));
    }
    __device__ __forceinline__ void of(unsigned (&b)[2], int token, int second, int g) const {
#pragma unroll
        for (int row = 0; row < 2; ++row) b[row] = g / 2 == token % 2 * 2 + row ? own[second] : 0u;
    }
};

// h += column x row, of one of four tokens; `columns`: channels of tokens t, or t + 4, as left factors.
__device__ __forceinline__ void add_product(
    States& h, const Tokens& columns, int late, const Rows& rows, int token, int t) {
#pragma unroll
    for (int pair = 0; pair < PAIRS; ++pair) {
        const unsigned a[2] = {__float_as_uint(columns[pair][late]), __float_as_uint(columns[pair + PAIRS][late])};
#pragma unroll
        for (int second = 0; second < 2; ++second) mma_tf32(h[2 * pair + second], a, rows.of(token, second, t));
    }
}

// h *= exp2(delta A)
__device__ __forceinline__ void decay(States& h, const States& A, const Channels& delta) {
#pragma unroll
    for (int j = 0; j < CH; ++j)
#pragma unroll
        for (int n = 0; n < 4; ++n) state_of(h, j, n) *= ex2(delta[j] * state_of(A, j, n));
}

// Sums over the states of four tokens.
struct Sums {
    float places[PAIRS][2][4];  // [pair][token / 2]

    __device__ __forceinline__ Sums() : places{} {}

    // The sums of h times B or C of one token
    __device__ __forceinline__ void add(const States& h, const Columns& columns, int token, int g) {
#pragma unroll
        for (int second = 0; second < 2; ++second) {
            unsigned b[2];
            columns.of(b, token, second, g);
#pragma unroll
            for (int pair = 0; pair < PAIRS; ++pair) {
                const float(&v)[4] = h[2 * pair + second];
                const unsigned a[4] = {
                    __float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])};
                mma_tf32(places[pair][token / 2], a, b);
            }
        }
    }

    // To an exchange: a lane has those of tokens t / 2 and t / 2 + 2 and of the channels of row t % 2.
    __device__ __forceinline__ void write(const Exchange& to, int late, int g, int t) const {
#pragma unroll
        for (int two = 0; two < 2; ++two) {
            float* target = to.at(HALF * late + 2 * two + t / 2, g) + PAIRS * (t & 1);
            const float low = places[0][two][0] + places[0][two][3];
            if (CH == 4)
                *reinterpret_cast<float2*>(target) = make_float2(low, places[PAIRS - 1][two][0] + places[PAIRS - 1][two][3]);
            else
                *target = low;
        }
    }
};
