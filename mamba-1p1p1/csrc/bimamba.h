// The bidirectional mixer between its two projections: convolution, x_proj, time step, scan, gate, in both
// directions, from xz (B, L, 2 D) to y (B, L, D), and its gradients.
//
// Lanes are channels. Time is cut into tiles of TILE tokens. Phase "project" computes, per tile, both
// convolutions and x_proj of their outputs: nothing but the R + 2 N projected numbers per token is kept. Phase
// "scan" recomputes the convolution of one vector of channels (cheaper than memory traffic), then time step and
// states; the second direction's scan adds the first one's output, gates and stores. The second direction runs
// the same code with rows in descending order; its filter taps are packed in reversed order.
#pragma once

#include <omp.h>

#include "arguments.h"
#include "gemm.h"
#include "schedule.h"
#include "state.h"
#include "workspace.h"

namespace {

struct BimambaShape {
    int64_t batch, length, channels, states, rank, width;
    int64_t vectors, padded;  // channels in vectors, and rounded up to whole ones
    int64_t tiles, padded_states;
    int64_t B_at, C_at, columns, row;  // a projected row: [rank][padded_states][padded_states], then padding
    int64_t rank_row;                  // rank rounded up to whole vectors

    explicit BimambaShape(const BimambaArguments& a)
        : batch(a.batch), length(a.length), channels(a.channels), states(a.states), rank(a.rank), width(a.width) {
        padded = round_up(channels, VL);
        vectors = padded / VL;
        tiles = (length + TILE - 1) / TILE;
        padded_states = round_up(states, 8);
        B_at = rank;
        C_at = rank + padded_states;
        columns = rank + 2 * padded_states;
        row = round_up(columns, VL);
        rank_row = round_up(rank, VL);
    }

    int lanes(int64_t v) const { return (int)smaller<int64_t>(VL, channels - v * VL); }
    int tokens(int64_t tile) const { return (int)smaller<int64_t>(TILE, length - tile * TILE); }
    int64_t state_floats() const { return vectors * padded_states * VL; }

    // Of `saved`, per direction and batch item: states, projected rows; then the sum of both directions.
    int64_t saved_states() const { return tiles * state_floats(); }
    int64_t saved_rows() const { return length * row; }
    int64_t saved_floats() const { return batch * (2 * (saved_states() + saved_rows()) + length * padded); }
};

// A direction's parameters, per vector of channels in the order of use; gradients are added up in the same form.
struct VectorParameters {
    float *conv, *conv_bias, *dt, *dt_bias, *D, *A;

    VectorParameters(float* base, const BimambaShape& s, int64_t v) {
        float* p = base + v * floats(s);
        conv = p, p += s.width * VL;
        conv_bias = p, p += VL;
        dt = p, p += s.rank * VL;
        dt_bias = p, p += VL;
        D = p, p += VL;
        A = p;
    }
    static int64_t floats(const BimambaShape& s) { return (s.width + s.rank + 3 + s.padded_states) * VL; }
};

struct PackedDirection {
    float* vectors;     // VectorParameters
    float* x_proj_in;   // (padded, row): transposed, for the forward product
    float* x_proj_out;  // (columns, padded), for its gradient
    float* dt_rows;     // (padded, rank_row)
};

void take_packed(Arena& arena, const BimambaShape& s, PackedDirection& p, bool backward) {
    p.vectors = arena.take(s.vectors * VectorParameters::floats(s));
    p.x_proj_in = backward ? nullptr : arena.take(s.padded * s.row);
    p.x_proj_out = backward ? arena.take(s.columns * s.padded) : nullptr;
    p.dt_rows = backward ? arena.take(s.padded * s.rank_row) : nullptr;
}

// Which row of x_proj's weight a column of the padded projected row is, or -1.
int64_t x_proj_row(const BimambaShape& s, int64_t column) {
    if (column < s.rank) return column;
    int64_t n = (column - s.rank) % s.padded_states, C = (column - s.rank) / s.padded_states;
    return n < s.states && C < 2 ? s.rank + C * s.states + n : -1;
}

// One vector's parameters, or with `unpack` its gradients the other way round.
template <class F>
void copy_vector(const BimambaShape& s, VectorParameters p, const Direction<F>& d, int64_t v, bool reversed,
                 void (*copy)(float* packed, F* plain)) {
    for (int i = 0; i < s.lanes(v); ++i) {
        int64_t c = v * VL + i;
        for (int64_t k = 0; k < s.width; ++k)
            copy(p.conv + (reversed ? s.width - 1 - k : k) * VL + i, d.conv_weight + c * s.width + k);
        if (d.conv_bias) copy(p.conv_bias + i, d.conv_bias + c);
        for (int64_t r = 0; r < s.rank; ++r) copy(p.dt + r * VL + i, d.dt_weight + c * s.rank + r);
        copy(p.dt_bias + i, d.dt_bias + c);
        copy(p.D + i, d.D + c);
        for (int64_t n = 0; n < s.states; ++n) copy(p.A + n * VL + i, d.A + c * s.states + n);
    }
}

void pack_direction(const BimambaShape& s, const Direction<const float>& d, PackedDirection& p, bool reversed) {
    memset(p.vectors, 0, s.vectors * VectorParameters::floats(s) * sizeof(float));
    for (int64_t v = 0; v < s.vectors; ++v)
        copy_vector<const float>(s, VectorParameters(p.vectors, s, v), d, v, reversed,
                                 [](float* packed, const float* plain) { *packed = *plain; });
    for (int64_t column = 0; column < s.row; ++column) {
        int64_t row = x_proj_row(s, column);
        for (int64_t c = 0; c < s.padded; ++c) {
            float w = row >= 0 && c < s.channels ? d.x_proj[row * s.channels + c] : 0.f;
            if (p.x_proj_in) p.x_proj_in[c * s.row + column] = w;
            if (p.x_proj_out && column < s.columns) p.x_proj_out[column * s.padded + c] = w;
        }
    }
    if (p.dt_rows) {
        memset(p.dt_rows, 0, s.padded * s.rank_row * sizeof(float));
        for (int64_t c = 0; c < s.channels; ++c)
            memcpy(p.dt_rows + c * s.rank_row, d.dt_weight + c * s.rank, s.rank * sizeof(float));
    }
}

// Rows [from, to) of one vector of channels, zeros outside the sequence. rows: row 0 of the sequence.
template <class T>
INLINE void load_window(const T* rows, int64_t step, int64_t from, int64_t to, int64_t length, int lanes, float* out) {
    for (int64_t t = from; t < to; ++t, out += VL)
        store(out, t < 0 || t >= length ? vf{} : load(rows + t * step, lanes));
}

INLINE vf convolve(const VectorParameters& p, int64_t width, const float* window) {
    vf sum = load(p.conv_bias);
    for (int64_t k = 0; k < width; ++k) sum = fma(load(p.conv + k * VL), load(window + k * VL), sum);
    return sum;
}

// raw[t] = dt_bias + W_dt row[t], four tokens at a time so that a weight is loaded once for them.
void project_time_step(const VectorParameters& p, const BimambaShape& s, int tokens, const float* rows, float* raw) {
    int t = 0;
    for (; t + 4 <= tokens; t += 4) {
        vf sum[4];
        UNROLL for (int i = 0; i < 4; ++i) sum[i] = load(p.dt_bias);
        for (int64_t r = 0; r < s.rank; ++r) {
            vf w = load(p.dt + r * VL);
            UNROLL for (int i = 0; i < 4; ++i) sum[i] = fma(set1(rows[(t + i) * s.row + r]), w, sum[i]);
        }
        UNROLL for (int i = 0; i < 4; ++i) store(raw + (t + i) * VL, sum[i]);
    }
    for (; t < tokens; ++t) {
        vf sum = load(p.dt_bias);
        for (int64_t r = 0; r < s.rank; ++r) sum = fma(set1(rows[t * s.row + r]), load(p.dt + r * VL), sum);
        store(raw + t * VL, sum);
    }
}

INLINE void prefetch_rows(const void* first, int64_t step_bytes, int rows) {
    const char* p = (const char*)first;
    for (int t = 0; t < rows; ++t, p += step_bytes) __builtin_prefetch(p);
}

// Everything a forward or backward call shares between its threads.
template <class T> struct Bimamba {
    const BimambaArguments& a;
    BimambaShape s;
    PackedDirection packed[2];

    explicit Bimamba(const BimambaArguments& arguments) : a(arguments), s(arguments) {}

    const T* x_rows(int64_t b, int64_t v) const { return (const T*)a.xz + b * a.xz_batch + v * VL; }
    const T* z_rows(int64_t b, int64_t v) const { return x_rows(b, v) + s.channels; }
    T* y_rows(int64_t b, int64_t v) const { return (T*)a.y + b * s.length * s.channels + v * VL; }
    float* saved_states(int64_t b, int dir) const { return a.saved + (2 * b + dir) * s.saved_states(); }
    float* saved_rows(int64_t b, int dir) const {
        return a.saved + 2 * s.batch * s.saved_states() + (2 * b + dir) * s.saved_rows();
    }
    float* saved_sum(int64_t b) const {
        return a.saved + 2 * s.batch * (s.saved_states() + s.saved_rows()) + b * s.length * s.padded;
    }
    // First row of the window that the filter reaches from a tile's first token.
    int64_t reach(int dir) const { return dir == 0 ? 1 - s.width : 0; }

    // Both convolutions of a tile and x_proj of them. tile_x: scratch (2, TILE, padded).
    void project_tile(int64_t b, int64_t tile, float* const rows[2], float* tile_x) const {
        const int n = s.tokens(tile);
        const int64_t t0 = tile * TILE;
        float window[(TILE + 2 * 8) * VL];
        for (int64_t v = 0; v < s.vectors; ++v) {
            load_window(x_rows(b, v), a.xz_token, t0 + 1 - s.width, t0 + n + s.width - 1, s.length, s.lanes(v),
                        window);
            for (int dir = 0; dir < 2; ++dir) {
                VectorParameters p(packed[dir].vectors, s, v);
                const float* from = window + (dir == 0 ? 0 : s.width - 1) * VL;
                float* to = tile_x + dir * TILE * s.padded + v * VL;
                for (int t = 0; t < n; ++t) store(to + t * s.padded, silu(convolve(p, s.width, from + t * VL)));
            }
        }
        for (int dir = 0; dir < 2; ++dir) {
            float* out = rows[dir] + t0 * s.row;
            memset(out, 0, n * s.row * sizeof(float));
            gemm_add(n, s.row, s.padded, tile_x + dir * TILE * s.padded, s.padded, 1, packed[dir].x_proj_in, s.row, out,
                     s.row);
        }
    }

    struct Tile {
        alignas(64) float window[(TILE + 8) * VL], x[TILE * VL], d[TILE * VL], dx[TILE * VL], y[TILE * VL];
    };

    // Convolved x, time step d (in units of ln 2) and d * x of a tile for one vector of channels.
    INLINE void prepare(int64_t b, int dir, int64_t tile, int64_t v, const float* rows, Tile& out) const {
        const int n = s.tokens(tile);
        const int64_t t0 = tile * TILE, from = t0 + reach(dir);
        VectorParameters p(packed[dir].vectors, s, v);
        load_window(x_rows(b, v), a.xz_token, from, from + n + s.width - 1, s.length, s.lanes(v), out.window);
        project_time_step(p, s, n, rows + t0 * s.row, out.d);
        for (int t = 0; t < n; ++t) {
            vf x = silu(convolve(p, s.width, out.window + t * VL));
            vf d = softplus_log2(load(out.d + t * VL));
            store(out.x + t * VL, x);
            store(out.d + t * VL, d);
            store(out.dx + t * VL, d * LN2 * x);
        }
    }

    // What the next vector (or the next tile's first one) will read, brought closer while this one computes.
    INLINE void prefetch(int64_t b, int dir, int64_t tile, int64_t v, int64_t first, int64_t last, const float* sum,
                         int64_t sum_step) const {
        if (++v == last) v = first, tile += dir == 0 ? 1 : -1;
        if (tile < 0 || tile >= s.tiles) return;
        const int n = s.tokens(tile);
        const int64_t t0 = tile * TILE;
        prefetch_rows(x_rows(b, v) + t0 * a.xz_token, a.xz_token * sizeof(T), n);
        if (dir == 0) return;
        prefetch_rows(z_rows(b, v) + t0 * a.xz_token, a.xz_token * sizeof(T), n);
        prefetch_rows(sum + t0 * sum_step + v * VL, sum_step * sizeof(float), n);
    }

    // One direction's scan over vectors [first, last) of a batch item. sum: (L, sum_step) float32, written by
    // direction 0 and completed by direction 1, which also writes y. state: scratch, state_floats.
    void scan(int64_t b, int dir, int64_t first, int64_t last, const float* rows, float* sum, int64_t sum_step,
              float* state) const {
        const int64_t sign = dir == 0 ? 1 : -1, per_vector = s.padded_states * VL;
        memset(state + first * per_vector, 0, (last - first) * per_vector * sizeof(float));
        Tile tile;
        for (int64_t i = 0; i < s.tiles; ++i) {
            const int64_t index = dir == 0 ? i : s.tiles - 1 - i, t0 = index * TILE;
            const int n = s.tokens(index), start = dir == 0 ? 0 : n - 1;
            const float* row = rows + (t0 + start) * s.row;
            for (int64_t v = first; v < last; ++v) {
                prefetch(b, dir, index, v, first, last, sum, sum_step);
                prepare(b, dir, index, v, rows, tile);
                VectorParameters p(packed[dir].vectors, s, v);
                float* h = state + v * per_vector;
                if (a.saved)
                    memcpy(saved_states(b, dir) + index * s.state_floats() + v * per_vector, h,
                           per_vector * sizeof(float));
                scan_tile<true>(s.padded_states, n, tile.d + start * VL, tile.dx + start * VL, sign * VL,
                                {row + s.B_at, sign * s.row, false}, {row + s.C_at, sign * s.row, false}, p.A, h,
                                tile.y + start * VL);
                if (dir == 0)
                    put_sum(v, n, tile, p, sum + t0 * sum_step + v * VL, sum_step);
                else
                    put_output(b, v, t0, n, tile, p, sum + t0 * sum_step + v * VL, sum_step);
            }
        }
    }

    INLINE void put_sum(int64_t v, int n, const Tile& tile, const VectorParameters& p, float* sum,
                        int64_t sum_step) const {
        const int lanes = sum_step == s.padded ? VL : s.lanes(v);
        const vf D = load(p.D);
        for (int t = 0; t < n; ++t)
            store(sum + t * sum_step, fma(D, load(tile.x + t * VL), load(tile.y + t * VL)), lanes);
    }

    INLINE void put_output(int64_t b, int64_t v, int64_t t0, int n, const Tile& tile, const VectorParameters& p,
                           float* sum, int64_t sum_step) const {
        const int lanes = s.lanes(v), sum_lanes = sum_step == s.padded ? VL : lanes;
        const vf D = load(p.D), scale = set1((float)a.scale);
        const T* z = z_rows(b, v) + t0 * a.xz_token;
        T* y = y_rows(b, v) + t0 * s.channels;
        for (int t = 0; t < n; ++t) {
            vf total = fma(D, load(tile.x + t * VL), load(tile.y + t * VL)) + load(sum + t * sum_step, sum_lanes);
            if (a.saved) store(sum + t * sum_step, total, sum_lanes);
            store(y + t * s.channels, total * scale * silu(load(z + t * a.xz_token, lanes)), lanes);
        }
    }
};

template <class T> int bimamba_forward(const BimambaArguments& a) {
    Bimamba<T> op(a);
    const BimambaShape& s = op.s;
    const int64_t threads = larger<int64_t>(1, a.threads), groups = channel_groups(s.batch, s.vectors, threads);
    const bool whole = groups == 1;  // a thread does whole batch items, else phases are shared
    const int64_t kept = a.saved ? 0 : whole ? threads : s.batch;
    const bool sum_in_y = !a.saved && sizeof(T) == sizeof(float);

    Arena arena;
    float *rows = nullptr, *sums = nullptr, *tile_x = nullptr, *state = nullptr;
    for (int pass = 0; pass < 2; ++pass) {
        arena.used = 0;
        for (int dir = 0; dir < 2; ++dir) take_packed(arena, s, op.packed[dir], false);
        rows = arena.take(kept * 2 * s.saved_rows());
        sums = arena.take(sum_in_y ? 0 : kept * s.length * s.padded);
        tile_x = arena.take(threads * 2 * TILE * s.padded);
        state = arena.take(threads * s.state_floats());
        if (pass == 0 && !(arena.base = mamba_ssm_workspace(arena.used))) return 1;
    }
    for (int dir = 0; dir < 2; ++dir) pack_direction(s, a.parameters[dir], op.packed[dir], dir == 1);

    auto rows_of = [&](int64_t b, int64_t slot, int dir) {
        return a.saved ? op.saved_rows(b, dir) : rows + (2 * (whole ? slot : b) + dir) * s.saved_rows();
    };
    auto scan_unit = [&](int64_t b, int64_t slot, int64_t first, int64_t last) {
        float* sum = a.saved    ? op.saved_sum(b)
                     : sum_in_y ? (float*)op.y_rows(b, 0)
                                : sums + (whole ? slot : b) * s.length * s.padded;
        for (int dir = 0; dir < 2; ++dir)
            op.scan(b, dir, first, last, rows_of(b, slot, dir), sum, sum_in_y ? s.channels : s.padded,
                    state + slot * s.state_floats());
    };
#pragma omp parallel num_threads((int)threads)
    {
        const int64_t slot = omp_get_thread_num();
        float* my_tile_x = tile_x + slot * 2 * TILE * s.padded;
        if (whole) {
#pragma omp for schedule(static)
            for (int64_t b = 0; b < s.batch; ++b) {
                float* const both[2] = {rows_of(b, slot, 0), rows_of(b, slot, 1)};
                for (int64_t tile = 0; tile < s.tiles; ++tile) op.project_tile(b, tile, both, my_tile_x);
                scan_unit(b, slot, 0, s.vectors);
            }
        } else {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < s.batch * s.tiles; ++i) {
                float* const both[2] = {rows_of(i / s.tiles, slot, 0), rows_of(i / s.tiles, slot, 1)};
                op.project_tile(i / s.tiles, i % s.tiles, both, my_tile_x);
            }
#pragma omp for schedule(static)
            for (int64_t i = 0; i < s.batch * groups; ++i) {
                int64_t g = i % groups;
                scan_unit(i / groups, slot, g * s.vectors / groups, (g + 1) * s.vectors / groups);
            }
        }
    }
    return 0;
}

}  // namespace
