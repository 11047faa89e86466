// The recurrence h[t] = exp(EXP_UNIT d[t] A) h[t-1] + B[t] x[t], y[t] = <C[t], h[t]>, over a tile of tokens for one
// vector of channels, and its adjoint. NG states at a time stay in registers. d is the time step in units of EXP_UNIT
// and x is delta * u; the direction of time is the sign of the steps.
#pragma once

#include "simd.h"

namespace {

constexpr int TILE = 32;  // tokens between two states that forward saves for backward

// B or C of a tile: per token one row of N numbers shared by all channels; or constant, one vector per state.
struct Coupling {
    const float* data;
    int64_t step;  // from token to token; 0 and `constant` for (D, N)
    bool constant;
};

template <bool CONSTANT> INLINE vf coupling(const float* row, int n) {
    return CONSTANT ? load(row + n * VL) : set1(row[n]);
}

// Rows of other arrays that the next tile will read, brought into the second-level cache one line of each per token:
// the hardware sees no pattern in one or two cache lines a row, and a burst of prefetches would stall.
struct Ahead {
    const char* row[3] = {nearby, nearby, nearby};
    int64_t step[3] = {};    // bytes from row to row
    int two_lines[3] = {};   // 1: two lines of each row, for half as many rows
    bool any = false;
    static constexpr char nearby[64] = {};

    INLINE void fetch(int t) const {
        if (!any) return;
        UNROLL for (int i = 0; i < 3; ++i)
            __builtin_prefetch(row[i] + (t >> two_lines[i]) * step[i] + (t & two_lines[i]) * 64, 0, 2);
    }
};

// A tile's rows of lanes: row t at data + t * step (step = -VL runs the tile from its end).
template <int NG, bool CONST_B, bool CONST_C, bool OUTPUT, bool ADD>
void states_forward(int tokens, const float* d, const float* x, int64_t step, const float* B, int64_t B_step,
                    const float* C, int64_t C_step, const float* A, float* h, float* y, const Ahead& ahead) {
    vf state[NG];
    UNROLL for (int n = 0; n < NG; ++n) state[n] = number_or(load(h + n * VL), load(A + n * VL));
    for (int t = 0; t < tokens; ++t) {
        const vf dt = load(d), xt = load(x);
        ahead.fetch(t);
        vf sum[2] = {};  // more chains would push states out of the registers
        UNROLL for (int n = 0; n < NG; ++n) {
            vf a = exp_of_product(dt, load(A + n * VL));
            state[n] = fma(a, state[n], coupling<CONST_B>(B, n) * xt);
            if (OUTPUT) sum[n % 2] = fma(coupling<CONST_C>(C, n), state[n], sum[n % 2]);
        }
        if (OUTPUT) {
            vf total = sum[0] + sum[1];
            store(y, ADD ? load(y) + total : total);
            y += step;
        }
        d += step, x += step, B += B_step, C += C_step;
    }
    UNROLL for (int n = 0; n < NG; ++n) store(h + n * VL, state[n]);
}

template <int NG, bool OUTPUT>
void states_forward_group(int tokens, const float* d, const float* x, int64_t step, Coupling B, Coupling C,
                          const float* A, float* h, float* y, bool add, const Ahead& ahead) {
#define RUN(CONST_B, CONST_C)                                                                                   \
    (add && OUTPUT ? states_forward<NG, CONST_B, CONST_C, OUTPUT, true>                                         \
                   : states_forward<NG, CONST_B, CONST_C, OUTPUT, false>)(                                      \
        tokens, d, x, step, B.data, B.step, C.data, C.step, A, h, y, ahead)
    if (B.constant)
        C.constant ? RUN(true, true) : RUN(true, false);
    else
        C.constant ? RUN(false, true) : RUN(false, false);
#undef RUN
}

// All `states` (a multiple of 8) of one vector of channels. A, h: [states][VL].
template <bool OUTPUT>
void scan_tile(int states, int tokens, const float* d, const float* x, int64_t step, Coupling B, Coupling C,
               const float* A, float* h, float* y, const Ahead& ahead = {}) {
    for (int n = 0; n < states;) {
        Coupling Bn = B, Cn = C;
        Bn.data += B.constant ? n * VL : n;
        Cn.data += C.constant ? n * VL : n;
        if (VL >= 16 && states - n >= 16) {
            states_forward_group<16, OUTPUT>(tokens, d, x, step, Bn, Cn, A + n * VL, h + n * VL, y, n > 0,
                                             n ? Ahead{} : ahead);
            n += 16;
        } else {
            states_forward_group<8, OUTPUT>(tokens, d, x, step, Bn, Cn, A + n * VL, h + n * VL, y, n > 0,
                                             n ? Ahead{} : ahead);
            n += 8;
        }
    }
}

// Adjoint of a tile, in the order: recompute the states and decays from the tile's first state, then go back.
// With g[t] = C[t] dy[t] + a[t+1] g[t+1] (the gradient of h[t]) it adds up
//   g_B[t] = sum_n g B[t]  (the gradient of x[t]),     g_d[t] = sum_n g a h[t-1] A  (of delta, through the decay),
//   dA[n] += d[t] g a h[t-1],    dB[t][n] += g x,    dC[t][n] += dy h    (the last two per lane).
struct TileGradients {
    float *g_B, *g_d;  // [TILE][VL], the same row order as d
    float* dA;         // [NG][VL]
    float *dB, *dC;    // per token [TILE][NG][VL] in time order; constant: [NG][VL]
    float* carry;      // [NG][VL]: a[t+1] g[t+1] at the tile's end, on return at its start
};

constexpr int BACK_GROUP = 4;

// Floats of a tile's dB or dC. The two lie half a page apart modulo a page: were it none, a load of one would wait for
// the store of the other, whose address has the same low bits.
constexpr int64_t COUPLING = TILE * BACK_GROUP * VL, APART = 512;

template <bool CONST_B, bool CONST_C, bool OUTPUT>
void states_backward(int tokens, const float* d, const float* x, const float* dy, int64_t step, const float* B,
                     int64_t B_step, const float* C, int64_t C_step, const float* A, const float* h0, float* y,
                     TileGradients out, const Ahead& ahead) {
    constexpr int NG = BACK_GROUP;
    vf decay[TILE][NG], states[TILE][NG];  // states[t]: before token t
    vf h[NG], rate[NG];
    UNROLL for (int n = 0; n < NG; ++n) rate[n] = load(A + n * VL), h[n] = number_or(load(h0 + n * VL), rate[n]);
    for (int t = 0; t < tokens; ++t) {
        const vf dt = load(d + t * step), xt = load(x + t * step);
        const float *Bt = B + t * B_step, *Ct = C + t * C_step;
        ahead.fetch(t);
        vf sum = {};
        UNROLL for (int n = 0; n < NG; ++n) {
            vf a = exp_of_product(dt, rate[n]);
            states[t][n] = h[n];
            decay[t][n] = a;
            h[n] = fma(a, h[n], coupling<CONST_B>(Bt, n) * xt);
            if (OUTPUT) sum = fma(coupling<CONST_C>(Ct, n), h[n], sum);
        }
        if (OUTPUT) store(y + t * step, load(y + t * step) + sum);
    }
    vf carry[NG], dA[NG] = {}, dB[NG] = {}, dC[NG] = {};  // sums of a tile by themselves: long ones drift less
    UNROLL for (int n = 0; n < NG; ++n) carry[n] = load(out.carry + n * VL);
    for (int t = tokens - 1; t >= 0; --t) {
        const vf dt = load(d + t * step), xt = load(x + t * step), dyt = load(dy + t * step);
        const float *Bt = B + t * B_step, *Ct = C + t * C_step;
        float *dBt = out.dB + t * NG * VL, *dCt = out.dC + t * NG * VL;
        vf g_B = load(out.g_B + t * step), g_d = load(out.g_d + t * step);
        UNROLL for (int n = 0; n < NG; ++n) {
            vf g = fma(coupling<CONST_C>(Ct, n), dyt, carry[n]);
            if (CONST_C)
                dC[n] = fma(dyt, h[n], dC[n]);
            else
                store(dCt + n * VL, fma(dyt, h[n], load(dCt + n * VL)));
            h[n] = states[t][n];
            carry[n] = g * decay[t][n];
            vf through_decay = carry[n] * h[n];
            g_d = fma(through_decay, rate[n], g_d);
            g_B = fma(g, coupling<CONST_B>(Bt, n), g_B);
            dA[n] = fma(through_decay, dt, dA[n]);
            if (CONST_B)
                dB[n] = fma(g, xt, dB[n]);
            else
                store(dBt + n * VL, fma(g, xt, load(dBt + n * VL)));
        }
        store(out.g_B + t * step, g_B);
        store(out.g_d + t * step, g_d);
    }
    UNROLL for (int n = 0; n < NG; ++n) {
        store(out.carry + n * VL, carry[n]);
        store(out.dA + n * VL, load(out.dA + n * VL) + dA[n]);
        if (CONST_B) store(out.dB + n * VL, load(out.dB + n * VL) + dB[n]);
        if (CONST_C) store(out.dC + n * VL, load(out.dC + n * VL) + dC[n]);
    }
}

template <bool OUTPUT>
void scan_tile_backward(int tokens, const float* d, const float* x, const float* dy, int64_t step, Coupling B,
                        Coupling C, const float* A, const float* h0, float* y, TileGradients out,
                        const Ahead& ahead = {}) {
#define RUN(CONST_B, CONST_C)                                                                              \
    states_backward<CONST_B, CONST_C, OUTPUT>(tokens, d, x, dy, step, B.data, B.step, C.data, C.step, A, h0, y, out, \
                                              ahead)
    if (B.constant)
        C.constant ? RUN(true, true) : RUN(true, false);
    else
        C.constant ? RUN(false, true) : RUN(false, false);
#undef RUN
}

}  // namespace
