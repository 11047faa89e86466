// The mixer together with both of its projections: from hidden (B, L, E) to out (B, L, E), and back.
//
// A tile of tokens is projected in, mixed and projected out by one thread while it is in that thread's cache, and no
// thread waits for another between the products. The direction that comes to a tile first computes its x, the second
// its z and the output; unless backward needs them, x is the only part of xz that is written to memory, and z and y
// live for one tile. Backward likewise: dy by the first direction, dhidden by the second.
//
// With bf16_products what in_proj multiplies is rounded to bfloat16, and in backward what both projections' products
// do; their sums and everything else are float32. out_proj stays float32 in forward because its rounding errors, as
// large as in_proj's, would go straight into the residual stream.
#pragma once

#include "bimamba_backward.h"

namespace {

// Packs the panels of several weights, dealt out to the threads of the enclosing parallel region.
struct PanelWork {
    void (*pack)(const float*, int64_t, int64_t, int64_t, void*);
    const float* weight;
    int64_t N, K;
    void* packed;
};

template <int COUNT> void pack_all(const PanelWork (&work)[COUNT]) {
    for (const PanelWork& w : work) {
#pragma omp for schedule(static) nowait
        for (int64_t p = 0; p < panel_count(w.N); ++p) w.pack(w.weight, w.N, w.K, p, w.packed);
    }
#pragma omp barrier
}

// A projection's packed weight, and whether the product rounds to bfloat16.
struct PackedWeight {
    bool low;
    float* data = nullptr;

    int64_t floats(int64_t elements) const { return low ? elements / 2 : elements; }
    void take(Arena& arena, int64_t elements) { data = arena.take(floats(elements)); }
    float* at(int64_t element) const { return data + floats(element); }
};

// Where each thread rounds a tile of a product's left operand, (TILE, width).
struct RoundedTiles {
    int64_t width;
    bf16* data = nullptr;

    void take(Arena& arena, int64_t threads) { data = (bf16*)arena.take(threads * TILE * width / 2); }
    bf16* of(const PackedWeight& weight) const {
        return weight.low ? data + omp_get_thread_num() * TILE * width : nullptr;
    }
};

bool rounds(const BlockArguments& arguments) { return BF16_PRODUCTS && arguments.bf16_products; }

struct BlockForward : BimambaForward<float> {
    const BlockArguments& block;
    const int64_t E, D;
    PackedWeight in, out;
    RoundedTiles rounded;
    float* x_all = nullptr;  // (B, L, D); where z is kept too, xz (B, L, 2 D)
    float *z_tiles = nullptr, *y_tiles = nullptr;  // (threads, TILE, D); where channels are split y is (B, L, D)

    BlockForward(const BlockArguments& arguments, const BimambaArguments& mixer)
        : BimambaForward<float>(mixer), block(arguments), E(arguments.embedding), D(mixer.channels),
          in{rounds(arguments)}, out{false}, rounded{E} {}

    void pack_panels() const {
        auto pack = in.low ? pack_panel<bf16> : pack_panel<float>;
        pack_all({{pack, block.in_proj, D, E, in.at(0)},
                  {pack, block.in_proj + D * E, D, E, in.at(D * E)},
                  {pack_panel<float>, block.out_proj, E, D, out.data}});
    }

    // It is saved, or needed whole because channels are split.
    bool keeps_z() const { return a.xz_token == 2 * D; }
    float* x_of(int64_t b, int64_t tile) const { return x_all + (b * s.length + tile * TILE) * a.xz_token; }

    // x (0) or z (1) of a tile.
    void project_in(int which, int64_t b, int64_t tile, float* to, int64_t step) const {
        gemm_panels(s.tokens(tile), D, (int)E, block.hidden + (b * s.length + tile * TILE) * E, E, in.at(which * D * E),
                    rounded.of(in), to, step);
    }
    void project_out(int64_t b, int64_t tile, const float* y) const {
        gemm_panels(s.tokens(tile), E, (int)D, y, D, out.data, rounded.of(out),
                    block.out + (b * s.length + tile * TILE) * E, E);
    }

    void run_block_tile(int64_t b, int dir, int64_t tile, float* state, float* x, bool second, int64_t slot) const {
        if (!second) {
            project_in(0, b, tile, x_of(b, tile), a.xz_token);
            return run_tile(b, dir, tile, state, x, {});
        }
        float *z = keeps_z() ? x_of(b, tile) + D : z_tiles + slot * TILE * D, *y = y_tiles + slot * TILE * D;
        const int64_t z_step = keeps_z() ? a.xz_token : D;
        project_in(1, b, tile, z, z_step);
        run_tile(b, dir, tile, state, x, {z, z_step, y, D});
        project_out(b, tile, y);
    }

    // Where channels are split, the projections are phases of their own.
    void run_block_split(int64_t groups, int64_t slot) const {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < s.batch * s.tiles; ++i)
            for (int which = 0; which < 2; ++which)
                project_in(which, i / s.tiles, i % s.tiles, x_of(i / s.tiles, i % s.tiles) + which * D, a.xz_token);
        run_split(groups, slot);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < s.batch * s.tiles; ++i)
            project_out(i / s.tiles, i % s.tiles, gate_of(i / s.tiles, i % s.tiles).y);
    }
};

int block_forward(const BlockArguments& arguments) {
    BimambaArguments mixer = arguments.mixer;
    const int64_t threads = larger<int64_t>(1, mixer.threads), D = mixer.channels, weight = D * arguments.embedding;
    const int64_t rows = mixer.batch * mixer.length;
    int64_t groups;
    const Split split = choose_split(BimambaShape(mixer), threads, &groups);
    const bool whole = split == Split::CHANNELS;
    mixer.xz_token = (mixer.saved || whole ? 2 : 1) * D;
    mixer.xz_batch = mixer.length * mixer.xz_token;
    BlockForward op(arguments, mixer);

    Arena arena;
    for (int pass = 0; pass < 2; ++pass) {
        arena.used = 0;
        op.take(arena, split, threads, !mixer.saved);
        op.in.take(arena, 2 * weight);
        op.out.take(arena, weight);
        op.rounded.take(arena, threads);
        op.x_all = mixer.saved ? (float*)arguments.mixer.xz : arena.take(rows * mixer.xz_token);
        op.z_tiles = arena.take(op.keeps_z() ? 0 : threads * TILE * D);
        op.y_tiles = arena.take((whole ? rows : threads * TILE) * D);
        if (pass == 0 && !(arena.base = mamba_ssm_workspace(arena.used))) return 1;
    }
    mixer.xz = op.x_all;
    mixer.y = op.y_tiles;
    if (mixer.saved) {
        mamba_ssm_large_pages(op.x_all, rows * mixer.xz_token * sizeof(float));
        mamba_ssm_large_pages(mixer.saved, op.s.saved_floats() * sizeof(float));
    }

#pragma omp parallel num_threads((int)threads)
    {
        const FlushSubnormals flush;
        const int64_t slot = omp_get_thread_num();
        op.pack_directions();
        op.pack_panels();
        if (whole)
            op.run_block_split(groups, slot);
        else
            op.run_whole(split, slot, [&](int64_t b, int dir, int64_t tile, float* state, float* x, bool second) {
                op.run_block_tile(b, dir, tile, state, x, second, slot);
            });
    }
    return 0;
}

struct BlockBackward : BackwardCall<float> {
    const BlockArguments& block;
    const int64_t E, D;
    PackedWeight in, out;
    RoundedTiles rounded;
    float* dy = nullptr;

    BlockBackward(const BlockArguments& arguments, const BimambaArguments& mixer)
        : BackwardCall<float>(mixer), block(arguments), E(arguments.embedding), D(mixer.channels),
          in{rounds(arguments)}, out{rounds(arguments)}, rounded{larger(E, 2 * D)} {}

    void pack_panels() const {
        auto pack = in.low ? pack_panel_transposed<bf16> : pack_panel_transposed<float>;
        pack_all({{pack, block.in_proj, E, 2 * D, in.data}, {pack, block.out_proj, D, E, out.data}});
    }
    void project_dy(int64_t b, int64_t tile) const {
        const int64_t row = b * s.length + tile * TILE;
        gemm_panels(s.tokens(tile), D, (int)E, block.dout + row * E, E, out.data, rounded.of(out), dy + row * D,
                    D);
    }
    void project_dhidden(int64_t b, int64_t tile) const {
        const int64_t row = b * s.length + tile * TILE;
        gemm_panels(s.tokens(tile), E, (int)(2 * D), (const float*)a.dxz + row * 2 * D, 2 * D, in.data,
                    rounded.of(in), block.dhidden + row * E, E);
    }

    template <class Run> void each_tile(Run run) const {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < s.batch * s.tiles; ++i) run(i / s.tiles, i % s.tiles);
    }
    // Both weights' gradients, from what all threads have written.
    void weight_gradients() const {
        const int64_t rows = s.batch * s.length;
        if (block.din_proj) gemm_over_rows(rows, 2 * D, E, (const float*)a.dxz, block.hidden, block.din_proj);
        if (block.dout_proj) gemm_over_rows(rows, E, D, block.dout, (const float*)a.y, block.dout_proj);
    }
    void run_block_split(int64_t slot) const {
        each_tile([&](int64_t b, int64_t tile) { project_dy(b, tile); });
        run_split(slot);
        each_tile([&](int64_t b, int64_t tile) { project_dhidden(b, tile); });
    }
};

int block_backward(const BlockArguments& arguments) {
    BimambaArguments mixer = arguments.mixer;
    BlockBackward op(arguments, mixer);
    const int64_t threads = larger<int64_t>(1, mixer.threads), weight = op.D * op.E;
    const int64_t rows = mixer.batch * mixer.length;
    const Split split = choose_split(op.s, threads, &op.groups);

    Arena arena;
    for (int pass = 0; pass < 2; ++pass) {
        arena.used = 0;
        take_backward(arena, op, split, threads);
        op.in.take(arena, 2 * weight);
        op.out.take(arena, weight);
        op.rounded.take(arena, threads);
        op.dy = arena.take(rows * op.D);
        mixer.y = arguments.mixer.y ? arguments.mixer.y : arena.take(rows * op.D);
        mixer.dxz = arguments.mixer.dxz ? arguments.mixer.dxz : arena.take(rows * 2 * op.D);
        if (pass == 0 && !(arena.base = mamba_ssm_workspace(arena.used))) return 1;
    }
    mixer.dy = op.dy;

#pragma omp parallel num_threads((int)threads)
    {
        const FlushSubnormals flush;
        const int64_t slot = omp_get_thread_num();
        op.pack_directions();
        op.pack_panels();
        begin_sums(op, threads);
        if (split == Split::CHANNELS)
            op.run_block_split(slot);
        else
            op.run_whole(split, slot, [&](int64_t b, int dir, int64_t tile, auto carry, bool second) {
                if (!second) op.project_dy(b, tile);
                op.run_tile(b, dir, tile, slot, carry, second);
                if (second) op.project_dhidden(b, tile);
            });
        finish_sums(op, threads);
        op.weight_gradients();
    }
    for (int dir = 0; dir < 2; ++dir) unpack_gradients(op.s, mixer.gradients[dir], op.sums_of(0, dir), dir == 1);
    return 0;
}

}  // namespace
