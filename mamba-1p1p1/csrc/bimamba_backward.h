// Gradients of the bidirectional mixer (bimamba.h), from the states saved between tiles. No atomics: what several
// threads add to is kept once per thread or per channel group and summed in a fixed order.
//
// Phase "scan" goes back through a direction's tiles: each is recomputed from its saved first state, then
// adjoined. It gives the gradient of the convolved x as far as the scan sees it (dx_conv) and of the projected rows
// (drows, summed over channels). Phase "project" adds x_proj's part to dx_conv and undoes the SiLU; it follows each
// tile at once, unless channels are split and drows must be summed first. Phase "convolve" brings both directions'
// dx_conv back through the filters.
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

// Rows [from, to) of one vector of channels, zeros outside the sequence. rows: row 0 of the sequence.
template <class T>
INLINE void load_window(const T* rows, int64_t step, int64_t from, int64_t to, int64_t length, int lanes, float* out) {
    for (int64_t t = from; t < to; ++t, out += VL)
        store(out, t < 0 || t >= length ? vf{} : load(rows + t * step, lanes));
}

// sum over n rows of a * b, in four chains.
INLINE vf dot_rows(int n, const float* a, int64_t a_step, const float* b) {
    vf sum[4] = {};
    int t = 0;
    for (; t + 4 <= n; t += 4)
        UNROLL for (int i = 0; i < 4; ++i)
            sum[i] = fma(load(a + (t + i) * a_step), load(b + (t + i) * VL), sum[i]);
    for (; t < n; ++t) sum[0] = fma(load(a + t * a_step), load(b + t * VL), sum[0]);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Per vector of channels, what a tile's adjoint reads and adds to; row = token of the tile.
struct BackwardTile {
    alignas(64) float slope[TILE * VL], d[TILE * VL], dx[TILE * VL], dy[TILE * VL], g_B[TILE * VL], g_d[TILE * VL];
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

    // What a thread works in. tile_x, tile_slope: the convolved x and its SiLU's derivative; tile_dx: the gradient of
    // the former; draw: of the raw time step. All (TILE, padded).
    struct Scratch {
        BackwardTile* tiles;  // [vectors]
        float *carry, *dB, *dC, *draw, *tile_x, *tile_slope, *tile_dx;

        static int64_t floats(const BimambaShape& s) {
            return round_up(s.vectors * (int64_t)(sizeof(BackwardTile) / sizeof(float)) + s.state_floats() +
                                2 * TILE * BACK_GROUP * VL + 4 * TILE * s.padded,
                            16);
        }
        Scratch(float* base, const BimambaShape& s) {
            tiles = (BackwardTile*)base;
            carry = base + s.vectors * (sizeof(BackwardTile) / sizeof(float));
            dB = carry + s.state_floats();
            dC = dB + TILE * BACK_GROUP * VL;
            draw = dC + TILE * BACK_GROUP * VL;
            tile_x = draw + TILE * s.padded;
            tile_slope = tile_x + TILE * s.padded;
            tile_dx = tile_slope + TILE * s.padded;
        }
    };

    void convolve(int64_t b, int dir, int64_t tile, int64_t first, int64_t last, const Scratch& k) const {
        this->convolve_any(b, dir, tile, first, last, k.tile_x, k.tile_slope);
    }

    // The adjoint of the states of a tile: g_B and g_d of each vector, dA, and drows' parts for B and C.
    void adjoin_states(int64_t b, int dir, int64_t tile, int64_t first, int64_t last, float* drow, GradientSums sums,
                       const Scratch& k) const {
        const int n = s.tokens(tile), start = dir == 0 ? 0 : n - 1;
        const int64_t sign = dir == 0 ? 1 : -1, per_vector = s.padded_states * VL;
        const float* row = this->saved_rows(b, dir) + (tile * TILE + start) * s.row;
        for (int64_t g = 0; g < s.padded_states; g += BACK_GROUP) {
            memset(k.dB, 0, 2 * TILE * BACK_GROUP * VL * sizeof(float));
            for (int64_t v = first; v < last; ++v) {
                BackwardTile& t = k.tiles[v];
                const int64_t at = start * VL, state = v * per_vector + g * VL;
                const float* A = VectorParameters(packed[dir].vectors, s, v).A + g * VL;
                float* dA = VectorParameters(sums.vectors, s, v).A + g * VL;
                scan_tile_backward<false>(n, t.d + at, t.dx + at, t.dy + at, sign * VL,
                                          {row + s.B_at + g, sign * s.row, false},
                                          {row + s.C_at + g, sign * s.row, false}, A,
                                          this->saved_states(b, dir) + tile * s.state_floats() + state, nullptr,
                                          {t.g_B + at, t.g_d + at, dA, k.dB, k.dC, k.carry + state});
            }
            for (int t = 0; t < n; ++t)
                for (int j = 0; j < BACK_GROUP; ++j) {
                    const int64_t lane = (t * BACK_GROUP + j) * VL;
                    float* out = drow + (start + sign * t) * s.row + g + j;
                    out[s.B_at] = sum_lanes(load(k.dB + lane));
                    out[s.C_at] = sum_lanes(load(k.dC + lane));
                }
        }
    }

    // Phase "scan" of a tile over vectors [first, last). dx: the tile's (TILE, padded); drows: row 0 of (L, row).
    void scan_backward(int64_t b, int dir, int64_t tile, int64_t first, int64_t last, float* dx, float* drows,
                       GradientSums sums, const Scratch& k) const {
        const int n = s.tokens(tile);
        const int64_t t0 = tile * TILE, width = (last - first) * VL;
        const float* rows = this->saved_rows(b, dir) + t0 * s.row;
        float* drow = drows + t0 * s.row;
        const int64_t next = tile + (dir == 0 ? -1 : 1);
        for (int64_t v = first; v < last; ++v) {
            this->prefetch(this->x_rows(b, v), a.xz_token, next);
            this->prefetch(this->z_rows(b, v), a.xz_token, next);
            this->prefetch(dy_rows(b, v), s.channels, next);
            BackwardTile& t = k.tiles[v];
            this->template time_steps<true>(VectorParameters(packed[dir].vectors, s, v), n, rows, k.tile_x + v * VL,
                                            t.d, t.dx, t.slope);
            gated_gradient(b, v, t0, n, t.dy);
            memset(t.g_B, 0, n * VL * sizeof(float));
            memset(t.g_d, 0, n * VL * sizeof(float));
        }
        memset(drow, 0, n * s.row * sizeof(float));
        adjoin_states(b, dir, tile, first, last, drow, sums, k);
        for (int64_t v = first; v < last; ++v)
            finish_vector(v, n, dir, rows, k.tiles[v], k.tile_x + v * VL, dx + v * VL,
                          k.draw + (v - first) * VL, width, sums);
        gemm_add(n, s.rank_row, width, k.draw, width, 1, packed[dir].dt_rows + first * VL * s.rank_row, s.rank_row, drow,
                 s.row);
    }

    // From the adjoint of a tile's states to the gradients of its x, raw time step, dt weights, dt bias and D.
    INLINE void finish_vector(int64_t v, int n, int dir, const float* rows, const BackwardTile& tile, const float* x,
                              float* dx, float* draw, int64_t draw_step, GradientSums sums) const {
        const vf D = load(VectorParameters(packed[dir].vectors, s, v).D);
        VectorParameters grads(sums.vectors, s, v);
        vf dbias = load(grads.dt_bias);
        for (int t = 0; t < n; ++t) {
            vf dy = load(tile.dy + t * VL), g_B = load(tile.g_B + t * VL);
            vf raw = fma(g_B, load(x + t * s.padded), load(tile.g_d + t * VL)) * load(tile.slope + t * VL);
            store(draw + t * draw_step, raw);
            store(dx + t * s.padded, fma(g_B, load(tile.d + t * VL) * LN2, D * dy));
            dbias += raw;
        }
        store(grads.dt_bias, dbias);
        store(grads.D, load(grads.D) + dot_rows(n, x, s.padded, tile.dy));
        int64_t r = 0;
        for (; r + 4 <= s.rank; r += 4) add_time_step_gradients<4>(n, rows + r, draw, draw_step, grads.dt + r * VL);
        for (; r < s.rank; ++r) add_time_step_gradients<1>(n, rows + r, draw, draw_step, grads.dt + r * VL);
    }

    // out[r] += sum over tokens of draw * rows[r], for COUNT ranks at once.
    template <int COUNT>
    INLINE void add_time_step_gradients(int n, const float* rows, const float* draw, int64_t draw_step,
                                        float* out) const {
        vf sum[COUNT];
        UNROLL for (int r = 0; r < COUNT; ++r) sum[r] = load(out + r * VL);
        for (int t = 0; t < n; ++t) {
            vf g = load(draw + t * draw_step);
            UNROLL for (int r = 0; r < COUNT; ++r) sum[r] = fma(g, set1(rows[t * s.row + r]), sum[r]);
        }
        UNROLL for (int r = 0; r < COUNT; ++r) store(out + r * VL, sum[r]);
    }

    // Phase "project" of a tile: from dx, the scan's part of the gradient of the convolved x, to that of the
    // convolution's output before its SiLU, in dx_conv (row 0 of (L, padded)).
    void project_backward(int dir, int64_t tile, float* dx, float* dx_conv, const float* drows, GradientSums sums,
                          const Scratch& k) const {
        const int n = s.tokens(tile);
        const float* drow = drows + tile * TILE * s.row;
        gemm_add(n, s.padded, s.columns, drow, s.row, 1, packed[dir].x_proj_out, s.padded, dx, s.padded);
        gemm_add(s.columns, s.padded, n, drow, 1, s.row, k.tile_x, s.padded, sums.x_proj, s.padded);
        float* out = dx_conv + tile * TILE * s.padded;
        for (int64_t i = 0; i < n * s.padded; i += VL) store(out + i, load(dx + i) * load(k.tile_slope + i));
    }

    INLINE void prefetch_convolve(int64_t b, int64_t v, int64_t tile, float* const dx_conv[2]) const {
        this->prefetch(this->x_rows(b, v), a.xz_token, tile);
        this->prefetch(this->z_rows(b, v), a.xz_token, tile);
        this->prefetch(dy_rows(b, v), s.channels, tile);
        this->prefetch(this->saved_sum(b) + v * VL, s.padded, tile);
        for (int dir = 0; dir < 2; ++dir) this->prefetch(dx_conv[dir] + v * VL, s.padded, tile);
        this->prefetch(dxz_rows(b, v), 2 * s.channels, tile, true);
        this->prefetch(dxz_rows(b, v) + s.channels, 2 * s.channels, tile, true);
    }

    // Phase "convolve" of a tile: dxz, filter and conv_bias gradients.
    void convolve_backward(int64_t b, int64_t tile, float* const dx_conv[2], GradientSums sums[2]) const {
        const int64_t reach = s.width - 1, t0 = tile * TILE;
        const int n = s.tokens(tile);
        alignas(64) float x[(TILE + 16) * VL], grad[2][(TILE + 8) * VL];
        for (int64_t v = 0; v < s.vectors; ++v) {
            alignas(64) float dx[TILE * VL] = {};
            const int lanes = s.lanes(v);
            prefetch_convolve(b, v, tile + 1, dx_conv);
            load_window(this->x_rows(b, v), a.xz_token, t0 - reach, t0 + n + reach, s.length, lanes, x);
            load_window(dx_conv[0] + v * VL, s.padded, t0, t0 + n + reach, s.length, VL, grad[0]);
            load_window(dx_conv[1] + v * VL, s.padded, t0 - reach, t0 + n, s.length, VL, grad[1]);
            for (int dir = 0; dir < 2; ++dir) {
                VectorParameters p(packed[dir].vectors, s, v), out(sums[dir].vectors, s, v);
                auto adjoin = s.width == 4   ? adjoin_filter<4>
                              : s.width == 3 ? adjoin_filter<3>
                              : s.width == 2 ? adjoin_filter<2>
                                             : adjoin_filter<1>;
                adjoin(n, p.conv, x + dir * reach * VL, grad[dir], grad[dir] + dir * reach * VL, out, dx);
            }
            T* to = dxz_rows(b, v) + t0 * 2 * s.channels;
            for (int t = 0; t < n; ++t) store(to + t * 2 * s.channels, load(dx + t * VL), lanes);
            put_dz(b, v, t0, n);
        }
    }

    // Adds a direction's part to the gradients of a filter, its bias and the input. at: the gradient of the outputs
    // of the tile's tokens; around: of all outputs that its inputs reach.
    template <int WIDTH>
    static void adjoin_filter(int n, const float* taps, const float* x, const float* around, const float* at,
                              VectorParameters out, float* dx) {
        vf w[WIDTH], dw[WIDTH], bias = load(out.conv_bias);
        UNROLL for (int k = 0; k < WIDTH; ++k) w[k] = load(taps + k * VL), dw[k] = load(out.conv + k * VL);
        for (int t = 0; t < n; ++t) {
            vf g = load(at + t * VL), sum = load(dx + t * VL);
            bias += g;
            UNROLL for (int k = 0; k < WIDTH; ++k) {
                dw[k] = fma(g, load(x + (t + k) * VL), dw[k]);
                sum = fma(w[k], load(around + (t + WIDTH - 1 - k) * VL), sum);
            }
            store(dx + t * VL, sum);
        }
        UNROLL for (int k = 0; k < WIDTH; ++k) store(out.conv + k * VL, dw[k]);
        store(out.conv_bias, bias);
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

// A backward call's memory and its units of work.
template <class T> struct BackwardCall : BimambaBackward<T> {
    using BimambaBackward<T>::a;
    using BimambaBackward<T>::s;
    using Scratch = typename BimambaBackward<T>::Scratch;
    explicit BackwardCall(const BimambaArguments& arguments) : BimambaBackward<T>(arguments) {}

    float *dx_conv = nullptr, *drows = nullptr, *sums = nullptr, *scratch = nullptr;
    int64_t groups = 1, kept = 1;  // kept: batch items whose dx_conv and drows exist at a time
    bool fused = true;             // project follows scan tile by tile

    float* conv_of(int64_t at, int dir) const { return dx_conv + (2 * at + dir) * s.length * s.padded; }
    float* rows_of(int64_t at, int64_t group, int dir) const {
        return drows + ((at * groups + group) * 2 + dir) * s.saved_rows();
    }
    GradientSums sums_of(int64_t slot, int dir) const {
        return GradientSums(sums + (2 * slot + dir) * GradientSums::floats(s), s);
    }
    Scratch scratch_of(int64_t slot) const { return Scratch(scratch + slot * Scratch::floats(s), s); }

    // Phase "scan" of a direction over a group of channels, with phase "project" if fused. at: place in the buffers.
    void scan_unit(int64_t b, int64_t at, int dir, int64_t group, int64_t slot) const {
        const int64_t first = group * s.vectors / groups, last = (group + 1) * s.vectors / groups;
        const Scratch k = scratch_of(slot);
        memset(k.carry, 0, s.state_floats() * sizeof(float));
        for (int64_t i = s.tiles - 1; i >= 0; --i) {
            const int64_t tile = dir == 0 ? i : s.tiles - 1 - i;
            this->convolve(b, dir, tile, first, last, k);
            float* dx = fused ? k.tile_dx : conv_of(at, dir) + tile * TILE * s.padded;
            this->scan_backward(b, dir, tile, first, last, dx, rows_of(at, group, dir), sums_of(slot, dir), k);
            if (fused)
                this->project_backward(dir, tile, dx, conv_of(at, dir), rows_of(at, 0, dir), sums_of(slot, dir), k);
        }
    }

    // Phase "project" of a tile on its own: sum the groups' drows first.
    void project_unit(int64_t b, int dir, int64_t tile, int64_t slot) const {
        float* total = rows_of(b, 0, dir);
        const int64_t from = tile * TILE * s.row, to = from + s.tokens(tile) * s.row;
        for (int64_t g = 1; g < groups; ++g)
            for (int64_t i = from; i < to; i += VL)
                store(total + i, load(total + i) + load(rows_of(b, g, dir) + i));
        const Scratch k = scratch_of(slot);
        this->convolve(b, dir, tile, 0, s.vectors, k);
        float* dx = conv_of(b, dir) + tile * TILE * s.padded;
        this->project_backward(dir, tile, dx, conv_of(b, dir), total, sums_of(slot, dir), k);
    }

    void convolve_unit(int64_t b, int64_t at, int64_t tile, int64_t slot) const {
        float* const both[2] = {conv_of(at, 0), conv_of(at, 1)};
        GradientSums mine[2] = {sums_of(slot, 0), sums_of(slot, 1)};
        this->convolve_backward(b, tile, both, mine);
    }
};

template <class T> int bimamba_backward(const BimambaArguments& a) {
    BackwardCall<T> op(a);
    const BimambaShape& s = op.s;
    const int64_t threads = larger<int64_t>(1, a.threads), sum_floats = 2 * GradientSums::floats(s);
    const Split split = choose_split(s, threads, &op.groups);
    op.kept = split == Split::ITEMS ? threads : s.batch;
    op.fused = split != Split::CHANNELS;

    Arena arena;
    for (int pass = 0; pass < 2; ++pass) {
        arena.used = 0;
        for (int dir = 0; dir < 2; ++dir) take_packed(arena, s, op.packed[dir], true);
        op.dx_conv = arena.take(op.kept * 2 * s.length * s.padded);
        op.drows = arena.take(op.kept * op.groups * 2 * s.saved_rows());
        op.sums = arena.take(threads * sum_floats);
        op.scratch = arena.take(threads * BackwardCall<T>::Scratch::floats(s));
        if (pass == 0 && !(arena.base = mamba_ssm_workspace(arena.used))) return 1;
    }
    for (int dir = 0; dir < 2; ++dir) pack_direction(s, a.parameters[dir], op.packed[dir], dir == 1);

#pragma omp parallel num_threads((int)threads)
    {
        const int64_t slot = omp_get_thread_num();
        memset(op.sums + slot * sum_floats, 0, sum_floats * sizeof(float));
        if (split == Split::ITEMS) {
#pragma omp for schedule(static)
            for (int64_t b = 0; b < s.batch; ++b) {
                for (int dir = 0; dir < 2; ++dir) op.scan_unit(b, slot, dir, 0, slot);
                for (int64_t tile = 0; tile < s.tiles; ++tile) op.convolve_unit(b, slot, tile, slot);
            }
        } else {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < 2 * s.batch * op.groups; ++i)
                op.scan_unit(i / (2 * op.groups), i / (2 * op.groups), (int)(i % 2), i / 2 % op.groups, slot);
            if (!op.fused) {
#pragma omp for schedule(static)
                for (int64_t i = 0; i < 2 * s.batch * s.tiles; ++i)
                    op.project_unit(i / (2 * s.tiles), (int)(i % 2), i / 2 % s.tiles, slot);
            }
#pragma omp for schedule(static)
            for (int64_t i = 0; i < s.batch * s.tiles; ++i) op.convolve_unit(i / s.tiles, i / s.tiles, i % s.tiles, slot);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < sum_floats; i += VL) {
            vf total = load(op.sums + i);
            for (int64_t other = 1; other < threads; ++other) total += load(op.sums + other * sum_floats + i);
            store(op.sums + i, total);
        }
    }
    for (int dir = 0; dir < 2; ++dir) unpack_gradients(s, a.gradients[dir], op.sums_of(0, dir), dir == 1);
    return 0;
}

}  // namespace
