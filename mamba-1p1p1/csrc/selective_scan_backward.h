// Gradients of the selective scan in its public form, from the states saved between tiles.
#pragma once

#include "selective_scan.h"

namespace {

template <class T> struct ScanBackward : Scan<T> {
    using Scan<T>::a;
    using Scan<T>::s;
    using Scan<T>::packed;
    explicit ScanBackward(const ScanArguments& arguments) : Scan<T>(arguments) {}

    struct Scratch {
        ScanTile* tiles;                // [blocks]
        float *carry, *states, *dB, *dC;  // carry, states: [blocks][padded_states][VL]
        static int64_t floats(const ScanShape& s) {
            return s.blocks * (int64_t)(sizeof(ScanTile) / sizeof(float)) + 2 * s.blocks * s.block_states +
                   2 * COUPLING + APART;
        }
        Scratch(float* base, const ScanShape& s) {
            tiles = (ScanTile*)base;
            carry = base + s.blocks * (sizeof(ScanTile) / sizeof(float));
            states = carry + s.blocks * s.block_states;
            dB = states + s.blocks * s.block_states;
            dC = dB + COUPLING + APART;
        }
    };

    INLINE void prepare_backward(int64_t b, int64_t tile, int64_t k, ScanTile& out) const {
        const int n = s.tokens(tile), lanes = s.lanes(k);
        this->template prepare<true>(b, tile, k, out);
        load_tile<T>(a.dout, b, s.channel(k), lanes, tile * TILE, n, out.out);
        for (int t = 0; t < n; ++t) {
            vf dout = load(out.out + t * VL);
            store(out.dy + t * VL, a.z.data ? dout * silu(load(out.z + t * VL)) : dout);
        }
        memset(out.g_B, 0, sizeof out.g_B);
        memset(out.g_d, 0, sizeof out.g_d);
        memset(out.y, 0, sizeof out.y);
    }

    INLINE void adjoint(int64_t b, int64_t tile, int64_t k, int64_t n, float* sums, Scratch& w) const {
        const int64_t t0 = tile * TILE, state = k * s.block_states + n * VL;
        BlockParameters p(packed, s, k), grads(sums, s, k);
        ScanTile& x = w.tiles[k];
        Coupling B = this->B_of(b, k, t0, p), C = this->C_of(b, k, t0, p);
        B.data += B.constant ? n * VL : n;
        C.data += C.constant ? n * VL : n;
        TileGradients out{x.g_B, x.g_d, grads.A + n * VL, a.constant_B ? grads.B + n * VL : w.dB,
                          a.constant_C ? grads.C + n * VL : w.dC, w.carry + state};
        (a.z.data ? scan_tile_backward<true> : scan_tile_backward<false>)(
            s.tokens(tile), x.d, x.dx, x.dy, VL, B, C, p.A + n * VL, w.states + state, x.y, out,
            n ? Ahead{} : this->fetch_ahead(b, tile - 1, k));
    }

    // Sums over lanes into rows of dB and dC, (B, G, L, padded_states).
    INLINE void put_matrices(int64_t b, int64_t tile, int64_t k, int64_t n, float* dB, float* dC,
                             const Scratch& w) const {
        for (int t = 0; t < s.tokens(tile); ++t)
            for (int j = 0; j < BACK_GROUP; ++j) {
                const int64_t at = this->matrix_row(b, k, tile * TILE + t) + n + j;
                const int64_t lanes = (t * BACK_GROUP + j) * VL;
                if (!a.constant_B) dB[at] += sum_lanes(load(w.dB + lanes));
                if (!a.constant_C) dC[at] += sum_lanes(load(w.dC + lanes));
            }
    }

    INLINE void finish_tile(int64_t b, int64_t tile, int64_t k, float* sums, ScanTile& x) const {
        const int n = s.tokens(tile), lanes = s.lanes(k);
        const int64_t c = s.channel(k), t0 = tile * TILE;
        const vf D = load(BlockParameters(packed, s, k).D);
        BlockParameters grads(sums, s, k);
        vf dD = {}, dbias = {};
        for (int t = 0; t < n; ++t) {
            const int at = t * VL;
            vf u = load(x.u + at), dy = load(x.dy + at), g_B = load(x.g_B + at);
            vf raw = fma(g_B, u, load(x.g_d + at)) * load(x.slope + at);
            dD = fma(dy, u, dD);
            dbias += raw;
            store(x.g_d + at, raw);
            store(x.g_B + at, fma(g_B, load(x.d + at) * EXP_UNIT, D * dy));
            if (a.z.data) {
                vf z = load(x.z + at), y = fma(D, u, load(x.y + at));
                store(x.y + at, load(x.out + at) * y * silu_slope(z, sigmoid(z)));
            }
        }
        store(grads.D, load(grads.D) + dD);
        store(grads.bias, load(grads.bias) + dbias);
        store_tile<T>(a.du, b, c, lanes, t0, n, x.g_B);
        store_tile<T>(a.ddelta, b, c, lanes, t0, n, x.g_d);
        if (a.z.data) store_tile<T>(a.dz, b, c, lanes, t0, n, x.y);
    }

    void backward(int64_t b, int64_t first, int64_t last, float* sums, float* dB, float* dC, Scratch w) const {
        memset(w.tiles, 0, s.blocks * sizeof(ScanTile));
        memset(w.carry, 0, 2 * s.blocks * s.block_states * sizeof(float));
        if (a.dlast_state)
            for (int64_t k = first; k < last; ++k)
                this->spread_state(a.dlast_state, b, k, w.carry + k * s.block_states);
        for (int64_t tile = s.tiles - 1; tile >= 0; --tile) {
            for (int64_t k = first; k < last; ++k) {
                this->recall_state(b, tile, k, w.states + k * s.block_states);
                prepare_backward(b, tile, k, w.tiles[k]);
            }
            for (int64_t n = 0; n < s.padded_states; n += BACK_GROUP)
                for (int64_t k = first; k < last;) {
                    const int64_t end = smaller(last, (s.group(k) + 1) * s.group_blocks), start = k;
                    memset(w.dB, 0, COUPLING * sizeof(float));
                    memset(w.dC, 0, COUPLING * sizeof(float));
                    for (; k < end; ++k) adjoint(b, tile, k, n, sums, w);
                    put_matrices(b, tile, start, n, dB, dC, w);
                }
            for (int64_t k = first; k < last; ++k) finish_tile(b, tile, k, sums, w.tiles[k]);
        }
    }
};

// Partial sums: each thread has one of the parameters' gradients, each part of the channels one of dB and dC (part
// 0 adds to the result itself).
template <class T> int scan_backward(const ScanArguments& a) {
    ScanBackward<T> op(a);
    const ScanShape& s = op.s;
    using Scratch = typename ScanBackward<T>::Scratch;
    const int64_t threads = larger<int64_t>(1, a.threads), parts = channel_groups(s.batch, s.blocks, threads);
    const int64_t sum_floats = s.blocks * BlockParameters::floats(s);
    const int64_t scratch_floats = round_up(Scratch::floats(s), 16);
    const int64_t B_floats = a.constant_B ? 0 : s.matrix_floats(), C_floats = a.constant_C ? 0 : s.matrix_floats();
    Arena arena;
    float *sums = nullptr, *scratch = nullptr, *partial_B = nullptr, *partial_C = nullptr;
    for (int pass = 0; pass < 2; ++pass) {
        arena.used = 0;
        op.packed = arena.take(sum_floats);
        sums = arena.take(threads * sum_floats);
        scratch = arena.take(threads * scratch_floats);
        partial_B = arena.take((parts - 1) * B_floats);
        partial_C = arena.take((parts - 1) * C_floats);
        if (pass == 0 && !(arena.base = mamba_ssm_workspace(arena.used))) return 1;
    }
    op.pack();
    memset(sums, 0, threads * sum_floats * sizeof(float));
    memset(a.dB, 0, B_floats * sizeof(float));
    memset(a.dC, 0, C_floats * sizeof(float));
    memset(partial_B, 0, (parts - 1) * B_floats * sizeof(float));
    memset(partial_C, 0, (parts - 1) * C_floats * sizeof(float));
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (int64_t i = 0; i < s.batch * parts; ++i) {
        const FlushSubnormals flush;
        const int64_t part = i % parts, slot = omp_get_thread_num();
        op.backward(i / parts, part * s.blocks / parts, (part + 1) * s.blocks / parts, sums + slot * sum_floats,
                    part ? partial_B + (part - 1) * B_floats : a.dB, part ? partial_C + (part - 1) * C_floats : a.dC,
                    Scratch(scratch + slot * scratch_floats, s));
    }
    for (int64_t part = 0; part + 1 < parts; ++part) {
        for (int64_t i = 0; i < B_floats; i += 8) // rows hold a multiple of 8
            for (int j = 0; j < 8; ++j) a.dB[i + j] += partial_B[part * B_floats + i + j];
        for (int64_t i = 0; i < C_floats; i += 8)
            for (int j = 0; j < 8; ++j) a.dC[i + j] += partial_C[part * C_floats + i + j];
    }
    for (int64_t slot = 1; slot < threads; ++slot)
        for (int64_t i = 0; i < sum_floats; i += VL)
            store(sums + i, load(sums + i) + load(sums + slot * sum_floats + i));
    for (int64_t k = 0; k < s.blocks; ++k) {
        BlockParameters grads(sums, s, k);
        for (int64_t i = 0; i < s.block_states; i += VL) store(grads.A + i, load(grads.A + i) * EXP_UNIT);
        copy_block<float>(s, k, grads, a.dA, a.constant_B ? a.dB : nullptr, a.constant_C ? a.dC : nullptr, a.dD,
                          a.ddelta_bias, [](float* packed, float* plain) { *plain = *packed; });
    }
    return 0;
}

}  // namespace
