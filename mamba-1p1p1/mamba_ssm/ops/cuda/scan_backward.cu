// Gradients of the bidirectional mixer's selective scans (arXiv 2312.00752, sec. 3; 2401.09417, alg. 1).

#include "scan.cuh"

// Gradients of one direction's scan for the gradient of its output, the first half of forward's `gradients`, from the
// states that forward left before every tile: du (through the drive and the skip alone) and ddelta (of the time step
// before bias and softplus), both (2, batch, length, channels), and partial sums: dBC (2, channel blocks, batch, length, 2 N)
// over a block's channels; dA (2, batch, channels, N), dD and dbias (2, batch, channels) over tokens.
//
// Grid (channel blocks, batch, directions). The tiles come from the scan's last to its first. Inside a tile the states
// before each token are made again and kept, the first half in shared memory, the second in registers; the places in
// shared memory then take the tokens' shares of dB and dC.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT / WARPS) scan_backward(
    const scalar_t* gradients, const scalar_t* u, const float* projected, const float* states,
    scalar_t* du, scalar_t* ddelta, float* dBC, float* dA_sum, float* dD_sum, float* dbias_sum,
    const float* dt_weight, const float* dt_weight_b, const float* dt_bias, const float* dt_bias_b,
    const float* A_ahead, const float* A_behind, const float* D_ahead, const float* D_behind,
    int64 length_, int64 channels_) {
    // floats of a warp's states of one token, of a token's shares of dB and dC, and of all that are kept of a tile
    constexpr int STATE = 32 * CH * 4, SHARE = 2 * 32 * 4, KEPT = HALF * (STATE + SHARE);
    DYNAMIC_SHARED(shared);
    const int length = static_cast<int>(length_), channels = static_cast<int>(channels_);  // 32 bits, as in forward
    const bool behind = blockIdx.z;
    const int warp = warp_of_block(), lane = threadIdx.x % 32, thread = 32 * warp + lane, g = lane >> 2, t = lane & 3;
    const int64 b = blockIdx.y, batch = gridDim.y;
    const int first_channel = (blockIdx.x * WARPS + warp) * WIDTH, own = first_channel + CH * g;
    const bool active = first_channel < channels;

    // shared memory: two tiles of `projected`; states and shares of all warps; per warp parameters, numbers on their
    // way between lanes, tiles of u (2) and dscan (2)
    constexpr int PER_WARP = PARAMETERS + 5 * Exchange::SIZE + 4 * Halves::SIZE / 2;
    float* tile_projected = reinterpret_cast<float*>(shared);
    float* all_kept = tile_projected + 2 * PROJECTED;
    float* mine = all_kept + WARPS * KEPT + warp * PER_WARP;
    float* exchanges = mine + PARAMETERS;
    const Exchange steps{exchanges}, drives{exchanges + Exchange::SIZE}, dscans{exchanges + 2 * Exchange::SIZE};
    const Exchange slopes{exchanges + 3 * Exchange::SIZE}, products_of{exchanges + 4 * Exchange::SIZE};
    scalar_t* halves = reinterpret_cast<scalar_t*>(exchanges + 5 * Exchange::SIZE);
    float* before = all_kept + warp * KEPT + 4 * lane;  // (HALF, CH, 32 lanes, 4), then shares (HALF, 2, 32, 4)

    const int64 sequence = behind * batch + b;  // of (2, batch)
    const int tiles = (length + TILE - 1) / TILE;
    u += sequence * length * channels + first_channel;
    du += sequence * length * channels + own;
    ddelta += sequence * length * channels + own;
    gradients += 2 * b * length * channels + first_channel;
    projected += sequence * length * COLUMNS;
    states += (sequence * tiles * channels + first_channel) * N;
    dBC += ((behind * int64(gridDim.x) + blockIdx.x) * batch + b) * length * (2 * N);
    States A, dA = {}, sent = {};  // sent: what later tokens send to the state
    Channels dD = {}, dbias = {};
    clear(tile_projected, 2 * PROJECTED * 4, thread, THREADS);
    clear(halves, 4 * Halves::SIZE * 2, lane, 32);
    if (!active) clear(all_kept + warp * KEPT, KEPT * 4, lane, 32);
    if (active) {
        stage_parameters(
            mine, (behind ? dt_weight_b : dt_weight) + int64(first_channel) * RANK,
            (behind ? dt_bias_b : dt_bias) + first_channel, (behind ? D_behind : D_ahead) + first_channel, lane);
        load_A(A, (behind ? A_behind : A_ahead) + first_channel * N, g, t);
    }
    const int along = behind ? -1 : 1;
    const ProjectedCopies copies(projected, along, thread);
    Stream u_part = Halves::part(u, channels, along, lane);
    Stream dscan_part = Halves::part(gradients, 2 * channels, along, lane);
    hold(u_part.base), hold(dscan_part.base);
    const Stream to_du(du, channels, along, t, 0), to_ddelta(ddelta, channels, along, t, 0);
    auto fetch = [&](int step) {
        const Walk walk(behind ? step : tiles - 1 - step, length, behind);
        copies.copy<false>(tile_projected + step % 2 * PROJECTED, walk);
        if (active) {
            Halves{halves + step % 2 * Halves::SIZE}.copy<false>(u_part, walk, lane);
            Halves{halves + (2 + step % 2) * Halves::SIZE}.copy<false>(dscan_part, walk, lane);
        }
    };
    sync_block();  // cleared
    fetch(0);
    cp_async_commit();
    for (int step = 0; step < tiles; ++step) {
        const int tile = behind ? step : tiles - 1 - step;
        const Walk walk(tile, length, behind);
        States h;
        if (active) load_states(h, states + (int64(tile) * channels) * N, g, t);
        cp_async_wait<0>();
        sync_block();  // this tile is there; the one before and its shares have been read
        if (step + 1 < tiles) fetch(step + 1);
        cp_async_commit();
        const float* rows = tile_projected + step % 2 * PROJECTED;
        if (active) {
            const Halves tile_u{halves + step % 2 * Halves::SIZE}, tile_dscan{halves + (2 + step % 2) * Halves::SIZE};
            Tokens drive;
            {
                Tokens raw, delta, slope, x, dy;
                project_steps(raw, rows, mine, lane);
                tile_u.read(x, g, t);
                tile_dscan.read(dy, g, t);
                for_tokens([&](int j, int late) { softplus_and_slope(raw[j][late], delta[j][late], slope[j][late]); });
                clear_rows(delta, walk.rows, t);
                clear_rows(dy, walk.rows, t);
                for_tokens([&](int j, int late) { drive[j][late] = delta[j][late] * x[j][late]; });
                steps.write(delta, g, t);
                drives.write(drive, g, t);
                dscans.write(dy, g, t);
                slopes.write(slope, g, t);
            }
            sync_warp();
            States second[HALF];  // the states before each token of the second half
#pragma unroll
            for (int late = 0; late < 2; ++late) {
                const Rows B(rows + HALF * late * PITCH + PADDED, g, t);
#pragma unroll
                for (int i = 0; i < HALF; ++i) {
#pragma unroll
                    for (int j = 0; j < CH; ++j) {
                        if (late)
#pragma unroll
                            for (int n = 0; n < 4; ++n) second[i][j][n] = h[j][n];
                        else store_four(before + i * STATE + j * 32 * 4, h[j]);
                    }
                    Channels step_size;
                    steps.read(step_size, HALF * late + i, g);
                    decay(h, A, step_size);
                    add_product(h, drive, late, B, i, t);
                }
            }
            Tokens x, dy, product, exponent;
#pragma unroll
            for (int late = 1; late >= 0; --late) {
                Columns B;
                const Rows C(rows + HALF * late * PITCH + PADDED + N, g, t);
                tile_dscan.read(dy, g, t);  // again, here and below: fewer registers
                clear_rows(dy, walk.rows, t);
                Sums products;  // of sent and B
                float exponents[PAIRS][4] = {};  // sums of sent, decayed state and A, two channels in one
#pragma unroll
                for (int i = HALF - 1; i >= 0; --i) {  // h: the state after this token
                    sync_warp();  // keeps the compiler from reading ahead into more registers than there are
                    const int token = HALF * late + i;
                    float* state = before + (token < HALF ? token * STATE : HALF * STATE + i * SHARE);
                    Channels step_size, drive_of, dy_of;
                    float dB[4], dC[4], shares[CH];
                    if (i % 2) B.read(rows + (token - 1) * PITCH + PADDED, g, t);
                    add_product(sent, dy, late, C, i, t);
                    products.add(sent, B, i, g);
                    drives.read(drive_of, token, g);
                    dscans.read(dy_of, token, g);
#pragma unroll
                    for (int j = 0; j < CH; ++j) {
#pragma unroll
                        for (int n = 0; n < 4; ++n) {
                            const float from_h = dy_of[j] * state_of(h, j, n);
                            const float from_sent = drive_of[j] * state_of(sent, j, n);
                            dC[n] = j ? dC[n] + from_h : from_h, dB[n] = j ? dB[n] + from_sent : from_sent;
                        }
                    }
#pragma unroll
                    for (int j = 0; j < CH; ++j) {
                        if (late)
#pragma unroll
                            for (int n = 0; n < 4; ++n) h[j][n] = second[i][j][n];
                        else load_four(h[j], state + j * 32 * 4);
                    }
                    steps.read(step_size, token, g);
                    decay(sent, A, step_size);
#pragma unroll
                    for (int j = 0; j < CH; ++j)
#pragma unroll
                        for (int n = 0; n < 4; ++n) {
                            const float w = state_of(sent, j, n) * state_of(h, j, n), share = w * state_of(A, j, n);
                            state_of(dA, j, n) += w * step_size[j];
                            shares[j] = n ? shares[j] + share : share;
                        }
                    // the sums of four lanes' shares, of two channels in the places of row g, row g + 8
                    const unsigned one = __float_as_uint(g / 2 == i ? 1.0f : 0.0f);
#pragma unroll
                    for (int pair = 0; pair < PAIRS; ++pair) {
                        const unsigned a[2] = {
                            __float_as_uint(shares[2 * pair]), __float_as_uint(shares[2 * pair + 1])};
                        mma_tf32(exponents[pair], a, one);
                    }
                    store_four(state, dB);
                    store_four(state + 32 * 4, dC);
                }
                products.write(products_of, late, g, t);
#pragma unroll
                for (int j = 0; j < CH; ++j) exponent[j][late] = exponents[j / 2][j % 2 * 3];
            }
            sync_warp();
            Tokens delta, slope;
            products_of.read(product, g, t);
            steps.read(delta, g, t);
            slopes.read(slope, g, t);
            tile_u.read(x, g, t);
            tile_dscan.read(dy, g, t);
            Channels skip;
            load_channels(skip, mine + WEIGHTS + WIDTH + CH * g);
            for_tokens([&](int j, int late) {
                const float through_drive = CUT3 * product[j][late];
                const float through_decay = LN_2 * CUT4 * exponent[j][late];
                const float rate = (x[j][late] * through_drive + through_decay) * slope[j][late];
                if (t + 4 * late < walk.rows) dbias[j] += rate, dD[j] += dy[j][late] * x[j][late];
                product[j][late] = delta[j][late] * through_drive + skip[j] * dy[j][late];  // du
                exponent[j][late] = rate;                                                   // ddelta
            });
            store_tokens(to_du, product, walk, t);
            store_tokens(to_ddelta, exponent, walk, t);
        }
        sync_block();
        // shares (row, dB or dC, lane t, 4 states) of all channels: the sum over warps and g
        static_assert(THREADS >= TILE * 8, "one sum a thread");
        if (thread < walk.rows * 8) {
            const int quarter = thread & 3, kind = (thread >> 2) & 1, row = thread >> 3;
            const float* shares = all_kept + (row < HALF ? row * STATE : HALF * STATE + (row - HALF) * SHARE);
            shares += kind * 32 * 4 + 4 * quarter;
            float sum[4] = {};
#pragma unroll
            for (int w = 0; w < WARPS; ++w)
#pragma unroll
                for (int q = 0; q < 8; ++q) {  // neighbours begin at different g, which lie in different banks
                    float share[4];
                    load_four(share, shares + w * KEPT + 16 * (q ^ kind));
#pragma unroll
                    for (int n = 0; n < 4; ++n) sum[n] += share[n];
                }
#pragma unroll
            for (int n = 0; n < 4; ++n) sum[n] *= kind ? CUT2 : CUT;  // of h, of what is sent
            float* target = dBC + int64(walk.token(row)) * (2 * N) + kind * N + 4 * quarter;
            *reinterpret_cast<float4*>(target) = in_order(sum);
        }
    }
    if (active) {
        const int64 at = sequence * channels + own;
#pragma unroll
        for (int j = 0; j < CH; ++j) {
#pragma unroll
            for (int n = 0; n < 4; ++n) state_of(dA, j, n) *= CUT3;  // of h and of what is sent
            *reinterpret_cast<float4*>(dA_sum + (at + j) * N + 4 * t) = make_float4(
                state_of(dA, j, 0), state_of(dA, j, 2), state_of(dA, j, 1), state_of(dA, j, 3));
#pragma unroll
            for (int mask = 1; mask < 4; mask *= 2)
                dD[j] += shfl_xor(dD[j], mask), dbias[j] += shfl_xor(dbias[j], mask);
            if (t == 0) dD_sum[at + j] = dD[j], dbias_sum[at + j] = dbias[j];
        }
    }
}
