// Selective scan in its public form: u, delta, z of shape (B, D, L) and any strides, B and C per token in groups of
// channels or constant. Lanes are channels of one group; tokens are contiguous in memory or not, so tiles are
// loaded and stored through a transposition where they are.
#pragma once

#include "arguments.h"
#include "schedule.h"
#include "state.h"
#include "threads.h"
#include "workspace.h"

namespace {

struct ScanShape {
    int64_t batch, length, channels, states, groups;
    int64_t group_channels, group_blocks, blocks;  // blocks: vectors of channels, none across two groups
    int64_t tiles, padded_states, block_states;

    explicit ScanShape(const ScanArguments& a)
        : batch(a.batch), length(a.length), channels(a.channels), states(a.states), groups(a.groups) {
        group_channels = channels / groups;
        group_blocks = (group_channels + VL - 1) / VL;
        blocks = groups * group_blocks;
        tiles = (length + TILE - 1) / TILE;
        padded_states = round_up(states, 8);
        block_states = padded_states * VL;
    }
    int tokens(int64_t tile) const { return (int)smaller<int64_t>(TILE, length - tile * TILE); }
    int64_t group(int64_t k) const { return k / group_blocks; }
    int64_t channel(int64_t k) const { return group(k) * group_channels + k % group_blocks * VL; }
    int lanes(int64_t k) const {
        return (int)smaller<int64_t>(VL, group_channels - k % group_blocks * VL);
    }
    int64_t matrix_floats() const { return batch * groups * length * padded_states; }  // B or C per token
};

// tile[t][lane] <- n tokens of `lanes` channels.
template <class T>
INLINE void load_tile(const Sequence& s, int64_t b, int64_t channel, int lanes, int64_t t0, int n, float* tile) {
    const T* base = (const T*)s.data + b * s.batch + channel * s.channel + t0 * s.token;
    if (s.channel == 1) {
        for (int t = 0; t < n; ++t) store(tile + t * VL, load(base + t * s.token, lanes));
    } else if (s.token == 1) {
        for (int t = 0; t < n; t += VL) {
            vf rows[VL];
            UNROLL for (int i = 0; i < VL; ++i) rows[i] = i < lanes ? load(base + i * s.channel + t, n - t) : vf{};
            transpose(rows);
            UNROLL for (int i = 0; i < VL; ++i) store(tile + (t + i) * VL, rows[i]);
        }
    } else {
        memset(tile, 0, n * VL * sizeof(float));
        for (int t = 0; t < n; ++t)
            for (int i = 0; i < lanes; ++i) tile[t * VL + i] = scalar(base[i * s.channel + t * s.token]);
    }
}

// The way back; tokens of the tensor must be contiguous.
template <class T>
INLINE void store_tile(const Sequence& s, int64_t b, int64_t channel, int lanes, int64_t t0, int n,
                       const float* tile) {
    T* base = (T*)s.data + b * s.batch + channel * s.channel + t0;
    for (int t = 0; t < n; t += VL) {
        vf rows[VL];
        UNROLL for (int i = 0; i < VL; ++i) rows[i] = load(tile + (t + i) * VL);
        transpose(rows);
        for (int i = 0; i < lanes; ++i) store(base + i * s.channel + t, rows[i], n - t);
    }
}

// Adds the lines of a tile to what is fetched ahead.
template <class T>
INLINE void fetch_tile(Ahead& ahead, int i, const Sequence& s, int64_t b, int64_t channel, int64_t t0) {
    if (!s.data) return;
    ahead.row[i] = (const char*)((const T*)s.data + b * s.batch + channel * s.channel + t0 * s.token);
    ahead.step[i] = (s.token == 1 ? s.channel : s.token) * (int64_t)sizeof(T);
    ahead.two_lines[i] = s.token == 1 && TILE * sizeof(T) > 64;
    ahead.any = true;
}

// Per block of channels, in vectors: A and, if constant, B and C by state; D and the bias of delta. Gradients take
// the same form.
struct BlockParameters {
    float *A, *B, *C, *D, *bias;
    static int64_t floats(const ScanShape& s) { return 3 * s.block_states + 2 * VL; }
    BlockParameters(float* base, const ScanShape& s, int64_t k) {
        A = base + k * floats(s);
        B = A + s.block_states;
        C = B + s.block_states;
        D = C + s.block_states;
        bias = D + VL;
    }
};

template <class F>
void copy_block(const ScanShape& s, int64_t k, BlockParameters p, F* A, F* B, F* C, F* D, F* bias,
                void (*copy)(float* packed, F* plain)) {
    for (int i = 0; i < s.lanes(k); ++i) {
        const int64_t c = s.channel(k) + i;
        for (int64_t n = 0; n < s.states; ++n) {
            copy(p.A + n * VL + i, A + c * s.states + n);
            if (B) copy(p.B + n * VL + i, B + c * s.states + n);
            if (C) copy(p.C + n * VL + i, C + c * s.states + n);
        }
        if (D) copy(p.D + i, D + c);
        if (bias) copy(p.bias + i, bias + c);
    }
}

struct ScanTile {
    alignas(64) float u[TILE * VL], d[TILE * VL], dx[TILE * VL], y[TILE * VL], z[TILE * VL], out[TILE * VL];
    float dy[TILE * VL], slope[TILE * VL], g_B[TILE * VL], g_d[TILE * VL];  // backward
};

template <class T> struct Scan {
    const ScanArguments& a;
    ScanShape s;
    float* packed = nullptr;

    explicit Scan(const ScanArguments& arguments) : a(arguments), s(arguments) {}

    void pack() const {
        memset(packed, 0, s.blocks * BlockParameters::floats(s) * sizeof(float));
        for (int64_t k = 0; k < s.blocks; ++k)
            copy_block<const float>(s, k, BlockParameters(packed, s, k), a.A, a.constant_B ? a.B : nullptr,
                                    a.constant_C ? a.C : nullptr, a.D, a.delta_bias,
                                    [](float* packed, const float* plain) { *packed = *plain; });
    }

    int64_t matrix_row(int64_t b, int64_t k, int64_t t) const {
        return ((b * s.groups + s.group(k)) * s.length + t) * s.padded_states;
    }
    Coupling B_of(int64_t b, int64_t k, int64_t t0, const BlockParameters& p) const {
        return a.constant_B ? Coupling{p.B, 0, true} : Coupling{a.B + matrix_row(b, k, t0), s.padded_states, false};
    }
    Coupling C_of(int64_t b, int64_t k, int64_t t0, const BlockParameters& p) const {
        return a.constant_C ? Coupling{p.C, 0, true} : Coupling{a.C + matrix_row(b, k, t0), s.padded_states, false};
    }

    // Saved states, (B, tiles, N, D).
    float* saved_state(int64_t b, int64_t tile, int64_t k) const {
        return a.saved + (b * s.tiles + tile) * s.states * s.channels + s.channel(k);
    }
    void keep_state(int64_t b, int64_t tile, int64_t k, const float* h) const {
        float* to = saved_state(b, tile, k);
        for (int64_t n = 0; n < s.states; ++n) store(to + n * s.channels, load(h + n * VL), s.lanes(k));
    }
    void recall_state(int64_t b, int64_t tile, int64_t k, float* h) const {
        const float* from = saved_state(b, tile, k);
        for (int64_t n = 0; n < s.states; ++n) store(h + n * VL, load(from + n * s.channels, s.lanes(k)));
    }
    // A (B, D, N) tensor's entries of one block.
    void spread_state(const float* plain, int64_t b, int64_t k, float* h) const {
        for (int i = 0; i < s.lanes(k); ++i)
            for (int64_t n = 0; n < s.states; ++n)
                h[n * VL + i] = plain[(b * s.channels + s.channel(k) + i) * s.states + n];
    }
    void put_last_state(int64_t b, int64_t k, const float* h) const {
        for (int i = 0; i < s.lanes(k); ++i)
            for (int64_t n = 0; n < s.states; ++n)
                a.last_state[(b * s.channels + s.channel(k) + i) * s.states + n] = h[n * VL + i];
    }

    // u, d = delta / EXP_UNIT after bias and softplus, d u; with SLOPE also the softplus' derivative.
    template <bool SLOPE> INLINE void prepare(int64_t b, int64_t tile, int64_t k, ScanTile& out) const {
        const int n = s.tokens(tile), lanes = s.lanes(k);
        const int64_t c = s.channel(k), t0 = tile * TILE;
        load_tile<T>(a.u, b, c, lanes, t0, n, out.u);
        load_tile<T>(a.delta, b, c, lanes, t0, n, out.d);
        if (a.z.data) load_tile<T>(a.z, b, c, lanes, t0, n, out.z);
        const vf bias = load(BlockParameters(packed, s, k).bias);
        for (int t = 0; t < n; ++t) {
            vf raw = load(out.d + t * VL) + bias;
            vf d = a.softplus ? softplus(raw) : raw * UNITS_PER_ONE;
            store(out.d + t * VL, d);
            store(out.dx + t * VL, d * EXP_UNIT * load(out.u + t * VL));
            if (SLOPE) store(out.slope + t * VL, a.softplus ? sigmoid(raw) : set1(1.f));
        }
    }

    INLINE Ahead fetch_ahead(int64_t b, int64_t tile, int64_t k) const {
        Ahead ahead;
        if (tile < 0 || tile >= s.tiles) return ahead;
        fetch_tile<T>(ahead, 0, a.u, b, s.channel(k), tile * TILE);
        fetch_tile<T>(ahead, 1, a.delta, b, s.channel(k), tile * TILE);
        fetch_tile<T>(ahead, 2, a.z, b, s.channel(k), tile * TILE);
        return ahead;
    }

    INLINE void forward_tile(int64_t b, int64_t tile, int64_t k, float* h, ScanTile& work) const {
        const int n = s.tokens(tile);
        const int64_t t0 = tile * TILE;
        BlockParameters p(packed, s, k);
        if (a.saved) keep_state(b, tile, k, h);
        prepare<false>(b, tile, k, work);
        scan_tile<true>(s.padded_states, n, work.d, work.dx, VL, B_of(b, k, t0, p), C_of(b, k, t0, p), p.A, h,
                        work.y, fetch_ahead(b, tile + 1, k));
        const vf D = load(p.D);
        for (int t = 0; t < n; ++t) {
            vf y = fma(D, load(work.u + t * VL), load(work.y + t * VL));
            store(work.out + t * VL, a.z.data ? y * silu(load(work.z + t * VL)) : y);
        }
        store_tile<T>(a.out, b, s.channel(k), s.lanes(k), t0, n, work.out);
        if (tile == s.tiles - 1) put_last_state(b, k, h);
    }

    // Blocks [first, last) of a batch item; states: scratch (blocks, block_states). Tokens that are contiguous are
    // read a block at a time, else a tile of all blocks is.
    void forward(int64_t b, int64_t first, int64_t last, float* states) const {
        alignas(64) ScanTile work;
        memset(states + first * s.block_states, 0, (last - first) * s.block_states * sizeof(float));
        memset(&work, 0, sizeof work);
        if (a.u.token == 1) {
            for (int64_t k = first; k < last; ++k)
                for (int64_t tile = 0; tile < s.tiles; ++tile)
                    forward_tile(b, tile, k, states + k * s.block_states, work);
        } else {
            for (int64_t tile = 0; tile < s.tiles; ++tile)
                for (int64_t k = first; k < last; ++k)
                    forward_tile(b, tile, k, states + k * s.block_states, work);
        }
    }
};

template <class T> int scan_forward(const ScanArguments& a) {
    Scan<T> op(a);
    const ScanShape& s = op.s;
    const int64_t threads = larger<int64_t>(1, a.threads), parts = channel_groups(s.batch, s.blocks, threads);
    Arena arena;
    float* states = nullptr;
    for (int pass = 0; pass < 2; ++pass) {
        arena.used = 0;
        op.packed = arena.take(s.blocks * BlockParameters::floats(s));
        states = arena.take(threads * s.blocks * s.block_states);
        if (pass == 0 && !(arena.base = mamba_ssm_workspace(arena.used))) return 1;
    }
    op.pack();
#pragma omp parallel for num_threads((int)threads) schedule(dynamic)
    for (int64_t i = 0; i < s.batch * parts; ++i) {
        const FlushSubnormals flush;
        const int64_t part = i % parts;
        op.forward(i / parts, part * s.blocks / parts, (part + 1) * s.blocks / parts,
                   states + omp_get_thread_num() * s.blocks * s.block_states);
    }
    return 0;
}

}  // namespace
