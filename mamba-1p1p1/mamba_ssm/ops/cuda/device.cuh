// Device functions of this package's CUDA kernels. NVRTC compiles them without any of CUDA's headers: inline PTX.
//
// Sources are of PTX ISA 8 (docs.nvidia.com/cuda/parallel-thread-execution): "ex2.approx", "cvt", "cp.async",
// "Matrix fragments for mma.m16n8k8 with .tf32", "bar". Compute capability 8.0 or newer.
//
// With VIM_EMULATION, tests/cuda_emulation.h has defined the functions of the first part, and a C++ compiler for the
// host compiles the kernels; the second part is the same for both.
#pragma once

#ifndef HALF_IS_BF16  // what a scalar_t is: 1 bfloat16, 0 float16
#define HALF_IS_BF16 1
#endif

typedef unsigned short scalar_t;

#ifndef VIM_EMULATION

#define DEVICE __device__ __forceinline__
// A block's dynamic shared memory, as chars.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]

// --- conversions

DEVICE float widen(scalar_t half) {
#if HALF_IS_BF16
    return __uint_as_float(unsigned(half) << 16);
#else
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
#endif
}

// Round to nearest, ties to even; NaN stays NaN.
DEVICE scalar_t narrow(float value) {
    scalar_t half;
#if HALF_IS_BF16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(value));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
#endif
    return half;
}

DEVICE unsigned narrow2(float low, float high) {
    unsigned word;
#if HALF_IS_BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
#endif
    return word;
}

// The nearest TF32, ties away from zero: the operands of mma_tf32.
DEVICE unsigned to_tf32(float value) {
    unsigned word;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(value));
    return word;
}

// --- the special function unit: about 2 units in the last place, subnormals are zero

DEVICE float ex2(float v) {
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(v));
    return value;
}

DEVICE float lg2(float v) {
    float value;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(v));
    return value;
}

DEVICE float rcp(float v) {
    float value;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(v));
    return value;
}

// --- copies from global to shared memory that overlap with other work

// 16 bytes, aligned to 16, past the first-level cache.
DEVICE void cp_async16(void* shared, const void* global) {
    unsigned address = unsigned(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}

// The same where `wanted`, without a branch.
DEVICE void cp_async16_if(bool wanted, void* shared, const void* global) {
    unsigned address = unsigned(__cvta_generic_to_shared(shared));
    asm volatile(
        "{ .reg .pred wanted; setp.ne.u32 wanted, %0, 0; @wanted cp.async.cg.shared.global [%1], [%2], 16; }" ::"r"(
            unsigned(wanted)),
        "r"(address), "l"(global)
        : "memory");
}

// 4 bytes, aligned to 4.
DEVICE void cp_async4(void* shared, const void* global) {
    unsigned address = unsigned(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(global) : "memory");
}

// Close a group: this thread's copies since the last one.
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait for all of this thread's groups but the last N. Other threads see the copies after a barrier only.
template <int N>
DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// --- warps and blocks: every lane, or every thread, must take part

// This thread's warp, in a form that the compiler knows to be equal in all lanes: branches on it do not diverge.
DEVICE int warp_of_block() { return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0); }
DEVICE float shfl_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_block() { __syncthreads(); }

// Barrier ID (1 to 15) of COUNT threads, whole warps. Constants: a number in a register makes a block claim all barriers
// that there are, and then fewer blocks fit on a multiprocessor.
template <int ID, int COUNT>
DEVICE void sync_named() {
    asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(COUNT) : "memory");
}

// From block to block, by one thread of each: what a block has written before the barrier that its announcing thread has
// passed is seen by another one behind the barrier that its waiting thread comes to next. `flag` is zero before.
DEVICE void announce(int* flag) { asm volatile("st.release.gpu.global.s32 [%0], 1;" ::"l"(flag) : "memory"); }
DEVICE void await(const int* flag) {
    int announced;
    do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(announced) : "l"(flag) : "memory");
    while (!announced);
}

// base + count bytes, in one instruction also where `bytes` is a constant, whose 64-bit product would be three.
DEVICE const char* advance(const char* base, int count, int bytes) {
    const char* sum;
    asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(sum) : "r"(count), "r"(bytes), "l"(base));
    return sum;
}

// Hold a value in a register: the compiler does not know how to make it again.
template <typename T>
DEVICE void hold(T& value) {
    if constexpr (sizeof(T) == 8) asm volatile("" : "+l"(value));
    else asm volatile("" : "+r"(value));
}

// c[16 x 8] += a[16 x 8] b[8 x 8]. With g = lane / 4 and t = lane % 4, a lane holds
//   a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)    b: (t, g), (t + 4, g)
//   c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
// as (row, column); a and b by to_tf32.
DEVICE void mma_tf32(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c[16 x 8] += a[16 x 4] b[4 x 8]: a: (g, t), (g + 8, t)    b: (t, g)    c as above.
DEVICE void mma_tf32(float (&c)[4], const unsigned (&a)[2], unsigned b) {
    asm volatile(
        "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
}

#endif  // VIM_EMULATION

// --- for both

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

// Two adjacent scalars as they lie in memory: the first is the low half of the word.
DEVICE void widen2(unsigned word, float& low, float& high) {
#if HALF_IS_BF16
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000u);
#else
    low = widen(scalar_t(word));
    high = widen(scalar_t(word >> 16));
#endif
}

DEVICE float sigmoid(float v) { return rcp(1.0f + ex2(v * -LOG2_E)); }

// log(1 + e^v) = max(v, 0) + log(1 + u) with u = e^-|v|, relative error 4e-7. The polynomial is log(1 + u) / u on
// [0, 1], minimax (that of triton/common.py): the logarithm of a rounded 1 + u would lose the digits of small steps.
DEVICE float softplus(float v) {
    float u = ex2(fabsf(v) * -LOG2_E);
    float p = 0.0440892386f - u * 0.0085390965f;
    p = p * u - 0.1076811710f;
    p = p * u + 0.1774520437f;
    p = p * u - 0.2449544979f;
    p = p * u + 0.3327547759f;
    p = p * u - 0.4999740526f;
    p = p * u + 0.9999998057f;
    return fmaxf(v, 0.0f) + p * u;
}

// And its derivative, e^(v - softplus(v)): 1 - e^-softplus(v) would lose the digits of small slopes.
DEVICE void softplus_and_slope(float v, float& value, float& slope) {
    value = softplus(v);
    slope = ex2((v - value) * LOG2_E);
}
