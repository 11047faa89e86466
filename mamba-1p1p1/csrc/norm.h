// Add, then RMSNorm or LayerNorm of the sum, row by row, and its gradients; the sum, statistics and gradients are
// computed in float32.
#pragma once

#include <cmath>

#include "arguments.h"
#include "simd.h"
#include "threads.h"
#include "workspace.h"

namespace {

// A row of either dtype.
struct Row {
    void* data;
    bool is_bf16;

    Row(const void* tensor, int64_t dtype, int64_t offset)
        : data(tensor ? (char*)tensor + offset * (dtype == BFLOAT16 ? 2 : 4) : nullptr), is_bf16(dtype == BFLOAT16) {}
    INLINE vf get(int64_t i, int lanes) const {
        return is_bf16 ? load((const bf16*)data + i, lanes) : load((const float*)data + i, lanes);
    }
    INLINE void put(int64_t i, vf v, int lanes) const {
        is_bf16 ? store((bf16*)data + i, v, lanes) : store((float*)data + i, v, lanes);
    }
};

// Lanes past the end of a row count as zeros in sums.
INLINE vf only_first(vf v, int lanes) {
    if (lanes >= VL) return v;
    for (int i = lanes; i < VL; ++i) v[i] = 0;
    return v;
}

void norm_row(const NormArguments& a, int64_t row, float* total) {
    const int64_t at = row * a.width;
    Row x(a.x, a.dtype, at), residual(a.residual, a.residual_dtype, at), out(a.out, a.dtype, at);
    Row residual_out(a.residual_out, a.residual_out_dtype, at);
    vf sum = {}, squares = {};
    for (int64_t i = 0; i < a.width; i += VL) {
        const int lanes = (int)smaller<int64_t>(VL, a.width - i);
        vf v = x.get(i, lanes);
        if (residual.data) v += residual.get(i, lanes);
        store(total + i, v);
        residual_out.put(i, v, lanes);
        sum += v;
        squares = fma(v, v, squares);
    }
    float mean = 0;
    if (a.layer) {
        mean = sum_lanes(sum) / (float)a.width;
        squares = vf{};
        for (int64_t i = 0; i < a.width; i += VL) {
            vf v = only_first(load(total + i) - mean, (int)smaller<int64_t>(VL, a.width - i));
            squares = fma(v, v, squares);
        }
        a.mean[row] = mean;
    }
    const float rstd = 1.f / sqrtf(sum_lanes(squares) / (float)a.width + (float)a.eps);
    a.rstd[row] = rstd;
    for (int64_t i = 0; i < a.width; i += VL) {
        const int lanes = (int)smaller<int64_t>(VL, a.width - i);
        vf v = (load(total + i) - mean) * rstd * load(a.weight + i, lanes);
        if (a.bias) v += load(a.bias + i, lanes);
        out.put(i, v, lanes);
    }
}

int norm_forward(const NormArguments& a) {
    const int64_t threads = larger<int64_t>(1, smaller(a.threads, (a.rows + 15) / 16));
    const int64_t padded = round_up(a.width, 16);
    float* totals = mamba_ssm_workspace(threads * padded);
    if (!totals) return 1;
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (int64_t row = 0; row < a.rows; ++row) norm_row(a, row, totals + omp_get_thread_num() * padded);
    return 0;
}

// With n = (s - mean) rstd and g = dout * weight: ds = rstd (g - mean(g) [layer] - n mean(g n)) + dresidual_out.
// sums: dweight (padded), then dbias (padded), added to.
void norm_row_backward(const NormArguments& a, int64_t row, float* sums, int64_t padded) {
    const int64_t at = row * a.width;
    Row dout(a.dout, a.dtype, at), total(a.residual_out, a.residual_out_dtype, at);
    Row upstream(a.dresidual_out, a.residual_out_dtype, at);
    Row dx(a.dx, a.dtype, at), dresidual(a.dresidual, a.residual_dtype, at);
    const float mean = a.layer ? a.mean[row] : 0.f, rstd = a.rstd[row];
    vf sum_g = {}, sum_gn = {};
    for (int64_t i = 0; i < a.width; i += VL) {
        const int lanes = (int)smaller<int64_t>(VL, a.width - i);
        vf d = dout.get(i, lanes), n = (total.get(i, lanes) - mean) * rstd, g = d * load(a.weight + i, lanes);
        sum_g += g;
        sum_gn = fma(g, n, sum_gn);
        store(sums + i, fma(d, n, load(sums + i)));
        if (a.bias) store(sums + padded + i, load(sums + padded + i) + d);
    }
    const float mean_g = a.layer ? sum_lanes(sum_g) / (float)a.width : 0.f;
    const float mean_gn = sum_lanes(sum_gn) / (float)a.width;
    for (int64_t i = 0; i < a.width; i += VL) {
        const int lanes = (int)smaller<int64_t>(VL, a.width - i);
        vf n = (total.get(i, lanes) - mean) * rstd, g = dout.get(i, lanes) * load(a.weight + i, lanes);
        vf ds = (g - mean_g - n * mean_gn) * rstd;
        if (upstream.data) ds += upstream.get(i, lanes);
        dx.put(i, ds, lanes);
        if (dresidual.data) dresidual.put(i, ds, lanes);
    }
}

constexpr int64_t SUMMED_ROWS = 32;

int norm_backward(const NormArguments& a) {
    const int64_t threads = larger<int64_t>(1, smaller(a.threads, (a.rows + 15) / 16));
    const int64_t padded = round_up(a.width, 16);
    float* sums = mamba_ssm_workspace(threads * 4 * padded);
    if (!sums) return 1;
    memset(sums, 0, threads * 2 * padded * sizeof(float));
    const int64_t blocks = (a.rows + SUMMED_ROWS - 1) / SUMMED_ROWS;
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
        float* total = sums + omp_get_thread_num() * 2 * padded;
        float* own = total + threads * 2 * padded;  // of a block by itself: long sums drift less
        memset(own, 0, 2 * padded * sizeof(float));
        const int64_t end = smaller(a.rows, (block + 1) * SUMMED_ROWS);
        for (int64_t row = block * SUMMED_ROWS; row < end; ++row) norm_row_backward(a, row, own, padded);
        for (int64_t i = 0; i < 2 * padded; i += VL) store(total + i, load(total + i) + load(own + i));
    }
    for (int64_t slot = 1; slot < threads; ++slot)
        for (int64_t i = 0; i < 2 * padded; i += VL)
            store(sums + i, load(sums + i) + load(sums + slot * 2 * padded + i));
    memcpy(a.dweight, sums, a.width * sizeof(float));
    if (a.dbias) memcpy(a.dbias, sums + padded, a.width * sizeof(float));
    return 0;
}

}  // namespace
