// Both selective scans of the bidirectional mixer with gate and sum (arXiv 2312.00752, sec. 3; 2401.09417, alg. 1).
// Beside scan.cuh's macros: FOR_BACKWARD (1: backward runs forward again, which writes what that needs).

#include "scan.cuh"

// Whether there are registers for two loops over tiles, one for each half of the way, without branches: what is fetched,
// read and written of a tile then hides behind its tokens.
constexpr bool ROOM = STEPS <= 3;
constexpr int BLOCK = WARPS * WIDTH;  // channels of a block
constexpr int PIECE = 16;             // bytes of shared memory for one

// What a block walks: the steps from `from` to `to` of a job, none if they are equal. A step is a tile of either direction.
//
// A job is the way of a block's channels through one sequence. Where there are more jobs than `slots`, the blocks that run at
// once, they rarely come in whole waves. So all jobs' steps in a row are cut in `slots` equal parts. The job that the boundary
// between slots k - 1 and k cuts is two pieces: slot k - 1 walks the first one before its whole jobs, slot k the second one
// after its own. Blocks are the first pieces by slot, then the whole jobs, then the second pieces, the longest first, since
// the slots with the shortest first pieces are free first: so all end together.
struct Piece {
    int job, from, to, slot;  // slot: k, of a cut job

    __device__ __forceinline__ int64 sequence(int blocks) const { return job / blocks; }
    __device__ __forceinline__ int channel(int blocks) const { return job % blocks * BLOCK; }

    // `period`: slots over the greatest common divisor of jobs and slots, 1 where nothing is cut. `inverse`: of jobs over that
    // divisor, modulo period. The boundary before slot k lies at k jobs / slots: its remainder says how much of a job is
    // before it, and `inverse` which k has the next larger one.
    __device__ __forceinline__ Piece(int64 jobs, int64 slots, int64 period, int64 inverse, int tiles)
        : job(blockIdx.x), from(0), to(tiles), slot(0) {
        if (period == 1) return;
        const int64 block = blockIdx.x, second = block - slots * (1 + jobs / slots);
        if (block >= slots && second < 0) {  // one of the whole jobs of slot k, if it has so many
            const int64 k = block % slots;
            job = int((k * jobs + slots - 1) / slots + block / slots - 1);
            if (int64(job + 1) * slots > (k + 1) * jobs) to = 0;
            return;
        }
        const int64 alike = slots / period;  // slots with the same remainder
        slot = int(second < 0 ? block : (second / alike + 1) * inverse % period + second % alike * period);
        const int64 begin = slot * jobs * tiles / slots;
        job = int(begin / tiles);
        (second < 0 ? to : from) = int(begin % tiles);
    }
};
static_assert(sizeof(Piece) == PIECE);

// y = scale silu(z) (scan ahead + scan behind), each scan with its skip D u. With FOR_BACKWARD also, for the gradient
// dy, those of the scans' sum and of z, the halves of `gradients` (batch, length, 2 channels), and `states`
// (2, batch, tiles, channels, N): what enters every tile of either scan.
//
// Half of a block's warps walk ahead, half behind, tile by tile; in the first half of the way each leaves its scan in y, in
// the second half it finds the other's there and finishes the token. The one tile in the middle is left by the warps that
// walk ahead.
//
// The first piece of a job leaves its states in `carried` (slots, 2, WARPS, 8 CH, N), and `arrived` (slots), zero when the
// kernel starts, tells the second that they are there. No first piece waits for anything, and GPUs start blocks in the order
// of their numbers: CUDA does not promise that, but look-back scans and stream-K products of NVIDIA's own rest on it, too.
extern "C" __global__ void __launch_bounds__(2 * THREADS, RESIDENT / (2 * WARPS)) scan_forward(
    const scalar_t* u, const float* projected, const scalar_t* xz, scalar_t* y,
    const scalar_t* dy, scalar_t* gradients, float* states, float* carried, int* arrived,
    const float* dt_weight, const float* dt_weight_b, const float* dt_bias, const float* dt_bias_b,
    const float* A_ahead, const float* A_behind, const float* D_ahead, const float* D_behind,
    int64 batch, int64 slots, int64 period, int64 inverse,
    int64 length_, int64 channels_, int64 xz_stride_b, int64 xz_stride_l_, float scale) {
    DYNAMIC_SHARED(shared);
    // 32 bits reach any token of a sequence
    const int length = static_cast<int>(length_), channels = static_cast<int>(channels_);
    const int xz_stride_l = static_cast<int>(xz_stride_l_);
    const int warp_of_both = warp_of_block();
    const bool behind = warp_of_both >= WARPS;
    const int warp = warp_of_both % WARPS, lane = threadIdx.x % 32, thread = 32 * warp + lane;
    const int g = lane >> 2, t = lane & 3;

    // shared memory: each direction's copy of the piece, which is read again when it is needed again, since registers are
    // few; then, per direction, three tiles of `projected`; per warp parameters, steps, sums, and tiles of u (2), z, the
    // other scan, dy
    constexpr int TILES = 4 + FOR_BACKWARD;
    constexpr int PER_WARP = PARAMETERS + 2 * Exchange::SIZE + TILES * Halves::SIZE / 2;
    Piece* kept = reinterpret_cast<Piece*>(shared) + behind;
    float* tile_projected = reinterpret_cast<float*>(shared + 2 * PIECE) + behind * (3 * PROJECTED + WARPS * PER_WARP);
    float* mine = tile_projected + 3 * PROJECTED + warp * PER_WARP;
    const Exchange steps{mine + PARAMETERS}, results{mine + PARAMETERS + Exchange::SIZE};
    scalar_t* halves = reinterpret_cast<scalar_t*>(mine + PARAMETERS + 2 * Exchange::SIZE);
    const Halves tile_z{halves + 2 * Halves::SIZE}, tile_other{halves + 3 * Halves::SIZE};
    const Halves tile_dy{halves + 4 * Halves::SIZE};

    const int tiles = (length + TILE - 1) / TILE;
    const int left = behind ? tiles / 2 : (tiles + 1) / 2;  // tiles of the first half of the way
    auto tile_of = [&](int step) { return behind ? tiles - 1 - step : step; };
    auto sync_direction = [&] {
        if (WARPS == 1) sync_warp();
        else if (behind) sync_named<2, THREADS>();
        else sync_named<1, THREADS>();
    };
    const int blocks = (channels + BLOCK - 1) / BLOCK;  // of a sequence
    const Piece piece(batch * blocks, slots, period, inverse, tiles);
    const int from = piece.from, to = piece.to, turn = max(from, min(left, to));
    if (from == to) return;
    const bool meets = from < (tiles + 1) / 2 && to > tiles / 2;  // the directions meet: a barrier at the turn of each

    if (thread == 0) *kept = piece;
    const int64 b = piece.sequence(blocks);
    const int first_channel = piece.channel(blocks) + warp * WIDTH, own = first_channel + CH * g;
    const bool active = first_channel < channels;  // the last block may have idle warps
    const int64 sequence = behind * batch + b;  // of (2, batch)
    const int64 rows_of_both = sequence * length;
    float* const states_here = states + (sequence * tiles * channels + first_channel) * N;
    auto carried_of = [&](int slot) { return carried + (int64(slot) * 2 * BLOCK + warp_of_both * WIDTH) * N; };
    States A, h = {};
    clear(tile_projected, 3 * PROJECTED * 4, thread, THREADS);
    clear(halves, 2 * Halves::SIZE * 2, lane, 32);
    if (active) {
        stage_parameters(
            mine, (behind ? dt_weight_b : dt_weight) + int64(first_channel) * RANK,
            (behind ? dt_bias_b : dt_bias) + first_channel, (behind ? D_behind : D_ahead) + first_channel, lane);
        load_A(A, (behind ? A_behind : A_ahead) + first_channel * N, g, t);
    }
    if (from > 0) {
        if (threadIdx.x == 0) await(arrived + piece.slot);
        sync_block();
        if (active) load_states(h, carried_of(piece.slot), g, t);
    }
    const int along = behind ? -1 : 1;
    const ProjectedCopies copies(projected + rows_of_both * COLUMNS, along, thread);
    Stream u_part = Halves::part(u + rows_of_both * channels + first_channel, channels, along, lane);
    const Stream to_y(y + b * length * channels + own, channels, along, t, 0);
    Stream z_part, y_part, dy_part, to_gradients;  // of the second half of the way
    auto find_others = [&] {
        const int64 b = kept->sequence(blocks), rows = b * length;
        const int first_channel = kept->channel(blocks) + warp * WIDTH;
        z_part = Halves::part(xz + b * xz_stride_b + channels + first_channel, xz_stride_l, along, lane);
        y_part = Halves::part(y + rows * channels + first_channel, channels, along, lane);
        if (FOR_BACKWARD) {
            dy_part = Halves::part(dy + rows * channels + first_channel, channels, along, lane);
            to_gradients = Stream(gradients + 2 * rows * channels + first_channel + CH * g, 2 * channels, along, t, 0);
        }
        if (ROOM) hold(z_part.base), hold(y_part.base);
    };
    hold(u_part.base);

    // A tile's time steps (of two channels its drives, too) are made while the one before it is walked, from what was
    // fetched during the one before that.
    auto fetch = [&](int step, float* target) {
        const Walk walk(step < tiles ? tile_of(step) : tiles, length, behind);  // no rows behind the last
        copies.copy<ROOM>(target, walk);
        if (active) Halves{halves + step % 2 * Halves::SIZE}.copy<ROOM>(u_part, walk, lane);
        cp_async_commit();
    };
    float *rows = tile_projected, *next_rows = rows + PROJECTED, *later_rows = next_rows + PROJECTED;
    auto rotate = [&] {
        float* free_rows = rows;
        rows = next_rows, next_rows = later_rows, later_rows = free_rows;
    };
    sync_direction();  // cleared
    fetch(from, rows);
    fetch(from + 1, next_rows);
    if (!active) {  // helps to copy `projected`, and meets the others at every barrier
        cp_async_wait<1>();
        sync_direction();
        for (int step = from; step < to; ++step) {
            if (meets && step == turn) sync_block();
            cp_async_wait<0>();
            sync_direction();
            fetch(step + 2, later_rows);
            rotate();
        }
        if (meets && turn == to) sync_block();
        cp_async_wait<0>();
        if (to < tiles) sync_block();
        return;
    }
    unsigned packed_x[2][PAIRS];
    Tokens drive;  // of four channels made when it is used: registers are few
    auto write_next = [&](Tokens& delta, int step) {
        Halves{halves + step % 2 * Halves::SIZE}.read(packed_x, g, t);
        if (CH == 2) Halves::unpack(drive, packed_x);
        clear_rows(delta, length - tile_of(step) * TILE, t);
        if (CH == 2) for_tokens([&](int j, int late) { drive[j][late] *= delta[j][late]; });
        steps.write(delta, g, t);
    };
    cp_async_wait<1>();
    sync_direction();
    {
        Tokens delta;
        project_steps(delta, rows, mine, lane);
        for_tokens([&](int j, int late) { delta[j][late] = softplus(delta[j][late]); });
        write_next(delta, from);
    }
    auto walk_tile = [&](int step, auto finish) {
        const int tile = tile_of(step);
        const Walk walk(tile, length, behind);
        cp_async_wait<0>();
        sync_direction();  // the next tile is there, and the one before has been read
        if (finish) {
            tile_z.copy<ROOM>(z_part, walk, lane);
            tile_other.copy<ROOM>(y_part, walk, lane);
            if (FOR_BACKWARD) tile_dy.copy<ROOM>(dy_part, walk, lane);
            cp_async_commit();
        }
        fetch(step + 2, later_rows);
        if (FOR_BACKWARD) save_states(states_here + int64(tile) * channels * N, h, g, t);
        Tokens delta, result, x;
        project_steps(delta, next_rows, mine, lane);
        if (CH == 4) Halves::unpack(drive, packed_x);
        if (CH == 4 && !ROOM) {
            Tokens own;
            steps.read(own, g, t);
            for_tokens([&](int j, int late) { drive[j][late] *= own[j][late]; });
        }
#pragma unroll
        for (int late = 0; late < 2; ++late) {
            const Rows B(rows + HALF * late * PITCH + PADDED, g, t);
            Columns C;
            Sums sums;
            if (CH == 4 && ROOM) {  // a half at a time: for the assembler the one is better here, the other there
                Channels step_size;
                steps.read(step_size, t + HALF * late, g);
#pragma unroll
                for (int j = 0; j < CH; ++j) drive[j][late] *= step_size[j];
            }
#pragma unroll
            for (int i = 0; i < HALF; ++i) {
                if (i % 2 == 0) C.read(rows + (HALF * late + i) * PITCH + PADDED + N, g, t);
                Channels step_size;
                steps.read(step_size, HALF * late + i, g);
                decay(h, A, step_size);
                add_product(h, drive, late, B, i, t);
                sums.add(h, C, i, g);
                if (i < CH) delta[i][late] = softplus(delta[i][late]);
            }
            sums.write(results, late, g, t);
        }
        Halves::unpack(x, packed_x);
        sync_warp();
        results.read(result, g, t);
        write_next(delta, step + 1);
        Channels skip;
        load_channels(skip, mine + WEIGHTS + WIDTH + CH * g);
        for_tokens([&](int j, int late) { x[j][late] *= skip[j]; });
        if (finish) {
            cp_async_wait<1>();
            sync_warp();
            Tokens other, gate, incoming, slope;
            tile_other.read(other, g, t);
            tile_z.read(gate, g, t);
            if (FOR_BACKWARD) tile_dy.read(incoming, g, t);
            for_tokens([&](int j, int late) {
                const float v = gate[j][late], s = sigmoid(v), scaled = scale * v * s;
                const float total = CUT4 * result[j][late] + (x[j][late] + other[j][late]);
                result[j][late] = scaled * total;
                if (FOR_BACKWARD) {
                    const float dy_i = incoming[j][late];
                    slope[j][late] = scale * dy_i * total * s * (1.0f + v * (1.0f - s));
                    incoming[j][late] = scaled * dy_i;
                }
            });
            if (FOR_BACKWARD) {
                store_tokens(to_gradients, incoming, walk, t);
                store_tokens(to_gradients, slope, walk, t, channels);
            }
        } else {
            for_tokens([&](int j, int late) { result[j][late] = CUT4 * result[j][late] + x[j][late]; });
        }
        store_tokens(to_y, result, walk, t);
        rotate();
    };
    if (ROOM) {
        int step = from;
        for (; step < turn; ++step) walk_tile(step, Constant<false>());
        if (meets) sync_block();  // what the other scan has left is seen
        find_others();
        for (; step < to; ++step) walk_tile(step, Constant<true>());
    } else {
        find_others();
        for (int step = from; step < to; ++step) {
            if (meets && step == turn) sync_block();
            walk_tile(step, step >= left);
        }
        if (meets && turn == to) sync_block();
    }
    cp_async_wait<0>();  // a first piece has fetched what comes behind it
    if (to < tiles) {
        save_states(carried_of(kept->slot), h, g, t);
        sync_block();
        if (threadIdx.x == 0) announce(arrived + kept->slot);
    }
}
