// The sums of partial sums that end a backward pass, in a fixed order: the same bits on every run.
//
// Compiled at run time with the macro HALF_IS_BF16.

#include "device.cuh"

typedef long long int64;
constexpr int COLUMNS = 32, LANES = 8;  // of a block: columns, and threads that share one

// One sum over rows: source (2, rows, columns), targets (columns,), one a direction.
struct Task {
    const float* source;
    float* target;
    int64 rows, columns;
};

// Sums of seven arrays of both directions in one launch. Those of the first are multiplied by `factor`, where one is given:
// dA becomes the gradient of A_log. The sixth is of the x projection, (columns of `projected`, channels), whose padding,
// behind `rank` of them, goes; the seventh of the time step's, (padded rank, channels), whose target is (channels, rank).
// Grid (blocks of 32 columns, tasks, directions).
extern "C" __global__ void __launch_bounds__(COLUMNS * LANES) sum_rows(
    const float* source_0, float* ahead_0, float* behind_0, int64 rows_0, int64 columns_0,
    const float* source_1, float* ahead_1, float* behind_1, int64 rows_1, int64 columns_1,
    const float* source_2, float* ahead_2, float* behind_2, int64 rows_2, int64 columns_2,
    const float* source_3, float* ahead_3, float* behind_3, int64 rows_3, int64 columns_3,
    const float* source_4, float* ahead_4, float* behind_4, int64 rows_4, int64 columns_4,
    const float* source_5, float* ahead_5, float* behind_5, int64 rows_5, int64 columns_5,
    const float* source_6, float* ahead_6, float* behind_6, int64 rows_6, int64 columns_6,
    const float* factor_ahead, const float* factor_behind, int64 channels, int64 rank) {
    DYNAMIC_SHARED(shared);
    float* partial = reinterpret_cast<float*>(shared);  // (LANES, COLUMNS)
    const bool behind = blockIdx.z;
    Task task;
    switch (blockIdx.y) {
        case 0: task = Task{source_0, behind ? behind_0 : ahead_0, rows_0, columns_0}; break;
        case 1: task = Task{source_1, behind ? behind_1 : ahead_1, rows_1, columns_1}; break;
        case 2: task = Task{source_2, behind ? behind_2 : ahead_2, rows_2, columns_2}; break;
        case 3: task = Task{source_3, behind ? behind_3 : ahead_3, rows_3, columns_3}; break;
        case 4: task = Task{source_4, behind ? behind_4 : ahead_4, rows_4, columns_4}; break;
        case 5: task = Task{source_5, behind ? behind_5 : ahead_5, rows_5, columns_5}; break;
        default: task = Task{source_6, behind ? behind_6 : ahead_6, rows_6, columns_6};
    }
    const int within = threadIdx.x % COLUMNS, lane = threadIdx.x / COLUMNS;
    const int64 column = int64(blockIdx.x) * COLUMNS + within;
    if (int64(blockIdx.x) * COLUMNS >= task.columns) return;
    float sum = 0.0f;
    if (column < task.columns) {
        const float* source = task.source + behind * task.rows * task.columns + column;
        for (int64 row = lane; row < task.rows; row += LANES) sum += source[row * task.columns];
    }
    partial[threadIdx.x] = sum;
    sync_block();
    if (lane == 0 && column < task.columns) {
        for (int i = 1; i < LANES; ++i) sum += partial[i * COLUMNS + within];
        const float* factor = behind ? factor_behind : factor_ahead;
        if (blockIdx.y == 0 && factor) sum *= factor[column];
        int64 to = column;
        if (blockIdx.y >= 5) {
            const int64 row = column / channels, padding = (rank + 7) / 8 * 8 - rank;
            if (row >= rank && row < rank + padding) return;
            if (blockIdx.y == 6) to = column % channels * rank + row;
            else if (row >= rank) to -= padding * channels;
        }
        task.target[to] = sum;
    }
}

// The last `width` columns of dprojected (rows, stride): the sum of `blocks` arrays (rows, width), `block_stride`
// apart, of each of two directions. Grid (blocks of threads, 1, directions); a thread makes four columns.
extern "C" __global__ void __launch_bounds__(256) sum_blocks(
    const float* source, scalar_t* dprojected, int64 rows, int64 width, int64 blocks, int64 stride) {
    const int64 parts = width / 4, i = int64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= rows * parts) return;
    source += blockIdx.z * blocks * rows * width + i * 4;
    float4 sum = *reinterpret_cast<const float4*>(source);
    for (int64 block = 1; block < blocks; ++block) {
        const float4 more = *reinterpret_cast<const float4*>(source + block * rows * width);
        sum = make_float4(sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w);
    }
    scalar_t* target = dprojected + (blockIdx.z * rows + i / parts) * stride + (stride - width) + i % parts * 4;
    *reinterpret_cast<uint2*>(target) = make_uint2(narrow2(sum.x, sum.y), narrow2(sum.z, sum.w));
}
