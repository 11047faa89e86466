// The bidirectional mixer between its two projections: convolution, x_proj, time step, scan, gate, in both
// directions, from xz (B, L, 2 D) to y (B, L, D).
//
// Lanes are channels. Time is cut into tiles of TILE tokens; of a tile, the convolved x of all channels stays in
// the second-level cache while x_proj, the time steps and the states are computed from it. The second direction
// runs the same code with rows in descending order; its filter taps are packed in reversed order. Of the two
// directions' scans, the one that comes to a tile second adds the other's output, gates and stores.
//
// Three ways to keep the threads busy, by batch size: whole batch items; batch items times directions, which meet
// in the middle of the sequence; and channels in groups, where x_proj is a phase of its own and the convolution is
// computed twice, which is cheaper than to write it to memory and read it again.
#pragma once

#include "arguments.h"
#include "gemm.h"
#include "schedule.h"
#include "state.h"
#include "threads.h"
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

// x_proj's weight transposed, with the columns of the padded projected row: (padded, row).
void pack_x_proj_in(const BimambaShape& s, const float* x_proj, float* packed) {
    for (int64_t column = 0; column < s.row; column += VL)
        for (int64_t c = 0; c < s.padded; c += VL) {
            const int lanes = s.lanes(c / VL);
            vf block[VL];
            for (int i = 0; i < VL; ++i) {
                const int64_t row = column + i < s.columns ? x_proj_row(s, column + i) : -1;
                block[i] = row < 0 ? vf{} : load(x_proj + row * s.channels + c, lanes);
            }
            transpose(block);
            for (int i = 0; i < VL; ++i) store(packed + (c + i) * s.row + column, block[i]);
        }
}

void pack_direction(const BimambaShape& s, const Direction<const float>& d, PackedDirection& p, bool reversed) {
    memset(p.vectors, 0, s.vectors * VectorParameters::floats(s) * sizeof(float));
    for (int64_t v = 0; v < s.vectors; ++v)
        copy_vector<const float>(s, VectorParameters(p.vectors, s, v), d, v, reversed,
                                 [](float* packed, const float* plain) { *packed = *plain; });
    if (p.x_proj_in) pack_x_proj_in(s, d.x_proj, p.x_proj_in);
    for (int64_t column = 0; p.x_proj_out && column < s.columns; ++column) {
        const int64_t row = x_proj_row(s, column);
        memset(p.x_proj_out + column * s.padded, 0, s.padded * sizeof(float));
        if (row >= 0)
            memcpy(p.x_proj_out + column * s.padded, d.x_proj + row * s.channels, s.channels * sizeof(float));
    }
    if (p.dt_rows) {
        memset(p.dt_rows, 0, s.padded * s.rank_row * sizeof(float));
        for (int64_t c = 0; c < s.channels; ++c)
            memcpy(p.dt_rows + c * s.rank_row, d.dt_weight + c * s.rank, s.rank * sizeof(float));
    }
}

// Everything a forward or backward call shares between its threads.
template <class T> struct Bimamba {
    const BimambaArguments& a;
    BimambaShape s;
    PackedDirection packed[2];

    explicit Bimamba(const BimambaArguments& arguments) : a(arguments), s(arguments) {}

    // By the threads of the enclosing parallel region.
    void pack_directions() {
#pragma omp for schedule(static)
        for (int dir = 0; dir < 2; ++dir) pack_direction(s, a.parameters[dir], packed[dir], dir == 1);
    }

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
    // The rows that the filter's taps see at token t, null outside the sequence. Direction 1 looks ahead.
    INLINE void taps(int64_t b, int dir, int64_t t, const T** rows) const {
        for (int64_t k = 0; k < s.width; ++k) {
            const int64_t at = t + k + (dir == 0 ? 1 - s.width : 0);
            rows[k] = at < 0 || at >= s.length ? nullptr : x_rows(b, 0) + at * a.xz_token;
        }
    }

    // Convolved x of a tile's vectors [first, last) into tile_x (TILE, padded), and with SLOPE the derivative of its
    // SiLU into slope.
    template <int WIDTH, bool SLOPE>
    void convolve_tile(int64_t b, int dir, int64_t tile, int64_t first, int64_t last, float* tile_x,
                       float* slope) const {
        const int64_t step = VectorParameters::floats(s);
        const T* rows[WIDTH];
        for (int t = 0; t < s.tokens(tile); ++t) {
            taps(b, dir, tile * TILE + t, rows);
            const float* p = packed[dir].vectors + first * step;  // [WIDTH] taps, then the bias
            for (int64_t v = first; v < last; ++v, p += step) {
                const int lanes = s.lanes(v);
                vf raw = load(p + WIDTH * VL);
                UNROLL for (int k = 0; k < WIDTH; ++k)
                    if (rows[k]) raw = fma(load(p + k * VL), load(rows[k] + v * VL, lanes), raw);
                vf sig = sigmoid(raw);
                store(tile_x + t * s.padded + v * VL, raw * sig);
                if (SLOPE) store(slope + t * s.padded + v * VL, silu_slope(raw, sig));
            }
        }
    }

    void convolve_any(int64_t b, int dir, int64_t tile, int64_t first, int64_t last, float* tile_x,
                      float* slope = nullptr) const {
#define CONVOLVE(WIDTH) (slope ? &Bimamba::convolve_tile<WIDTH, true> : &Bimamba::convolve_tile<WIDTH, false>)
        auto convolve = s.width == 4   ? CONVOLVE(4)
                        : s.width == 3 ? CONVOLVE(3)
                        : s.width == 2 ? CONVOLVE(2)
                                       : CONVOLVE(1);
#undef CONVOLVE
        (this->*convolve)(b, dir, tile, first, last, tile_x, slope);
    }

    // Adds an array's rows of another tile to what is fetched ahead. row0: row 0 of the sequence.
    template <class U> INLINE void fetch_tile(Ahead& ahead, int i, const U* row0, int64_t step, int64_t tile) const {
        if (tile < 0 || tile >= s.tiles) return;
        // The last tile is shorter than the loop that fetches it may be, so stay within it.
        const int64_t first = smaller(tile * TILE, larger<int64_t>(0, s.length - TILE));
        ahead.row[i] = (const char*)(row0 + first * step);
        ahead.step[i] = step * (int64_t)sizeof(U);
        ahead.any = true;
    }

    // rows (tokens, row) <- x_proj of a tile's convolved x.
    void project(int dir, int tokens, const float* tile_x, float* rows) const {
        memset(rows, 0, tokens * s.row * sizeof(float));
        gemm_add(tokens, s.row, s.padded, tile_x, s.padded, 1, packed[dir].x_proj_in, s.row, rows, s.row);
    }

    struct Tile {
        alignas(64) float d[TILE * VL], dx[TILE * VL], y[TILE * VL];
    };

    // Time step d (in units of EXP_UNIT) and d * x of a tile for one vector: rows, x start at its first token. Four
    // tokens at a time, so that a weight is loaded once for them. With SLOPE also the softplus' derivative.
    template <bool SLOPE>
    INLINE void time_steps(const VectorParameters& p, int tokens, const float* rows, const float* x, float* d,
                           float* dx, float* slope) const {
        for (int t = 0; t < tokens; t += 4) {
            const int last = tokens - 1 - t;  // a short block computes its last token again
            const float* row[4];
            vf raw[4];
            UNROLL for (int i = 0; i < 4; ++i) {
                row[i] = rows + (t + smaller(i, last)) * s.row;
                raw[i] = load(p.dt_bias);
            }
            for (int64_t r = 0; r < s.rank; ++r) {
                vf w = load(p.dt + r * VL);
                UNROLL for (int i = 0; i < 4; ++i) raw[i] = fma(set1(row[i][r]), w, raw[i]);
            }
            UNROLL for (int i = 0; i < 4; ++i) {
                const int at = (t + smaller(i, last)) * VL;
                vf e = exp_minus(vabs(raw[i])), step = softplus(raw[i], e);
                store(d + at, step);
                store(dx + at, step * EXP_UNIT * load(x + (t + smaller(i, last)) * s.padded));
                if (SLOPE) store(slope + at, softplus_slope(raw[i], e));
            }
        }
    }

    // Rows of a tile: of the gate z and of the output y. Null: another direction comes later and writes y.
    struct Gate {
        const T* z = nullptr;
        int64_t z_step = 0;
        T* y = nullptr;
        int64_t y_step = 0;
        const T* z_all = nullptr;  // row 0 of the sequence, where the next tile's z is to be fetched ahead
    };
    Gate gate_of(int64_t b, int64_t tile) const {
        return {z_rows(b, 0) + tile * TILE * a.xz_token, a.xz_token, y_rows(b, 0) + tile * TILE * s.channels,
                s.channels, z_rows(b, 0)};
    }

    // A direction's scan of a tile over vectors [first, last). rows: the tile's projected rows; sum: row 0 of the
    // sequence, which with a gate holds the other direction's output, so complete it and write y.
    void scan(int64_t b, int dir, int64_t tile, int64_t first, int64_t last, const float* rows, const float* tile_x,
              float* state, float* sum, int64_t sum_step, Gate gate) const {
        const int n = s.tokens(tile), start = dir == 0 ? 0 : n - 1;
        const int64_t sign = dir == 0 ? 1 : -1, t0 = tile * TILE, per_vector = s.padded_states * VL;
        const float* row = rows + start * s.row;
        Tile work;
        for (int64_t v = first; v < last; ++v) {
            Ahead ahead;
            fetch_tile(ahead, 0, x_rows(b, v), a.xz_token, tile + sign);
            fetch_tile(ahead, 1, sum + v * VL, sum_step, tile + sign);
            if (gate.z_all) fetch_tile(ahead, 2, gate.z_all + v * VL, gate.z_step, tile + sign);
            VectorParameters p(packed[dir].vectors, s, v);
            const float* x = tile_x + v * VL;
            float *h = state + v * per_vector, *total = sum + t0 * sum_step + v * VL;
            time_steps<false>(p, n, rows, x, work.d, work.dx, nullptr);
            if (a.saved)
                memcpy(saved_states(b, dir) + tile * s.state_floats() + v * per_vector, h, per_vector * sizeof(float));
            scan_tile<true>(s.padded_states, n, work.d + start * VL, work.dx + start * VL, sign * VL,
                            {row + s.B_at, sign * s.row, false}, {row + s.C_at, sign * s.row, false}, p.A, h,
                            work.y + start * VL, ahead);
            gate.y ? put_output(gate, v, n, load(p.D), x, work.y, total, sum_step)
                   : put_sum(v, n, load(p.D), x, work.y, total, sum_step);
        }
    }

    // sum <- y + D x.
    INLINE void put_sum(int64_t v, int n, vf D, const float* x, const float* y, float* sum, int64_t sum_step) const {
        const int lanes = sum_step == s.padded ? VL : s.lanes(v);
        for (int t = 0; t < n; ++t)
            store(sum + t * sum_step, fma(D, load(x + t * s.padded), load(y + t * VL)), lanes);
    }

    // The gated output from both directions' y + D x.
    INLINE void put_output(const Gate& gate, int64_t v, int n, vf D, const float* x, const float* y, float* sum,
                           int64_t sum_step) const {
        const int lanes = s.lanes(v), sum_lanes = sum_step == s.padded ? VL : lanes;
        const vf scale = set1((float)a.scale);
        for (int t = 0; t < n; ++t) {
            vf total = fma(D, load(x + t * s.padded), load(y + t * VL)) + load(sum + t * sum_step, sum_lanes);
            if (a.saved) store(sum + t * sum_step, total, sum_lanes);
            vf z = load(gate.z + t * gate.z_step + v * VL, lanes);
            store(gate.y + t * gate.y_step + v * VL, total * scale * silu(z), lanes);
        }
    }
};

// How a call is dealt out: whole batch items, items times directions, or groups of channels.
enum class Split { ITEMS, DIRECTIONS, CHANNELS };

inline Split choose_split(const BimambaShape& s, int64_t threads, int64_t* groups) {
    *groups = channel_groups(s.batch, s.vectors, threads);
    if (*groups == 1) return Split::ITEMS;
    if (channel_groups(2 * s.batch, s.vectors, threads) == 1) return *groups = 1, Split::DIRECTIONS;
    return Split::CHANNELS;
}

template <class T> struct BimambaForward : Bimamba<T> {
    using Bimamba<T>::a;
    using Bimamba<T>::s;
    using typename Bimamba<T>::Gate;
    explicit BimambaForward(const BimambaArguments& arguments) : Bimamba<T>(arguments) {}

    float *rows = nullptr, *sums = nullptr, *tile_x = nullptr, *states = nullptr;
    bool sum_in_y = false;

    float* sum_of(int64_t b) const {
        return a.saved ? this->saved_sum(b) : sum_in_y ? (float*)this->y_rows(b, 0) : sums + b * s.length * s.padded;
    }
    int64_t sum_step() const { return sum_in_y ? s.channels : s.padded; }
    float* rows_of(int64_t b, int dir) const {
        return a.saved ? this->saved_rows(b, dir) : rows + (2 * b + dir) * s.saved_rows();
    }

    // A tile of one direction, everything fused.
    void run_tile(int64_t b, int dir, int64_t tile, float* state, float* x, Gate gate) const {
        float* tile_rows = rows_of(b, dir) + tile * TILE * s.row;
        this->convolve_any(b, dir, tile, 0, s.vectors, x);
        this->project(dir, s.tokens(tile), x, tile_rows);
        this->scan(b, dir, tile, 0, s.vectors, tile_rows, x, state, sum_of(b), sum_step(), gate);
    }

    // All of a direction for one group of channels, from projected rows.
    void run_group(int64_t b, int dir, int64_t first, int64_t last, float* state, float* x) const {
        memset(state, 0, s.state_floats() * sizeof(float));
        for (int64_t i = 0; i < s.tiles; ++i) {
            const int64_t tile = dir == 0 ? i : s.tiles - 1 - i;
            this->convolve_any(b, dir, tile, first, last, x);
            this->scan(b, dir, tile, first, last, rows_of(b, dir) + tile * TILE * s.row, x, state, sum_of(b),
                       sum_step(), dir == 1 ? this->gate_of(b, tile) : Gate{});
        }
    }

    // What a call needs from the workspace; own_sums: also the sum of both directions.
    void take(Arena& arena, Split split, int64_t threads, bool own_sums) {
        for (int dir = 0; dir < 2; ++dir) take_packed(arena, s, this->packed[dir], false);
        rows = arena.take(a.saved ? 0 : s.batch * 2 * s.saved_rows());
        sums = arena.take(own_sums ? s.batch * s.length * s.padded : 0);
        tile_x = arena.take(threads * TILE * s.padded);
        states = arena.take((split == Split::DIRECTIONS ? 2 * s.batch : threads) * s.state_floats());
    }

    // Deals out all tiles to the threads of the enclosing parallel region, for splits of whole channels.
    // run(b, dir, tile, state, x, second) does one of them; what it needs of the same direction comes before it.
    template <class Run> void run_whole(Split split, int64_t slot, Run run) const {
        float* x = tile_x + slot * TILE * s.padded;
        auto direction = [&](int64_t b, int dir, int64_t from, int64_t to, float* state, bool second) {
            if (from == 0) memset(state, 0, s.state_floats() * sizeof(float));
            for (int64_t i = from; i < to; ++i) run(b, dir, dir == 0 ? i : s.tiles - 1 - i, state, x, second);
        };
        if (split == Split::ITEMS) {
#pragma omp for schedule(dynamic)
            for (int64_t b = 0; b < s.batch; ++b)
                for (int dir = 0; dir < 2; ++dir)
                    direction(b, dir, 0, s.tiles, states + slot * s.state_floats(), dir == 1);
            return;
        }
        // Direction 0 does the first half of its tiles while direction 1 does the rest of them, then they swap.
        for (int half = 0; half < 2; ++half) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < 2 * s.batch; ++i) {
                const int64_t middle = i % 2 ? s.tiles - s.tiles / 2 : s.tiles / 2;
                direction(i / 2, (int)(i % 2), half ? middle : 0, half ? s.tiles : middle,
                          states + i * s.state_floats(), half == 1);
            }
        }
    }

    // The same for groups of channels: all projected rows first.
    void run_split(int64_t groups, int64_t slot) const {
        float *x = tile_x + slot * TILE * s.padded, *state = states + slot * s.state_floats();
#pragma omp for schedule(static)
        for (int64_t i = 0; i < 2 * s.batch * s.tiles; ++i) {
            const int64_t b = i / (2 * s.tiles), tile = i % s.tiles;
            const int dir = (int)(i / s.tiles % 2);
            this->convolve_any(b, dir, tile, 0, s.vectors, x);
            this->project(dir, s.tokens(tile), x, rows_of(b, dir) + tile * TILE * s.row);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < s.batch * groups; ++i)
            for (int dir = 0; dir < 2; ++dir)
                run_group(i / groups, dir, i % groups * s.vectors / groups, (i % groups + 1) * s.vectors / groups,
                          state, x);
    }
};

template <class T> int bimamba_forward(const BimambaArguments& a) {
    BimambaForward<T> op(a);
    const int64_t threads = larger<int64_t>(1, a.threads);
    int64_t groups;
    const Split split = choose_split(op.s, threads, &groups);
    op.sum_in_y = !a.saved && sizeof(T) == sizeof(float);

    Arena arena;
    for (int pass = 0; pass < 2; ++pass) {
        arena.used = 0;
        op.take(arena, split, threads, !a.saved && !op.sum_in_y);
        if (pass == 0 && !(arena.base = mamba_ssm_workspace(arena.used))) return 1;
    }

#pragma omp parallel num_threads((int)threads)
    {
        const FlushSubnormals flush;
        const int64_t slot = omp_get_thread_num();
        op.pack_directions();
        if (split == Split::CHANNELS)
            op.run_split(groups, slot);
        else
            op.run_whole(split, slot, [&](int64_t b, int dir, int64_t tile, float* state, float* x, bool second) {
                op.run_tile(b, dir, tile, state, x, second ? op.gate_of(b, tile) : typename BimambaForward<T>::Gate{});
            });
    }
    return 0;
}

}  // namespace
