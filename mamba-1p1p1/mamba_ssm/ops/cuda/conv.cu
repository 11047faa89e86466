// Both directions' causal convolutions with SiLU from one read of x, forward and backward (arXiv 2401.09417, alg. 1).
//
// y[t] = silu(bias + sum_k w[k] x[t - HALO + k]) ahead, x[t + HALO - k] behind. Compiled at run time with the macros
// HALF_IS_BF16 and WIDTH (of the filters, 2 to 4). A thread owns two adjacent channels and walks one segment of a
// sequence in steps of TOKENS, with all that they touch in registers. Grid (channel blocks, segments, batch).

#include "device.cuh"

typedef long long int64;
constexpr int TOKENS = 8, HALO = WIDTH - 1, NEAR = TOKENS + 2 * HALO;

// What a thread does not share: its channels' filters, and where it begins and ends.
struct Work {
    int length, first, last;
    int64 channel, b, batch;
    float weight[2][WIDTH][2], bias[2][2];  // [direction][tap][channel]

    __device__ __forceinline__ Work(
        const float* weight_ahead, const float* weight_behind, const float* bias_ahead, const float* bias_behind,
        int64 tokens, int64 channels, int64 segment)
        : length(int(tokens)), first(int(blockIdx.y * segment)), last(min(int(tokens), first + int(segment))),
          channel(2 * (int64(blockIdx.x) * blockDim.x + threadIdx.x)), b(blockIdx.z), batch(gridDim.z) {
        if (channel >= channels) return;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) {
                weight[0][k][c] = weight_ahead[(channel + c) * WIDTH + k];
                weight[1][k][c] = weight_behind[(channel + c) * WIDTH + k];
            }
            bias[0][c] = bias_ahead ? bias_ahead[channel + c] : 0.0f;
            bias[1][c] = bias_behind ? bias_behind[channel + c] : 0.0f;
        }
    }

    // Both channels of token start + i, zero outside the sequence. `source`: at token start.
    __device__ __forceinline__ void load(float (&v)[2], const scalar_t* source, int stride, int start, int i) const {
        const bool inside = unsigned(start + i) < unsigned(length);
        widen2(inside ? *reinterpret_cast<const unsigned*>(source + i * int64(stride)) : 0u, v[0], v[1]);
    }

    // Those of tokens start - HALO to start + TOKENS + HALO.
    __device__ __forceinline__ void load(float (&x)[NEAR][2], const scalar_t* source, int stride, int start) const {
#pragma unroll
        for (int i = 0; i < NEAR; ++i) load(x[i], source, stride, start, i - HALO);
    }

    // Where in `x` the token lies that tap k of the output at `near` reads.
    static __device__ __forceinline__ int seen(int direction, int near, int k) {
        return direction ? near + HALO - k : near - HALO + k;
    }

    // The convolution at `near`, before SiLU.
    __device__ __forceinline__ float convolve(const float (&x)[NEAR][2], int direction, int near, int c) const {
        float sum = bias[direction][c];
#pragma unroll
        for (int k = 0; k < WIDTH; ++k) sum += weight[direction][k][c] * x[seen(direction, near, k)][c];
        return sum;
    }
};

// u (2, batch, length, channels): both convolutions of x, the first half of xz. `arrived` (arrivals) is set to zeros, for
// scan_forward.
extern "C" __global__ void __launch_bounds__(64) conv_forward(
    const scalar_t* xz, const float* weight_ahead, const float* weight_behind, const float* bias_ahead,
    const float* bias_behind, scalar_t* u, int* arrived, int64 arrivals, int64 length, int64 channels,
    int64 xz_stride_b, int64 xz_stride_l, int64 segment) {
    if (blockIdx.x + blockIdx.y + blockIdx.z == 0)
        for (int64 i = threadIdx.x; i < arrivals; i += blockDim.x) arrived[i] = 0;
    const Work work(weight_ahead, weight_behind, bias_ahead, bias_behind, length, channels, segment);
    if (work.channel >= channels) return;
    xz += work.b * xz_stride_b + work.channel;
    const int stride = static_cast<int>(xz_stride_l), row = static_cast<int>(channels);  // 32 bits reach any token
    u += work.b * length * channels + work.channel;
    xz += work.first * int64(stride), u += work.first * int64(row);
    scalar_t* behind = u + work.batch * length * channels;
    for (int start = work.first; start < work.last; start += TOKENS) {
        float x[NEAR][2];
        work.load(x, xz, stride, start);
#pragma unroll
        for (int i = 0; i < TOKENS; ++i)
#pragma unroll
            for (int direction = 0; direction < 2; ++direction) {
                float y[2];
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const float v = work.convolve(x, direction, i + HALO, c);
                    y[c] = v * sigmoid(v);
                }
                if (start + i < work.last)
                    *reinterpret_cast<unsigned*>((direction ? behind : u) + i * int64(row)) = narrow2(y[0], y[1]);
            }
        xz += TOKENS * int64(stride), u += TOKENS * int64(row), behind += TOKENS * int64(row);
    }
}

// silu'(v)
__device__ __forceinline__ float silu_slope(float v) {
    const float s = sigmoid(v);
    return s * (1.0f + v * (1.0f - s));
}

// dx, into the first half of dxz (batch, length, 2 channels), for the gradients of conv_forward's u, the sum of
// du_scan and du_projected, each (2, batch, length, channels). dweight (2, batch * segments, channels, WIDTH) and
// dbias (2, batch * segments, channels) are the segments' shares of the filters' and biases' gradients.
extern "C" __global__ void __launch_bounds__(64, 6) conv_backward(
    const scalar_t* xz, const scalar_t* du_scan, const scalar_t* du_projected, const float* weight_ahead,
    const float* weight_behind, const float* bias_ahead, const float* bias_behind, scalar_t* dxz, float* dweight,
    float* dbias,
    int64 length, int64 channels, int64 xz_stride_b, int64 xz_stride_l, int64 segment) {
    const Work work(weight_ahead, weight_behind, bias_ahead, bias_behind, length, channels, segment);
    if (work.channel >= channels) return;
    xz += work.b * xz_stride_b + work.channel;
    const int stride = static_cast<int>(xz_stride_l), row = static_cast<int>(channels);  // 32 bits reach any token
    dxz += work.b * length * (2 * channels) + work.channel;
    du_scan += work.b * length * channels + work.channel;
    du_projected += work.b * length * channels + work.channel;
    xz += work.first * int64(stride), dxz += work.first * int64(2 * row);
    du_scan += work.first * int64(row), du_projected += work.first * int64(row);
    float sums[2][WIDTH + 1][2] = {}, carried[2][HALO][2];
    for (int start = work.first; start < work.last; start += TOKENS) {
        float x[NEAR][2], dx[TOKENS][2] = {};
        work.load(x, xz, stride, start);
#pragma unroll
        for (int direction = 0; direction < 2; ++direction) {
            const int64 sequences = direction * work.batch * length * channels;
            const scalar_t *incoming = du_scan + sequences, *more = du_projected + sequences;
            // the outputs that these tokens reach: up to HALO later ahead, up to HALO earlier behind
#pragma unroll
            for (int i = 0; i < TOKENS + HALO; ++i) {
                const int near = direction ? i : i + HALO, token = start - HALO + near;
                const bool counted = near >= HALO && near < HALO + TOKENS;  // others count in their own step
                float slope[2];
                if (i < HALO && start > work.first) {  // of an output that the step before has reached, too
                    slope[0] = carried[direction][i][0], slope[1] = carried[direction][i][1];
                } else {
                    float addend[2];
                    work.load(slope, incoming, row, start, near - HALO);
                    work.load(addend, more, row, start, near - HALO);
#pragma unroll
                    for (int c = 0; c < 2; ++c)
                        slope[c] = (slope[c] + addend[c]) * silu_slope(work.convolve(x, direction, near, c));
                }
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    if (i >= TOKENS) carried[direction][i - TOKENS][c] = slope[c];
#pragma unroll
                    for (int k = 0; k < WIDTH; ++k) {
                        const int at = Work::seen(direction, near, k) - HALO;  // the token seen through tap k
                        if (at >= 0 && at < TOKENS) dx[at][c] += work.weight[direction][k][c] * slope[c];
                    }
                    if (counted && token < work.last) {
#pragma unroll
                        for (int k = 0; k < WIDTH; ++k)
                            sums[direction][k][c] += slope[c] * x[Work::seen(direction, near, k)][c];
                        sums[direction][WIDTH][c] += slope[c];
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < TOKENS; ++i)
            if (start + i < work.last)
                *reinterpret_cast<unsigned*>(dxz + i * int64(2 * row)) = narrow2(dx[i][0], dx[i][1]);
        xz += TOKENS * int64(stride), dxz += TOKENS * int64(2 * row);
        du_scan += TOKENS * int64(row), du_projected += TOKENS * int64(row);
    }
#pragma unroll
    for (int direction = 0; direction < 2; ++direction) {
        const int64 part = (direction * work.batch + work.b) * gridDim.y + blockIdx.y;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int64 at = part * channels + work.channel + c;
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) dweight[at * WIDTH + k] = sums[direction][k][c];
            dbias[at] = sums[direction][WIDTH][c];
        }
    }
}
