// A small matrix product out of registers: C (M, N) += A (M, K) B (K, N), with N a multiple of VL.
//
// A is read one element at a time and may have any strides (so it may be transposed); rows of B and C are
// contiguous. Serves the skinny products of the block (N or K of about 48) better than a general library:
// no packing, no threads to wake, and the operands are still in cache.
#pragma once

#include "simd.h"

namespace {

constexpr int GEMM_ROWS = VL >= 16 ? 8 : 4;

template <int ROWS, int VECTORS>
INLINE void gemm_block(int K, const float* A, int64_t A_row, int64_t A_col, const float* B, int64_t ldb, float* C,
                       int64_t ldc) {
    vf sum[ROWS][VECTORS];
    UNROLL for (int i = 0; i < ROWS; ++i)
        UNROLL for (int j = 0; j < VECTORS; ++j) sum[i][j] = load(C + i * ldc + j * VL);
    for (int k = 0; k < K; ++k) {
        vf b[VECTORS];
        UNROLL for (int j = 0; j < VECTORS; ++j) b[j] = load(B + k * ldb + j * VL);
        UNROLL for (int i = 0; i < ROWS; ++i) {
            vf a = set1(A[i * A_row + k * A_col]);
            UNROLL for (int j = 0; j < VECTORS; ++j) sum[i][j] = fma(a, b[j], sum[i][j]);
        }
    }
    UNROLL for (int i = 0; i < ROWS; ++i)
        UNROLL for (int j = 0; j < VECTORS; ++j) store(C + i * ldc + j * VL, sum[i][j]);
}

template <int VECTORS>
void gemm_columns(int M, int K, const float* A, int64_t A_row, int64_t A_col, const float* B, int64_t ldb, float* C,
                  int64_t ldc) {
    int m = 0;
    for (; m + GEMM_ROWS <= M; m += GEMM_ROWS)
        gemm_block<GEMM_ROWS, VECTORS>(K, A + m * A_row, A_row, A_col, B, ldb, C + m * ldc, ldc);
    for (; m + 2 <= M; m += 2) gemm_block<2, VECTORS>(K, A + m * A_row, A_row, A_col, B, ldb, C + m * ldc, ldc);
    for (; m < M; ++m) gemm_block<1, VECTORS>(K, A + m * A_row, A_row, A_col, B, ldb, C + m * ldc, ldc);
}

void gemm_add(int M, int N, int K, const float* A, int64_t A_row, int64_t A_col, const float* B, int64_t ldb,
              float* C, int64_t ldc) {
    int n = 0;
    for (; n + 3 * VL <= N; n += 3 * VL) gemm_columns<3>(M, K, A, A_row, A_col, B + n, ldb, C + n, ldc);
    for (; n + 2 * VL <= N; n += 2 * VL) gemm_columns<2>(M, K, A, A_row, A_col, B + n, ldb, C + n, ldc);
    for (; n < N; n += VL) gemm_columns<1>(M, K, A, A_row, A_col, B + n, ldb, C + n, ldc);
}

}  // namespace
