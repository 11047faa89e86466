// The plain C interface: argument blocks filled in by Python's ctypes (ops/cpu.py mirrors them field by field).
// Strides count elements. Parameters are contiguous float32. A null pointer stands for an absent argument.
#pragma once

#include <cstdint>

enum DType : int64_t { FLOAT32 = 0, BFLOAT16 = 1 };

// One direction of the mixer: conv_weight (D, W), x_proj (R + 2 N, D), dt_weight (D, R), A (D, N), the rest (D,).
template <class F> struct Direction {
    F *conv_weight, *conv_bias, *x_proj, *dt_weight, *dt_bias, *A, *D;
};

struct BimambaArguments {
    int64_t batch, length, channels, states, rank, width, dtype, threads;
    double scale;
    const void* xz;  // (B, L, 2 D), contiguous along the last axis
    int64_t xz_batch, xz_token;
    void* y;       // (B, L, D) contiguous
    float* saved;  // what backward needs, or null
    Direction<const float> parameters[2];
    // Backward only.
    const void* dy;  // (B, L, D) contiguous
    void* dxz;       // (B, L, 2 D) contiguous
    Direction<float> gradients[2];
};

// The mixer with both of its projections. `mixer` describes what lies between them: forward writes its xz, contiguous,
// if it has to save anything; backward reads that and writes y and dxz where they are not null, and its dy is not used.
// Embedding and channels are multiples of the vector length, with bf16_products of twice that.
struct BlockArguments {
    BimambaArguments mixer;
    int64_t embedding;
    int64_t bf16_products;  // rounds operands to bfloat16: in_proj's in forward, both projections' in backward
    const float *hidden, *in_proj, *out_proj;  // (B, L, E) contiguous, (2 D, E), (E, D)
    float* out;                                // (B, L, E) contiguous
    // Backward only; the gradients of both weights, or null to leave them, products of y and dxz, to the caller.
    const float* dout;  // (B, L, E) contiguous
    float* dhidden;     // (B, L, E) contiguous
    float *din_proj, *dout_proj;
};

// A (B, D, L) tensor of any strides.
struct Sequence {
    void* data;
    int64_t batch, channel, token;
};

struct ScanArguments {
    int64_t batch, length, channels, states, groups, dtype, softplus, threads;
    Sequence u, delta, z, out;
    const float *A, *B, *C, *D, *delta_bias;  // B, C: (B, G, L, N), or (D, N) with constant_B, constant_C
    int64_t constant_B, constant_C;
    float* last_state;  // (B, D, N)
    float* saved;
    // Backward only.
    Sequence dout, du, ddelta, dz;
    const float* dlast_state;
    float *dA, *dB, *dC, *dD, *ddelta_bias;  // float32, shaped as A, B, C (as passed above), D, delta_bias
};

struct NormArguments {
    int64_t rows, width, dtype, layer, threads;
    double eps;
    const void* x;          // (rows, width) contiguous, as everything of that shape below
    const void* residual;   // in residual_dtype, or null
    int64_t residual_dtype;
    const float *weight, *bias;
    void* out;
    void* residual_out;
    int64_t residual_out_dtype;
    float *mean, *rstd;  // (rows,)
    // Backward only: residual_out, mean and rstd are inputs.
    const void* dout;
    const void* dresidual_out;
    void *dx, *dresidual;
    float *dweight, *dbias;
};
