// Kernels of test_cuda_runtime.py: every function of device.cuh, emulated or on a GPU. `fault`, 0 there, plants
// mistakes that the emulation must find.
#include "device.cuh"

// wide = widen(half), half = narrow(v) of n floats, n even; the same by pairs; to TF32.
extern "C" __global__ void __launch_bounds__(128) conversions(
    const float* v, scalar_t* half, float* wide, unsigned* half_pairs, float* wide_pairs, unsigned* tf32,
    long long n) {
    for (long long i = blockIdx.x * blockDim.x + threadIdx.x; i < n / 2; i += gridDim.x * blockDim.x) {
        for (long long j = 2 * i; j < 2 * i + 2; ++j) {
            half[j] = narrow(v[j]);
            wide[j] = widen(half[j]);
            tf32[j] = to_tf32(v[j]);
        }
        half_pairs[i] = narrow2(v[2 * i], v[2 * i + 1]);
        widen2(half_pairs[i], wide_pairs[2 * i], wide_pairs[2 * i + 1]);
    }
}

// out[6, n]: ex2, lg2, rcp, sigmoid, softplus, its slope.
extern "C" __global__ void functions(const float* __restrict__ v, float* __restrict__ out, long long n) {
    const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i >= n) return;
    float value, slope;
    softplus_and_slope(v[i], value, slope);
    const float results[6] = {ex2(v[i]), lg2(v[i]), rcp(v[i]), sigmoid(v[i]), value, slope};
    for (int k = 0; k < 6; ++k) out[k * n + i] = results[k];
}

// c[16, 8] = scale a[16, 8] b[8, 8] for every warp of every block.
extern "C" __global__ void products(const float* a, const float* b, float* c, float scale, int warps) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int at = blockIdx.x * warps + warp;
    a += at * 128, b += at * 64, c += at * 128;
    const unsigned left[4] = {to_tf32(a[g * 8 + t]), to_tf32(a[(g + 8) * 8 + t]), to_tf32(a[g * 8 + t + 4]),
                              to_tf32(a[(g + 8) * 8 + t + 4])};
    const unsigned right[2] = {to_tf32(b[t * 8 + g]), to_tf32(b[(t + 4) * 8 + g])};
    float sums[4] = {1.0f, 2.0f, 3.0f, 4.0f};
    mma_tf32(sums, left, right);
    c[g * 8 + 2 * t] = scale * (sums[0] - 1.0f), c[g * 8 + 2 * t + 1] = scale * (sums[1] - 2.0f);
    c[(g + 8) * 8 + 2 * t] = scale * (sums[2] - 3.0f), c[(g + 8) * 8 + 2 * t + 1] = scale * (sums[3] - 4.0f);
}

// c[16, 8] += a[16, 4] b[4, 8], one warp.
extern "C" __global__ void short_product(const float* a, const float* b, float* c) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    float sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    const unsigned left[2] = {__float_as_uint(a[g * 4 + t]), __float_as_uint(a[(g + 8) * 4 + t])};
    mma_tf32(sums, left, __float_as_uint(b[t * 8 + g]));
    for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

// out[block] = tiles of 128 floats of x[block], each backwards, in a pipeline of two; the last tile's sums over pairs
// of lanes behind them. 128 threads; 4 of a tile's floats come in copies of 4 bytes.
extern "C" __global__ void pipeline(const float* x, float* out, long long tiles, int fault) {
    DYNAMIC_SHARED(shared);
    float* buffer = reinterpret_cast<float*>(shared);
    const int thread = threadIdx.x;
    x += blockIdx.x * tiles * 128, out += blockIdx.x * (tiles + 1) * 128;
    auto fetch = [&](long long tile) {
        float* target = buffer + tile % 2 * 128;
        if (thread < 31) cp_async16(target + 4 * thread, x + tile * 128 + 4 * thread);
        else if (thread < 35) cp_async4(target + 93 + thread, x + tile * 128 + 93 + thread);
    };
    if (fault != 1) fetch(0);  // 1: read what nothing has written
    cp_async_commit();
    float last = 0.0f;
    for (long long tile = 0; tile < tiles; ++tile) {
        if (tile + 1 < tiles) fetch(tile + 1);
        cp_async_commit();
        if (fault != 2) cp_async_wait<1>();  // 2: read what is still being copied
        if (fault != 3) sync_block();        // 3: read what another thread waits for
        last = buffer[tile % 2 * 128 + 127 - thread];
        out[tile * 128 + thread] = last;
        if (fault != 4) sync_block();        // 4: overwrite what another thread still reads
    }
    out[tiles * 128 + thread] = last + shfl_xor(last, 1);
}

// Threads 0 to 63 and 64 to 127 pass their values on among themselves, warps too, each through the same memory.
extern "C" __global__ void barriers(const float* x, float* out, int fault) {
    DYNAMIC_SHARED(shared);
    float* buffer = reinterpret_cast<float*>(shared);
    const int thread = threadIdx.x, half = thread / 64;
    buffer[thread] = x[thread];
    if (fault == 1) half ? sync_named<2, 128>() : sync_named<1, 128>();  // 1: waits for too many
    else if (half == 0) sync_named<1, 64>();
    else for (int i = 0; i < 3; ++i) sync_named<2, 64>();
    float v = buffer[half * 64 + (thread + 5) % 64];
    sync_block();
    buffer[thread] = v;
    if (fault == 2 && thread == 40) shfl_xor(v, 1);  // 2: lanes part
    else if (fault != 3) sync_warp();                // 3: read what other lanes are about to write
    v = buffer[thread ^ 9];
    if (fault == 4 && thread == 99) return;          // 4: a thread does not come
    sync_block();
    if (fault == 5) buffer[128 + thread] = v;        // 5: behind the end
    if (fault == 6) cp_async16(buffer + 1, x);       // 6: misaligned
    if (fault == 7) cp_async16(buffer + 128, x);     // 7: a copy to behind the end
    if (fault == 8) sync_named<0, 128>();             // 8: the block's own barrier
    out[thread] = v;
}
