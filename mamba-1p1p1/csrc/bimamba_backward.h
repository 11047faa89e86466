// Gradients of the bidirectional mixer (bimamba.h), from the states saved between tiles. No atomics: what several
// threads add to is kept once per thread or per channel group and summed in a fixed order.
//
// A direction goes back through its tiles. Of each, "scan" recomputes the states from the saved first one and adjoins
// them, which gives the gradient of the convolved x as far as the scan sees it and of the projected rows (drows,
// summed over channels); "project" adds x_proj's part to the former and undoes the SiLU; "filter" brings that back
// through the convolution. Of the two directions, the one that comes to a tile second adds the other's part and
// stores dxz. Where channels are split, drows must be summed before "project", and the three are phases of their own.
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

    // Gradient of the sum of both directions' scans, dy * scale * silu(z), for a tile and vector; with GATE also z's,
    // and once more the output, if it is asked for.
    template <bool GATE> INLINE void gated_gradient(int64_t b, int64_t v, int64_t t0, int n, float* out) const {
        const int lanes = s.lanes(v);
        const T *dy = dy_rows(b, v) + t0 * s.channels, *z = this->z_rows(b, v) + t0 * a.xz_token;
        const float* total = this->saved_sum(b) + t0 * s.padded + v * VL;
        T* dz = dxz_rows(b, v) + s.channels + t0 * 2 * s.channels;
        const vf scale = set1((float)a.scale);
        for (int t = 0; t < n; ++t) {
            vf zt = load(z + t * a.xz_token, lanes), sig = sigmoid(zt);
            vf scaled = load(dy + t * s.channels, lanes) * scale;
            store(out + t * VL, scaled * zt * sig);
            if (!GATE) continue;
            vf sum = load(total + t * s.padded);
            store(dz + t * 2 * s.channels, scaled * sum * silu_slope(zt, sig), lanes);
            if (a.y) store(this->y_rows(b, v) + (t0 + t) * s.channels, sum * scale * zt * sig, lanes);
        }
    }

    // What a thread works in. tile_x, tile_slope: the convolved x and its SiLU's derivative; tile_dx: the gradient of
    // the former; draw: of the raw time step. All (TILE, padded).
    struct Scratch {
        BackwardTile* tiles;  // [vectors]
        float *dB, *dC, *draw, *tile_x, *tile_slope, *tile_dx;

        static int64_t floats(const BimambaShape& s) {
            return round_up(s.vectors * (int64_t)(sizeof(BackwardTile) / sizeof(float)) + 2 * COUPLING + APART +
                                4 * TILE * s.padded,
                            16);
        }
        Scratch(float* base, const BimambaShape& s) {
            tiles = (BackwardTile*)base;
            dB = base + s.vectors * (sizeof(BackwardTile) / sizeof(float));
            dC = dB + COUPLING + APART;
            draw = dC + COUPLING;
            tile_x = draw + TILE * s.padded;
            tile_slope = tile_x + TILE * s.padded;
            tile_dx = tile_slope + TILE * s.padded;
        }
    };

    // What a direction hands from tile to tile: the adjoint of the states, [vectors][padded_states][VL]; and the
    // gradient of the convolution's output, rows of the tile and the width - 1 that its inputs reach beyond it.
    struct Carried {
        float *states, *window;
        static int64_t floats(const BimambaShape& s) {
            return s.state_floats() + (TILE + s.width - 1) * s.padded;
        }
        Carried(float* base, const BimambaShape& s) : states(base), window(base + s.state_floats()) {}
    };

    void convolve(int64_t b, int dir, int64_t tile, int64_t first, int64_t last, const Scratch& k) const {
        this->convolve_any(b, dir, tile, first, last, k.tile_x, k.tile_slope);
    }

    // While the first two groups of states are adjoined, what the next tile will touch.
    INLINE Ahead fetch_ahead(int64_t b, int64_t v, int64_t tile, int64_t group) const {
        Ahead ahead;
        if (group == 0) {
            this->fetch_tile(ahead, 0, this->x_rows(b, v), a.xz_token, tile);
            this->fetch_tile(ahead, 1, this->z_rows(b, v), a.xz_token, tile);
            this->fetch_tile(ahead, 2, dy_rows(b, v), s.channels, tile);
        } else if (group == BACK_GROUP) {
            this->fetch_tile(ahead, 0, this->saved_sum(b) + v * VL, s.padded, tile);
            this->fetch_tile(ahead, 1, dxz_rows(b, v), 2 * s.channels, tile);
            this->fetch_tile(ahead, 2, dxz_rows(b, v) + s.channels, 2 * s.channels, tile);
        }
        return ahead;
    }

    // The adjoint of the states of a tile: g_B and g_d of each vector, dA, and drows' parts for B and C.
    void adjoin_states(int64_t b, int dir, int64_t tile, int64_t first, int64_t last, float* drow, GradientSums sums,
                       const Scratch& k, float* carry) const {
        const int n = s.tokens(tile), start = dir == 0 ? 0 : n - 1;
        const int64_t sign = dir == 0 ? 1 : -1, per_vector = s.padded_states * VL;
        const float* row = this->saved_rows(b, dir) + (tile * TILE + start) * s.row;
        const float* saved = this->saved_states(b, dir) + tile * s.state_floats();
        for (int64_t g = 0; g < s.padded_states; g += BACK_GROUP) {
            memset(k.dB, 0, COUPLING * sizeof(float));
            memset(k.dC, 0, COUPLING * sizeof(float));
            for (int64_t v = first; v < last; ++v) {
                BackwardTile& t = k.tiles[v];
                const int64_t at = start * VL, state = v * per_vector + g * VL;
                for (int j = 0; j < BACK_GROUP; ++j)  // of the vector after the next
                    __builtin_prefetch(saved + state + 2 * per_vector + j * VL);
                const float* A = VectorParameters(packed[dir].vectors, s, v).A + g * VL;
                float* dA = VectorParameters(sums.vectors, s, v).A + g * VL;
                scan_tile_backward<false>(n, t.d + at, t.dx + at, t.dy + at, sign * VL,
                                          {row + s.B_at + g, sign * s.row, false},
                                          {row + s.C_at + g, sign * s.row, false}, A, saved + state, nullptr,
                                          {t.g_B + at, t.g_d + at, dA, k.dB, k.dC, carry + state},
                                          fetch_ahead(b, v, tile - sign, g));
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

    // "Scan" of a tile over vectors [first, last). dx: the tile's (TILE, padded); drows: row 0 of (L, row); gate:
    // also write z's gradient.
    void scan_backward(int64_t b, int dir, int64_t tile, int64_t first, int64_t last, float* dx, float* drows,
                       GradientSums sums, const Scratch& k, float* carry, bool gate) const {
        const int n = s.tokens(tile);
        const int64_t t0 = tile * TILE, width = (last - first) * VL;
        const float* rows = this->saved_rows(b, dir) + t0 * s.row;
        float* drow = drows + t0 * s.row;
        for (int64_t v = first; v < last; ++v) {
            BackwardTile& t = k.tiles[v];
            this->template time_steps<true>(VectorParameters(packed[dir].vectors, s, v), n, rows, k.tile_x + v * VL,
                                            t.d, t.dx, t.slope);
            gate ? gated_gradient<true>(b, v, t0, n, t.dy) : gated_gradient<false>(b, v, t0, n, t.dy);
            memset(t.g_B, 0, n * VL * sizeof(float));
            memset(t.g_d, 0, n * VL * sizeof(float));
        }
        memset(drow, 0, n * s.row * sizeof(float));
        adjoin_states(b, dir, tile, first, last, drow, sums, k, carry);
        for (int64_t v = first; v < last; ++v)
            finish_vector(v, n, dir, rows, k.tiles[v], k.tile_x + v * VL, dx + v * VL, k.draw + (v - first) * VL, width,
                          sums);
        gemm_add(n, s.rank_row, width, k.draw, width, 1, packed[dir].dt_rows + first * VL * s.rank_row, s.rank_row,
                 drow, s.row);
    }

    // From the adjoint of a tile's states to the gradients of its x, raw time step, dt weights, dt bias and D.
    INLINE void finish_vector(int64_t v, int n, int dir, const float* rows, const BackwardTile& tile, const float* x,
                              float* dx, float* draw, int64_t draw_step, GradientSums sums) const {
        const vf D = load(VectorParameters(packed[dir].vectors, s, v).D);
        VectorParameters grads(sums.vectors, s, v);
        vf dbias = {};
        for (int t = 0; t < n; ++t) {
            vf dy = load(tile.dy + t * VL), g_B = load(tile.g_B + t * VL);
            vf raw = fma(g_B, load(x + t * s.padded), load(tile.g_d + t * VL)) * load(tile.slope + t * VL);
            store(draw + t * draw_step, raw);
            store(dx + t * s.padded, fma(g_B, load(tile.d + t * VL) * EXP_UNIT, D * dy));
            dbias += raw;
        }
        store(grads.dt_bias, load(grads.dt_bias) + dbias);
        store(grads.D, load(grads.D) + dot_rows(n, x, s.padded, tile.dy));
        int64_t r = 0;
        for (; r + 4 <= s.rank; r += 4) add_time_step_gradients<4>(n, rows + r, draw, draw_step, grads.dt + r * VL);
        for (; r < s.rank; ++r) add_time_step_gradients<1>(n, rows + r, draw, draw_step, grads.dt + r * VL);
    }

    // out[r] += sum over tokens of draw * rows[r], for COUNT ranks at once.
    template <int COUNT>
    INLINE void add_time_step_gradients(int n, const float* rows, const float* draw, int64_t draw_step,
                                        float* out) const {
        vf sum[COUNT] = {};
        for (int t = 0; t < n; ++t) {
            vf g = load(draw + t * draw_step);
            UNROLL for (int r = 0; r < COUNT; ++r) sum[r] = fma(g, set1(rows[t * s.row + r]), sum[r]);
        }
        UNROLL for (int r = 0; r < COUNT; ++r) store(out + r * VL, load(out + r * VL) + sum[r]);
    }

    // "Project" of a tile: from dx, the scan's part of the gradient of the convolved x, to `out`, that of the
    // convolution's output before its SiLU; both (TILE, padded).
    void project_backward(int dir, int64_t tile, float* dx, float* out, const float* drows, GradientSums sums,
                          const Scratch& k) const {
        const int n = s.tokens(tile);
        const float* drow = drows + tile * TILE * s.row;
        gemm_add(n, s.padded, s.columns, drow, s.row, 1, packed[dir].x_proj_out, s.padded, dx, s.padded);
        gemm_add(s.columns, s.padded, n, drow, 1, s.row, k.tile_x, s.padded, sums.x_proj, s.padded);
        for (int64_t i = 0; i < n * s.padded; i += VL) store(out + i, load(dx + i) * load(k.tile_slope + i));
    }

    // Makes room in a window for a tile's rows and returns where: what the tile before reaches into stays beside it.
    float* roll(int dir, int64_t tile, float* window) const {
        const int64_t n = s.tokens(tile), reach = s.width - 1, size = reach * s.padded;
        const bool first = tile == (dir == 0 ? s.tiles - 1 : 0);
        float *beside = window + (dir == 0 ? n * s.padded : 0), *from = window + (dir == 0 ? 0 : TILE * s.padded);
        first ? memset(beside, 0, size * sizeof(float)) : memcpy(beside, from, size * sizeof(float));
        return window + (dir == 0 ? 0 : size);
    }

    // "Filter" of a tile, one direction: adds to the gradients of the filter and its bias, and returns that of x for
    // one vector in dx [TILE][VL]. window: rows of the tile and beside it, (TILE + width - 1, padded).
    INLINE void filter_backward(int64_t b, int dir, int64_t tile, int64_t v, const float* window, GradientSums sums,
                                float* dx) const {
        const int n = s.tokens(tile);
        const int64_t reach = s.width - 1, from = tile * TILE + (dir == 0 ? -reach : 0);
        alignas(64) float x[(TILE + 8) * VL];
        load_window(this->x_rows(b, v), a.xz_token, from, from + n + reach, s.length, s.lanes(v), x);
        VectorParameters p(packed[dir].vectors, s, v), out(sums.vectors, s, v);
        auto adjoin = s.width == 4   ? adjoin_filter<4>
                      : s.width == 3 ? adjoin_filter<3>
                      : s.width == 2 ? adjoin_filter<2>
                                     : adjoin_filter<1>;
        adjoin(n, p.conv, x, window + v * VL, window + dir * reach * s.padded + v * VL, s.padded, out, dx);
    }

    // dx of a tile, one direction: kept in `partial`, row 0 of (L, step), by the first and completed by the second.
    void filter_tile(int64_t b, int dir, int64_t tile, const float* window, GradientSums sums, float* partial,
                     int64_t step, bool second) const {
        const int64_t t0 = tile * TILE;
        for (int64_t v = 0; v < s.vectors; ++v) {
            alignas(64) float dx[TILE * VL] = {};
            filter_backward(b, dir, tile, v, window, sums, dx);
            const int lanes = s.lanes(v), partial_lanes = step == s.padded ? VL : lanes;
            float* kept = partial + t0 * step + v * VL;
            T* to = dxz_rows(b, v) + t0 * 2 * s.channels;
            for (int t = 0; t < s.tokens(tile); ++t) {
                vf value = load(dx + t * VL);
                if (second)
                    store(to + t * 2 * s.channels, value + load(kept + t * step, partial_lanes), lanes);
                else
                    store(kept + t * step, value, partial_lanes);
            }
        }
    }

    // Both directions at once, from whole sequences of the convolutions' gradients (L, padded).
    void filter_both(int64_t b, int64_t tile, float* const dx_conv[2], GradientSums sums[2], float* window) const {
        const int64_t reach = s.width - 1, t0 = tile * TILE, n = s.tokens(tile);
        for (int dir = 0; dir < 2; ++dir)
            for (int64_t t = 0; t < n + reach; ++t) {
                const int64_t at = t0 + t - dir * reach;
                float* row = window + (dir * (TILE + reach) + t) * s.padded;
                if (at >= 0 && at < s.length)
                    memcpy(row, dx_conv[dir] + at * s.padded, s.padded * sizeof(float));
                else
                    memset(row, 0, s.padded * sizeof(float));
            }
        for (int64_t v = 0; v < s.vectors; ++v) {
            alignas(64) float dx[TILE * VL] = {};
            for (int dir = 0; dir < 2; ++dir)
                filter_backward(b, dir, tile, v, window + dir * (TILE + reach) * s.padded, sums[dir], dx);
            T* to = dxz_rows(b, v) + t0 * 2 * s.channels;
            for (int t = 0; t < n; ++t) store(to + t * 2 * s.channels, load(dx + t * VL), s.lanes(v));
        }
    }

    // Adds a direction's part to the gradients of a filter, its bias and the input. at: the gradient of the outputs
    // of the tile's tokens; around: of all outputs that its inputs reach; `step` from row to row of both.
    template <int WIDTH>
    static void adjoin_filter(int n, const float* taps, const float* x, const float* around, const float* at,
                              int64_t step, VectorParameters out, float* dx) {
        vf w[WIDTH], dw[WIDTH] = {}, bias = {};
        UNROLL for (int k = 0; k < WIDTH; ++k) w[k] = load(taps + k * VL);
        for (int t = 0; t < n; ++t) {
            vf g = load(at + t * step), sum = load(dx + t * VL);
            bias += g;
            UNROLL for (int k = 0; k < WIDTH; ++k) {
                dw[k] = fma(g, load(x + (t + k) * VL), dw[k]);
                sum = fma(w[k], load(around + (t + WIDTH - 1 - k) * step), sum);
            }
            store(dx + t * VL, sum);
        }
        UNROLL for (int k = 0; k < WIDTH; ++k) store(out.conv + k * VL, load(out.conv + k * VL) + dw[k]);
        store(out.conv_bias, load(out.conv_bias) + bias);
    }
};

void unpack_gradients(const BimambaShape& s, const Direction<float>& d, GradientSums sums, bool reversed) {
    for (int64_t v = 0; v < s.vectors; ++v) {
        VectorParameters p(sums.vectors, s, v);
        for (int64_t n = 0; n < s.padded_states; ++n) store(p.A + n * VL, load(p.A + n * VL) * EXP_UNIT);
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
    using Carried = typename BimambaBackward<T>::Carried;
    explicit BackwardCall(const BimambaArguments& arguments) : BimambaBackward<T>(arguments) {}

    float *carried = nullptr, *drows = nullptr, *sums = nullptr, *scratch = nullptr;
    float *partial = nullptr;  // dx of the direction that comes first; null: in dxz itself
    float *dx_conv = nullptr;  // only where channels are split
    int64_t groups = 1;

    float* conv_of(int64_t b, int dir) const { return dx_conv + (2 * b + dir) * s.length * s.padded; }
    float* rows_of(int64_t b, int64_t group, int dir) const {
        return drows + ((b * groups + group) * 2 + dir) * s.saved_rows();
    }
    GradientSums sums_of(int64_t slot, int dir) const {
        return GradientSums(sums + (2 * slot + dir) * GradientSums::floats(s), s);
    }
    Scratch scratch_of(int64_t slot) const { return Scratch(scratch + slot * Scratch::floats(s), s); }
    Carried carried_of(int64_t unit) const { return Carried(carried + unit * Carried::floats(s), s); }
    int64_t tile_of(int dir, int64_t step) const { return dir == 0 ? s.tiles - 1 - step : step; }

    // A tile of one direction, everything fused. Of two directions, the `second` to come to it completes dxz.
    void run_tile(int64_t b, int dir, int64_t tile, int64_t slot, Carried carry, bool second) const {
        const Scratch k = scratch_of(slot);
        const GradientSums mine = sums_of(slot, dir);
        float* drow = rows_of(b, 0, dir);
        float* kept = partial ? partial + b * s.length * s.padded : (float*)this->dxz_rows(b, 0);
        this->convolve(b, dir, tile, 0, s.vectors, k);
        this->scan_backward(b, dir, tile, 0, s.vectors, k.tile_dx, drow, mine, k, carry.states, second);
        this->project_backward(dir, tile, k.tile_dx, this->roll(dir, tile, carry.window), drow, mine, k);
        this->filter_tile(b, dir, tile, carry.window, mine, kept, partial ? s.padded : 2 * s.channels, second);
    }

    // Deals out all tiles to the threads of the enclosing parallel region, for splits of whole channels: per direction
    // backwards in its time. run(b, dir, tile, carry, second) does one of them.
    template <class Run> void run_whole(Split split, int64_t slot, Run run) const {
        auto direction = [&](int64_t b, int dir, int64_t from, int64_t to, Carried carry, bool second) {
            if (from == 0) memset(carry.states, 0, s.state_floats() * sizeof(float));
            for (int64_t i = from; i < to; ++i) run(b, dir, tile_of(dir, i), carry, second);
        };
        if (split == Split::ITEMS) {
#pragma omp for schedule(static)
            for (int64_t b = 0; b < s.batch; ++b)
                for (int dir = 0; dir < 2; ++dir) direction(b, dir, 0, s.tiles, carried_of(slot), dir == 1);
            return;
        }
        for (int half = 0; half < 2; ++half) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < 2 * s.batch; ++i) {
                const int64_t middle = i % 2 ? s.tiles - s.tiles / 2 : s.tiles / 2;
                direction(i / 2, (int)(i % 2), half ? middle : 0, half ? s.tiles : middle, carried_of(i), half == 1);
            }
        }
    }

    // The phases where channels are split: "scan" of a group,
    void scan_group(int64_t b, int dir, int64_t group, int64_t slot) const {
        const int64_t first = group * s.vectors / groups, last = (group + 1) * s.vectors / groups;
        const Scratch k = scratch_of(slot);
        const Carried carry = carried_of(slot);
        memset(carry.states, 0, s.state_floats() * sizeof(float));
        for (int64_t i = 0; i < s.tiles; ++i) {
            const int64_t tile = tile_of(dir, i);
            this->convolve(b, dir, tile, first, last, k);
            this->scan_backward(b, dir, tile, first, last, conv_of(b, dir) + tile * TILE * s.padded,
                                rows_of(b, group, dir), sums_of(slot, dir), k, carry.states, dir == 1);
        }
    }

    // "project" of a tile after the groups' drows are summed,
    void project_tile(int64_t b, int dir, int64_t tile, int64_t slot) const {
        float* total = rows_of(b, 0, dir);
        const int64_t from = tile * TILE * s.row, to = from + s.tokens(tile) * s.row;
        for (int64_t g = 1; g < groups; ++g)
            for (int64_t i = from; i < to; i += VL)
                store(total + i, load(total + i) + load(rows_of(b, g, dir) + i));
        const Scratch k = scratch_of(slot);
        this->convolve(b, dir, tile, 0, s.vectors, k);
        float* dx = conv_of(b, dir) + tile * TILE * s.padded;
        this->project_backward(dir, tile, dx, dx, total, sums_of(slot, dir), k);
    }

    // and "filter" of a tile. The two windows fit where the states' tiles were.
    void filter_both_of(int64_t b, int64_t tile, int64_t slot) const {
        float* const both[2] = {conv_of(b, 0), conv_of(b, 1)};
        GradientSums mine[2] = {sums_of(slot, 0), sums_of(slot, 1)};
        static_assert(sizeof(BackwardTile) >= 2 * (TILE + 3) * VL * sizeof(float), "two windows fit");
        this->filter_both(b, tile, both, mine, (float*)scratch_of(slot).tiles);
    }

    void run_split(int64_t slot) const {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < 2 * s.batch * groups; ++i)
            scan_group(i / (2 * groups), (int)(i % 2), i / 2 % groups, slot);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < 2 * s.batch * s.tiles; ++i)
            project_tile(i / (2 * s.tiles), (int)(i % 2), i / 2 % s.tiles, slot);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < s.batch * s.tiles; ++i) filter_both_of(i / s.tiles, i % s.tiles, slot);
    }
};

// Takes what a call needs from the workspace.
template <class T> void take_backward(Arena& arena, BackwardCall<T>& op, Split split, int64_t threads) {
    using Call = BackwardCall<T>;
    const BimambaShape& s = op.s;
    const bool whole_channels = split != Split::CHANNELS, is_wide = sizeof(T) == sizeof(float);
    for (int dir = 0; dir < 2; ++dir) take_packed(arena, s, op.packed[dir], true);
    op.carried = arena.take((split == Split::DIRECTIONS ? 2 * s.batch : threads) * Call::Carried::floats(s));
    op.drows = arena.take(s.batch * op.groups * 2 * s.saved_rows());
    op.sums = arena.take(threads * 2 * GradientSums::floats(s));
    op.scratch = arena.take(threads * Call::Scratch::floats(s));
    op.partial = whole_channels && !is_wide ? arena.take(s.batch * s.length * s.padded) : nullptr;
    op.dx_conv = whole_channels ? nullptr : arena.take(s.batch * 2 * s.length * s.padded);
}

// Before and after the work of a call's parallel region: sums from zero, and over all threads in a fixed order.
template <class T> void begin_sums(const BackwardCall<T>& op, int64_t threads) {
    const int64_t floats = 2 * GradientSums::floats(op.s);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < threads; ++i) memset(op.sums + i * floats, 0, floats * sizeof(float));
}

template <class T> void finish_sums(const BackwardCall<T>& op, int64_t threads) {
    const int64_t floats = 2 * GradientSums::floats(op.s);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < floats; i += VL) {
        vf total = load(op.sums + i);
        for (int64_t other = 1; other < threads; ++other) total += load(op.sums + other * floats + i);
        store(op.sums + i, total);
    }
}

template <class T> int bimamba_backward(const BimambaArguments& a) {
    BackwardCall<T> op(a);
    const int64_t threads = larger<int64_t>(1, a.threads);
    const Split split = choose_split(op.s, threads, &op.groups);

    Arena arena;
    for (int pass = 0; pass < 2; ++pass) {
        arena.used = 0;
        take_backward(arena, op, split, threads);
        if (pass == 0 && !(arena.base = mamba_ssm_workspace(arena.used))) return 1;
    }

#pragma omp parallel num_threads((int)threads)
    {
        const FlushSubnormals flush;
        const int64_t slot = omp_get_thread_num();
        op.pack_directions();
        begin_sums(op, threads);
        if (split == Split::CHANNELS)
            op.run_split(slot);
        else
            op.run_whole(split, slot, [&](int64_t b, int dir, int64_t tile, auto carry, bool second) {
                op.run_tile(b, dir, tile, slot, carry, second);
            });
        finish_sums(op, threads);
    }
    for (int dir = 0; dir < 2; ++dir) unpack_gradients(op.s, a.gradients[dir], op.sums_of(0, dir), dir == 1);
    return 0;
}

}  // namespace
