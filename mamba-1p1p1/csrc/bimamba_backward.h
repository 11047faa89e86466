// Gradients of the bidirectional mixer (bimamba.h), from the states saved between tiles. No atomics: what several
// threads add to is kept once per thread or per channel group and summed in a fixed order.
//
// Phase "scan" goes back through a direction's tiles: each is recomputed from its saved first state, then
// adjoined. It gives the gradient of the convolved x as far as the scan sees it (dx_conv) and of the projected rows
// (drows, summed over channels). Phase "project" adds x_proj's part to dx_conv and undoes the SiLU. Phase
// "convolve" brings both directions' dx_conv back through the filters.
#pragma once

#include "bimamba.h"

namespace {

// Gradients of one direction's parameters as one thread adds them up: VectorParameters, then (columns, padded).
struct GradientSums {
    float *vectors, *x_proj;
    static int64_t floats(const BimambaShape& s) {
        return s.vectors * VectorParameters::floats(s) + s.columns * s.padded;
    }
    GradientSums(float* base, const BimambaShape& s)
        : vectors(base), x_proj(base + s.vectors * VectorParameters::floats(s)) {}
};

// Per vector of channels, what a tile's adjoint reads and adds to; row = token of the tile.
struct BackwardTile {
    alignas(64) float x[TILE * VL], slope[TILE * VL], d[TILE * VL], dx[TILE * VL], dy[TILE * VL];
    float g_B[TILE * VL], g_d[TILE * VL];
};

template <class T> struct BimambaBackward : Bimamba<T> {
    using Bimamba<T>::a;
    using Bimamba<T>::s;
    using Bimamba<T>::packed;
    explicit BimambaBackward(const BimambaArguments& arguments) : Bimamba<T>(arguments) {}

    const T* dy_rows(int64_t b, int64_t v) const {
        return (const T*)a.dy + b * s.length * s.channels + v * VL;
    }
    T* dxz_rows(int64_t b, int64_t v) const { return (T*)a.dxz + b * s.length * 2 * s.channels + v * VL; }

    // Gradient of the sum of both directions' scans: dy * scale * silu(z), for a tile and vector.
    INLINE void gated_gradient(int64_t b, int64_t v, int64_t t0, int n, float* out) const {
        const int lanes = s.lanes(v);
        const T *dy = dy_rows(b, v) + t0 * s.channels, *z = this->z_rows(b, v) + t0 * a.xz_token;
        const vf scale = set1((float)a.scale);
        for (int t = 0; t < n; ++t)
            store(out + t * VL, load(dy + t * s.channels, lanes) * scale * silu(load(z + t * a.xz_token, lanes)));
    }

    INLINE void prepare_backward(int64_t b, int dir, int64_t tile, int64_t v, const float* rows,
                                 BackwardTile& out) const {
        const int n = s.tokens(tile);
        const int64_t t0 = tile * TILE, from = t0 + this->reach(dir);
        alignas(64) float window[(TILE + 8) * VL];
        VectorParameters p(packed[dir].vectors, s, v);
        load_window(this->x_rows(b, v), a.xz_token, from, from + n + s.width - 1, s.length, s.lanes(v), window);
        project_time_step(p, s, n, rows + t0 * s.row, out.d);
        for (int t = 0; t < n; ++t) {
            vf x = silu(convolve(p, s.width, window + t * VL)), raw = load(out.d + t * VL);
            vf d = softplus_log2(raw);
            store(out.x + t * VL, x);
            store(out.d + t * VL, d);
            store(out.slope + t * VL, sigmoid(raw));
            store(out.dx + t * VL, d * LN2 * x);
        }
        gated_gradient(b, v, t0, n, out.dy);
        memset(out.g_B, 0, sizeof out.g_B);
        memset(out.g_d, 0, sizeof out.g_d);
    }

    struct ScanScratch {
        BackwardTile* tiles;  // [vectors]
        float *carry, *dB, *dC, *draw;
        static int64_t floats(const BimambaShape& s) {
            return s.vectors * (int64_t)(sizeof(BackwardTile) / sizeof(float)) + s.state_floats() +
                   2 * TILE * BACK_GROUP * VL + TILE * s.padded;
        }
        ScanScratch(float* base, const BimambaShape& s) {
            tiles = (BackwardTile*)base;
            carry = base + s.vectors * (sizeof(BackwardTile) / sizeof(float));
            dB = carry + s.state_floats();
            dC = dB + TILE * BACK_GROUP * VL;
            draw = dC + TILE * BACK_GROUP * VL;
        }
    };

    // Phase "scan" over vectors [first, last). dx_conv: (L, padded); drows: (L, row), overwritten.
    void scan_backward(int64_t b, int dir, int64_t first, int64_t last, float* dx_conv, float* drows,
                       GradientSums sums, ScanScratch k) const {
        const int64_t sign = dir == 0 ? 1 : -1, per_vector = s.padded_states * VL;
        const float* rows = this->saved_rows(b, dir);
        memset(k.carry, 0, s.state_floats() * sizeof(float));
        for (int64_t i = s.tiles - 1; i >= 0; --i) {
            const int64_t index = dir == 0 ? i : s.tiles - 1 - i, t0 = index * TILE;
            const int n = s.tokens(index), start = dir == 0 ? 0 : n - 1;
            const float* row = rows + (t0 + start) * s.row;
            float* drow = drows + t0 * s.row;
            for (int64_t v = first; v < last; ++v) prepare_backward(b, dir, index, v, rows, k.tiles[v]);
            memset(drow, 0, n * s.row * sizeof(float));
            for (int64_t g = 0; g < s.padded_states; g += BACK_GROUP) {
                memset(k.dB, 0, 2 * TILE * BACK_GROUP * VL * sizeof(float));
                for (int64_t v = first; v < last; ++v) {
                    BackwardTile& tile = k.tiles[v];
                    const int64_t at = start * VL, state = v * per_vector + g * VL;
                    const float* A = VectorParameters(packed[dir].vectors, s, v).A + g * VL;
                    float* dA = VectorParameters(sums.vectors, s, v).A + g * VL;
                    scan_tile_backward<false>(
                        n, tile.d + at, tile.dx + at, tile.dy + at, sign * VL, {row + s.B_at + g, sign * s.row, false},
                        {row + s.C_at + g, sign * s.row, false}, A,
                        this->saved_states(b, dir) + index * s.state_floats() + state, nullptr,
                        {tile.g_B + at, tile.g_d + at, dA, k.dB, k.dC, k.carry + state});
                }
                for (int t = 0; t < n; ++t)
                    for (int j = 0; j < BACK_GROUP; ++j) {
                        const int64_t lane = (t * BACK_GROUP + j) * VL;
                        float* out = drow + (start + sign * t) * s.row + g + j;
                        out[s.B_at] = sum_lanes(load(k.dB + lane));
                        out[s.C_at] = sum_lanes(load(k.dC + lane));
                    }
            }
            for (int64_t v = first; v < last; ++v)
                finish_tile(v, n, dir, rows + t0 * s.row, k.tiles[v], dx_conv + t0 * s.padded + v * VL,
                            k.draw + (v - first) * VL, (last - first) * VL, sums);
            gemm_add(n, s.rank_row, (last - first) * VL, k.draw, (last - first) * VL, 1,
                     packed[dir].dt_rows + first * VL * s.rank_row, s.rank_row, drow, s.row);
        }
    }

    // From the adjoint of a tile's states to the gradients of its x, raw time step, dt weights, dt bias and D.
    INLINE void finish_tile(int64_t v, int n, int dir, const float* rows, const BackwardTile& tile, float* dx_conv,
                            float* draw, int64_t draw_step, GradientSums sums) const {
        const vf D = load(VectorParameters(packed[dir].vectors, s, v).D);
        VectorParameters grads(sums.vectors, s, v);
        vf dD = load(grads.D), dbias = load(grads.dt_bias);
        for (int t = 0; t < n; ++t) {
            vf x = load(tile.x + t * VL), dy = load(tile.dy + t * VL), g_B = load(tile.g_B + t * VL);
            vf raw = fma(g_B, x, load(tile.g_d + t * VL)) * load(tile.slope + t * VL);
            store(draw + t * draw_step, raw);
            store(dx_conv + t * s.padded, fma(g_B, load(tile.d + t * VL) * LN2, D * dy));
            dD = fma(dy, x, dD);
            dbias += raw;
        }
        store(grads.D, dD);
        store(grads.dt_bias, dbias);
        for (int64_t r = 0; r < s.rank; ++r) {
            vf sum[4] = {load(grads.dt + r * VL)};
            for (int t = 0; t < n; ++t)
                sum[t % 4] = fma(load(draw + t * draw_step), set1(rows[t * s.row + r]), sum[t % 4]);
            store(grads.dt + r * VL, (sum[0] + sum[1]) + (sum[2] + sum[3]));
        }
    }

    // Phase "project" of a tile: dx_conv becomes the gradient of the convolution's output before its SiLU.
    // x, slope: scratch (TILE, padded).
    void project_backward(int64_t b, int dir, int64_t tile, float* dx_conv, const float* drows, GradientSums sums,
                          float* x, float* slope) const {
        const int n = s.tokens(tile);
        const int64_t t0 = tile * TILE, from = t0 + this->reach(dir);
        alignas(64) float window[(TILE + 8) * VL];
        for (int64_t v = 0; v < s.vectors; ++v) {
            VectorParameters p(packed[dir].vectors, s, v);
            load_window(this->x_rows(b, v), a.xz_token, from, from + n + s.width - 1, s.length, s.lanes(v), window);
            for (int t = 0; t < n; ++t) {
                vf raw = convolve(p, s.width, window + t * VL), sig = sigmoid(raw);
                store(x + t * s.padded + v * VL, raw * sig);
                store(slope + t * s.padded + v * VL, silu_slope(raw, sig));
            }
        }
        float* out = dx_conv + t0 * s.padded;
        const float* drow = drows + t0 * s.row;
        gemm_add(n, s.padded, s.columns, drow, s.row, 1, packed[dir].x_proj_out, s.padded, out, s.padded);
        gemm_add(s.columns, s.padded, n, drow, 1, s.row, x, s.padded, sums.x_proj, s.padded);
        for (int64_t i = 0; i < n * s.padded; i += VL) store(out + i, load(out + i) * load(slope + i));
    }

    // Phase "convolve" for one vector of a batch item: dxz, filter and conv_bias gradients.
    void convolve_backward(int64_t b, int64_t v, float* const dx_conv[2], GradientSums sums[2]) const {
        const int lanes = s.lanes(v);
        const int64_t reach = s.width - 1;
        alignas(64) float x[(TILE + 16) * VL], grad[2][(TILE + 8) * VL];
        for (int64_t tile = 0; tile < s.tiles; ++tile) {
            const int n = s.tokens(tile);
            const int64_t t0 = tile * TILE;
            load_window(this->x_rows(b, v), a.xz_token, t0 - reach, t0 + n + reach, s.length, lanes, x);
            load_window(dx_conv[0] + v * VL, s.padded, t0, t0 + n + reach, s.length, VL, grad[0]);
            load_window(dx_conv[1] + v * VL, s.padded, t0 - reach, t0 + n, s.length, VL, grad[1]);
            for (int dir = 0; dir < 2; ++dir)
                filter_gradients(v, n, x + (dir == 0 ? 0 : reach) * VL, grad[dir] + (dir == 0 ? 0 : reach) * VL,
                                 sums[dir]);
            put_dx(b, v, t0, n, grad);
            put_dz(b, v, t0, n);
        }
    }

    INLINE void filter_gradients(int64_t v, int n, const float* window, const float* grad, GradientSums sums) const {
        VectorParameters out(sums.vectors, s, v);
        vf bias = load(out.conv_bias);
        for (int t = 0; t < n; ++t) bias += load(grad + t * VL);
        store(out.conv_bias, bias);
        for (int64_t k = 0; k < s.width; ++k) {
            vf sum = load(out.conv + k * VL);
            for (int t = 0; t < n; ++t) sum = fma(load(grad + t * VL), load(window + (t + k) * VL), sum);
            store(out.conv + k * VL, sum);
        }
    }

    INLINE void put_dx(int64_t b, int64_t v, int64_t t0, int n, const float (*grad)[(TILE + 8) * VL]) const {
        VectorParameters forward(packed[0].vectors, s, v), backward(packed[1].vectors, s, v);
        T* dx = dxz_rows(b, v) + t0 * 2 * s.channels;
        for (int t = 0; t < n; ++t) {
            vf sum = {};
            for (int64_t k = 0; k < s.width; ++k) {
                const int64_t later = (t + s.width - 1 - k) * VL;
                sum = fma(load(forward.conv + k * VL), load(grad[0] + later), sum);
                sum = fma(load(backward.conv + k * VL), load(grad[1] + later), sum);
            }
            store(dx + t * 2 * s.channels, sum, s.lanes(v));
        }
    }

    INLINE void put_dz(int64_t b, int64_t v, int64_t t0, int n) const {
        const int lanes = s.lanes(v);
        const T *dy = dy_rows(b, v) + t0 * s.channels, *z = this->z_rows(b, v) + t0 * a.xz_token;
        const float* total = this->saved_sum(b) + t0 * s.padded + v * VL;
        T* dz = dxz_rows(b, v) + s.channels + t0 * 2 * s.channels;
        for (int t = 0; t < n; ++t) {
            vf zt = load(z + t * a.xz_token, lanes);
            vf gate = load(dy + t * s.channels, lanes) * (float)a.scale * load(total + t * s.padded);
            store(dz + t * 2 * s.channels, gate * silu_slope(zt, sigmoid(zt)), lanes);
        }
    }
};

void unpack_gradients(const BimambaShape& s, const Direction<float>& d, GradientSums sums, bool reversed) {
    for (int64_t v = 0; v < s.vectors; ++v) {
        VectorParameters p(sums.vectors, s, v);
        for (int64_t n = 0; n < s.padded_states; ++n) store(p.A + n * VL, load(p.A + n * VL) * LN2);
        copy_vector<float>(s, p, d, v, reversed, [](float* packed, float* plain) { *plain = *packed; });
    }
    for (int64_t column = 0; column < s.columns; ++column) {
        const int64_t row = x_proj_row(s, column);
        if (row >= 0) memcpy(d.x_proj + row * s.channels, sums.x_proj + column * s.padded, s.channels * sizeof(float));
    }
}

template <class T> int bimamba_backward(const BimambaArguments& a) {
    BimambaBackward<T> op(a);
    const BimambaShape& s = op.s;
    using ScanScratch = typename BimambaBackward<T>::ScanScratch;
    const int64_t threads = larger<int64_t>(1, a.threads), groups = channel_groups(s.batch, s.vectors, threads);
    const bool whole = groups == 1;
    const int64_t kept = whole ? threads : s.batch;
    const int64_t conv_floats = s.length * s.padded, row_floats = s.saved_rows(), sum_floats = GradientSums::floats(s);
    const int64_t scratch_floats = larger<int64_t>(ScanScratch::floats(s), 2 * TILE * s.padded);

    Arena arena;
    float *dx_conv = nullptr, *drows = nullptr, *sums = nullptr, *scratch = nullptr;
    for (int pass = 0; pass < 2; ++pass) {
        arena.used = 0;
        for (int dir = 0; dir < 2; ++dir) take_packed(arena, s, op.packed[dir], true);
        dx_conv = arena.take(kept * 2 * conv_floats);
        drows = arena.take(kept * groups * 2 * row_floats);
        sums = arena.take(threads * 2 * sum_floats);
        scratch = arena.take(threads * round_up(scratch_floats, 16));
        if (pass == 0 && !(arena.base = mamba_ssm_workspace(arena.used))) return 1;
    }
    for (int dir = 0; dir < 2; ++dir) pack_direction(s, a.parameters[dir], op.packed[dir], dir == 1);

    auto conv_of = [&](int64_t at, int dir) { return dx_conv + (2 * at + dir) * conv_floats; };
    auto rows_of = [&](int64_t at, int64_t group, int dir) {
        return drows + ((at * groups + group) * 2 + dir) * row_floats;
    };
    auto sums_of = [&](int64_t slot, int dir) { return GradientSums(sums + (2 * slot + dir) * sum_floats, s); };
    auto project = [&](int64_t b, int64_t at, int dir, int64_t tile, int64_t slot) {
        float* mine = scratch + slot * round_up(scratch_floats, 16);
        float* first = rows_of(at, 0, dir);
        const int64_t from = tile * TILE * s.row, to = from + s.tokens(tile) * s.row;
        for (int64_t g = 1; g < groups; ++g)
            for (int64_t i = from; i < to; i += VL)
                store(first + i, load(first + i) + load(rows_of(at, g, dir) + i));
        op.project_backward(b, dir, tile, conv_of(at, dir), first, sums_of(slot, dir), mine, mine + TILE * s.padded);
    };
    auto convolve = [&](int64_t b, int64_t at, int64_t first, int64_t last, int64_t slot) {
        float* const both[2] = {conv_of(at, 0), conv_of(at, 1)};
        GradientSums mine[2] = {sums_of(slot, 0), sums_of(slot, 1)};
        for (int64_t v = first; v < last; ++v) op.convolve_backward(b, v, both, mine);
    };
#pragma omp parallel num_threads((int)threads)
    {
        const int64_t slot = omp_get_thread_num();
        memset(sums + slot * 2 * sum_floats, 0, 2 * sum_floats * sizeof(float));
        ScanScratch scan_scratch(scratch + slot * round_up(scratch_floats, 16), s);
        if (whole) {
#pragma omp for schedule(static)
            for (int64_t b = 0; b < s.batch; ++b) {
                for (int dir = 0; dir < 2; ++dir) {
                    op.scan_backward(b, dir, 0, s.vectors, conv_of(slot, dir), rows_of(slot, 0, dir),
                                     sums_of(slot, dir), scan_scratch);
                    for (int64_t tile = 0; tile < s.tiles; ++tile) project(b, slot, dir, tile, slot);
                }
                convolve(b, slot, 0, s.vectors, slot);
            }
        } else {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < s.batch * groups; ++i)
                for (int dir = 0; dir < 2; ++dir) {
                    const int64_t b = i / groups, g = i % groups;
                    op.scan_backward(b, dir, g * s.vectors / groups, (g + 1) * s.vectors / groups, conv_of(b, dir),
                                     rows_of(b, g, dir), sums_of(slot, dir), scan_scratch);
                }
#pragma omp for schedule(static)
            for (int64_t i = 0; i < s.batch * 2 * s.tiles; ++i)
                project(i / (2 * s.tiles), i / (2 * s.tiles), i / s.tiles % 2, i % s.tiles, slot);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < s.batch * groups; ++i) {
                const int64_t g = i % groups;
                convolve(i / groups, i / groups, g * s.vectors / groups, (g + 1) * s.vectors / groups, slot);
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < 2 * sum_floats; i += VL) {
            vf total = load(sums + i);
            for (int64_t other = 1; other < threads; ++other) total += load(sums + other * 2 * sum_floats + i);
            store(sums + i, total);
        }
    }
    for (int dir = 0; dir < 2; ++dir) unpack_gradients(s, a.gradients[dir], sums_of(0, dir), dir == 1);
    return 0;
}

}  // namespace
