// Add, RMSNorm (arXiv 1910.07467, eq. 4) and the projection that follows it, in one pass over the residual stream.
//
// Compiled at run time with these macros: HALF_IS_BF16, WIDTH (of the residual stream, a multiple of 16), SLICE (columns of
// a block's weights, a multiple of 32), WARPS (of a block) and FOR_BACKWARD (1: backward, which has the sum, runs this again).
//
// A block keeps its slice of the weights in shared memory for good. A warp takes 32 rows of the residual stream at a time,
// holds them in registers from the sum on to the product, and waits for no other. With g = lane / 4 and t = lane % 4, a lane
// has of rows g, g + 8, g + 16 and g + 24 the columns 4 t to 4 t + 3 of every sixteen, and the weights come in that order,
// so that what it reads, adds up and norms is its part of the left factors as it is.

#include "device.cuh"

typedef long long int64;
constexpr int ROWS = 32, STEPS = WIDTH / 16, THREADS = 32 * WARPS;
// Elements from one row of weights to the next: what lanes read of four rows lies in all banks.
constexpr int PITCH = (WIDTH + 63) / 64 * 64 + 16;

// out = in_proj(normed), (rows, columns), of normed = total rstd norm_weight with rstd = 1 / sqrt(mean(total^2) + eps); both
// factors of the product have 16 bits. Forward reads x and residual and writes total = x + residual to residual_out. With
// FOR_BACKWARD `residual` is the total, and normed and rstd are written. Grid (blocks that share the rows, slices of the
// columns).
extern "C" __global__ void __launch_bounds__(THREADS, 1) norm_in_proj(
    const scalar_t* x, const float* residual, const float* norm_weight, const scalar_t* weight,
    scalar_t* out, float* residual_out, scalar_t* normed, float* rstd,
    int64 rows, int64 columns, float eps) {
    DYNAMIC_SHARED(shared);
    scalar_t* slice = reinterpret_cast<scalar_t*>(shared);           // (SLICE, PITCH)
    float* scales = reinterpret_cast<float*>(slice + SLICE * PITCH);  // (WIDTH,)
    const int warp = warp_of_block(), lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3;
    const bool first_slice = blockIdx.y == 0;
    weight += int64(blockIdx.y) * SLICE * WIDTH;
    // Of 32 columns, a lane's share of the results is to be eight adjacent ones: two of each of four products.
    for (int i = threadIdx.x; i < SLICE * (WIDTH / 8); i += THREADS) {
        const int column = i / (WIDTH / 8), part = i % (WIDTH / 8), of_32 = column % 32;
        const int row = column - of_32 + of_32 % 8 / 2 * 8 + of_32 / 8 * 2 + of_32 % 2;
        cp_async16(slice + row * PITCH + 8 * part, weight + column * WIDTH + 8 * part);
    }
    for (int i = threadIdx.x; i < WIDTH / 4; i += THREADS) cp_async16(scales + 4 * i, norm_weight + 4 * i);
    cp_async_commit();
    const scalar_t* right = slice + g * PITCH + 4 * t;
    bool waiting = true;
    for (int64 tile = int64(warp) * gridDim.x + blockIdx.x; tile * ROWS < rows; tile += int64(WARPS) * gridDim.x) {
        unsigned left[2][STEPS][4];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
            for (int low = 0; low < 2; ++low) {
                const int64 row = tile * ROWS + 16 * m + 8 * low + g;
                const int64 at = min(row, rows - 1) * WIDTH + 4 * t;  // no rows behind the last: it again
                const bool writes = first_slice && row < rows;
                float4 total[STEPS];
                float square = 0.0f;
                uint2 added[STEPS];
#pragma unroll
                for (int s = 0; s < STEPS; ++s) {
                    total[s] = *reinterpret_cast<const float4*>(residual + at + 16 * s);
                    if (!FOR_BACKWARD) added[s] = *reinterpret_cast<const uint2*>(x + at + 16 * s);
                }
#pragma unroll
                for (int s = 0; s < STEPS; ++s) {
                    float4& v = total[s];
                    if (!FOR_BACKWARD) {
                        float4 w;
                        widen2(added[s].x, w.x, w.y), widen2(added[s].y, w.z, w.w);
                        v = make_float4(v.x + w.x, v.y + w.y, v.z + w.z, v.w + w.w);
                        if (writes) *reinterpret_cast<float4*>(residual_out + at + 16 * s) = v;
                    }
                    square += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
                }
                if (waiting) {  // for the norm's and the product's weights, whose copies went beside these loads
                    cp_async_wait<0>();
                    sync_block();
                    waiting = false;
                }
                square += shfl_xor(square, 1);
                square += shfl_xor(square, 2);
                const float factor = rsqrt(square * (1.0f / WIDTH) + eps);
                if (FOR_BACKWARD && writes && t == 0) rstd[row] = factor;
#pragma unroll
                for (int s = 0; s < STEPS; ++s) {
                    const float4 v = total[s], w = *reinterpret_cast<const float4*>(scales + 16 * s + 4 * t);
                    left[m][s][low] = narrow2(v.x * factor * w.x, v.y * factor * w.y);
                    left[m][s][2 + low] = narrow2(v.z * factor * w.z, v.w * factor * w.w);
                    if (FOR_BACKWARD && writes) {  // by words: a pair would want other registers than the product does
                        scalar_t* to = normed + at + 16 * s;
                        *reinterpret_cast<unsigned*>(to) = left[m][s][low];
                        *reinterpret_cast<unsigned*>(to + 2) = left[m][s][2 + low];
                    }
                }
            }
        }
#pragma unroll 1
        for (int q = 0; q < SLICE; q += 32) {
            float sums[2][4][4] = {};
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const uint2 b = *reinterpret_cast<const uint2*>(right + (q + 8 * j) * PITCH + 16 * s);
                    const unsigned of_step[2] = {b.x, b.y};
                    mma_half(sums[0][j], left[0][s], of_step);
                    mma_half(sums[1][j], left[1][s], of_step);
                }
            }
#pragma unroll
            for (int m = 0; m < 2; ++m) {
#pragma unroll
                for (int low = 0; low < 2; ++low) {
                    const int64 row = tile * ROWS + 16 * m + 8 * low + g;
                    unsigned words[4];
#pragma unroll
                    for (int j = 0; j < 4; ++j) words[j] = narrow2(sums[m][j][2 * low], sums[m][j][2 * low + 1]);
                    if (row < rows)
                        *reinterpret_cast<uint4*>(out + row * columns + blockIdx.y * SLICE + q + 8 * t) =
                            make_uint4(words[0], words[1], words[2], words[3]);
                }
            }
        }
    }
    if (waiting) {  // a warp without rows
        cp_async_wait<0>();
        sync_block();
    }
}
