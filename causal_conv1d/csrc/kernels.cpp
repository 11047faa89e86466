// Causal depthwise convolution with optional SiLU for one instruction set, named by the macro ISA; compiled once
// for each (setup.py). Plain loops over contiguous elements, which the compiler turns into vector code.
//
// Everything but the exported functions is in an unnamed namespace and no standard-library template is used: a
// shared inline function compiled for AVX-512 could otherwise be the copy that the linker keeps.
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

enum DType : int64_t { FLOAT32 = 0, BFLOAT16 = 1 };

// A (B, D, L) tensor with contiguous channels or contiguous tokens; strides count elements.
struct Sequence {
    void* data;
    int64_t batch, channel, token;
};

// causal_conv1d/cpu.py mirrors this. All but the sequences is contiguous float32; null stands for absent.
struct Arguments {
    int64_t batch, channels, length, width, dtype, silu, channels_last, threads;
    Sequence x, out;
    const float *weight, *bias, *initial;  // (W, D), (D,), (B, W-1, D)
    Sequence dout, dx;
    float *dweight, *dbias, *dinitial;  // per batch item: (B, W, D), (B, D); (B, W-1, D)
};

struct bf16 {
    uint16_t bits;
};

constexpr int MAX_WIDTH = 8;
constexpr int CHANNELS = 64, TOKENS_LAST = 32;  // a tile of channels-last data
constexpr int TOKENS_FIRST = 1024;              // and of one channel's contiguous tokens
constexpr int HALO = MAX_WIDTH - 1;
constexpr int PANEL = (TOKENS_LAST + 2 * HALO) * CHANNELS;
static_assert(PANEL >= TOKENS_FIRST + 2 * HALO, "a panel holds a tile of either layout");

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline float widen(float v) { return v; }
inline float widen(bf16 v) {
    uint32_t bits = (uint32_t)v.bits << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline void narrow(float v, float& out) { out = v; }
// Round to nearest even; a not-a-number stays one.
inline void narrow(float v, bf16& out) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out.bits = (uint16_t)(v == v ? rounded : ((bits >> 16) | 0x40u));
}

// 1 / (1 + exp(-x)). 2^y with nearest-integer reduction and the minimax fit of (2^f - 1) / f, 4e-7 relative.
inline float sigmoid(float x) {
    float y = x * -1.4426950408889634f;
    y = y < -126.f ? -126.f : y;
    y = y > 126.f ? 126.f : y;
    float shifted = y + 12582912.f, f = y - (shifted - 12582912.f);
    float p = 0.0013333538081496954f * f + 0.009666245430707932f;
    p = p * f + 0.05550500378012657f;
    p = p * f + 0.24022351205348969f;
    p = p * f + 0.6931471228599548f;
    p = p * f + 1.f;
    int32_t bits, power;
    memcpy(&bits, &p, 4);
    memcpy(&power, &shifted, 4);
    bits += (int32_t)((uint32_t)power << 23);
    memcpy(&p, &bits, 4);
    return 1.f / (1.f + p);
}

// x, or -88 where it is less: times the sigmoid of that, which is limited as well, it is next to zero.
inline float clamp_tail(float x) { return x < -88.f ? -88.f : x; }

// A tile: tokens [t0, t0 + tokens) of `channels` channels from c0. In memory a panel of rows of `inner` numbers:
// channels-last, a row is a token; else there is one row, of tokens, and one channel. `shift` leads to the next token.
template <bool LAST> struct Tile {
    int64_t b, c0, t0;
    int channels, tokens;

    int rows(int n) const { return LAST ? n : 1; }
    int inner(int n) const { return LAST ? channels : n; }
    int shift() const { return LAST ? channels : 1; }
    static int weight(int i) { return LAST ? i : 0; }
};

template <class T> T* address(const Sequence& s, int64_t b, int64_t c, int64_t t) {
    return (T*)s.data + b * s.batch + c * s.channel + t * s.token;
}

// panel <- tokens [from, to) of the sequence; before it the initial states or zeros, after it zeros.
template <class T, bool LAST>
void load_panel(const Arguments& a, const Sequence& s, const float* initial, Tile<LAST> tile, int64_t from, int64_t to,
                float* panel) {
    const int n = tile.channels;
    for (; from < 0; ++from, panel += n)
        for (int i = 0; i < n; ++i)
            panel[i] =
                initial ? initial[(tile.b * (a.width - 1) + from + a.width - 1) * a.channels + tile.c0 + i] : 0.f;
    const int64_t inside = smaller(to, a.length) - from;
    for (int64_t r = 0; inside > 0 && r < tile.rows(inside); ++r) {
        const T* source = address<T>(s, tile.b, tile.c0, from + r);
        const int inner = tile.inner(inside);
#pragma omp simd
        for (int i = 0; i < inner; ++i) panel[r * inner + i] = widen(source[i]);
    }
    if (to > a.length) {
        const int64_t done = inside > 0 ? inside : 0;
        memset(panel + done * n, 0, (to - from - done) * n * sizeof(float));
    }
}

template <class T, bool LAST>
void store_panel(const Sequence& s, Tile<LAST> tile, const float* panel) {
    for (int r = 0; r < tile.rows(tile.tokens); ++r) {
        T* to = address<T>(s, tile.b, tile.c0, tile.t0 + r);
        const int inner = tile.inner(tile.tokens);
#pragma omp simd
        for (int i = 0; i < inner; ++i) narrow(panel[r * inner + i], to[i]);
    }
}

// weights[k * channels + i] and the bias of a tile's channels.
struct Filter {
    alignas(64) float weight[MAX_WIDTH * CHANNELS] = {}, bias[CHANNELS] = {};

    Filter() = default;
    Filter(const Arguments& a, int64_t c0, int channels) {
        for (int i = 0; i < channels; ++i) {
            for (int64_t k = 0; k < a.width; ++k) weight[k * channels + i] = a.weight[k * a.channels + c0 + i];
            bias[i] = a.bias ? a.bias[c0 + i] : 0.f;
        }
    }
};

// out[t] = bias + sum_k weight[k] x[t + k] for n tokens; x starts width - 1 tokens earlier.
template <int WIDTH, bool LAST>
void convolve(const Filter& f, Tile<LAST> tile, int n, const float* x, float* out) {
    const int inner = tile.inner(n), shift = tile.shift();
    for (int r = 0; r < tile.rows(n); ++r) {
#pragma omp simd
        for (int i = 0; i < inner; ++i) {
            float sum = f.bias[tile.weight(i)];
            for (int k = 0; k < WIDTH; ++k)
                sum += f.weight[k * tile.channels + tile.weight(i)] * x[r * inner + i + k * shift];
            out[r * inner + i] = sum;
        }
    }
}

template <class T, int WIDTH, bool LAST> void forward_tile(const Arguments& a, const Filter& f, Tile<LAST> tile) {
    alignas(64) float x[PANEL], out[PANEL];
    load_panel<T>(a, a.x, a.initial, tile, tile.t0 + 1 - WIDTH, tile.t0 + tile.tokens, x);
    convolve<WIDTH>(f, tile, tile.tokens, x, out);
    if (a.silu) {
        const int count = tile.tokens * tile.channels;
#pragma omp simd
        for (int i = 0; i < count; ++i) out[i] = clamp_tail(out[i]) * sigmoid(out[i]);
    }
    store_panel<T>(a.out, tile, out);
}

// dx[t] = sum_k weight[k] grad[t + width - 1 - k] for n tokens; grad starts at the first of them.
template <int WIDTH, bool LAST>
void convolve_back(const Filter& f, Tile<LAST> tile, int n, const float* grad, float* dx) {
    const int inner = tile.inner(n), shift = tile.shift();
    for (int r = 0; r < tile.rows(n); ++r) {
#pragma omp simd
        for (int i = 0; i < inner; ++i) {
            float sum = 0;
            for (int k = 0; k < WIDTH; ++k)
                sum += f.weight[k * tile.channels + tile.weight(i)] * grad[r * inner + i + (WIDTH - 1 - k) * shift];
            dx[r * inner + i] = sum;
        }
    }
}

// sum[weight(i)] += sum over the tile's tokens of grad * x, or of grad alone.
template <bool LAST> void add_products(Tile<LAST> tile, const float* grad, const float* x, float* sum) {
    if (LAST) {
        float total[CHANNELS] = {};  // of the tile by itself: long sums drift less
        for (int r = 0; r < tile.tokens; ++r)
#pragma omp simd
            for (int i = 0; i < tile.channels; ++i)
                total[i] += grad[r * tile.channels + i] * (x ? x[r * tile.channels + i] : 1.f);
        for (int i = 0; i < tile.channels; ++i) sum[i] += total[i];
    } else {
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (int i = 0; i < tile.tokens; ++i) total += grad[i] * (x ? x[i] : 1.f);
        sum[0] += total;
    }
}

// What a tile adds to the gradients of its channels' filter, in Filter's form.
template <class T, int WIDTH, bool LAST>
void backward_tile(const Arguments& a, const Filter& f, Tile<LAST> tile, Filter& sums) {
    alignas(64) float x[PANEL], grad[PANEL], pre[PANEL];
    const int n = tile.tokens + WIDTH - 1;  // outputs that the tile's inputs reach
    const int64_t to = tile.t0 + n;
    load_panel<T>(a, a.x, a.initial, tile, tile.t0 + 1 - WIDTH, to, x);
    float* first = grad + (WIDTH - 1) * tile.channels;  // room for the gradient's tokens before the sequence
    memset(grad, 0, (WIDTH - 1) * tile.channels * sizeof(float));
    load_panel<T>(a, a.dout, nullptr, tile, tile.t0, to, first);
    if (a.silu) {
        convolve<WIDTH>(f, tile, n, x, pre);
#pragma omp simd
        for (int i = 0; i < n * tile.channels; ++i) {
            float s = sigmoid(pre[i]);
            first[i] *= s * (1.f + clamp_tail(pre[i]) * (1.f - s));
        }
    }
    for (int k = 0; k < WIDTH; ++k)
        add_products(tile, first, x + k * tile.shift(), sums.weight + k * tile.channels);
    add_products(tile, first, (const float*)nullptr, sums.bias);
    convolve_back<WIDTH>(f, tile, tile.tokens, first, pre);
    store_panel<T>(a.dx, tile, pre);
    if (a.dinitial && tile.t0 == 0) {
        convolve_back<WIDTH>(f, tile, WIDTH - 1, grad, pre);
        for (int j = 0; j < WIDTH - 1; ++j)
            for (int i = 0; i < tile.channels; ++i)
                a.dinitial[(tile.b * (WIDTH - 1) + j) * a.channels + tile.c0 + i] = pre[j * tile.channels + i];
    }
}

template <class T, int WIDTH, bool LAST, bool BACKWARD>
void run_channels(const Arguments& a, int64_t b, int64_t c0, int channels) {
    const Filter f(a, c0, channels);
    Filter sums;
    constexpr int TOKENS = LAST ? TOKENS_LAST : TOKENS_FIRST;
    for (int64_t t0 = 0; t0 < a.length; t0 += TOKENS) {
        Tile<LAST> tile{b, c0, t0, channels, (int)smaller(TOKENS, a.length - t0)};
        if (BACKWARD)
            backward_tile<T, WIDTH>(a, f, tile, sums);
        else
            forward_tile<T, WIDTH>(a, f, tile);
    }
    if (!BACKWARD) return;
    for (int i = 0; i < channels; ++i) {
        for (int k = 0; k < WIDTH; ++k)
            a.dweight[(b * WIDTH + k) * a.channels + c0 + i] = sums.weight[k * channels + i];
        a.dbias[b * a.channels + c0 + i] = sums.bias[i];
    }
}

template <class T, int WIDTH, bool LAST, bool BACKWARD> void run_all(const Arguments& a) {
    const int64_t step = LAST ? CHANNELS : 1, blocks = (a.channels + step - 1) / step;
#pragma omp parallel for num_threads((int)(a.threads > 1 ? a.threads : 1)) schedule(static)
    for (int64_t i = 0; i < a.batch * blocks; ++i) {
        const int64_t c0 = i % blocks * step;
        run_channels<T, WIDTH, LAST, BACKWARD>(a, i / blocks, c0, (int)smaller(step, a.channels - c0));
    }
}

template <class T, bool LAST, bool BACKWARD> int run_width(const Arguments& a) {
    switch (a.width) {
        case 2: return run_all<T, 2, LAST, BACKWARD>(a), 0;
        case 3: return run_all<T, 3, LAST, BACKWARD>(a), 0;
        case 4: return run_all<T, 4, LAST, BACKWARD>(a), 0;
        default: return 1;
    }
}

template <bool BACKWARD> int run(const Arguments& a) {
    if (a.dtype == BFLOAT16)
        return a.channels_last ? run_width<bf16, true, BACKWARD>(a) : run_width<bf16, false, BACKWARD>(a);
    return a.channels_last ? run_width<float, true, BACKWARD>(a) : run_width<float, false, BACKWARD>(a);
}

}  // namespace

#define JOIN(a, b) a##_##b
#define NAME(function, isa) JOIN(function, isa)
#define EXPORT(function) extern "C" __attribute__((visibility("default"))) int NAME(causal_conv1d_##function, ISA)

// Both return 0, or 1 for a width that is not compiled in.
EXPORT(forward)(const Arguments* a) { return run<false>(*a); }
EXPORT(backward)(const Arguments* a) { return run<true>(*a); }
