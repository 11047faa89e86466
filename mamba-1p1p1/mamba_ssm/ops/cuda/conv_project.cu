// Both directions' causal convolutions with SiLU and the products with x_proj's weights that follow them, in one pass over x
// (arXiv 2401.09417, alg. 1): what a product reads is in registers from the convolution on.
//
// Compiled at run time with the macros HALF_IS_BF16, WIDTH (of the filters, 2 to 4), COLUMNS (of the products, a multiple of
// 8), CHANNELS (a multiple of 32), GROUP (adjacent tokens of a lane) and WARPS (of a block, even).
//
// A block keeps the weights and filters of both directions in shared memory for good; its warps, half of them ahead, half
// behind, wait for no other after that. A warp takes eight groups of tokens at a time and walks their channels. With
// g = lane / 4 and t = lane % 4, a lane convolves group g in channels 8 t to 8 t + 7 of every 32. The inner places of a
// product may come in any order that both factors have: 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 are four of the lane's channels. So
// with one token of each group as a right factor's columns, what the lane convolves and writes of a token is its part of two
// right factors as it is. Left factors are the weights, which lie in shared memory as lanes take them.

#include "device.cuh"

typedef long long int64;
constexpr int HALO = WIDTH - 1, WINDOW = GROUP + HALO, THREADS = 32 * WARPS;
constexpr int PRODUCTS = (COLUMNS + 15) / 16, STEPS = CHANNELS / 16;  // of 16 columns; of 16 channels
constexpr int LEFTS = PRODUCTS * STEPS * 32 * 4;                       // words of a direction's left factors
constexpr int NOWHERE = -(1 << 30);  // in no sequence
constexpr int FILTERS = (WIDTH + 1) * CHANNELS;  // of a direction: (WIDTH, CHANNELS) weights, and the biases

// u (2, batch, length, CHANNELS): the convolutions of x, the first half of xz, ahead and behind:
// y[t] = silu(bias + sum_k w[k] x[t - HALO + k]), or x[t + HALO - k]. projected (2, batch, length, COLUMNS) = u x_proj^T in
// float32, x_proj (2, COLUMNS, CHANNELS).
extern "C" __global__ void __launch_bounds__(THREADS, 1) conv_project(
    const scalar_t* xz, const float* weight_ahead, const float* weight_behind, const float* bias_ahead,
    const float* bias_behind, const scalar_t* x_proj, scalar_t* u, float* projected, int64 batch, int64 length,
    int64 xz_stride_b, int64 xz_stride_l) {
    DYNAMIC_SHARED(shared);
    unsigned* lefts = reinterpret_cast<unsigned*>(shared);        // (2, PRODUCTS, STEPS, 32 lanes, 4)
    float* filters = reinterpret_cast<float*>(lefts + 2 * LEFTS);  // (2, FILTERS)
#pragma unroll 4
    for (int i = threadIdx.x; i < 2 * PRODUCTS * 16 * (CHANNELS / 8); i += THREADS) {
        const int part = i % (CHANNELS / 8), column = i / (CHANNELS / 8) % (PRODUCTS * 16);
        const int direction = i / (CHANNELS / 8) / (PRODUCTS * 16), lane = column % 8 * 4 + part % 4;
        uint4 four = make_uint4(0, 0, 0, 0);  // behind the last column
        if (column < COLUMNS)
            four = *reinterpret_cast<const uint4*>(x_proj + (direction * COLUMNS + column) * CHANNELS + 8 * part);
        unsigned* to = lefts + direction * LEFTS + ((column / 16 * STEPS + part / 4 * 2) * 32 + lane) * 4 + column % 16 / 8;
        to[0] = four.x, to[2] = four.y, to[32 * 4] = four.z, to[32 * 4 + 2] = four.w;
    }
    for (int i = threadIdx.x; i < 2 * CHANNELS; i += THREADS) {
        const bool other = i >= CHANNELS;
        const int c = other ? i - CHANNELS : i;
        const float *weights = other ? weight_behind : weight_ahead, *biases = other ? bias_behind : bias_ahead;
        float* filter = filters + other * FILTERS + c;
#pragma unroll
        for (int k = 0; k < WIDTH; ++k) filter[k * CHANNELS] = weights[WIDTH * c + k];
        filter[WIDTH * CHANNELS] = biases ? biases[c] : 0.0f;
    }
    sync_block();

    const int lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3;
    const bool behind = warp_of_block() % 2;
    const unsigned* own_lefts = lefts + behind * LEFTS + 4 * lane;
    const float* own_filters = filters + behind * FILTERS + 8 * t;
    const int end = int(length), groups = (end + GROUP - 1) / GROUP;  // of a sequence; 32 bits count all that memory can hold
    const int one = behind ? -1 : 1, stride = one * int(xz_stride_l);  // 32 bits reach any token of a sequence
    // Where a group's window begins: a walk meets the tokens first, first + one, ...
    auto first_of = [&](int group) {
        const int start = group % groups * GROUP;
        const int first = behind ? start + GROUP - 1 + HALO : start - HALO;
        return group / groups < batch ? first : NOWHERE;
    };
#pragma unroll 1
    for (int before = blockIdx.x;; before += WARPS / 2 * gridDim.x) {
        const int tile = before + warp_of_block() / 2 * gridDim.x;
        if (tile * 8 >= int(batch) * groups) break;
        const int first = first_of(tile * 8 + g);
        const int64 b = (tile * 8 + g) / groups;
        const scalar_t* x = xz + b * xz_stride_b + first * xz_stride_l + 8 * t;
        scalar_t* to_u = u + ((behind * batch + b) * length + first) * CHANNELS + 8 * t;
        auto inside = [&](int i) { return unsigned(first + i * one) < unsigned(end); };
        auto fetch = [&](uint4 (&window)[WINDOW], int c) {
#pragma unroll
            for (int i = 0; i < WINDOW; ++i) {
                window[i] = make_uint4(0, 0, 0, 0);
                if (inside(i)) window[i] = *reinterpret_cast<const uint4*>(x + i * int64(stride) + c);
            }
        };
        float sums[PRODUCTS][GROUP][4] = {};
        auto walk = [&](const uint4 (&window)[WINDOW], int c) {
            unsigned right[GROUP][4];  // of two products over 16 channels
#pragma unroll
            for (int pair = 0; pair < 4; ++pair) {
                float2 filter[WIDTH + 1], in[WINDOW];
#pragma unroll
                for (int k = 0; k <= WIDTH; ++k)
                    filter[k] = *reinterpret_cast<const float2*>(own_filters + k * CHANNELS + c + 2 * pair);
#pragma unroll
                for (int i = 0; i < WINDOW; ++i) {
                    const uint4& four = window[i];
                    widen2(pair == 0 ? four.x : pair == 1 ? four.y : pair == 2 ? four.z : four.w, in[i].x, in[i].y);
                }
#pragma unroll
                for (int j = 0; j < GROUP; ++j) {
                    float2 v = filter[WIDTH];
#pragma unroll
                    for (int k = 0; k < WIDTH; ++k)
                        v = make_float2(v.x + filter[k].x * in[j + k].x, v.y + filter[k].y * in[j + k].y);
                    right[j][pair] = narrow2(v.x * sigmoid(v.x), v.y * sigmoid(v.y));
                }
            }
#pragma unroll
            for (int j = 0; j < GROUP; ++j)
                if (inside(HALO + j))
                    *reinterpret_cast<uint4*>(to_u + (HALO + j) * one * int64(CHANNELS) + c) =
                        make_uint4(right[j][0], right[j][1], right[j][2], right[j][3]);
#pragma unroll
            for (int step = 0; step < 2; ++step)
#pragma unroll
                for (int p = 0; p < PRODUCTS; ++p) {
                    const uint4 four = *reinterpret_cast<const uint4*>(own_lefts + (p * STEPS + c / 16 + step) * 32 * 4);
                    const unsigned left[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
                    for (int j = 0; j < GROUP; ++j) {
                        const unsigned of_step[2] = {right[j][2 * step], right[j][2 * step + 1]};
                        mma_half(sums[p][j], left, of_step);
                    }
                }
        };
        uint4 window[WINDOW], next[WINDOW];
        fetch(window, 0);
#pragma unroll 1
        for (int c = 0; c < CHANNELS; c += 64) {
            if (c + 32 < CHANNELS) fetch(next, c + 32);
            walk(window, c);
            if (c + 64 < CHANNELS) fetch(window, c + 64);
            if (c + 32 < CHANNELS) walk(next, c + 32);
        }
        // A lane has columns g and g + 8 of every 16, of groups 2 t and 2 t + 1.
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
            const int group = tile * 8 + 2 * t + odd, other_first = first_of(group);
            float* out = projected + ((behind * batch + group / groups) * length + other_first) * COLUMNS + g;
#pragma unroll
            for (int j = 0; j < GROUP; ++j)
#pragma unroll
                for (int i = 0; i < 2 * PRODUCTS; ++i)
                    if (8 * i < COLUMNS && unsigned(other_first + (HALO + j) * one) < unsigned(end))
                        out[(HALO + j) * one * COLUMNS + 8 * i] = sums[i / 2][j][i % 2 * 2 + odd];
        }
    }
}
