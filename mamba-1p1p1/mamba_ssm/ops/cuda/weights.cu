// The weights of a mixer as its other kernels read them: in 16 bits, rows of the time step's padded, and A = -exp(A_log).
//
// Compiled at run time with the macro HALF_IS_BF16.

#include "device.cuh"

typedef long long int64;
constexpr int THREADS = 256;

// In one launch up to eight arrays in 16 bits, two of A, and two of `parts` fours a row, of which `rank` / 4 are read and
// the others zeros, in 16 bits. Elements in fours; the last blocks of the shorter arrays have nothing to do. Grid (blocks
// of threads, arrays). torch._foreach_copy_ gives a block 65,536 elements: six times the time for weights of this size.
extern "C" __global__ void __launch_bounds__(THREADS) make_weights(
    const float* source_0, scalar_t* target_0, int64 fours_0, const float* source_1, scalar_t* target_1, int64 fours_1,
    const float* source_2, scalar_t* target_2, int64 fours_2, const float* source_3, scalar_t* target_3, int64 fours_3,
    const float* source_4, scalar_t* target_4, int64 fours_4, const float* source_5, scalar_t* target_5, int64 fours_5,
    const float* source_6, scalar_t* target_6, int64 fours_6, const float* source_7, scalar_t* target_7, int64 fours_7,
    const float* A_log, float* A, int64 fours_A, const float* A_b_log, float* A_b, int64 fours_A_b,
    const float* dt_weight, const float* dt_weight_b, scalar_t* padded, int64 rows, int64 rank, int64 parts) {
    const int64 i = int64(blockIdx.x) * THREADS + threadIdx.x;
    const bool behind = blockIdx.y % 2;  // of the arrays from the eighth on
    if (blockIdx.y >= 10) {
        if (i >= rows * parts) return;
        const int64 row = i / parts, column = 4 * (i % parts);
        const float* source = (behind ? dt_weight_b : dt_weight) + row * rank + column;
        const float4 v = column < rank ? *reinterpret_cast<const float4*>(source) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        reinterpret_cast<uint2*>(padded)[behind * rows * parts + i] = make_uint2(narrow2(v.x, v.y), narrow2(v.z, v.w));
        return;
    }
    if (blockIdx.y >= 8) {
        if (i >= (behind ? fours_A_b : fours_A)) return;
        const float4 v = reinterpret_cast<const float4*>(behind ? A_b_log : A_log)[i];
        reinterpret_cast<float4*>(behind ? A_b : A)[i] = make_float4(-expf(v.x), -expf(v.y), -expf(v.z), -expf(v.w));
        return;
    }
    const float* source;
    scalar_t* target;
    int64 fours;
    switch (blockIdx.y) {
        case 0: source = source_0, target = target_0, fours = fours_0; break;
        case 1: source = source_1, target = target_1, fours = fours_1; break;
        case 2: source = source_2, target = target_2, fours = fours_2; break;
        case 3: source = source_3, target = target_3, fours = fours_3; break;
        case 4: source = source_4, target = target_4, fours = fours_4; break;
        case 5: source = source_5, target = target_5, fours = fours_5; break;
        case 6: source = source_6, target = target_6, fours = fours_6; break;
        default: source = source_7, target = target_7, fours = fours_7;
    }
    if (i >= fours) return;
    const float4 v = reinterpret_cast<const float4*>(source)[i];
    reinterpret_cast<uint2*>(target)[i] = make_uint2(narrow2(v.x, v.y), narrow2(v.z, v.w));
}
