// One direction's causal convolution with SiLU and the product with x_proj's weights that follows it, in one pass over x
// (arXiv 2401.09417, alg. 1): what the product reads is in registers from the convolution on.
//
// Compiled at run time with the macros HALF_IS_BF16, WIDTH (of the filters, 2 to 4), COLUMNS (of the product, a multiple of
// 8), TILES (products of 16 tokens that a warp makes at a time), WARPS (of a block) and RESIDENT (blocks of a
// multiprocessor).
//
// A block takes eight groups of 2 TILES adjacent tokens, all channels of them: each warp some channels, whose shares of the
// products the block adds up in the end. With g = lane / 4 and t = lane % 4, a lane convolves group g in channels 8 t to
// 8 t + 7 of every 32. A product's rows and its inner places may come in any order that both factors have: its rows g and
// g + 8 are two adjacent tokens of the lane's own group, its places 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 four of the
// lane's channels. So what the lane convolves is its part of the left factor as it is, 16 bytes of a row of the weights are
// its part of two right ones, and sequences end between groups.

#include "device.cuh"

typedef long long int64;
constexpr int HALO = WIDTH - 1, GROUP = 2 * TILES, WINDOW = GROUP + HALO, PRODUCTS = COLUMNS / 8;

DEVICE uint4 load16(const scalar_t* source) { return *reinterpret_cast<const uint4*>(source); }

// Of two adjacent channels, `c` the first.
struct Filter {
    float weight[2][WIDTH], bias[2];

    __device__ __forceinline__ Filter(const float* weights, const float* biases, int c) {
        if constexpr (WIDTH == 4) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float4 four = *reinterpret_cast<const float4*>(weights + 4 * (c + i));
                weight[i][0] = four.x, weight[i][1] = four.y, weight[i][2] = four.z, weight[i][WIDTH - 1] = four.w;
            }
        } else {
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int k = 0; k < WIDTH; ++k) weight[i][k] = weights[WIDTH * (c + i) + k];
        }
        const float2 two = *reinterpret_cast<const float2*>(biases + c);
        bias[0] = two.x, bias[1] = two.y;
    }

    // Of channel c + i, before SiLU, for the inputs x[0] to x[WIDTH - 1] in the order of the walk.
    __device__ __forceinline__ float operator()(int i, const float (*x)[2]) const {
        float sum = bias[i];
#pragma unroll
        for (int k = 0; k < WIDTH; ++k) sum += weight[i][k] * x[k][i];
        return sum;
    }
};

// u (2, batch, length, channels): the convolutions of x, the first half of xz, ahead and behind:
// y[t] = silu(bias + sum_k w[k] x[t - HALO + k]), or x[t + HALO - k]. projected (2, batch, length, COLUMNS) = u x_proj^T in
// float32, x_proj (2, COLUMNS, channels). Even blocks go ahead, odd ones behind. `arrived` (arrivals): zeros, for the scans.
extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT) conv_project(
    const scalar_t* xz, const float* weight_ahead, const float* weight_behind, const float* bias_ahead,
    const float* bias_behind, const scalar_t* x_proj, scalar_t* u, float* projected, int* arrived,
    int64 arrivals, int64 batch, int64 length, int64 channels, int64 xz_stride_b, int64 xz_stride_l) {
    DYNAMIC_SHARED(shared);
    float4* shares = reinterpret_cast<float4*>(shared);  // (WARPS, TILES, PRODUCTS, 32)
    const bool behind = blockIdx.x & 1;
    const int warp = warp_of_block(), lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3;
    const int64 groups = (length + GROUP - 1) / GROUP;  // of a sequence
    const int64 group = int64(blockIdx.x >> 1) * 8 + g, b = group / groups;
    const int end = b < batch ? int(length) : 0, width = int(channels);  // no token is before an end of zero
    // The window's tokens as the walk meets them: first, first + one, ...
    const int start = int(group % groups) * GROUP, one = behind ? -1 : 1;
    const int first = behind ? start + GROUP - 1 + HALO : start - HALO;
    const int stride = one * int(xz_stride_l);  // 32 bits reach any token of a sequence
    xz += b * xz_stride_b + first * xz_stride_l + 8 * t;
    const int64 row = (int64(behind) * batch + b) * length + first;
    u += row * channels + 8 * t, projected += row * COLUMNS + 2 * t;
    x_proj += (int64(behind) * COLUMNS + g) * channels + 8 * t;
    const float *weights = behind ? weight_behind : weight_ahead, *biases = behind ? bias_behind : bias_ahead;

    if (blockIdx.x == 0)
        for (int i = threadIdx.x; i < arrivals; i += 32 * WARPS) arrived[i] = 0;
    float sums[TILES][PRODUCTS][4] = {};
#pragma unroll 1
    for (int c = 32 * warp; c < width; c += 32 * WARPS) {
        uint4 window[WINDOW];
#pragma unroll
        for (int i = 0; i < WINDOW; ++i)
            window[i] = unsigned(first + i * one) < unsigned(end) ? load16(xz + i * int64(stride) + c) : make_uint4(0, 0, 0, 0);
        unsigned left[2][TILES][4];  // of two products over 16 channels
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
            const Filter filter(weights, biases, c + 8 * t + 2 * pair);
            float x[WINDOW][2];
#pragma unroll
            for (int i = 0; i < WINDOW; ++i) {
                const uint4& four = window[i];
                widen2(pair == 0 ? four.x : pair == 1 ? four.y : pair == 2 ? four.z : four.w, x[i][0], x[i][1]);
            }
#pragma unroll
            for (int j = 0; j < GROUP; ++j) {
                const float low = filter(0, x + j), high = filter(1, x + j);
                left[pair / 2][j / 2][pair % 2 * 2 + j % 2] = narrow2(low * sigmoid(low), high * sigmoid(high));
            }
        }
#pragma unroll
        for (int j = 0; j < GROUP; ++j)
            if (unsigned(first + (HALO + j) * one) < unsigned(end))
                *reinterpret_cast<uint4*>(u + (HALO + j) * one * int64(width) + c) =
                    make_uint4(left[0][j / 2][j % 2], left[0][j / 2][2 + j % 2], left[1][j / 2][j % 2], left[1][j / 2][2 + j % 2]);
#pragma unroll
        for (int n = 0; n < PRODUCTS; ++n) {
            const uint4 four = load16(x_proj + 8 * n * int64(width) + c);
            const unsigned right[2][2] = {{four.x, four.y}, {four.z, four.w}};
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
                mma_half(sums[i][n], left[0][i], right[0]);
                mma_half(sums[i][n], left[1][i], right[1]);
            }
        }
    }

    float4* own = shares + warp * (TILES * PRODUCTS * 32) + lane;
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
        for (int n = 0; n < PRODUCTS; ++n)
            own[(i * PRODUCTS + n) * 32] = make_float4(sums[i][n][0], sums[i][n][1], sums[i][n][2], sums[i][n][3]);
    sync_block();
    for (int tile = warp; tile < TILES * PRODUCTS; tile += WARPS) {
        float4 sum = shares[tile * 32 + lane];
#pragma unroll
        for (int w = 1; w < WARPS; ++w) {
            const float4 share = shares[(w * TILES * PRODUCTS + tile) * 32 + lane];
            sum = make_float4(sum.x + share.x, sum.y + share.y, sum.z + share.z, sum.w + share.w);
        }
        const int at = HALO + tile / PRODUCTS * 2;  // in the window: that of row g; the next one is row g + 8
        float* out = projected + tile % PRODUCTS * 8;
        if (unsigned(first + at * one) < unsigned(end))
            *reinterpret_cast<float2*>(out + at * one * COLUMNS) = make_float2(sum.x, sum.y);
        if (unsigned(first + (at + 1) * one) < unsigned(end))
            *reinterpret_cast<float2*>(out + (at + 1) * one * COLUMNS) = make_float2(sum.z, sum.w);
    }
}
