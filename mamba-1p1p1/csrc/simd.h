// Vectors of float32 lanes for one instruction set, and the few functions of them that the kernels need.
//
// Each kernel source is compiled once per instruction set, so everything here is in an unnamed namespace and
// no standard-library template is used: a shared inline function compiled for AVX-512 could otherwise be the
// copy that the linker keeps, and then run on a machine without it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define SIMD_AVX512 1
constexpr int VL = 16;
#elif defined(__AVX2__) && defined(__FMA__)
#define SIMD_AVX2 1
constexpr int VL = 8;
#else
constexpr int VL = 4;  // SSE2 or NEON registers; plain C++ elsewhere
#if defined(__aarch64__)
#define SIMD_NEON 1
#endif
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));

struct bf16 {
    uint16_t bits;
};

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
template <class T> constexpr T smaller(T a, T b) { return a < b ? a : b; }
template <class T> constexpr T larger(T a, T b) { return a > b ? a : b; }

INLINE vf set1(float s) { return s - vf{}; }

// The 32 bits at p, whatever they stand for, in every lane.
INLINE vf broadcast(const void* p) {
    int32_t bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return (vf)(bits - vi{});
}

INLINE vf fma(vf a, vf b, vf c) {
#if SIMD_AVX512
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif SIMD_AVX2
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// For a constant a: the result is NaN where b is. (With x86's instructions not where a alone is.)
INLINE vf vmax(vf a, vf b) {
#if SIMD_AVX512
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif SIMD_AVX2
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif SIMD_NEON
    return (vf)vmaxq_f32((float32x4_t)a, (float32x4_t)b);
#else
    return a > b ? a : b;
#endif
}

INLINE vf vmin(vf a, vf b) {
#if SIMD_AVX512
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif SIMD_AVX2
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#elif SIMD_NEON
    return (vf)vminq_f32((float32x4_t)a, (float32x4_t)b);
#else
    return a < b ? a : b;
#endif
}

INLINE vf vabs(vf a) { return (vf)((vu)a & 0x7fffffffu); }

INLINE float sum_lanes(vf a) {
#if SIMD_AVX512
    return _mm512_reduce_add_ps((__m512)a);
#else
    float total = 0;
    UNROLL for (int i = 0; i < VL; ++i) total += a[i];
    return total;
#endif
}

// Loads and stores of float32 or bfloat16 memory; `lanes` < VL reads or writes only that many.

INLINE vf load(const float* p) {
    vf v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

INLINE vf load(const bf16* p) {
    vh h;
    __builtin_memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
}

INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }

// Round to nearest even; a not-a-number keeps a bit set.
INLINE vh to_bf16(vf v) {
    vu bits = (vu)v;
    vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    vu quiet = (bits >> 16) | 0x40u;
    return __builtin_convertvector((v == v) ? rounded : quiet, vh);
}

INLINE void store(bf16* p, vf v) {
    vh h = to_bf16(v);
    __builtin_memcpy(p, &h, sizeof h);
}

template <class T> INLINE vf load(const T* p, int lanes) {
    if (__builtin_expect(lanes >= VL, 1)) return load(p);
    T part[VL] = {};
    for (int i = 0; i < lanes; ++i) part[i] = p[i];
    return load(part);
}

template <class T> INLINE void store(T* p, vf v, int lanes) {
    if (__builtin_expect(lanes >= VL, 1)) return store(p, v);
    T part[VL];
    store(part, v);
    for (int i = 0; i < lanes; ++i) p[i] = part[i];
}

INLINE float scalar(float value) { return value; }
INLINE float scalar(bf16 value) {
    uint32_t bits = (uint32_t)value.bits << 16;
    float result;
    __builtin_memcpy(&result, &bits, 4);
    return result;
}

// Exponents are measured in units of ln 2 / EXP_STEPS, so that one instruction looks up the fraction's
// 2^(j / EXP_STEPS) by the low bits of the rounded number. Entry j has j << EXP_SHIFT taken off, which adding the
// rounded number's bits at EXP_SHIFT brings back, together with the whole part in the exponent's place.
#if SIMD_AVX512
constexpr int EXP_STEPS = 16, EXP_SHIFT = 19;
alignas(64) constexpr uint32_t EXP_TABLE[] = {
    0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
    0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d,
};
#elif SIMD_AVX2
constexpr int EXP_STEPS = 8, EXP_SHIFT = 20;
alignas(32) constexpr uint32_t EXP_TABLE[] = {
    0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7,
};
#else
constexpr int EXP_STEPS = 1, EXP_SHIFT = 23;
#endif
constexpr float EXP_UNIT = LN2 / EXP_STEPS, UNITS_PER_ONE = LOG2E * EXP_STEPS;

// x with its magnitude limited to that of 2^126, in the unit above. AVX-512 has one instruction for it, which gives the
// limit for what is not a number; see `number_or`.
INLINE vf clamp_power(vf x) {
#if SIMD_AVX512
    return (vf)_mm512_range_ps((__m512)x, (__m512)set1(126.f * EXP_STEPS), 2);  // the lesser magnitude, with x's sign
#else
    return vmax(set1(-126.f * EXP_STEPS), vmin(set1(126.f * EXP_STEPS), x));
#endif
}

// A tile's first state h, or the rate where that is not a number: its exponential may be one, and must not hide it. Time
// steps that are none show in the drive.
INLINE vf number_or(vf h, vf rate) { return rate == rate ? h : rate; }

// exp(EXP_UNIT d a). Nearest-integer reduction d a = n + f, then 2^(n / EXP_STEPS) (1 + f q(f)) with q the minimax fit
// of (2^(f / EXP_STEPS) - 1) / f in relative error, which is at most 1.1e-7 with 16 steps, 8.6e-7 with 8 and 4.7e-7
// with one. It is the relative error of the decay rate before it is rounded to float32, what the error of a slow state is
// made of, and the value at 0 is exactly 1. Beyond the range of float32 the result is next to zero or beyond 2^126.
INLINE vf exp_of_product(vf d, vf a) {
    const vf magic = set1(12582912.f);  // 1.5 * 2^23: adding it rounds to the nearest integer
    vf product = d * a;
#if SIMD_AVX512 || SIMD_AVX2
    asm("" : "+v"(product));  // keeps it out of the sums below: additions have units of their own on some processors
#endif
    vf limited = clamp_power(product);
    vf rounded = limited + magic;
    vf f = limited - (rounded - magic);
#if SIMD_AVX512
    __m512 entry = _mm512_permutexvar_ps((__m512i)rounded, _mm512_load_ps(EXP_TABLE));
#elif SIMD_AVX2
    __m256 entry = _mm256_permutevar8x32_ps(_mm256_load_ps((const float*)EXP_TABLE), (__m256i)rounded);
#else
    vf p = fma(f, set1(0.0013333538081496954f), set1(0.009666245430707932f));
    p = fma(p, f, set1(0.05550500378012657f));
    p = fma(p, f, set1(0.24022351205348969f));
    p = fma(p, f, set1(0.6931471228599548f));
    p = fma(p, f, set1(1.f));
    return (vf)((vi)p + ((vi)rounded << EXP_SHIFT));
#endif
#if SIMD_AVX512 || SIMD_AVX2
    vf power = (vf)((vi)entry + ((vi)rounded << EXP_SHIFT));
#if SIMD_AVX512
    vf q = fma(f, set1(1.3550808034779038e-05f), set1(0.0009384123259223998f));
    q = fma(q, f, set1(0.043321698904037476f));
#else
    vf q = fma(f, set1(0.0001084064642782323f), set1(0.0037539794575423002f));
    q = fma(q, f, set1(0.08664339780807495f));
#endif
    return fma(power * f, q, power);
#endif
}

// While it lives, this thread's subnormal numbers count as zero. An adjoint that decays over tokens without a gradient
// of their own passes through them, and each operation on one costs over a hundred cycles.
class FlushSubnormals {
#if defined(__x86_64__)
    unsigned before = _mm_getcsr();

  public:
    FlushSubnormals() { _mm_setcsr(before | 0x8040); }
    ~FlushSubnormals() { _mm_setcsr(before); }
#elif defined(__aarch64__)
    uint64_t before;

  public:
    FlushSubnormals() {
        asm volatile("mrs %0, fpcr" : "=r"(before));
        asm volatile("msr fpcr, %0" ::"r"(before | (1ull << 24)));
    }
    ~FlushSubnormals() { asm volatile("msr fpcr, %0" ::"r"(before)); }
#else
  public:
    FlushSubnormals() {}
    ~FlushSubnormals() {}
#endif
};

// x, or the number of magnitude 87 with its sign: beyond it a float32 sigmoid no longer changes.
INLINE vf clamp_exponent(vf x) {
#if SIMD_AVX512
    return (vf)_mm512_range_ps((__m512)x, (__m512)set1(87.f), 2);  // the lesser magnitude, with the first's sign
#else
    return vmax(set1(-87.f), vmin(set1(87.f), x));
#endif
}

INLINE vf exp_minus(vf x) { return exp_of_product(clamp_exponent(x), set1(-UNITS_PER_ONE)); }

// 1 / d to about one unit in the last place: the processor's estimate and a Newton step, a fifth of a division. AVX2's
// estimate has twelve bits and takes two: of d = 1 it must be 1, for silu's slope is 1 - sigmoid times any number.
INLINE vf reciprocal(vf d) {
#if SIMD_AVX512
    vf r = (vf)_mm512_rcp14_ps((__m512)d);
#elif SIMD_AVX2
    vf r = (vf)_mm256_rcp_ps((__m256)d);
    r = fma(r, fma(-d, r, set1(1.f)), r);
#else
    return 1.f / d;
#endif
#if SIMD_AVX512 || SIMD_AVX2
    return fma(r, fma(-d, r, set1(1.f)), r);
#endif
}

INLINE vf sigmoid(vf x) { return reciprocal(1.f + exp_minus(x)); }

// x, or -87 where it is less: times the sigmoid of that, which is limited as well, it is next to zero.
INLINE vf clamp_tail(vf x) { return vmax(set1(-87.f), x); }

INLINE vf silu(vf x) { return clamp_tail(x) * sigmoid(x); }

// d silu(x) / dx, given s = sigmoid(x).
INLINE vf silu_slope(vf x, vf s) { return s * fma(clamp_tail(x), 1.f - s, set1(1.f)); }

// softplus(x) in units of EXP_UNIT. max(x, 0) + log1p(exp(-|x|)), where log1p(e) = e q(e) with q the minimax fit on
// [0, 1] (2e-7), keeps the relative accuracy of small results. e = exp(-|x|).
INLINE vf softplus(vf x, vf e) {
    constexpr float S = EXP_STEPS;
    vf q = fma(e, set1(-0.012319466099143028f * S), set1(0.06360787153244019f * S));
    q = fma(q, e, set1(-0.15535186231136322f * S));
    q = fma(q, e, set1(0.2560097277164459f * S));
    q = fma(q, e, set1(-0.35339483618736267f * S));
    q = fma(q, e, set1(0.48006370663642883f * S));
    q = fma(q, e, set1(-0.7213100790977478f * S));
    q = fma(q, e, set1(1.4426947832107544f * S));
    return fma(e, q, vmax(set1(0.f), x) * UNITS_PER_ONE);
}

INLINE vf softplus(vf x) { return softplus(x, exp_minus(vabs(x))); }

// The derivative of softplus(x), a sigmoid, from e = exp(-|x|).
INLINE vf softplus_slope(vf x, vf e) {
    vf s = reciprocal(1.f + e);
    return x < 0.f ? e * s : s;
}

// Both operands' lanes in turn: of their first halves (low), of their second halves (high). A lane of b counts from VL on.
#if SIMD_AVX512
#define LOW_LANES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_LANES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif SIMD_AVX2
#define LOW_LANES 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH_LANES 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LOW_LANES 0, 4, 1, 5
#define HIGH_LANES 2, 6, 3, 7
#endif
INLINE void interleave(vf a, vf b, vf& low, vf& high) {
#if defined(__clang__)
    low = __builtin_shufflevector(a, b, LOW_LANES);
    high = __builtin_shufflevector(a, b, HIGH_LANES);
#else
    low = __builtin_shuffle(a, b, vi{LOW_LANES});
    high = __builtin_shuffle(a, b, vi{HIGH_LANES});
#endif
}
#undef LOW_LANES
#undef HIGH_LANES

// Transposition in registers: VL rows in, VL columns out.
INLINE void transpose(vf* rows) {
    vf other[VL];
    UNROLL for (int round = 1; round < VL; round *= 2) {
        UNROLL for (int i = 0; i < VL / 2; ++i)
            interleave(rows[i], rows[i + VL / 2], other[2 * i], other[2 * i + 1]);
        UNROLL for (int i = 0; i < VL; ++i) rows[i] = other[i];
    }
}

}  // namespace
