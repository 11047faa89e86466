// Small matrix products out of registers, for one thread whose operands are in its cache.
//
// gemm_add: C (M, N) += A (M, K) B (K, N), with N a multiple of VL. A is read one element at a time and may have any
// strides (so it may be transposed); rows of B and C are contiguous. Serves the skinny products of the mixer (N or K of
// about 48) better than a general library: no packing, no threads to wake.
//
// gemm_panels: the block's own projections, whose weights are packed first.
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

// A weight (N, K) rearranged for `gemm_panels`: panels of PANEL vectors of rows (the last may be narrower), in a panel
// [K][vectors][VL]. N and K are multiples of VL.
constexpr int PANEL = 3;

INLINE int64_t panel_count(int64_t N) { return (N / VL + PANEL - 1) / PANEL; }
INLINE int panel_vectors(int64_t N, int64_t panel) { return (int)smaller<int64_t>(PANEL, N / VL - panel * PANEL); }

void pack_panel(const float* weight, int64_t N, int64_t K, int64_t panel, float* packed) {
    const int vectors = panel_vectors(N, panel);
    packed += panel * PANEL * VL * K;
    for (int j = 0; j < vectors; ++j)
        for (int64_t k = 0; k < K; k += VL) {
            vf rows[VL];
            UNROLL for (int i = 0; i < VL; ++i) rows[i] = load(weight + ((panel * PANEL + j) * VL + i) * K + k);
            transpose(rows);
            UNROLL for (int i = 0; i < VL; ++i) store(packed + ((k + i) * vectors + j) * VL, rows[i]);
        }
}

// The same from a weight (K, N).
void pack_panel_transposed(const float* weight, int64_t N, int64_t K, int64_t panel, float* packed) {
    const int64_t width = panel_vectors(N, panel) * VL;
    packed += panel * PANEL * VL * K;
    for (int64_t k = 0; k < K; ++k)
        memcpy(packed + k * width, weight + k * N + panel * PANEL * VL, width * sizeof(float));
}

template <int ROWS, int VECTORS>
INLINE void panel_block(int K, const float* A, int64_t lda, const float* B, float* C, int64_t ldc) {
    vf sum[ROWS][VECTORS] = {};
    for (int k = 0; k < K; ++k) {
        vf b[VECTORS];
        UNROLL for (int j = 0; j < VECTORS; ++j) b[j] = load(B + (k * VECTORS + j) * VL);
        UNROLL for (int i = 0; i < ROWS; ++i) {
            vf a = set1(A[i * lda + k]);
            UNROLL for (int j = 0; j < VECTORS; ++j) sum[i][j] = fma(a, b[j], sum[i][j]);
        }
    }
    UNROLL for (int i = 0; i < ROWS; ++i)
        UNROLL for (int j = 0; j < VECTORS; ++j) store(C + i * ldc + j * VL, sum[i][j]);
}

template <int VECTORS>
void panel_rows(int M, int K, const float* A, int64_t lda, const float* B, float* C, int64_t ldc) {
    int m = 0;
    for (; m + GEMM_ROWS <= M; m += GEMM_ROWS)
        panel_block<GEMM_ROWS, VECTORS>(K, A + m * lda, lda, B, C + m * ldc, ldc);
    for (; m + 2 <= M; m += 2) panel_block<2, VECTORS>(K, A + m * lda, lda, B, C + m * ldc, ldc);
    for (; m < M; ++m) panel_block<1, VECTORS>(K, A + m * lda, lda, B, C + m * ldc, ldc);
}

// C (M, N) = A (M, K) times the transposed weight.
void gemm_panels(int M, int64_t N, int K, const float* A, int64_t lda, const float* packed, float* C, int64_t ldc) {
    for (int64_t p = 0; p < panel_count(N); ++p) {
        auto rows = panel_vectors(N, p) == 3 ? panel_rows<3> : panel_vectors(N, p) == 2 ? panel_rows<2> : panel_rows<1>;
        rows(M, K, A, lda, packed + p * PANEL * VL * K, C + p * PANEL * VL, ldc);
    }
}

}  // namespace
