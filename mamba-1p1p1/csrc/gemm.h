// Small matrix products out of registers, for one thread whose operands are in its cache.
//
// gemm_add: C (M, N) += A (M, K) B (K, N), with N a multiple of VL. A is read one element at a time and may have any
// strides (so it may be transposed); rows of B and C are contiguous. Serves the skinny products of the mixer (N or K of
// about 48) better than a general library: no packing, no threads to wake.
//
// gemm_panels: the block's own projections, whose weights are packed first; float32 or, where the processor multiplies
// and adds pairs of bfloat16, those with float32 sums.
//
// gemm_over_rows: the gradient of such a weight, a sum over all tokens, dealt out to threads.
#pragma once

#include "simd.h"
#include "threads.h"

namespace {

constexpr int GEMM_ROWS = VL >= 16 ? 8 : 4;

template <int ROWS, int VECTORS>
INLINE void gemm_block(int K, const float* A, int64_t A_row, int64_t A_col, const float* B, int64_t ldb, float* C,
                       int64_t ldc) {
    vf sum[ROWS][VECTORS] = {};
    for (int k = 0; k < K; ++k) {
        vf b[VECTORS];
        UNROLL for (int j = 0; j < VECTORS; ++j) b[j] = load(B + k * ldb + j * VL);
        UNROLL for (int i = 0; i < ROWS; ++i) {
            vf a = set1(A[i * A_row + k * A_col]);
            UNROLL for (int j = 0; j < VECTORS; ++j) sum[i][j] = fma(a, b[j], sum[i][j]);
        }
    }
    UNROLL for (int i = 0; i < ROWS; ++i)
        UNROLL for (int j = 0; j < VECTORS; ++j)
            store(C + i * ldc + j * VL, load(C + i * ldc + j * VL) + sum[i][j]);
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
// [K][vectors][VL] float32; or, as bfloat16, [K / 2][vectors][VL] pairs of neighbours along K. N is a multiple of VL, K
// of VL and of twice that for bfloat16.
constexpr int PANEL = 3;

INLINE int64_t panel_count(int64_t N) { return (N / VL + PANEL - 1) / PANEL; }
INLINE int panel_vectors(int64_t N, int64_t panel) { return (int)smaller<int64_t>(PANEL, N / VL - panel * PANEL); }

// How many neighbours along K a lane holds.
template <class T> constexpr int PER_LANE = sizeof(float) / sizeof(T);

// VL lanes from the VL (float) or 2 VL (bf16) floats at p.
template <class T> INLINE vf load_lanes(const float* p);
template <> INLINE vf load_lanes<float>(const float* p) { return load(p); }
template <> INLINE vf load_lanes<bf16>(const float* p) {
    bf16 pairs[2 * VL];
    store(pairs, load(p));
    store(pairs + VL, load(p + VL));
    return load((const float*)pairs);
}

template <class T> void pack_panel(const float* weight, int64_t N, int64_t K, int64_t panel, void* packed) {
    const int vectors = panel_vectors(N, panel);
    float* lanes = (float*)((T*)packed + panel * PANEL * VL * K);
    for (int j = 0; j < vectors; ++j)
        for (int64_t k = 0; k < K / PER_LANE<T>; k += VL) {
            const float* from = weight + (panel * PANEL + j) * VL * K + k * PER_LANE<T>;
            vf rows[VL];
            UNROLL for (int i = 0; i < VL; ++i) rows[i] = load_lanes<T>(from + i * K);
            transpose(rows);
            UNROLL for (int i = 0; i < VL; ++i) store(lanes + ((k + i) * vectors + j) * VL, rows[i]);
        }
}

// The lanes of one k from row k of a weight (K, N), or from rows k and k + 1.
template <class T> INLINE vf load_across(const float* row, int64_t N);
template <> INLINE vf load_across<float>(const float* row, int64_t) { return load(row); }
template <> INLINE vf load_across<bf16>(const float* row, int64_t N) {
    vu even = __builtin_convertvector(to_bf16(load(row)), vu);
    vu odd = __builtin_convertvector(to_bf16(load(row + N)), vu);
    return (vf)(even | odd << 16);
}

// The same from a weight (K, N).
template <class T> void pack_panel_transposed(const float* weight, int64_t N, int64_t K, int64_t panel, void* packed) {
    const int vectors = panel_vectors(N, panel);
    float* lanes = (float*)((T*)packed + panel * PANEL * VL * K);
    for (int64_t k = 0; k < K; k += PER_LANE<T>)
        for (int j = 0; j < vectors; ++j, lanes += VL)
            store(lanes, load_across<T>(weight + k * N + (panel * PANEL + j) * VL, N));
}

// sum + a b, where a lane of a and b holds one float32 or two bfloat16.
template <class T> INLINE vf add_product(vf a, vf b, vf sum);
template <> INLINE vf add_product<float>(vf a, vf b, vf sum) { return fma(a, b, sum); }
#if SIMD_AVX512
// Of AVX512_BF16, which not every processor with AVX-512 has: Python asks mamba_ssm_has_bf16_products before it asks
// for this. As assembly it needs no compiler flag, which would let the compiler use such instructions everywhere.
template <> INLINE vf add_product<bf16>(vf a, vf b, vf sum) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}
constexpr bool BF16_PRODUCTS = true;
#else
constexpr bool BF16_PRODUCTS = false;
#endif

template <class T, int ROWS, int VECTORS>
INLINE void panel_block(int K, const T* A, int64_t lda, const float* B, float* C, int64_t ldc) {
    vf sum[ROWS][VECTORS] = {};
    for (int k = 0; k < K; k += PER_LANE<T>, B += VECTORS * VL) {
        vf b[VECTORS];
        UNROLL for (int j = 0; j < VECTORS; ++j) b[j] = load(B + j * VL);
        UNROLL for (int i = 0; i < ROWS; ++i) {
            vf a = broadcast(A + i * lda + k);
            UNROLL for (int j = 0; j < VECTORS; ++j) sum[i][j] = add_product<T>(a, b[j], sum[i][j]);
        }
    }
    UNROLL for (int i = 0; i < ROWS; ++i)
        UNROLL for (int j = 0; j < VECTORS; ++j) store(C + i * ldc + j * VL, sum[i][j]);
}

template <class T, int VECTORS>
void panel_rows(int M, int K, const T* A, int64_t lda, const float* B, float* C, int64_t ldc) {
    int m = 0;
    for (; m + GEMM_ROWS <= M; m += GEMM_ROWS)
        panel_block<T, GEMM_ROWS, VECTORS>(K, A + m * lda, lda, B, C + m * ldc, ldc);
    for (; m + 2 <= M; m += 2) panel_block<T, 2, VECTORS>(K, A + m * lda, lda, B, C + m * ldc, ldc);
    for (; m < M; ++m) panel_block<T, 1, VECTORS>(K, A + m * lda, lda, B, C + m * ldc, ldc);
}

// C (M, N) = A (M, K) times the transposed weight.
template <class T>
void gemm_panels(int M, int64_t N, int K, const T* A, int64_t lda, const T* packed, float* C, int64_t ldc) {
    for (int64_t p = 0; p < panel_count(N); ++p) {
        const int vectors = panel_vectors(N, p);
        auto rows = vectors == 3 ? panel_rows<T, 3> : vectors == 2 ? panel_rows<T, 2> : panel_rows<T, 1>;
        rows(M, K, A, lda, (const float*)(packed + p * PANEL * VL * K), C + p * PANEL * VL, ldc);
    }
}

// The same with A in float32 and the weight in one or the other form; bfloat16 rounds A into `rounded` (M, K) first.
void gemm_panels(int M, int64_t N, int K, const float* A, int64_t lda, const void* packed, bf16* rounded, float* C,
                 int64_t ldc) {
    if (!rounded) return gemm_panels(M, N, K, A, lda, (const float*)packed, C, ldc);
#if SIMD_AVX512
    for (int m = 0; m < M; ++m)
        for (int k = 0; k < K; k += VL) store(rounded + m * K + k, load(A + m * lda + k));
    gemm_panels(M, N, K, rounded, K, (const bf16*)packed, C, ldc);
#endif
}

// Rows of A and columns of B that one thread multiplies from its caches: VL columns of A, packed, from the first level
// and the columns of B from the second.
constexpr int64_t ROWS_AT_ONCE = 256, COLUMNS_AT_ONCE = 8 * PANEL * 16;

// C (M, N) = A^T B of contiguous A (K, M) and B (K, N), M and N multiples of VL. Called by all threads of a parallel
// region, each of which computes its own rows of C: the sums are in the same order whatever their number.
void gemm_over_rows(int64_t K, int64_t M, int64_t N, const float* A, const float* B, float* C) {
    const int64_t slot = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t first = M / VL * slot / threads * VL, last = M / VL * (slot + 1) / threads * VL;
    alignas(64) float columns[ROWS_AT_ONCE * VL];
    memset(C + first * N, 0, (last - first) * N * sizeof(float));
    for (int64_t n = 0; n < N; n += COLUMNS_AT_ONCE)
        for (int64_t k = 0; k < K; k += ROWS_AT_ONCE) {
            const int rows = (int)smaller(ROWS_AT_ONCE, K - k), width = (int)smaller(COLUMNS_AT_ONCE, N - n);
            for (int64_t m = first; m < last; m += VL) {
                for (int i = 0; i < rows; ++i) store(columns + i * VL, load(A + (k + i) * M + m));
                gemm_add(VL, width, rows, columns, 1, VL, B + k * N + n, N, C + m * N + n, N);
            }
        }
}

}  // namespace
